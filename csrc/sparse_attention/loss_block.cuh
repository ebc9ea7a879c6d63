// SPDX-License-Identifier: Apache-2.0
// How a thread block of the loss pass is cut, and what lies in its shared memory.
// Its products have keys as rows and a tile's queries, each with the heads of a group, as columns.
// Columns are ordered so that a thread holds a share of the heads of every query: the sum over the
// heads then needs two exchanges among four lanes. Each consumer takes every second tile of keys,
// for all queries and one group after the other, from a ring of its own.
#pragma once

#include "sparse_attention/block.cuh"
#include "support/shared_products_sm90a.cuh"

namespace megatron_keye::sparse_attention {

constexpr int kLanesOfRow = 4;  // that share a row of a product
constexpr int kLossGroups = 4;  // whose queries fit into shared memory at once

template <int kChannelsOf, int kHeadsOf>
struct LossBlock {
  static constexpr int kChannels = kChannelsOf;
  static constexpr int kHeads = kHeadsOf;  // of a group
  static constexpr int kConsumers = 2;
  static constexpr int kColumns = kHeads == 4 ? 64 : 128;  // of a group
  static constexpr int kQueries = kColumns / kHeads;
  static constexpr int kThreads = (1 + kConsumers) * kWarpgroup;
  static constexpr int kParts = kTileQueries / kQueries;  // blocks that share a union
  static constexpr int kHalves = kChannels / kHalfChannels;
  static constexpr int kTileBytes = kHalves * kHalfBytes;
  static constexpr int kHalfColumnsBytes = kColumns * kSwizzleBytes;  // of 64 channels of a group
  static constexpr int kDepth = 2;  // of each consumer's ring
  static constexpr int kProducerRegisters = 56;
  static constexpr int kConsumerRegisters = 224;
  static constexpr int kOwnHeads = kHeads / kLanesOfRow;      // of each query, in a thread
  static constexpr int kOwnQueries = kQueries / kLanesOfRow;  // whose sums a thread ends up with
  static constexpr int kOwnColumns = kColumns / kLanesOfRow;
  static constexpr int kLsePitch = kOwnColumns + 4;  // of a lane's, so that lanes use other banks
  static_assert(have_registers<1, kConsumers>(kProducerRegisters, kConsumerRegisters));
  static_assert(kLossParts == kConsumers * kWarpgroup / 32);
};

__host__ __device__ inline int num_bits(uint32_t word) {
#ifdef __CUDA_ARCH__
  return __popc(word);
#else
  return __builtin_popcount(word);
#endif
}

// Where the selected ones of 16 keys of a tile stand in a query's row of the selection. Rows
// ascend, as the union does, so that a key's place is the number of selected keys before it.
struct alignas(8) Slots {
  uint32_t bits;  // which of the keys the query selected
  int first;      // place of the first of those

  __host__ __device__ bool has(int key) const { return (bits >> key & 1u) != 0; }
  __host__ __device__ int place(int key) const {
    return first + num_bits(bits & ((1u << key) - 1));
  }
};

// Of 16 keys from key 16 * quarter of a tile on: `low` says which of the tile's first 32 keys the
// query selected, `high` which of the others, and `before` how many keys of earlier tiles.
__host__ __device__ inline Slots slots_of(uint32_t low, uint32_t high, int quarter, int before) {
  const uint32_t half = quarter < 2 ? low : high;
  const int before_half = quarter < 2 ? 0 : num_bits(low);
  const int before_quarter = quarter % 2 == 0 ? 0 : num_bits(half & 0xFFFFu);
  return {half >> quarter % 2 * kWarpRows & 0xFFFFu, before + before_half + before_quarter};
}

// Of one consumer: stages are full with a tile's keys of one group. Beside those of its first
// group lie the slots of the tile.
template <typename Cut>
struct LossTiles : Handover<Cut::kDepth> {
  alignas(16) Slots slots[Cut::kDepth][kWarpgroup / 32][Cut::kQueries];
};

// Keys and columns both lie as half-tiles of 64 channels in the order of `swizzled`.
template <typename Cut>
struct LossShared {
  static constexpr int kLimitBytes = 227 * 1024;

  unsigned char keys[Cut::kConsumers][Cut::kDepth][Cut::kTileBytes];
  unsigned char columns[kLossGroups][Cut::kHalves * Cut::kHalfColumnsBytes];
  alignas(16) float lse[kLossGroups][kLanesOfRow * Cut::kLsePitch];
  alignas(16) float divergence[kLossGroups][Cut::kConsumers * kWarpgroup][Cut::kOwnQueries];
  LossTiles<Cut> tiles[Cut::kConsumers];
};

// Column 8j + 2 * lane + odd of a product lies in this lane of four, as number 2j + odd.
__host__ __device__ constexpr int lane_of_column(int column) { return column % 8 / 2; }
__host__ __device__ constexpr int number_in_lane(int column) {
  return column / 8 * 2 + column % 2;
}

// Whose it is.
template <typename Cut>
__host__ __device__ constexpr int query_of_column(int column) {
  return number_in_lane(column) / Cut::kOwnHeads;
}
template <typename Cut>
__host__ __device__ constexpr int head_of_column(int column) {
  return lane_of_column(column) * Cut::kOwnHeads + number_in_lane(column) % Cut::kOwnHeads;
}

template <typename Cut>
__host__ __device__ constexpr int place_of_lse(int column) {
  return lane_of_column(column) * Cut::kLsePitch + number_in_lane(column);
}

}  // namespace megatron_keye::sparse_attention
