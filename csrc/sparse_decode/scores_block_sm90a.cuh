// SPDX-License-Identifier: Apache-2.0
// How the indexer's scores of new tokens are cut: keys of either type, shared memory, ranges.
#pragma once

#include "sparse_decode/params.h"
#include "support/register_products_sm90a.cuh"

namespace megatron_keye::sparse_decode::scores {

using namespace hopper;

constexpr int kThreads = kWarpgroup;
constexpr int kScoringWarps = kThreads / 32;
constexpr int kWarpKeys = 32;   // of a tile: rows 16w to 16w + 15 of each of its halves
constexpr int kHalfKeys = 64;   // rows of a product
constexpr int kSteps = kIndexChannels / kTerms;
constexpr int kMaxPages = kMaxTilesOfBlock * kScoredKeys / kSmallestPage;
constexpr int kHeadBytes = kMaxIndexHeads * kSwizzleBytes;  // of one query
constexpr int kKeysOfHalf = 16;  // of a warp, which lie in one page

// How keys of bf16 lie in a ring, and become factors of products.
struct WideKeys {
  static constexpr int kBytes = 2;
  static constexpr int kStages = 3;
  static constexpr float kQueryFactor = 1.0f;
  static constexpr float kScoreFactor = 1.0f;

  // Which channel stands at a place of a product's 16 terms.
  __device__ static constexpr int channel_at(int term) { return term; }

  // Two vectors a step: the words are as a product takes them.
  template <typename Load>
  __device__ static __forceinline__ void load(uint32_t (&a)[kSteps][4], Load load_vectors) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      load_vectors(a[step], 2 * step);
    }
  }
};

// Keys of e4m3. A vector has the 16 channels of a step, and a lane gets four neighbours of each
// row: the first and third become its first two terms, the second and fourth those 8 further on.
// Within a step the order of terms does not change the sum, if queries have the same order.
// As bf16 a key's bits mean a number 2^120 too small, the smallest below bf16's normal numbers,
// which tensor cores take as they are. Queries times 2^64 keep all products in float32's range.
struct NarrowKeys {
  static constexpr int kBytes = 1;
  static constexpr int kStages = 5;
  static constexpr float kQueryFactor = 0x1p64f;
  static constexpr float kScoreFactor = 0x1p56f;

  __device__ static constexpr int channel_at(int term) { return 2 * (term % 8) + term / 8; }

  template <typename Load>
  __device__ static __forceinline__ void load(uint32_t (&a)[kSteps][4], Load load_vectors) {
#pragma unroll
    for (int step = 0; step < kSteps; step += 2) {
      uint32_t words[4];  // upper and lower row of this step, then of the next
      load_vectors(words, step);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        a[step + i / 2][i % 2] = widened(words[i] << 8, words[i] << 4);
        a[step + i / 2][i % 2 + 2] = widened(words[i], words[i] >> 4);
      }
    }
  }

 private:
  // Two numbers, signs from one word, exponents and mantissas from the other. NaN counts as 480;
  // `quantize` never makes it of finite keys.
  __device__ static __forceinline__ uint32_t widened(uint32_t signs, uint32_t magnitudes) {
    uint32_t bits = (signs & 0x80008000u) | (magnitudes & 0x07F007F0u);
    asm volatile("" : "+r"(bits));  // else it may come to stand among the products
    return bits;
  }
};

template <typename Keys, int kQueriesOf>
struct Shared {
  static constexpr int kQueries = kQueriesOf;  // at most
  static constexpr int kRowBytes = kIndexChannels * Keys::kBytes;
  static constexpr int kTileBytes = kWarpKeys * kRowBytes;

  unsigned char queries[kQueries][kHeadBytes];
  alignas(16) unsigned char tiles[kScoringWarps][Keys::kStages][kTileBytes];
  float scales[kScoringWarps][Keys::kStages][kWarpKeys];
  alignas(16) float gates[kQueries][kMaxIndexHeads];
  int pages[kMaxPages];
};

__device__ __forceinline__ int lane_of_warp() { return static_cast<int>(threadIdx.x) % 32; }
__device__ __forceinline__ int warp_of_block() { return static_cast<int>(threadIdx.x) / 32; }

// The keys of a thread block: those of its sequence from `first` on, before `last`.
struct Range {
  int sequence;
  int first;
  int last;

  __device__ __forceinline__ int num_tiles() const {
    return (last - first + kScoredKeys - 1) / kScoredKeys;
  }
  // The first key of a half of this warp's keys of a tile.
  __device__ __forceinline__ int key_of_half(int tile, int half) const {
    return first + tile * kScoredKeys + half * kHalfKeys + warp_of_block() * kKeysOfHalf;
  }
};

}  // namespace megatron_keye::sparse_decode::scores
