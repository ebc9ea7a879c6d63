// SPDX-License-Identifier: Apache-2.0
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
__host__ __device__ constexpr uint32_t swizzled(int row, int vector) {
  return row * kSwizzleBytes + ((vector ^ (row & 7)) << 4);
}

// The same for rows of 64 bytes; those tiles begin at multiples of 512 bytes.
__host__ __device__ constexpr uint32_t swizzled_64(int row, int vector) {
  return row * (kSwizzleBytes / 2) + ((vector ^ (row >> 1 & 3)) << 4);
}

// The same for rows of more channels: each 64 of them are a tile, `half_bytes` after that before.
__host__ __device__ constexpr uint32_t place_of_vector(int row, int vector, int half_bytes) {
  constexpr int kVectors = kSwizzleBytes / 16;
  return vector / kVectors * half_bytes + swizzled(row, vector % kVectors);
}

// Copies 16 or 4 bytes to shared memory without waiting; zeros when `is_real` is false, and then
// `source` is not read.
__device__ __forceinline__ void copy_16_async(uint32_t target, const void* source, bool is_real) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :
               : "r"(target), "l"(source), "r"(is_real ? 16 : 0)
               : "memory");
}

__device__ __forceinline__ void copy_4_async(uint32_t target, const void* source, bool is_real) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;"
               :
               : "r"(target), "l"(source), "r"(is_real ? 4 : 0)
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

// Makes what this thread wrote to shared memory, or has waited for, visible to the tensor cores
// and to bulk copies.
__device__ __forceinline__ void publish_to_tensor_cores() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Barrier of whole warps, of one warpgroup unless said; number 0 is __syncthreads'.
template <int kThreads = kWarpgroup>
__device__ __forceinline__ void warpgroup_barrier(int number) {
  asm volatile("bar.sync %0, %1;" : : "r"(number), "n"(kThreads) : "memory");
}

// Where a product out[64, N] lies in the threads of a warpgroup: out[4j + 2i] is this row, i = 0
// or 1, with this column, and out[4j + 2i + 1] the next column.
__host__ __device__ constexpr int product_row(int thread, int i) {
  return thread / 32 * 16 + thread % 32 / 4 + 8 * i;
}
__host__ __device__ constexpr int product_column(int thread, int j) {
  return 8 * j + thread % 4 * 2;
}

constexpr int kTerms = 16;  // that one matrix instruction sums over

// Describes a tile of 128-byte rows in shared memory, written in the order of `swizzled`. Adding
// `terms_step` moves on by 16 channels a step, through tiles as `place_of_vector` has them.
__host__ __device__ constexpr uint64_t tile_descriptor(uint32_t address) {
  constexpr uint64_t kEightRows = 8 * kSwizzleBytes;
  constexpr uint64_t kSwizzle128 = 1;
  return (address >> 4 & 0x3FFFu) | uint64_t{1} << 16 | (kEightRows >> 4) << 32 |
         kSwizzle128 << 62;
}
__host__ __device__ constexpr uint64_t terms_step(int step, int half_bytes) {
  constexpr int kSteps = kSwizzleBytes / static_cast<int>(sizeof(uint16_t)) / kTerms;
  return step / kSteps * (half_bytes >> 4) + step % kSteps * 2;
}

// The same for a tile of 64-byte rows in the order of `swizzled_64`.
__host__ __device__ constexpr uint64_t tile_descriptor_64(uint32_t address) {
  constexpr uint64_t kEightRows = 8 * (kSwizzleBytes / 2);
  constexpr uint64_t kSwizzle64 = 2;
  return (address >> 4 & 0x3FFFu) | uint64_t{1} << 16 | (kEightRows >> 4) << 32 | kSwizzle64 << 62;
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

}  // namespace megatron_keye::hopper
