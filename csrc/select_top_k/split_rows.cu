// SPDX-License-Identifier: Apache-2.0
// Device side of the top-k selection of a few long rows: each is split over a cluster of thread
// blocks. With one block per row, a single sequence would leave all but one multiprocessor idle.
//
// Every thread keeps its keys in registers, so the row is read once. The k-th largest of the
// threads' best keys is a lower bound of the k-th largest key: k keys at least are no smaller.
// What passes it, a few thousand keys, is narrowed down digit by digit by counting, each block
// adding its counts to the histograms of all blocks, which then reach the same decision.
// Digits divide the interval from the bound to the row's best key, which the scores of a row
// fill evenly: two rounds are usual, three the most.
// Only counts decide, so the order in which threads arrive cannot change the result.

#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include "select_top_k/digits.cuh"
#include "select_top_k/split_rows.h"
#include "support/launch.h"

namespace megatron_keye {

namespace {

namespace cg = cooperative_groups;
using namespace top_k;

constexpr int kBlocks = 8;       // of a row: the largest cluster that every GPU grants
constexpr int kRounds = 4;       // one of the threads' best keys, then 11 + 11 + 10 bits
constexpr uint32_t kOfNan = 1u;  // a key; 0 is left for places outside the row

struct Shared {
  uint32_t counts[kBins];           // of this block; 0 between rounds
  uint32_t merged[kRounds][kBins];  // of all blocks, which add to it
  uint32_t totals[kBlocks];         // taken for sure << 16 | ties, of each block
  uint32_t warp_sums[kWarps];
  uint32_t block_best;
  uint32_t row_best;
  FoundDigit found;
};

// The keys above low + span are taken, and of those from low to low + span the first `num_ties`.
struct Cut {
  uint32_t low;
  uint32_t span;
  uint32_t num_ties;

  __device__ __forceinline__ bool is_tied(uint32_t key) const {
    return key >= low && key - low <= span;
  }
  __device__ __forceinline__ bool is_above(uint32_t key) const {
    return key >= low && key - low > span;
  }
};

// A warp's keys are neighbours: vector v of a lane begins at first + (v * 32 + lane) * kVector.
template <int kVectors>
__device__ __forceinline__ void load_keys(const float* scores, int first, int end,
                                          uint32_t (&keys)[kVectors][kVector]) {
  const bool is_aligned = reinterpret_cast<uintptr_t>(scores) % (sizeof(float) * kVector) == 0;
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int place = first + (v * 32 + lane) * kVector;
    if (is_aligned && place + kVector <= end) {
      const float4 four = __ldcg(reinterpret_cast<const float4*>(scores + place));
      keys[v][0] = ordered_key(four.x, kOfNan);
      keys[v][1] = ordered_key(four.y, kOfNan);
      keys[v][2] = ordered_key(four.z, kOfNan);
      keys[v][3] = ordered_key(four.w, kOfNan);
      continue;
    }
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      keys[v][i] = place + i < end ? ordered_key(__ldcg(scores + place + i), kOfNan) : 0u;
    }
  }
}

// Adds this block's counts to those of all blocks, and waits for theirs. Most bins are empty.
__device__ __forceinline__ void merge_counts(cg::cluster_group& cluster, Shared& shared,
                                             int round) {
  __syncthreads();
  for (int bin = threadIdx.x; bin < kBins; bin += kThreads) {
    const uint32_t count = shared.counts[bin];
    if (count != 0u) {
      shared.counts[bin] = 0u;
      for (int block = 0; block < kBlocks; ++block) {
        atomicAdd(cluster.map_shared_rank(&shared.merged[round][bin], block), count);
      }
    }
  }
  cluster.sync();
}

// Finds the digit of the `wanted`-th largest key that any block counted in this round.
__device__ __forceinline__ uint32_t find_digit(Shared& shared, int round, uint32_t wanted) {
  return top_k::find_digit(shared.found, shared.warp_sums, wanted,
                           [&](int digit) { return shared.merged[round][digit]; });
}

