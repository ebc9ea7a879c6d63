// SPDX-License-Identifier: Apache-2.0
// Host program: where the loss pass keeps the columns of its products, whose they are, and where a
// key stands in a query's row. It ends with status 1 and a line for each thing that differs.
// Source: PTX ISA 8.8, "Shared Memory Matrix Layout" and "Matrix Descriptor" of wgmma.

#include <cstdio>
#include <map>
#include <random>
#include <set>
#include <utility>

#include "sparse_attention/loss_block.cuh"

namespace {

using namespace megatron_keye::sparse_attention;

bool has_failed = false;

void expect(bool is_right, const char* what, int first, int second) {
  if (!is_right) {
    std::printf("%s: wrong at (%d, %d)\n", what, first, second);
    has_failed = true;
  }
}

// Address of a right factor's value in column `n` and term `k`, as the tensor cores read it.
uint32_t address_of(uint64_t descriptor, int n, int k) {
  const auto start = static_cast<uint32_t>((descriptor & 0x3FFF) << 4);
  const auto stride = static_cast<uint32_t>((descriptor >> 32 & 0x3FFF) << 4);
  const uint32_t linear = start + n / 8 * stride + n % 8 * kSwizzleBytes + k * 2;
  return linear ^ (linear >> 3 & 0x70);
}

// Columns are read as they were written.
template <typename Cut>
void check_columns() {
  std::map<uint32_t, int> values;
  for (int column = 0; column < Cut::kColumns; ++column) {
    for (int channel = 0; channel < Cut::kChannels; ++channel) {
      const uint32_t at = place_of_vector(column, channel / 8, Cut::kHalfColumnsBytes) +
                          channel % 8 * 2;
      const bool is_new = values.emplace(at, column * Cut::kChannels + channel).second;
      expect(is_new && at < sizeof(LossShared<Cut>::columns[0]), "written", column, channel);
    }
  }
  for (int column = 0; column < Cut::kColumns; ++column) {
    for (int channel = 0; channel < Cut::kChannels; ++channel) {
      const uint64_t descriptor =
          tile_descriptor(0) + terms_step(channel / kTerms, Cut::kHalfColumnsBytes);
      const auto found = values.find(address_of(descriptor, column, channel % kTerms));
      expect(found != values.end() && found->second == column * Cut::kChannels + channel,
             "read", column, channel);
    }
  }
}

// A thread's values are, query by query, its share of the heads; four threads have all of them.
template <typename Cut>
void check_owners() {
  std::set<std::pair<int, int>> heads;
  for (int thread = 0; thread < kWarpgroup; ++thread) {
    for (int j = 0; j < Cut::kColumns / 8; ++j) {
      for (int odd = 0; odd < 2; ++odd) {
        const int column = product_column(thread, j) + odd;
        const int number = number_in_lane(column);
        const int lane = thread % kLanesOfRow;
        expect(number == 2 * j + odd && lane_of_column(column) == lane, "number", thread, column);
        expect(query_of_column<Cut>(column) == number / Cut::kOwnHeads, "query", thread, column);
        expect(head_of_column<Cut>(column) / Cut::kOwnHeads == lane, "share", thread, column);
        expect(place_of_lse<Cut>(column) == lane * Cut::kLsePitch + number, "lse", lane, number);
        heads.emplace(query_of_column<Cut>(column), head_of_column<Cut>(column));
      }
    }
  }
  expect(heads.size() == Cut::kColumns, "heads", static_cast<int>(heads.size()), Cut::kColumns);
  for (const auto& [query, head] : heads) {
    expect(query >= 0 && query < Cut::kQueries && head >= 0 && head < Cut::kHeads, "head", query,
           head);
  }
  std::set<int> banks;
  for (int lane = 0; lane < kLanesOfRow; ++lane) {
    expect(lane * Cut::kLsePitch % 4 == 0, "lse of 16 bytes", lane, Cut::kLsePitch);
    expect(banks.insert(lane * Cut::kLsePitch / 4 % 8).second, "lse of a bank", lane, 0);
  }
}

// The selected keys of a row, counted tile by tile, stand one behind the other.
void check_slots() {
  std::mt19937 random(1);
  int count = 0;
  for (int tile = 0; tile < 64; ++tile) {
    // From tiles without any key of the query to tiles that are all its own.
    uint32_t halves[2];
    for (uint32_t& half : halves) {
      half = tile % 4 == 0 ? 0u : tile % 4 == 1 ? ~0u : static_cast<uint32_t>(random());
    }
    const int before = count;
    for (int key = 0; key < kTileKeys; ++key) {
      const Slots slots = slots_of(halves[0], halves[1], key / kWarpRows, before);
      const bool is_selected = (halves[key / 32] >> key % 32 & 1u) != 0;
      expect(slots.has(key % kWarpRows) == is_selected, "selected", tile, key);
      expect(!is_selected || slots.place(key % kWarpRows) == count, "place", tile, key);
      count += is_selected ? 1 : 0;
    }
  }
}

template <int kChannels, int kHeads>
void check() {
  using Cut = LossBlock<kChannels, kHeads>;
  check_columns<Cut>();
  check_owners<Cut>();
  static const LossShared<Cut> shared{};
  const auto* const begin = reinterpret_cast<const unsigned char*>(&shared);
  expect((&shared.keys[0][1][0] - begin) % 1024 == 0, "keys begin", kChannels, kHeads);
  expect((&shared.columns[0][0] - begin) % 1024 == 0, "columns begin", kChannels, kHeads);
  expect((&shared.columns[1][0] - begin) % 1024 == 0, "columns begin", kChannels, kHeads);
  expect(sizeof(shared) <= LossShared<Cut>::kLimitBytes, "bytes", kChannels, kHeads);
}

}  // namespace

int main() {
  check_slots();
  check<128, 4>();
  check<128, 8>();
  check<128, 16>();
  check<64, 4>();
  check<64, 8>();
  check<64, 16>();
  return has_failed ? 1 : 0;
}
