// SPDX-License-Identifier: Apache-2.0
// Arguments of the sparse decode's kernels, shared by the host and the device code.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

namespace megatron_keye::sparse_decode {

constexpr int kIndexChannels = 64;   // J
constexpr int kMaxIndexHeads = 16;   // I
constexpr int kMaxQueries = 8;       // T
constexpr int kMaxGroupHeads = 16;   // H / G
constexpr int kScoredKeys = 128;     // that a thread block scores at once
constexpr int kMaxTilesOfBlock = 16;
constexpr int kSmallestPage = 16;    // places of a page: a power of two from this on
constexpr int kWarps = 8;            // of a thread block that attends
constexpr int kMaxCluster = 8;       // thread blocks that attend to one selection

// Where the keys of a sequence lie.
struct Pages {
  const int* pages;    // [B, N], adjacent; no page where outside [0, num_pages)
  int64_t stride;      // between sequences
  int num_pages;       // P
  int num_of_sequence; // N
  int log2_places;     // of L

  __device__ __forceinline__ int num_keys() const { return num_of_sequence << log2_places; }
  __device__ __forceinline__ bool holds(int page) const { return page >= 0 && page < num_pages; }
  __device__ __forceinline__ int place(int key) const { return key & ((1 << log2_places) - 1); }
};

struct ScoreParams {
  Pages table;
  const __nv_bfloat16* q;     // [B, T, I, J], contiguous
  const void* gate;           // [B, T, I], contiguous, float32 or bf16
  bool gate_is_float;
  const void* index_keys;     // [P, L, J], channels adjacent
  int64_t page_bytes;         // between pages of index_keys
  int64_t key_bytes;          // between its keys
  const float* scales;        // [P, L], places adjacent; null without
  int64_t scale_stride;       // between pages of scales
  const int64_t* lengths;     // [B]
  float* scores;              // [B * T, N * L]
  int64_t* ends;              // [B * T], one past the last key of each row
  int num_sequences;          // B
  int num_queries;            // T
  int num_heads;              // I
  int tiles_of_block;         // tiles of kScoredKeys keys
};

struct AttendParams {
  Pages table;
  const __nv_bfloat16* query;   // [B * T, H, C], contiguous
  const __nv_bfloat16* keys;    // [P, L, G, C], channels adjacent
  const __nv_bfloat16* values;  // the same strides
  int64_t stride_p;             // of keys, in elements
  int64_t stride_l;
  int64_t stride_g;
  const int* indices;           // [B * T, K], contiguous
  __nv_bfloat16* out;           // [B * T, H, C]
  int num_rows;                 // B * T
  int num_queries;              // T
  int num_selected;             // K
  int num_groups;               // G
  int heads;                    // of a group
  int groups_of_block;          // 1, 2, 4 or 8, divides G
  int cluster;                  // thread blocks that share a selection, 1 to kMaxCluster
  float scale_log2;
};

// Both launch on the current stream of the current device; the second waits by itself for what
// came before it.
void launch_scores(const ScoreParams& params);
void launch_attention(const AttendParams& params, int num_channels);

}  // namespace megatron_keye::sparse_decode
