// SPDX-License-Identifier: Apache-2.0
// The sizes for which the kernels of both passes are compiled.
#pragma once

#include "sparse_attention/params.h"

namespace megatron_keye::sparse_attention {

// Calls `launch.operator()<channels, heads>()` with the problem's channels and heads of a group, of
// which Python admits these alone.
template <typename Launch>
void with_sizes(const Problem& problem, const Launch& launch) {
  const auto with_heads = [&]<int kChannels>() {
    switch (problem.heads) {
      case 4:
        return launch.template operator()<kChannels, 4>();
      case 8:
        return launch.template operator()<kChannels, 8>();
      case 16:
        return launch.template operator()<kChannels, 16>();
    }
  };
  switch (problem.channels) {
    case 64:
      return with_heads.template operator()<64>();
    case 128:
      return with_heads.template operator()<128>();
  }
}

}  // namespace megatron_keye::sparse_attention
