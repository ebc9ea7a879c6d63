// SPDX-License-Identifier: Apache-2.0
// How a thread block of the backward pass is cut, and what lies in its shared memory.
// It walks over the union of 16 queries like the sparse attention. A row is query * heads + head,
// so that a warp's 16 rows are the heads of one query; each consumer warpgroup owns two times 64
// rows.
#pragma once

#include "selected_indexer_scores/params.h"
#include "sparse_attention/loss_gather.cuh"
#include "support/reductions_sm90a.cuh"

namespace megatron_keye::selected_indexer_scores {

using namespace megatron_keye::sparse_attention;

constexpr int kRuns = 2;  // of 64 rows, one after the other, that a consumer owns

struct Cut {
  static constexpr int kChannels = selected_indexer_scores::kChannels;
  static constexpr int kHeads = selected_indexer_scores::kHeads;
  static constexpr int kConsumers = 2;
  static constexpr int kQueries = kTileQueries;
  static constexpr int kRows = kConsumers * kRuns * kWarpgroupRows;
  static constexpr int kParts = 1;
  static constexpr int kThreads = (1 + kConsumers) * kWarpgroup;
  static constexpr int kTileBytes = kHalfBytes;
  static constexpr int kRowsBytes = kRows * kSwizzleBytes;
  static constexpr int kStages = 4;
  static constexpr int kOwnQueries = kQueries / (kWarpgroup / 32);  // that a gathering warp counts
  static constexpr int kProducerRegisters = 56;
  static constexpr int kConsumerRegisters = 224;
  static constexpr int kSumBytes = kChannels * sizeof(float);
  static constexpr int kPitch = kSumBytes + 32;  // so that 4 keys' pairs lie in different banks
  static_assert(kRows == kQueries * kHeads && kHeads == kWarpRows);
  static_assert(kChannels == kHalfChannels);
  static_assert(have_registers<1, kConsumers>(kProducerRegisters, kConsumerRegisters));
};

struct Shared : Handover<Cut::kStages> {
  alignas(1024) unsigned char keys[Cut::kStages][Cut::kTileBytes];
  unsigned char q[Cut::kRowsBytes];
  unsigned char ddots[2][Cut::kRowsBytes];  // [rows][64 keys], of tiles by turns
  unsigned char sums[Cut::kConsumers][kTileKeys * Cut::kPitch];  // dk on its way to memory
  alignas(16) Slots slots[Cut::kStages][kWarpgroup / 32][Cut::kQueries];
  int key[Cut::kStages][kTileKeys];  // -1 where there is none
  alignas(8) float dscores[Cut::kQueries][kTileKeys];  // of a tile; each warp's own
};

}  // namespace megatron_keye::selected_indexer_scores
