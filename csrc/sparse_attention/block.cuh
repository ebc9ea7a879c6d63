// SPDX-License-Identifier: Apache-2.0
// How a thread block is cut: which rows it attends for, and where its tiles of keys lie.
// A row is a query's head: query * heads + head. Each consumer warpgroup owns 64 rows; one more
// warpgroup, the first, brings keys and values.
#pragma once

#include <climits>

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

__device__ __forceinline__ uint32_t packed(float low, float high) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&both);
}

// Whether warpgroups may change to so many registers a thread. What one takes another must have
// given away: a block has what it is launched with, 65,536 of a multiprocessor in steps of 8 a
// thread, and waits for ever for more.
template <int kResident, int kConsumers>
constexpr bool have_registers(int of_producer, int of_consumer) {
  constexpr int kWarpgroups = 1 + kConsumers;
  constexpr int kLaunched = 65536 / (kResident * kWarpgroups * kWarpgroup) / 8 * 8;
  return of_producer + kConsumers * of_consumer <= kWarpgroups * kLaunched;
}

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
  static constexpr int kProducerRegisters = 56;
  static constexpr int kConsumerRegisters = kResident == 1 ? 224 : 200;
  static_assert(have_registers<kResident, kConsumers>(kProducerRegisters, kConsumerRegisters));
};

// Whose queries selected the keys of a tile. One warpgroup's tiles are passed over by the other.
enum TileKind : int { kOfFirst = 0, kOfSecond = 1, kOfBoth = 2, kEnd = 3 };
constexpr int kKinds = 3;  // of tiles with keys

// Keys of each kind that wait for a tile to be full, in rings; each gathering warp keeps its own.
struct Queues {
  static constexpr int kPlaces = 2 * kTileKeys;
  int keys[kKinds][kPlaces];
  uint16_t masks[kKinds][kPlaces];
};

// One lane arrives for its warp, behind the warp's barrier. compute-sanitizer's racecheck does not
// follow that, so in a build for it every lane arrives.
#ifdef MEGATRON_KEYE_EVERY_LANE_ARRIVES
constexpr bool kEveryLaneArrives = true;
#else
constexpr bool kEveryLaneArrives = false;
#endif
constexpr int kArrivalsOfWarp = kEveryLaneArrives ? 32 : 1;

__device__ __forceinline__ void arrive_as_warp(uint32_t barrier) {
  __syncwarp();
  if (kEveryLaneArrives || lane_of_warp() == 0) {
    arrive(barrier);
  }
}

// A ring of stages of shared memory on their way from the warpgroup that copies to consumers.
template <int kStages>
struct Handover {
  using Ring = RingPlace<kStages>;
  static constexpr int kWarps = kWarpgroup / 32;

  uint64_t is_full[kStages];   // a phase ends when all of a stage is there
  uint64_t is_empty[kStages];  // a phase ends when no warp needs it any more

  // By one thread, before a barrier of the block.
  __device__ __forceinline__ void make_barriers(int consumers) {
    for (int stage = 0; stage < kStages; ++stage) {
      make_barrier(shared_address(&is_full[stage]), kWarpgroup + kWarps * kArrivalsOfWarp);
      make_barrier(shared_address(&is_empty[stage]), consumers * kWarps * kArrivalsOfWarp);
    }
  }

  // Producers wait until they may fill a stage, and announce their copies and what is beside them.
  __device__ __forceinline__ void await_room(const Ring& ring) {
    wait_for_phase(shared_address(&is_empty[ring.stage]), ring.parity ^ 1);
  }
  __device__ __forceinline__ void announce(const Ring& ring) {
    arrive_after_copies(shared_address(&is_full[ring.stage]));
    arrive_as_warp(shared_address(&is_full[ring.stage]));
  }

  // Consumers wait for a stage, and release it after their last product with it.
  __device__ __forceinline__ void await_tile(const Ring& ring) {
    wait_for_phase(shared_address(&is_full[ring.stage]), ring.parity);
  }
  __device__ __forceinline__ void release(const Ring& ring) {
    arrive_as_warp(shared_address(&is_empty[ring.stage]));
  }
};

// Keys of a tile and behind them the values: for each 64 channels a half-tile [64 keys]
// [64 channels] in the order of `swizzled`.
template <typename Cut>
struct Tiles {
  unsigned char stages[Cut::kStages][2][Cut::kTileBytes];

  __device__ __forceinline__ uint32_t keys(const RingPlace<Cut::kStages>& ring) const {
    return shared_address(stages[ring.stage]);
  }
  __device__ __forceinline__ uint32_t values(const RingPlace<Cut::kStages>& ring) const {
    return keys(ring) + Cut::kTileBytes;
  }
};

// The ring of the forward and of the backward pass.
template <typename Cut>
struct Stages : Tiles<Cut>, Handover<Cut::kStages> {
  // Beside the keys: two mask words to one of these.
  uint32_t masks[Cut::kStages][kTileKeys / 2];

  __device__ __forceinline__ void make_barriers() {
    if (threadIdx.x == 0) {
      Handover<Cut::kStages>::make_barriers(Cut::kConsumers);
    }
    __syncthreads();
  }
};

// Of the forward pass.
template <typename Cut>
struct Shared : Stages<Cut> {
  using Ring = RingPlace<Cut::kStages>;

  TileKind kind[Cut::kStages];
  Queues queues[Stages<Cut>::kWarps];

  static constexpr int kNone = INT_MAX;  // held

  // A consumer's way through the tiles.
  struct Reader {
    Ring next;
    int num_read = 0;
    bool is_at_end = false;
  };

  // Consumers wait for the next tile with keys of theirs and pass over others; false at the end,
  // and before a tile that comes only when the one of number `held` is released: between two tiles
  // of one consumer there may lie any number of the other's.
  __device__ __forceinline__ bool find_tile(int own, int held, Reader& reader, Ring& found) {
    while (!reader.is_at_end && reader.num_read - held < Cut::kStages) {
      found = reader.next;
      reader.next.advance();
      ++reader.num_read;
      this->await_tile(found);
      // By a reduction, whose result the compiler knows to be the same in the whole warp.
      const int is = __reduce_max_sync(kWholeWarp, static_cast<int>(kind[found.stage]));
      if (is == kOfBoth || is == own) {
        publish_to_tensor_cores();
        return true;
      }
      reader.is_at_end = is == kEnd;
      this->release(found);
    }
    return false;
  }
};

// The rows and the union that a thread block is at.
template <typename Cut>
struct Place {
  int64_t first_union;  // place of the union's first key in `keys` and `masks`
  int num_keys;         // of the union
  int first_local;      // the block's first query, counted from the tile's first
  int first_query;
  int group;

  // Of part `part` of all tiles' parts.
  __device__ __forceinline__ Place(const Problem& problem, int part, int of_group)
      : group(of_group) {
    const int tile = part / Cut::kParts;
    first_union = tile * problem.capacity;
    num_keys = problem.counts[tile];
    first_local = part % Cut::kParts * Cut::kQueries;
    first_query = tile * kTileQueries + first_local;
  }

  // Bits of a mask word that belong to the queries of a consumer warpgroup.
  __device__ __forceinline__ uint32_t bits_of(int consumer) const {
    constexpr int kOwned = Cut::kQueries / Cut::kConsumers;
    return ((1u << kOwned) - 1) << (first_local + consumer * kOwned);
  }
};

}  // namespace megatron_keye::sparse_attention
