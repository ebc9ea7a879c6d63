// SPDX-License-Identifier: Apache-2.0
// The backward pass of a consumer warpgroup: its products, and what lies between them.
#pragma once

#include "sparse_attention/backward_rows.cuh"
#include "sparse_attention/softmax.cuh"

namespace megatron_keye::sparse_attention {

// What a consumer warpgroup keeps in registers.
template <typename Cut>
class Gradients {
  static constexpr int kSteps = Cut::kChannels / kTerms;
  static constexpr int kSumsOfThread = Cut::kChannels / 2;

 public:
  __device__ __forceinline__ Gradients(const BackwardParams& params, const Place<Cut>& place,
                                       BackwardShared<Cut>& shared)
      : params_(params), place_(place), shared_(shared) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const Row<Cut> row = own_row(i);
      const float mean = mean_of(params, row);  // by all threads of the warp
      mean_[i] = row.is_real ? mean : 0.0f;
      lse_[i] = row.is_real ? params.lse[row.index(params.problem)] : INFINITY;
    }
  }

  // Starts the products of the rows with a tile's keys, and of their gradients with its values.
  __device__ __forceinline__ void start_logits(uint32_t keys) {
    start_by_channels(logits_, shared_address(shared_.q), keys);
  }
  __device__ __forceinline__ void start_dweights(uint32_t values) {
    start_by_channels(dweights_, shared_address(shared_.dout), values);
  }

  // Starts to add a tile's keys by the gradients of their logits.
  __device__ __forceinline__ void start_dq(uint32_t tile) {
    const uint64_t left = tile_descriptor(shared_address(shared_.dlogits) + first_row_bytes());
    const uint64_t keys = columns_descriptor(tile, kHalfBytes);
#pragma unroll
    for (int step = 0; step < kTileKeys / kTerms; ++step) {
      multiply_shared<Major::kTerms, Major::kColumns>(
          dq_, left + terms_step(step, Cut::kHalfRowsBytes), keys + kColumnsStep * step, true);
    }
    commit_products();
  }

  // Starts a tile's dk or dv, whose left factor is what all warpgroups stored.
  __device__ __forceinline__ void start_sums(SumKind kind) {
    const uint64_t left =
        tile_descriptor(shared_address(kind == kOfKeys ? shared_.dlogits : shared_.weights));
    const uint64_t right = columns_descriptor(
        shared_address(kind == kOfKeys ? shared_.q : shared_.dout), Cut::kHalfRowsBytes);
#pragma unroll
    for (int step = 0; step < Cut::kRows / kTerms; ++step) {
      multiply_shared<Major::kColumns, Major::kColumns>(
          sums_, left + kColumnsStep * step, right + kColumnsStep * step, step > 0);
    }
    commit_products();
  }

  __device__ __forceinline__ void wait_for_first_products() {
    wait_for_products<0>(logits_);
    wait_for_products<0>(dweights_);
  }
  template <int kPending>
  __device__ __forceinline__ void wait_for_sums() {
    wait_for_products<kPending>(sums_);
  }
  __device__ __forceinline__ void wait_for_dq() { wait_for_products<0>(dq_); }

  // Turns logits into weights, in place.
  __device__ __forceinline__ void weigh(const uint32_t (&bits)[2]) {
    mask(logits_, bits);
#pragma unroll
    for (int at = 0; at < kLogits; ++at) {
      logits_[at] =
          power_of_two(fmaf(logits_[at], params_.problem.scale_log2, -lse_[at / 2 % 2]));
    }
  }

  __device__ __forceinline__ void store_weights() {
    store(logits_, shared_.weights);
  }

  // Turns gradients of the weights into those of the logits but for the scale, and stores them.
  __device__ __forceinline__ void store_dlogits() {
#pragma unroll
    for (int at = 0; at < kLogits; ++at) {
      dweights_[at] = logits_[at] * (dweights_[at] - mean_[at / 2 % 2]);
    }
    store(dweights_, shared_.dlogits);
  }

  // Starts to add the sums of a tile's keys to those in memory.
  __device__ __forceinline__ void send_sums(SumKind kind, const int (&key)[kTileKeys]) {
    const float factor = kind == kOfKeys ? params_.scale : 1.0f;
    if (params_.is_in_bulk) {
      send_in_bulk(kind, key, factor);
    } else {
      send_pairs(kind, key, factor);
    }
  }

  __device__ __forceinline__ void store_dq() const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const Row<Cut> row = own_row(i);
      if (!row.is_real) {
        continue;
      }
      auto* const dq = reinterpret_cast<uint32_t*>(params_.dq + row.index(params_.problem) *
                                                                    Cut::kChannels);
