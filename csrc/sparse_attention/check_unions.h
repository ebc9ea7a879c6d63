// SPDX-License-Identifier: Apache-2.0
// Checks of what every pass over unions reads: the unions, and rows that are copied in vectors.
#pragma once

#include <utility>

#include "sparse_attention/params.h"
#include "support/check.h"

namespace megatron_keye::sparse_attention {

constexpr int64_t kVectorChannels = 8;  // of 16 bytes, copied at once

// All dimensions but the last, whose channels are adjacent.
inline void check_vectors(const at::Tensor& heads, const char* name) {
  bool is_aligned = reinterpret_cast<uintptr_t>(heads.const_data_ptr()) % 16 == 0;
  for (int64_t dim = 0; dim + 1 < heads.dim(); ++dim) {
    is_aligned = is_aligned && heads.stride(dim) % kVectorChannels == 0;
  }
  TORCH_CHECK_VALUE(is_aligned, name, ": expected rows that begin at multiples of 16 bytes");
}

inline void check_unions(const at::Tensor& keys_BU, const at::Tensor& masks_BU,
                         const at::Tensor& counts_B, const at::Tensor& q, const char* q_name) {
  check_num_dims(keys_BU, "keys_BU", 2);
  check_num_dims(masks_BU, "masks_BU", 2);
  check_num_dims(counts_B, "counts_B", 1);
  check_dtype(keys_BU, "keys_BU", at::kInt);
  check_dtype(masks_BU, "masks_BU", at::kShort);
  check_dtype(counts_B, "counts_B", at::kInt);
  const int64_t num_tiles = (q.size(0) + kTileQueries - 1) / kTileQueries;
  check_size(keys_BU, "keys_BU", 0, num_tiles);
  check_size(masks_BU, "masks_BU", 0, num_tiles);
  check_size(masks_BU, "masks_BU", 1, keys_BU.size(1));
  check_size(counts_B, "counts_B", 0, num_tiles);
  for (const auto& [tensor, name] :
       {std::pair{keys_BU, "keys_BU"}, std::pair{masks_BU, "masks_BU"},
        std::pair{counts_B, "counts_B"}}) {
    check_same_device(tensor, name, q, q_name);
    check_contiguous(tensor, name);
  }
}

}  // namespace megatron_keye::sparse_attention
