// Device side of the top-k selection: one thread block a row, exact and deterministic.
// A row is too long to sort (up to a million keys for 2,048 places), so the k-th largest score is
// found digit by digit from the most significant bits, by counting; one ordered pass then writes
// every key above it, and of the keys equal to it the first ones that still fit.
//
// Long rows are read once. A sample of the row gives a threshold that about k and a safe margin
// pass; one read moves what passes into shared memory, where the exact cut is found. When too few
// or too many pass, which is counted, the row takes the way of the short ones:
// three reads. One counts the first digit, one moves the keys that share it into shared memory,
// where the other digits are counted, one writes. When more keys share it than fit there, the
// next digit is counted from global memory too: slower, never wrong.
// Only counts decide, so the order in which threads arrive cannot change the result.

#include <cuda_runtime.h>

#include <cstddef>

#include "select_top_k/params.h"
#include "support/launch.h"

namespace megatron_keye {

namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kDigits = 3;               // 11 + 11 + 10 bits
constexpr int kBins = 2048;              // of the wider digits
constexpr int kBinsPerThread = kBins / kThreads;
constexpr int kCopies = 4;               // of each bin, next to one another: in different banks
constexpr int kCandidates = 5120;        // keys that fit the buffer; 3 blocks share an SM
constexpr int kMinSampled = 16384;       // shorter rows are not worth a sample
constexpr int kSampleSize = 8192;        // at most; fits the buffer and the places beside it
constexpr int kMarkWords = kBins * 4;    // the histogram's room as a bit for each key of a row
constexpr int kVector = 4;               // floats of one load

struct Shared {
  uint4 histogram[kBins];  // one word per copy
  uint32_t candidates[kCandidates];
  uint32_t places[kCandidates];  // of the candidates, from the row's first key
  uint32_t warp_sums[kWarps];
  uint32_t num_candidates;
  uint32_t digit;           // of the k-th largest key
  uint32_t num_above;       // candidates with a larger digit
  uint32_t num_same;        // candidates with that digit
};

struct Row {
  const float* scores;
  int start;  // first key
  int end;    // one past the last key
};

// The keys at and above `threshold` that are taken.
struct Cut {
  uint32_t threshold;
  uint32_t num_ties;  // how many of the keys equal to the threshold, after masking, are taken
  uint32_t mask;      // bits of a key that are compared
};

// Order-preserving map to unsigned: -0.0 equals +0.0, every NaN is below -inf.
__device__ __forceinline__ uint32_t ordered_key(float score) {
  if (score != score) {
    return 0u;
  }
  const uint32_t bits = score == 0.0f ? 0u : __float_as_uint(score);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// Four neighbouring keys from an aligned position on; bit i of the result says that keys[i] lies
// inside the row. Rows and ranges may begin anywhere, so the ends are read one by one.
__device__ __forceinline__ uint32_t load_keys(const Row& row, int64_t position,
                                              uint32_t (&keys)[kVector]) {
  if (position >= row.start && position + kVector <= row.end) {
    const float4 scores = __ldg(reinterpret_cast<const float4*>(row.scores + position));
    keys[0] = ordered_key(scores.x);
    keys[1] = ordered_key(scores.y);
    keys[2] = ordered_key(scores.z);
    keys[3] = ordered_key(scores.w);
    return 0xFu;
  }
  uint32_t inside = 0;
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    keys[i] = 0u;
    if (position + i >= row.start && position + i < row.end) {
      keys[i] = ordered_key(__ldg(row.scores + position + i));
      inside |= 1u << i;
    }
  }
  return inside;
}

// The last position at or before the row's first key where a vector load is aligned.
__device__ __forceinline__ int64_t aligned_start(const Row& row) {
  const auto address = reinterpret_cast<uintptr_t>(row.scores + row.start);
  return row.start - static_cast<int64_t>(address / sizeof(float) % kVector);
}

template <typename Visit>
__device__ __forceinline__ void for_each_key(const Row& row, Visit visit) {
  const int64_t begin = aligned_start(row) + static_cast<int64_t>(threadIdx.x) * kVector;
#pragma unroll 4
  for (int64_t position = begin; position < row.end; position += kThreads * kVector) {
    uint32_t keys[kVector];
    const uint32_t inside = load_keys(row, position, keys);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      if (inside >> i & 1u) {
        visit(keys[i]);
      }
    }
  }
}