#pragma unroll
      for (int j = 0; j < Cut::kChannels / 8; ++j) {
        dq[4 * j + lane_of_warp() % 4] = packed(dq_[4 * j + 2 * i] * params_.scale,
                                                dq_[4 * j + 2 * i + 1] * params_.scale);
      }
    }
  }

 private:
  __device__ __forceinline__ Row<Cut> own_row(int i) const {
    return Row<Cut>(params_.problem, place_, product_row(consumer_thread(), i));
  }
  __device__ __forceinline__ static int thread_of_warpgroup() {
    return static_cast<int>(threadIdx.x) % kWarpgroup;
  }

  // Where the rows of this warpgroup begin in those of the block.
  __device__ __forceinline__ static uint32_t first_row_bytes() {
    return consumer_thread() / kWarpgroup * (kWarpgroupRows * kSwizzleBytes);
  }

  // out[64 rows, 64 keys] = the rows of this warpgroup times a tile's.
  __device__ __forceinline__ static void start_by_channels(float (&out)[kLogits], uint32_t rows,
                                                           uint32_t tile) {
    const uint64_t left = tile_descriptor(rows + first_row_bytes());
    const uint64_t right = tile_descriptor(tile);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      multiply_shared<Major::kTerms, Major::kTerms>(
          out, left + terms_step(step, Cut::kHalfRowsBytes),
          right + terms_step(step, kHalfBytes), step > 0);
    }
    commit_products();
  }

  // Stores what a product left in registers to [rows][64 keys].
  __device__ __forceinline__ static void store(const float (&values)[kLogits],
                                               unsigned char* target) {
#pragma unroll
    for (int j = 0; j < kTileKeys / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int at = 4 * j + 2 * i;
        *reinterpret_cast<uint32_t*>(target + place_of_pair(consumer_thread(), i, j)) =
            packed(values[at], values[at + 1]);
      }
    }
  }

  // A warp sends the 16 keys that it writes, and need not meet others.
  __device__ __forceinline__ void send_in_bulk(SumKind kind, const int (&key)[kTileKeys],
                                               float factor) {
    wait_for_sources();
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int j = 0; j < Cut::kChannels / 8; ++j) {
        const int at = place_of_sum<Cut>(product_row(thread_of_warpgroup(), i), kind,
                                         product_column(thread_of_warpgroup(), j));
        *reinterpret_cast<float2*>(shared_.sums + at) =
            float2{sums_[4 * j + 2 * i] * factor, sums_[4 * j + 2 * i + 1] * factor};
      }
    }
    publish_to_tensor_cores();
    __syncwarp();
    const int place = thread_of_warpgroup() / 32 * kWarpRows + lane_of_warp() % kWarpRows;
    if (lane_of_warp() < kWarpRows && key[place] >= 0) {
      add_in_bulk(sums_of(key[place], kind),
                  shared_address(shared_.sums) + place_of_sum<Cut>(place, kind, 0),
                  Cut::kSumBytes);
    }
    commit_additions();
  }

  __device__ __forceinline__ void send_pairs(SumKind kind, const int (&key)[kTileKeys],
                                             float factor) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int found = key[product_row(thread_of_warpgroup(), i)];
      float* const target = sums_of(max(found, 0), kind);
      if (found >= 0) {
#pragma unroll
        for (int j = 0; j < Cut::kChannels / 8; ++j) {
          add_pair(target + product_column(thread_of_warpgroup(), j),
                   sums_[4 * j + 2 * i] * factor, sums_[4 * j + 2 * i + 1] * factor);
        }
      }
    }
  }

  __device__ __forceinline__ float* sums_of(int key, SumKind kind) const {
    const int64_t row = (place_.group * params_.num_keys + key) * kSums + kind;
    return params_.sums + row * Cut::kChannels;
  }

  const BackwardParams& params_;
  const Place<Cut>& place_;
  BackwardShared<Cut>& shared_;
  float mean_[2];
  float lse_[2];
  float logits_[kLogits];
  float dweights_[kLogits];
  float sums_[kSumsOfThread];
  float dq_[kSumsOfThread] = {};
};

}  // namespace megatron_keye::sparse_attention
