// SPDX-License-Identifier: Apache-2.0
// The indexer's loss beside the sparse attention, on the tensor cores of Hopper.
// The attention's weights are computed again from their log-sum-exp, tile by tile of a union's
// keys, averaged over the heads of a group, and compared at once with the indexer's scores: the
// target is never stored. For a tile of keys one group follows the other, so that scores are read
// and their gradient is written once.

#include <algorithm>

#include "sparse_attention/loss_block.cuh"
#include "sparse_attention/loss_comparison.cuh"
#include "sparse_attention/loss_gather.cuh"
#include "sparse_attention/params.h"
#include "sparse_attention/sizes.cuh"
#include "support/launch.h"

namespace megatron_keye::sparse_attention {

namespace {

constexpr int kConsumersBarrier = 1;

// Brings all columns with their log-sum-exp, zeros where there is no query; all consumers may use
// them after a barrier.
template <typename Cut>
__device__ __forceinline__ void load_columns(const LossParams& params, const Place<Cut>& place,
                                             int num_groups, LossShared<Cut>& shared) {
  constexpr int kVectorChannels = 16 / sizeof(__nv_bfloat16);
  constexpr int kRowVectors = Cut::kChannels / kVectorChannels;
  constexpr int kThreads = Cut::kConsumers * kWarpgroup;
  const Problem& problem = params.problem;
#pragma unroll 2
  for (int i = static_cast<int>(threadIdx.x) - kWarpgroup;
       i < num_groups * Cut::kColumns * kRowVectors; i += kThreads) {
    const int group = i / (Cut::kColumns * kRowVectors);
    const int column = i / kRowVectors % Cut::kColumns;
    const int vector = i % kRowVectors;
    const int query = place.first_query + query_of_column<Cut>(column);
    const int head = (place.group + group) * Cut::kHeads + head_of_column<Cut>(column);
    const bool is_real = query < problem.num_queries;
    const int64_t row = is_real ? query : 0;
    copy_16_async(shared_address(shared.columns[group]) +
                      place_of_vector(column, vector, Cut::kHalfColumnsBytes),
                  problem.q + row * problem.q_stride_t + head * problem.q_stride_h +
                      vector * kVectorChannels,
                  is_real);
    if (vector == 0) {
      copy_4_async(shared_address(&shared.lse[group][place_of_lse<Cut>(column)]),
                   params.lse + row * (problem.num_groups * Cut::kHeads) + head, is_real);
    }
  }
  wait_for_all_copies();
  publish_to_tensor_cores();
}

// What the other warpgroups do.
template <typename Cut>
__device__ __forceinline__ void compare_groups(const LossParams& params, const Place<Cut>& place,
                                               int num_groups, LossShared<Cut>& shared) {
  load_columns(params, place, num_groups, shared);
  Comparison<Cut> comparison(params, place, shared);
  warpgroup_barrier<Cut::kConsumers * kWarpgroup>(kConsumersBarrier);
  const int consumer =  // by a reduction, whose result the compiler knows to be the warp's
      __reduce_max_sync(kWholeWarp, static_cast<int>(threadIdx.x) / kWarpgroup - 1);
  LossTiles<Cut>& tiles = shared.tiles[consumer];
  RingPlace<Cut::kDepth> ring;
#pragma unroll 1
  for (int first = consumer * kTileKeys; first < place.num_keys;
       first += Cut::kConsumers * kTileKeys) {
#pragma unroll 1
    for (int group = 0; group < num_groups; ++group) {
      tiles.await_tile(ring);
      publish_to_tensor_cores();
      begin_products();
      comparison.start_logits(shared_address(shared.keys[consumer][ring.stage]), group);
      if (group == 0) {
        comparison.load(tiles.slots[ring.stage]);
      }
      comparison.wait_for_logits();
      __syncwarp();  // all lanes have read their slots
      tiles.release(ring);
      ring.advance();
      comparison.compare(group);
    }
    comparison.store_gradient();
  }
  comparison.store_divergence(num_groups);
}

template <typename Cut>
__global__ void __launch_bounds__(Cut::kThreads, 1)
    loss_kernel(const __grid_constant__ LossParams params, int first_group, int num_groups) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL  // built for others too, but never launched there
  extern __shared__ __align__(1024) unsigned char shared_bytes[];
  auto& shared = *reinterpret_cast<LossShared<Cut>*>(shared_bytes);
  if (threadIdx.x == 0) {
    for (LossTiles<Cut>& tiles : shared.tiles) {
      tiles.make_barriers(1);
    }
  }
  __syncthreads();
  const Place<Cut> place(params.problem, blockIdx.x, first_group);
  if (threadIdx.x < kWarpgroup) {
    give_registers_down_to<Cut::kProducerRegisters>();
    gather_groups(params.problem, place, num_groups, shared);
  } else {
    take_registers_up_to<Cut::kConsumerRegisters>();
    compare_groups(params, place, num_groups, shared);
  }
#endif
}

template <int kChannels, int kHeads>
void launch_block(const LossParams& params) {
  using Cut = LossBlock<kChannels, kHeads>;
  using Memory = LossShared<Cut>;
  static_assert(sizeof(Memory) <= Memory::kLimitBytes);
  const int tiles = (params.problem.num_queries + kTileQueries - 1) / kTileQueries;
  // More groups than fit come in launches of their own, each of which adds to the gradient.
  const int num_groups = params.problem.num_groups;
  for (int group = 0; group < num_groups; group += kLossGroups) {
    launch(loss_kernel<Cut>, dim3(tiles * Cut::kParts), dim3(Cut::kThreads),
           static_cast<int>(sizeof(Memory)), params, group,
           std::min(kLossGroups, num_groups - group));
  }
}

}  // namespace

void launch_loss(const LossParams& params) {
  with_sizes(params.problem, [&]<int kChannels, int kHeads>() {
    launch_block<kChannels, kHeads>(params);
  });
}

}  // namespace megatron_keye::sparse_attention
