// SPDX-License-Identifier: Apache-2.0
// Attention of new tokens over their selected keys, in the pages of the cache.
//
// Keys lie anywhere in memory, and a row's 2,048 take 2 MB a group, so the time is that of the
// gather. A warp attends for one group of one row, over some of its selected keys, alone: it keeps
// two tiles of 16 keys and their values under way in a ring of its own, and waits for no other
// warp. At the end the warps of a thread block, then the blocks of a cluster, add up what they
// have, in a fixed order: one launch, and the same bits in every run.

#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include "sparse_decode/params.h"
#include "support/hopper_sm90a.cuh"
#include "support/launch.h"
#include "support/warp_products.cuh"

namespace megatron_keye::sparse_decode {

namespace {

namespace cg = cooperative_groups;
using hopper::commit_copies;
using hopper::copy_16_async;
using hopper::shared_address;
using hopper::wait_for_copies;

constexpr int kThreads = 32 * kWarps;
constexpr int kRows = kMaxGroupHeads;  // of a warp: heads of its group, then zeros
constexpr int kTileKeys = 16;
constexpr int kListKeys = 32;  // of the selection that a warp looks up at once: two tiles
constexpr uint32_t kWholeWarp = 0xFFFFFFFFu;
constexpr float kNoMaximum = -1.0e38f;  // finite, so that a row without keys has no inf - inf

// Known when the kernel is compiled.
template <int kChannelsOf>
struct Sizes {
  static constexpr int kChannels = kChannelsOf;
  static constexpr int kVectors = kChannels / 8;  // of 16 bytes in a row of keys
  static constexpr int kRowBytes = kChannels * 2;
  static constexpr int kTileBytes = kTileKeys * kRowBytes;
  static constexpr int kStages = kChannels == 128 ? 3 : 6;
  static constexpr int kSteps = kChannels / 16;    // products over the channels
  static constexpr int kColumns = kChannels / 8;   // matrices of output columns
};

template <typename Size>
struct Shared {
  // Of each warp: a ring of tiles, keys before values; at the end its sums.
  union Room {
    unsigned char stages[Size::kStages][2][Size::kTileBytes];
    float sums[kRows][Size::kChannels];
  } rooms[kWarps];
  uint32_t is_real[kWarps][Size::kStages];  // a bit for each key of a tile
  float maximum[kWarps][kRows];
  float total[kWarps][kRows];
  // Of all warps of a group, whose sums stand in the room of the group's first warp.
  float group_maximum[kWarps][kRows];
  float group_total[kWarps][kRows];
};

// Byte offset of a vector of a tile, so that neither copies nor matrix loads have bank conflicts.
template <typename Size>
__device__ __forceinline__ uint32_t place_in_tile(int row, int vector) {
  return row * Size::kRowBytes + ((vector ^ (row & 7)) << 4);
}

__device__ __forceinline__ int lane_of_warp() { return static_cast<int>(threadIdx.x) % 32; }

// What a warp does: a group of a row, and every num_parts-th list of its selection from part on.
struct Work {
  int row;
  int group;
  int part;
  int num_parts;

  __device__ __forceinline__ explicit Work(const AttendParams& params) {
    const int warp = static_cast<int>(threadIdx.x) / 32;
    const int rank = static_cast<int>(blockIdx.x) % params.cluster;
    const int cluster = static_cast<int>(blockIdx.x) / params.cluster;
    const int clusters_of_row = params.num_groups / params.groups_of_block;
    const int warps_of_group = kWarps / params.groups_of_block;
    row = cluster / clusters_of_row;
    group = cluster % clusters_of_row * params.groups_of_block + warp % params.groups_of_block;
    part = rank * warps_of_group + warp / params.groups_of_block;
    num_parts = params.cluster * warps_of_group;
  }
};

// Finds where selected keys lie, a list of 32 ahead of their copies: a lane reads one key of the
// list after next and the page of one of the next list, and neither is waited for.
class Finder {
 public:
  __device__ __forceinline__ Finder(const AttendParams& params, const Work& work)
      : params_(params),
        indices_(params.indices + int64_t{work.row} * params.num_selected),
        pages_(params.table.pages + work.row / params.num_queries * params.table.stride),
        place_(work.part * kListKeys + lane_of_warp()),
        step_(work.num_parts * kListKeys) {
    next_key_ = read_key();
    next_page_ = read_page(next_key_);
    key_after_ = read_key();
  }

  // Returns the offset of this lane's key of the next list, in elements, or -1.
  __device__ __forceinline__ int64_t advance() {
    const Pages& table = params_.table;
    const int64_t offset = next_key_ >= 0 && table.holds(next_page_)
                               ? next_page_ * params_.stride_p +
                                     table.place(next_key_) * params_.stride_l
                               : -1;
    is_selected_ = next_key_ >= 0;
    next_key_ = key_after_;
    next_page_ = read_page(next_key_);
    key_after_ = read_key();
    return offset;
  }

