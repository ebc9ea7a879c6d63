// SPDX-License-Identifier: Apache-2.0
// Sorts the keys of a union by who needs them, tile after tile, for the forward pass.
// Where selections differ much, half of the queries need little more than half of the union, so
// tiles are filled with keys that both warpgroups need, or only the one or the other.
#pragma once

#include "sparse_attention/block.cuh"
#include "sparse_attention/gather.cuh"

namespace megatron_keye::sparse_attention {

// Fills tiles with keys of one kind. All gathering warps decide alike, each for itself, so that
// they need not meet.
template <typename Cut>
class Sorter {
 public:
  __device__ __forceinline__ Sorter(const Problem& problem, const Place<Cut>& place,
                                    Shared<Cut>& shared)
      : gatherer_(problem, place),
        shared_(shared),
        queues_(shared.queues[threadIdx.x / 32]),
        first_bits_(place.bits_of(0)),
        second_bits_(place.bits_of(Cut::kConsumers - 1)) {}

  // Takes a key of each lane, of ascending places of the union; a word of 0 stands for none.
  __device__ __forceinline__ void take(int key, uint32_t word) {
    const bool is_of_first = (word & first_bits_) != 0;
    const bool is_of_second = (word & second_bits_) != 0;
    const bool is_of[kKinds] = {is_of_first && !is_of_second, is_of_second && !is_of_first,
                                is_of_first && is_of_second};
    const uint32_t lanes_before = (1u << lane_of_warp()) - 1;
#pragma unroll
    for (int kind = 0; kind < kKinds; ++kind) {
      const uint32_t lanes = __ballot_sync(kWholeWarp, is_of[kind]);
      if (is_of[kind]) {
        const int place = place_of(kind, count_[kind] + __popc(lanes & lanes_before));
        queues_.keys[kind][place] = key;
        queues_.masks[kind][place] = static_cast<uint16_t>(word);
      }
      count_[kind] += __popc(lanes);
    }
  }

  // Sends off tiles of those kinds that have at least `least` keys, at most 64 of them.
  __device__ __forceinline__ void send(int least) {
    __syncwarp();
#pragma unroll
    for (int kind = 0; kind < kKinds; ++kind) {
      if (count_[kind] >= least) {
        send_tile(kind, min(count_[kind], kTileKeys));
      }
    }
    __syncwarp();
  }

  __device__ __forceinline__ void end() {
    shared_.await_room(ring_);
    announce(kEnd);
  }

 private:
  __device__ __forceinline__ int place_of(int kind, int i) const {
    return (head_[kind] + i) % Queues::kPlaces;
  }

  __device__ __forceinline__ void send_tile(int kind, int num_keys) {
    shared_.await_room(ring_);
    const int row = gatherer_.first_row() + lane_of_warp() % kWarpRows;
    const int place = place_of(kind, row);
    const bool is_real = row < num_keys;
    gatherer_.copy(is_real ? queues_.keys[kind][place] : -1, shared_.keys(ring_),
                   shared_.values(ring_));
    if (lane_of_warp() < kWarpRows) {
      auto* const masks = reinterpret_cast<uint16_t*>(shared_.masks[ring_.stage]);
      masks[row] = is_real ? queues_.masks[kind][place] : uint16_t{0};
    }
    announce(static_cast<TileKind>(kind));
    head_[kind] = place_of(kind, num_keys);
    count_[kind] -= num_keys;
  }

  __device__ __forceinline__ void announce(TileKind kind) {
    if (threadIdx.x == 0) {
      shared_.kind[ring_.stage] = kind;
    }
    shared_.announce(ring_);
    ring_.advance();
  }

  Gatherer<Cut> gatherer_;
  Shared<Cut>& shared_;
  Queues& queues_;
  uint32_t first_bits_;
  uint32_t second_bits_;  // the first's again where there is one consumer: all keys are of both
  RingPlace<Cut::kStages> ring_;
  int head_[kKinds] = {};
  int count_[kKinds] = {};
};

// What the first warpgroup does. A lane reads the keys at two places of the union, a turn ahead.
template <typename Cut>
__device__ __forceinline__ void gather(const Problem& problem, const Place<Cut>& place,
                                       Shared<Cut>& shared) {
  const int* const keys = problem.keys + place.first_union;
  const uint16_t* const masks = problem.masks + place.first_union;
  Sorter<Cut> sorter(problem, place, shared);
  int key[2];
  uint32_t word[2];
  const auto read = [&](int first) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int at = first + 32 * i + lane_of_warp();
      key[i] = at < place.num_keys ? keys[at] : 0;
      word[i] = at < place.num_keys ? masks[at] : 0;
    }
  };
  read(0);
#pragma unroll 1
  for (int first = 0; first < place.num_keys; first += kTileKeys) {
    sorter.take(key[0], word[0]);
    sorter.take(key[1], word[1]);
    read(first + kTileKeys);
    sorter.send(kTileKeys);
  }
  sorter.send(1);
  sorter.end();
  wait_for_all_copies();
}

}  // namespace megatron_keye::sparse_attention
