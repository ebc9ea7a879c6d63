// SPDX-License-Identifier: Apache-2.0
// The loss pass of a consumer warpgroup: the attention's weights of a tile, averaged over the heads
// of a group, and what the indexer learns from them.
#pragma once

#include <cfloat>

#include "sparse_attention/loss_block.cuh"
#include "sparse_attention/softmax.cuh"

namespace megatron_keye::sparse_attention {

// The hardware's logarithm: its absolute error is 2^-22 for values between 0.5 and 2, its relative
// one 2^-22 elsewhere.
__device__ __forceinline__ float fast_log2(float x) {
  float result;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// Adds what this lane and the one that differs in `lane_bit` hold; the lane with the bit keeps the
// sums of the second half of the values, the other those of the first.
template <int kCount, int kSize>
__device__ __forceinline__ void add_halves(float (&values)[kSize], int lane_bit) {
  const bool keeps_second = (lane_of_warp() & lane_bit) != 0;
#pragma unroll
  for (int i = 0; i < kCount / 2; ++i) {
    const float first = values[i];
    const float second = values[i + kCount / 2];
    values[i] = (keeps_second ? second : first) +
                __shfl_xor_sync(kWholeWarp, keeps_second ? first : second, lane_bit);
  }
}

// What a consumer warpgroup keeps in registers. A thread ends up with the weights of `kOwnQueries`
// queries for two keys of a tile, 8 apart: value 2 * query + i.
template <typename Cut>
class Comparison {
  static constexpr int kSteps = Cut::kChannels / kTerms;
  static constexpr int kValues = 2 * Cut::kOwnQueries;
  static constexpr float kLog2E = 1.4426950408889634f;
  static constexpr float kLn2 = 0.6931471805599453f;

 public:
  __device__ __forceinline__ Comparison(const LossParams& params, const Place<Cut>& place,
                                        LossShared<Cut>& shared)
      : params_(params), place_(place), shared_(shared) {
    const int64_t first = int64_t{place.first_query} * params.num_selected;
    scores_ = params.scores + first;
    dscores_ = params.dscores + first;
#pragma unroll
    for (int i = 0; i < Cut::kOwnQueries; ++i) {
      const int query = place.first_query + own_query(i);
      const bool is_real = query < params.problem.num_queries;
      score_lse_[i] = is_real ? params.score_lse[query] : 0.0f;
      dkl_[i] = is_real ? params.dkl[query] : 0.0f;
#pragma unroll
      for (int group = 0; group < kLossGroups; ++group) {
        shared.divergence[group][thread()][i] = 0.0f;
      }
    }
  }

  // Starts the products of a tile's keys with the columns of the same group.
  __device__ __forceinline__ void start_logits(uint32_t keys, int group) {
    const uint64_t left = tile_descriptor(keys);
    const uint64_t right = tile_descriptor(shared_address(shared_.columns[group]));
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      multiply_shared<Major::kTerms, Major::kTerms>(
          logits_, left + terms_step(step, kHalfBytes),
          right + terms_step(step, Cut::kHalfColumnsBytes), step > 0);
    }
    commit_products();
  }
  __device__ __forceinline__ void wait_for_logits() { wait_for_products<0>(logits_); }

  // Begins a tile: starts to load what belongs to its selected keys; products may be under way.
  __device__ __forceinline__ void load(const Slots (&slots)[kWarpgroup / 32][Cut::kQueries]) {
    const int warp = static_cast<int>(threadIdx.x) % kWarpgroup / 32;
#pragma unroll
    for (int query = 0; query < Cut::kOwnQueries; ++query) {
      const Slots found = slots[warp][own_query(query)];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int at = 2 * query + i;
        const int key = lane_of_warp() / kLanesOfRow + 8 * i;
        offset_[at] = found.has(key)
                          ? own_query(query) * params_.num_selected + found.place(key)
                          : -1;
        score_[at] = found.has(key) ? scores_[offset_[at]] : 0.0f;
        dscore_[at] = found.has(key) ? dscores_[offset_[at]] : 0.0f;
        weight_[at] = 0.0f;
      }
    }
  }

