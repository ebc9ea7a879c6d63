// SPDX-License-Identifier: Apache-2.0
// How the attention of new tokens is cut: sizes, shared memory, and what a warp does.
#pragma once

#include "sparse_decode/params.h"
#include "support/hopper_sm90a.cuh"

namespace megatron_keye::sparse_decode::attention {

using hopper::commit_copies;
using hopper::copy_16_async;
using hopper::shared_address;
using hopper::wait_for_copies;

constexpr int kThreads = 32 * kWarps;
constexpr int kRows = kMaxGroupHeads;  // of a warp: heads of its group, then zeros
constexpr int kTileKeys = 16;
constexpr int kListKeys = 32;  // of the selection that a warp looks up at once: two tiles
constexpr uint32_t kWholeWarp = 0xFFFFFFFFu;
constexpr float kNoMaximum = -1.0e38f;  // finite, so that a row without keys has no inf - inf

// Known when the kernel is compiled.
template <int kChannelsOf>
struct Sizes {
  static constexpr int kChannels = kChannelsOf;
  static constexpr int kVectors = kChannels / 8;  // of 16 bytes in a row of keys
  static constexpr int kRowBytes = kChannels * 2;
  static constexpr int kTileBytes = kTileKeys * kRowBytes;
  static constexpr int kStages = kChannels == 128 ? 3 : 6;
  static constexpr int kSteps = kChannels / 16;    // products over the channels
  static constexpr int kColumns = kChannels / 8;   // matrices of output columns
};

template <typename Size>
struct Shared {
  // Of each warp: a ring of tiles, keys before values; at the end its sums.
  union Room {
    unsigned char stages[Size::kStages][2][Size::kTileBytes];
    float sums[kRows][Size::kChannels];
  } rooms[kWarps];
  uint32_t is_real[kWarps][Size::kStages];  // a bit for each key of a tile
  float maximum[kWarps][kRows];
  float total[kWarps][kRows];
  // Of all warps of a group, whose sums stand in the room of the group's first warp.
  float group_maximum[kWarps][kRows];
  float group_total[kWarps][kRows];
};

// Byte offset of a vector of a tile, so that neither copies nor matrix loads have bank conflicts.
template <typename Size>
__device__ __forceinline__ uint32_t place_in_tile(int row, int vector) {
  return row * Size::kRowBytes + ((vector ^ (row & 7)) << 4);
}

__device__ __forceinline__ int lane_of_warp() { return static_cast<int>(threadIdx.x) % 32; }

// What a warp does: a group of a row, and every num_parts-th list of its selection from part on.
struct Work {
  int row;
  int group;
  int part;
  int num_parts;

  __device__ __forceinline__ explicit Work(const AttendParams& params) {
    const int warp = static_cast<int>(threadIdx.x) / 32;
    const int rank = static_cast<int>(blockIdx.x) % params.cluster;
    const int cluster = static_cast<int>(blockIdx.x) / params.cluster;
    const int clusters_of_row = params.num_groups / params.groups_of_block;
    const int warps_of_group = kWarps / params.groups_of_block;
    row = cluster / clusters_of_row;
    group = cluster % clusters_of_row * params.groups_of_block + warp % params.groups_of_block;
    part = rank * warps_of_group + warp / params.groups_of_block;
    num_parts = params.cluster * warps_of_group;
  }
};

}  // namespace megatron_keye::sparse_decode::attention
