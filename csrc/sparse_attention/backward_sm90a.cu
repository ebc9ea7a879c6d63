// SPDX-License-Identifier: Apache-2.0
// Sparse attention backward on the tensor cores of Hopper.
// Thread blocks are cut like those of the forward pass and walk over the same unions, one tile of
// 64 keys after the other. A warpgroup recomputes the weights of its 64 rows from their
// log-sum-exp and adds to its rows' dq, in registers. Weights and gradients of logits also go to
// shared memory, in whose other direction they are the left factors of a tile's dv and dk: sums
// over all rows of the block, of which each warpgroup multiplies one. Those are added to float32
// values in global memory while the next tile is computed.

#include "sparse_attention/backward_block.cuh"
#include "sparse_attention/backward_gradients.cuh"
#include "sparse_attention/backward_rows.cuh"
#include "sparse_attention/gather.cuh"
#include "sparse_attention/params.h"
#include "sparse_attention/sizes.cuh"
#include "sparse_attention/softmax.cuh"
#include "support/launch.h"

namespace megatron_keye::sparse_attention {

namespace {

constexpr int kConsumersBarrier = 1;

// What the first warpgroup does: brings the union tile by tile, its keys read a turn ahead.
template <typename Cut>
__device__ __forceinline__ void gather_tiles(const Problem& problem, const Place<Cut>& place,
                                             BackwardShared<Cut>& shared) {
  const Gatherer<Cut> gatherer(problem, place);
  const int row = gatherer.first_row() + lane_of_warp() % kWarpRows;
  int key;
  uint16_t word;
  const auto read = [&](int at) {
    key = at < place.num_keys ? problem.keys[place.first_union + at] : -1;
    word = at < place.num_keys ? problem.masks[place.first_union + at] : 0;
  };
  RingPlace<Cut::kStages> ring;
  read(row);
#pragma unroll 1
  for (int first = 0; first < place.num_keys; first += kTileKeys) {
    shared.await_room(ring);
    gatherer.copy(key, shared.keys(ring), shared.values(ring));
    if (lane_of_warp() < kWarpRows) {
      shared.key[ring.stage][row] = key;
      reinterpret_cast<uint16_t*>(shared.masks[ring.stage])[row] = word;
    }
    shared.announce(ring);
    ring.advance();
    read(first + kTileKeys + row);
  }
  wait_for_all_copies();
}

// Starts the first two products of a tile.
template <typename Cut>
__device__ __forceinline__ void start_tile(BackwardShared<Cut>& shared,
                                           const RingPlace<Cut::kStages>& ring,
                                           Gradients<Cut>& gradients) {
  shared.await_tile(ring);
  publish_to_tensor_cores();
  begin_products();
  gradients.start_logits(shared.keys(ring));
  gradients.start_dweights(shared.values(ring));
}

// What the other warpgroups do.
template <typename Cut>
__device__ __forceinline__ void differentiate(const BackwardParams& params,
                                              const Place<Cut>& place,
                                              BackwardShared<Cut>& shared) {
  constexpr int kConsumerThreads = Cut::kConsumers * kWarpgroup;
  const SumKind own = consumer_thread() < kWarpgroup ? kOfValues : kOfKeys;
  load_rows(params, place, shared);
  Gradients<Cut> gradients(params, place, shared);
  warpgroup_barrier<kConsumerThreads>(kConsumersBarrier);
  if (place.num_keys > 0) {
    RingPlace<Cut::kStages> ring;
    start_tile(shared, ring, gradients);
    gradients.wait_for_first_products();
    int left = place.num_keys;
#pragma unroll 1
    do {
      left -= kTileKeys;
      uint32_t bits[2];
      find_bits(place, shared.masks[ring.stage], bits);
      gradients.weigh(bits);
      // No warpgroup's products read what was stored for the tile before any more.
      warpgroup_barrier<kConsumerThreads>(kConsumersBarrier);
      gradients.store_weights();
      gradients.store_dlogits();
      publish_to_tensor_cores();
      warpgroup_barrier<kConsumerThreads>(kConsumersBarrier);
      begin_products();
      gradients.start_sums(own);
      gradients.start_dq(shared.keys(ring));
      RingPlace<Cut::kStages> next = ring;
      if (left > 0) {
        next.advance();
      }
      if constexpr (Cut::kConsumers == 1) {
        gradients.template wait_for_sums<1>();
        gradients.send_sums(own, shared.key[ring.stage]);
        begin_products();
        gradients.start_sums(kOfKeys);
        gradients.template wait_for_sums<0>();
        gradients.send_sums(kOfKeys, shared.key[ring.stage]);
        gradients.wait_for_dq();
        // Registers are too few for both, and another block works meanwhile.
        start_tile(shared, next, gradients);
        gradients.wait_for_first_products();
      } else {
        // The tensor cores begin the next tile while the sums of this one leave; after the last,
        // they multiply it once more for nothing.
        start_tile(shared, next, gradients);
        gradients.template wait_for_sums<3>();
        gradients.send_sums(own, shared.key[ring.stage]);
        gradients.wait_for_first_products();
        gradients.wait_for_dq();
      }
      __syncwarp();  // all lanes have read their keys
      shared.release(ring);
      ring = next;
    } while (left > 0);
  }
  gradients.store_dq();
  wait_for_additions();
}

template <typename Cut>
__global__ void __launch_bounds__(Cut::kThreads, Cut::kResident)
    backward_kernel(const __grid_constant__ BackwardParams params) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL  // built for others too, but never launched there
  extern __shared__ __align__(1024) unsigned char shared_bytes[];
  auto& shared = *reinterpret_cast<BackwardShared<Cut>*>(shared_bytes);
  shared.make_barriers();
  const Place<Cut> place(params.problem, blockIdx.x, blockIdx.y);
  if (threadIdx.x < kWarpgroup) {
    give_registers_down_to<Cut::kProducerRegisters>();
    gather_tiles(params.problem, place, shared);
  } else {
    take_registers_up_to<Cut::kConsumerRegisters>();
    differentiate(params, place, shared);
  }
#endif
}

template <int kChannels, int kHeads>
void launch_block(const BackwardParams& params) {
  using Cut = BackwardBlock<kChannels, kHeads>;
  using Memory = BackwardShared<Cut>;
  static_assert(sizeof(Memory) <= Memory::kLimitBytes);
  const int tiles = (params.problem.num_queries + kTileQueries - 1) / kTileQueries;
  launch(backward_kernel<Cut>, dim3(tiles * Cut::kParts, params.problem.num_groups),
         dim3(Cut::kThreads), static_cast<int>(sizeof(Memory)), params);
}

}  // namespace

void launch_backward(const BackwardParams& params) {
  with_sizes(params.problem, [&]<int kChannels, int kHeads>() {
    launch_block<kChannels, kHeads>(params);
  });
}

}  // namespace megatron_keye::sparse_attention