// Sum of `value` over the threads before this one; `total` over all. All threads take part.
__device__ __forceinline__ uint32_t sum_before(uint32_t value, uint32_t* warp_sums,
                                               uint32_t& total) {
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  uint32_t inclusive = value;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const uint32_t other = __shfl_up_sync(0xFFFFFFFFu, inclusive, distance);
    inclusive += lane >= distance ? other : 0u;
  }
  if (lane == 31) {
    warp_sums[warp] = inclusive;
  }
  __syncthreads();
  const uint32_t warp_sum = lane < kWarps ? warp_sums[lane] : 0u;
  const uint32_t before = __reduce_add_sync(0xFFFFFFFFu, lane < warp ? warp_sum : 0u);
  total = __reduce_add_sync(0xFFFFFFFFu, warp_sum);
  __syncthreads();  // warp_sums may be written again
  return before + inclusive - value;
}

__device__ __forceinline__ void count(Shared& shared, uint32_t digit) {
  // Scores crowd into few bins; four copies cut the threads of a warp that meet to a quarter.
  auto* words = reinterpret_cast<uint32_t*>(shared.histogram);
  atomicAdd(words + digit * kCopies + threadIdx.x % kCopies, 1u);
}

// Finds the bin of the `wanted`-th largest counted key; writes digit, num_above, num_same.
__device__ __forceinline__ void find_digit(Shared& shared, uint32_t wanted) {
  uint32_t counts[kBinsPerThread];
  uint32_t sum = 0;
  const int top = kBins - 1 - static_cast<int>(threadIdx.x) * kBinsPerThread;
#pragma unroll
  for (int i = 0; i < kBinsPerThread; ++i) {
    const uint4 copies = shared.histogram[top - i];
    counts[i] = copies.x + copies.y + copies.z + copies.w;
    sum += counts[i];
  }
  uint32_t total;
  uint32_t above = sum_before(sum, shared.warp_sums, total);
#pragma unroll
  for (int i = 0; i < kBinsPerThread; ++i) {
    if (above < wanted && wanted <= above + counts[i]) {
      shared.digit = top - i;
      shared.num_above = above;
      shared.num_same = counts[i];
    }
    above += counts[i];
  }
  __syncthreads();
}

// Where to cut the row so that exactly k keys stay; the row has more than k.
__device__ Cut find_cut(Shared& shared, const Row& row, uint32_t k) {
  constexpr int kShift[kDigits] = {21, 10, 0};
  Cut cut{.threshold = 0u, .num_ties = k, .mask = 0u};
  bool is_buffered = false;
#pragma unroll 1
  for (int step = 0; step < kDigits; ++step) {
    const int shift = kShift[step];
    const uint32_t digit_mask = step + 1 < kDigits ? 0x7FFu : 0x3FFu;
    for (int bin = threadIdx.x; bin < kBins; bin += kThreads) {
      shared.histogram[bin] = make_uint4(0u, 0u, 0u, 0u);
    }
    __syncthreads();
    if (is_buffered) {
      const uint32_t num_candidates = shared.num_candidates;
      for (uint32_t i = threadIdx.x; i < num_candidates; i += kThreads) {
        const uint32_t key = shared.candidates[i];
        if ((key & cut.mask) == cut.threshold) {
          count(shared, key >> shift & digit_mask);
        }
      }
    } else {
      for_each_key(row, [&](uint32_t key) {
        if ((key & cut.mask) == cut.threshold) {
          count(shared, key >> shift & digit_mask);
        }
      });
    }
    __syncthreads();
    find_digit(shared, cut.num_ties);
    cut.threshold |= shared.digit << shift;
    cut.mask |= digit_mask << shift;
    cut.num_ties -= shared.num_above;
    const uint32_t num_same = shared.num_same;
    if (num_same == cut.num_ties || step + 1 == kDigits) {
      return cut;  // the lower digits cannot change what is taken
    }
    if (!is_buffered && num_same <= kCandidates) {
      if (threadIdx.x == 0) {
        shared.num_candidates = 0u;
      }
      __syncthreads();
      for_each_key(row, [&](uint32_t key) {
        if ((key & cut.mask) == cut.threshold) {
          shared.candidates[atomicAdd(&shared.num_candidates, 1u)] = key;
        }
      });
      is_buffered = true;
    }
    __syncthreads();  // the buffer is written, and digit and counts are read, before the next step
  }
  return cut;
}

