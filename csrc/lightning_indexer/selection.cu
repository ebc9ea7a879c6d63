// SPDX-License-Identifier: Apache-2.0
// Selection by the lightning indexer: one thread block per row.
// A sample of a row's scores gives a threshold that about k keys and a safe margin pass. Of those
// that did, the exact k are found in shared memory. Rows of which too few or too many passed are
// listed; their scores are written and selected from like those of any other matrix.

#include "lightning_indexer/params.h"
#include "lightning_indexer/rows.cuh"
#include "select_top_k/row.cuh"
#include "support/launch.h"

namespace megatron_keye::indexer {

namespace {

constexpr int kUnsampled = 4096;  // rows of at most so many keys fit as candidates, all of them
constexpr int kTilesOfPart = (kUnsampled / kTileKeys + kHalves) / kHalves;
static_assert((kTilesOfPart + 1) * kTileKeys / kLanes <= kPartCandidates, "in each part, too");
static_assert(kParts * kPartCandidates == top_k::kCandidates, "the buffer holds all parts");
static_assert(kMaxKeys == top_k::kMaxMarkedKeys, "one bit per key");
static_assert(kMaxSelected <= top_k::kCandidates / 2, "or the margin is too small");

__global__ void __launch_bounds__(top_k::kThreads) find_thresholds_kernel(SelectParams params) {
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  auto& shared = *reinterpret_cast<top_k::Shared*>(shared_bytes);
  const int place = static_cast<int>(blockIdx.x);
  const KeyRange range = range_of(params.rows, query_at(params.rows, place));
  float threshold = __int_as_float(0x7FFFFFFF);  // a row that takes all its keys needs no scores
  if (range.size() > params.k) {
    threshold = __int_as_float(0xFF800000);  // -inf
    const KeyRange sampled = sampled_range(range);
    const int step = (sampled.size() + top_k::kMaxBuffered - 1) / top_k::kMaxBuffered;
    const int num_sampled = sampled.size() / max(step, 1);
    const float stride = static_cast<float>(range.size()) / static_cast<float>(num_sampled);
    const uint32_t rank = top_k::sample_rank(params.k, stride);
    if (range.size() > kUnsampled && rank < static_cast<uint32_t>(num_sampled)) {
      const float* const scores = params.scores + place * params.score_stride + sampled.start;
      for (int i = threadIdx.x; i < num_sampled; i += top_k::kThreads) {
        shared.candidates[i] = top_k::ordered_key(scores[i * step]);
      }
      __syncthreads();
      threshold =
          top_k::score_of(top_k::sampled_threshold(shared, shared.candidates, num_sampled, rank));
    }
  }
  if (threadIdx.x == 0) {
    params.thresholds[place] = threshold;
  }
}

__global__ void __launch_bounds__(top_k::kThreads) select_candidates_kernel(SelectParams params) {
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  auto& shared = *reinterpret_cast<top_k::Shared*>(shared_bytes);
  const int place = static_cast<int>(blockIdx.x);
  const int query = query_at(params.rows, place);
  const KeyRange range = range_of(params.rows, query);
  int* const indices = params.indices + int64_t{query} * params.k;
  if (range.size() <= params.k) {
    top_k::take_all(range.start, range.end, params.k, indices);
    return;
  }
  const int* const counts = params.num_candidates + place * kParts;
  const float* const kept = params.scores + int64_t{place} * kRowFloats;
  if (counts[0] == kAllScores) {
    const top_k::Row row{.scores = kept - counts[1], .start = range.start, .end = range.end};
    top_k::select_row(shared, row, params.k, indices);
    return;
  }
  constexpr int kPartWarps = top_k::kWarps / kParts;  // that read a part
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int owned_part = warp / kPartWarps;
  int num_candidates = 0;
  int most = 0;
  int first = 0;  // candidate of the owned part
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
    first = part == owned_part ? num_candidates : first;
    num_candidates += counts[part];
    most = max(most, counts[part]);
  }
  if (num_candidates < params.k || most > kPartCandidates) {
    if (threadIdx.x == 0) {
      params.failed[atomicAdd(params.num_failed, 1)] = query;
    }
    return;
  }
  const auto* const candidates =
      reinterpret_cast<const Candidate*>(kept) + owned_part * kPartCandidates;
  for (int i = static_cast<int>(threadIdx.x) % (kPartWarps * 32); i < counts[owned_part];
       i += kPartWarps * 32) {
    shared.candidates[first + i] = top_k::ordered_key(candidates[i].score);
    shared.places[first + i] = candidates[i].key - range.start;
  }
  __syncthreads();
  const top_k::Cut cut =
      top_k::find_cut_in_buffer(shared, shared.candidates, num_candidates, params.k);
  top_k::write_buffered(shared, cut, num_candidates, range.size(), range.start, indices);
}

__global__ void __launch_bounds__(top_k::kThreads) select_listed_kernel(SelectParams params) {
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  auto& shared = *reinterpret_cast<top_k::Shared*>(shared_bytes);
  const int place = static_cast<int>(blockIdx.x);
  const int query = query_at(params.rows, place);
  if (query < 0) {
    return;
  }
  const KeyRange range = range_of(params.rows, query);
  const top_k::Row row{.scores = params.scores + place * params.score_stride,
                       .start = range.start,
                       .end = range.end};
  top_k::select_row(shared, row, params.k, params.indices + int64_t{query} * params.k);
}

void launch_rows(void (*kernel)(SelectParams), const SelectParams& params) {
  launch(kernel, dim3(params.rows.num_rows), dim3(top_k::kThreads),
         static_cast<int>(sizeof(top_k::Shared)), params);
}

}  // namespace

void launch_find_thresholds(const SelectParams& params) {
  launch_rows(find_thresholds_kernel, params);
}

void launch_select_candidates(const SelectParams& params) {
  launch_rows(select_candidates_kernel, params);
}

void launch_select_listed(const SelectParams& params) {
  launch_rows(select_listed_kernel, params);
}

}  // namespace megatron_keye::indexer
