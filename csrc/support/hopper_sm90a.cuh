// PTX instructions for sm_90a without a C++ form: asynchronous copies and matrix products.
// Source: PTX ISA 8.8, "Asynchronous Warpgroup Level Matrix Instructions" and "cp.async".
#pragma once

#include <cstdint>

namespace megatron_keye::hopper {

constexpr int kWarpgroup = 128;     // threads that issue one matrix product together
constexpr int kSwizzleBytes = 128;  // of one row of a tile: 64 16-bit channels

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Byte offset of a 16-byte vector of a tile of 128-byte rows, in the order that the tensor cores
// read without bank conflicts. Tiles begin at multiples of 1,024 bytes.
__device__ __forceinline__ uint32_t swizzled(int row, int vector) {
  return row * kSwizzleBytes + ((vector ^ (row & 7)) << 4);
}

// Copies 16 bytes to shared memory without waiting; zeros when `is_real` is false, and then
// `source` is not read.
__device__ __forceinline__ void copy_16_async(uint32_t target, const void* source, bool is_real) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :
               : "r"(target), "l"(source), "r"(is_real ? 16 : 0)
               : "memory");
}

__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

template <int kPending>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" : : "n"(kPending) : "memory");
}

__device__ __forceinline__ void wait_for_all_copies() {
  asm volatile("cp.async.wait_all;" ::: "memory");
}

// Makes what this thread wrote to shared memory, or has waited for, visible to the
// tensor cores.
__device__ __forceinline__ void publish_to_tensor_cores() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Barrier of one warpgroup; number 0 is __syncthreads'.
__device__ __forceinline__ void warpgroup_barrier(int number) {
  asm volatile("bar.sync %0, %1;" : : "r"(number), "n"(kWarpgroup) : "memory");
}

// Describes a tile of 128-byte rows in shared memory, written in the order of `swizzled`. Adding 2
// moves on by 16 channels.
__device__ __forceinline__ uint64_t tile_descriptor(uint32_t address) {
  constexpr uint64_t kEightRows = 8 * kSwizzleBytes;
  constexpr uint64_t kSwizzle128 = 1;
  return (address >> 4 & 0x3FFFu) | uint64_t{1} << 16 | (kEightRows >> 4) << 32 |
         kSwizzle128 << 62;
}

// Orders accesses to registers and shared memory before the products issued next.
__device__ __forceinline__ void begin_products() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void commit_products() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits until at most kPending commits are unfinished, of which `out` is none.
template <int kPending, int kSize>
__device__ __forceinline__ void wait_for_products(float (&out)[kSize]) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" : : "n"(kPending) : "memory");
#pragma unroll
  for (float& each : out) {
    asm volatile("" : "+f"(each) : : "memory");  // else the compiler may read it earlier
  }
}

// out[64, 128] (+)= a[64, 16] b[128, 16]^T, bf16 in and float32 out, for the whole warpgroup.
// A thread holds of rows 16 * warp + lane / 4 (out[4j], out[4j + 1]) and 8 further down
// (out[4j + 2], out[4j + 3]) the columns 8 * j + 2 * (lane % 4) and the next.
__device__ __forceinline__ void multiply_64x128x16(float (&out)[64], uint64_t a, uint64_t b,
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
      "}, %64, %65, is_added, 1, 1, 0, 0;\n"
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
