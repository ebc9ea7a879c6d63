// SPDX-License-Identifier: Apache-2.0
// Barriers in shared memory between threads that copy and threads that compute, and how registers
// pass from the former to the latter.
// Source: PTX ISA 8.8, "mbarrier", "cp.async.mbarrier.arrive" and "setmaxnreg".
#pragma once

#include <cstdint>

namespace megatron_keye::hopper {

// One thread makes a barrier, before a barrier of the block; a phase ends after `arrivals`.
__device__ __forceinline__ void make_barrier(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" : : "r"(barrier), "r"(arrivals)
               : "memory");
}

__device__ __forceinline__ void arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" : : "r"(barrier) : "memory");
}

// Arrives, without waiting, when all copies that this thread has issued are there.
__device__ __forceinline__ void arrive_after_copies(uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" : : "r"(barrier)
               : "memory");
}

// Waits until the phase of this parity has ended; before the first one, 1 has.
__device__ __forceinline__ void wait_for_phase(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred has_ended;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 has_ended, [%0], %1;\n"
      "@!has_ended bra.uni again;\n"
      "}\n"
      :
      : "r"(barrier), "r"(parity)
      : "memory");
}

// Where a thread is in a ring of stages.
template <int kStages>
struct RingPlace {
  int stage = 0;
  uint32_t parity = 0;  // of the phase that the stage is in

  __device__ __forceinline__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// Both for all threads of a warpgroup at once.
template <int kRegisters>
__device__ __forceinline__ void give_registers_down_to() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" : : "n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void take_registers_up_to() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" : : "n"(kRegisters));
}

}  // namespace megatron_keye::hopper
