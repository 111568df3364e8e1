// What a comparison found: rows for results.json and for people. docs/metrics.md has the
// formula of every number. Plain values.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "common/routing.h"
#include "common/run_record.h"
#include "evaluator/expert_copies.h"
#include "evaluator/memory_manager.h"
#include "evaluator/speculation_ledger.h"

namespace routecast {

// The least, the quartiles and the most.
using FiveNumbers = std::array<double, 5>;

// What speculation at one lead was worth in a row.
struct LeadResult {
  SpeculationAccount account;
  int64_t wasted_bytes = 0;
  double saved_seconds = 0;  // of waiting, by what a transfer took last
};

struct RowResult {
  std::string policy, predictor, eviction, tier;
  Stack phase = Stack::kDecoder;
  uint64_t budget_bytes = 0, held_bytes_peak = 0;
  double budget_phase_share = 0;
  // Where keys and values share the budget: the most that they and slots took, and the
  // fewest slots that were left. Else 0.
  uint64_t memory_bytes_peak = 0;
  int least_slots = 0;
  // What was counted where the slots were filled before the first step, else empty; how
  // many experts that brought, and what it cost.
  std::string warm_start;
  int warm_start_experts = 0;
  uint64_t warm_start_bytes = 0;
  double warm_start_seconds = 0;
  int batch = 1, pairs = 0;
  std::string prompts;                // which requests: store, lines.txt, squad:dev.json
  std::string schedule = "in_order";  // how they were batched
  std::string budget;                 // as asked for, where there are several; else empty
  bool emulated = false;
  double tokens_per_second = 0, spread = 0;  // median and interquartile range over rounds
  double p50_ms = 0, p95_ms = 0, p99_ms = 0;  // of a step
  double hit_rate = 0;
  int64_t bytes_useful = 0, bytes_late = 0, bytes_wasted = 0, bytes_belady = 0;
  double stall_seconds = 0, compute_seconds = 0, transfer_seconds = 0,
         predictor_seconds = 0,
         predictor_aside_seconds = 0;  // on the questions' own thread, beside the pass
  double bound = 0;
  bool lossless = false;
  std::string copies = "lossless";  // of experts on disk; else the three below count
  double exact_match = 1, logit_kl = 0, perplexity_change = 0;  // lossy_quality.h
  int64_t compared_sequences = 0;
  CopyFigures copy;
  std::string output_sha256;
  double speed_up = 0;  // median over rounds of the rate over on-demand LRU's
  // By lead, where thresholds adapt and anything was foretold.
  std::vector<LeadResult> speculation;
  std::optional<MemoryManagerState> memory_manager;  // where the policy has one
  bool switched_off = false;  // the row's speculation did not help and is off
  double effect_size = 0;     // (mean - 1) / deviation of those ratios; 0 where unknown
  // Over rounds: those ratios, and a token's share of computing and of waiting.
  FiveNumbers speed_up_spread{}, compute_ms_spread{}, stall_ms_spread{};
  // A round each: tokens a second, and its ratio to on-demand LRU's in the same round.
  std::vector<double> round_rates, round_speed_ups;
  // Of what was prefetched: used, and used and there in time; of what was needed:
  // prefetched.
  double prefetch_precision = 0, prefetch_timely = 0, prefetch_recall = 0;
  double batch_dedup = 0;  // share of the tokens' requests that shared another's expert
  double predictor_share = 0, link_share = 0, compute_share = 0;  // of the steps' time
};

struct ComparisonResult {
  std::vector<RowResult> rows;
  std::string device, link;  // descriptions
  // Most that was in use on the device at a round's end; 0: slots of host memory.
  uint64_t device_peak_bytes = 0;
  double link_peak_bytes_per_second = 0;
  double link_bytes_per_second = 0;  // what the rows had: the peak or the pace
  bool emulated = false;             // of one row at least
  bool synthetic_weights = false;
  int num_groups = 1;              // comparisons: rows of one GroupName may be compared
  std::vector<std::string> notes;  // what a reader must know: rows left out, fallbacks
  bool lossless = false;  // all rows that do not say otherwise put out the same bits
  // Adds the rows of another comparison (to an empty result: becomes it). The link's
  // figures stay those of the fastest; notes name the comparison.
  void Append(ComparisonResult other);
  Json ToJson() const;  // results.json, exactly the keys of docs/metrics.md
  // rows.csv: the same rows and keys; of five numbers a column each (_min, _q1, _median,
  // _q3, _max), nothing where a row has no such key.
  std::string ToCsv() const;
};

// "store, batch 4, by_route"
std::string GroupName(const RowResult& row);

// The table that people read; one line a row and phase.
std::string ComparisonTable(const ComparisonResult& result);

}  // namespace routecast
