// SPDX-License-Identifier: Apache-2.0
// Scores a tile of indexer keys that lies in shared memory.
#pragma once

#include "sparse_decode/scores_block_sm90a.cuh"
#include "support/warp_products.cuh"

namespace megatron_keye::sparse_decode::scores {

// Exchanges words between four lanes: word i of lane j becomes word j of lane i.
__device__ __forceinline__ void transpose(float (&words)[4]) {
#pragma unroll
  for (int bit = 1; bit < 4; bit *= 2) {
    const bool is_upper = (lane_of_warp() & bit) != 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if ((i & bit) == 0) {
        const float given = is_upper ? words[i] : words[i | bit];
        const float got = __shfl_xor_sync(kWholeWarp, given, bit);
        words[i] = is_upper ? got : words[i];
        words[i | bit] = is_upper ? words[i | bit] : got;
      }
    }
  }
}

// A lane's key of a tile, one of the four whose products its four lanes hold: lane l % 4 takes
// row l % 2 * 8 of half l % 4 / 2, beside l / 4.
__device__ __forceinline__ int row_of_lane() {
  const int lane = lane_of_warp();
  return lane % 4 / 2 * 16 + lane % 2 * 8 + lane / 4;
}

// Adds the heads of this lane's key in their order. Products of a half's rows and heads lie as
// `product_row` and `product_column` say.
__device__ __forceinline__ float add_heads(const float (&dots)[2][8],
                                           const float (&gates)[kMaxIndexHeads]) {
  float score = 0.0f;
#pragma unroll
  for (int eight = 0; eight < 2; ++eight) {
    float even[4];  // first of the row's two heads of this lane, by key
    float odd[4];
#pragma unroll
    for (int key = 0; key < 4; ++key) {
      even[key] = dots[key / 2][4 * eight + key % 2 * 2];
      odd[key] = dots[key / 2][4 * eight + key % 2 * 2 + 1];
    }
    transpose(even);
    transpose(odd);
#pragma unroll
    for (int lane = 0; lane < 4; ++lane) {
      score = fmaf(gates[8 * eight + 2 * lane], fmaxf(even[lane], 0.0f), score);
      score = fmaf(gates[8 * eight + 2 * lane + 1], fmaxf(odd[lane], 0.0f), score);
    }
  }
  return score;
}

// Multiplies a tile's keys with one query's heads.
__device__ __forceinline__ void multiply_heads(float (&dots)[2][8],
                                               const uint32_t (&a)[2][kIndexChannels / kTerms][4],
                                               uint32_t heads) {
  const uint64_t b = tile_descriptor(heads);
  begin_products();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int step = 0; step < kIndexChannels / kTerms; ++step) {
      multiply_registers<Major::kTerms>(dots[half], a[half][step], b + terms_step(step, 0),
                                        step > 0);
    }
  }
  commit_products();
  wait_for_products<0>(dots[0]);
  wait_for_products<0>(dots[1]);
}

template <typename Keys, typename Room>
__device__ __forceinline__ void score_tile(const ScoreParams& params, const Range& range,
                                           Room& shared, int tile, int stage) {
  const uint32_t keys = shared_address(shared.tiles[warp_of_block()][stage]);
  uint32_t a[2][kIndexChannels / kTerms][4];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = half * 16 + lane_of_warp() / 8 % 2 * 8 + lane_of_warp() % 8;
    Keys::load(a[half], [&](uint32_t (&words)[4], int vector) {
      warp::load_matrices(words,
                          keys + place_in_tile<Keys>(row, vector + lane_of_warp() / 16));
    });
  }
  const int key = range.key(tile, row_of_lane());
  const Pages& table = params.table;
  const bool is_key = key < range.last;
  const bool is_real =
      is_key && table.holds(shared.pages[(key >> table.log2_places) -
                                         (range.first >> table.log2_places)]);
  const float scale =
      params.scales == nullptr ? 1.0f : shared.scales[warp_of_block()][stage][lane_of_warp()];
  const int64_t first_row = int64_t{range.sequence} * params.num_queries;
  const int num_queries = Room::kQueries == 1 ? 1 : params.num_queries;
#pragma unroll 1
  for (int query = 0; query < num_queries; ++query) {
    float dots[2][8];
    multiply_heads(dots, a, shared_address(shared.queries[query]));
    const float sum = add_heads(dots, shared.gates[query]);
    constexpr float kFactor = 0.125f;
    static_assert(kIndexChannels == 64, "J^-0.5");
    if (is_key) {
      params.scores[(first_row + query) * table.num_keys() + key] =
          is_real ? sum * scale * kFactor : -INFINITY;
    }
  }
}

}  // namespace megatron_keye::sparse_decode::scores
