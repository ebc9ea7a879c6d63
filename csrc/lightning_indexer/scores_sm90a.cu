// SPDX-License-Identifier: Apache-2.0
// Scores of the lightning indexer on the tensor cores of Hopper:
//   score[t, s] = J^-0.5 * sum over i of gate[t, i] * relu(q[t, i] . k[s]).
// A thread block keeps 64 queries of all heads in shared memory; its two warpgroups iterate over
// the keys they see, alternating tiles of 128. A warpgroup adds one head's products to its sum
// while the tensor cores work on the next head's. Heads are summed in ascending order in one
// register, so a pair's score is the same bits in every launch.
//
// The matrix of scores is 34 GB at 128K tokens, so it is not written: a pair is kept only where it
// reaches its query's threshold, which about k and a margin do. A query's row belongs to four
// threads of each warpgroup, so that candidates get their places without atomics. Blocks whose
// queries see few keys, of which most would pass, keep all scores.

#include "lightning_indexer/params.h"
#include "lightning_indexer/rows.cuh"
#include "support/hopper_sm90a.cuh"
#include "support/launch.h"
#include "support/shared_products_sm90a.cuh"

namespace megatron_keye::indexer {

namespace {

using namespace hopper;

constexpr int kThreads = kHalves * kWarpgroup;
constexpr int kStages = 2;
constexpr int kRowVectors = kSwizzleBytes / 16;  // 16-byte vectors of a row
constexpr int kSums = 64;                        // scores of a tile that a thread holds
constexpr int kHeads = kMaxHeads;               // scored; those that q lacks are 0
constexpr int kMaxSplits = 8;                   // blocks that share their queries' keys

constexpr int kTileBytes = kTileKeys * kSwizzleBytes;
constexpr int kHeadBytes = kBlockRows * kSwizzleBytes;

struct Shared {
  unsigned char tiles[kHalves][kStages][kTileBytes];
  unsigned char queries[kHeads][kHeadBytes];
  float gates[kHeads][kBlockRows];
  KeyRange ranges[kBlockRows];  // empty where there is no query
  KeyRange any;                 // keys that some query of the block sees
  KeyRange all;                 // keys that each of them sees
};

constexpr int kRowCandidates = kRowFloats * sizeof(float) / sizeof(Candidate);

// The tiles of keys that a warpgroup scores: every kHalves-th from `first` on, before `last`.
struct Tiles {
  int first;
  int last;
};

// Of a thread's two queries, 8 apart: the first one's row of the block.
__device__ __forceinline__ int owned_row() {
  return static_cast<int>(threadIdx.x) % kWarpgroup / 32 * 16 +
         static_cast<int>(threadIdx.x) % 32 / 4;
}

// Of one of a thread's sums: which of its two queries, and which key of the tile.
__device__ __forceinline__ constexpr int owner(int sum) { return sum >> 1 & 1; }
__device__ __forceinline__ int key_of(int sum) {
  return static_cast<int>(threadIdx.x) % 4 * 2 + (sum >> 2) * 8 + (sum & 1);
}

__device__ __forceinline__ float not_a_number() { return __int_as_float(0x7FFFFFFF); }

// Finds which keys the block's queries see.
template <Scores kWhich>
__device__ __forceinline__ void find_ranges(const ScoreParams& params, Shared& shared) {
  if (threadIdx.x == 0) {
    shared.any = {params.num_scored, 0};
    shared.all = {0, params.num_scored};
  }
  __syncthreads();
  if (threadIdx.x < kBlockRows) {
    const int row = static_cast<int>(threadIdx.x);
    const int query = query_at(params.rows, static_cast<int>(blockIdx.x) * kBlockRows + row);
    KeyRange range = query < 0 ? KeyRange{0, 0} : range_of(params.rows, query);
    if constexpr (kWhich == Scores::kSampled) {
      range = sampled_range(range);
    }
    shared.ranges[row] = range;
    if (range.size() > 0) {
      atomicMin(&shared.any.start, range.start);
      atomicMax(&shared.any.end, range.end);
    }
    atomicMax(&shared.all.start, range.start);
    atomicMin(&shared.all.end, range.end);
  }
}

// Brings the block's queries and gates to shared memory; all threads may use them, and the ranges,
// afterwards.
__device__ __forceinline__ void load_queries(const ScoreParams& params, Shared& shared) {
  const int first_place = static_cast<int>(blockIdx.x) * kBlockRows;
  for (int i = threadIdx.x; i < kBlockRows * kHeads * kRowVectors; i += kThreads) {
    const int row = i / (kHeads * kRowVectors);
    const int head = i / kRowVectors % kHeads;
    const int query = query_at(params.rows, first_place + row);
    const bool is_real = query >= 0 && head < params.num_heads;
    const int64_t source =
        is_real ? (int64_t{query} * params.num_heads + head) * kRowVectors + i % kRowVectors : 0;
    copy_16_async(shared_address(shared.queries[head]) + swizzled(row, i % kRowVectors),
                  reinterpret_cast<const uint4*>(params.q) + source, is_real);
  }
  for (int i = threadIdx.x; i < kBlockRows * kHeads; i += kThreads) {
    const int row = i / kHeads;
    const int head = i % kHeads;
    const int query = query_at(params.rows, first_place + row);
    const bool is_real = query >= 0 && head < params.num_heads;
    // Half, because the sum adds x + |x| instead of relu(x): same bits, and no slow maximum.
    constexpr float kScale = 0.5f * 0.125f;
    static_assert(kChannels == 64, "J^-0.5 is a power of two");
    shared.gates[head][row] =
        is_real ? kScale * params.gate[int64_t{query} * params.num_heads + head] : 0.0f;
  }
  commit_copies();
  wait_for_copies<0>();
  publish_to_tensor_cores();
  __syncthreads();
}

// This block's share of the tiles.
__device__ __forceinline__ Tiles find_tiles(const Shared& shared) {
  const int first_tile = shared.any.start / kTileKeys;
  const int last_tile = (shared.any.end + kTileKeys - 1) / kTileKeys;
  const int each = (max(last_tile - first_tile, 0) + static_cast<int>(gridDim.y) - 1) /
                   static_cast<int>(gridDim.y);
  const int first = first_tile + static_cast<int>(blockIdx.y) * each;
  return {.first = first, .last = min(first + each, last_tile)};
}

__device__ __forceinline__ void load_tile(const ScoreParams& params, const Tiles& tiles, int tile,
                                          uint32_t target) {
  if (tile < tiles.last) {
#pragma unroll
    for (int i = 0; i < kTileKeys * kRowVectors / kWarpgroup; ++i) {
      const int vector = static_cast<int>(threadIdx.x) % kWarpgroup + i * kWarpgroup;
      const int row = vector / kRowVectors;
      const int key = tile * kTileKeys + row;
      const bool is_real = key < params.num_scored;
      copy_16_async(target + swizzled(row, vector % kRowVectors),
                    reinterpret_cast<const uint4*>(params.k) +
                        int64_t{is_real ? key : 0} * kRowVectors + vector % kRowVectors,
                    is_real);
    }
  }
  commit_copies();
}

// Starts the products of one head with a tile of keys.
__device__ __forceinline__ void start_head(float (&dots)[kSums], uint32_t queries, uint32_t keys) {
  const uint64_t a = tile_descriptor(queries);
  const uint64_t b = tile_descriptor(keys);
  begin_products();
#pragma unroll
  for (int step = 0; step < kChannels / 16; ++step) {
    multiply_shared<Major::kTerms, Major::kTerms>(dots, a + 2 * step, b + 2 * step, step > 0);
  }
  commit_products();
}

__device__ __forceinline__ void add_head(float (&sums)[kSums], const float (&dots)[kSums],
                                         const float (&gates)[kBlockRows], int row) {
  const float gate[2] = {gates[row], gates[row + 8]};
#pragma unroll
  for (int i = 0; i < kSums; ++i) {
    sums[i] = fmaf(gate[owner(i)], dots[i] + fabsf(dots[i]), sums[i]);
  }
}

// Writes all scores of a tile, those outside a query's range included.
__device__ __forceinline__ void write_scores(const ScoreParams& params, const float (&sums)[kSums],
                                             int first_column, int row) {
  const int64_t place = int64_t{blockIdx.x} * kBlockRows + row;
  float* const scores = params.scores + place * params.score_stride + first_column;
#pragma unroll
  for (int i = 0; i < kSums; i += 2) {
    if (place + owner(i) * 8 < params.rows.num_rows) {
      float* const target = scores + owner(i) * 8 * params.score_stride + key_of(i);
      *reinterpret_cast<float2*>(target) = make_float2(sums[i], sums[i + 1]);
    }
  }
}

// Keeps what reaches the thresholds of a thread's two queries.
struct Gate {
  bool keeps_all = false;  // the block's keys are so few that all of their scores fit
  int first_key = 0;       // whose score then comes first
  float threshold[2];
  int num_kept[2];  // by the four threads of the row

