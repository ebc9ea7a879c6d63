// SPDX-License-Identifier: Apache-2.0
// Additions to float32 values in global memory that nobody waits for.
// Source: PTX ISA 8.8, "cp.reduce.async.bulk" and "red".
#pragma once

#include <cstdint>

namespace megatron_keye::hopper {

// Starts to add `bytes` of shared memory to `target`; both begin at multiples of 16 bytes. Writers
// of that memory have published it to the asynchronous units and met this thread since.
__device__ __forceinline__ void add_in_bulk(float* target, uint32_t source, int bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;"
               :
               : "l"(target), "r"(source), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void commit_additions() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Waits until the shared memory of this thread's additions may be written again.
__device__ __forceinline__ void wait_for_sources() {
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}

// Waits until this thread's additions are done.
__device__ __forceinline__ void wait_for_additions() {
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

// Adds to two adjacent values, at a multiple of 8 bytes.
__device__ __forceinline__ void add_pair(float* target, float first, float second) {
  asm volatile("red.relaxed.gpu.global.add.v2.f32 [%0], {%1, %2};"
               :
               : "l"(target), "f"(first), "f"(second)
               : "memory");
}

}  // namespace megatron_keye::hopper
