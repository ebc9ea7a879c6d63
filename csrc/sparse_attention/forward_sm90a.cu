// SPDX-License-Identifier: Apache-2.0
// Sparse attention forward on the tensor cores of Hopper.
// A thread block attends for the queries of one tile and one group: it walks over the union of
// their selections in tiles of 64 keys, each loaded once for all of them, and masks by bits what a
// query did not select. One warpgroup gathers keys and values, the others multiply, each only with
// tiles that its own queries need: queries stay in registers, and while the tensor cores add one
// tile's weighted values, the softmax of the next tile runs.
// Groups are outermost in the grid: one group's keys and values fit into the L2 cache where those
// of all groups do not.

#include "sparse_attention/block.cuh"
#include "sparse_attention/params.h"
#include "sparse_attention/sizes.cuh"
#include "sparse_attention/softmax.cuh"
#include "sparse_attention/sort.cuh"
#include "support/launch.h"
#include "support/register_products_sm90a.cuh"

namespace megatron_keye::sparse_attention {

namespace {

// What a consumer warpgroup keeps in registers.
template <typename Cut>
class Attention {
  static constexpr int kSteps = Cut::kChannels / kTerms;
  static constexpr int kSums = Cut::kChannels / 2;  // of the accumulator, in a thread

 public:
  __device__ __forceinline__ Attention(const ForwardParams& params, const Place<Cut>& place)
      : params_(params) {
    const int row = (static_cast<int>(threadIdx.x) - kWarpgroup) / 32 * kWarpRows +
                    lane_of_warp() / 4;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      query_[i] = place.first_query + (row + 8 * i) / Cut::kHeads;
      head_[i] = place.group * Cut::kHeads + (row + 8 * i) % Cut::kHeads;
    }
    load_queries();
  }

  // Starts the products of the queries with a tile's keys.
  __device__ __forceinline__ void start_logits(uint32_t tile) {
    const uint64_t keys = tile_descriptor(tile);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      multiply_registers<Major::kTerms>(logits_, q_[step], keys + terms_step(step, kHalfBytes),
                                        step > 0);
    }
    commit_products();
  }

  // Starts to add the values of a tile by their weights.
  __device__ __forceinline__ void start_values(uint32_t tile) {
    const uint64_t values = columns_descriptor(tile, kHalfBytes);
#pragma unroll
    for (int step = 0; step < kTileKeys / kTerms; ++step) {
      multiply_registers<Major::kColumns>(acc_, weights_[step], values + kColumnsStep * step,
                                          true);
    }
    commit_products();
  }

  template <int kPending>
  __device__ __forceinline__ void wait_for_logits() {
    wait_for_products<kPending>(logits_);
  }

  __device__ __forceinline__ void wait_for_values() { wait_for_products<0>(acc_); }

  // Turns logits into weights, which stay in place; while values may still be added.
  __device__ __forceinline__ void weigh(const uint32_t (&bits)[2]) {
    mask(logits_, bits);
    has_to_scale_ = softmax_.take(logits_, params_.problem.scale_log2);
  }

  // Makes the weights the next left factor; no product is under way.
  __device__ __forceinline__ void turn() {
#pragma unroll
    for (int i = 0; i < kLogits; i += 2) {
      weights_[i / 8][i % 8 / 2] = packed(logits_[i], logits_[i + 1]);
    }
    if (has_to_scale_) {
#pragma unroll
      for (int i = 0; i < kSums; ++i) {
        acc_[i] *= softmax_.rescale[i / 2 % 2];
      }
    }
  }