  // Whether the last list had this lane's key at all; selections end in -1.
  __device__ __forceinline__ bool is_selected() const { return is_selected_; }

 private:
  __device__ __forceinline__ int read_key() {
    const int key = place_ < params_.num_selected ? __ldcg(indices_ + place_) : -1;
    place_ += step_;
    return key;
  }
  __device__ __forceinline__ int read_page(int key) const {
    return key >= 0 ? __ldg(pages_ + (key >> params_.table.log2_places)) : -1;
  }

  const AttendParams& params_;
  const int* indices_;
  const int* pages_;
  int place_;
  int step_;
  int next_key_;
  int next_page_;
  int key_after_;
  bool is_selected_ = false;
};

// Starts the copies of tile after tile.
template <typename Size>
class Copier {
 public:
  __device__ __forceinline__ Copier(const AttendParams& params, const Work& work,
                                    Shared<Size>& shared)
      : finder_(params, work),
        room_(shared_address(shared.rooms[threadIdx.x / 32].stages)),
        is_real_(shared.is_real[threadIdx.x / 32]) {
    const int64_t channel = work.group * params.stride_g + lane_of_warp() % Size::kVectors * 8;
    keys_ = params.keys + channel;
    values_ = params.values + channel;
  }

  // Whether a tile was there; either way the copies count as a group.
  __device__ __forceinline__ bool start() {
    const int half = num_started_ % 2;
    if (half == 0 && !is_over_) {
      offset_ = finder_.advance();
      is_over_ = !__any_sync(kWholeWarp, finder_.is_selected());
    }
    if (!is_over_) {
      copy(half);
      num_started_ += 1;
      stage_ = stage_ + 1 == Size::kStages ? 0 : stage_ + 1;
    }
    commit_copies();
    return !is_over_;
  }

 private:
  __device__ __forceinline__ void copy(int half) {
    constexpr int kRowsAtOnce = 32 / Size::kVectors;
    const uint32_t found = __ballot_sync(kWholeWarp, offset_ >= 0) >> half * kTileKeys;
    if (lane_of_warp() == 0) {
      is_real_[stage_] = found;
    }
    const uint32_t target = room_ + stage_ * 2 * Size::kTileBytes;
#pragma unroll
    for (int first = 0; first < kTileKeys; first += kRowsAtOnce) {
      const int row = first + lane_of_warp() / Size::kVectors;
      const int64_t offset = __shfl_sync(kWholeWarp, offset_, half * kTileKeys + row);
      const bool is_real = offset >= 0;
      const int64_t source = is_real ? offset : 0;
      const uint32_t place = place_in_tile<Size>(row, lane_of_warp() % Size::kVectors);
      copy_16_async(target + place, keys_ + source, is_real);
      copy_16_async(target + Size::kTileBytes + place, values_ + source, is_real);
    }
  }

  Finder finder_;
  uint32_t room_;
  uint32_t* is_real_;
  const __nv_bfloat16* keys_;
  const __nv_bfloat16* values_;
  int64_t offset_ = -1;
  int num_started_ = 0;
  int stage_ = 0;
  bool is_over_ = false;
};

// The online softmax of a warp's rows; a lane has rows lane / 4 and 8 further on.
// Source: arXiv 1805.02867 (Milakov and Gimelshein, online softmax).
template <typename Size>
struct Attention {
  uint32_t query[Size::kSteps][4];
  float acc[Size::kColumns][4];
  float m[2] = {kNoMaximum, kNoMaximum};
  float l[2] = {0.0f, 0.0f};  // of this lane's keys

  __device__ __forceinline__ void load_query(const AttendParams& params, const Work& work) {
    const int64_t first = (int64_t{work.row} * params.num_groups + work.group) * params.heads;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int head = lane_of_warp() / 4 + i % 2 * 8;
      const __nv_bfloat16* source = params.query + (first + head) * Size::kChannels +
                                    i / 2 * 8 + lane_of_warp() % 4 * 2;
#pragma unroll
      for (int step = 0; step < Size::kSteps; ++step) {
        query[step][i] = head < params.heads
                             ? *reinterpret_cast<const uint32_t*>(source + step * 16)
                             : 0u;
      }
    }
#pragma unroll
    for (auto& column : acc) {
#pragma unroll
      for (float& sum : column) {
        sum = 0.0f;
      }
    }
  }

