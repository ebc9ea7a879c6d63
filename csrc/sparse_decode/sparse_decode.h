// SPDX-License-Identifier: Apache-2.0
// The two halves of the sparse decode around the selection, as torch calls them.
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <tuple>

namespace megatron_keye {

std::tuple<at::Tensor, at::Tensor> sparse_decode_scores(
    const at::Tensor& q_BTIJ, const at::Tensor& gate_BTI, const at::Tensor& index_keys_PLJ,
    const std::optional<at::Tensor>& index_scales_PL, const at::Tensor& pages_BN,
    const at::Tensor& lengths_B, int64_t tiles_of_block);

at::Tensor sparse_decode_attention(const at::Tensor& query_BTHC, const at::Tensor& keys_PLGC,
                                   const at::Tensor& values_PLGC, const at::Tensor& pages_BN,
                                   const at::Tensor& indices_TK, double scale,
                                   int64_t groups_of_block, int64_t cluster);

}  // namespace megatron_keye
