// SPDX-License-Identifier: Apache-2.0
// The indexer's scores of new tokens over the pages of the cache:
//   score[t, s] = J^-0.5 * sum over i of gate[t, i] * relu(q[t, i] . k[s]).
//
// All keys of a sequence are read for a few queries, so the time is that of the read, if little is
// done for a key. Each warp brings its keys to shared memory in a ring of its own, several tiles
// ahead, and from there to registers, as the left factor of products with the queries' heads; the
// four warps of a block meet only in these. Keys of 8 bits become bf16 in registers. Products go
// back to the ring where the keys were, so that a lane gets all heads of one key, and adds them in
// their order, as training does: the same bits.

#include <cuda_runtime.h>

#include "sparse_decode/params.h"
#include "support/hopper_sm90a.cuh"
#include "support/launch.h"
#include "support/register_products_sm90a.cuh"
#include "support/warp_products.cuh"

namespace megatron_keye::sparse_decode {

namespace {

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

// Brings queries in the order of terms, gates and page numbers to shared memory.
template <typename Keys, typename Room>
__device__ __forceinline__ void load_queries(const ScoreParams& params, const Range& range,
                                             Room& shared) {
  const int64_t first_head = int64_t{range.sequence} * params.num_queries * params.num_heads;
  for (int i = threadIdx.x; i < params.num_queries * kHeadBytes / 16; i += kThreads) {
    const int vector = i % (kSwizzleBytes / 16);
    const int head = i / (kSwizzleBytes / 16) % kMaxIndexHeads;
    const int query = i / (kHeadBytes / 16);
    alignas(16) __nv_bfloat16 terms[8];
    const auto* const source =
        params.q + (first_head + query * params.num_heads + head) * kIndexChannels;
#pragma unroll
    for (int term = 0; term < 8; ++term) {
      const int channel = vector / 2 * kTerms + Keys::channel_at(vector % 2 * 8 + term);
      const float number = head < params.num_heads ? __bfloat162float(source[channel]) : 0.0f;
      terms[term] = __float2bfloat16_rn(number * Keys::kQueryFactor);
    }
    *reinterpret_cast<uint4*>(shared.queries[query] + swizzled(head, vector)) =
        *reinterpret_cast<const uint4*>(terms);
  }
  for (int i = threadIdx.x; i < params.num_queries * kMaxIndexHeads; i += kThreads) {
    const int head = i % kMaxIndexHeads;
    const int64_t place = first_head + i / kMaxIndexHeads * params.num_heads + head;
    float gate = 0.0f;
    if (head < params.num_heads) {
      gate = params.gate_is_float
                 ? static_cast<const float*>(params.gate)[place]
                 : __bfloat162float(static_cast<const __nv_bfloat16*>(params.gate)[place]);
    }
    // Half, because sums add x + |x| instead of relu(x): the same bits, and no slow maximum.
    shared.gates[i / kMaxIndexHeads][head] = 0.5f * gate;
  }
  const Pages& table = params.table;
  const int first_page = range.first >> table.log2_places;
  const int num_pages = ((range.last - 1) >> table.log2_places) + 1 - first_page;
  for (int i = threadIdx.x; i < num_pages; i += kThreads) {
    shared.pages[i] = table.pages[range.sequence * table.stride + first_page + i];
  }
  publish_to_tensor_cores();
  __syncthreads();
}

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

template <typename Keys, int kQueries>
__global__ void __launch_bounds__(kThreads, 4)
    score_pages_kernel(const __grid_constant__ ScoreParams params) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL  // built for others too, but never launched there
  using Room = Shared<Keys, kQueries>;
  extern __shared__ __align__(1024) unsigned char shared_bytes[];
  auto& shared = *reinterpret_cast<Room*>(shared_bytes);
  cudaTriggerProgrammaticLaunchCompletion();  // what follows waits by itself
  const auto sequence = static_cast<int>(blockIdx.y);
  const auto length = static_cast<int>(
      min(max(params.lengths[sequence], int64_t{0}), int64_t{params.table.num_keys()}));
  const int keys_of_block = params.tiles_of_block * kScoredKeys;
  const Range range{.sequence = sequence,
                    .first = static_cast<int>(blockIdx.x) * keys_of_block,
                    .last = min(length, (static_cast<int>(blockIdx.x) + 1) * keys_of_block)};
  if (blockIdx.x == 0 && threadIdx.x < params.num_queries) {
    const auto query = static_cast<int>(threadIdx.x);
    params.ends[int64_t{sequence} * params.num_queries + query] =
        max(length - (params.num_queries - 1 - query), 0);
  }
  if (range.first >= range.last) {
    return;
  }
  load_queries<Keys>(params, range, shared);
  const Tiles<Keys, Room> tiles(params, range, shared);
#pragma unroll
  for (int tile = 0; tile < Keys::kStages - 1; ++tile) {
    tiles.copy(tile, tile);
  }
  const int num_tiles = range.num_tiles();
  int stage = 0;
  int filled = Keys::kStages - 1;
#pragma unroll 1
  for (int tile = 0; tile < num_tiles; ++tile) {
    wait_for_copies<Keys::kStages - 2>();
    __syncwarp();  // this tile is there, and nobody reads the one before it any more
    tiles.copy(tile + Keys::kStages - 1, filled);
    tiles.score(tile, stage);
    stage = stage + 1 == Keys::kStages ? 0 : stage + 1;
    filled = filled + 1 == Keys::kStages ? 0 : filled + 1;
  }
  wait_for_copies<0>();
#endif
}

template <typename Keys, int kQueries>
void launch_for(const ScoreParams& params) {
  const int keys_of_block = params.tiles_of_block * kScoredKeys;
  const int num_keys = params.table.num_of_sequence << params.table.log2_places;
  const dim3 grid((num_keys + keys_of_block - 1) / keys_of_block, params.num_sequences);
  launch(score_pages_kernel<Keys, kQueries>, grid, dim3(kThreads),
         static_cast<int>(sizeof(Shared<Keys, kQueries>)), params);
}

template <typename Keys>
void launch_keys(const ScoreParams& params) {
  params.num_queries == 1 ? launch_for<Keys, 1>(params) : launch_for<Keys, kMaxQueries>(params);
}

}  // namespace

void launch_scores(const ScoreParams& params) {
  params.scales == nullptr ? launch_keys<WideKeys>(params) : launch_keys<NarrowKeys>(params);
}

}  // namespace megatron_keye::sparse_decode