  __device__ __forceinline__ void store() const {
    const int num_heads = params_.problem.num_groups * Cut::kHeads;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float sum = softmax_.whole_sum(i);  // by all threads of the warp
      if (query_[i] >= params_.problem.num_queries) {
        continue;
      }
      const int64_t row = int64_t{query_[i]} * num_heads + head_[i];
      const float factor = sum > 0.0f ? 1.0f / sum : 1.0f;
      auto* const out = reinterpret_cast<uint32_t*>(params_.out + row * Cut::kChannels);
#pragma unroll
      for (int j = 0; j < kSums / 4; ++j) {
        const int at = 4 * j + 2 * i;
        out[4 * j + lane_of_warp() % 4] = packed(acc_[at] * factor, acc_[at + 1] * factor);
      }
      if (lane_of_warp() % 4 == 0) {
        params_.lse[row] = sum > 0.0f ? softmax_.m[i] + log2f(sum) : INFINITY;
      }
    }
  }

 private:
  __device__ __forceinline__ void load_queries() {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const bool is_real = query_[i] < params_.problem.num_queries;
      const auto* const row = reinterpret_cast<const uint32_t*>(
          params_.problem.q + (is_real ? query_[i] : 0) * params_.problem.q_stride_t +
          head_[i] * params_.problem.q_stride_h);
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        const int word = step * (kTerms / 2) + lane_of_warp() % 4;
        q_[step][i] = is_real ? row[word] : 0;
        q_[step][i + 2] = is_real ? row[word + 4] : 0;
      }
    }
  }

  const ForwardParams& params_;
  int query_[2];
  int head_[2];
  uint32_t q_[kSteps][4];
  float logits_[kLogits];
  uint32_t weights_[kTileKeys / kTerms][4];
  float acc_[kSums] = {};
  Softmax softmax_;
  bool has_to_scale_ = false;
};

// What the other warpgroups do.
template <typename Cut>
__device__ __forceinline__ void attend(const ForwardParams& params, const Place<Cut>& place,
                                       Shared<Cut>& shared) {
  Attention<Cut> attention(params, place);
  const int own =  // as a TileKind
      __reduce_max_sync(kWholeWarp, static_cast<int>(threadIdx.x) / kWarpgroup - 1);
  typename Shared<Cut>::Reader reader;
  RingPlace<Cut::kStages> here;
  RingPlace<Cut::kStages> next;
  // Once for each run of tiles within reach of each other, most often once.
#pragma unroll 1
  while (shared.find_tile(own, Shared<Cut>::kNone, reader, here)) {
    int held = reader.num_read - 1;  // the tile that is released next
    uint32_t bits[2];
    begin_products();
    attention.start_logits(shared.keys(here));
    find_bits(place, shared.masks[here.stage], bits);
    attention.template wait_for_logits<0>();
    attention.weigh(bits);
    bool has_next = shared.find_tile(own, held, reader, next);
    attention.turn();
#pragma unroll 1
    while (has_next) {
      begin_products();
      attention.start_logits(shared.keys(next));
      attention.start_values(shared.values(here));
      find_bits(place, shared.masks[next.stage], bits);
      attention.template wait_for_logits<1>();
      attention.weigh(bits);
      const RingPlace<Cut::kStages> done = here;
      here = next;
      const int number = reader.num_read - 1;
      // Here, since its loop keeps the compiler from moving the weighing behind the next line.
      has_next = shared.find_tile(own, held, reader, next);
      held = number;
      attention.wait_for_values();
      shared.release(done);
      attention.turn();
    }
    begin_products();
    attention.start_values(shared.values(here));
    attention.wait_for_values();
    shared.release(here);
  }
  attention.store();
}

template <typename Cut>
__global__ void __launch_bounds__(Cut::kThreads, Cut::kResident)
    forward_kernel(const __grid_constant__ ForwardParams params) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL  // built for others too, but never launched there
  extern __shared__ __align__(1024) unsigned char shared_bytes[];
  auto& shared = *reinterpret_cast<Shared<Cut>*>(shared_bytes);
  shared.make_barriers();
  const Place<Cut> place(params.problem, blockIdx.x, blockIdx.y);
  if (threadIdx.x < kWarpgroup) {
    give_registers_down_to<Cut::kProducerRegisters>();
    gather(params.problem, place, shared);
  } else {
    take_registers_up_to<Cut::kConsumerRegisters>();
    attend(params, place, shared);
  }
#endif
}

template <int kChannels, int kHeads>
void launch_block(const ForwardParams& params) {
  using Cut = Block<kChannels, kHeads>;
  const int tiles = (params.problem.num_queries + kTileQueries - 1) / kTileQueries;
  launch(forward_kernel<Cut>, dim3(tiles * Cut::kParts, params.problem.num_groups),
         dim3(Cut::kThreads), static_cast<int>(sizeof(Shared<Cut>)), params);
}

}  // namespace

void launch_forward(const ForwardParams& params) {
  with_sizes(params.problem, [&]<int kChannels, int kHeads>() {
    launch_block<kChannels, kHeads>(params);
  });
}

}  // namespace megatron_keye::sparse_attention
