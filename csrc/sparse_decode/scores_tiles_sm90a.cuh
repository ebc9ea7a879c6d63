// SPDX-License-Identifier: Apache-2.0
// Copies and scores the indexer keys of one warp, tile after tile.
#pragma once

#include "sparse_decode/scores_block_sm90a.cuh"
#include "support/warp_products.cuh"

namespace megatron_keye::sparse_decode::scores {

// Byte offset of a vector of a warp's tile; eight rows' vectors lie in different banks.
template <typename Keys>
__device__ __forceinline__ uint32_t place_in_tile(int row, int vector) {
  constexpr int kVectors = kIndexChannels * Keys::kBytes / 16;
  constexpr int kRowsOfLine = 8 / kVectors;  // rows in 128 bytes
  return (row * kVectors + (vector ^ (row / kRowsOfLine % kVectors))) * 16;
}

// The same for four heads of a key's products. The rows that half a warp writes at once differ in
// their banks, too.
__device__ __forceinline__ uint32_t place_of_products(int row, int four) {
  return (row * 4 + (four ^ (row / 2 % 2 * 2 + row / 4 % 2))) * 16;
}

// Of this warp's keys of a tile: a lane's is that of its row.
template <typename Keys, typename Room>
class Tiles {
 public:
  __device__ __forceinline__ Tiles(const ScoreParams& params, const Range& range, Room& shared)
      : params_(params),
        range_(range),
        shared_(shared),
        first_page_(range.first >> params.table.log2_places),
        policy_(params.leaves_first ? policy_to_leave_first() : policy_to_leave_alike()) {
    const int row = lane_of_warp() / kVectors;
    keys_ = static_cast<const unsigned char*>(params.index_keys) + row * params.key_bytes +
            lane_of_warp() % kVectors * 16;
    scores_ = params.scores +
              int64_t{range.sequence} * params.num_queries * params.table.num_keys() +
              range.key_of_half(0, lane_of_warp() / kKeysOfHalf) + lane_of_warp() % kKeysOfHalf;
  }

  // Starts the copies of a tile's keys and their scales; zeros for no key.
  __device__ __forceinline__ void copy(int tile, int stage) const {
    if (tile < range_.num_tiles()) {
      const uint32_t target = shared_address(shared_.tiles[warp_of_block()][stage]);
      int pages[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int key = range_.key_of_half(tile, half);
        pages[half] = find_page(key);
        const int num_real = pages[half] < 0 ? 0 : range_.last - key;
        const unsigned char* source = keys_ + int64_t{max(pages[half], 0)} * params_.page_bytes +
                                      params_.table.place(key) * params_.key_bytes;
#pragma unroll
        for (int first = 0; first < kKeysOfHalf; first += kRowsAtOnce) {
          const int row = first + lane_of_warp() / kVectors;
          copy_16_async(target + place_in_tile<Keys>(half * kKeysOfHalf + row,
                                                     lane_of_warp() % kVectors),
                        source + first * params_.key_bytes, row < num_real, policy_);
        }
      }
      if (Keys::kBytes == 1) {
        const int half = lane_of_warp() / kKeysOfHalf;
        const int key = range_.key_of_half(tile, half) + lane_of_warp() % kKeysOfHalf;
        const int page = half == 0 ? pages[0] : pages[1];
        const float* const source = params_.scales +
                                    int64_t{max(page, 0)} * params_.scale_stride +
                                    params_.table.place(key);
        copy_4_async(shared_address(&shared_.scales[warp_of_block()][stage][lane_of_warp()]),
                     source, page >= 0 && key < range_.last);
      }
    }
    commit_copies();
  }