// Where to cut the row, which has more than k keys, so that exactly k stay. The counts are 0 and
// the cluster has synchronized since.
template <int kVectors>
__device__ Cut find_cut(cg::cluster_group& cluster, Shared& shared,
                        const uint32_t (&keys)[kVectors][kVector], uint32_t k) {
  uint32_t best = 0u;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    best = max(best, max(max(keys[v][0], keys[v][1]), max(keys[v][2], keys[v][3])));
  }
  if (best != 0u) {
    atomicAdd(&shared.counts[best >> (32 - kDigitBits)], 1u);
  }
  const uint32_t warp_best = __reduce_max_sync(kAllLanes, best);
  if (threadIdx.x % 32 == 0) {
    atomicMax(&shared.block_best, warp_best);
  }
  __syncthreads();
  if (threadIdx.x < kBlocks) {
    atomicMax(cluster.map_shared_rank(&shared.row_best, threadIdx.x), shared.block_best);
  }
  merge_counts(cluster, shared, 0);
  const uint32_t num_best = find_digit(shared, 0, k);
  const uint32_t bound = num_best >= k ? shared.found.digit << (32 - kDigitBits) : 0u;

  uint32_t low = max(bound, 1u);
  int width = shared.row_best == low ? 0 : 32 - __clz(static_cast<int>(shared.row_best - low));
  Cut cut{.low = low, .span = width == 32 ? ~0u : (1u << width) - 1u, .num_ties = k};
  uint32_t num_same = 0u;  // not counted yet
  for (int round = 1; width > 0 && num_same != cut.num_ties; ++round) {
    const int shift = max(width - kDigitBits, 0);
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        if (cut.is_tied(keys[v][i])) {
          atomicAdd(&shared.counts[(keys[v][i] - cut.low) >> shift], 1u);
        }
      }
    }
    merge_counts(cluster, shared, round);
    find_digit(shared, round, cut.num_ties);
    cut.low += shared.found.digit << shift;
    cut.span = (1u << shift) - 1u;
    cut.num_ties -= shared.found.num_above;
    num_same = shared.found.num_same;
    width = shift;
  }
  return cut;
}

// Writes the places of the taken keys in ascending order.
template <int kVectors>
__device__ void write_indices(cg::cluster_group& cluster, Shared& shared, int first,
                              const uint32_t (&keys)[kVectors][kVector], const Cut& cut,
                              int32_t* indices) {
  constexpr int kWords = (kVectors + 3) / 4;  // a byte for each vector: a warp's has 128 keys
  uint32_t above[kWords] = {};
  uint32_t ties[kWords] = {};
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      above[v / 4] += cut.is_above(keys[v][i]) ? 1u << v % 4 * 8 : 0u;
      ties[v / 4] += cut.is_tied(keys[v][i]) ? 1u << v % 4 * 8 : 0u;
    }
  }
  uint32_t above_total[kWords];
  uint32_t ties_total[kWords];
  uint32_t warp_sum = 0u;