  __device__ __forceinline__ Gate(const ScoreParams& params, int place) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const bool is_real = query_at(params.rows, place + 8 * i) >= 0;
      threshold[i] = is_real ? params.thresholds[place + 8 * i] : not_a_number();
      num_kept[i] = 0;
    }
  }

  // NaN, the threshold of a row that keeps nothing, is reached by no score.
  __device__ __forceinline__ bool is_needed() const {
    return threshold[0] == threshold[0] || threshold[1] == threshold[1];
  }

  __device__ __forceinline__ void start(const Shared& shared) {
    first_key = shared.any.start / kTileKeys * kTileKeys;
    keeps_all = shared.any.end - first_key <= kRowFloats;
  }

  __device__ __forceinline__ void take(const ScoreParams& params, const Shared& shared,
                                       float (&sums)[kSums], int tile_key, int row) {
    if (keeps_all) {
      write_scores(params, sums, tile_key - first_key, row);
    } else {
      keep(params, shared, sums, tile_key, row);
    }
  }

  __device__ __forceinline__ void finish(const ScoreParams& params, int row) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int place = static_cast<int>(blockIdx.x) * kBlockRows + row + 8 * i;
      const int half = static_cast<int>(threadIdx.x) / kWarpgroup;
      if (threadIdx.x % 4 == 0 && place < params.rows.num_rows) {
        const int all[kHalves] = {kAllScores, first_key};
        params.num_candidates[place * kHalves + half] = keeps_all ? all[half] : num_kept[i];
      }
    }
  }

 private:
  __device__ __forceinline__ void keep(const ScoreParams& params, const Shared& shared,
                                       float (&sums)[kSums], int tile_key, int row) {
    if (tile_key < shared.all.start || tile_key + kTileKeys > shared.all.end) {
      const KeyRange range[2] = {shared.ranges[row], shared.ranges[row + 8]};
#pragma unroll
      for (int i = 0; i < kSums; ++i) {
        const int key = tile_key + key_of(i);
        if (key < range[owner(i)].start || key >= range[owner(i)].end) {
          sums[i] = not_a_number();
        }
      }
    }
    const int half = static_cast<int>(threadIdx.x) / kWarpgroup;
    int passes[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      passes[owner(i)] += sums[i] >= threshold[owner(i)] ? 1 : 0;
    }
    // Offsets from one address, since a pointer for each row costs twice the instructions.
    auto* const kept = reinterpret_cast<Candidate*>(params.scores +
                                                    int64_t{blockIdx.x} * kBlockRows * kRowFloats);
    uint32_t next[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int lane = static_cast<int>(threadIdx.x) % 4;
      int inclusive = passes[i];
#pragma unroll
      for (int distance = 1; distance < 4; distance *= 2) {
        const int other = __shfl_up_sync(0xFFFFFFFFu, inclusive, distance, 4);
        inclusive += lane >= distance ? other : 0;
      }
      const int first = (row + 8 * i) * kRowCandidates + half * kHalfCandidates;
      next[i] = first + num_kept[i] + inclusive - passes[i];
      num_kept[i] += __shfl_sync(0xFFFFFFFFu, inclusive, 3, 4);
      if (num_kept[i] > kHalfCandidates) {
        threshold[i] = not_a_number();  // too many: the row is listed, nothing more is kept
      }
    }
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      if (sums[i] >= threshold[owner(i)]) {
        kept[next[owner(i)]++] = {.score = sums[i], .key = tile_key + key_of(i)};
      }
    }
  }
};

