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
constexpr int kMaxPages = kMaxTilesOfBlock * kScoredKeys / kSmallestPage;
constexpr int kHeadBytes = kMaxIndexHeads * kSwizzleBytes;  // of one query
constexpr uint32_t kWholeWarp = 0xFFFFFFFFu;

// How keys of bf16 lie in a ring, and become factors of products.
struct WideKeys {
  static constexpr int kBytes = 2;
  static constexpr int kStages = 3;

  // Which channel stands at a place of a product's 16 terms.
  __device__ static constexpr int channel_at(int term) { return term; }

  // Two steps of two vectors each: the words are as a product takes them.
  template <typename Load>
  __device__ static __forceinline__ void load(uint32_t (&a)[kIndexChannels / kTerms][4],
                                              Load load_vectors) {
#pragma unroll
    for (int step = 0; step < kIndexChannels / kTerms; ++step) {
      load_vectors(a[step], 2 * step);
    }
  }
};

// Keys of e4m3. A vector has the 16 channels of a step, and a lane gets four neighbours of each
// row: the first and third become its first two terms, the second and fourth those 8 further on.
// Within a step the order of terms does not change the sum, if queries have the same order.
struct NarrowKeys {
  static constexpr int kBytes = 1;
  static constexpr int kStages = 5;

  __device__ static constexpr int channel_at(int term) { return 2 * (term % 8) + term / 8; }

  template <typename Load>
  __device__ static __forceinline__ void load(uint32_t (&a)[kIndexChannels / kTerms][4],
                                              Load load_vectors) {
#pragma unroll
    for (int step = 0; step < kIndexChannels / kTerms; step += 2) {
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
  // Two numbers of e4m3 as bf16: signs from one word, exponents and mantissas from the other, as
  // numbers 2^120 too small, below the smallest normal ones too. NaN counts as 480; `quantize`
  // never makes it of finite keys.
  __device__ static __forceinline__ uint32_t widened(uint32_t signs, uint32_t magnitudes) {
    const uint32_t bits = (signs & 0x80008000u) | (magnitudes & 0x07F007F0u);
    uint32_t result;
    constexpr uint32_t kFactors = 0x7B807B80u;  // 2^120, twice
    constexpr uint32_t kMinusZeros = 0x80008000u;  // keeps the sign of a zero
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(bits), "r"(kFactors),
        "r"(kMinusZeros));
    return result;
  }
};

template <typename Keys, int kQueriesOf>
struct Shared {
  static constexpr int kQueries = kQueriesOf;  // at most
  static constexpr int kRowBytes = kIndexChannels * Keys::kBytes;
  static constexpr int kTileBytes = kWarpKeys * kRowBytes;

  unsigned char queries[kQueries][kHeadBytes];
  unsigned char tiles[kScoringWarps][Keys::kStages][kTileBytes];
  float scales[kScoringWarps][Keys::kStages][kWarpKeys];
  float gates[kQueries][kMaxIndexHeads];
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
  // Of this warp's rows of a tile: which key.
  __device__ __forceinline__ int key(int tile, int row) const {
    return first + tile * kScoredKeys + row / 16 * kHalfKeys + warp_of_block() * 16 + row % 16;
  }
};

// Byte offset of a vector of a warp's tile; eight rows' vectors lie in different banks.
template <typename Keys>
__device__ __forceinline__ uint32_t place_in_tile(int row, int vector) {
  constexpr int kVectors = kIndexChannels * Keys::kBytes / 16;
  constexpr int kRowsOfLine = 8 / kVectors;  // rows in 128 bytes
  return (row * kVectors + (vector ^ (row / kRowsOfLine % kVectors))) * 16;
}

}  // namespace megatron_keye::sparse_decode::scores