// Where to cut the first `num_keys` words of the buffer so that exactly `wanted` stay.
__device__ Cut find_cut_in_buffer(Shared& shared, const uint32_t* keys, uint32_t num_keys,
                                  uint32_t wanted) {
  constexpr int kShift[kDigits] = {21, 10, 0};
  Cut cut{.threshold = 0u, .num_ties = wanted, .mask = 0u};
#pragma unroll 1
  for (int step = 0; step < kDigits; ++step) {
    const int shift = kShift[step];
    const uint32_t digit_mask = step + 1 < kDigits ? 0x7FFu : 0x3FFu;
    for (int bin = threadIdx.x; bin < kBins; bin += kThreads) {
      shared.histogram[bin] = make_uint4(0u, 0u, 0u, 0u);
    }
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < num_keys; i += kThreads) {
      if ((keys[i] & cut.mask) == cut.threshold) {
        count(shared, keys[i] >> shift & digit_mask);
      }
    }
    __syncthreads();
    find_digit(shared, cut.num_ties);
    cut.threshold |= shared.digit << shift;
    cut.mask |= digit_mask << shift;
    cut.num_ties -= shared.num_above;
    const uint32_t num_same = shared.num_same;
    __syncthreads();  // digit and counts are read before the next step
    if (num_same == cut.num_ties) {
      return cut;  // all that agree with the threshold are taken
    }
  }
  cut.mask = 0u;  // only some of the equal keys are taken: the caller needs their order
  return cut;
}

// A threshold that about `wanted` keys and a margin of five standard deviations pass; 0 if the
// sample is too small to tell.
__device__ uint32_t sample_threshold(Shared& shared, const Row& row, uint32_t wanted) {
  static_assert(kSampleSize <= 2 * kCandidates, "the sample lies in the buffer and the places");
  static_assert(offsetof(Shared, places) ==
                    offsetof(Shared, candidates) + sizeof(Shared::candidates),
                "which follow one another");
  const uint32_t num_keys = row.end - row.start;
  const uint32_t stride = (num_keys + kSampleSize - 1) / kSampleSize;
  const uint32_t num_sampled = num_keys / (kVector * stride) * kVector;
  const float expected = static_cast<float>(wanted) / static_cast<float>(stride);
  const auto rank = static_cast<uint32_t>(expected + 5.0f * sqrtf(expected) + 5.0f);
  if (rank >= num_sampled) {
    return 0u;
  }
  uint32_t* sample = shared.candidates;
  for (uint32_t i = threadIdx.x; i < num_sampled; i += kThreads) {
    // Neighbours share a sector of memory; which of a stretch's are taken follows no period.
    const uint32_t group = i / kVector;
    const uint32_t turn = (group * 2654435761u >> 8) % stride;
    const uint32_t place = (group * stride + turn) * kVector + i % kVector;
    sample[i] = ordered_key(__ldg(row.scores + row.start + place));
  }
  __syncthreads();
  const Cut cut = find_cut_in_buffer(shared, sample, num_sampled, rank);
  __syncthreads();  // the buffer may be written again
  return cut.threshold;  // of a cut that was found early, its lower bits are 0: more pass
}

// Selects with one read of the row; returns false, the same for all threads, when that fails.
__device__ bool select_in_one_read(Shared& shared, const Row& row, uint32_t k,
                                   int32_t* indices) {
  const uint32_t num_keys = row.end - row.start;
  const uint32_t num_words = (num_keys + 31) / 32;
  if (num_keys < kMinSampled || num_words > kMarkWords || k > kCandidates / 2) {
    return false;
  }
  const uint32_t threshold = sample_threshold(shared, row, k);
  if (threshold == 0u) {
    return false;
  }
  if (threadIdx.x == 0) {
    shared.num_candidates = 0u;
  }
  __syncthreads();
  const int64_t begin = aligned_start(row) + static_cast<int64_t>(threadIdx.x) * kVector;
#pragma unroll 4
  for (int64_t position = begin; position < row.end; position += kThreads * kVector) {
    uint32_t keys[kVector];
    const uint32_t inside = load_keys(row, position, keys);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      if ((inside >> i & 1u) && keys[i] >= threshold) {
        const uint32_t slot = atomicAdd(&shared.num_candidates, 1u);
        if (slot < kCandidates) {
          shared.candidates[slot] = keys[i];
          shared.places[slot] = static_cast<uint32_t>(position + i - row.start);
        }
      }
    }
  }
  __syncthreads();
  const uint32_t num_candidates = shared.num_candidates;
  if (num_candidates < k || num_candidates > kCandidates) {
    __syncthreads();  // the count is read before the other way writes it
    return false;
  }
  const Cut cut = find_cut_in_buffer(shared, shared.candidates, num_candidates, k);
  if (cut.mask == 0u) {
    return false;
  }
  auto* marks = reinterpret_cast<uint32_t*>(shared.histogram);
  for (uint32_t word = threadIdx.x; word < num_words; word += kThreads) {
    marks[word] = 0u;
  }
  __syncthreads();
  for (uint32_t i = threadIdx.x; i < num_candidates; i += kThreads) {
    if ((shared.candidates[i] & cut.mask) >= cut.threshold) {
      const uint32_t place = shared.places[i];
      atomicOr(marks + place / 32, 1u << place % 32);
    }
  }
  __syncthreads();
  const uint32_t words_each = (num_words + kThreads - 1) / kThreads;
  const uint32_t first = min(threadIdx.x * words_each, num_words);
  const uint32_t last = min(first + words_each, num_words);
  uint32_t num_marked = 0;
  for (uint32_t word = first; word < last; ++word) {
    num_marked += __popc(marks[word]);
  }
  uint32_t total;
  uint32_t slot = sum_before(num_marked, shared.warp_sums, total);
  for (uint32_t word = first; word < last; ++word) {
    for (uint32_t bits = marks[word]; bits != 0u; bits &= bits - 1u) {
      const uint32_t place = word * 32 + __ffs(static_cast<int>(bits)) - 1;
      indices[slot++] = row.start + static_cast<int32_t>(place);
    }
  }
  return true;
}

