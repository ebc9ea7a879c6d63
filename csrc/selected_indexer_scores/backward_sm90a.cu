// SPDX-License-Identifier: Apache-2.0
// Backward pass of the selected scores on the tensor cores of Hopper.
// A thread block computes the products of 16 queries' heads with their union's keys again, 64 keys
// at a time, turns them into gradients of those products, and adds to dq in registers. Through
// shared memory the same gradients become, by keys, the left factor of dk, which leaves in bulk:
// once a tile of keys for all queries and heads. Consumers multiply dk by turns.

#include "selected_indexer_scores/block.cuh"
#include "support/launch.h"

namespace megatron_keye::selected_indexer_scores {

namespace {

constexpr int kConsumersBarrier = 1;
constexpr int kSteps = Cut::kChannels / kTerms;

// What the first warpgroup does: brings the union tile by tile, its keys and words read ahead.
__device__ __forceinline__ void gather_tiles(const Problem& problem, const Place<Cut>& place,
                                             Shared& shared) {
  const Gatherer<Cut> gatherer(problem, place);
  Counter<Cut> counter(place);
  const int row = gatherer.first_row() + lane_of_warp() % kWarpRows;
  int key;
  uint32_t words[2];
  const auto read = [&](int first) {
    key = first + row < place.num_keys ? problem.keys[place.first_union + first + row] : -1;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int at = first + 32 * i + lane_of_warp();
      words[i] = at < place.num_keys ? problem.masks[place.first_union + at] : 0;
    }
  };
  RingPlace<Cut::kStages> ring;
  read(0);
#pragma unroll 1
  for (int first = 0; first < place.num_keys; first += kTileKeys) {
    shared.await_room(ring);
    gatherer.copy_keys(key, 0, shared_address(shared.keys[ring.stage]));
    if (lane_of_warp() < kWarpRows) {
      shared.key[ring.stage][row] = key;
    }
    counter.take(words, shared.slots[ring.stage]);
    shared.announce(ring);
    ring.advance();
    read(first + kTileKeys);
  }
  wait_for_all_copies();
}

// Number of a consumer's thread, counted from the first consumer's.
__device__ __forceinline__ int consumer_thread() {
  return static_cast<int>(threadIdx.x) - kWarpgroup;
}

// Brings the rows of q, zeros where there is no query; consumers use them after a barrier.
__device__ __forceinline__ void load_rows(const Problem& problem, const Place<Cut>& place,
                                          Shared& shared) {
  constexpr int kVectorChannels = 16 / sizeof(__nv_bfloat16);
  constexpr int kRowVectors = Cut::kChannels / kVectorChannels;
#pragma unroll 2
  for (int i = consumer_thread(); i < Cut::kRows * kRowVectors;
       i += Cut::kConsumers * kWarpgroup) {
    const int row = i / kRowVectors;
    const int vector = i % kRowVectors;
    const int query = place.first_query + row / Cut::kHeads;
    const bool is_real = query < problem.num_queries;
    const int64_t offset = (is_real ? query : 0) * problem.q_stride_t +
                           row % Cut::kHeads * problem.q_stride_h + vector * kVectorChannels;
    copy_16_async(shared_address(shared.q) + swizzled(row, vector), problem.q + offset, is_real);
  }
  wait_for_all_copies();
  publish_to_tensor_cores();
}

// What a consumer warpgroup keeps in registers. In a run a warp has the heads of one query, a
// thread two of them, 8 apart.
class Gradients {
 public:
  __device__ __forceinline__ Gradients(const BackwardParams& params, const Place<Cut>& place,
                                       Shared& shared)
      : params_(params), place_(place), shared_(shared) {
#pragma unroll
    for (int run = 0; run < kRuns; ++run) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        weight_[run][i] = is_real(run) ? params.gate[gate_place(run, i)] * params.scale : 0.0f;
      }
    }
  }

  __device__ __forceinline__ void start_dots(uint32_t keys) {
    const uint64_t right = tile_descriptor(keys);
#pragma unroll
    for (int run = 0; run < kRuns; ++run) {
      const uint64_t left = tile_descriptor(shared_address(shared_.q) + first_byte(run));
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        multiply_shared<Major::kTerms, Major::kTerms>(dots_[run], left + terms_step(step, 0),
                                                      right + terms_step(step, 0), step > 0);
      }
    }
    commit_products();
  }
  __device__ __forceinline__ void wait_for_dots() {
    wait_for_products<0>(dots_[0]);
    wait_for_products<0>(dots_[1]);
  }

  // Brings the gradients of a tile's scores to where all lanes of a warp find them.
  __device__ __forceinline__ void load_dscores(
      const Slots (&slots)[kWarpgroup / 32][Cut::kQueries]) {
    float dscore[kRuns][2];
#pragma unroll
    for (int run = 0; run < kRuns; ++run) {
      const float* const row =
          params_.dscores + int64_t{place_.first_query + query(run)} * params_.num_selected;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const Slots found = slots[2 * half + lane_of_warp() / kWarpRows][query(run)];
        const int key = lane_of_warp() % kWarpRows;
        dscore[run][half] = found.has(key) ? row[found.place(key)] : 0.0f;
      }
    }
    __syncwarp();  // those of the tile before are read
