// SPDX-License-Identifier: Apache-2.0
// How a thread block of the backward pass is cut, and what lies in its shared memory.
// Rows are those of the forward pass. Each consumer warpgroup owns 64 of them for logits and dq;
// for the sums over all rows of the block it owns one of two products, dk or dv, of a tile's keys.
#pragma once

#include "sparse_attention/block.cuh"
#include "support/reductions_sm90a.cuh"
#include "support/shared_products_sm90a.cuh"

namespace megatron_keye::sparse_attention {

// The two sums of a key, in the order in which they lie in memory.
enum SumKind : int { kOfKeys = 0, kOfValues = 1 };
constexpr int kSums = 2;

template <int kChannelsOf, int kHeadsOf>
struct BackwardBlock {
  static constexpr int kChannels = kChannelsOf;
  static constexpr int kHeads = kHeadsOf;  // of a group
  static constexpr int kConsumers = kHeads == 4 ? 1 : 2;
  static constexpr int kRows = kConsumers * kWarpgroupRows;
  static constexpr int kQueries = kRows / kHeads;
  static constexpr int kThreads = (1 + kConsumers) * kWarpgroup;
  static constexpr int kParts = kTileQueries / kQueries;
  static constexpr int kResident = kConsumers == 1 ? 2 : 1;  // that registers are left for
  static constexpr int kHalves = kChannels / kHalfChannels;
  static constexpr int kTileBytes = kHalves * kHalfBytes;
  static constexpr int kHalfRowsBytes = kRows * kSwizzleBytes;  // of 64 channels of all rows
  static constexpr int kStages = 2;
  static constexpr int kProducerRegisters = kResident == 1 ? 40 : 40;
  static constexpr int kConsumerRegisters = kResident == 1 ? 232 : 216;
  static constexpr int kSumBytes = kChannels * sizeof(float);
  // From a key's sums to those of the next: pairs that half a warp writes, of 4 keys, lie in
  // different banks.
  static constexpr int kPitch = kSums * kSumBytes + 32;
  static_assert(have_registers<kResident, kConsumers>(kProducerRegisters, kConsumerRegisters));
};

// Rows of q and dout lie like tiles of keys; weights and gradients of logits as [rows][64 keys].
// With 128 channels and two consumers it takes all that a multiprocessor has.
template <typename Cut>
struct BackwardShared : Stages<Cut> {
  static constexpr int kLimitBytes = 227 * 1024;

  int key[Cut::kStages][kTileKeys];  // -1 where there is none
  alignas(1024) unsigned char q[Cut::kHalves * Cut::kHalfRowsBytes];
  unsigned char dout[Cut::kHalves * Cut::kHalfRowsBytes];
  unsigned char weights[Cut::kHalfRowsBytes];
  unsigned char dlogits[Cut::kHalfRowsBytes];
  unsigned char sums[kTileKeys * Cut::kPitch];  // of a tile's keys, on their way to memory
};

// Where weights or gradients of logits of a consumer's thread lie: the pair of its row i with keys
// from `product_column(thread, j)` on.
__host__ __device__ constexpr uint32_t place_of_pair(int thread, int i, int j) {
  return swizzled(product_row(thread, i), j) + thread % 4 * sizeof(uint32_t);
}

// Where a value of the sums on their way lies.
template <typename Cut>
__host__ __device__ constexpr int place_of_sum(int key, SumKind kind, int channel) {
  return key * Cut::kPitch + kind * Cut::kSumBytes + channel * static_cast<int>(sizeof(float));
}

}  // namespace megatron_keye::sparse_attention
