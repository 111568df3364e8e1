#include "evaluator/comparison.h"

#include <algorithm>
#include <cstdio>
#include <thread>

#include "common/errors.h"
#include "common/progress.h"
#include "common/stop.h"
#include "evaluator/comparison_row.h"

namespace routecast {
namespace {

constexpr int kOracleHorizon = 12;      // visits that the oracle tells ahead
constexpr double kAsideSeconds = 5e-3;  // of a step, from which questions go aside
constexpr uint64_t kReferenceBytes = uint64_t{256} << 20;  // of logits that are kept

}  // namespace

Comparison::Comparison(Workload* workload, std::shared_ptr<const ExpertFile> file,
                       std::vector<ExpertPredictor*> predictors,
                       ComparisonOptions options)
    : workload_(workload),
      file_(std::move(file)),
      predictors_(std::move(predictors)),
      options_(std::move(options)) {
  slots_ = std::min(SlotsOfBudget(options_.budget_bytes, file_->spec(), staging_bytes()),
                    file_->count());
  // Refused before anything runs; what is always held is no slots' room.
  if (options_.kv_in_budget) slots_ = std::min(slots_, SharedBudget().most);
  if (options_.profile) {
    paced_compute_.emplace(
        LayerWorkOf(workload_->config(),
                    static_cast<double>(c10::elementSize(options_.dtype))),
        *options_.profile, options_.device, &clock_);
  }
  if (workload_->num_segments() < 1) {
    throw UsageError(ErrorText("nothing to run: fewer sequences than one batch", "",
                               "give more prompts or a smaller --batch"));
  }
}

// Rows on compressed copies and the others hold as many experts, for which all leave
// room.
uint64_t Comparison::staging_bytes() const {
  return options_.copies ? StagingBytes(options_.copies->spec().copies, file_->spec())
                         : 0;
}

SharedSlots Comparison::SharedBudget() const {
  const auto beside = [&](uint64_t bytes) {
    return SlotsBeside(options_.budget_bytes, bytes + staging_bytes(), file_->count(),
                       file_->spec())
        .least;
  };
  return {beside(workload_->MinKeyValueBytes()), beside(workload_->MaxKeyValueBytes())};
}

void Comparison::NoteSharedBudget() {
  const SharedSlots shared = SharedBudget();  // by now it is known what recordings keep
  notes_.push_back("keys and values, up to " +
                   FormatBytes(workload_->MaxKeyValueBytes()) +
                   ", share the budget: between " + std::to_string(shared.most) +
                   " and " + std::to_string(shared.least) + " experts of " +
                   std::to_string(file_->count()) + " fit beside them");
}

void Comparison::NoteRepeats() {
  const int segments = workload_->num_segments();
  const int rounds = options_.warmup_rounds + options_.rounds;
  if (segments >= rounds) return;
  notes_.push_back("there are requests for " + std::to_string(segments) + " of the " +
                   std::to_string(rounds) +
                   " rounds: they come again, and caches and predictors that learn while "
                   "they serve have seen them");
}

Comparison::~Comparison() {
  for (auto& row : rows_) row->runtime.reset();  // before the engines
}

SegmentTimes Comparison::RunSegment(int segment, PrefetchRuntime* runtime,
                                    OutputHash* hash) {
  if (!paced_compute_) return workload_->Run(segment, runtime, runtime, hash);
  paced_compute_->Set(runtime, runtime);
  return workload_->Run(segment, &*paced_compute_, &*paced_compute_, hash);
}

void Comparison::Record() {
  OpenLinks();
  RuntimeOptions runtime_options;
  runtime_options.num_slots = resident_fits_ ? file_->count() : slots_;
  runtime_options.planner.policy = ParsePolicy("on_demand");
  runtime_options.dtype = options_.dtype;
  runtime_options.device = options_.device;
  PrefetchRuntime runtime(file_->spec(),
                          (resident_fits_ ? resident_tiers_ : tiers_).engine.get(),
                          nullptr, runtime_options);
  if (resident_fits_) {
    runtime.Suspend();
    runtime.Preload(file_->keys());
  }
  const int rounds =
      std::min(workload_->num_segments(), options_.rounds + options_.warmup_rounds);
  Progress progress("recording", "segments", static_cast<uint64_t>(rounds),
                    options_.quiet);
  std::vector<double> compute[2];  // of a step
  size_t steps[2] = {0, 0};
  uint64_t reference_room = kReferenceBytes;
  for (int segment = 0; segment < rounds; ++segment) {
    ThrowIfStopped("while recording");
    OutputHash ignored;
    runtime.ResetStats();
    if (options_.copies) {
      references_.emplace_back(reference_room);
      ignored.SetTap([&](const at::Tensor& t) { references_.back().Add(t); });
    }
    const SegmentTimes times = RunSegment(segment, &runtime, &ignored);
    if (options_.copies) reference_room -= references_.back().bytes();
    visits_.push_back(runtime.TakeVisits());
    for (int s = 0; s < 2; ++s) {
      const auto count = static_cast<double>(times.step_seconds[s].size());
      const double waited = runtime.stats(static_cast<Stack>(s)).stall_seconds;
      steps[s] += times.step_seconds[s].size();
      for (double seconds : times.step_seconds[s]) {
        compute[s].push_back(seconds - waited / count);
      }
    }
    progress.Update(static_cast<uint64_t>(segment) + 1);
  }
  progress.Finish();
  // The lower quartile: first touches and a machine's other work only add time.
  for (int s = 0; s < 2; ++s) {
    step_compute_[s] = Quantile(compute[s], 0.25);
    compute_[s] = step_compute_[s] * static_cast<double>(steps[s]) / rounds;
  }
}

std::vector<OracleForesight::Visit> Comparison::AllVisits(size_t* counted_from) const {
  std::vector<OracleForesight::Visit> all;
  *counted_from = 0;
  for (int round = 0; round < options_.warmup_rounds + options_.rounds; ++round) {
    if (round == options_.warmup_rounds) *counted_from = all.size();
    const auto& visits = visits_[static_cast<size_t>(SegmentOf(round)) % visits_.size()];
    all.insert(all.end(), visits.begin(), visits.end());
  }
  return all;
}

void Comparison::AddRow(const std::string& policy, const std::string& predictor,
                        Eviction eviction, std::unique_ptr<Foresight> foresight,
                        LinkEngine* link) {
  auto row = std::make_unique<Row>();
  row->policy = policy;
  row->predictor = predictor;
  row->eviction = EvictionName(eviction);
  row->link = link;
  row->is_resident = link == resident_tiers_.engine.get();
  row->is_lossy = link == copies_tiers_.link;
  row->slots = row->is_resident ? file_->count() : slots_;
  RuntimeOptions options;
  options.num_slots = row->slots;
  options.eviction = eviction;
  options.dtype = options_.dtype;
  options.device = options_.device;
  options.planner.policy = ParsePolicy(row->is_resident ? "on_demand" : policy);
  options.planner.policy.most_experts = Preset().most_experts;
  options.planner.policy.aggressiveness = Preset().aggressiveness;
  options.planner.link_bytes_per_second = pace_ > 0 ? pace_ : peak_;
  if (row->is_lossy) options.planner.expert_bytes = options_.copies->spec().blob_bytes();
  if (options_.kv_in_budget && !row->is_resident) {
    options.memory_bytes = options_.budget_bytes - staging_bytes();
    options.key_value_bytes = [this](const PassInfo& pass) {
      return workload_->KeyValueBytes(pass);
    };
  }
  if (predictor == "oracle") {
    row->oracle = static_cast<OracleForesight*>(foresight.get());
    options.planner.policy.max_lead = kOracleHorizon;
    options.planner.policy.top_k = workload_->geometry().num_experts;
    // The upper bound is shown as it is.
    options.planner.policy.auto_off = options.planner.policy.memory_manager = false;
    options.planner.policy.pressure_limit = 1;
  }
  options.ask_aside = predictor != "oracle" && AsksAside();
  TransferEngine* engine = link;
  if (row->is_lossy) engine = copies_tiers_.engine.get();
  row->runtime = std::make_unique<PrefetchRuntime>(file_->spec(), engine,
                                                   std::move(foresight), options);
  row->runtime->Suspend();
  if (row->is_resident) {
    row->runtime->Preload(file_->keys());
    row->runtime->Suspend();
  } else if (options_.warm_start && eviction != Eviction::kNone) {
    WarmStart(row.get());
  }
  rows_.push_back(std::move(row));
}

DevicePreset Comparison::Preset() const {
  return options_.profile ? PresetOf(*options_.profile)
                          : PublishedPreset(tiers_.device, tiers_.device_bytes);
}

// At the pace that the row's link will have: what it takes is said, and is no step's.
void Comparison::WarmStart(Row* row) {
  row->link->SetPace(pace_);
  const double from = clock_.Now();
  row->warm_experts = row->runtime->WarmStart(*options_.warm_start, file_->keys());
  row->warm_seconds = clock_.Now() - from;
  row->link->SetPace(0);
  row->runtime->Suspend();
  const bool first = std::none_of(rows_.begin(), rows_.end(), [](const auto& other) {
    return other->warm_experts > 0;
  });
  if (!first) return;  // the others' stand in results.json
  char text[160];
  std::snprintf(text, sizeof text, "slots begin with the %d most used experts: %.3f s (",
                row->warm_experts, row->warm_seconds);
  notes_.push_back(text + options_.warm_start->source + ")");
}

// A long step waits for memory, or for the device. In a small model's a question is a
// large part, and the gauge could not tell what it costs the other core.
bool Comparison::AsksAside() const {
  if (std::thread::hardware_concurrency() < 2) return false;
  if (!options_.device.is_cpu()) return true;
  return std::max(step_compute_[0], step_compute_[1]) >= kAsideSeconds;
}

void Comparison::OpenCopies() {
  ExpertTierOptions options = options_.tiers;
  options.direct = tiers_.direct;
  copies_tiers_ = OpenDecodingTiers(options_.copies, slots_, options);
  if (tiers_.direct && !options.chain.gpu) return;
  // Fills the page cache or the host tier, as for the lossless experts.
  const std::vector<ExpertKey> keys = options_.copies->keys();
  MeasurePeak(copies_tiers_.link, keys, kStagingSlots, 0, keys.size());
}

void Comparison::AddSpeculatingRows(LinkEngine* link) {
  const size_t count = predictors_.size() / options_.policies.size();
  for (size_t i = 0; i < predictors_.size(); ++i) {
    const std::string& policy = options_.policies[i / count];
    if (!ParsePolicy(policy).speculate) continue;  // asks nobody: a row of none, above
    ExpertPredictor* predictor = predictors_[i];
    AddRow(policy, predictor->label(), options_.eviction,
           std::make_unique<PredictorForesight>(predictor, workload_->geometry(),
                                                ParsePolicy(policy).max_lead,
                                                options_.next_token),
           link);
  }
  if (!options_.oracle) return;
  const std::string& first = options_.policies.front();
  AddRow(first == "on_demand" ? "auto" : first, "oracle", options_.eviction,
         std::make_unique<OracleForesight>(workload_->geometry(), kOracleHorizon), link);
}

void Comparison::MakeRows() {
  if (!predictors_.empty() && options_.next_token && workload_->runs(Stack::kDecoder)) {
    notes_.push_back(
        "the next token is guessed from the decoder's output while the vocabulary head "
        "is at work");
  }
  LinkEngine* link = tiers_.engine.get();
  if (options_.uncached) AddRow("on_demand", "none", Eviction::kNone, nullptr, link);
  // What the others are measured by.
  AddRow("on_demand", "none", Eviction::kLru, nullptr, link);
  if (options_.eviction != Eviction::kLru && options_.eviction != Eviction::kBelady) {
    AddRow("on_demand", "none", options_.eviction, nullptr, link);
  }
  AddSpeculatingRows(link);
  if (options_.resident && resident_fits_)
    AddRow("resident", "none", Eviction::kLru, nullptr, resident_tiers_.engine.get());
  if (!options_.copies) return;
  OpenCopies();
  AddRow("on_demand", "none", Eviction::kLru, nullptr, copies_tiers_.link);
  AddSpeculatingRows(copies_tiers_.link);
}

size_t RowInTurn(size_t turn, int round, size_t num_rows) {
  const size_t first = static_cast<size_t>(round) % num_rows;
  return (first + (round % 2 == 0 ? turn : num_rows - turn)) % num_rows;
}

void Comparison::RunRow(Row* row, int round, bool measured) {
  ThrowIfStopped("between two rows");
  const int segment = SegmentOf(round);
  if (!row->is_resident) {
    // Bringing the row's experts back is not part of the measurement.
    row->link->SetPace(0);
    row->runtime->Resume();
    row->link->SetPace(pace_);
  }
  if (row->oracle) {
    row->oracle->SetFuture(visits_[static_cast<size_t>(segment) % visits_.size()]);
  }
  OutputHash ignored;
  OutputLog log(kReferenceBytes);
  const OutputLog* reference = nullptr;
  if (row->is_lossy && measured) {
    reference = &references_[static_cast<size_t>(segment) % references_.size()];
    row->hash.SetTap([&](const at::Tensor& t) { log.Add(t); });
  }
  const uint64_t read_before = row->link->disk_bytes();
  const PhaseStats before[2] = {row->runtime->stats(Stack::kEncoder),
                                row->runtime->stats(Stack::kDecoder)};
  const SegmentTimes times =
      RunSegment(segment, row->runtime.get(), measured ? &row->hash : &ignored);
  row->hash.SetTap({});
  if (reference && reference->whole() && log.whole())
    row->quality.Compare(*reference, log);
  if (!row->is_resident) row->runtime->Suspend();
  row->runtime->TakeVisits();
  if (!measured) return;
  row->disk_bytes += row->link->disk_bytes() - read_before;
  for (int s = 0; s < 2; ++s) {
    if (times.step_seconds[s].empty()) continue;
    const double seconds = Sum(times.step_seconds[s]);
    const auto tokens = static_cast<double>(times.tokens[s]);
    const PhaseStats now = row->runtime->stats(static_cast<Stack>(s));
    const double stall = now.stall_seconds - before[s].stall_seconds,
                 asked = now.predictor_seconds - before[s].predictor_seconds;
    row->seconds[s].push_back(seconds);
    row->rates[s].push_back(tokens / seconds);
    row->stall_ms[s].push_back(1e3 * stall / tokens);
    row->compute_ms[s].push_back(1e3 * (seconds - stall - asked) / tokens);
    row->steps[s].insert(row->steps[s].end(), times.step_seconds[s].begin(),
                         times.step_seconds[s].end());
  }
}

void Comparison::RunRound(int round, bool measured) {
  for (size_t i = 0; i < rows_.size(); ++i)
    RunRow(rows_[RowInTurn(i, round, rows_.size())].get(), round, measured);
  device_peak_bytes_ = std::max(device_peak_bytes_, tiers_.engine->device_bytes_in_use());
}

void Comparison::DrawRound(int round) {
  for (const auto& row : rows_) {
    options_.timeline->BeginProcess(row->policy + " / " + row->predictor + " / " +
                                    row->eviction + (row->is_lossy ? " / lossy" : ""));
    row->runtime->SetTimeline(options_.timeline);
    RunRow(row.get(), round, false);
    row->runtime->SetTimeline(nullptr);
  }
}

ComparisonResult Comparison::Run() {
  if (!options_.quiet)
    std::fprintf(stderr, "%s\n",
                 BudgetText(slots_, file_->count(), file_->spec()).c_str());
  Record();
  if (options_.kv_in_budget) NoteSharedBudget();
  ChooseLink();
  NoteRepeats();
  MakeRows();
  const int rounds = options_.warmup_rounds + options_.rounds;
  Progress progress("comparing " + std::to_string(rows_.size()) + " rows", "rounds",
                    static_cast<uint64_t>(rounds), options_.quiet);
  for (int round = 0; round < rounds; ++round) {
    if (round == options_.warmup_rounds) {
      for (auto& row : rows_) row->runtime->ResetStats();
    }
    RunRound(round, round >= options_.warmup_rounds);
    progress.Update(static_cast<uint64_t>(round) + 1);
  }
  progress.Finish();
  // Again, now that the disk has seen every expert: a first look at a cold disk would
  // leave the link slow and the bound high.
  peak_ = std::max(peak_, PeakOfLink());

  ComparisonResult result = Result();
  if (options_.timeline) DrawRound(rounds);
  return result;
}

}  // namespace routecast
