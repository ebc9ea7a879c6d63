// Arguments of the lightning indexer, shared by the host and the device code.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

namespace megatron_keye::indexer {

constexpr int kChannels = 64;
constexpr int kMostHeads = 16;
constexpr int kBlockRows = 64;       // queries that one thread block scores
constexpr int kTileKeys = 128;       // keys that a warpgroup scores at once
constexpr int kHalves = 2;           // warpgroups of a block; each keeps its own candidates
constexpr int kHalfCandidates = 2560;
constexpr int kSampledFrom = 16;     // keys of which one is sampled
constexpr int kMostKeys = 262144;    // of a row
constexpr int kMostSelected = 2048;

struct Candidate {
  float score;
  int key;
};

// The rows of one launch: rows [first_row, first_row + num_rows) of the sequence, or, where `rows`
// is given, those it lists from place first_row on; there are *num_listed of them.
struct Rows {
  const int64_t* key_start;  // [T]
  const int64_t* key_end;    // [T]
  const int* rows;
  const int* num_listed;
  int first_row;
  int num_rows;
  int num_keys;  // S; ranges are cut to it
};

struct ScoreParams {
  Rows rows;
  const __nv_bfloat16* q;  // [T, I, J], contiguous
  const __nv_bfloat16* k;  // keys that are scored, [., J], contiguous
  const float* gate;       // [T, I], contiguous
  int num_heads;           // I
  int num_scored;          // keys in k
  // Either all scores of a block's range are written, to scores[row of the launch, key] ...
  float* scores;
  int64_t score_stride;
  // ... or those that reach the row's threshold, to [row of the launch, half, place].
  const float* thresholds;  // [row of the launch]; NaN for a row that needs none
  Candidate* candidates;
  int* num_candidates;      // [row of the launch, half]; above kHalfCandidates if too many
};

struct SelectParams {
  Rows rows;
  int k;                        // K
  const float* scores;          // as above, or of the sampled keys
  int64_t score_stride;
  float* thresholds;
  const Candidate* candidates;
  const int* num_candidates;
  int* indices;                 // [T, K]
  int* failed;                  // rows whose candidates are too few or too many
  int* num_failed;
};

// Which scores a launch finds.
enum class Scores { kSampled, kCandidates, kListed };

// How many of a sequence's keys are sampled.
int num_sampled_keys(int num_keys);

// All launch on the current stream of the current device.
void launch_sample_keys(const __nv_bfloat16* k, int num_sampled, __nv_bfloat16* sample);
void launch_scores(Scores which, const ScoreParams& params);
void launch_find_thresholds(const SelectParams& params);
void launch_select_candidates(const SelectParams& params);
void launch_select_listed(const SelectParams& params);

}  // namespace megatron_keye::indexer
