// SPDX-License-Identifier: Apache-2.0
// The selected scores' backward pass as an operator; its contract stands in
// kernels/selected_indexer_scores/api.py, that of the unions in kernels/union_lists/api.py.
#pragma once

#include <ATen/ATen.h>

#include <tuple>

namespace megatron_keye {

// Returns dq_TIJ in bfloat16, and dk_SJ and dgate_TI in float32. Takes 16 heads of 64 channels in
// bfloat16, on a GPU of compute capability 9.0; the order of the additions to dk_SJ varies.
std::tuple<at::Tensor, at::Tensor, at::Tensor> selected_indexer_scores_backward(
    const at::Tensor& dscores_TK, const at::Tensor& q_TIJ, const at::Tensor& k_SJ,
    const at::Tensor& gate_TI, const at::Tensor& keys_BU, const at::Tensor& masks_BU,
    const at::Tensor& counts_B, double scale);

}  // namespace megatron_keye
