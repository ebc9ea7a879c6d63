// SPDX-License-Identifier: Apache-2.0
// Arguments of the top-k selection of split rows, shared by the host checks and the device code.
// Every row begins at key 0, as in inference.
#pragma once

#include <cstdint>

namespace megatron_keye {

struct SplitRowsParams {
  const float* scores;     // [T, S], contiguous
  const int64_t* key_end;  // [T], one past the last key of row t
  int32_t* indices;        // [T, K], contiguous
  int64_t num_rows;        // T
  int64_t num_keys;        // S, at most kMaxKeysOfSplitRow
  int k;                   // K
};

constexpr int64_t kMaxKeysOfSplitRow = 262144;

// Launches on the current stream of the current device.
void launch_split_rows(const SplitRowsParams& params);

}  // namespace megatron_keye
