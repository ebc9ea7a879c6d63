// SPDX-License-Identifier: Apache-2.0
// Host side of the lightning indexer: checks the tensors, cuts the queries into chunks, launches.
// No check here reads device memory.

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>

#include <algorithm>
#include <optional>

#include "lightning_indexer/lightning_indexer.h"
#include "lightning_indexer/params.h"
#include "support/check.h"

namespace megatron_keye {

namespace {

using namespace indexer;

constexpr int64_t kKeptBytes = kRowFloats * sizeof(float);
static_assert(kKeptBytes >= kParts * kPartCandidates * sizeof(Candidate));

int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

void check_arguments(const at::Tensor& q_TIJ, const at::Tensor& k_SJ,
                     const std::optional<at::Tensor>& key_scale_S, const at::Tensor& gate_TI,
                     const at::Tensor& key_start_T, const at::Tensor& key_end_T, int64_t k) {
  check_cuda(q_TIJ, "q_TIJ");
  check_num_dims(q_TIJ, "q_TIJ", 3);
  check_num_dims(k_SJ, "k_SJ", 2);
  check_num_dims(gate_TI, "gate_TI", 2);
  const at::ScalarType dtype = key_scale_S ? at::kFloat8_e4m3fn : at::kBFloat16;
  check_dtype(q_TIJ, "q_TIJ", dtype);
  check_dtype(k_SJ, "k_SJ", dtype);
  check_dtype(gate_TI, "gate_TI", at::kFloat);
  check_size(q_TIJ, "q_TIJ", 2, kChannels);
  check_size(k_SJ, "k_SJ", 1, kChannels);
  if (key_scale_S) {
    check_dtype(*key_scale_S, "key_scale_S", at::kFloat);
    check_num_dims(*key_scale_S, "key_scale_S", 1);
    check_size(*key_scale_S, "key_scale_S", 0, k_SJ.size(0));
  }
  check_size(gate_TI, "gate_TI", 0, q_TIJ.size(0));
  check_size(gate_TI, "gate_TI", 1, q_TIJ.size(1));
  check_bound(key_start_T, "key_start_T", q_TIJ, "q_TIJ");
  check_bound(key_end_T, "key_end_T", q_TIJ, "q_TIJ");
  for (const auto& [tensor, name] :
       {std::pair{q_TIJ, "q_TIJ"}, std::pair{k_SJ, "k_SJ"}, std::pair{gate_TI, "gate_TI"},
        std::pair{key_scale_S.value_or(q_TIJ), "key_scale_S"},
        std::pair{key_start_T, "key_start_T"}, std::pair{key_end_T, "key_end_T"}}) {
    check_same_device(tensor, name, q_TIJ, "q_TIJ");
    check_contiguous(tensor, name);
  }
  const int64_t num_heads = q_TIJ.size(1);
  TORCH_CHECK_VALUE(num_heads >= 1 && num_heads <= kMaxHeads, "q_TIJ: got ", num_heads,
                    " heads, expected 1 to ", kMaxHeads);
  TORCH_CHECK_VALUE(k_SJ.size(0) <= kMaxKeys, "k_SJ: got ", k_SJ.size(0),
                    " keys, expected at most ", kMaxKeys);
  TORCH_CHECK_VALUE(k >= 1 && k <= kMaxSelected, "k: got ", k, ", expected 1 to ", kMaxSelected);
}

int count_multiprocessors() {
  int count = 0;
  C10_CUDA_CHECK(
      cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, c10::cuda::current_device()));
  return count;
}

// Queries of one chunk, as many whole waves of thread blocks as the scratch memory holds.
int64_t rows_of_chunk(int64_t row_bytes, int64_t scratch_bytes, int num_multiprocessors) {
  const int64_t fitting = std::max<int64_t>(scratch_bytes / row_bytes, kBlockRows);
  const int64_t wave = int64_t{kBlockRows} * num_multiprocessors;
  const int64_t multiple = fitting >= wave ? wave : kBlockRows;
  return fitting / multiple * multiple;
}

struct Keys {
  const uint4* k;
  const float* scale;  // null beside bfloat16
  int num_keys;
};

// What all chunks share, and the scratch memory, which each step of a chunk reuses.
struct Workspace {
  ScoreParams scores;
  SelectParams select;
  Keys keys;
  Keys sampled;
  int64_t scratch_bytes;
};

void score(Workspace& work, Scores which) {
  const Keys& keys = which == Scores::kSampled ? work.sampled : work.keys;
  work.scores.k = keys.k;
  work.scores.key_scale = keys.scale;
  work.scores.num_scored = keys.num_keys;
  work.scores.score_stride = work.select.score_stride =
      which == Scores::kCandidates ? kRowFloats : round_up(work.scores.num_scored, kTileKeys);
  work.scores.rows = work.select.rows;
  launch_scores(which, work.scores);
}

// Selects for rows with too few or too many candidates, as many at once as the scratch memory
// holds. Only the device knows how many there are, so launches without any row end at once.
void select_failed(Workspace work) {
  const int num_rows = work.select.rows.num_rows;
  const int64_t row_bytes = round_up(work.keys.num_keys, kTileKeys) * sizeof(float);
  const auto fitting = static_cast<int>(work.scratch_bytes / row_bytes / kBlockRows * kBlockRows);
  work.select.rows.rows = work.select.failed;
  work.select.rows.num_listed = work.select.num_failed;
  for (int first = 0; first < num_rows; first += fitting) {
    work.select.rows.first_row = first;
    work.select.rows.num_rows = std::min(fitting, num_rows - first);
    score(work, Scores::kListed);
    launch_select_listed(work.select);
  }
}

}  // namespace