  // Scores a tile that is there.
  __device__ __forceinline__ void score(int tile, int stage) const {
    auto& room = shared_.tiles[warp_of_block()][stage];
    uint32_t a[2][kSteps][4];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = half * kKeysOfHalf + lane_of_warp() % kKeysOfHalf;
      Keys::load(a[half], [&](uint32_t (&words)[4], int vector) {
        const int of_lane = vector + lane_of_warp() / 16;
        warp::load_matrices(words, shared_address(room) + place_in_tile<Keys>(row, of_lane));
      });
    }
    const int half = lane_of_warp() / kKeysOfHalf;
    const int key = range_.key_of_half(tile, half) + lane_of_warp() % kKeysOfHalf;
    const bool is_real = find_page(key) >= 0;
    constexpr float kFactor = 0.125f * Keys::kScoreFactor;
    static_assert(kIndexChannels == 64, "J^-0.5");
    const float scale =
        Keys::kBytes == 1 ? shared_.scales[warp_of_block()][stage][lane_of_warp()] : 1.0f;
    const int num_queries = Room::kQueries == 1 ? 1 : params_.num_queries;
#pragma unroll 1
    for (int query = 0; query < num_queries; ++query) {
      float dots[2][8];
      multiply_heads(dots, a, shared_address(shared_.queries[query]));
      const float sum = add_heads(dots, room, shared_.gates[query]);
      if (key < range_.last) {
        scores_[int64_t{query} * params_.table.num_keys() + tile * kScoredKeys] =
            is_real ? sum * kFactor * scale : -INFINITY;
      }
    }
  }

 private:
  static constexpr int kVectors = Room::kRowBytes / 16;
  static constexpr int kRowsAtOnce = 32 / kVectors;  // that a warp copies in one instruction

  // A key's page, or -1.
  __device__ __forceinline__ int find_page(int key) const {
    if (key >= range_.last) {
      return -1;
    }
    const int page = shared_.pages[(key >> params_.table.log2_places) - first_page_];
    return params_.table.holds(page) ? page : -1;
  }

  // Multiplies the keys with one query's heads.
  __device__ __forceinline__ static void multiply_heads(float (&dots)[2][8],
                                                        const uint32_t (&a)[2][kSteps][4],
                                                        uint32_t heads) {
    const uint64_t b = tile_descriptor(heads);
    begin_products();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        multiply_registers<Major::kTerms>(dots[half], a[half][step], b + terms_step(step, 0),
                                          step > 0);
      }
    }
    commit_products();
    wait_for_products<0>(dots[0]);
    wait_for_products<0>(dots[1]);
  }

  // Adds the heads of this lane's key in their order. Products lie as `product_row` and
  // `product_column` say, and pass to the lanes through the room of the keys.
  __device__ __forceinline__ static float add_heads(const float (&dots)[2][8],
                                                    unsigned char (&room)[Room::kTileBytes],
                                                    const float (&gates)[kMaxIndexHeads]) {
    __syncwarp();  // all lanes have read what was there
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int pair = 0; pair < 4; ++pair) {
        const int row = half * kKeysOfHalf + pair % 2 * 8 + lane_of_warp() / 4;
        const int four = pair / 2 * 2 + lane_of_warp() % 4 / 2;
        auto* const place = room + place_of_products(row, four) + lane_of_warp() % 2 * 8;
        *reinterpret_cast<float2*>(place) =
            make_float2(dots[half][2 * pair], dots[half][2 * pair + 1]);
      }
    }
    __syncwarp();
    float score = 0.0f;
#pragma unroll
    for (int four = 0; four < kMaxIndexHeads / 4; ++four) {
      const float4 x = *reinterpret_cast<const float4*>(
          room + place_of_products(lane_of_warp(), four));
      const float4 gate = *reinterpret_cast<const float4*>(&gates[four * 4]);
      score = fmaf(gate.x, x.x + fabsf(x.x), score);
      score = fmaf(gate.y, x.y + fabsf(x.y), score);
      score = fmaf(gate.z, x.z + fabsf(x.z), score);
      score = fmaf(gate.w, x.w + fabsf(x.w), score);
    }
    return score;
  }

  const ScoreParams& params_;
  const Range& range_;
  Room& shared_;
  int first_page_;
  uint64_t policy_;
  const unsigned char* keys_;
  float* scores_;
};

}  // namespace megatron_keye::sparse_decode::scores
