// SPDX-License-Identifier: Apache-2.0
// What the scores multiply: bfloat16 numbers, or e4m3 numbers whose vectors have a scale each.
// Each kind says how its rows lie in shared memory and how a head's products are started.
#pragma once

#include "lightning_indexer/params.h"
#include "support/shared_products_sm90a.cuh"

namespace megatron_keye::indexer {

struct Bfloat16 {
  static constexpr int kRowBytes = kChannels * 2;
  static constexpr bool kHasScales = false;

  __device__ __forceinline__ static uint32_t place(int row, int vector) {
    return hopper::swizzled(row, vector);
  }

  __device__ __forceinline__ static void multiply(float (&dots)[64], uint32_t queries,
                                                  uint32_t keys) {
    using hopper::Major;
    const uint64_t a = hopper::tile_descriptor(queries);
    const uint64_t b = hopper::tile_descriptor(keys);
#pragma unroll
    for (int step = 0; step < kChannels / 16; ++step) {
      hopper::multiply_shared<Major::kTerms, Major::kTerms>(dots, a + 2 * step, b + 2 * step,
                                                            step > 0);
    }
  }
};

struct E4m3 {
  static constexpr int kRowBytes = kChannels;
  static constexpr bool kHasScales = true;

  __device__ __forceinline__ static uint32_t place(int row, int vector) {
    return hopper::swizzled_64(row, vector);
  }

  __device__ __forceinline__ static void multiply(float (&dots)[64], uint32_t queries,
                                                  uint32_t keys) {
    const uint64_t a = hopper::tile_descriptor_64(queries);
    const uint64_t b = hopper::tile_descriptor_64(keys);
#pragma unroll
    for (int step = 0; step < kChannels / 32; ++step) {
      hopper::multiply_shared_e4m3(dots, a + 2 * step, b + 2 * step, step > 0);
    }
  }
};

}  // namespace megatron_keye::indexer
