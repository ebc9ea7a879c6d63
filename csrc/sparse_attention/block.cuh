// How a thread block is cut: which rows it attends for, and where its tiles of keys lie.
// A row is a query's head: query * heads + head. Each consumer warpgroup owns 64 rows; one more
// warpgroup, the first, brings keys and values.
#pragma once

#include "sparse_attention/params.h"
#include "support/hopper_sm90a.cuh"
#include "support/mbarrier_sm90a.cuh"

namespace megatron_keye::sparse_attention {

using namespace hopper;

constexpr int kWarpgroupRows = 64;
constexpr int kWarpRows = 16;
constexpr uint32_t kWholeWarp = 0xFFFFFFFFu;
constexpr int kHalfChannels = kSwizzleBytes / sizeof(__nv_bfloat16);  // of a half-tile's rows
constexpr int kHalfBytes = kTileKeys * kSwizzleBytes;

__device__ __forceinline__ int lane_of_warp() { return static_cast<int>(threadIdx.x) % 32; }

// Shared by host and device: everything that is known when the kernel is compiled.
template <int kChannelsOf, int kHeadsOf>
struct Block {
  static constexpr int kChannels = kChannelsOf;
  static constexpr int kHeads = kHeadsOf;  // of a group
  // 4 heads of 16 queries fill one warpgroup, 8 heads two; 16 heads leave room for 8 queries.
  static constexpr int kConsumers = kHeads == 4 ? 1 : 2;
  static constexpr int kQueries = kConsumers * kWarpgroupRows / kHeads;
  static constexpr int kThreads = (1 + kConsumers) * kWarpgroup;
  static constexpr int kParts = kTileQueries / kQueries;  // blocks that share a union
  static constexpr int kResident = kConsumers == 1 ? 2 : 1;  // blocks of a multiprocessor
  static constexpr int kHalves = kChannels / kHalfChannels;
  static constexpr int kTileBytes = kHalves * kHalfBytes;  // of keys, or of values
  static constexpr int kStages = kResident == 1 ? 6 : 3;
  // 65,536 registers of a multiprocessor, in steps of 8 a thread.
  static constexpr int kProducerRegisters = 40;
  static constexpr int kConsumerRegisters = kResident == 1 ? 232 : 216;
  static_assert(kResident * kWarpgroup * (kProducerRegisters + kConsumers * kConsumerRegisters) <=
                65536);
};

// A stage holds the keys of a tile and behind them the values: for each 64 channels a half-tile
// [64 keys][64 channels] in the order of `swizzled`.
template <typename Cut>
struct Shared {
  using Ring = RingPlace<Cut::kStages>;

  unsigned char stages[Cut::kStages][2][Cut::kTileBytes];
  uint64_t is_full[Cut::kStages];   // a phase ends when the stage's keys and values are there
  uint64_t is_empty[Cut::kStages];  // a phase ends when no warp needs them any more

  __device__ __forceinline__ uint32_t keys(const Ring& ring) const {
    return shared_address(stages[ring.stage]);
  }
  __device__ __forceinline__ uint32_t values(const Ring& ring) const {
    return keys(ring) + Cut::kTileBytes;
  }

  __device__ __forceinline__ void make_barriers() {
    if (threadIdx.x == 0) {
      for (int stage = 0; stage < Cut::kStages; ++stage) {
        make_barrier(shared_address(&is_full[stage]), kWarpgroup);
        make_barrier(shared_address(&is_empty[stage]), Cut::kConsumers * kWarpgroup / 32);
      }
    }
    __syncthreads();
  }

  // Producers wait until they may fill a stage, and announce their copies.
  __device__ __forceinline__ void await_room(const Ring& ring) {
    wait_for_phase(shared_address(&is_empty[ring.stage]), ring.parity ^ 1);
  }
  __device__ __forceinline__ void announce(const Ring& ring) {
    arrive_after_copies(shared_address(&is_full[ring.stage]));
  }

  // Consumers wait until a stage is there for the tensor cores, and give it back.
  __device__ __forceinline__ void await(const Ring& ring) {
    wait_for_phase(shared_address(&is_full[ring.stage]), ring.parity);
    publish_to_tensor_cores();
  }
  __device__ __forceinline__ void release(const Ring& ring) {
    if (threadIdx.x % 32 == 0) {
      arrive(shared_address(&is_empty[ring.stage]));
    }
  }
};

// The rows and the union of this thread block.
template <typename Cut>
struct Place {
  int64_t first_union;  // place of the union's first key in `keys` and `masks`
  int num_keys;         // of the union
  int num_tiles;
  int first_local;  // the block's first query, counted from the tile's first
  int first_query;
  int group;

  __device__ __forceinline__ explicit Place(const ForwardParams& params) {
    const int tile = static_cast<int>(blockIdx.x) / Cut::kParts;
    first_union = tile * params.capacity;
    num_keys = params.counts[tile];
    num_tiles = (num_keys + kTileKeys - 1) / kTileKeys;
    first_local = static_cast<int>(blockIdx.x) % Cut::kParts * Cut::kQueries;
    first_query = tile * kTileQueries + first_local;
    group = static_cast<int>(blockIdx.y);
  }
};

}  // namespace megatron_keye::sparse_attention
