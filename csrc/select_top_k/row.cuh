// SPDX-License-Identifier: Apache-2.0
// Selects from one row: exact and deterministic, by one thread block.
// Long rows are read once. A sample of the row gives a threshold that about k and a safe margin
// pass; one read moves what passes into shared memory, where the exact cut is found. When too few
// or too many pass, which is counted, the row is treated like a short one:
// If all its keys fit into shared memory, the cut is found there. Else three reads: one counts the
// first digit, one moves the keys that share it into shared memory, where the other digits are
// counted, one writes. When more keys share it than fit there, the next digit is counted from
// global memory too: slower, never wrong.
#pragma once

#include "select_top_k/emit.cuh"

namespace megatron_keye::top_k {

constexpr int kMaxBuffered = 2 * kCandidates;  // keys that fit the buffer and places beside it
constexpr int kMinSampled = 16384;              // shorter rows are not worth a sample
constexpr int kSampleSize = 8192;               // at most
static_assert(kSampleSize <= kMaxBuffered, "the sample lies in the buffer and the places");
static_assert(offsetof(Shared, places) ==
                  offsetof(Shared, candidates) + sizeof(Shared::candidates),
              "which follow one another");

// Which place of a sample marks a threshold that about `wanted` keys and a margin of five standard
// deviations pass, when one key in `stride` is sampled.
__device__ __forceinline__ uint32_t sample_rank(uint32_t wanted, float stride) {
  const float expected = static_cast<float>(wanted) / stride;
  return static_cast<uint32_t>(expected + 5.0f * sqrtf(expected) + 5.0f);
}

// The key of that rank in a buffer in shared memory, or somewhat less; the buffer may be written
// again afterwards.
__device__ __forceinline__ uint32_t sampled_threshold(Shared& shared, const uint32_t* sample,
                                                      uint32_t num_sampled, uint32_t rank) {
  constexpr int kDigits = 2;  // one hardly resolves more than powers of two
  const Cut cut = find_cut_in_buffer(shared, sample, num_sampled, rank, kDigits);
  return cut.base + cut.threshold;
}

// A threshold that `wanted` keys and a margin pass; 0 if the sample is too small to tell.
__device__ inline uint32_t sample_threshold(Shared& shared, const Row& row, uint32_t wanted) {
  const uint32_t num_keys = row.end - row.start;
  const uint32_t stride = (num_keys + kSampleSize - 1) / kSampleSize;
  const uint32_t num_sampled = num_keys / (kVector * stride) * kVector;
  const uint32_t rank = sample_rank(wanted, static_cast<float>(stride));
  if (rank >= num_sampled) {
    return 0u;
  }
  uint32_t* sample = shared.candidates;
  for (uint32_t i = threadIdx.x; i < num_sampled; i += kThreads) {
    // Neighbours share a sector of memory; which vector of a group is taken is pseudo-random.
    const uint32_t group = i / kVector;
    const uint32_t vector = (group * 2654435761u >> 8) % stride;
    const uint32_t place = (group * stride + vector) * kVector + i % kVector;
    sample[i] = ordered_key(__ldg(row.scores + row.start + place));
  }
  __syncthreads();
  return sampled_threshold(shared, sample, num_sampled, rank);
}

// Selects with one read of the row; returns false, the same for all threads, when that fails.
__device__ inline bool select_in_one_read(Shared& shared, const Row& row, uint32_t k,
                                          int32_t* indices) {
  const uint32_t num_keys = row.end - row.start;
  if (num_keys < kMinSampled || num_keys > kMaxMarkedKeys || k > kCandidates / 2) {
    return false;
  }
  const uint32_t threshold = sample_threshold(shared, row, k);
  if (threshold == 0u) {
    return false;
  }
  if (threadIdx.x == 0) {
    shared.num_candidates = 0u;
  }
  __syncthreads();
  for_each_key(row, [&](uint32_t key, int64_t position) {
    if (key >= threshold) {
      const uint32_t slot = atomicAdd(&shared.num_candidates, 1u);
      if (slot < kCandidates) {
        shared.candidates[slot] = key;
        shared.places[slot] = static_cast<uint32_t>(position - row.start);
      }
    }
  });
  __syncthreads();
  const uint32_t num_candidates = shared.num_candidates;
  if (num_candidates < k || num_candidates > kCandidates) {
    __syncthreads();  // the count is read before the other method writes it
    return false;
  }
  const Cut cut = find_cut_in_buffer(shared, shared.candidates, num_candidates, k);
  write_buffered(shared, cut, num_candidates, row.end - row.start, row.start, indices);
  return true;
}

// As find_cut, for a row that fits into shared memory.
__device__ inline Cut find_cut_of_short(Shared& shared, const Row& row, uint32_t k) {
  for (int place = threadIdx.x; place < row.end - row.start; place += kThreads) {
    shared.candidates[place] = ordered_key(__ldg(row.scores + row.start + place));
  }
  __syncthreads();
  return find_cut_in_buffer(shared, shared.candidates, row.end - row.start, k);
}

// Writes the keys of a row that holds no more than k, and -1 behind them.
__device__ __forceinline__ void take_all(int start, int end, int k, int32_t* indices) {
  for (int slot = threadIdx.x; slot < k; slot += kThreads) {
    indices[slot] = slot < end - start ? start + slot : -1;
  }
}

// Writes the row's k highest keys, all of them and then -1 when it holds no more than k.
__device__ inline void select_row(Shared& shared, const Row& row, int k, int32_t* indices) {
  if (row.end - row.start <= k) {
    take_all(row.start, row.end, k, indices);
    return;
  }
  const auto wanted = static_cast<uint32_t>(k);
  if (select_in_one_read(shared, row, wanted, indices)) {
    return;
  }
  const Cut cut = row.end - row.start <= kMaxBuffered ? find_cut_of_short(shared, row, wanted)
                                                       : find_cut(shared, row, wanted);
  write_row(shared, row, cut, wanted, indices);
}

}  // namespace megatron_keye::top_k
