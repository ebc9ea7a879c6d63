// SPDX-License-Identifier: Apache-2.0
// How both selections find the k-th largest key: keys are counted by a digit, and the digit of the
// wanted key is where the counts from the largest digit down reach it. Each selection keeps and
// counts its keys in its own way.
// Every function takes all threads of a block.
#pragma once

#include <cstdint>

namespace megatron_keye::top_k {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kDigitBits = 11;
constexpr int kBins = 1 << kDigitBits;
constexpr int kBinsPerThread = kBins / kThreads;
constexpr int kVector = 4;  // floats of one load
constexpr uint32_t kAllLanes = 0xFFFFFFFFu;

static_assert(kWarps <= 32, "a warp adds up the sums of all warps");

// Order-preserving map to unsigned: -0.0 equals +0.0, every NaN is `of_nan`, below -inf.
__device__ __forceinline__ uint32_t ordered_key(float score, uint32_t of_nan = 0u) {
  if (score != score) {
    return of_nan;
  }
  const uint32_t bits = score == 0.0f ? 0u : __float_as_uint(score);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

struct Sums {
  uint32_t before;  // over what comes before the caller's own
  uint32_t total;
};

// Sum over the lanes up to and including this one.
__device__ __forceinline__ uint32_t sum_of_lanes_to(uint32_t value) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const uint32_t other = __shfl_up_sync(kAllLanes, value, distance);
    value += lane >= distance ? other : 0u;
  }
  return value;
}

// Sums of one word per warp, that of its last lane. The block synchronizes before it writes
// `warp_sums` again.
__device__ __forceinline__ Sums sum_warps(uint32_t warp_sum, uint32_t (&warp_sums)[kWarps]) {
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  if (lane == 31) {
    warp_sums[warp] = warp_sum;
  }
  __syncthreads();
  const uint32_t other = lane < kWarps ? warp_sums[lane] : 0u;
  return {.before = __reduce_add_sync(kAllLanes, lane < warp ? other : 0u),
          .total = __reduce_add_sync(kAllLanes, other)};
}

// Sums of one word per thread, else like `sum_warps`.
__device__ __forceinline__ Sums sum_threads(uint32_t value, uint32_t (&warp_sums)[kWarps]) {
  const uint32_t inclusive = sum_of_lanes_to(value);
  Sums sums = sum_warps(inclusive, warp_sums);
  sums.before += inclusive - value;
  return sums;
}

// What a search for a digit leaves in shared memory.
struct FoundDigit {
  uint32_t digit;      // of the wanted key
  uint32_t num_above;  // counted keys with a larger digit
  uint32_t num_same;   // counted keys with that digit
};

// Finds the digit of the `wanted`-th largest counted key and writes `found`, if there are so many.
// Returns how many keys were counted. `count_of` gives the count of a bin.
template <typename CountOf>
__device__ __forceinline__ uint32_t find_digit(FoundDigit& found, uint32_t (&warp_sums)[kWarps],
                                               uint32_t wanted, CountOf count_of) {
  uint32_t counts[kBinsPerThread];
  uint32_t sum = 0;
  const int top = kBins - 1 - static_cast<int>(threadIdx.x) * kBinsPerThread;
#pragma unroll
  for (int i = 0; i < kBinsPerThread; ++i) {
    counts[i] = count_of(top - i);
    sum += counts[i];
  }
  const Sums sums = sum_threads(sum, warp_sums);
  uint32_t above = sums.before;
#pragma unroll
  for (int i = 0; i < kBinsPerThread; ++i) {
    if (above < wanted && wanted <= above + counts[i]) {
      found = {.digit = static_cast<uint32_t>(top - i), .num_above = above, .num_same = counts[i]};
    }
    above += counts[i];
  }
  __syncthreads();
  return sums.total;
}

}  // namespace megatron_keye::top_k
