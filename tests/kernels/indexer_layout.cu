// SPDX-License-Identifier: Apache-2.0
// Host program: the lightning indexer's tiles of e4m3 numbers in shared memory, read back as the
// tensor cores read them. It ends with status 1 and a line for each number that is elsewhere.
// Source: PTX ISA 8.8, "Shared Memory Matrix Layout" and "Matrix Descriptor" of wgmma.

#include <cstdio>
#include <vector>

#include "lightning_indexer/operands_sm90a.cuh"

namespace {

using namespace megatron_keye;

constexpr int kTerms = 32;  // of an instruction

// Where the tensor cores read a term of a row, in the order of 64 bytes: bits 4 and 5 of an
// address are changed by its bits 7 and 8.
uint32_t address_of(uint64_t descriptor, int row, int term) {
  const uint32_t start = (descriptor & 0x3FFF) << 4;
  const uint32_t eight_rows = (descriptor >> 32 & 0x3FFF) << 4;
  const uint32_t linear = start + row / 8 * eight_rows + row % 8 * 64 + term;
  return linear ^ (linear >> 3 & 0x30);
}

int count_misplaced(int num_rows) {
  constexpr uint32_t kStart = 3 * 512;
  std::vector<int> memory(kStart + num_rows * indexer::E4m3::kRowBytes, -1);
  for (int row = 0; row < num_rows; ++row) {
    for (int channel = 0; channel < indexer::kChannels; ++channel) {
      const uint32_t place = hopper::swizzled_64(row, channel / 16) + channel % 16;
      memory.at(kStart + place) = row * indexer::kChannels + channel;
    }
  }
  int num_misplaced = 0;
  for (int row = 0; row < num_rows; ++row) {
    for (int channel = 0; channel < indexer::kChannels; ++channel) {
      const uint64_t step = hopper::tile_descriptor_64(kStart) + channel / kTerms * 2;
      const uint32_t address = address_of(step, row, channel % kTerms);
      if (step >> 62 != 2 || memory.at(address) != row * indexer::kChannels + channel) {
        std::printf("row %d, channel %d: not at byte %u\n", row, channel, address);
        ++num_misplaced;
      }
    }
  }
  return num_misplaced;
}

}  // namespace

int main() {
  const int num_misplaced =
      count_misplaced(indexer::kBlockRows) + count_misplaced(indexer::kTileKeys);
  return num_misplaced == 0 ? 0 : 1;
}