  // Adds a tile of keys, of which those with their bit in `is_real` count.
  __device__ __forceinline__ void add(uint32_t tile, uint32_t is_real, float scale_log2) {
    float logits[2][4] = {};
    multiply_keys(logits, tile);
    const float rescale[2] = {weigh(logits, is_real, scale_log2, 0),
                              weigh(logits, is_real, scale_log2, 1)};
    if (__any_sync(kWholeWarp, rescale[0] != 1.0f || rescale[1] != 1.0f)) {
#pragma unroll
      for (auto& column : acc) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          column[i] *= rescale[i / 2];
        }
      }
    }
    add_values(logits, tile + Size::kTileBytes);
  }

  // A row's sum of exponentials, whose keys are spread over four lanes.
  __device__ __forceinline__ float whole_sum(int i) const {
    float sum = l[i];
    sum += __shfl_xor_sync(kWholeWarp, sum, 1);
    return sum + __shfl_xor_sync(kWholeWarp, sum, 2);
  }

 private:
  __device__ __forceinline__ void multiply_keys(float (&logits)[2][4], uint32_t keys) const {
    const int matrix = lane_of_warp() / 8;
    const int row = matrix / 2 * 8 + lane_of_warp() % 8;
#pragma unroll
    for (int step = 0; step < Size::kSteps; ++step) {
      uint32_t b[4];
      warp::load_matrices(b, keys + place_in_tile<Size>(row, 2 * step + matrix % 2));
      warp::multiply_add(logits[0], query[step], b[0], b[1]);
      warp::multiply_add(logits[1], query[step], b[2], b[3]);
    }
  }

  // Turns row i's logits into weights; returns what its sums so far are multiplied by.
  __device__ __forceinline__ float weigh(float (&logits)[2][4], uint32_t is_real,
                                         float scale_log2, int i) {
    float highest = m[i];
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const int key = n / 2 * 8 + lane_of_warp() % 4 * 2 + n % 2;
      float& logit = logits[n / 2][2 * i + n % 2];
      logit = (is_real >> key & 1u) != 0u ? logit * scale_log2 : -INFINITY;
      highest = fmaxf(highest, logit);
    }
    highest = fmaxf(highest, __shfl_xor_sync(kWholeWarp, highest, 1));
    highest = fmaxf(highest, __shfl_xor_sync(kWholeWarp, highest, 2));
    const float rescale = exp2f(m[i] - highest);
    m[i] = highest;
    l[i] *= rescale;
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      float& weight = logits[n / 2][2 * i + n % 2];
      weight = exp2f(weight - highest);
      l[i] += weight;
    }
    return rescale;
  }

  __device__ __forceinline__ void add_values(const float (&weights)[2][4], uint32_t values) {
    const uint32_t a[4] = {warp::packed(weights[0][0], weights[0][1]),
                           warp::packed(weights[0][2], weights[0][3]),
                           warp::packed(weights[1][0], weights[1][1]),
                           warp::packed(weights[1][2], weights[1][3])};
    const int matrix = lane_of_warp() / 8;
    const int row = matrix % 2 * 8 + lane_of_warp() % 8;
#pragma unroll
    for (int column = 0; column < Size::kColumns; column += 2) {
      uint32_t b[4];
      warp::load_transposed(b, values + place_in_tile<Size>(row, column + matrix / 2));
      warp::multiply_add(acc[column], a, b[0], b[1]);
      warp::multiply_add(acc[column + 1], a, b[2], b[3]);
    }
  }
};

// Attends over the warp's part and leaves its sums in shared memory.
template <typename Size>
__device__ __forceinline__ void attend(const AttendParams& params, const Work& work,
                                       Attention<Size>& attention, Shared<Size>& shared) {
  const int warp = static_cast<int>(threadIdx.x) / 32;
  Copier<Size> copier(params, work, shared);
  int num_waiting = 0;  // tiles that are on their way
#pragma unroll
  for (int tile = 0; tile < Size::kStages - 1; ++tile) {
    num_waiting += copier.start();
  }
  const uint32_t room = shared_address(shared.rooms[warp].stages);
  for (int stage = 0; num_waiting > 0; stage = stage + 1 == Size::kStages ? 0 : stage + 1) {
    wait_for_copies<Size::kStages - 2>();
    __syncwarp();  // this tile is there, and nobody reads the one before it any more
    num_waiting += copier.start();
    attention.add(room + stage * 2 * Size::kTileBytes, shared.is_real[warp][stage],
                  params.scale_log2);
    num_waiting -= 1;
  }
  wait_for_copies<0>();
  __syncwarp();
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int head = lane_of_warp() / 4 + 8 * i;
    const float total = attention.whole_sum(i);
    if (lane_of_warp() % 4 == 0) {
      shared.maximum[warp][head] = attention.m[i];
      shared.total[warp][head] = total;
    }
#pragma unroll
    for (int column = 0; column < Size::kColumns; ++column) {
      float* const sums = &shared.rooms[warp].sums[head][column * 8 + lane_of_warp() % 4 * 2];
      *reinterpret_cast<float2*>(sums) =
          make_float2(attention.acc[column][2 * i], attention.acc[column][2 * i + 1]);
    }
  }
}

