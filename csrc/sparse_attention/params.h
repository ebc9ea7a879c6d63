// SPDX-License-Identifier: Apache-2.0
// Arguments of the sparse attention, shared by the host and the device code.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

namespace megatron_keye::sparse_attention {

constexpr int kTileQueries = 16;  // queries that share a union: one bit each of a mask word
constexpr int kTileKeys = 64;     // keys of a union that are attended to at once

// What both passes read.
struct Problem {
  const __nv_bfloat16* q;  // [T, H, C], channels adjacent
  const __nv_bfloat16* k;  // [S, G, C], likewise; rows begin at multiples of 16 bytes
  const __nv_bfloat16* v;  // likewise, strides of k
  const int* keys;         // [B, U], unions of the selections
  const uint16_t* masks;   // [B, U], which queries of a tile selected a key
  const int* counts;       // [B], keys of each union
  float scale_log2;        // factor of the logits, times log2(e); above 0
  int num_queries;         // T
  int num_groups;          // G
  int heads;               // H / G: 4, 8 or 16
  int channels;            // C: 64 or 128
  int64_t capacity;        // U
  int64_t q_stride_t;      // in elements, as are the others
  int64_t q_stride_h;
  int64_t k_stride_s;
  int64_t k_stride_g;
};

struct ForwardParams {
  Problem problem;
  __nv_bfloat16* out;  // [T, H, C], contiguous
  float* lse;          // [T, H], log2 of each row's sum of exponentials; +inf without any key
};

// Rows of q, out and dout begin at multiples of 16 bytes.
struct BackwardParams {
  Problem problem;
  const __nv_bfloat16* out;   // [T, H, C], contiguous
  const __nv_bfloat16* dout;  // likewise
  const float* lse;           // [T, H]
  __nv_bfloat16* dq;          // [T, H, C], contiguous
  float* sums;                // [G, S, 2, C], contiguous: of dk and dv, which are added to it
  float scale;                // factor of the logits
  int64_t num_keys;           // S
  bool is_in_bulk;            // whether rows of sums leave from shared memory, else from registers
};

// The loss pass reads no values.
struct LossParams {
  Problem problem;
  const float* lse;        // [T, H]
  const float* scores;     // [T, K], contiguous, as all others here
  const float* score_lse;  // [T], log2 of the sum of exponentials of each query's scores
  const float* dkl;        // [T], gradient of each query's divergences, whatever the group
  float* dscores;          // [T, K], from which dkl times each weight is subtracted
  float* divergence;       // [G, kLossParts, T], in nats: parts to be summed
  int num_selected;        // K
};
constexpr int kLossParts = 8;  // of a divergence: one for each warp that multiplies

// Launch on the current stream of the current device, for at least one query.
void launch_forward(const ForwardParams& params);
void launch_backward(const BackwardParams& params);
void launch_loss(const LossParams& params);

}  // namespace megatron_keye::sparse_attention
