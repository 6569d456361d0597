// SPDX-License-Identifier: Apache-2.0
#include "sm90_cluster.cuh"

HSTU_SM90_CLUSTER_INSTANTIATE(__nv_fp8_e4m3, 128)
