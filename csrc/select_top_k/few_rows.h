// Arguments of the top-k selection of a few long rows, shared by the host checks and the device
// code. Rows begin at key 0, as a decode has them.
#pragma once

#include <cstdint>

namespace megatron_keye {

struct SelectFewParams {
  const float* scores;     // [T, S], contiguous
  const int64_t* key_end;  // [T], one past the last key of row t
  int32_t* indices;        // [T, K], contiguous
  int64_t num_rows;        // T
  int64_t num_keys;        // S, at most kMostKeysOfFew
  int k;                   // K
};

constexpr int64_t kMostKeysOfFew = 262144;

// Launches on the current stream of the current device.
void launch_select_few(const SelectFewParams& params);

}  // namespace megatron_keye
