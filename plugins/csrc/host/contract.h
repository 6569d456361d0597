// SPDX-License-Identifier: Apache-2.0
// What a builder asks of the plugins: needs no GPU.
#pragma once

#include "checks.h"
#include "creators.h"

namespace hstu_trt::host {

void check_attention_contract(Checks& checks, Creators const& creators);

// `tables`: a tables folder with a table "item_id" of width 8, as HSTU_TRT_TABLES names it; or nullptr.
void check_embedding_contract(Checks& checks, Creators const& creators, char const* tables);

}  // namespace hstu_trt::host
