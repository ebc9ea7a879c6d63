// SPDX-License-Identifier: Apache-2.0
// The indexer's scores of new tokens over the pages of the cache:
//   score[t, s] = J^-0.5 * sum over i of gate[t, i] * relu(q[t, i] . k[s]).
//
// All keys of a sequence are read for a few queries, so the time is that of the read, if little is
// done for a key. Each warp brings its keys to shared memory in a ring of its own, several tiles
// ahead, and from there to registers, as the left factor of products with the queries' heads; the
// four warps of a block meet only in these. Keys of 8 bits become bf16 in registers. Products go
// back to the ring where the keys were, so that a lane gets all heads of one key, and adds them in
// their order, as training does: the same bits.

#include <cuda_runtime.h>

#include "sparse_decode/scores_tiles_sm90a.cuh"
#include "support/launch.h"

namespace megatron_keye::sparse_decode {

namespace {

using namespace scores;

// Brings queries in the order of terms and gates to shared memory.
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
      const float number = head < params.num_heads ? __bfloat162float(source[channel]) : 0.0f;
      terms[term] = __float2bfloat16_rn(number * Keys::kQueryFactor);
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
    // Half, because sums add x + |x| instead of relu(x): the same bits, and no slow maximum.
    shared.gates[i / kMaxIndexHeads][head] = 0.5f * gate;
  }
  publish_to_tensor_cores();
  __syncthreads();
}

// Returns the page of a sequence that is this thread's, counted from that of a key on.
__device__ __forceinline__ int load_page(const Pages& table, int sequence, int first_key) {
  static_assert(kMaxPages == kThreads, "a block's pages");
  const int place = (first_key >> table.log2_places) + static_cast<int>(threadIdx.x);
  return place < table.num_of_sequence ? table.pages[sequence * table.stride + place] : -1;
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
  const int keys_of_block = params.tiles_of_block * kScoredKeys;
  // Loaded together with the length, and queries beside the first keys: two waits less.
  const int page = load_page(params.table, sequence,
                             static_cast<int>(blockIdx.x) * keys_of_block);
  const auto length = static_cast<int>(
      min(max(params.lengths[sequence], int64_t{0}), int64_t{params.table.num_keys()}));
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
  shared.pages[threadIdx.x] = page;
  __syncthreads();
  const Tiles<Keys, Room> tiles(params, range, shared);
#pragma unroll
  for (int tile = 0; tile < Keys::kStages - 1; ++tile) {
    tiles.copy(tile, tile);
  }
  load_queries<Keys>(params, range, shared);
  const int num_tiles = range.num_tiles();
  int stage = 0;
  int filled = Keys::kStages - 1;
#pragma unroll 1
  for (int tile = 0; tile < num_tiles; ++tile) {
    wait_for_copies<Keys::kStages - 2>();
    __syncwarp();  // this tile is there, and nobody reads the one before it any more
    tiles.copy(tile + Keys::kStages - 1, filled);
    tiles.score(tile, stage);
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
