// SPDX-License-Identifier: Apache-2.0
// Scores of the lightning indexer on the tensor cores of Hopper:
//   score[t, s] = J^-0.5 * sum over i of gate[t, i] * relu(q[t, i] . k[s]),
// of e4m3 numbers times the scale of k[s], a power of two, as those of q[t, i] in the gates are.
// A thread block keeps 64 queries of all heads in shared memory; its two warpgroups iterate over
// the keys they see, alternating tiles of 128. A warpgroup adds one head's products to its sum
// while the tensor cores work on the next head's. Heads are summed in ascending order in one
// register, so a pair's score is the same bits in every launch.
//
// The matrix of scores is 34 GB at 128K tokens, so it is not written: a pair is kept only where it
// reaches its query's threshold, which about k and a margin do. A query's row belongs to four
// threads of each warpgroup; each has places of its own, so that none asks another. Blocks whose
// queries see few keys, of which most would pass, keep all scores.

#include "lightning_indexer/operands_sm90a.cuh"
#include "lightning_indexer/rows.cuh"
#include "support/launch.h"

namespace megatron_keye::indexer {

namespace {

using namespace hopper;

constexpr int kThreads = kHalves * kWarpgroup;
constexpr int kStages = 2;
constexpr int kSums = 64;          // scores of a tile that a thread holds
constexpr int kHeads = kMaxHeads;  // scored; those that q lacks are 0
constexpr int kMaxSplits = 8;      // blocks that share their queries' keys

template <typename Operands>
constexpr int kRowVectors = Operands::kRowBytes / 16;  // 16-byte vectors of a row
template <typename Operands>
constexpr int kTileBytes = kTileKeys * Operands::kRowBytes;
template <typename Operands>
constexpr int kHeadBytes = kBlockRows * Operands::kRowBytes;

struct SharedRanges {
  KeyRange ranges[kBlockRows];  // empty where there is no query
  KeyRange any;                 // keys that some query of the block sees
  KeyRange all;                 // keys that each of them sees
};

template <typename Operands>
struct Shared : SharedRanges {
  alignas(1024) unsigned char tiles[kHalves][kStages][kTileBytes<Operands>];
  alignas(1024) unsigned char queries[kHeads][kHeadBytes<Operands>];
  float gates[kHeads][kBlockRows];
  float key_scales[kHalves][kStages][kTileKeys];  // unused where operands have none
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
         static_cast<int>(threadIdx.x) % 32 / kLanes;
}

// Of one of a thread's sums: which of its two queries, and which row of a tile of keys, counted
// from the thread's first one.
__device__ __forceinline__ constexpr int owner(int sum) { return sum >> 1 & 1; }
__device__ __forceinline__ constexpr int row_of(int sum) { return (sum >> 2) * 8 + (sum & 1); }
__device__ __forceinline__ int first_row() { return static_cast<int>(threadIdx.x) % kLanes * 2; }

// The key in a row of a tile; that 8 rows on is 8 keys on. Pairs of keys trade places from tile to
// tile of a warpgroup, so that those of one column of an image, say, don't all fall to one thread.
__device__ __forceinline__ int key_at(int tile, int row) {
  return tile * kTileKeys + (row ^ (tile / kHalves % kLanes * 2));
}

// The block's first query, as its place in the launch. The last ones come first, since in a causal
// sequence they see the most keys, and what is short fills gaps at the end.
__device__ __forceinline__ int block_place() {
  return static_cast<int>(gridDim.x - 1 - blockIdx.x) * kBlockRows;
}

__device__ __forceinline__ float not_a_number() { return __int_as_float(0x7FFFFFFF); }

// Finds which keys the block's queries see.
template <Scores kWhich>
__device__ __forceinline__ void find_ranges(const ScoreParams& params, SharedRanges& shared) {
  if (threadIdx.x == 0) {
    shared.any = {params.num_scored, 0};
    shared.all = {0, params.num_scored};
  }
  __syncthreads();
  if (threadIdx.x < kBlockRows) {
    const int row = static_cast<int>(threadIdx.x);
    const int query = query_at(params.rows, block_place() + row);
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
template <typename Operands>
__device__ __forceinline__ void load_queries(const ScoreParams& params,
                                             Shared<Operands>& shared) {
  constexpr int kVectors = kRowVectors<Operands>;
  for (int i = threadIdx.x; i < kBlockRows * kHeads * kVectors; i += kThreads) {
    const int row = i / (kHeads * kVectors);
    const int head = i / kVectors % kHeads;
    const int query = query_at(params.rows, block_place() + row);
    const bool is_real = query >= 0 && head < params.num_heads;
    const int64_t source =
        is_real ? (int64_t{query} * params.num_heads + head) * kVectors + i % kVectors : 0;
    copy_16_async(shared_address(shared.queries[head]) + Operands::place(row, i % kVectors),
                  params.q + source, is_real);
  }
  for (int i = threadIdx.x; i < kBlockRows * kHeads; i += kThreads) {
    const int row = i / kHeads;
    const int head = i % kHeads;
    const int query = query_at(params.rows, block_place() + row);
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
__device__ __forceinline__ Tiles find_tiles(const SharedRanges& shared) {
  const int first_tile = shared.any.start / kTileKeys;
  const int last_tile = (shared.any.end + kTileKeys - 1) / kTileKeys;
  const int each = (max(last_tile - first_tile, 0) + static_cast<int>(gridDim.y) - 1) /
                   static_cast<int>(gridDim.y);
  const int first = first_tile + static_cast<int>(blockIdx.y) * each;
  return {.first = first, .last = min(first + each, last_tile)};
}

// Starts to copy a tile of keys, if there is one, and their scales to a stage of this warpgroup.
template <typename Operands>
__device__ __forceinline__ void load_tile(const ScoreParams& params, const Tiles& tiles, int tile,
                                          Shared<Operands>& shared, int stage) {
  if (tile < tiles.last) {
    constexpr int kVectors = kRowVectors<Operands>;
    constexpr int kRowsAtOnce = kWarpgroup / kVectors;
    static_assert(kRowsAtOnce % 8 == 0, "the order of vectors in a row repeats");
    const int thread = static_cast<int>(threadIdx.x) % kWarpgroup;
    const int half = static_cast<int>(threadIdx.x) / kWarpgroup;
    const int row = thread / kVectors;
    const int key = key_at(tile, row);
    const uint4* const source = params.k + int64_t{key} * kVectors + thread % kVectors;
    const uint32_t target =
        shared_address(shared.tiles[half][stage]) + Operands::place(row, thread % kVectors);
#pragma unroll
    for (int i = 0; i < kTileKeys / kRowsAtOnce; ++i) {
      copy_16_async(target + i * kRowsAtOnce * Operands::kRowBytes, source + i * kWarpgroup,
                    key + i * kRowsAtOnce < params.num_scored);
    }
    if constexpr (Operands::kHasScales) {
      const int scaled_key = key_at(tile, thread);
      copy_4_async(shared_address(&shared.key_scales[half][stage][thread]),
                   params.key_scale + scaled_key, scaled_key < params.num_scored);
    }
  }
  commit_copies();
}

// Starts the products of one head with a tile of keys.
template <typename Operands>
__device__ __forceinline__ void start_head(float (&dots)[kSums], uint32_t queries, uint32_t keys) {
  begin_products();
  Operands::multiply(dots, queries, keys);
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

// Multiplies each key's sums by its scale.
__device__ __forceinline__ void scale_sums(float (&sums)[kSums],
                                           const float (&key_scales)[kTileKeys]) {
#pragma unroll
  for (int i = 0; i < kSums; i += 4) {
    const float2 scales = *reinterpret_cast<const float2*>(&key_scales[first_row() + row_of(i)]);
    sums[i] *= scales.x;
    sums[i + 1] *= scales.y;
    sums[i + 2] *= scales.x;
    sums[i + 3] *= scales.y;
  }
}

// Writes all scores of a tile, those outside a query's range included, from that of a key on.
__device__ __forceinline__ void write_scores(const ScoreParams& params, const float (&sums)[kSums],
                                             int tile, int first_key, int row) {
  const int64_t place = block_place() + row;
  float* const scores = params.scores + place * params.score_stride +
                        key_at(tile, first_row()) - first_key;
#pragma unroll
  for (int i = 0; i < kSums; i += 2) {
    if (place + owner(i) * 8 < params.rows.num_rows) {
      float* const target = scores + owner(i) * 8 * params.score_stride + row_of(i);
      *reinterpret_cast<float2*>(target) = make_float2(sums[i], sums[i + 1]);
    }
  }
}

// Keeps what reaches the thresholds of a thread's two queries.
struct Gate {
  bool keeps_all = false;  // the block's keys are so few that all of their scores fit
  int first_key = 0;       // whose score then comes first
  float threshold[2];
  int next[2];  // place of the next candidate, counted from the block's first row

  __device__ __forceinline__ Gate(const ScoreParams& params, int place) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const bool is_real = query_at(params.rows, place + 8 * i) >= 0;
      threshold[i] = is_real ? params.thresholds[place + 8 * i] : not_a_number();
      next[i] = first_candidate(i);
    }
  }

  // NaN, the threshold of a row that keeps nothing, is reached by no score.
  __device__ __forceinline__ bool is_needed() const {
    return threshold[0] == threshold[0] || threshold[1] == threshold[1];
  }

  __device__ __forceinline__ void start(const SharedRanges& shared) {
    first_key = shared.any.start / kTileKeys * kTileKeys;
    keeps_all = shared.any.end - first_key <= kRowFloats;
  }

  __device__ __forceinline__ void take(const ScoreParams& params, const SharedRanges& shared,
                                       float (&sums)[kSums], int tile, int row) {
    if (keeps_all) {
      write_scores(params, sums, tile, first_key, row);
    } else {
      keep(params, shared, sums, tile, row);
    }
  }

  __device__ __forceinline__ void finish(const ScoreParams& params, int row) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int place = block_place() + row + 8 * i;
      if (place < params.rows.num_rows) {
        const int all = owned_part() == 0 ? kAllScores : first_key;
        const int num_kept = is_too_many(i) ? kPartCandidates + 1 : next[i] - first_candidate(i);
        params.num_candidates[place * kParts + owned_part()] = keeps_all ? all : num_kept;
      }
    }
  }

 private:
  __device__ __forceinline__ static int owned_part() {
    return static_cast<int>(threadIdx.x) / kWarpgroup * kLanes +
           static_cast<int>(threadIdx.x) % kLanes;
  }

  // Of one of a thread's two queries.
  __device__ __forceinline__ static int first_candidate(int i) {
    return (owned_row() + 8 * i) * kRowCandidates + owned_part() * kPartCandidates;
  }

  // Whether another tile's candidates might not fit.
  __device__ __forceinline__ bool is_too_many(int i) const {
    return next[i] - first_candidate(i) > kPartCandidates - kSums / 2;
  }

  __device__ __forceinline__ void keep(const ScoreParams& params, const SharedRanges& shared,
                                       float (&sums)[kSums], int tile, int row) {
    const int tile_key = key_at(tile, first_row());
    if (tile * kTileKeys < shared.all.start || (tile + 1) * kTileKeys > shared.all.end) {
      const KeyRange range[2] = {shared.ranges[row], shared.ranges[row + 8]};
#pragma unroll
      for (int i = 0; i < kSums; ++i) {
        const int key = tile_key + row_of(i);
        if (key < range[owner(i)].start || key >= range[owner(i)].end) {
          sums[i] = not_a_number();
        }
      }
    }
    // Offsets from one address, since a pointer for each row costs twice the instructions.
    auto* const kept =
        reinterpret_cast<Candidate*>(params.scores + int64_t{block_place()} * kRowFloats);
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      // Without a branch, which most warps would take for some of their threads.
      asm volatile(
          "{\n"
          ".reg .pred reaches;\n"
          "setp.ge.f32 reaches, %2, %4;\n"
          "@reaches st.global.v2.b32 [%1], {%2, %3};\n"
          "@reaches add.s32 %0, %0, 1;\n"
          "}\n"
          : "+r"(next[owner(i)])
          : "l"(kept + next[owner(i)]), "f"(sums[i]), "r"(tile_key + row_of(i)),
            "f"(threshold[owner(i)])
          : "memory");
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (is_too_many(i)) {
        threshold[i] = not_a_number();  // the row is listed, nothing more is kept
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

  __device__ __forceinline__ void start(const SharedRanges&) const {}

  __device__ __forceinline__ void take(const ScoreParams& params, const SharedRanges&,
                                       const float (&sums)[kSums], int tile, int row) const {
    write_scores(params, sums, tile, 0, row);
  }

  __device__ __forceinline__ void finish(const ScoreParams&, int) const {}
};

template <typename Operands, Scores kWhich, typename Sink>
__global__ void __launch_bounds__(kThreads, 1) score_kernel(const ScoreParams params) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL  // built for others too, but never launched there
  extern __shared__ __align__(1024) unsigned char shared_bytes[];
  auto& shared = *reinterpret_cast<Shared<Operands>*>(shared_bytes);
  const int row = owned_row();
  Sink sink(params, block_place() + row);
  if (!__syncthreads_or(sink.is_needed())) {
    sink.finish(params, row);
    return;
  }
  find_ranges<kWhich>(params, shared);
  load_queries(params, shared);
  const Tiles tiles = find_tiles(shared);
  sink.start(shared);
  // From one lane, so that the compiler knows it to be the warp's and keeps what describes tiles
  // in uniform registers.
  const int half = __shfl_sync(0xFFFFFFFFu, static_cast<int>(threadIdx.x) / kWarpgroup, 0);
  const uint32_t heads = shared_address(shared.queries);

  int tile = tiles.first + half;
  load_tile(params, tiles, tile, shared, 0);
  load_tile(params, tiles, tile + kHalves, shared, 1);
#pragma unroll 1
  for (int stage = 0; tile < tiles.last; tile += kHalves, stage ^= 1) {
    const uint32_t keys = shared_address(shared.tiles[half][stage]);
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
    start_head<Operands>(even, heads, keys);
#pragma unroll
    for (int head = 0; head < kHeads; head += 2) {
      start_head<Operands>(odd, heads + (head + 1) * kHeadBytes<Operands>, keys);
      wait_for_products<1>(even);
      add_head(sums, even, shared.gates[head], row);
      if (head + 2 < kHeads) {
        start_head<Operands>(even, heads + (head + 2) * kHeadBytes<Operands>, keys);
        wait_for_products<1>(odd);
      } else {
        wait_for_products<0>(odd);
      }
      add_head(sums, odd, shared.gates[head + 1], row);
    }
    if constexpr (Operands::kHasScales) {
      scale_sums(sums, shared.key_scales[half][stage]);
    }
    warpgroup_barrier(1 + half);  // no warp reads these keys any more
    load_tile(params, tiles, tile + 2 * kHalves, shared, stage);
    sink.take(params, shared, sums, tile, row);
  }
  wait_for_copies<0>();
  sink.finish(params, row);
#endif
}

template <typename Operands>
__global__ void sample_keys_kernel(const uint4* k, const float* key_scale, int num_sampled,
                                   uint4* sample, float* sample_scale) {
  constexpr int kVectors = kRowVectors<Operands>;
  const int vector = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (vector < num_sampled * kVectors) {
    const int key = sampled_key(vector / kVectors);
    sample[vector] = k[int64_t{key} * kVectors + vector % kVectors];
    if (Operands::kHasScales && vector % kVectors == 0) {
      sample_scale[vector / kVectors] = key_scale[key];
    }
  }
}

template <typename Operands>
void launch_sample(const ScoreParams& params, int num_sampled, uint4* sample,
                   float* sample_scale) {
  constexpr int kCopyThreads = 256;
  const int blocks = (num_sampled * kRowVectors<Operands> + kCopyThreads - 1) / kCopyThreads;
  launch(sample_keys_kernel<Operands>, dim3(blocks), dim3(kCopyThreads), 0,
         params.k, params.key_scale, num_sampled, sample, sample_scale);
}

template <typename Operands, Scores kWhich, typename Sink>
void launch_kernel(const ScoreParams& params, bool may_split) {
  const int blocks = (params.rows.num_rows + kBlockRows - 1) / kBlockRows;
  const int splits = may_split ? min(2 * params.num_multiprocessors / blocks + 1, kMaxSplits) : 1;
  launch(score_kernel<Operands, kWhich, Sink>, dim3(blocks, splits), dim3(kThreads),
         static_cast<int>(sizeof(Shared<Operands>)), params);
}

template <typename Operands>
void launch_which(Scores which, const ScoreParams& params) {
  switch (which) {
    case Scores::kSampled:
      return launch_kernel<Operands, Scores::kSampled, Writer>(params, true);
    case Scores::kCandidates:
      // The candidates of a row lie where one block puts them; scores have their places.
      return launch_kernel<Operands, Scores::kCandidates, Gate>(params,
                                                                params.num_scored <= kRowFloats);
    case Scores::kListed:
      return launch_kernel<Operands, Scores::kListed, Writer>(params, true);
  }
}

}  // namespace

int num_sampled_keys(int num_keys) { return num_sampled_before(num_keys); }

void launch_sample_keys(const ScoreParams& params, int num_sampled, uint4* sample,
                        float* sample_scale) {
  const auto launch_as = params.are_e4m3 ? launch_sample<E4m3> : launch_sample<Bfloat16>;
  launch_as(params, num_sampled, sample, sample_scale);
}

void launch_scores(Scores which, const ScoreParams& params) {
  const auto launch_as = params.are_e4m3 ? launch_which<E4m3> : launch_which<Bfloat16>;
  launch_as(which, params);
}

}  // namespace megatron_keye::indexer
