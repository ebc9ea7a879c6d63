// SPDX-License-Identifier: Apache-2.0
// Host side of the sparse attention's passes: checks the tensors and launches.
// No check here reads device memory.

#include <c10/cuda/CUDAGuard.h>

#include <limits>

#include "sparse_attention/check_unions.h"
#include "sparse_attention/params.h"
#include "sparse_attention/sparse_attention.h"
#include "support/check.h"

namespace megatron_keye {

namespace {

using namespace sparse_attention;

constexpr double kLog2E = 1.4426950408889634;
void check_heads(const at::Tensor& heads, const char* name, const at::Tensor& q_THC) {
  check_num_dims(heads, name, 3);
  check_dtype(heads, name, at::kBFloat16);
  check_size(heads, name, 2, q_THC.size(2));
  check_same_device(heads, name, q_THC, "q_THC");
  TORCH_CHECK_VALUE(heads.stride(2) == 1, name, ": got strides ", heads.strides(),
                    ", expected adjacent channels");
}

// Keys and values are gathered in vectors, which are counted in 32 bits.
void check_gathered(const at::Tensor& heads, const char* name, const at::Tensor& k_SGC) {
  check_size(heads, name, 0, k_SGC.size(0));
  check_size(heads, name, 1, k_SGC.size(1));
  TORCH_CHECK_VALUE(heads.strides() == k_SGC.strides(), name, ": got strides ", heads.strides(),
                    ", expected ", k_SGC.strides(), " as k_SGC");
  check_vectors(heads, name);
  TORCH_CHECK_VALUE(heads.size(0) * (heads.stride(0) / kVectorChannels) <=
                        std::numeric_limits<int>::max(),
                    name, ": got ", heads.size(0), " rows, which are too far apart");
}

void check_sizes(const at::Tensor& q_THC, const at::Tensor& k_SGC, double scale) {
  const int64_t channels = q_THC.size(2);
  TORCH_CHECK_VALUE(channels == 64 || channels == 128, "q_THC: got ", channels,
                    " channels, expected 64 or 128");
  const int64_t num_groups = k_SGC.size(1);
  const int64_t heads = num_groups > 0 ? q_THC.size(1) / num_groups : 0;
  TORCH_CHECK_VALUE((heads == 4 || heads == 8 || heads == 16) &&
                        heads * num_groups == q_THC.size(1),
                    "q_THC: got ", q_THC.size(1), " heads in ", num_groups,
                    " groups, expected 4, 8 or 16 a group");
  TORCH_CHECK_VALUE(scale > 0, "scale: got ", scale, ", expected more than 0");
}

// Checks what all passes read, and the values too.
Problem problem_of(const at::Tensor& q_THC, const at::Tensor& k_SGC, const at::Tensor& v_SGC,
                   const at::Tensor& keys_BU, const at::Tensor& masks_BU,
                   const at::Tensor& counts_B, double scale) {
  check_cuda(q_THC, "q_THC");
  check_heads(q_THC, "q_THC", q_THC);
  check_heads(k_SGC, "k_SGC", q_THC);
  check_heads(v_SGC, "v_SGC", q_THC);
  check_sizes(q_THC, k_SGC, scale);
  check_gathered(k_SGC, "k_SGC", k_SGC);
  check_gathered(v_SGC, "v_SGC", k_SGC);
  check_unions(keys_BU, masks_BU, counts_B, q_THC, "q_THC");
  check_vectors(q_THC, "q_THC");
  return {
      .q = reinterpret_cast<const __nv_bfloat16*>(q_THC.const_data_ptr()),
      .k = reinterpret_cast<const __nv_bfloat16*>(k_SGC.const_data_ptr()),
      .v = reinterpret_cast<const __nv_bfloat16*>(v_SGC.const_data_ptr()),
      .keys = keys_BU.const_data_ptr<int>(),
      .masks = reinterpret_cast<const uint16_t*>(masks_BU.const_data_ptr<int16_t>()),
      .counts = counts_B.const_data_ptr<int>(),
      .scale_log2 = static_cast<float>(scale * kLog2E),
      .num_queries = static_cast<int>(q_THC.size(0)),
      .num_groups = static_cast<int>(k_SGC.size(1)),
      .heads = static_cast<int>(q_THC.size(1) / k_SGC.size(1)),
      .channels = static_cast<int>(q_THC.size(2)),
      .capacity = keys_BU.size(1),
      .q_stride_t = q_THC.stride(0),
      .q_stride_h = q_THC.stride(1),
      .k_stride_s = k_SGC.stride(0),
      .k_stride_g = k_SGC.stride(1),
  };
}

// A tensor of the queries' sizes, contiguous.
void check_like_queries(const at::Tensor& heads, const char* name, const at::Tensor& q_THC) {
  check_heads(heads, name, q_THC);
  check_size(heads, name, 0, q_THC.size(0));
  check_size(heads, name, 1, q_THC.size(1));
  check_contiguous(heads, name);
  check_vectors(heads, name);
}

void check_lse(const at::Tensor& lse_TH, const at::Tensor& q_THC) {
  check_num_dims(lse_TH, "lse_TH", 2);
  check_dtype(lse_TH, "lse_TH", at::kFloat);
  check_size(lse_TH, "lse_TH", 0, q_THC.size(0));
  check_size(lse_TH, "lse_TH", 1, q_THC.size(1));
  check_same_device(lse_TH, "lse_TH", q_THC, "q_THC");
  check_contiguous(lse_TH, "lse_TH");
}

// What belongs to each query or to each key that it selected.
void check_selected(const at::Tensor& tensor, const char* name, int64_t num_dims,
                    const at::Tensor& scores_TK, const at::Tensor& q_THC) {
  check_num_dims(tensor, name, num_dims);
  check_dtype(tensor, name, at::kFloat);
  check_size(tensor, name, 0, q_THC.size(0));
  if (num_dims == 2) {
    check_size(tensor, name, 1, scores_TK.size(1));
  }
  check_same_device(tensor, name, q_THC, "q_THC");
  check_contiguous(tensor, name);
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> sparse_attention_forward(
    const at::Tensor& q_THC, const at::Tensor& k_SGC, const at::Tensor& v_SGC,
    const at::Tensor& keys_BU, const at::Tensor& masks_BU, const at::Tensor& counts_B,
    double scale) {
  const Problem problem = problem_of(q_THC, k_SGC, v_SGC, keys_BU, masks_BU, counts_B, scale);
  const c10::cuda::CUDAGuard guard(q_THC.device());
  at::Tensor out_THC = at::empty(q_THC.sizes(), q_THC.options());
  at::Tensor lse_TH =
      at::empty({q_THC.size(0), q_THC.size(1)}, q_THC.options().dtype(at::kFloat));
  if (q_THC.size(0) > 0) {
    launch_forward({
        .problem = problem,
        .out = reinterpret_cast<__nv_bfloat16*>(out_THC.mutable_data_ptr()),
        .lse = lse_TH.mutable_data_ptr<float>(),
    });
  }
  return {out_THC, lse_TH};
}

std::tuple<at::Tensor, at::Tensor> sparse_attention_backward(
    const at::Tensor& dout_THC, const at::Tensor& q_THC, const at::Tensor& k_SGC,
    const at::Tensor& v_SGC, const at::Tensor& out_THC, const at::Tensor& lse_TH,
    const at::Tensor& keys_BU, const at::Tensor& masks_BU, const at::Tensor& counts_B,
    double scale, bool in_bulk) {
  const Problem problem = problem_of(q_THC, k_SGC, v_SGC, keys_BU, masks_BU, counts_B, scale);
  check_like_queries(dout_THC, "dout_THC", q_THC);
  check_like_queries(out_THC, "out_THC", q_THC);
  check_lse(lse_TH, q_THC);
  const c10::cuda::CUDAGuard guard(q_THC.device());
  at::Tensor dq_THC = at::empty(q_THC.sizes(), q_THC.options());
  at::Tensor sums_GS2C = at::zeros({k_SGC.size(1), k_SGC.size(0), 2, k_SGC.size(2)},
                                   k_SGC.options().dtype(at::kFloat));
  if (q_THC.size(0) > 0) {
    launch_backward({
        .problem = problem,
        .out = reinterpret_cast<const __nv_bfloat16*>(out_THC.const_data_ptr()),
        .dout = reinterpret_cast<const __nv_bfloat16*>(dout_THC.const_data_ptr()),
        .lse = lse_TH.const_data_ptr<float>(),
        .dq = reinterpret_cast<__nv_bfloat16*>(dq_THC.mutable_data_ptr()),
        .sums = sums_GS2C.mutable_data_ptr<float>(),
        .scale = static_cast<float>(scale),
        .num_keys = k_SGC.size(0),
        .is_in_bulk = in_bulk,
    });
  }
  return {dq_THC, sums_GS2C};
}

at::Tensor sparse_attention_loss(const at::Tensor& q_THC, const at::Tensor& k_SGC,
                                 const at::Tensor& lse_TH, const at::Tensor& keys_BU,
                                 const at::Tensor& masks_BU, const at::Tensor& counts_B,
                                 const at::Tensor& scores_TK, const at::Tensor& score_lse_T,
                                 const at::Tensor& dkl_T, const at::Tensor& dscores_TK,
                                 double scale) {
  const at::Tensor& v_SGC = k_SGC;  // not read
  const Problem problem = problem_of(q_THC, k_SGC, v_SGC, keys_BU, masks_BU, counts_B, scale);
  check_lse(lse_TH, q_THC);
  check_selected(scores_TK, "scores_TK", 2, scores_TK, q_THC);
  check_selected(score_lse_T, "score_lse_T", 1, scores_TK, q_THC);
  check_selected(dkl_T, "dkl_T", 1, scores_TK, q_THC);
  check_selected(dscores_TK, "dscores_TK", 2, scores_TK, q_THC);
  // Places in the rows of 16 queries are counted in 32 bits.
  TORCH_CHECK_VALUE(scores_TK.size(1) <= std::numeric_limits<int>::max() / kTileQueries,
                    "scores_TK: got K = ", scores_TK.size(1), ", which is too many");
  const c10::cuda::CUDAGuard guard(q_THC.device());
  at::Tensor divergence_GPT =
      at::empty({k_SGC.size(1), kLossParts, q_THC.size(0)}, lse_TH.options());
  if (q_THC.size(0) > 0) {
    launch_loss({
        .problem = problem,
        .lse = lse_TH.const_data_ptr<float>(),
        .scores = scores_TK.const_data_ptr<float>(),
        .score_lse = score_lse_T.const_data_ptr<float>(),
        .dkl = dkl_T.const_data_ptr<float>(),
        .dscores = dscores_TK.mutable_data_ptr<float>(),
        .divergence = divergence_GPT.mutable_data_ptr<float>(),
        .num_selected = static_cast<int>(scores_TK.size(1)),
    });
  }
  return divergence_GPT.sum(1).t().contiguous();
}

}  // namespace megatron_keye
