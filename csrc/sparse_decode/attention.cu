// SPDX-License-Identifier: Apache-2.0
// Attention of new tokens over their selected keys, in the pages of the cache.
//
// Keys lie anywhere in memory, and a row's 2,048 take 1 MB a group, so the time is that of the
// gather. A warp attends for one group of one row, over some of its selected keys, alone: it keeps
// two tiles of 16 keys and their values under way in a ring of its own, and waits for no other
// warp. At the end the warps of a thread block, then the blocks of a cluster, add up what they
// have, in a fixed order: one launch, and the same bits in every run.

#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include "sparse_decode/attention_gather.cuh"
#include "sparse_decode/attention_softmax.cuh"
#include "support/launch.h"

namespace megatron_keye::sparse_decode {

namespace {

namespace cg = cooperative_groups;
using namespace attention;

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
