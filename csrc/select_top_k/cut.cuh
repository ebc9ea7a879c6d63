// SPDX-License-Identifier: Apache-2.0
// The cut of a row: its k-th largest score, found digit by digit from the most significant bits.
// A row is too long to sort (up to a million keys for 2,048 places), so keys are counted. Only
// counts decide, so the order in which threads arrive cannot change the result.
// One thread block works on one row; every function takes all of its threads.
#pragma once

#include <cstddef>
#include <cstdint>

#include "select_top_k/digits.cuh"

namespace megatron_keye::top_k {

constexpr int kCopies = 4;         // of each bin, next to one another: in different banks
constexpr int kCandidates = 5120;  // keys that fit the buffer; 3 blocks share an SM

struct Shared {
  uint4 histogram[kBins];  // one word per copy
  uint32_t candidates[kCandidates];
  uint32_t places[kCandidates];  // of the candidates, from the row's first key
  uint32_t warp_sums[kWarps];
  uint32_t lows[kWarps];
  uint32_t highs[kWarps];
  uint32_t num_candidates;
  FoundDigit found;  // of the k-th largest key
};

struct Row {
  const float* scores;
  int start;  // first key
  int end;    // one past the last key
};

// The keys at and above `threshold` that are taken. Keys are compared as what they exceed `base`
// by, without the bits that `mask` leaves out; none is less than `base`.
struct Cut {
  uint32_t num_ties;       // how many of the keys equal to the threshold are taken
  uint32_t num_same = 0u;  // how many such keys there are
  uint32_t base = 0u;
  uint32_t threshold = 0u;
  uint32_t mask = 0u;

  __device__ __forceinline__ uint32_t compared(uint32_t key) const { return (key - base) & mask; }
  __device__ __forceinline__ bool is_above(uint32_t key) const {
    return compared(key) > threshold;
  }
  __device__ __forceinline__ bool is_equal(uint32_t key) const {
    return compared(key) == threshold;
  }
};

// The score of an ordered key; a key of 0 gives a NaN.
__device__ __forceinline__ float score_of(uint32_t key) {
  return __uint_as_float(key & 0x80000000u ? key & 0x7FFFFFFFu : ~key);
}

// Four neighbouring keys from an aligned position on; bit i of the result says that keys[i] lies
// inside the row. Rows and ranges may begin anywhere, so the ends are read one by one.
__device__ __forceinline__ uint32_t load_keys(const Row& row, int64_t position,
                                              uint32_t (&keys)[kVector]) {
  if (position >= row.start && position + kVector <= row.end) {
    const float4 scores = __ldg(reinterpret_cast<const float4*>(row.scores + position));
    keys[0] = ordered_key(scores.x);
    keys[1] = ordered_key(scores.y);
    keys[2] = ordered_key(scores.z);
    keys[3] = ordered_key(scores.w);
    return 0xFu;
  }
  uint32_t inside = 0;
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    keys[i] = 0u;
    if (position + i >= row.start && position + i < row.end) {
      keys[i] = ordered_key(__ldg(row.scores + position + i));
      inside |= 1u << i;
    }
  }
  return inside;
}

// The last position at or before the row's first key where a vector load is aligned.
__device__ __forceinline__ int64_t aligned_start(const Row& row) {
  const auto address = reinterpret_cast<uintptr_t>(row.scores + row.start);
  return row.start - static_cast<int64_t>(address / sizeof(float) % kVector);
}

// Calls visit(key, position of its score) for every key of the row.
template <typename Visit>
__device__ __forceinline__ void for_each_key(const Row& row, Visit visit) {
  const int64_t begin = aligned_start(row) + static_cast<int64_t>(threadIdx.x) * kVector;
#pragma unroll 4
  for (int64_t position = begin; position < row.end; position += kThreads * kVector) {
    uint32_t keys[kVector];
    const uint32_t inside = load_keys(row, position, keys);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      if (inside >> i & 1u) {
        visit(keys[i], position + i);
      }
    }
  }
}

template <typename Visit>
__device__ __forceinline__ void for_each_buffered(const uint32_t* keys, uint32_t num_keys,
                                                  Visit visit) {
  for (uint32_t i = threadIdx.x; i < num_keys; i += kThreads) {
    visit(keys[i]);
  }
}

__device__ __forceinline__ void count(Shared& shared, uint32_t digit) {
  // Most scores fall into few bins; four copies leave a quarter of a warp's threads per address.
  auto* words = reinterpret_cast<uint32_t*>(shared.histogram);
  atomicAdd(words + digit * kCopies + threadIdx.x % kCopies, 1u);
}

