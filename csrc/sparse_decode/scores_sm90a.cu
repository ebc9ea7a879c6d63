// SPDX-License-Identifier: Apache-2.0
// The indexer's scores of new tokens over the pages of the cache:
//   score[t, s] = J^-0.5 * sum over i of gate[t, i] * relu(q[t, i] . k[s]).
//
// All keys of a sequence are read for a few queries, so the time is that of the read. Each warp
// brings its keys to shared memory in a ring of its own, several tiles ahead, and from there to
// registers, as the left factor of products with the queries' heads; the four warps of a block
// meet only in these. Keys of 8 bits become bf16 in registers. A warp's sums are then transposed
// so that a lane has all heads of one key, and adds them in their order, as training does: the
// same bits.

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
      terms[term] = head < params.num_heads ? source[channel] : __nv_bfloat16{};
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
    shared.gates[i / kMaxIndexHeads][head] = gate;
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

// Starts the copies of a warp's keys of a tile, and of their scales; zeros for no key.
template <typename Keys, typename Room>
__device__ __forceinline__ void copy_tile(const ScoreParams& params, const Range& range,
                                          Room& shared, int tile, int stage, int own_row,
                                          uint64_t policy) {
  if (tile < range.num_tiles()) {
    constexpr int kVectors = Room::kRowBytes / 16;
    const int first_page = range.first >> params.table.log2_places;
    const auto* const keys = static_cast<const unsigned char*>(params.index_keys);
    const auto find = [&](int key) {
      const int page =
          key < range.last ? shared.pages[(key >> params.table.log2_places) - first_page] : -1;
      return params.table.holds(page) ? page : -1;
    };
    const uint32_t target = shared_address(shared.tiles[warp_of_block()][stage]);
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int row = (i * 32 + lane_of_warp()) / kVectors;
      const int vector = lane_of_warp() % kVectors;
      const int key = range.key(tile, row);
      const int page = find(key);
      const int64_t offset = max(page, 0) * params.page_bytes +
                             params.table.place(key) * params.key_bytes + vector * 16;
      copy_16_async(target + place_in_tile<Keys>(row, vector), keys + offset, page >= 0, policy);
    }
    if (params.scales != nullptr) {
      const int key = range.key(tile, own_row);
      const int page = find(key);
      const int64_t offset = max(page, 0) * params.scale_stride + params.table.place(key);
      copy_4_async(
          shared_address(&shared.scales[warp_of_block()][stage][lane_of_warp()]),
          params.scales + offset, page >= 0);
    }
  }
  commit_copies();
}

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
  const int own_row = row_of_lane();
  const uint64_t policy =
      params.leaves_first ? policy_to_leave_first() : policy_to_leave_alike();
#pragma unroll
  for (int tile = 0; tile < Keys::kStages - 1; ++tile) {
    copy_tile<Keys>(params, range, shared, tile, tile, own_row, policy);
  }
  const int num_tiles = range.num_tiles();
  int stage = 0;
  int filled = Keys::kStages - 1;
#pragma unroll 1
  for (int tile = 0; tile < num_tiles; ++tile) {
    wait_for_copies<Keys::kStages - 2>();
    __syncwarp();  // this tile is there, and nobody reads the one before it any more
    copy_tile<Keys>(params, range, shared, tile + Keys::kStages - 1, filled, own_row, policy);
    score_tile<Keys>(params, range, shared, tile, stage);
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
