// Brings the keys and values of a union to shared memory, tile after tile.
// Rows lie anywhere in memory, which Hopper's bulk copies can't gather, so each thread copies 16
// bytes at a time; a barrier hears from the copies themselves when a stage is full.
#pragma once

#include "sparse_attention/block.cuh"

namespace megatron_keye::sparse_attention {

template <typename Cut>
class Gatherer {
  static constexpr int kVectorChannels = 16 / sizeof(__nv_bfloat16);
  static constexpr int kRowVectors = Cut::kChannels / kVectorChannels;
  static constexpr int kHalfVectors = kSwizzleBytes / 16;
  static constexpr int kRowsAtOnce = 32 / kRowVectors;  // that a warp copies in one instruction
  static constexpr int kCopies = kWarpRows / kRowsAtOnce;

 public:
  __device__ __forceinline__ Gatherer(const ForwardParams& params, const Place<Cut>& place)
      : keys_(params.keys + place.first_union),
        num_keys_(place.num_keys),
        stride_(static_cast<int>(params.k_stride_s / kVectorChannels)) {
    const int vector = lane_of_warp() % kRowVectors;
    const int64_t channel = place.group * params.k_stride_g + vector * kVectorChannels;
    k_ = params.k + channel;
    v_ = params.v + channel;
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      target_[i] = vector / kHalfVectors * kHalfBytes +
                   swizzled(first_row() + row_of(i), vector % kHalfVectors);
    }
  }

  // Where the key of lane % 16 of this warp's rows of a tile begins, in vectors of 16 bytes from
  // key 0 on; -1 past the union's end.
  __device__ __forceinline__ int find(int tile) const {
    const int at = tile * kTileKeys + first_row() + lane_of_warp() % kWarpRows;
    return at < num_keys_ ? keys_[at] * stride_ : -1;
  }

  // Starts the copies of this warp's 16 rows; rows without a key become 0.
  __device__ __forceinline__ void copy(int found, uint32_t keys, uint32_t values) const {
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int row = __shfl_sync(kWholeWarp, found, row_of(i));
      const int64_t offset = int64_t{row} * kVectorChannels;
      copy_16_async(keys + target_[i], k_ + offset, row >= 0);
      copy_16_async(values + target_[i], v_ + offset, row >= 0);
    }
  }

 private:
  __device__ __forceinline__ static int first_row() {
    return static_cast<int>(threadIdx.x) / 32 * kWarpRows;
  }
  __device__ __forceinline__ static int row_of(int i) {
    return i * kRowsAtOnce + lane_of_warp() / kRowVectors;
  }

  const int* keys_;
  int num_keys_;
  int stride_;  // of keys, in vectors
  const __nv_bfloat16* k_;
  const __nv_bfloat16* v_;
  uint32_t target_[kCopies];
};

// What the first warpgroup does.
template <typename Cut>
__device__ __forceinline__ void gather(const ForwardParams& params, const Place<Cut>& place,
                                       Shared<Cut>& shared) {
  const Gatherer<Cut> gatherer(params, place);
  RingPlace<Cut::kStages> ring;
  int found = gatherer.find(0);
#pragma unroll 1
  for (int tile = 0; tile < place.num_tiles; ++tile, ring.advance()) {
    const int found_next = gatherer.find(tile + 1);
    shared.await_room(ring);
    gatherer.copy(found, shared.keys(ring), shared.values(ring));
    shared.announce(ring);
    found = found_next;
  }
  wait_for_all_copies();
}

}  // namespace megatron_keye::sparse_attention
