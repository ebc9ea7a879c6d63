// SPDX-License-Identifier: Apache-2.0
// The lightning indexer as an operator; its contract stands in kernels/lightning_indexer/api.py.
#pragma once

#include <ATen/ATen.h>

#include <optional>

namespace megatron_keye {

// Takes bfloat16 queries and keys of 64 channels, up to 16 heads, float32 gates,
// all contiguous, on a GPU of compute capability 9.0. `scratch_bytes` is about what it allocates.
// With `key_scale_S`, float32, queries and keys are e4m3 numbers: a key's scores are multiplied by
// its scale, and the gates are given times the queries' scales.
at::Tensor lightning_indexer(const at::Tensor& q_TIJ, const at::Tensor& k_SJ,
                             const std::optional<at::Tensor>& key_scale_S,
                             const at::Tensor& gate_TI, const at::Tensor& key_start_T,
                             const at::Tensor& key_end_T, int64_t k, int64_t scratch_bytes);

}  // namespace megatron_keye
