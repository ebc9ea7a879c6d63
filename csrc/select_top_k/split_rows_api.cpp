// SPDX-License-Identifier: Apache-2.0
// Host side of the top-k selection of split rows: checks the tensors, allocates, launches.
// The contract stands in kernels/select_top_k/cuda.py; no check here reads device memory.

#include <c10/cuda/CUDAGuard.h>

#include <limits>

#include "select_top_k/select_top_k.h"
#include "select_top_k/split_rows.h"
#include "support/check.h"

namespace megatron_keye {

at::Tensor select_top_k_split_rows(const at::Tensor& scores_TS, const at::Tensor& key_end_T,
                                   int64_t k) {
  check_cuda(scores_TS, "scores_TS");
  check_dtype(scores_TS, "scores_TS", at::kFloat);
  check_num_dims(scores_TS, "scores_TS", 2);
  check_bound(key_end_T, "key_end_T", scores_TS, "scores_TS");
  constexpr int64_t kIndexLimit = std::numeric_limits<int32_t>::max();
  TORCH_CHECK_VALUE(k >= 1 && k <= kIndexLimit, "k: got ", k, ", expected 1 to ", kIndexLimit);
  TORCH_CHECK_VALUE(scores_TS.size(1) <= kMaxKeysOfSplitRow, "scores_TS: got rows of ",
                    scores_TS.size(1), " keys, expected at most ", kMaxKeysOfSplitRow);
  TORCH_CHECK_VALUE(scores_TS.size(0) <= kIndexLimit / 8, "scores_TS: got ", scores_TS.size(0),
                    " rows, expected at most ", kIndexLimit / 8, ", eight thread blocks each");

  const c10::cuda::CUDAGuard guard(scores_TS.device());
  const int64_t num_rows = scores_TS.size(0);
  at::Tensor indices_TK = at::empty({num_rows, k}, scores_TS.options().dtype(at::kInt));
  if (num_rows == 0) {
    return indices_TK;
  }
  const at::Tensor rows_TS = scores_TS.contiguous();
  const at::Tensor end_T = key_end_T.contiguous();
  launch_split_rows({
      .scores = rows_TS.const_data_ptr<float>(),
      .key_end = end_T.const_data_ptr<int64_t>(),
      .indices = indices_TK.mutable_data_ptr<int32_t>(),
      .num_rows = num_rows,
      .num_keys = scores_TS.size(1),
      .k = static_cast<int>(k),
  });
  return indices_TK;
}

}  // namespace megatron_keye
