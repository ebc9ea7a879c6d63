// SPDX-License-Identifier: Apache-2.0
// Arguments of the selected scores' backward pass, shared by the host and the device code.
#pragma once

#include "sparse_attention/params.h"

namespace megatron_keye::selected_indexer_scores {

constexpr int kHeads = 16;
constexpr int kChannels = 64;

struct BackwardParams {
  // Queries and keys of the indexer stand for those of the attention, with one group; no values.
  sparse_attention::Problem problem;
  const float* dscores;  // [T, K], contiguous, as all others here
  const float* gate;     // [T, I]
  __nv_bfloat16* dq;     // [T, I, J]
  float* dk;             // [S, J], which is added to
  float* dgate;          // [T, I]
  float scale;           // of the scores
  int num_selected;      // K
};

// Launches on the current stream of the current device, for at least one query.
void launch_backward(const BackwardParams& params);

}  // namespace megatron_keye::selected_indexer_scores