#pragma unroll
    for (int run = 0; run < kRuns; ++run) {
      shared_.dscores[query(run)][lane_of_warp()] = dscore[run][0];
      shared_.dscores[query(run)][32 + lane_of_warp()] = dscore[run][1];
    }
    __syncwarp();
  }

  // Turns products into their gradients, which it stores, and adds to those of the gate.
  __device__ __forceinline__ void differentiate(unsigned char* ddots) {
#pragma unroll
    for (int run = 0; run < kRuns; ++run) {
#pragma unroll
      for (int j = 0; j < kTileKeys / 8; ++j) {
        const float2 dscore = *reinterpret_cast<const float2*>(
            &shared_.dscores[query(run)][product_column(thread(), j)]);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float even = dots_[run][4 * j + 2 * i];
          const float odd = dots_[run][4 * j + 2 * i + 1];
          dgate_[run][i] = fmaf(dscore.x, fmaxf(even, 0.0f), dgate_[run][i]);
          dgate_[run][i] = fmaf(dscore.y, fmaxf(odd, 0.0f), dgate_[run][i]);
          const uint32_t at = first_byte(run) + swizzled(product_row(thread(), i), j) +
                              thread() % 4 * sizeof(uint32_t);
          *reinterpret_cast<uint32_t*>(ddots + at) =
              packed(even > 0.0f ? dscore.x * weight_[run][i] : 0.0f,
                     odd > 0.0f ? dscore.y * weight_[run][i] : 0.0f);
        }
      }
    }
  }

  // Starts to add a tile's keys by the gradients of their products.
  __device__ __forceinline__ void start_dq(uint32_t ddots, uint32_t keys) {
    const uint64_t right = columns_descriptor(keys, kHalfBytes);
#pragma unroll
    for (int run = 0; run < kRuns; ++run) {
      const uint64_t left = tile_descriptor(ddots + first_byte(run));
#pragma unroll
      for (int step = 0; step < kTileKeys / kTerms; ++step) {
        multiply_shared<Major::kTerms, Major::kColumns>(dq_[run], left + terms_step(step, 0),
                                                        right + kColumnsStep * step, true);
      }
    }
    commit_products();
  }
  __device__ __forceinline__ void wait_for_dq() {
    wait_for_products<0>(dq_[0]);
    wait_for_products<0>(dq_[1]);
  }

  // Multiplies a tile's dk, over all rows of the block, and starts to add it to that in memory. A
  // warp sends the 16 keys that it writes, and need not meet others.
  __device__ __forceinline__ void send_dk(uint32_t ddots, const int (&key)[kTileKeys]) {
    float dk[Cut::kChannels / 2];
    const uint64_t left = tile_descriptor(ddots);
    const uint64_t right = columns_descriptor(shared_address(shared_.q), Cut::kRowsBytes);
    begin_products();
#pragma unroll
    for (int step = 0; step < Cut::kRows / kTerms; ++step) {
      multiply_shared<Major::kColumns, Major::kColumns>(dk, left + kColumnsStep * step,
                                                        right + kColumnsStep * step, step > 0);
    }
    commit_products();
    wait_for_products<0>(dk);
    unsigned char* const sums = shared_.sums[consumer_thread() / kWarpgroup];
    wait_for_sources();
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int j = 0; j < Cut::kChannels / 8; ++j) {
        const int at = product_row(thread(), i) * Cut::kPitch +
                       product_column(thread(), j) * static_cast<int>(sizeof(float));
        *reinterpret_cast<float2*>(sums + at) = float2{dk[4 * j + 2 * i], dk[4 * j + 2 * i + 1]};
      }
    }
    publish_to_tensor_cores();
    __syncwarp();
    const int row = thread() / 32 * kWarpRows + lane_of_warp() % kWarpRows;
    if (lane_of_warp() < kWarpRows && key[row] >= 0) {
      add_in_bulk(params_.dk + int64_t{key[row]} * Cut::kChannels,
                  shared_address(sums) + row * Cut::kPitch, Cut::kSumBytes);
    }
    commit_additions();
  }

  __device__ __forceinline__ void store() const {
#pragma unroll
    for (int run = 0; run < kRuns; ++run) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float sum = dgate_[run][i];
        sum += __shfl_xor_sync(kWholeWarp, sum, 1);
        sum += __shfl_xor_sync(kWholeWarp, sum, 2);
        if (is_real(run)) {
          const int64_t place = gate_place(run, i);
          auto* const dq = reinterpret_cast<uint32_t*>(params_.dq + place * Cut::kChannels);
#pragma unroll
          for (int j = 0; j < Cut::kChannels / 8; ++j) {
            dq[4 * j + lane_of_warp() % 4] =
                packed(dq_[run][4 * j + 2 * i], dq_[run][4 * j + 2 * i + 1]);
          }
          if (lane_of_warp() % 4 == 0) {
            params_.dgate[place] = sum * params_.scale;
          }
        }
      }
    }
  }

 private:
  __device__ __forceinline__ static int thread() { return consumer_thread() % kWarpgroup; }

  // The first row of a run, in bytes of a half-tile of rows.
  __device__ __forceinline__ static uint32_t first_byte(int run) {
    return (consumer_thread() / kWarpgroup * kRuns + run) * (kWarpgroupRows * kSwizzleBytes);
  }
  // The query of this warp's rows, counted from the block's first.
  __device__ __forceinline__ static int query(int run) {
    return (consumer_thread() / kWarpgroup * kRuns + run) * (kWarpgroupRows / Cut::kHeads) +
           thread() / 32;
  }
  __device__ __forceinline__ bool is_real(int run) const {
    return place_.first_query + query(run) < params_.problem.num_queries;
  }
  __device__ __forceinline__ int64_t gate_place(int run, int i) const {
    return int64_t{place_.first_query + query(run)} * Cut::kHeads + lane_of_warp() / 4 + 8 * i;
  }

  const BackwardParams& params_;
  const Place<Cut>& place_;
  Shared& shared_;
  float weight_[kRuns][2];  // of the heads, with the scale
  float dgate_[kRuns][2] = {};
  float dots_[kRuns][kTileKeys / 2];
  float dq_[kRuns][Cut::kChannels / 2] = {};
};

