// SPDX-License-Identifier: Apache-2.0
// What the first warpgroup of the loss pass does: brings tiles of keys, group by group, and says
// where in the rows of the selection the keys of a tile stand.
#pragma once

#include "sparse_attention/gather.cuh"
#include "sparse_attention/loss_block.cuh"

namespace megatron_keye::sparse_attention {

// Counts the selected keys of the block's queries, tile by tile. Lanes 4i to 4i + 3 of a warp count
// for one query, and each says what lies among 16 keys.
template <typename Cut>
class Counter {
 public:
  __device__ __forceinline__ explicit Counter(const Place<Cut>& place)
      : first_bit_(place.first_local + first_query()) {}

  // Takes the mask words of keys `lane` and 32 + `lane` of the next tile.
  __device__ __forceinline__ void take(const uint32_t (&words)[2],
                                       Slots (&slots)[kWarpgroup / 32][Cut::kQueries]) {
    uint32_t low = 0;
    uint32_t high = 0;
#pragma unroll
    for (int i = 0; i < Cut::kOwnQueries; ++i) {
      const uint32_t of_first = __ballot_sync(kWholeWarp, words[0] >> (first_bit_ + i) & 1u);
      const uint32_t of_second = __ballot_sync(kWholeWarp, words[1] >> (first_bit_ + i) & 1u);
      if (lane_of_warp() / 4 == i) {
        low = of_first;
        high = of_second;
      }
    }
    if (lane_of_warp() < 4 * Cut::kOwnQueries) {
      const int quarter = lane_of_warp() % 4;
      slots[quarter][first_query() + lane_of_warp() / 4] = slots_of(low, high, quarter, count_);
    }
    count_ += num_bits(low) + num_bits(high);
  }

 private:
  __device__ __forceinline__ static int first_query() {
    return static_cast<int>(threadIdx.x) / 32 * Cut::kOwnQueries;
  }

  int first_bit_;
  int count_ = 0;
};

// Brings the union, its keys and words read a tile ahead.
template <typename Cut>
__device__ __forceinline__ void gather_groups(const Problem& problem, const Place<Cut>& place,
                                              int num_groups, LossShared<Cut>& shared) {
  const Gatherer<Cut> gatherer(problem, place);
  Counter<Cut> counter(place);
  int key;
  uint32_t words[2];
  const auto read = [&](int first) {
    const int row = first + gatherer.first_row() + lane_of_warp() % kWarpRows;
    key = row < place.num_keys ? problem.keys[place.first_union + row] : -1;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int at = first + 32 * i + lane_of_warp();
      words[i] = at < place.num_keys ? problem.masks[place.first_union + at] : 0;
    }
  };
  RingPlace<Cut::kDepth> rings[Cut::kConsumers];
  int first = 0;
  read(first);
#pragma unroll 1
  while (first < place.num_keys) {
#pragma unroll
    for (int consumer = 0; consumer < Cut::kConsumers; ++consumer) {
      if (first < place.num_keys) {
        LossTiles<Cut>& tiles = shared.tiles[consumer];
        RingPlace<Cut::kDepth>& ring = rings[consumer];
#pragma unroll 1
        for (int group = 0; group < num_groups; ++group) {
          tiles.await_room(ring);
          gatherer.copy_keys(key, group, shared_address(shared.keys[consumer][ring.stage]));
          if (group == 0) {
            counter.take(words, tiles.slots[ring.stage]);
          }
          tiles.announce(ring);
          ring.advance();
        }
        first += kTileKeys;
        read(first);
      }
    }
  }
  wait_for_all_copies();
}

}  // namespace megatron_keye::sparse_attention