// Writes the taken keys of the row in ascending order, and -1 behind them.
__device__ void write_indices(Shared& shared, const Row& row, const Cut& cut, uint32_t k,
                              int32_t* indices) {
  uint32_t above_before = 0;  // keys above the threshold in the tiles so far
  uint32_t ties_before = 0;   // keys equal to it
  const int64_t begin = aligned_start(row);
  for (int64_t tile = begin; tile < row.end; tile += kThreads * kVector) {
    const int64_t position = tile + static_cast<int64_t>(threadIdx.x) * kVector;
    uint32_t keys[kVector];
    const uint32_t inside = load_keys(row, position, keys);
    uint32_t counts = 0;  // above in the low half, equal in the high half; a tile holds 2,048
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const uint32_t key = keys[i] & cut.mask;
      const uint32_t one = key > cut.threshold ? 1u : key == cut.threshold ? 1u << 16 : 0u;
      counts += inside >> i & 1u ? one : 0u;
    }
    uint32_t total;
    const uint32_t before = sum_before(counts, shared.warp_sums, total);
    uint32_t num_above = above_before + (before & 0xFFFFu);
    uint32_t num_equal = ties_before + (before >> 16);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      if (!(inside >> i & 1u)) {
        continue;
      }
      const uint32_t key = keys[i] & cut.mask;
      const bool is_above = key > cut.threshold;
      const bool is_equal = key == cut.threshold;
      if (is_above || (is_equal && num_equal < cut.num_ties)) {
        indices[num_above + min(num_equal, cut.num_ties)] = static_cast<int32_t>(position + i);
      }
      num_above += is_above;
      num_equal += is_equal;
    }
    above_before += total & 0xFFFFu;
    ties_before += total >> 16;
    if (above_before + min(ties_before, cut.num_ties) == k) {
      return;  // the same for all threads
    }
  }
}

__global__ void __launch_bounds__(kThreads) select_top_k_kernel(SelectTopKParams params) {
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  Shared& shared = *reinterpret_cast<Shared*>(shared_bytes);
  // The last rows of a causal sequence are the longest; started first, they leave no tail.
  const int64_t t = params.num_rows - 1 - blockIdx.x;
  const int64_t end = min(params.key_end[t], params.num_keys);
  const int64_t start = min(max(params.key_start[t], int64_t{0}), max(end, int64_t{0}));
  const Row row{
      .scores = params.scores + t * params.row_stride,
      .start = static_cast<int>(start),
      .end = static_cast<int>(max(end, start)),
  };
  int32_t* indices = params.indices + t * params.k;
  const int num_keys = row.end - row.start;
  if (num_keys > params.k) {
    const auto k = static_cast<uint32_t>(params.k);
    if (select_in_one_read(shared, row, k, indices)) {
      return;
    }
    const Cut cut = find_cut(shared, row, k);
    __syncthreads();
    write_indices(shared, row, cut, k, indices);
    return;
  }
  for (int slot = threadIdx.x; slot < params.k; slot += kThreads) {
    indices[slot] = slot < num_keys ? row.start + slot : -1;
  }
}

}  // namespace

void launch_select_top_k(const SelectTopKParams& params) {
  launch(select_top_k_kernel, dim3(static_cast<unsigned>(params.num_rows)), dim3(kThreads),
         static_cast<int>(sizeof(Shared)), params);
}

}  // namespace megatron_keye
