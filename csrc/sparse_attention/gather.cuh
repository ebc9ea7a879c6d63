// SPDX-License-Identifier: Apache-2.0
// Brings keys of a union, with their values or without, to shared memory.
// Rows lie anywhere in memory, which Hopper's bulk copies can't gather, so each thread copies 16
// bytes at a time; a barrier hears from the copies themselves when a stage is full.
#pragma once

#include "sparse_attention/block.cuh"

namespace megatron_keye::sparse_attention {

template <typename Cut>
class Gatherer {
  static constexpr int kVectorChannels = 16 / sizeof(__nv_bfloat16);
  static constexpr int kRowVectors = Cut::kChannels / kVectorChannels;
  static constexpr int kRowsAtOnce = 32 / kRowVectors;  // that a warp copies in one instruction
  static constexpr int kCopies = kWarpRows / kRowsAtOnce;

 public:
  __device__ __forceinline__ Gatherer(const Problem& problem, const Place<Cut>& place)
      : stride_(static_cast<int>(problem.k_stride_s / kVectorChannels)),
        k_stride_g_(problem.k_stride_g) {
    const int vector = lane_of_warp() % kRowVectors;
    const int64_t channel = place.group * problem.k_stride_g + vector * kVectorChannels;
    k_ = problem.k + channel;
    v_ = problem.v + channel;
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      target_[i] = place_of_vector(first_row() + row_of(i), vector, kHalfBytes);
    }
  }

  // Of a tile, a warp copies the rows from this one on.
  __device__ __forceinline__ static int first_row() {
    return static_cast<int>(threadIdx.x) / 32 * kWarpRows;
  }

  // Starts the copies of this warp's rows, the key of each in lane row % 16; those of -1 become 0.
  __device__ __forceinline__ void copy(int key, uint32_t keys, uint32_t values) const {
    copy_rows(key, [&](int i, int64_t offset, bool is_real) {
      copy_16_async(keys + target_[i], k_ + offset, is_real);
      copy_16_async(values + target_[i], v_ + offset, is_real);
    });
  }
  // The same without values, of a group `further` than that of the place.
  __device__ __forceinline__ void copy_keys(int key, int further, uint32_t keys) const {
    const __nv_bfloat16* const k = k_ + further * k_stride_g_;
    copy_rows(key, [&](int i, int64_t offset, bool is_real) {
      copy_16_async(keys + target_[i], k + offset, is_real);
    });
  }

 private:
  template <typename Copy>
  __device__ __forceinline__ void copy_rows(int key, const Copy& copy) const {
    const int found = key >= 0 ? key * stride_ : -1;
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int row = __shfl_sync(kWholeWarp, found, row_of(i));
      copy(i, int64_t{row} * kVectorChannels, row >= 0);
    }
  }
  __device__ __forceinline__ static int row_of(int i) {
    return i * kRowsAtOnce + lane_of_warp() / kRowVectors;
  }

  int stride_;  // of keys, in vectors
  int64_t k_stride_g_;
  const __nv_bfloat16* k_;
  const __nv_bfloat16* v_;
  uint32_t target_[kCopies];
};

}  // namespace megatron_keye::sparse_attention