#pragma unroll
  for (int word = 0; word < kWords; ++word) {
    const uint32_t above_to = sum_of_lanes_to(above[word]);
    const uint32_t ties_to = sum_of_lanes_to(ties[word]);
    above_total[word] = __shfl_sync(kAllLanes, above_to, 31);
    ties_total[word] = __shfl_sync(kAllLanes, ties_to, 31);
    above[word] = above_to - above[word];
    ties[word] = ties_to - ties[word];
    warp_sum += __dp4a(above_total[word], 0x01010101u, 0u) << 16;
    warp_sum += __dp4a(ties_total[word], 0x01010101u, 0u);
  }
  const Sums warps = sum_warps(warp_sum, shared.warp_sums);
  const int rank = static_cast<int>(cluster.block_rank());
  if (threadIdx.x < kBlocks) {
    *cluster.map_shared_rank(&shared.totals[rank], threadIdx.x) = warps.total;
  }
  cluster.sync();  // the last access to another block's memory: that block may end after it
  uint32_t num_above = warps.before >> 16;
  uint32_t num_ties = warps.before & 0xFFFFu;
  for (int block = 0; block < rank; ++block) {
    num_above += shared.totals[block] >> 16;
    num_ties += shared.totals[block] & 0xFFFFu;
  }
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int byte = v % 4 * 8;
    uint32_t above_here = num_above + (above[v / 4] >> byte & 0xFFu);
    uint32_t ties_here = num_ties + (ties[v / 4] >> byte & 0xFFu);
    const int place = first + (v * 32 + static_cast<int>(threadIdx.x) % 32) * kVector;
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const bool is_above = cut.is_above(keys[v][i]);
      const bool is_tied = cut.is_tied(keys[v][i]);
      if (is_above || (is_tied && ties_here < cut.num_ties)) {
        indices[above_here + min(ties_here, cut.num_ties)] = place + i;
      }
      above_here += is_above;
      ties_here += is_tied;
    }
    num_above += above_total[v / 4] >> byte & 0xFFu;
    num_ties += ties_total[v / 4] >> byte & 0xFFu;
  }
}

template <int kVectors>
__global__ void __cluster_dims__(kBlocks, 1, 1) __launch_bounds__(kThreads, kVectors <= 8 ? 2 : 1)
    split_rows_kernel(SplitRowsParams params) {
  static_assert(kThreads * kVectors * kVector <= 0x8000, "totals have 16 bits each");
  __shared__ Shared shared;
  cg::cluster_group cluster = cg::this_cluster();
  for (int bin = threadIdx.x; bin < kBins; bin += kThreads) {
    shared.counts[bin] = 0u;
    for (int round = 0; round < kRounds; ++round) {
      shared.merged[round][bin] = 0u;
    }
  }
  if (threadIdx.x == 0) {
    shared.block_best = 0u;
    shared.row_best = 0u;
  }
  cudaGridDependencySynchronize();  // the scores are written
  cudaTriggerProgrammaticLaunchCompletion();
  const int rank = static_cast<int>(cluster.block_rank());
  const int64_t t = blockIdx.x / kBlocks;
  const auto end = static_cast<int>(min(max(params.key_end[t], int64_t{0}), params.num_keys));
  int32_t* indices = params.indices + t * params.k;
  if (end <= params.k) {
    for (int slot = rank * kThreads + threadIdx.x; slot < params.k; slot += kBlocks * kThreads) {
      indices[slot] = slot < end ? slot : -1;
    }
    return;  // all blocks of the cluster
  }
  const int first = (rank * kWarps + static_cast<int>(threadIdx.x) / 32) * 32 * kVectors * kVector;
  uint32_t keys[kVectors][kVector];
  load_keys(params.scores + t * params.num_keys, first, end, keys);
  cluster.sync();
  const Cut cut = find_cut(cluster, shared, keys, static_cast<uint32_t>(params.k));
  write_indices(cluster, shared, first, keys, cut, indices);
}

template <int kVectors>
void launch_for(const SplitRowsParams& params) {
  launch_overlapping(split_rows_kernel<kVectors>,
                     dim3(static_cast<unsigned>(params.num_rows * kBlocks)), dim3(kThreads),
                     params);
}

}  // namespace

void launch_split_rows(const SplitRowsParams& params) {
  constexpr int64_t kKeysPerVector = int64_t{kBlocks} * kThreads * kVector;
  static_assert(kMaxKeysOfSplitRow == 16 * kKeysPerVector);
  if (params.num_keys <= 2 * kKeysPerVector) {
    launch_for<2>(params);
  } else if (params.num_keys <= 8 * kKeysPerVector) {
    launch_for<8>(params);
  } else {
    launch_for<16>(params);
  }
}

}  // namespace megatron_keye
