// Rows of one comparison, measured in interleaved rounds: every round runs the same
// segment in every row, in changing order, and each row's rate is divided by that of
// on-demand LRU in the same round. docs/metrics.md has the formula of every number.
// Thread rule: one thread.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "evaluator/comparison_result.h"
#include "evaluator/device_profile.h"
#include "evaluator/expert_budget.h"
#include "evaluator/expert_file.h"
#include "evaluator/expert_tiers.h"
#include "evaluator/lossy_quality.h"
#include "evaluator/paced_compute.h"
#include "evaluator/prefetch_runtime.h"
#include "evaluator/timeline.h"
#include "evaluator/workload.h"
#include "models/expert_predictor.h"

namespace routecast {

struct ComparisonOptions {
  uint64_t budget_bytes = 0;  // of expert memory; whole slots are used
  bool kv_in_budget = false;  // keys and values as well: slots make room for them
  std::vector<std::string> policies = {"auto"};  // of the rows that speculate
  Eviction eviction = Eviction::kLru;
  int rounds = 20;        // measured, a segment each; segments repeat when fewer
  int warmup_rounds = 3;  // not measured: caches fill, gauges decide
  int batch = 1;
  ExpertTierOptions tiers;       // the memories that experts move through
  at::Device device = at::kCPU;  // of the model, and of the fastest tier
  std::string link = "auto";     // auto, native, emulated; auto paces no gpu tier
  // Limits memory, link and compute to this device's, where this machine's are more.
  std::optional<DeviceProfile> profile;
  double emulated_bound = 1.8;  // what a paced link aims at, in (1, 2)
  double peak_seconds = 0.5;    // spent on measuring the link alone
  bool oracle = true, resident = true, uncached = true;
  // What the slots hold before the first step, but for rows without cache and with
  // everything. Null = nothing.
  std::shared_ptr<const UseShares> warm_start;
  // Compressed copies of the same experts: rows on them too, named lossy. Null = none.
  std::shared_ptr<const ExpertFile> copies;
  bool synthetic_weights = false;  // label only
  // Predictors are asked about the next token while the vocabulary head runs; null = not.
  std::shared_ptr<const NextTokenGuess> next_token;
  at::ScalarType dtype = at::kFloat;  // of the experts on disk
  // One more round, not measured, is written there; null = none. Outlives the comparison.
  Timeline* timeline = nullptr;
  bool quiet = false;
};

// Experts that a policy would load over these visits with `slots`; counted from visit
// `counted_from` on, by stack of the visit.
struct MissCount {
  int64_t misses[2] = {0, 0};
};
MissCount CountMisses(const MoeGeometry& geometry, int slots, Eviction eviction,
                      const std::vector<OracleForesight::Visit>& visits,
                      size_t counted_from);

// Which row comes as number `turn` of a round: the order rotates, and goes the other way
// in every other round, so that no row stands behind the same one each time.
size_t RowInTurn(size_t turn, int round, size_t num_rows);

class Comparison {
 public:
  // All arguments outlive the comparison. `predictors` may be empty; of several policies
  // each has its own, as they learn while they serve: the first one's, then the next's.
  Comparison(Workload* workload, std::shared_ptr<const ExpertFile> file,
             std::vector<ExpertPredictor*> predictors, ComparisonOptions options);
  ~Comparison();
  // Calibrates, warms up, measures. Throws StoppedError when a stop was requested.
  ComparisonResult Run();

 private:
  struct Row;
  SharedSlots SharedBudget() const;
  uint64_t staging_bytes() const;  // of lossy rows, in the budget
  void NoteSharedBudget();
  void NoteRepeats();
  void Record();      // first pass: visits, Tc
  void ChooseLink();  // native or paced
  void MakeRows();
  void AddRow(const std::string& policy, const std::string& predictor, Eviction eviction,
              std::unique_ptr<Foresight> foresight, LinkEngine* link);
  void WarmStart(Row* row);
  void OpenCopies();  // the engines of lossy rows
  void AddSpeculatingRows(LinkEngine* link);
  void OpenLinks();
  bool AsksAside() const;       // RuntimeOptions::ask_aside
  DevicePreset Preset() const;  // of the profile, else of the fastest tier's device
  void EmulateLink();           // the profile's
  SegmentTimes RunSegment(int segment, PrefetchRuntime* runtime, OutputHash* hash);
  void UsePageCache();  // plays the far memory of an emulated link
  double PeakOfLink();  // of tiers_, now
  // What the last hop needs for `moved` bytes, of which `read` came from disk first.
  double LinkSeconds(double moved, double read) const;
  void RunRound(int round, bool measured);
  void RunRow(Row* row, int round, bool measured);
  void DrawRound(int round);  // into the timeline, a process a row
  std::vector<OracleForesight::Visit> AllVisits(size_t* counted_from) const;
  ComparisonResult Result();
  RowResult Summarise(const Row& row, Stack phase) const;
  const ExpertFile& Moved(const Row& row) const;  // what its link carries
  void AddBounds(std::vector<RowResult>* rows) const;
  int SegmentOf(int round) const { return round % workload_->num_segments(); }

  Workload* workload_;
  std::shared_ptr<const ExpertFile> file_;
  std::vector<ExpertPredictor*> predictors_;
  ComparisonOptions options_;
  int slots_ = 0;  // of every row that does not hold everything
  bool resident_fits_ = false;
  ExpertTiers tiers_, resident_tiers_;
  DecodingTiers copies_tiers_;         // compressed experts, decoded into slots
  std::vector<OutputLog> references_;  // by segment, where there are lossy rows
  double peak_ = 0, pace_ = 0;
  uint64_t device_peak_bytes_ = 0;
  double disk_peak_ = 0;  // where a tier in the middle holds a part only; else 0
  double step_compute_[2] = {0, 0};                          // of a step, by stack
  double compute_[2] = {0, 0};                               // Tc of a round, by stack
  std::vector<std::vector<OracleForesight::Visit>> visits_;  // by segment
  std::vector<std::unique_ptr<Row>> rows_;
  SteadyClock clock_;
  std::optional<PacedCompute> paced_compute_;  // with a profile
  std::vector<std::string> notes_;
};

}  // namespace routecast