__device__ __forceinline__ uint32_t count_of(const Shared& shared, int digit) {
  const uint4 copies = shared.histogram[digit];
  return copies.x + copies.y + copies.z + copies.w;
}

// Counts the digit from bit `shift` up to bit `end` of the keys that agree so far, and moves the
// cut there. Returns, the same for all threads, whether lower digits cannot change what is taken.
template <typename ForEach>
__device__ __forceinline__ bool fix_digit(Shared& shared, Cut& cut, int shift, int end,
                                          ForEach for_each) {
  const uint32_t digit_mask = (1u << (end - shift)) - 1u;
  for (int bin = threadIdx.x; bin < kBins; bin += kThreads) {
    shared.histogram[bin] = make_uint4(0u, 0u, 0u, 0u);
  }
  __syncthreads();
  for_each([&](uint32_t key) {
    if (cut.is_equal(key)) {
      count(shared, (key - cut.base) >> shift & digit_mask);
    }
  });
  __syncthreads();
  find_digit(shared.found, shared.warp_sums, cut.num_ties,
             [&](int digit) { return count_of(shared, digit); });
  cut.threshold |= shared.found.digit << shift;
  cut.mask |= digit_mask << shift;
  cut.num_ties -= shared.found.num_above;
  cut.num_same = shared.found.num_same;
  __syncthreads();  // what was found is read before it is written again
  return cut.num_same == cut.num_ties;
}

// Where to cut the first `num_keys` words of a buffer in shared memory so that `wanted` stay; with
// `most_digits`, that or somewhat lower. Digits are of what keys exceed the smallest by, so that
// keys that are close together still fall into different bins.
__device__ inline Cut find_cut_in_buffer(Shared& shared, const uint32_t* keys, uint32_t num_keys,
                                         uint32_t wanted, int most_digits = 3) {
  uint32_t low = 0xFFFFFFFFu;
  uint32_t high = 0u;
  for_each_buffered(keys, num_keys, [&](uint32_t key) {
    low = min(low, key);
    high = max(high, key);
  });
  low = __reduce_min_sync(0xFFFFFFFFu, low);
  high = __reduce_max_sync(0xFFFFFFFFu, high);
  if (threadIdx.x % 32 == 0) {
    shared.lows[threadIdx.x / 32] = low;
    shared.highs[threadIdx.x / 32] = high;
  }
  __syncthreads();
  low = __reduce_min_sync(0xFFFFFFFFu, shared.lows[threadIdx.x % kWarps]);
  high = __reduce_max_sync(0xFFFFFFFFu, shared.highs[threadIdx.x % kWarps]);
  Cut cut{.num_ties = wanted, .num_same = num_keys, .base = low};
  int end = 32 - __clz(static_cast<int>(high - low));
#pragma unroll 1
  for (int digit = 0; digit < most_digits && end > 0; ++digit) {
    const int shift = max(end - kDigitBits, 0);
    if (fix_digit(shared, cut, shift, end,
                  [&](auto visit) { for_each_buffered(keys, num_keys, visit); })) {
      break;
    }
    end = shift;
  }
  return cut;
}

// Where to cut the row so that exactly k keys stay; the row has more than k. Reads the row once
// per digit until the keys that are still alike fit into the buffer.
__device__ inline Cut find_cut(Shared& shared, const Row& row, uint32_t k) {
  Cut cut{.num_ties = k};
  bool is_buffered = false;
#pragma unroll 1
  for (int end = 32; end > 0; end = max(end - kDigitBits, 0)) {
    const int shift = max(end - kDigitBits, 0);
    const bool is_found =
        is_buffered
            ? fix_digit(shared, cut, shift, end,
                        [&](auto visit) {
                          for_each_buffered(shared.candidates, shared.num_candidates, visit);
                        })
            : fix_digit(shared, cut, shift, end, [&](auto visit) {
                for_each_key(row, [&](uint32_t key, int64_t) { visit(key); });
              });
    if (is_found) {
      break;
    }
    if (!is_buffered && cut.num_same <= kCandidates) {
      if (threadIdx.x == 0) {
        shared.num_candidates = 0u;
      }
      __syncthreads();
      for_each_key(row, [&](uint32_t key, int64_t) {
        if (cut.is_equal(key)) {
          shared.candidates[atomicAdd(&shared.num_candidates, 1u)] = key;
        }
      });
      is_buffered = true;
      __syncthreads();
    }
  }
  return cut;
}

}  // namespace megatron_keye::top_k
