// SPDX-License-Identifier: Apache-2.0
// Writes the keys that a cut takes, ascending, and of equal scores the lower keys.
// One thread block works on one row; every function takes all of its threads.
#pragma once

#include "select_top_k/cut.cuh"

namespace megatron_keye::top_k {

constexpr uint32_t kMarkWords = kBins * 4;  // the histogram's room as a bit for each key of a row
constexpr int kMaxMarkedKeys = kMarkWords * 32;

// A row's keys as bits, in the room of the histogram, which is not used after the cut is found.
struct Marks {
  uint32_t* words;
  uint32_t num_words;

  __device__ __forceinline__ void clear() const {
    for (uint32_t word = threadIdx.x; word < num_words; word += kThreads) {
      words[word] = 0u;
    }
  }

  __device__ __forceinline__ void set(uint32_t place) const {
    atomicOr(words + place / 32, 1u << place % 32);
  }

  // Calls visit(number of marks before, place) for every mark, in no order.
  template <typename Visit>
  __device__ __forceinline__ void for_each(uint32_t (&warp_sums)[kWarps], Visit visit) const {
    const uint32_t words_each = (num_words + kThreads - 1) / kThreads;
    const uint32_t first = min(threadIdx.x * words_each, num_words);
    const uint32_t last = min(first + words_each, num_words);
    uint32_t num_marked = 0;
    for (uint32_t word = first; word < last; ++word) {
      num_marked += __popc(words[word]);
    }
    uint32_t before = sum_threads(num_marked, warp_sums).before;
    __syncthreads();  // warp_sums may be written again
    for (uint32_t word = first; word < last; ++word) {
      for (uint32_t bits = words[word]; bits != 0u; bits &= bits - 1u) {
        visit(before++, word * 32 + __ffs(static_cast<int>(bits)) - 1);
      }
    }
  }
};

// Writes what the cut takes of the buffered keys, whose order is any; the row has at most
// kMaxMarkedKeys keys, `first_key` being the one at place 0.
__device__ inline void write_buffered(Shared& shared, const Cut& cut, uint32_t num_candidates,
                                      int num_keys, int first_key, int32_t* indices) {
  const Marks marks{.words = reinterpret_cast<uint32_t*>(shared.histogram),
                    .num_words = (static_cast<uint32_t>(num_keys) + 31) / 32};
  uint32_t last_tie = 0xFFFFFFFFu;
  if (cut.num_ties < cut.num_same) {
    marks.clear();
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < num_candidates; i += kThreads) {
      if (cut.is_equal(shared.candidates[i])) {
        marks.set(shared.places[i]);
      }
    }
    __syncthreads();
    marks.for_each(shared.warp_sums, [&](uint32_t before, uint32_t place) {
      if (before + 1 == cut.num_ties) {
        shared.found.digit = place;
      }
    });
    __syncthreads();
    last_tie = shared.found.digit;
  }
  marks.clear();
  __syncthreads();
  for (uint32_t i = threadIdx.x; i < num_candidates; i += kThreads) {
    const uint32_t key = shared.candidates[i];
    if (cut.is_above(key) || (cut.is_equal(key) && shared.places[i] <= last_tie)) {
      marks.set(shared.places[i]);
    }
  }
  __syncthreads();
  marks.for_each(shared.warp_sums, [&](uint32_t before, uint32_t place) {
    indices[before] = first_key + static_cast<int32_t>(place);
  });
}

// Writes the k keys that the cut takes of the row, reading it in order.
__device__ inline void write_row(Shared& shared, const Row& row, const Cut& cut, uint32_t k,
                                 int32_t* indices) {
  uint32_t above_before = 0;  // keys above the threshold in the tiles so far
  uint32_t ties_before = 0;   // keys equal to it
  const int64_t begin = aligned_start(row);
  for (int64_t tile = begin; tile < row.end; tile += kThreads * kVector) {
    const int64_t position = tile + static_cast<int64_t>(threadIdx.x) * kVector;
    uint32_t keys[kVector];
    const uint32_t inside = load_keys(row, position, keys);
    uint32_t counts = 0;  // above in the low half, equal in the high half; a tile holds 2,048
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const uint32_t one = cut.is_above(keys[i]) ? 1u : cut.is_equal(keys[i]) ? 1u << 16 : 0u;
      counts += inside >> i & 1u ? one : 0u;
    }
    const Sums sums = sum_threads(counts, shared.warp_sums);
    __syncthreads();  // warp_sums may be written again
    uint32_t num_above = above_before + (sums.before & 0xFFFFu);
    uint32_t num_equal = ties_before + (sums.before >> 16);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      if (!(inside >> i & 1u)) {
        continue;
      }
      const bool is_above = cut.is_above(keys[i]);
      const bool is_equal = cut.is_equal(keys[i]);
      if (is_above || (is_equal && num_equal < cut.num_ties)) {
        indices[num_above + min(num_equal, cut.num_ties)] = static_cast<int32_t>(position + i);
      }
      num_above += is_above;
      num_equal += is_equal;
    }
    above_before += sums.total & 0xFFFFu;
    ties_before += sums.total >> 16;
    if (above_before + min(ties_before, cut.num_ties) == k) {
      return;  // the same for all threads
    }
  }
}

}  // namespace megatron_keye::top_k
