// SPDX-License-Identifier: Apache-2.0
// Host side of the selected scores' backward pass: checks the tensors and launches.
// No check here reads device memory.

#include <c10/cuda/CUDAGuard.h>

#include <limits>

#include "selected_indexer_scores/params.h"
#include "selected_indexer_scores/selected_indexer_scores.h"
#include "sparse_attention/check_unions.h"
#include "support/check.h"

namespace megatron_keye {

namespace {

using namespace selected_indexer_scores;

void check_indexer(const at::Tensor& channels, const char* name, int64_t num_dims,
                   const at::Tensor& q_TIJ) {
  check_num_dims(channels, name, num_dims);
  check_dtype(channels, name, at::kBFloat16);
  check_size(channels, name, num_dims - 1, kChannels);
  check_same_device(channels, name, q_TIJ, "q_TIJ");
  TORCH_CHECK_VALUE(channels.stride(num_dims - 1) == 1, name, ": got strides ",
                    channels.strides(), ", expected adjacent channels");
  sparse_attention::check_vectors(channels, name);
}

void check_of_queries(const at::Tensor& tensor, const char* name, const at::Tensor& q_TIJ) {
  check_num_dims(tensor, name, 2);
  check_dtype(tensor, name, at::kFloat);
  check_size(tensor, name, 0, q_TIJ.size(0));
  check_same_device(tensor, name, q_TIJ, "q_TIJ");
  check_contiguous(tensor, name);
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> selected_indexer_scores_backward(
    const at::Tensor& dscores_TK, const at::Tensor& q_TIJ, const at::Tensor& k_SJ,
    const at::Tensor& gate_TI, const at::Tensor& keys_BU, const at::Tensor& masks_BU,
    const at::Tensor& counts_B, double scale) {
  check_cuda(q_TIJ, "q_TIJ");
  check_indexer(q_TIJ, "q_TIJ", 3, q_TIJ);
  check_size(q_TIJ, "q_TIJ", 1, kHeads);
  check_indexer(k_SJ, "k_SJ", 2, q_TIJ);
  TORCH_CHECK_VALUE(k_SJ.size(0) * (k_SJ.stride(0) / sparse_attention::kVectorChannels) <=
                        std::numeric_limits<int>::max(),
                    "k_SJ: got ", k_SJ.size(0), " rows, which are too far apart");
  check_of_queries(dscores_TK, "dscores_TK", q_TIJ);
  check_of_queries(gate_TI, "gate_TI", q_TIJ);
  check_size(gate_TI, "gate_TI", 1, kHeads);
  sparse_attention::check_unions(keys_BU, masks_BU, counts_B, q_TIJ, "q_TIJ");
  const c10::cuda::CUDAGuard guard(q_TIJ.device());
  at::Tensor dq_TIJ = at::empty(q_TIJ.sizes(), q_TIJ.options());
  at::Tensor dk_SJ = at::zeros(k_SJ.sizes(), gate_TI.options());
  at::Tensor dgate_TI = at::empty(gate_TI.sizes(), gate_TI.options());
  if (q_TIJ.size(0) > 0) {
    const auto* const k = reinterpret_cast<const __nv_bfloat16*>(k_SJ.const_data_ptr());
    launch_backward({
        .problem =
            {
                .q = reinterpret_cast<const __nv_bfloat16*>(q_TIJ.const_data_ptr()),
                .k = k,
                .v = k,  // not read
                .keys = keys_BU.const_data_ptr<int>(),
                .masks = reinterpret_cast<const uint16_t*>(masks_BU.const_data_ptr<int16_t>()),
                .counts = counts_B.const_data_ptr<int>(),
                .scale_log2 = 0.0f,  // not read
                .num_queries = static_cast<int>(q_TIJ.size(0)),
                .num_groups = 1,
                .heads = kHeads,
                .channels = kChannels,
                .capacity = keys_BU.size(1),
                .q_stride_t = q_TIJ.stride(0),
                .q_stride_h = q_TIJ.stride(1),
                .k_stride_s = k_SJ.stride(0),
                .k_stride_g = 0,
            },
        .dscores = dscores_TK.const_data_ptr<float>(),
        .gate = gate_TI.const_data_ptr<float>(),
        .dq = reinterpret_cast<__nv_bfloat16*>(dq_TIJ.mutable_data_ptr()),
        .dk = dk_SJ.mutable_data_ptr<float>(),
        .dgate = dgate_TI.mutable_data_ptr<float>(),
        .scale = static_cast<float>(scale),
        .num_selected = static_cast<int>(dscores_TK.size(1)),
    });
  }
  return {dq_TIJ, dk_SJ, dgate_TI};
}

}  // namespace megatron_keye
