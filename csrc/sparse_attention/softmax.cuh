// SPDX-License-Identifier: Apache-2.0
// Selections as bits, and the online softmax of a warpgroup's rows.
// A thread holds of a tile's logits those of two rows, 8 apart, and of each row 16 keys:
// logits[4j + 2i + odd] is row i with key 8j + 2 * (lane % 4) + odd.
#pragma once

#include "sparse_attention/block.cuh"

namespace megatron_keye::sparse_attention {

constexpr int kLogits = kTileKeys / 2;  // that a thread holds

// 2^x; 0 for results below 2^-126. Volatile, so that the compiler doesn't put it off until the
// products are there beside which it should run.
__device__ __forceinline__ float power_of_two(float x) {
  float result;
  asm volatile("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// Of each row: whether its query selected key 8j + 2 * (lane % 4) + odd is bit 8 * odd + j. A lane
// reads the words of two keys, chosen so that what a thread needs lies in one byte of a ballot.
template <typename Cut>
__device__ __forceinline__ void find_bits(const Place<Cut>& place,
                                          const uint32_t (&masks)[kTileKeys / 2],
                                          uint32_t (&bits)[2]) {
  const int warp = static_cast<int>(threadIdx.x) / 32 - kWarpgroup / 32;
  const int first_bit = place.first_local + warp * kWarpRows / Cut::kHeads;
  const int shift = lane_of_warp() % 4 * 8;
  const uint32_t words = masks[lane_of_warp() % 8 * 4 + lane_of_warp() / 8] >> first_bit;
  constexpr int kQueries = kWarpRows / Cut::kHeads;  // of a warp
#pragma unroll
  for (int query = 0; query < kQueries; ++query) {
    const uint32_t even = __ballot_sync(kWholeWarp, words >> query & 1u) >> shift & 0xFFu;
    const uint32_t odd = __ballot_sync(kWholeWarp, words >> (16 + query) & 1u) >> shift & 0xFFu;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if ((lane_of_warp() / 4 + 8 * i) / Cut::kHeads == query) {
        bits[i] = even | odd << 8;
      }
    }
  }
}

__device__ __forceinline__ void mask(float (&logits)[kLogits], const uint32_t (&bits)[2]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int bit = 0; bit < 16; ++bit) {
      float& logit = logits[bit % 8 * 4 + 2 * i + bit / 8];
      logit = (bits[i] >> bit & 1u) != 0 ? logit : -INFINITY;
    }
  }
}

// The online softmax of a thread's two rows.
// Source: arXiv 1805.02867 (Milakov and Gimelshein, online softmax).
struct Softmax {
  // Subtracted from logits, in powers of two: the maximum, or up to kSlack less, so that the
  // accumulator is seldom scaled. Finite, so that a row without any key never gives inf - inf.
  float m[2] = {-1.0e38f, -1.0e38f};
  float l[2] = {0.0f, 0.0f};      // this thread's part of the sum of exponentials
  float rescale[2] = {1.0f, 1.0f};  // what the accumulator has to be scaled by
  static constexpr float kSlack = 8.0f;

  // Turns masked logits into weights; returns whether the warp has to scale its accumulator.
  __device__ __forceinline__ bool take(float (&logits)[kLogits], float scale_log2) {
    bool grows = false;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float highest = fmaxf(m[i], highest_of_row(logits, i) * scale_log2);
      const bool row_grows = highest > m[i] + kSlack;
      rescale[i] = row_grows ? power_of_two(m[i] - highest) : 1.0f;
      m[i] = row_grows ? highest : m[i];
      l[i] *= rescale[i];
      grows |= row_grows;
    }
#pragma unroll
    for (int j = 0; j < kLogits; j += 4) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float& even = logits[j + 2 * i];
        float& odd = logits[j + 2 * i + 1];
        even = power_of_two(fmaf(even, scale_log2, -m[i]));
        odd = power_of_two(fmaf(odd, scale_log2, -m[i]));
        l[i] += even + odd;
      }
    }
    return __any_sync(kWholeWarp, grows);
  }

  // Adds up a row's sum over the four threads that share it.
  __device__ __forceinline__ float whole_sum(int i) const {
    float sum = l[i];
    sum += __shfl_xor_sync(kWholeWarp, sum, 1);
    return sum + __shfl_xor_sync(kWholeWarp, sum, 2);
  }

 private:
  __device__ __forceinline__ static float highest_of_row(const float (&logits)[kLogits], int i) {
    float highest = fmaxf(logits[2 * i], logits[2 * i + 1]);
#pragma unroll
    for (int j = 4; j < kLogits; j += 4) {
      highest = fmaxf(highest, fmaxf(logits[j + 2 * i], logits[j + 2 * i + 1]));
    }
    highest = fmaxf(highest, __shfl_xor_sync(kWholeWarp, highest, 1));
    return fmaxf(highest, __shfl_xor_sync(kWholeWarp, highest, 2));
  }
};

}  // namespace megatron_keye::sparse_attention