// Keeps all scores, at their keys' places.
struct Writer {
  bool has_query;

  __device__ __forceinline__ Writer(const ScoreParams& params, int place)
      : has_query(query_at(params.rows, place) >= 0) {}

  __device__ __forceinline__ bool is_needed() const { return has_query; }

  __device__ __forceinline__ void start(const Shared&) const {}

  __device__ __forceinline__ void take(const ScoreParams& params, const Shared&,
                                       const float (&sums)[kSums], int tile_key, int row) const {
    write_scores(params, sums, tile_key, row);
  }

  __device__ __forceinline__ void finish(const ScoreParams&, int) const {}
};

template <Scores kWhich, typename Sink>
__global__ void __launch_bounds__(kThreads, 1) score_kernel(const ScoreParams params) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL  // built for others too, but never launched there
  extern __shared__ __align__(1024) unsigned char shared_bytes[];
  auto& shared = *reinterpret_cast<Shared*>(shared_bytes);
  const int row = owned_row();
  Sink sink(params, static_cast<int>(blockIdx.x) * kBlockRows + row);
  if (!__syncthreads_or(sink.is_needed())) {
    sink.finish(params, row);
    return;
  }
  find_ranges<kWhich>(params, shared);
  load_queries(params, shared);
  const Tiles tiles = find_tiles(shared);
  sink.start(shared);
  const int half = static_cast<int>(threadIdx.x) / kWarpgroup;
  const uint32_t stages = shared_address(shared.tiles[half]);
  const uint32_t heads = shared_address(shared.queries);

  int tile = tiles.first + half;
  load_tile(params, tiles, tile, stages);
  load_tile(params, tiles, tile + kHalves, stages + kTileBytes);
