// SPDX-License-Identifier: Apache-2.0
// Signatures of the operators, for bindings.cpp.
#pragma once

#include <ATen/core/Tensor.h>

namespace megatron_keye {

at::Tensor select_top_k(const at::Tensor& scores_TS, const at::Tensor& key_start_T,
                        const at::Tensor& key_end_T, int64_t k);

at::Tensor select_top_k_split_rows(const at::Tensor& scores_TS, const at::Tensor& key_end_T,
                                   int64_t k);

}  // namespace megatron_keye
