// SPDX-License-Identifier: Apache-2.0
#include "sm90.cuh"

HSTU_SM90_INSTANTIATE(__half, 64)
