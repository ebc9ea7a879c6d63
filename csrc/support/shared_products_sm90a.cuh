// SPDX-License-Identifier: Apache-2.0
// Matrix products of sm_90a with both factors in shared memory.
// Source: PTX ISA 8.8, "Asynchronous Warpgroup Level Matrix Instructions".
#pragma once

#include "support/register_products_sm90a.cuh"

namespace megatron_keye::hopper {

// out[64, N] (+)= a[64, 16] b[N, 16]^T, bf16 in and float32 out, for the whole warpgroup; N is
// twice the size of `out`, which lies as `product_row` and `product_column` say. Either factor's
// descriptor is that of a right factor of its `Major`; a left one has 64 columns, so that no
// distance between columns is read.
template <Major kMajorA, Major kMajorB>
__device__ __forceinline__ void multiply_shared(float (&out)[32], uint64_t a, uint64_t b,
                                                bool is_added) {
  asm volatile(
      "{\n"
      ".reg .pred is_added;\n"
      "setp.ne.b32 is_added, %34, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, "
      "%8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, "
      "%24, %25, %26, %27, %28, %29, %30, %31"
      "}, %32, %33, is_added, 1, 1, %35, %36;\n"
      "}\n"
      : "+f"(out[0]), "+f"(out[1]), "+f"(out[2]), "+f"(out[3]), "+f"(out[4]), "+f"(out[5]),
        "+f"(out[6]), "+f"(out[7]), "+f"(out[8]), "+f"(out[9]), "+f"(out[10]), "+f"(out[11]),
        "+f"(out[12]), "+f"(out[13]), "+f"(out[14]), "+f"(out[15]), "+f"(out[16]), "+f"(out[17]),
        "+f"(out[18]), "+f"(out[19]), "+f"(out[20]), "+f"(out[21]), "+f"(out[22]), "+f"(out[23]),
        "+f"(out[24]), "+f"(out[25]), "+f"(out[26]), "+f"(out[27]), "+f"(out[28]), "+f"(out[29]),
        "+f"(out[30]), "+f"(out[31])
      : "l"(a), "l"(b), "r"(static_cast<int>(is_added)), "n"(static_cast<int>(kMajorA)),
        "n"(static_cast<int>(kMajorB)));
}

// The same with 128 columns.
template <Major kMajorA, Major kMajorB>
__device__ __forceinline__ void multiply_shared(float (&out)[64], uint64_t a, uint64_t b,
                                                bool is_added) {
  asm volatile(
      "{\n"
      ".reg .pred is_added;\n"
      "setp.ne.b32 is_added, %66, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, "
      "%8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, "
      "%24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, "
      "%40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, "
      "%56, %57, %58, %59, %60, %61, %62, %63"
      "}, %64, %65, is_added, 1, 1, %67, %68;\n"
      "}\n"
      : "+f"(out[0]), "+f"(out[1]), "+f"(out[2]), "+f"(out[3]), "+f"(out[4]), "+f"(out[5]),
        "+f"(out[6]), "+f"(out[7]), "+f"(out[8]), "+f"(out[9]), "+f"(out[10]), "+f"(out[11]),
        "+f"(out[12]), "+f"(out[13]), "+f"(out[14]), "+f"(out[15]), "+f"(out[16]), "+f"(out[17]),
        "+f"(out[18]), "+f"(out[19]), "+f"(out[20]), "+f"(out[21]), "+f"(out[22]), "+f"(out[23]),
        "+f"(out[24]), "+f"(out[25]), "+f"(out[26]), "+f"(out[27]), "+f"(out[28]), "+f"(out[29]),
        "+f"(out[30]), "+f"(out[31]), "+f"(out[32]), "+f"(out[33]), "+f"(out[34]), "+f"(out[35]),
        "+f"(out[36]), "+f"(out[37]), "+f"(out[38]), "+f"(out[39]), "+f"(out[40]), "+f"(out[41]),
        "+f"(out[42]), "+f"(out[43]), "+f"(out[44]), "+f"(out[45]), "+f"(out[46]), "+f"(out[47]),
        "+f"(out[48]), "+f"(out[49]), "+f"(out[50]), "+f"(out[51]), "+f"(out[52]), "+f"(out[53]),
        "+f"(out[54]), "+f"(out[55]), "+f"(out[56]), "+f"(out[57]), "+f"(out[58]), "+f"(out[59]),
        "+f"(out[60]), "+f"(out[61]), "+f"(out[62]), "+f"(out[63])
      : "l"(a), "l"(b), "r"(static_cast<int>(is_added)), "n"(static_cast<int>(kMajorA)),
        "n"(static_cast<int>(kMajorB)));
}

// out[64, 128] (+)= a[64, 32] b[128, 32]^T, e4m3 in and float32 out, laid out likewise; the terms
// of either factor's rows are adjacent. Of the products and what they are added to, bits below
// 2^-13 of the largest one's exponent are cut off, and so is what 13 bits of the sum don't hold.
__device__ __forceinline__ void multiply_shared_e4m3(float (&out)[64], uint64_t a, uint64_t b,
                                                     bool is_added) {
  asm volatile(
      "{\n"
      ".reg .pred is_added;\n"
      "setp.ne.b32 is_added, %66, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, "
      "%8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, "
      "%24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, "
      "%40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, "
      "%56, %57, %58, %59, %60, %61, %62, %63"
      "}, %64, %65, is_added, 1, 1;\n"
      "}\n"
      : "+f"(out[0]), "+f"(out[1]), "+f"(out[2]), "+f"(out[3]), "+f"(out[4]), "+f"(out[5]),
        "+f"(out[6]), "+f"(out[7]), "+f"(out[8]), "+f"(out[9]), "+f"(out[10]), "+f"(out[11]),
        "+f"(out[12]), "+f"(out[13]), "+f"(out[14]), "+f"(out[15]), "+f"(out[16]), "+f"(out[17]),
        "+f"(out[18]), "+f"(out[19]), "+f"(out[20]), "+f"(out[21]), "+f"(out[22]), "+f"(out[23]),
        "+f"(out[24]), "+f"(out[25]), "+f"(out[26]), "+f"(out[27]), "+f"(out[28]), "+f"(out[29]),
        "+f"(out[30]), "+f"(out[31]), "+f"(out[32]), "+f"(out[33]), "+f"(out[34]), "+f"(out[35]),
        "+f"(out[36]), "+f"(out[37]), "+f"(out[38]), "+f"(out[39]), "+f"(out[40]), "+f"(out[41]),
        "+f"(out[42]), "+f"(out[43]), "+f"(out[44]), "+f"(out[45]), "+f"(out[46]), "+f"(out[47]),
        "+f"(out[48]), "+f"(out[49]), "+f"(out[50]), "+f"(out[51]), "+f"(out[52]), "+f"(out[53]),
        "+f"(out[54]), "+f"(out[55]), "+f"(out[56]), "+f"(out[57]), "+f"(out[58]), "+f"(out[59]),
        "+f"(out[60]), "+f"(out[61]), "+f"(out[62]), "+f"(out[63])
      : "l"(a), "l"(b), "r"(static_cast<int>(is_added)));
}

}  // namespace megatron_keye::hopper
