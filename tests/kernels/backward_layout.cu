// SPDX-License-Identifier: Apache-2.0
// Host program: what the sparse attention's backward pass writes to shared memory, read back as
// the tensor cores read it. It ends with status 1 and a line for each thing that differs.
// Source: PTX ISA 8.8, "Shared Memory Matrix Layout" and "Matrix Descriptor" of wgmma.

#include <cstdio>
#include <set>
#include <vector>

#include "sparse_attention/backward_block.cuh"

namespace {

using namespace megatron_keye::sparse_attention;

bool has_failed = false;

void expect(bool is_right, const char* what, int first, int second) {
  if (!is_right) {
    std::printf("%s: wrong at (%d, %d)\n", what, first, second);
    has_failed = true;
  }
}

// 16-bit values by byte address; a value is its place in the matrix, and -1 was never written.
class Memory {
 public:
  explicit Memory(int num_bytes) : values_(num_bytes / 2, -1) {}
  void write(uint32_t address, int value) {
    expect(values_.at(address / 2) == -1, "written twice", address, value);
    values_[address / 2] = value;
  }
  int read(uint32_t address) const { return values_.at(address / 2); }

 private:
  std::vector<int> values_;
};

// Address of a factor's value in column `n` (row of a left factor) and term `k`.
uint32_t address_of(uint64_t descriptor, Major major, int n, int k) {
  const auto field = [&](int bit) {
    return static_cast<uint32_t>((descriptor >> bit & 0x3FFF) << 4);
  };
  const uint32_t start = field(0);
  const uint32_t leading = field(16);
  const uint32_t stride = field(32);
  const uint32_t by_terms = start + n / 8 * stride + n % 8 * 128 + k * 2;
  const uint32_t by_columns = start + n / 64 * leading + n % 64 * 2 + k / 8 * stride + k % 8 * 128;
  const uint32_t linear = major == Major::kTerms ? by_terms : by_columns;
  return linear ^ (linear >> 3 & 0x70);
}

// Rows of channels, as q, dout, keys and values lie, read in both directions.
void check_rows(int num_rows, int num_channels) {
  constexpr uint32_t kStart = 3 * 1024;
  const int half_bytes = num_rows * kSwizzleBytes;
  Memory memory(kStart + num_rows * num_channels * 2);
  for (int row = 0; row < num_rows; ++row) {
    for (int channel = 0; channel < num_channels; ++channel) {
      memory.write(kStart + place_of_vector(row, channel / 8, half_bytes) + channel % 8 * 2,
                   row * num_channels + channel);
    }
  }
  for (int row = 0; row < num_rows; ++row) {
    for (int channel = 0; channel < num_channels; ++channel) {
      const uint64_t terms =
          tile_descriptor(kStart + row / kWarpgroupRows * kWarpgroupRows * kSwizzleBytes) +
          terms_step(channel / kTerms, half_bytes);
      const uint64_t columns =
          columns_descriptor(kStart, half_bytes) + kColumnsStep * (row / kTerms);
      expect(terms >> 62 == 1 && columns >> 62 == 1, "order of 128 bytes", row, channel);
      const int wanted = row * num_channels + channel;
      expect(memory.read(address_of(terms, Major::kTerms, row % kWarpgroupRows,
                                    channel % kTerms)) == wanted,
             "channels as terms", row, channel);
      expect(memory.read(address_of(columns, Major::kColumns, channel, row % kTerms)) == wanted,
             "rows as terms", row, channel);
    }
  }
}

// Weights, which all consumers write and each reads with rows as terms.
template <typename Cut>
void check_weights() {
  Memory memory(Cut::kHalfRowsBytes);
  for (int j = 0; j < kTileKeys / 8; ++j) {
    for (int i = 0; i < 2; ++i) {
      std::set<uint32_t> banks;
      for (int thread = 0; thread < Cut::kConsumers * kWarpgroup; ++thread) {
        banks = thread % 32 == 0 ? std::set<uint32_t>{} : banks;
        const uint32_t at = place_of_pair(thread, i, j);
        expect(banks.insert(at / 4 % 32).second, "two weights of a bank", thread, j);
        for (int odd = 0; odd < 2; ++odd) {
          memory.write(at + 2 * odd, product_row(thread, i) * kTileKeys +
                                         product_column(thread, j) + odd);
        }
      }
    }
  }
  for (int row = 0; row < Cut::kRows; ++row) {
    for (int key = 0; key < kTileKeys; ++key) {
      const uint64_t left = tile_descriptor(0) + kColumnsStep * (row / kTerms);
      expect(memory.read(address_of(left, Major::kColumns, key, row % kTerms)) ==
                 row * kTileKeys + key,
             "weights with rows as terms", row, key);
    }
  }
}

// Sums on their way to memory: rows that bulk additions take, written without bank conflicts.
template <typename Cut>
void check_sums() {
  Memory memory(2 * kTileKeys * Cut::kPitch);  // twice, since values have 32 bits
  for (const SumKind kind : {kOfKeys, kOfValues}) {
    for (int j = 0; j < Cut::kChannels / 8; ++j) {
      for (int i = 0; i < 2; ++i) {
        std::set<uint32_t> banks;
        for (int thread = 0; thread < kWarpgroup; ++thread) {
          banks = thread % 16 == 0 ? std::set<uint32_t>{} : banks;
          const int key = product_row(thread, i);
          const int channel = product_column(thread, j);
          const int at = place_of_sum<Cut>(key, kind, channel);
          expect(key / kWarpRows == thread / 32, "key of another warp", key, thread);
          const int begin = place_of_sum<Cut>(key, kind, 0);
          expect(begin % 16 == 0 && at == begin + channel * 4, "a key's sums", key, channel);
          expect(banks.insert(at / 8 % 16).second, "two sums of a bank", thread, j);
          memory.write(at, at);
          memory.write(at + 4, at);
        }
      }
    }
  }
  }

template <typename Cut>
void check() {
  check_rows(Cut::kRows, Cut::kChannels);
  check_rows(kTileKeys, Cut::kChannels);
  check_weights<Cut>();
  check_sums<Cut>();
  static const BackwardShared<Cut> shared{};
  const auto* const begin = reinterpret_cast<const unsigned char*>(&shared);
  const unsigned char* const parts[] = {shared.q, shared.dout, shared.weights, shared.dlogits,
                                        shared.sums};
  for (const unsigned char* const part : parts) {
    const auto at = static_cast<int>(part - begin);
    expect(at % 1024 == 0, "begin in shared memory", at, Cut::kHeads);
  }
}

}  // namespace

int main() {
  check<BackwardBlock<128, 8>>();
  check<BackwardBlock<128, 4>>();
  check<BackwardBlock<64, 8>>();
  check<BackwardBlock<64, 4>>();
  return has_failed ? 1 : 0;
}
