// SPDX-License-Identifier: Apache-2.0
// Brings selected keys with their values to shared memory, tile after tile, for one warp.
#pragma once

#include "sparse_decode/attention_block.cuh"

namespace megatron_keye::sparse_decode::attention {

// Finds where selected keys lie, a list of 32 ahead of their copies: a lane reads one key of the
// list after next and the page of one of the next list, and neither is waited for.
class Finder {
 public:
  __device__ __forceinline__ Finder(const AttendParams& params, const Work& work)
      : params_(params),
        indices_(params.indices + int64_t{work.row} * params.num_selected),
        pages_(params.table.pages + work.row / params.num_queries * params.table.stride),
        place_(work.part * kListKeys + lane_of_warp()),
        step_(work.num_parts * kListKeys) {
    next_key_ = read_key();
    next_page_ = read_page(next_key_);
    key_after_ = read_key();
  }

  // Returns the offset of this lane's key of the next list, in elements, or -1.
  __device__ __forceinline__ int64_t advance() {
    const Pages& table = params_.table;
    const int64_t offset = next_key_ >= 0 && table.holds(next_page_)
                               ? next_page_ * params_.stride_p +
                                     table.place(next_key_) * params_.stride_l
                               : -1;
    is_selected_ = next_key_ >= 0;
    next_key_ = key_after_;
    next_page_ = read_page(next_key_);
    key_after_ = read_key();
    return offset;
  }

  // Whether the last list had this lane's key at all; selections end in -1.
  __device__ __forceinline__ bool is_selected() const { return is_selected_; }

 private:
  __device__ __forceinline__ int read_key() {
    const int key = place_ < params_.num_selected ? __ldcg(indices_ + place_) : -1;
    place_ += step_;
    return key;
  }
  __device__ __forceinline__ int read_page(int key) const {
    return key >= 0 ? __ldg(pages_ + (key >> params_.table.log2_places)) : -1;
  }

  const AttendParams& params_;
  const int* indices_;
  const int* pages_;
  int place_;
  int step_;
  int next_key_;
  int next_page_;
  int key_after_;
  bool is_selected_ = false;
};

// Starts the copies of tile after tile.
template <typename Size>
class Copier {
 public:
  __device__ __forceinline__ Copier(const AttendParams& params, const Work& work,
                                    Shared<Size>& shared)
      : finder_(params, work),
        room_(shared_address(shared.rooms[threadIdx.x / 32].stages)),
        is_real_(shared.is_real[threadIdx.x / 32]) {
    const int64_t channel = work.group * params.stride_g + lane_of_warp() % Size::kVectors * 8;
    keys_ = params.keys + channel;
    values_ = params.values + channel;
  }

  // Whether a tile was there; either way the copies count as a group.
  __device__ __forceinline__ bool start() {
    const int half = num_started_ % 2;
    if (half == 0 && !is_over_) {
      offset_ = finder_.advance();
      is_over_ = !__any_sync(kWholeWarp, finder_.is_selected());
    }
    if (!is_over_) {
      copy(half);
      num_started_ += 1;
      stage_ = stage_ + 1 == Size::kStages ? 0 : stage_ + 1;
    }
    commit_copies();
    return !is_over_;
  }

 private:
  __device__ __forceinline__ void copy(int half) {
    constexpr int kRowsAtOnce = 32 / Size::kVectors;
    const uint32_t found = __ballot_sync(kWholeWarp, offset_ >= 0) >> half * kTileKeys;
    if (lane_of_warp() == 0) {
      is_real_[stage_] = found;
    }
    const uint32_t target = room_ + stage_ * 2 * Size::kTileBytes;
#pragma unroll
    for (int first = 0; first < kTileKeys; first += kRowsAtOnce) {
      const int row = first + lane_of_warp() / Size::kVectors;
      const int64_t offset = __shfl_sync(kWholeWarp, offset_, half * kTileKeys + row);
      const bool is_real = offset >= 0;
      const int64_t source = is_real ? offset : 0;
      const uint32_t place = place_in_tile<Size>(row, lane_of_warp() % Size::kVectors);
      copy_16_async(target + place, keys_ + source, is_real);
      copy_16_async(target + Size::kTileBytes + place, values_ + source, is_real);
    }
  }

  Finder finder_;
  uint32_t room_;
  uint32_t* is_real_;
  const __nv_bfloat16* keys_;
  const __nv_bfloat16* values_;
  int64_t offset_ = -1;
  int num_started_ = 0;
  int stage_ = 0;
  bool is_over_ = false;
};

}  // namespace megatron_keye::sparse_decode::attention
