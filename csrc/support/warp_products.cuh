// SPDX-License-Identifier: Apache-2.0
// Matrix products of one warp, for factors too small for a warpgroup's.
// Source: PTX ISA 8.8, "ldmatrix" and "mma.m16n8k16".
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

namespace megatron_keye::warp {

// Loads four matrices [8 rows][16 bytes]. Each lane gives the address of one row, lanes 8i to
// 8i + 7 those of matrix i, and gets of each matrix bytes 4 * (lane % 4) and on of row lane / 4.
__device__ __forceinline__ void load_matrices(uint32_t (&out)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(row)
               : "memory");
}

// The same, each matrix of 16-bit numbers transposed.
__device__ __forceinline__ void load_transposed(uint32_t (&out)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(row)
               : "memory");
}

// out[16, 8] += a[16, 16] b[8, 16]^T, bf16 in and float32 out. A lane holds of `out` row lane / 4,
// columns 2 * (lane % 4) and the next, then the same of the row 8 further on; of a, two to a word,
// those rows, then the same 8 terms further on; of b row lane / 4, in two words likewise.
__device__ __forceinline__ void multiply_add(float (&out)[4], const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(out[0]), "+f"(out[1]), "+f"(out[2]), "+f"(out[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ uint32_t packed(float low, float high) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&both);
}

}  // namespace megatron_keye::warp
