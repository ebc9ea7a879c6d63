// SPDX-License-Identifier: Apache-2.0
// Host side of the sparse decode's kernels: checks the tensors, allocates, launches.
// The contract stands in kernels/sparse_decode/cuda.py; no check here reads device memory.

#include <c10/cuda/CUDAGuard.h>

#include <bit>
#include <limits>
#include <utility>

#include "sparse_decode/params.h"
#include "sparse_decode/sparse_decode.h"
#include "support/check.h"

namespace megatron_keye {

namespace {

using namespace sparse_decode;

constexpr double kLog2E = 1.4426950408889634;
constexpr int64_t kIntLimit = std::numeric_limits<int32_t>::max();

void check_tensor(const at::Tensor& tensor, const char* name, int64_t num_dims,
                  const at::Tensor& first) {
  check_cuda(tensor, name);
  check_same_device(tensor, name, first, "the first tensor");
  check_num_dims(tensor, name, num_dims);
}

// Rows that are copied 16 bytes at a time.
void check_vectors(const at::Tensor& tensor, const char* name) {
  const int64_t vector = 16 / static_cast<int64_t>(tensor.element_size());
  bool is_aligned = reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0 &&
                    tensor.stride(-1) == 1;
  for (int64_t dim = 0; dim + 1 < tensor.dim(); ++dim) {
    is_aligned &= tensor.stride(dim) % vector == 0;
  }
  TORCH_CHECK_VALUE(is_aligned, name, ": got strides ", tensor.strides(),
                    ", expected rows of adjacent channels at multiples of 16 bytes");
}

Pages table_of(const at::Tensor& pages_BN, const at::Tensor& cached, const at::Tensor& first) {
  check_tensor(pages_BN, "pages_BN", 2, first);
  check_dtype(pages_BN, "pages_BN", at::kInt);
  TORCH_CHECK_VALUE(pages_BN.stride(1) == 1, "pages_BN: expected adjacent pages of a sequence");
  const int64_t places = cached.size(1);
  TORCH_CHECK_VALUE(places >= kSmallestPage && std::has_single_bit(static_cast<uint64_t>(places)),
                    "pages: got ", places, " places, expected a power of two from ",
                    kSmallestPage, " on");
  TORCH_CHECK_VALUE(cached.size(0) <= kIntLimit && pages_BN.size(1) * places <= kIntLimit / 2,
                    "pages_BN: got ", pages_BN.size(1), " pages of ", places,
                    " places, expected at most ", kIntLimit / 2, " keys");
  return {
      .pages = pages_BN.const_data_ptr<int>(),
      .stride = pages_BN.stride(0),
      .num_pages = static_cast<int>(cached.size(0)),
      .num_of_sequence = static_cast<int>(pages_BN.size(1)),
      .log2_places = std::countr_zero(static_cast<uint64_t>(places)),
  };
}

void check_scores(const at::Tensor& q_BTIJ, const at::Tensor& gate_BTI,
                  const at::Tensor& index_keys_PLJ, const at::Tensor& lengths_B,
                  int64_t tiles_of_block) {
  check_tensor(q_BTIJ, "q_BTIJ", 4, q_BTIJ);
  check_dtype(q_BTIJ, "q_BTIJ", at::kBFloat16);
  check_contiguous(q_BTIJ, "q_BTIJ");
  check_size(q_BTIJ, "q_BTIJ", 3, kIndexChannels);
  TORCH_CHECK_VALUE(q_BTIJ.size(1) >= 1 && q_BTIJ.size(1) <= kMaxQueries &&
                        q_BTIJ.size(2) >= 1 && q_BTIJ.size(2) <= kMaxIndexHeads,
                    "q_BTIJ: got ", q_BTIJ.size(1), " queries of ", q_BTIJ.size(2),
                    " heads, expected 1 to ", kMaxQueries, " of 1 to ", kMaxIndexHeads);
  TORCH_CHECK_VALUE(q_BTIJ.size(0) <= 65535, "q_BTIJ: got ", q_BTIJ.size(0),
                    " sequences, expected at most 65535");
  check_tensor(gate_BTI, "gate_BTI", 3, q_BTIJ);
  TORCH_CHECK_TYPE(gate_BTI.scalar_type() == at::kFloat ||
                       gate_BTI.scalar_type() == at::kBFloat16,
                   "gate_BTI: got dtype ", gate_BTI.scalar_type(), ", expected float or bfloat16");
  check_contiguous(gate_BTI, "gate_BTI");
  TORCH_CHECK_VALUE(gate_BTI.sizes() == q_BTIJ.sizes().slice(0, 3), "gate_BTI: got shape ",
                    gate_BTI.sizes(), ", expected ", q_BTIJ.sizes().slice(0, 3));
  check_tensor(index_keys_PLJ, "index_keys_PLJ", 3, q_BTIJ);
  check_size(index_keys_PLJ, "index_keys_PLJ", 2, kIndexChannels);
  check_vectors(index_keys_PLJ, "index_keys_PLJ");
  check_bound(lengths_B, "lengths_B", q_BTIJ, "q_BTIJ");
  check_contiguous(lengths_B, "lengths_B");
  TORCH_CHECK_VALUE(tiles_of_block >= 1 && tiles_of_block <= kMaxTilesOfBlock,
                    "tiles_of_block: got ", tiles_of_block, ", expected 1 to ",
                    kMaxTilesOfBlock);
}

// Scales where keys are e4m3, none where they are bf16.
void check_scales(const std::optional<at::Tensor>& scales_PL, const at::Tensor& index_keys_PLJ) {
  check_dtype(index_keys_PLJ, "index_keys_PLJ",
              scales_PL ? at::kFloat8_e4m3fn : at::kBFloat16);
  if (scales_PL) {
    check_tensor(*scales_PL, "index_scales_PL", 2, index_keys_PLJ);
    check_dtype(*scales_PL, "index_scales_PL", at::kFloat);
    TORCH_CHECK_VALUE(scales_PL->sizes() == index_keys_PLJ.sizes().slice(0, 2) &&
                          scales_PL->stride(1) == 1,
                      "index_scales_PL: got shape ", scales_PL->sizes(), ", strides ",
                      scales_PL->strides(), ", expected ", index_keys_PLJ.sizes().slice(0, 2),
                      ", adjacent in a page");
  }
}

void check_attention(const at::Tensor& query_BTHC, const at::Tensor& keys_PLGC,
                     const at::Tensor& values_PLGC, const at::Tensor& indices_TK) {
  check_tensor(query_BTHC, "query_BTHC", 4, query_BTHC);
  check_dtype(query_BTHC, "query_BTHC", at::kBFloat16);
  check_contiguous(query_BTHC, "query_BTHC");
  const int64_t channels = query_BTHC.size(3);
  TORCH_CHECK_VALUE(channels == 64 || channels == 128, "query_BTHC: got ", channels,
                    " channels, expected 64 or 128");
  for (const auto& [tensor, name] : {std::pair{keys_PLGC, "keys_PLGC"},
                                     std::pair{values_PLGC, "values_PLGC"}}) {
    check_tensor(tensor, name, 4, query_BTHC);
    check_dtype(tensor, name, at::kBFloat16);
    check_size(tensor, name, 3, channels);
    check_vectors(tensor, name);
    TORCH_CHECK_VALUE(tensor.sizes() == keys_PLGC.sizes() &&
                          tensor.strides() == keys_PLGC.strides(),
                      name, ": expected the shape and strides of keys_PLGC");
  }
  const int64_t groups = keys_PLGC.size(2);
  const int64_t heads = groups > 0 ? query_BTHC.size(2) / groups : 0;
  TORCH_CHECK_VALUE(heads >= 1 && heads <= kMaxGroupHeads &&
                        heads * groups == query_BTHC.size(2),
                    "query_BTHC: got ", query_BTHC.size(2), " heads in ", groups,
                    " groups, expected 1 to ", kMaxGroupHeads, " a group");
  check_tensor(indices_TK, "indices_TK", 2, query_BTHC);
  check_dtype(indices_TK, "indices_TK", at::kInt);
  check_contiguous(indices_TK, "indices_TK");
  check_size(indices_TK, "indices_TK", 0, query_BTHC.size(0) * query_BTHC.size(1));
  TORCH_CHECK_VALUE(query_BTHC.size(0) * query_BTHC.size(1) * groups <= kIntLimit / kMaxCluster &&
                        indices_TK.size(1) <= kIntLimit / 2,
                    "query_BTHC: got more queries than one launch takes");
}

// How a selection is cut into thread blocks.
void check_cut(int64_t groups_of_block, int64_t cluster, int64_t groups) {
  const bool is_cut = groups_of_block >= 1 && kWarps % groups_of_block == 0 &&
                      groups % groups_of_block == 0;
  TORCH_CHECK_VALUE(is_cut, "groups_of_block: got ", groups_of_block,
                    ", expected a divisor of ", kWarps, " and of ", groups, " groups");
  TORCH_CHECK_VALUE(cluster >= 1 && cluster <= kMaxCluster, "cluster: got ", cluster,
                    ", expected 1 to ", kMaxCluster);
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> sparse_decode_scores(
    const at::Tensor& q_BTIJ, const at::Tensor& gate_BTI, const at::Tensor& index_keys_PLJ,
    const std::optional<at::Tensor>& index_scales_PL, const at::Tensor& pages_BN,
    const at::Tensor& lengths_B, int64_t tiles_of_block) {
  check_scores(q_BTIJ, gate_BTI, index_keys_PLJ, lengths_B, tiles_of_block);
  check_scales(index_scales_PL, index_keys_PLJ);
  const Pages table = table_of(pages_BN, index_keys_PLJ, q_BTIJ);
  check_size(pages_BN, "pages_BN", 0, q_BTIJ.size(0));
  const c10::cuda::CUDAGuard guard(q_BTIJ.device());
  const int64_t num_rows = q_BTIJ.size(0) * q_BTIJ.size(1);
  const int64_t num_keys = pages_BN.size(1) * index_keys_PLJ.size(1);
  at::Tensor scores_TS = at::empty({num_rows, num_keys}, q_BTIJ.options().dtype(at::kFloat));
  at::Tensor end_T = at::empty({num_rows}, lengths_B.options());
  if (num_rows == 0 || num_keys == 0) {
    return {scores_TS, end_T.zero_()};
  }
  const auto key_bytes = static_cast<int64_t>(index_keys_PLJ.element_size());
  launch_scores({
      .table = table,
      .q = reinterpret_cast<const __nv_bfloat16*>(q_BTIJ.const_data_ptr()),
      .gate = gate_BTI.const_data_ptr(),
      .gate_is_float = gate_BTI.scalar_type() == at::kFloat,
      .index_keys = index_keys_PLJ.const_data_ptr(),
      .page_bytes = index_keys_PLJ.stride(0) * key_bytes,
      .key_bytes = index_keys_PLJ.stride(1) * key_bytes,
      .scales = index_scales_PL ? index_scales_PL->const_data_ptr<float>() : nullptr,
      .scale_stride = index_scales_PL ? index_scales_PL->stride(0) : 0,
      .lengths = lengths_B.const_data_ptr<int64_t>(),
      .scores = scores_TS.mutable_data_ptr<float>(),
      .ends = end_T.mutable_data_ptr<int64_t>(),
      .num_sequences = static_cast<int>(q_BTIJ.size(0)),
      .num_queries = static_cast<int>(q_BTIJ.size(1)),
      .num_heads = static_cast<int>(q_BTIJ.size(2)),
      .tiles_of_block = static_cast<int>(tiles_of_block),
  });
  return {scores_TS, end_T};
}

at::Tensor sparse_decode_attention(const at::Tensor& query_BTHC, const at::Tensor& keys_PLGC,
                                   const at::Tensor& values_PLGC, const at::Tensor& pages_BN,
                                   const at::Tensor& indices_TK, double scale,
                                   int64_t groups_of_block, int64_t cluster) {
  check_attention(query_BTHC, keys_PLGC, values_PLGC, indices_TK);
  check_cut(groups_of_block, cluster, keys_PLGC.size(2));
  const Pages table = table_of(pages_BN, keys_PLGC, query_BTHC);
  check_size(pages_BN, "pages_BN", 0, query_BTHC.size(0));
  const c10::cuda::CUDAGuard guard(query_BTHC.device());
  at::Tensor out_BTHC = at::empty_like(query_BTHC);
  if (out_BTHC.numel() == 0) {
    return out_BTHC;
  }
  launch_attention(
      {
          .table = table,
          .query = reinterpret_cast<const __nv_bfloat16*>(query_BTHC.const_data_ptr()),
          .keys = reinterpret_cast<const __nv_bfloat16*>(keys_PLGC.const_data_ptr()),
          .values = reinterpret_cast<const __nv_bfloat16*>(values_PLGC.const_data_ptr()),
          .stride_p = keys_PLGC.stride(0),
          .stride_l = keys_PLGC.stride(1),
          .stride_g = keys_PLGC.stride(2),
          .indices = indices_TK.const_data_ptr<int>(),
          .out = reinterpret_cast<__nv_bfloat16*>(out_BTHC.mutable_data_ptr()),
          .num_rows = static_cast<int>(indices_TK.size(0)),
          .num_queries = static_cast<int>(query_BTHC.size(1)),
          .num_selected = static_cast<int>(indices_TK.size(1)),
          .num_groups = static_cast<int>(keys_PLGC.size(2)),
          .heads = static_cast<int>(query_BTHC.size(2) / keys_PLGC.size(2)),
          .groups_of_block = static_cast<int>(groups_of_block),
          .cluster = static_cast<int>(cluster),
          .scale_log2 = static_cast<float>(scale * kLog2E),
      },
      static_cast<int>(query_BTHC.size(3)));
  return out_BTHC;
}

}  // namespace megatron_keye
