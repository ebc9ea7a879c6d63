// SPDX-License-Identifier: Apache-2.0
// The indexer's scores of new tokens over the pages of the cache:
//   score[t, s] = J^-0.5 * sum over i of gate[t, i] * relu(q[t, i] . k[s]).
//
// All keys of a sequence are read for a few queries, so the time is that of the read. Each warp
// brings its keys to shared memory in a ring of its own, several tiles ahead, and from there to
// registers, as the left factor of products with the queries' heads; the four warps of a block
// meet only in these. Keys of 8 bits become bf16 in registers. A warp's sums are then transposed
// so that a lane has all heads of one key, and adds them in their order, as training does: the
// same bits.

#include <cuda_runtime.h>

#include "sparse_decode/scores_tiles_sm90a.cuh"
#include "support/launch.h"

namespace megatron_keye::sparse_decode {

namespace {

using namespace scores;

// Brings queries in the order of terms, gates and page numbers to shared memory.
template <typename Keys, typename Room>
__device__ __forceinline__ void load_queries(const ScoreParams& params, const Range& range,
                                             Room& shared) {
  const int64_t first_head = int64_t{range.sequence} * params.num_queries * params.num_heads;
  for (int i = threadIdx.x; i < params.num_queries * kHeadBytes / 16; i += kThreads) {
    const int vector = i % (kSwizzleBytes / 16);
    const int head = i / (kSwizzleBytes / 16) % kMaxIndexHeads;
    const int query = i / (kHeadBytes / 16);
    alignas(16) __nv_bfloat16 terms[8];
    const auto* const source =
        params.q + (first_head + query * params.num_heads + head) * kIndexChannels;
#pragma unroll
    for (int term = 0; term < 8; ++term) {
      const int channel = vector / 2 * kTerms + Keys::channel_at(vector % 2 * 8 + term);
      terms[term] = head < params.num_heads ? source[channel] : __nv_bfloat16{};
    }
    *reinterpret_cast<uint4*>(shared.queries[query] + swizzled(head, vector)) =
        *reinterpret_cast<const uint4*>(terms);
  }
  for (int i = threadIdx.x; i < params.num_queries * kMaxIndexHeads; i += kThreads) {
    const int head = i % kMaxIndexHeads;
    const int64_t place = first_head + i / kMaxIndexHeads * params.num_heads + head;
    float gate = 0.0f;
    if (head < params.num_heads) {
      gate = params.gate_is_float
                 ? static_cast<const float*>(params.gate)[place]
                 : __bfloat162float(static_cast<const __nv_bfloat16*>(params.gate)[place]);
    }
    shared.gates[i / kMaxIndexHeads][head] = gate;
  }
  const Pages& table = params.table;
  const int first_page = range.first >> table.log2_places;
  const int num_pages = ((range.last - 1) >> table.log2_places) + 1 - first_page;
  for (int i = threadIdx.x; i < num_pages; i += kThreads) {
    shared.pages[i] = table.pages[range.sequence * table.stride + first_page + i];
  }
  publish_to_tensor_cores();
  __syncthreads();
}

// Starts the copies of a warp's keys of a tile, and of their scales; zeros for no key.
template <typename Keys, typename Room>
__device__ __forceinline__ void copy_tile(const ScoreParams& params, const Range& range,
                                          Room& shared, int tile, int stage, int own_row) {
  if (tile < range.num_tiles()) {
    constexpr int kVectors = Room::kRowBytes / 16;
    const int first_page = range.first >> params.table.log2_places;
    const auto* const keys = static_cast<const unsigned char*>(params.index_keys);
    const auto find = [&](int key) {
      const int page =
          key < range.last ? shared.pages[(key >> params.table.log2_places) - first_page] : -1;
      return params.table.holds(page) ? page : -1;
    };
    const uint32_t target = shared_address(shared.tiles[warp_of_block()][stage]);
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int row = (i * 32 + lane_of_warp()) / kVectors;
      const int vector = lane_of_warp() % kVectors;
      const int key = range.key(tile, row);
      const int page = find(key);
      const int64_t offset = max(page, 0) * params.page_bytes +
                             params.table.place(key) * params.key_bytes + vector * 16;
      copy_16_async(target + place_in_tile<Keys>(row, vector), keys + offset, page >= 0);
    }
    if (params.scales != nullptr) {
      const int key = range.key(tile, own_row);
      const int page = find(key);
      const int64_t offset = max(page, 0) * params.scale_stride + params.table.place(key);
      copy_4_async(
          shared_address(&shared.scales[warp_of_block()][stage][lane_of_warp()]),
          params.scales + offset, page >= 0);
    }
  }
  commit_copies();
}

template <typename Keys, int kQueries>
__global__ void __launch_bounds__(kThreads, 4)
    score_pages_kernel(const __grid_constant__ ScoreParams params) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL  // built for others too, but never launched there
  using Room = Shared<Keys, kQueries>;
  extern __shared__ __align__(1024) unsigned char shared_bytes[];
  auto& shared = *reinterpret_cast<Room*>(shared_bytes);
  cudaTriggerProgrammaticLaunchCompletion();  // what follows waits by itself
  const auto sequence = static_cast<int>(blockIdx.y);
  const auto length = static_cast<int>(
      min(max(params.lengths[sequence], int64_t{0}), int64_t{params.table.num_keys()}));
  const int keys_of_block = params.tiles_of_block * kScoredKeys;
  const Range range{.sequence = sequence,
                    .first = static_cast<int>(blockIdx.x) * keys_of_block,
                    .last = min(length, (static_cast<int>(blockIdx.x) + 1) * keys_of_block)};
  if (blockIdx.x == 0 && threadIdx.x < params.num_queries) {
    const auto query = static_cast<int>(threadIdx.x);
    params.ends[int64_t{sequence} * params.num_queries + query] =
        max(length - (params.num_queries - 1 - query), 0);
  }
  if (range.first >= range.last) {
    return;
  }
  load_queries<Keys>(params, range, shared);
  const int own_row = row_of_lane();
#pragma unroll
  for (int tile = 0; tile < Keys::kStages - 1; ++tile) {
    copy_tile<Keys>(params, range, shared, tile, tile, own_row);
  }
  const int num_tiles = range.num_tiles();
  int stage = 0;
  int filled = Keys::kStages - 1;
#pragma unroll 1
  for (int tile = 0; tile < num_tiles; ++tile) {
    wait_for_copies<Keys::kStages - 2>();
    __syncwarp();  // this tile is there, and nobody reads the one before it any more
    copy_tile<Keys>(params, range, shared, tile + Keys::kStages - 1, filled, own_row);
    score_tile<Keys>(params, range, shared, tile, stage);
    stage = stage + 1 == Keys::kStages ? 0 : stage + 1;
    filled = filled + 1 == Keys::kStages ? 0 : filled + 1;
  }
  wait_for_copies<0>();
#endif
}

template <typename Keys, int kQueries>
void launch_for(const ScoreParams& params) {
  const int keys_of_block = params.tiles_of_block * kScoredKeys;
  const int num_keys = params.table.num_of_sequence << params.table.log2_places;
  const dim3 grid((num_keys + keys_of_block - 1) / keys_of_block, params.num_sequences);
  launch(score_pages_kernel<Keys, kQueries>, grid, dim3(kThreads),
         static_cast<int>(sizeof(Shared<Keys, kQueries>)), params);
}

template <typename Keys>
void launch_keys(const ScoreParams& params) {
  params.num_queries == 1 ? launch_for<Keys, 1>(params) : launch_for<Keys, kMaxQueries>(params);
}

}  // namespace

void launch_scores(const ScoreParams& params) {
  params.scales == nullptr ? launch_keys<WideKeys>(params) : launch_keys<NarrowKeys>(params);
}

}  // namespace megatron_keye::sparse_decode