__device__ __forceinline__ void add_weighted(float4& sum, float weight, const float4& more) {
  sum.x = fmaf(weight, more.x, sum.x);
  sum.y = fmaf(weight, more.y, sum.y);
  sum.z = fmaf(weight, more.z, sum.z);
  sum.w = fmaf(weight, more.w, sum.w);
}

// Adds the sums of a group's warps to those of its first warp, for all groups of the block.
template <typename Size>
__device__ __forceinline__ void merge_warps(const AttendParams& params, Shared<Size>& shared) {
  constexpr int kFours = Size::kChannels / 4;
  const int groups = params.groups_of_block;
  for (int i = threadIdx.x; i < groups * params.heads * kFours; i += kThreads) {
    const int group = i / kFours / params.heads;
    const int head = i / kFours % params.heads;
    float maximum = kNoMaximum;
    for (int warp = group; warp < kWarps; warp += groups) {
      maximum = fmaxf(maximum, shared.maximum[warp][head]);
    }
    float total = 0.0f;
    float4 sum{};
    for (int warp = group; warp < kWarps; warp += groups) {
      const float weight = exp2f(shared.maximum[warp][head] - maximum);
      total = fmaf(weight, shared.total[warp][head], total);
      add_weighted(sum, weight,
                   reinterpret_cast<const float4*>(shared.rooms[warp].sums[head])[i % kFours]);
    }
    reinterpret_cast<float4*>(shared.rooms[group].sums[head])[i % kFours] = sum;
    if (i % kFours == 0) {
      shared.group_maximum[group][head] = maximum;
      shared.group_total[group][head] = total;
    }
  }
}

// Adds up what the blocks of the cluster have, and writes this block's share of the output.
template <typename Size>
__device__ __forceinline__ void merge_blocks(const AttendParams& params, const Work& work,
                                             cg::cluster_group& cluster, Shared<Size>& shared) {
  constexpr int kFours = Size::kChannels / 4;
  const int first_group = work.group / params.groups_of_block * params.groups_of_block;
  const int64_t first = (int64_t{work.row} * params.num_groups + first_group) * params.heads;
  const int blocks = params.cluster;
  const int rank = static_cast<int>(cluster.block_rank());
  const int num_fours = params.groups_of_block * params.heads * kFours;
  for (int i = rank * kThreads + threadIdx.x; i < num_fours; i += blocks * kThreads) {
    const int group = i / kFours / params.heads;
    const int head = i / kFours % params.heads;
    float maximum = kNoMaximum;
    for (int block = 0; block < blocks; ++block) {
      maximum = fmaxf(maximum,
                      *cluster.map_shared_rank(&shared.group_maximum[group][head], block));
    }
    float total = 0.0f;
    float4 sum{};
    for (int block = 0; block < blocks; ++block) {
      const auto* of_block = cluster.map_shared_rank(&shared, block);
      const float weight = exp2f(of_block->group_maximum[group][head] - maximum);
      total = fmaf(weight, of_block->group_total[group][head], total);
      add_weighted(sum, weight,
                   reinterpret_cast<const float4*>(of_block->rooms[group].sums[head])[i % kFours]);
    }
    const float factor = total > 0.0f ? 1.0f / total : 0.0f;
    const uint2 rounded = {warp::packed(sum.x * factor, sum.y * factor),
                           warp::packed(sum.z * factor, sum.w * factor)};
    reinterpret_cast<uint2*>(params.out + first * Size::kChannels)[i] = rounded;
  }
}

template <typename Size>
__global__ void __launch_bounds__(kThreads, 1)
    attend_kernel(const __grid_constant__ AttendParams params) {
  extern __shared__ __align__(128) unsigned char shared_bytes[];
  auto& shared = *reinterpret_cast<Shared<Size>*>(shared_bytes);
  cg::cluster_group cluster = cg::this_cluster();
  const Work work(params);
  Attention<Size> attention;
  attention.load_query(params, work);
  cudaGridDependencySynchronize();  // the selection is written
  attend(params, work, attention, shared);
  __syncthreads();
  merge_warps(params, shared);
  cluster.sync();
  merge_blocks(params, work, cluster, shared);
  cluster.sync();  // a block's memory is there until all have read it
}

template <int kChannels>
void launch_for(const AttendParams& params) {
  using Size = Sizes<kChannels>;
  const int clusters = params.num_rows * (params.num_groups / params.groups_of_block);
  launch_clusters(attend_kernel<Size>, dim3(clusters * params.cluster), dim3(kThreads),
                  static_cast<int>(sizeof(Shared<Size>)), params.cluster, params);
}

}  // namespace

void launch_attention(const AttendParams& params, int num_channels) {
  num_channels == 64 ? launch_for<64>(params) : launch_for<128>(params);
}

}  // namespace megatron_keye::sparse_decode
