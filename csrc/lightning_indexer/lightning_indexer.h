// SPDX-License-Identifier: Apache-2.0
// The lightning indexer as an operator; its contract stands in kernels/lightning_indexer/api.py.
#pragma once

#include <ATen/ATen.h>

namespace megatron_keye {

// Takes bfloat16 queries and keys of 64 channels, up to 16 heads, float32 gates,
// all contiguous, on a GPU of compute capability 9.0. `scratch_bytes` is about what it allocates.
at::Tensor lightning_indexer(const at::Tensor& q_TIJ, const at::Tensor& k_SJ,
                             const at::Tensor& gate_TI, const at::Tensor& key_start_T,
                             const at::Tensor& key_end_T, int64_t k, int64_t scratch_bytes);

}  // namespace megatron_keye
