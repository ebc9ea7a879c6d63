// SPDX-License-Identifier: Apache-2.0
// Host side of the top-k selection: checks the tensors, allocates the result, launches.
// The contract stands in kernels/select_top_k/api.py; no check here reads device memory.

#include <c10/cuda/CUDAGuard.h>

#include <limits>

#include "select_top_k/params.h"
#include "select_top_k/select_top_k.h"
#include "support/check.h"

namespace megatron_keye {

namespace {

constexpr int64_t kIndexLimit = std::numeric_limits<int32_t>::max();

}  // namespace

at::Tensor select_top_k(const at::Tensor& scores_TS, const at::Tensor& key_start_T,
                        const at::Tensor& key_end_T, int64_t k) {
  check_cuda(scores_TS, "scores_TS");
  check_dtype(scores_TS, "scores_TS", at::kFloat);
  check_num_dims(scores_TS, "scores_TS", 2);
  check_bound(key_start_T, "key_start_T", scores_TS, "scores_TS");
  check_bound(key_end_T, "key_end_T", scores_TS, "scores_TS");
  const int64_t num_rows = scores_TS.size(0);
  const int64_t num_keys = scores_TS.size(1);
  TORCH_CHECK_VALUE(k >= 1 && k <= kIndexLimit, "k: got ", k, ", expected 1 to ", kIndexLimit);
  TORCH_CHECK_VALUE(num_keys <= kIndexLimit, "scores_TS: got rows of ", num_keys,
                    " keys, expected at most ", kIndexLimit, ", as indices are int32");
  TORCH_CHECK_VALUE(num_rows <= kIndexLimit, "scores_TS: got ", num_rows,
                    " rows, expected at most ", kIndexLimit, ", one thread block each");

  const c10::cuda::CUDAGuard guard(scores_TS.device());
  at::Tensor indices_TK = at::empty({num_rows, k}, scores_TS.options().dtype(at::kInt));
  if (num_rows == 0) {
    return indices_TK;
  }
  const bool has_adjacent_keys = num_keys <= 1 || scores_TS.stride(1) == 1;
  const at::Tensor rows_TS = has_adjacent_keys ? scores_TS : scores_TS.contiguous();
  const at::Tensor start_T = key_start_T.contiguous();
  const at::Tensor end_T = key_end_T.contiguous();
  launch_select_top_k({
      .scores = rows_TS.const_data_ptr<float>(),
      .key_start = start_T.const_data_ptr<int64_t>(),
      .key_end = end_T.const_data_ptr<int64_t>(),
      .indices = indices_TK.mutable_data_ptr<int32_t>(),
      .num_rows = num_rows,
      .num_keys = num_keys,
      .row_stride = rows_TS.stride(0),
      .k = static_cast<int>(k),
  });
  return indices_TK;
}

}  // namespace megatron_keye