at::Tensor lightning_indexer(const at::Tensor& q_TIJ, const at::Tensor& k_SJ,
                             const std::optional<at::Tensor>& key_scale_S,
                             const at::Tensor& gate_TI, const at::Tensor& key_start_T,
                             const at::Tensor& key_end_T, int64_t k, int64_t scratch_bytes) {
  check_arguments(q_TIJ, k_SJ, key_scale_S, gate_TI, key_start_T, key_end_T, k);
  const c10::cuda::CUDAGuard guard(q_TIJ.device());
  const int64_t num_queries = q_TIJ.size(0);
  const int64_t num_keys = k_SJ.size(0);
  const int64_t num_sampled = num_sampled_keys(static_cast<int>(num_keys));
  at::Tensor indices_TK = at::empty({num_queries, k}, q_TIJ.options().dtype(at::kInt));
  if (num_queries == 0) {
    return indices_TK;
  }
  const int64_t sampled_bytes = round_up(num_sampled, kTileKeys) * sizeof(float);
  const int64_t row_bytes = std::max(kKeptBytes, sampled_bytes);
  const int num_multiprocessors = count_multiprocessors();
  const int64_t num_rows = std::min(rows_of_chunk(row_bytes, scratch_bytes, num_multiprocessors),
                                    round_up(num_queries, kBlockRows));
  const int64_t listed_bytes = kBlockRows * round_up(num_keys, kTileKeys) * sizeof(float);
  const int64_t bytes = std::max(num_rows * row_bytes, listed_bytes);
  at::Tensor scratch = at::empty({bytes}, q_TIJ.options().dtype(at::kByte));
  at::Tensor sample_SJ = at::empty({num_sampled, kChannels}, k_SJ.options());
  at::Tensor sample_scale_S = at::empty({key_scale_S ? num_sampled : 0}, gate_TI.options());
  at::Tensor thresholds_T = at::empty({num_rows}, gate_TI.options());
  at::Tensor counts_T = at::empty({num_rows * kParts}, indices_TK.options());
  at::Tensor failed_T = at::empty({num_rows}, indices_TK.options());
  at::Tensor num_failed = at::empty({1}, indices_TK.options());

  Workspace work{};
  auto* const sample = static_cast<uint4*>(sample_SJ.mutable_data_ptr());
  auto* const sample_scale = sample_scale_S.mutable_data_ptr<float>();
  work.keys = {.k = static_cast<const uint4*>(k_SJ.const_data_ptr()),
               .scale = key_scale_S ? key_scale_S->const_data_ptr<float>() : nullptr,
               .num_keys = static_cast<int>(num_keys)};
  work.sampled = {.k = sample, .scale = sample_scale, .num_keys = static_cast<int>(num_sampled)};
  work.scratch_bytes = bytes;
  auto* const scores = static_cast<float*>(scratch.mutable_data_ptr());
  work.scores = {.are_e4m3 = key_scale_S.has_value(),
                 .q = static_cast<const uint4*>(q_TIJ.const_data_ptr()),
                 .k = work.keys.k,
                 .key_scale = work.keys.scale,
                 .gate = gate_TI.const_data_ptr<float>(),
                 .num_heads = static_cast<int>(q_TIJ.size(1)),
                 .num_multiprocessors = num_multiprocessors,
                 .scores = scores,
                 .thresholds = thresholds_T.const_data_ptr<float>(),
                 .num_candidates = counts_T.mutable_data_ptr<int>()};
  work.select = {.rows = {.key_start = key_start_T.const_data_ptr<int64_t>(),
                          .key_end = key_end_T.const_data_ptr<int64_t>(),
                          .num_keys = work.keys.num_keys},
                 .k = static_cast<int>(k),
                 .scores = scores,
                 .thresholds = thresholds_T.mutable_data_ptr<float>(),
                 .num_candidates = counts_T.const_data_ptr<int>(),
                 .indices = indices_TK.mutable_data_ptr<int>(),
                 .failed = failed_T.mutable_data_ptr<int>(),
                 .num_failed = num_failed.mutable_data_ptr<int>()};
  if (num_sampled > 0) {
    launch_sample_keys(work.scores, work.sampled.num_keys, sample, sample_scale);
  }
  // The first chunk is the odd one: in a causal sequence its rows are the shortest.
  for (int64_t last = (num_queries - 1) % num_rows + 1, first = 0; first < num_queries;
       first = last, last += num_rows) {
    work.select.rows.first_row = static_cast<int>(first);
    work.select.rows.num_rows = static_cast<int>(last - first);
    num_failed.zero_();
    score(work, Scores::kSampled);
    launch_find_thresholds(work.select);
    score(work, Scores::kCandidates);
    launch_select_candidates(work.select);
    select_failed(work);
  }
  return indices_TK;
}

}  // namespace megatron_keye
