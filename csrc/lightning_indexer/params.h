// SPDX-License-Identifier: Apache-2.0
// Arguments of the lightning indexer, shared by the host and the device code.
#pragma once

#include <vector_types.h>

#include <cstdint>

namespace megatron_keye::indexer {

constexpr int kChannels = 64;
constexpr int kMaxHeads = 16;
constexpr int kBlockRows = 64;  // queries that one thread block scores
constexpr int kTileKeys = 128;  // keys that a warpgroup scores at once
constexpr int kHalves = 2;      // warpgroups of a block
constexpr int kLanes = 4;       // threads of a warpgroup that a query's row belongs to
constexpr int kParts = kHalves * kLanes;  // of a row; each thread keeps its own candidates
constexpr int kPartCandidates = 640;
constexpr int kRowFloats = 12288;  // of scratch memory for a query: candidates or scores
constexpr int kAllScores = -1;     // in place of a row's number of candidates
constexpr int kSampledFrom = 16;   // keys of which one is sampled
constexpr int kMaxKeys = 262144;  // of a row
constexpr int kMaxSelected = 2048;

struct alignas(8) Candidate {
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
  bool are_e4m3;           // q and k, not bfloat16
  const uint4* q;          // [T, I, J], contiguous
  const uint4* k;          // keys that are scored, [., J], contiguous
  const float* key_scale;  // [.], beside e4m3 keys
  const float* gate;       // [T, I], contiguous; times the queries' scales where q is e4m3
  int num_heads;           // I
  int num_scored;          // keys in k
  int num_multiprocessors;
  float* scores;         // [row of the launch, .]
  int64_t score_stride;  // in elements
  // kCandidates keeps [part, kPartCandidates] in a row of kRowFloats, or where all keys that a
  // block's queries see fit there, their scores, from a key on.
  const float* thresholds;  // [row of the launch]; NaN for a row that needs none
  int* num_candidates;      // [row of the launch, part], more than kPartCandidates if too many;
                            // or kAllScores and the first key
};

struct SelectParams {
  Rows rows;
  int k;                // K
  const float* scores;  // as above
  int64_t score_stride;
  float* thresholds;
  const int* num_candidates;
  int* indices;  // [T, K]
  int* failed;   // rows whose candidates are too few or too many
  int* num_failed;
};

// Which scores a launch finds.
enum class Scores { kSampled, kCandidates, kListed };

// How many of a sequence's keys are sampled.
int num_sampled_keys(int num_keys);

// All launch on the current stream of the current device.
void launch_sample_keys(const ScoreParams& params, int num_sampled, uint4* sample,
                        float* sample_scale);
void launch_scores(Scores which, const ScoreParams& params);
void launch_find_thresholds(const SelectParams& params);
void launch_select_candidates(const SelectParams& params);
void launch_select_listed(const SelectParams& params);

}  // namespace megatron_keye::indexer