  // Turns logits into weights, averages them over the heads and compares them with the scores.
  __device__ __forceinline__ void compare(int group) {
    float sums[2 * Cut::kQueries];
    add_heads(shared_.lse[group], sums);
    add_halves<2 * Cut::kQueries>(sums, 2);
    add_halves<Cut::kQueries>(sums, 1);
    float (&divergence)[Cut::kOwnQueries] = shared_.divergence[group][thread()];
#pragma unroll
    for (int query = 0; query < Cut::kOwnQueries; ++query) {
      float sum = 0.0f;
#pragma unroll
      for (int at = 2 * query; at < 2 * query + 2; ++at) {
        // Of a key that the query did not select the sum may be infinite.
        const float weight = offset_[at] >= 0 ? sums[at] * (1.0f / Cut::kHeads) : 0.0f;
        const float log_score = fmaf(score_[at], kLog2E, -score_lse_[query]);
        // Of a weight of 0 the term is 0, whatever finite its logarithm.
        const float log_weight = fast_log2(fmaxf(weight, FLT_MIN));
        sum = fmaf(weight, log_weight - log_score, sum);
        weight_[at] += weight;
      }
      divergence[query] += sum;
    }
  }

  // Ends a tile: stores its part of the scores' gradient.
  __device__ __forceinline__ void store_gradient() {
#pragma unroll
    for (int at = 0; at < kValues; ++at) {
      if (offset_[at] >= 0) {
        dscores_[offset_[at]] = fmaf(-dkl_[at / 2], weight_[at], dscore_[at]);
      }
    }
  }

  // Stores this warp's part of each query's divergence.
  __device__ __forceinline__ void store_divergence(int num_groups) const {
    const int64_t num_queries = params_.problem.num_queries;
#pragma unroll 1
    for (int group = 0; group < num_groups; ++group) {
      const int64_t part = int64_t{place_.group + group} * kLossParts + thread() / 32;
#pragma unroll
      for (int i = 0; i < Cut::kOwnQueries; ++i) {
        float sum = shared_.divergence[group][thread()][i];
#pragma unroll
        for (int lane_bit = kLanesOfRow; lane_bit < 32; lane_bit *= 2) {
          sum += __shfl_xor_sync(kWholeWarp, sum, lane_bit);
        }
        const int query = place_.first_query + own_query(i);
        if (lane_of_warp() < kLanesOfRow && query < num_queries) {
          params_.divergence[part * num_queries + query] = sum * kLn2;
        }
      }
    }
  }

 private:
  // Number of the thread, counted from the first consumer's.
  __device__ __forceinline__ static int thread() {
    return static_cast<int>(threadIdx.x) - kWarpgroup;
  }
  __device__ __forceinline__ static int own_query(int i) {
    return lane_of_warp() % kLanesOfRow * Cut::kOwnQueries + i;
  }

  // sums[2 * query + i] = the sum of a query's weights over the heads that this thread has.
  __device__ __forceinline__ void add_heads(const float* lse,
                                            float (&sums)[2 * Cut::kQueries]) const {
    const auto* const own_lse = reinterpret_cast<const float4*>(
        lse + lane_of_warp() % kLanesOfRow * Cut::kLsePitch);
#pragma unroll
    for (int four = 0; four < Cut::kOwnColumns / 4; ++four) {
      const float4 vector = own_lse[four];
      const float lse_of[4] = {vector.x, vector.y, vector.z, vector.w};
#pragma unroll
      for (int at = 0; at < 8; ++at) {
        const int number = 4 * four + at / 2;
        const int i = at % 2;
        const float logit = logits_[number / 2 * 4 + 2 * i + number % 2];
        const float weight =
            power_of_two(fmaf(logit, params_.problem.scale_log2, -lse_of[at / 2]));
        float& sum = sums[number / Cut::kOwnHeads * 2 + i];
        sum = number % Cut::kOwnHeads == 0 ? weight : sum + weight;
      }
    }
  }

  const LossParams& params_;
  const Place<Cut>& place_;
  LossShared<Cut>& shared_;
  const float* scores_;  // of the block's first query, like the next
  float* dscores_;
  float score_lse_[Cut::kOwnQueries];
  float dkl_[Cut::kOwnQueries];
  float logits_[Cut::kColumns / 2];
  // Of a tile.
  int offset_[kValues];  // from the block's first row of the selection; -1 where not selected
  float score_[kValues];
  float dscore_[kValues];
  float weight_[kValues];  // summed over the groups
};

}  // namespace megatron_keye::sparse_attention