#pragma unroll 1
  for (int stage = 0; tile < tiles.last; tile += kHalves, stage ^= 1) {
    const uint32_t keys = stages + stage * kTileBytes;
    wait_for_copies<1>();
    publish_to_tensor_cores();
    warpgroup_barrier(1 + half);
    float sums[kSums];
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      sums[i] = 0.0f;
    }
    // Unrolled, since products that are under way at a branch make the compiler wait for them.
    float even[kSums];
    float odd[kSums];
    start_head(even, heads, keys);
#pragma unroll
    for (int head = 0; head < kHeads; head += 2) {
      start_head(odd, heads + (head + 1) * kHeadBytes, keys);
      wait_for_products<1>(even);
      add_head(sums, even, shared.gates[head], row);
      if (head + 2 < kHeads) {
        start_head(even, heads + (head + 2) * kHeadBytes, keys);
        wait_for_products<1>(odd);
      } else {
        wait_for_products<0>(odd);
      }
      add_head(sums, odd, shared.gates[head + 1], row);
    }
    warpgroup_barrier(1 + half);  // no warp reads these keys any more
    load_tile(params, tiles, tile + 2 * kHalves, keys);
    sink.take(params, shared, sums, tile * kTileKeys, row);
  }
  wait_for_copies<0>();
  sink.finish(params, row);
#endif
}

__global__ void sample_keys_kernel(const uint4* k, int num_sampled, uint4* sample) {
  const int vector = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (vector < num_sampled * kRowVectors) {
    const int64_t first = int64_t{sampled_key(vector / kRowVectors)} * kRowVectors;
    sample[vector] = k[first + vector % kRowVectors];
  }
}

template <Scores kWhich, typename Sink>
void launch_kernel(const ScoreParams& params, bool may_split) {
  const int blocks = (params.rows.num_rows + kBlockRows - 1) / kBlockRows;
  const int splits = may_split ? min(2 * params.num_multiprocessors / blocks + 1, kMaxSplits) : 1;
  launch(score_kernel<kWhich, Sink>, dim3(blocks, splits), dim3(kThreads),
         static_cast<int>(sizeof(Shared)), params);
}

}  // namespace

int num_sampled_keys(int num_keys) { return num_sampled_before(num_keys); }

void launch_sample_keys(const __nv_bfloat16* k, int num_sampled, __nv_bfloat16* sample) {
  constexpr int kCopyThreads = 256;
  const int blocks = (num_sampled * kRowVectors + kCopyThreads - 1) / kCopyThreads;
  launch(sample_keys_kernel, dim3(blocks), dim3(kCopyThreads), 0,
         reinterpret_cast<const uint4*>(k), num_sampled, reinterpret_cast<uint4*>(sample));
}

void launch_scores(Scores which, const ScoreParams& params) {
  switch (which) {
    case Scores::kSampled:
      return launch_kernel<Scores::kSampled, Writer>(params, true);
    case Scores::kCandidates:
      // The candidates of a row lie where one block puts them; scores have their places.
      return launch_kernel<Scores::kCandidates, Gate>(params, params.num_scored <= kRowFloats);
    case Scores::kListed:
      return launch_kernel<Scores::kListed, Writer>(params, true);
  }
}

}  // namespace megatron_keye::indexer
