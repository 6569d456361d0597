// SPDX-License-Identifier: Apache-2.0
// What a runtime does with the plugins: on a GPU.
#pragma once

#include "checks.h"
#include "creators.h"

namespace hstu_trt::host {

void run_attention(Checks& checks, Creators const& creators);

// `tables`: a tables folder with a table "item_id" of width 8 whose contents are row * 8 + column; or nullptr.
void run_embedding(Checks& checks, Creators const& creators, char const* tables);

// `folder`: cases.txt and the files it names; what the host tier answered for lookups by name.
void run_stored_cases(Checks& checks, Creators const& creators, char const* folder);

// `folder`: versions of a table, exchanged while lookups go on.
void run_versions(Checks& checks, Creators const& creators, char const* folder);

// Host time of enqueue beside that of the bare launch; prints a table and a line of JSON per case.
void measure_overhead(Checks& checks, Creators const& creators);

}  // namespace hstu_trt::host
