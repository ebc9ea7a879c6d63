// SPDX-License-Identifier: Apache-2.0
// Arguments of the top-k selection, shared by the host checks and the device code.
#pragma once

#include <cstdint>

namespace megatron_keye {

struct SelectTopKParams {
  const float* scores;       // [T, S], row t at scores + t * row_stride, its keys adjacent
  const int64_t* key_start;  // [T], first key of row t
  const int64_t* key_end;    // [T], one past the last key of row t
  int32_t* indices;          // [T, K], contiguous
  int64_t num_rows;          // T
  int64_t num_keys;          // S, fits 31 bits
  int64_t row_stride;        // in elements
  int k;                     // K
};

// Launches on the current stream of the current device.
void launch_select_top_k(const SelectTopKParams& params);

}  // namespace megatron_keye
