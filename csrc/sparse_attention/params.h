// Arguments of the sparse attention, shared by the host and the device code.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

namespace megatron_keye::sparse_attention {

constexpr int kTileQueries = 16;  // queries that share a union: one bit each of a mask word
constexpr int kTileKeys = 64;     // keys of a union that are attended to at once

struct ForwardParams {
  const __nv_bfloat16* q;  // [T, H, C], channels adjacent
  const __nv_bfloat16* k;  // [S, G, C], likewise; rows begin at multiples of 16 bytes
  const __nv_bfloat16* v;  // likewise, strides of k
  const int* keys;         // [B, U], unions of the selections
  const uint16_t* masks;   // [B, U], which queries of a tile selected a key
  const int* counts;       // [B], keys of each union
  __nv_bfloat16* out;      // [T, H, C], contiguous
  float* lse;              // [T, H], log2 of each row's sum of exponentials; +inf without any key
  float scale_log2;        // factor of the logits, times log2(e); above 0
  int num_queries;         // T
  int num_groups;          // G
  int heads;               // H / G: 4, 8 or 16
  int channels;            // C: 64 or 128
  int64_t capacity;        // U
  int64_t q_stride_t;      // in elements, as are the others
  int64_t q_stride_h;
  int64_t k_stride_s;
  int64_t k_stride_g;
};

// Launches on the current stream of the current device, for at least one query.
void launch_forward(const ForwardParams& params);

}  // namespace megatron_keye::sparse_attention
