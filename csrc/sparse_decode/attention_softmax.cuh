// SPDX-License-Identifier: Apache-2.0
// Attends to tiles of keys in shared memory: products and the online softmax of one warp.
#pragma once

#include "sparse_decode/attention_block.cuh"
#include "support/warp_products.cuh"

namespace megatron_keye::sparse_decode::attention {

// The online softmax of a warp's rows; a lane has rows lane / 4 and 8 further on.
// Source: arXiv 1805.02867 (Milakov and Gimelshein, online softmax).
template <typename Size>
struct Attention {
  uint32_t query[Size::kSteps][4];
  float acc[Size::kColumns][4];
  float m[2] = {kNoMaximum, kNoMaximum};
  float l[2] = {0.0f, 0.0f};  // of this lane's keys

  __device__ __forceinline__ void load_query(const AttendParams& params, const Work& work) {
    const int64_t first = (int64_t{work.row} * params.num_groups + work.group) * params.heads;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int head = lane_of_warp() / 4 + i % 2 * 8;
      const __nv_bfloat16* source = params.query + (first + head) * Size::kChannels +
                                    i / 2 * 8 + lane_of_warp() % 4 * 2;
#pragma unroll
      for (int step = 0; step < Size::kSteps; ++step) {
        query[step][i] = head < params.heads
                             ? *reinterpret_cast<const uint32_t*>(source + step * 16)
                             : 0u;
      }
    }
#pragma unroll
    for (auto& column : acc) {
#pragma unroll
      for (float& sum : column) {
        sum = 0.0f;
      }
    }
  }

  // Adds a tile of keys, of which those with their bit in `is_real` count.
  __device__ __forceinline__ void add(uint32_t tile, uint32_t is_real, float scale_log2) {
    float logits[2][4] = {};
    multiply_keys(logits, tile);
    const float rescale[2] = {weigh(logits, is_real, scale_log2, 0),
                              weigh(logits, is_real, scale_log2, 1)};
    if (__any_sync(kWholeWarp, rescale[0] != 1.0f || rescale[1] != 1.0f)) {
#pragma unroll
      for (auto& column : acc) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          column[i] *= rescale[i / 2];
        }
      }
    }
    add_values(logits, tile + Size::kTileBytes);
  }

  // A row's sum of exponentials, whose keys are spread over four lanes.
  __device__ __forceinline__ float whole_sum(int i) const {
    float sum = l[i];
    sum += __shfl_xor_sync(kWholeWarp, sum, 1);
    return sum + __shfl_xor_sync(kWholeWarp, sum, 2);
  }

 private:
  __device__ __forceinline__ void multiply_keys(float (&logits)[2][4], uint32_t keys) const {
    const int matrix = lane_of_warp() / 8;
    const int row = matrix / 2 * 8 + lane_of_warp() % 8;
#pragma unroll
    for (int step = 0; step < Size::kSteps; ++step) {
      uint32_t b[4];
      warp::load_matrices(b, keys + place_in_tile<Size>(row, 2 * step + matrix % 2));
      warp::multiply_add(logits[0], query[step], b[0], b[1]);
      warp::multiply_add(logits[1], query[step], b[2], b[3]);
    }
  }

  // Turns row i's logits into weights; returns what its sums so far are multiplied by.
  __device__ __forceinline__ float weigh(float (&logits)[2][4], uint32_t is_real,
                                         float scale_log2, int i) {
    float highest = m[i];
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const int key = n / 2 * 8 + lane_of_warp() % 4 * 2 + n % 2;
      float& logit = logits[n / 2][2 * i + n % 2];
      logit = (is_real >> key & 1u) != 0u ? logit * scale_log2 : -INFINITY;
      highest = fmaxf(highest, logit);
    }
    highest = fmaxf(highest, __shfl_xor_sync(kWholeWarp, highest, 1));
    highest = fmaxf(highest, __shfl_xor_sync(kWholeWarp, highest, 2));
    const float rescale = exp2f(m[i] - highest);
    m[i] = highest;
    l[i] *= rescale;
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      float& weight = logits[n / 2][2 * i + n % 2];
      weight = exp2f(weight - highest);
      l[i] += weight;
    }
    return rescale;
  }

  __device__ __forceinline__ void add_values(const float (&weights)[2][4], uint32_t values) {
    const uint32_t a[4] = {warp::packed(weights[0][0], weights[0][1]),
                           warp::packed(weights[0][2], weights[0][3]),
                           warp::packed(weights[1][0], weights[1][1]),
                           warp::packed(weights[1][2], weights[1][3])};
    const int matrix = lane_of_warp() / 8;
    const int row = matrix % 2 * 8 + lane_of_warp() % 8;
#pragma unroll
    for (int column = 0; column < Size::kColumns; column += 2) {
      uint32_t b[4];
      warp::load_transposed(b, values + place_in_tile<Size>(row, column + matrix / 2));
      warp::multiply_add(acc[column], a, b[0], b[1]);
      warp::multiply_add(acc[column + 1], a, b[2], b[3]);
    }
  }
};

}  // namespace megatron_keye::sparse_decode::attention
