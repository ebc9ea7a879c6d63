// SPDX-License-Identifier: Apache-2.0
// The rows of a thread block of the backward pass: brought to shared memory once, with what a
// thread keeps of its own two.
#pragma once

#include "sparse_attention/backward_block.cuh"

namespace megatron_keye::sparse_attention {

// Number of a consumer's thread, counted from the first consumer's.
__device__ __forceinline__ int consumer_thread() {
  return static_cast<int>(threadIdx.x) - kWarpgroup;
}

// Where a row of the block lies in the tensors.
template <typename Cut>
struct Row {
  int query;
  int head;
  bool is_real;

  __device__ __forceinline__ Row(const Problem& problem, const Place<Cut>& place, int row)
      : query(place.first_query + row / Cut::kHeads),
        head(place.group * Cut::kHeads + row % Cut::kHeads),
        is_real(query < problem.num_queries) {}

  // Among the rows of contiguous tensors; of the first query where there is none.
  __device__ __forceinline__ int64_t index(const Problem& problem) const {
    return int64_t{is_real ? query : 0} * (problem.num_groups * Cut::kHeads) + head;
  }
};

// Brings the rows of q and dout to shared memory, zeros where there is no query; all consumers may
// use them after a barrier.
template <typename Cut>
__device__ __forceinline__ void load_rows(const BackwardParams& params, const Place<Cut>& place,
                                          BackwardShared<Cut>& shared) {
  constexpr int kVectorChannels = 16 / sizeof(__nv_bfloat16);
  constexpr int kRowVectors = Cut::kChannels / kVectorChannels;
  const Problem& problem = params.problem;
  constexpr int kThreads = Cut::kConsumers * kWarpgroup;
#pragma unroll 2
  for (int i = consumer_thread(); i < Cut::kRows * kRowVectors; i += kThreads) {
    const int vector = i % kRowVectors;
    const Row<Cut> row(problem, place, i / kRowVectors);
    const uint32_t target = place_of_vector(i / kRowVectors, vector, Cut::kHalfRowsBytes);
    const int64_t q_offset = (row.is_real ? row.query : 0) * problem.q_stride_t +
                             row.head * problem.q_stride_h + vector * kVectorChannels;
    const int64_t offset = row.index(problem) * Cut::kChannels + vector * kVectorChannels;
    copy_16_async(shared_address(shared.q) + target, problem.q + q_offset, row.is_real);
    copy_16_async(shared_address(shared.dout) + target, params.dout + offset, row.is_real);
  }
  wait_for_all_copies();
  publish_to_tensor_cores();
}

// A sum over the four threads that share a row.
__device__ __forceinline__ float sum_of_four(float value) {
  value += __shfl_xor_sync(kWholeWarp, value, 1);
  return value + __shfl_xor_sync(kWholeWarp, value, 2);
}

// The sum of out * dout over a row's channels, by the four threads that share it: the mean of the
// weights' gradients under the weights themselves.
template <typename Cut>
__device__ __forceinline__ float mean_of(const BackwardParams& params, const Row<Cut>& row) {
  const int64_t offset = row.index(params.problem) * Cut::kChannels;
  const auto* const out = reinterpret_cast<const __nv_bfloat162*>(params.out + offset);
  const auto* const dout = reinterpret_cast<const __nv_bfloat162*>(params.dout + offset);
  float sum = 0.0f;
#pragma unroll
  for (int j = 0; j < Cut::kChannels / 8; ++j) {
    const int i = 4 * j + lane_of_warp() % 4;
    const float2 left = __bfloat1622float2(out[i]);
    const float2 right = __bfloat1622float2(dout[i]);
    sum = fmaf(left.x, right.x, fmaf(left.y, right.y, sum));
  }
  return sum_of_four(sum);
}

}  // namespace megatron_keye::sparse_attention
