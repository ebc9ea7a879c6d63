// SPDX-License-Identifier: Apache-2.0
// Device side of the top-k selection: one thread block per row.

#include <cuda_runtime.h>

#include "select_top_k/params.h"
#include "select_top_k/row.cuh"
#include "support/launch.h"

namespace megatron_keye {

namespace {

__global__ void __launch_bounds__(top_k::kThreads) select_top_k_kernel(SelectTopKParams params) {
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  auto& shared = *reinterpret_cast<top_k::Shared*>(shared_bytes);
  // The last rows of a causal sequence are the longest; started first, they leave no tail.
  const int64_t t = params.num_rows - 1 - blockIdx.x;
  const int64_t end = min(params.key_end[t], params.num_keys);
  const int64_t start = min(max(params.key_start[t], int64_t{0}), max(end, int64_t{0}));
  const top_k::Row row{
      .scores = params.scores + t * params.row_stride,
      .start = static_cast<int>(start),
      .end = static_cast<int>(max(end, start)),
  };
  top_k::select_row(shared, row, params.k, params.indices + t * params.k);
}

}  // namespace

void launch_select_top_k(const SelectTopKParams& params) {
  launch(select_top_k_kernel, dim3(static_cast<unsigned>(params.num_rows)), dim3(top_k::kThreads),
         static_cast<int>(sizeof(top_k::Shared)), params);
}

}  // namespace megatron_keye
