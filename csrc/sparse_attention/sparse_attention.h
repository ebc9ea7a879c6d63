// SPDX-License-Identifier: Apache-2.0
// The sparse attention's passes as operators; their contract stands in
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

// Returns kl_TG, float32, in nats: how far the softmax of each query's scores is from the weights
// that the forward pass gave to the selected keys, on average over the heads of a group. Takes
// log2 of the sum of exponentials of each query's scores, and subtracts from dscores_TK dkl_T times
// those weights, summed over the groups. Reads no values; gives the same bits at every call.
at::Tensor sparse_attention_loss(const at::Tensor& q_THC, const at::Tensor& k_SGC,
                                 const at::Tensor& lse_TH, const at::Tensor& keys_BU,
                                 const at::Tensor& masks_BU, const at::Tensor& counts_B,
                                 const at::Tensor& scores_TK, const at::Tensor& score_lse_T,
                                 const at::Tensor& dkl_T, const at::Tensor& dscores_TK,
                                 double scale);

}  // namespace megatron_keye
