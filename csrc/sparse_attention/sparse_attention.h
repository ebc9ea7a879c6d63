// SPDX-License-Identifier: Apache-2.0
// The sparse attention's two passes as operators; their contract stands in
// kernels/sparse_attention/api.py, that of the unions in kernels/union_lists/api.py.
#pragma once

#include <ATen/ATen.h>

#include <tuple>

namespace megatron_keye {

// Returns out_THC and lse_TH. Takes bfloat16 heads of 64 or 128 channels in groups of 4, 8 or 16,
// on a GPU of compute capability 9.0.
std::tuple<at::Tensor, at::Tensor> sparse_attention_forward(
    const at::Tensor& q_THC, const at::Tensor& k_SGC, const at::Tensor& v_SGC,
    const at::Tensor& keys_BU, const at::Tensor& masks_BU, const at::Tensor& counts_B,
    double scale);

// Returns dq_THC and, in float32, sums_GS2C: dk and dv of each key. Takes dout_THC contiguous, and
// what the forward pass returned. Sums leave a multiprocessor in bulk or in pairs; either way
// their order varies.
std::tuple<at::Tensor, at::Tensor> sparse_attention_backward(
    const at::Tensor& dout_THC, const at::Tensor& q_THC, const at::Tensor& k_SGC,
    const at::Tensor& v_SGC, const at::Tensor& out_THC, const at::Tensor& lse_TH,
    const at::Tensor& keys_BU, const at::Tensor& masks_BU, const at::Tensor& counts_B,
    double scale, bool in_bulk);

}  // namespace megatron_keye
