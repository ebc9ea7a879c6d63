// SPDX-License-Identifier: Apache-2.0
// Which queries a launch works on, which keys they see, and which keys stand for the others.
#pragma once

#include "lightning_indexer/params.h"

namespace megatron_keye::indexer {

struct KeyRange {
  int start;
  int end;  // at least start

  __device__ __forceinline__ int size() const { return end - start; }
};

// The query at `place` of the launch, or -1.
__device__ __forceinline__ int query_at(const Rows& rows, int place) {
  if (rows.rows == nullptr) {
    return place < rows.num_rows ? rows.first_row + place : -1;
  }
  const int listed = rows.first_row + place;
  return place < rows.num_rows && listed < *rows.num_listed ? rows.rows[listed] : -1;
}

__device__ __forceinline__ KeyRange range_of(const Rows& rows, int query) {
  const int64_t end = min(max(rows.key_end[query], int64_t{0}), int64_t{rows.num_keys});
  const int64_t start = min(max(rows.key_start[query], int64_t{0}), end);
  return {static_cast<int>(start), static_cast<int>(end)};
}

// The key that stands for its group of kSampledFrom; its place in the group is pseudo-random.
__host__ __device__ __forceinline__ int sampled_key(int group) {
  const uint32_t place = (static_cast<uint32_t>(group) * 2654435761u >> 16) % kSampledFrom;
  return group * kSampledFrom + static_cast<int>(place);
}

// How many sampled keys come before `key`.
__host__ __device__ __forceinline__ int num_sampled_before(int key) {
  const int group = key / kSampledFrom;
  return group + (sampled_key(group) < key);
}

// The same range counted in sampled keys.
__device__ __forceinline__ KeyRange sampled_range(const KeyRange& range) {
  return {num_sampled_before(range.start), num_sampled_before(range.end)};
}

}  // namespace megatron_keye::indexer
