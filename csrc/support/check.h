// SPDX-License-Identifier: Apache-2.0
// Argument checks that name the tensor, what was got and what was expected.
// Shared by all operators, so that every refusal reads alike.
#pragma once

#include <ATen/ATen.h>
#include <c10/util/Exception.h>

namespace megatron_keye {

inline void check_cuda(const at::Tensor& tensor, const char* name) {
  TORCH_CHECK(tensor.is_cuda(), name, ": got a tensor on ", tensor.device(),
              ", expected one on a CUDA device");
}

inline void check_same_device(const at::Tensor& tensor, const char* name,
                              const at::Tensor& other, const char* other_name) {
  TORCH_CHECK(tensor.device() == other.device(), name, ": got a tensor on ", tensor.device(),
              ", expected ", other.device(), ", where ", other_name, " is");
}

inline void check_dtype(const at::Tensor& tensor, const char* name, at::ScalarType expected) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == expected, name, ": got dtype ", tensor.scalar_type(),
                   ", expected ", expected);
}

inline void check_num_dims(const at::Tensor& tensor, const char* name, int64_t expected) {
  TORCH_CHECK_VALUE(tensor.dim() == expected, name, ": got shape ", tensor.sizes(), ", expected ",
                    expected, " dimensions");
}

inline void check_size(const at::Tensor& tensor, const char* name, int64_t dim,
                       int64_t expected) {
  TORCH_CHECK_VALUE(tensor.size(dim) == expected, name, ": got size ", tensor.size(dim),
                    " in dimension ", dim, ", expected ", expected);
}

inline void check_contiguous(const at::Tensor& tensor, const char* name) {
  TORCH_CHECK_VALUE(tensor.is_contiguous(), name, ": got strides ", tensor.strides(),
                    ", expected a contiguous tensor");
}

// A bound of each row's keys: int64 [T] beside `rows`, whose first dimension is T.
inline void check_bound(const at::Tensor& bound_T, const char* name, const at::Tensor& rows,
                        const char* rows_name) {
  check_same_device(bound_T, name, rows, rows_name);
  check_dtype(bound_T, name, at::kLong);
  check_num_dims(bound_T, name, 1);
  check_size(bound_T, name, 0, rows.size(0));
}

}  // namespace megatron_keye
