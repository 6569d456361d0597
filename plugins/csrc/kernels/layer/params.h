// SPDX-License-Identifier: Apache-2.0
// What stands between the matrix products of the model: plain data, no torch, no TensorRT.
//
// Rows are fp16, their elements side by side, 16-byte aligned; strides are in elements. Widths are multiples of 8, at
// most kMaxRowWidth. Outputs are fp16, or e4m3 with a static scale: stored = value / scale. Norms, activations and sums
// are computed in fp32. All pointers are device pointers.
#pragma once

#include <cstdint>

#include "../common/data_type.h"

namespace hstu_trt {

constexpr int kMaxRowWidth = 2048;
constexpr int kMaxActions = 12;

// A matrix of rows to be written.
struct RowsOut {
  void* data;
  int64_t stride;
  float scale;    // of kFloat8E4M3
  DataType type;  // kFloat16 or kFloat8E4M3
};

// out = f(LN(x')) with x' = x + delta, which is written to `sum`. f(y) = y, x' * sigmoid(y) or y * factor.
struct NormRowsParams {
  void const* x;       // [rows, width]
  void const* delta;   // [rows, width], or nullptr: x' = x
  void* sum;           // [rows, width], may be x; not written without delta
  float const* gain;   // [width]
  float const* bias;   // [width]
  void const* factor;  // [rows, width], or nullptr
  RowsOut out;         // [rows, width]
  int64_t x_stride;
  int64_t delta_stride;
  int64_t sum_stride;
  int64_t factor_stride;
  int32_t rows;
  int32_t width;
  int32_t swish;  // x' * sigmoid(LN(x'))
  float eps;
};

// joined = [SiLU(u), a, SiLU(u) * N(a)] where N is a layer norm over the row, or over each head with one gain and bias
// per head.
struct GateParams {
  void const* u;          // [rows, width], before SiLU
  void const* attention;  // [rows, width], width = heads * v_dim
  float const* gain;      // [width], or [heads] with group_norm
  float const* bias;
  RowsOut joined;  // [rows, 3 * width]
  int64_t u_stride;
  int64_t attention_stride;
  int32_t rows;
  int32_t width;
  int32_t heads;
  int32_t group_norm;
  int32_t keep_attention;  // the middle third is in place already
  float eps;
};

// Columns of a matrix, to be stored in e4m3.
struct QuantiseSegment {
  void const* x;  // [rows, width]
  RowsOut out;
  int64_t x_stride;
  int32_t rows;
  int32_t width;
};

struct QuantiseRowsParams {
  QuantiseSegment segments[3];
  int32_t count;
};

// Rows of a matrix that a token chooses.
struct RowChoice {
  void const* rows;      // [count + 1, width], or nullptr: none
  int64_t const* index;  // [tokens], outside of [0, count): the last row; or nullptr: token t takes row t
  int64_t count;
};

// Tokens from the parts of their embedding, and the first layer's norm of them:
//
//     x = sqrt(width) * (LN(content) + extra + action) + position + time        history and candidates
//     x = sqrt(width) * contextual + position + time                            contextual tokens
//
// in the split layout: all prefixes (contextual, then history), then all candidates. Positions count back from the
// newest event, which has slots + 1; candidates have `slots`, contextual token j has j.
// Time: bucket trunc(sqrt(minutes)) between the token and the user's last candidate.
struct EncodeTokensParams {
  void const* content;  // [tokens, width]
  float const* gain;    // [width]
  float const* bias;
  RowChoice extra;
  void const* actions_table;   // [2^action_count + 1, width]: each set of actions, the last for candidates; or nullptr
  int64_t const* actions;      // [tokens] bit masks
  void const* contextual;      // [users * slots, width]
  void const* position_table;  // [last_position + 1, width]
  void const* time_table;      // [last_bucket + 1, width]
  int64_t const* timestamps;   // [tokens] seconds; contextual tokens 0
  int32_t const* prefix_offsets;     // [users + 1]
  int32_t const* candidate_offsets;  // [users + 1]
  float const* norm_gain;            // [width] of the first layer
  float const* norm_bias;
  void* x;         // [tokens, width]
  RowsOut normed;  // [tokens, width]
  int64_t action_masks[kMaxActions];
  int32_t action_count;
  int32_t tokens;
  int32_t prefix_tokens;  // candidates begin here: prefix_offsets[users]
  int32_t users;
  int32_t slots;
  int32_t width;
  int32_t last_position;
  int32_t last_bucket;
  float eps;
  float norm_eps;
};

enum class Postprocessor : int32_t { kL2Norm = 0, kLayerNorm = 1, kTimestamp = 2 };

// User vectors: x normed by its length or by a layer norm; kTimestamp adds the hour of the day and the day of the week
// before the norm, as cos and sin by time_weight. Then their products with the item vectors LN(item).
struct UserVectorsParams {
  void const* x;              // [rows, width]
  float const* gain;          // [width]
  float const* bias;          // [width]
  float const* time_weight;   // [4, width]
  int64_t const* timestamps;  // [rows] seconds
  void* users;                // [rows, width], or nullptr
  void const* items;          // [rows, width] before their norm, or nullptr
  float const* item_gain;     // [width]
  float const* item_bias;     // [width]
  RowsOut product;            // [rows, width]; data is nullptr without items
  int64_t x_stride;
  int32_t rows;
  int32_t width;
  Postprocessor kind;
  float eps;
};

// scores[task] = (h * sigmoid(LN(h))) . weight[task] + bias[task], through a sigmoid for the first `binary` tasks.
struct ScoresParams {
  void const* hidden;        // [rows, width]
  float const* gain;         // [width]
  float const* bias;         // [width]
  float const* weight;       // [tasks, width]
  float const* weight_bias;  // [tasks]
  float* scores;             // [rows, tasks]
  int64_t stride;
  int32_t rows;
  int32_t width;
  int32_t tasks;
  int32_t binary;
  float eps;
};

constexpr int kMaxProjections = 4;
constexpr int kMaxProjectInputs = 512;

// out = x W^T * scale + bias for e4m3 x and W, cut into runs of columns, each stored as what reads it wants: fp16, or
// e4m3 with a scale of its own.
struct ProjectParams {
  void const* x;              // [rows, inputs] e4m3, 16-byte aligned
  void const* weight;         // [sum of widths, inputs] e4m3, contiguous
  float const* column_scale;  // [sum of widths]: scales of the weight's rows times that of x
  float const* bias;          // [sum of widths]
  RowsOut outs[kMaxProjections];
  int32_t widths[kMaxProjections];  // multiples of 256
  int64_t x_stride;
  int32_t rows;
  int32_t inputs;  // a multiple of 128, at most kMaxProjectInputs
  int32_t count;
};

}  // namespace hstu_trt