// What the other warpgroups do.
__device__ __forceinline__ void differentiate(const BackwardParams& params,
                                              const Place<Cut>& place, Shared& shared) {
  load_rows(params.problem, place, shared);
  Gradients gradients(params, place, shared);
  warpgroup_barrier<Cut::kConsumers * kWarpgroup>(kConsumersBarrier);
  const int consumer =  // by a reduction, whose result the compiler knows to be the warp's
      __reduce_max_sync(kWholeWarp, static_cast<int>(threadIdx.x) / kWarpgroup - 1);
  RingPlace<Cut::kStages> ring;
  int turn = 0;
#pragma unroll 1
  for (int first = 0; first < place.num_keys; first += kTileKeys) {
    shared.await_tile(ring);
    publish_to_tensor_cores();
    begin_products();
    gradients.start_dots(shared_address(shared.keys[ring.stage]));
    gradients.load_dscores(shared.slots[ring.stage]);
    gradients.wait_for_dots();
    // Whoever multiplies dk of the tile before the last from here has met all others since.
    gradients.differentiate(shared.ddots[turn]);
    publish_to_tensor_cores();
    warpgroup_barrier<Cut::kConsumers * kWarpgroup>(kConsumersBarrier);
    const uint32_t ddots = shared_address(shared.ddots[turn]);
    begin_products();
    gradients.start_dq(ddots, shared_address(shared.keys[ring.stage]));
    gradients.wait_for_dq();
    if (turn == consumer) {
      gradients.send_dk(ddots, shared.key[ring.stage]);
    }
    __syncwarp();  // all lanes have read their keys
    shared.release(ring);
    ring.advance();
    turn ^= 1;
  }
  gradients.store();
  wait_for_additions();
}

__global__ void __launch_bounds__(Cut::kThreads, 1)
    backward_of_scores_kernel(const __grid_constant__ BackwardParams params) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL  // built for others too, but never launched there
  extern __shared__ __align__(1024) unsigned char shared_bytes[];
  auto& shared = *reinterpret_cast<Shared*>(shared_bytes);
  if (threadIdx.x == 0) {
    shared.make_barriers(Cut::kConsumers);
  }
  __syncthreads();
  const Place<Cut> place(params.problem, blockIdx.x, 0);
  if (threadIdx.x < kWarpgroup) {
    give_registers_down_to<Cut::kProducerRegisters>();
    gather_tiles(params.problem, place, shared);
  } else {
    take_registers_up_to<Cut::kConsumerRegisters>();
    differentiate(params, place, shared);
  }
#endif
}

}  // namespace

void launch_backward(const BackwardParams& params) {
  const int tiles = (params.problem.num_queries + kTileQueries - 1) / kTileQueries;
  launch(backward_of_scores_kernel, dim3(tiles), dim3(Cut::kThreads),
         static_cast<int>(sizeof(Shared)), params);
}

}  // namespace megatron_keye::selected_indexer_scores
