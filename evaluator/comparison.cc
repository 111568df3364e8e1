#include "evaluator/comparison.h"

#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <numeric>
#include <stdexcept>

#include "common/errors.h"
#include "common/progress.h"
#include "common/stop.h"
#include "evaluator/decoding_engine.h"
#include "evaluator/expert_copies.h"

namespace routecast {
namespace {

constexpr int kOracleHorizon = 12;  // visits that the oracle tells ahead
constexpr int kStagingSlots = 4;    // of compressed experts
constexpr uint64_t kReferenceBytes = uint64_t{256} << 20;  // of logits that are kept
constexpr double kLeastBound = 1.5;  // below it the demo's link is paced (--link=auto)

double Quantile(std::vector<double> values, double q) {
  if (values.empty()) return 0;
  std::sort(values.begin(), values.end());
  const double at = q * static_cast<double>(values.size() - 1);
  const auto low = static_cast<size_t>(at);
  const size_t high = std::min(low + 1, values.size() - 1);
  return values[low] + (at - static_cast<double>(low)) * (values[high] - values[low]);
}

double Sum(const std::vector<double>& values) {
  return std::accumulate(values.begin(), values.end(), 0.0);
}

uint64_t AvailableMemory() {
  return static_cast<uint64_t>(::sysconf(_SC_AVPHYS_PAGES)) *
         static_cast<uint64_t>(::sysconf(_SC_PAGESIZE));
}

std::vector<ExpertKey> AllKeys(const ExpertFile& file) {
  std::vector<ExpertKey> keys;
  for (int i = 0; i < file.spec().geometry.num_keys(); ++i) {
    const ExpertKey key = ExpertKey::FromIndex(i, file.spec().geometry);
    if (file.Contains(key)) keys.push_back(key);
  }
  return keys;
}

}  // namespace

int SlotsOfBudget(uint64_t budget_bytes, const ExpertFileSpec& spec) {
  const auto slots = static_cast<int>(budget_bytes / spec.stride_bytes());
  if (slots >= 2) return slots;
  throw UsageError(ErrorText(
      "--expert_budget is smaller than one step needs",
      FormatBytes(budget_bytes) + " given; two experts (one runs, one arrives) need " +
          FormatBytes(2 * spec.stride_bytes()),
      "use --expert_budget=" + std::to_string(2 * spec.stride_bytes()) + " or more"));
}

uint64_t ParseBudget(const std::string& text, uint64_t whole_bytes) {
  if (text.empty() || text.back() != '%') return ParseBytes("--expert_budget", text);
  size_t used = 0;
  double percent = -1;
  try {
    percent = std::stod(text, &used);
  } catch (const std::exception&) {
  }
  if (used + 1 != text.size() || !(percent > 0) || percent > 100) {
    throw UsageError(ErrorText("--expert_budget=" + text + " is not a share",
                               "more than 0% and at most 100%", "write 25% or 512MiB"));
  }
  return static_cast<uint64_t>(percent / 100 * static_cast<double>(whole_bytes));
}

MissCount CountMisses(const MoeGeometry& geometry, int slots, Eviction eviction,
                      const std::vector<OracleForesight::Visit>& visits,
                      size_t counted_from) {
  ExpertCache cache(geometry, slots, eviction);
  if (eviction == Eviction::kBelady) {
    std::vector<ExpertKey> future;
    for (const auto& visit : visits) {
      for (int expert : visit.experts) future.push_back({visit.layer, expert});
    }
    cache.SetFuture(future);
  }
  MissCount count;
  for (size_t i = 0; i < visits.size(); ++i) {
    cache.BeginLayer(visits[i].layer);
    for (int expert : visits[i].experts) {
      const ExpertKey key{visits[i].layer, expert};
      if (cache.state(key) != ExpertCache::State::kReady) {
        if (i >= counted_from)
          ++count.misses[static_cast<int>(geometry.StackOf(key.layer))];
        if (cache.free_slots() == 0) cache.Drop(*cache.Victim());
        cache.Load(key);
        cache.Arrive(key);
      }
      cache.Use(key);
    }
  }
  return count;
}

struct Comparison::Row {
  std::string policy, predictor, eviction;
  DiskTransferEngine* disk = nullptr;  // what is paced
  bool is_resident = false, is_lossy = false;
  int slots = 0;
  OracleForesight* oracle = nullptr;  // owned by the runtime
  std::unique_ptr<PrefetchRuntime> runtime;
  OutputHash hash;
  std::vector<double> rates[2];    // tokens/s by round
  std::vector<double> seconds[2];  // of a round
  std::vector<double> steps[2];
  LossyQuality quality;
};

Comparison::Comparison(Workload* workload, std::shared_ptr<const ExpertFile> file,
                       std::vector<ExpertPredictor*> predictors,
                       ComparisonOptions options)
    : workload_(workload),
      file_(std::move(file)),
      predictors_(std::move(predictors)),
      options_(std::move(options)) {
  slots_ = std::min(SlotsOfBudget(options_.budget_bytes, file_->spec()), file_->count());
  if (workload_->num_segments() < 1) {
    throw UsageError(ErrorText("nothing to run: fewer sequences than one batch", "",
                               "give more prompts or a smaller --batch"));
  }
}

Comparison::~Comparison() {
  for (auto& row : rows_) row->runtime.reset();  // before the engines
}

void Comparison::Record() {
  const uint64_t whole =
      static_cast<uint64_t>(file_->count()) * file_->spec().stride_bytes();
  const uint64_t room = AvailableMemory();
  resident_fits_ = whole < room / 10 * 8;
  if (!resident_fits_) {
    notes_.push_back("no row with all experts resident: they take " + FormatBytes(whole) +
                     ", " + FormatBytes(room) + " are free");
  }
  DiskEngineOptions engine_options;
  engine_options.num_threads = options_.io_threads;
  engine_ = std::make_unique<DiskTransferEngine>(file_, slots_, engine_options);
  engine_->SetDone([](uint64_t, TransferOutcome, uint64_t) {});
  peak_ = engine_->MeasurePeak(options_.peak_seconds);
  if (resident_fits_) {
    resident_engine_ =
        std::make_unique<DiskTransferEngine>(file_, file_->count(), engine_options);
  }
  RuntimeOptions runtime_options;
  runtime_options.num_slots = resident_fits_ ? file_->count() : slots_;
  runtime_options.planner.policy = ParsePolicy("on_demand");
  runtime_options.dtype = options_.dtype;
  PrefetchRuntime runtime(file_->spec(),
                          resident_fits_ ? resident_engine_.get() : engine_.get(),
                          nullptr, runtime_options);
  if (resident_fits_) {
    runtime.Suspend();
    runtime.Preload(AllKeys(*file_));
  }
  const int rounds =
      std::min(workload_->num_segments(), options_.rounds + options_.warmup_rounds);
  Progress progress("recording", "segments", static_cast<uint64_t>(rounds),
                    options_.quiet);
  std::vector<double> compute[2];  // of a step
  size_t steps[2] = {0, 0};
  uint64_t reference_room = kReferenceBytes;
  for (int segment = 0; segment < rounds; ++segment) {
    if (StopRequested()) throw StoppedError("stopped while recording");
    OutputHash ignored;
    runtime.ResetStats();
    if (options_.copies) {
      references_.emplace_back(reference_room);
      ignored.SetTap([&](const at::Tensor& t) { references_.back().Add(t); });
    }
    const SegmentTimes times = workload_->Run(segment, &runtime, &runtime, &ignored);
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
    compute_[s] = Quantile(compute[s], 0.25) * static_cast<double>(steps[s]) / rounds;
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

void Comparison::ChooseLink() {
  size_t from = 0;
  const auto visits = AllVisits(&from);
  const MissCount lru =
      CountMisses(workload_->geometry(), slots_, Eviction::kLru, visits, from);
  const int stack = workload_->runs(Stack::kDecoder) ? 1 : 0;
  const double bytes_a_round = static_cast<double>(lru.misses[stack]) / options_.rounds *
                               static_cast<double>(file_->spec().blob_bytes());
  const double tc = compute_[stack];
  const auto bound = [&](double rate) {
    const double tx = bytes_a_round / rate;
    return (tc + tx) / std::max(tc, tx);
  };
  const double native = bound(peak_);
  const bool pace =
      options_.link == "emulated" ||
      (options_.link == "auto" && (native < kLeastBound || !engine_->direct()));
  if (!options_.quiet) {
    std::fprintf(stderr,
                 "calibration (%s, a round): Tc %.1f ms, Tx %.1f ms at the link's %s/s, "
                 "bound %.2f\n",
                 StackName(static_cast<Stack>(stack)), 1e3 * tc,
                 1e3 * bytes_a_round / peak_,
                 FormatBytes(static_cast<uint64_t>(peak_)).c_str(), native);
  }
  if (!pace || bytes_a_round <= 0) return;
  pace_ = bytes_a_round / ((options_.emulated_bound - 1) * tc);
  if (pace_ > 0.8 * peak_) {
    // This disk is slower than the link to emulate: the page cache plays the far memory.
    DiskEngineOptions engine_options;
    engine_options.num_threads = options_.io_threads;
    engine_options.direct = false;
    engine_ = std::make_unique<DiskTransferEngine>(file_, slots_, engine_options);
    engine_->SetDone([](uint64_t, TransferOutcome, uint64_t) {});
    engine_->MeasurePeak(2 * static_cast<double>(file_->size_bytes()) /
                         peak_);  // fills it
    peak_ = engine_->MeasurePeak(options_.peak_seconds);
    pace_ = std::min(pace_, 0.9 * peak_);
    notes_.push_back("the emulated link reads through the page cache");
  }
  notes_.push_back("link paced to " + FormatBytes(static_cast<uint64_t>(pace_)) +
                   "/s for a bound near " + std::to_string(bound(pace_)).substr(0, 4) +
                   " (this machine's own: " + std::to_string(native).substr(0, 4) + ")");
  if (!options_.quiet) std::fprintf(stderr, "%s\n", notes_.back().c_str());
}

void Comparison::AddRow(const std::string& policy, const std::string& predictor,
                        Eviction eviction, std::unique_ptr<Foresight> foresight,
                        DiskTransferEngine* disk) {
  auto row = std::make_unique<Row>();
  row->policy = policy;
  row->predictor = predictor;
  row->eviction = EvictionName(eviction);
  row->disk = disk;
  row->is_resident = disk == resident_engine_.get();
  row->is_lossy = disk == copies_disk_;
  row->slots = row->is_resident ? file_->count() : slots_;
  RuntimeOptions options;
  options.num_slots = row->slots;
  options.eviction = eviction;
  options.dtype = options_.dtype;
  options.planner.policy = ParsePolicy(row->is_resident ? "on_demand" : policy);
  options.planner.link_bytes_per_second = pace_ > 0 ? pace_ : peak_;
  if (row->is_lossy) options.planner.expert_bytes = options_.copies->spec().blob_bytes();
  if (predictor == "oracle") {
    row->oracle = static_cast<OracleForesight*>(foresight.get());
    options.planner.policy.max_lead = kOracleHorizon;
    options.planner.policy.top_k = workload_->geometry().num_experts;
    options.planner.policy.auto_off = false;  // the upper bound is shown as it is
  }
  TransferEngine* engine = disk;
  if (row->is_lossy) engine = copies_engine_.get();
  row->runtime = std::make_unique<PrefetchRuntime>(file_->spec(), engine,
                                                   std::move(foresight), options);
  row->runtime->Suspend();
  if (row->is_resident) {
    row->runtime->Preload(AllKeys(*file_));
    row->runtime->Suspend();
  }
  rows_.push_back(std::move(row));
}

void Comparison::OpenCopies() {
  DiskEngineOptions engine_options;
  engine_options.num_threads = options_.io_threads;
  engine_options.direct = engine_->direct();
  const ExpertFileSpec spec = options_.copies->spec();
  auto disk = std::make_unique<DiskTransferEngine>(options_.copies, kStagingSlots,
                                                   engine_options);
  copies_disk_ = disk.get();
  if (!engine_->direct()) {  // fills the page cache, as for the lossless experts
    disk->SetDone([](uint64_t, TransferOutcome, uint64_t) {});
    disk->MeasurePeak(2 * static_cast<double>(options_.copies->size_bytes()) / peak_);
  }
  copies_engine_ = std::make_unique<DecodingEngine>(
      std::move(disk), kStagingSlots, slots_, spec.expert_bytes(),
      [spec](const std::byte* blob, std::byte* to) { DecodeExpert(spec, blob, to); },
      std::string(CopyName(spec.copies)) + " copies");
}

void Comparison::AddSpeculatingRows(DiskTransferEngine* disk) {
  const int max_lead = ParsePolicy(options_.policy).max_lead;
  for (ExpertPredictor* predictor : predictors_) {
    AddRow(options_.policy, predictor->name(), options_.eviction,
           std::make_unique<PredictorForesight>(predictor, workload_->geometry(), max_lead,
                                                options_.next_token),
           disk);
  }
  const std::string oracle_policy =
      options_.policy == "on_demand" ? "auto" : options_.policy;
  if (options_.oracle) {
    AddRow(oracle_policy, "oracle", options_.eviction,
           std::make_unique<OracleForesight>(workload_->geometry(), kOracleHorizon),
           disk);
  }
}

void Comparison::MakeRows() {
  if (options_.next_token && workload_->runs(Stack::kDecoder)) {
    notes_.push_back(
        "the next token is guessed from the decoder's output while the vocabulary head "
        "is at work");
  }
  DiskTransferEngine* disk = engine_.get();
  if (options_.uncached) AddRow("on_demand", "none", Eviction::kNone, nullptr, disk);
  // What the others are measured by.
  AddRow("on_demand", "none", Eviction::kLru, nullptr, disk);
  if (options_.eviction != Eviction::kLru && options_.eviction != Eviction::kBelady) {
    AddRow("on_demand", "none", options_.eviction, nullptr, disk);
  }
  AddSpeculatingRows(disk);
  if (options_.resident && resident_fits_)
    AddRow("resident", "none", Eviction::kLru, nullptr, resident_engine_.get());
  if (!options_.copies) return;
  OpenCopies();
  AddRow("on_demand", "none", Eviction::kLru, nullptr, copies_disk_);
  AddSpeculatingRows(copies_disk_);
}

void Comparison::RunRow(Row* row, int round, bool measured) {
  if (StopRequested()) throw StoppedError("stopped between two rows");
  const int segment = SegmentOf(round);
  if (!row->is_resident) {
    // Bringing the row's experts back is not part of the measurement.
    row->disk->SetPace(0);
    row->runtime->Resume();
    row->disk->SetPace(pace_);
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
  const SegmentTimes times = workload_->Run(
      segment, row->runtime.get(), row->runtime.get(), measured ? &row->hash : &ignored);
  row->hash.SetTap({});
  if (reference && reference->whole() && log.whole())
    row->quality.Compare(*reference, log);
  if (!row->is_resident) row->runtime->Suspend();
  row->runtime->TakeVisits();
  if (!measured) return;
  for (int s = 0; s < 2; ++s) {
    if (times.step_seconds[s].empty()) continue;
    const double seconds = Sum(times.step_seconds[s]);
    row->seconds[s].push_back(seconds);
    row->rates[s].push_back(static_cast<double>(times.tokens[s]) / seconds);
    row->steps[s].insert(row->steps[s].end(), times.step_seconds[s].begin(),
                         times.step_seconds[s].end());
  }
}

void Comparison::RunRound(int round, bool measured) {
  for (size_t i = 0; i < rows_.size(); ++i) {
    RunRow(rows_[(i + static_cast<size_t>(round)) % rows_.size()].get(), round, measured);
  }
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

RowResult Comparison::Summarise(const Row& row, Stack phase) const {
  const int s = static_cast<int>(phase);
  const PhaseStats stats = row.runtime->stats(phase);
  const MoeGeometry& g = workload_->geometry();
  RowResult result;
  result.policy = row.policy;
  result.predictor = row.predictor;
  result.eviction = row.eviction;
  result.tier = "host";
  result.phase = phase;
  result.budget_bytes = static_cast<uint64_t>(row.slots) * file_->spec().stride_bytes();
  result.held_bytes_peak = static_cast<uint64_t>(row.runtime->held_peak_slots()) *
                           file_->spec().stride_bytes();
  result.budget_phase_share =
      std::min(1.0, static_cast<double>(row.slots) / (g.layers(phase) * g.num_experts));
  result.batch = options_.batch;
  result.emulated = pace_ > 0;
  result.pairs = static_cast<int>(row.rates[s].size());
  result.tokens_per_second = Quantile(row.rates[s], 0.5);
  result.spread = Quantile(row.rates[s], 0.75) - Quantile(row.rates[s], 0.25);
  result.p50_ms = 1e3 * Quantile(row.steps[s], 0.50);
  result.p95_ms = 1e3 * Quantile(row.steps[s], 0.95);
  result.p99_ms = 1e3 * Quantile(row.steps[s], 0.99);
  result.hit_rate =
      stats.uses > 0 ? static_cast<double>(stats.hits) / static_cast<double>(stats.uses)
                     : 0;
  result.bytes_useful = stats.bytes_useful;
  result.bytes_late = stats.bytes_late;
  result.bytes_wasted = stats.bytes_wasted;
  result.stall_seconds = stats.stall_seconds;
  result.predictor_seconds = stats.predictor_seconds;
  result.compute_seconds =
      Sum(row.seconds[s]) - stats.stall_seconds - stats.predictor_seconds;
  const double moved =
      static_cast<double>(stats.bytes_useful + stats.bytes_late + stats.bytes_wasted);
  result.transfer_seconds = moved / (pace_ > 0 ? pace_ : peak_);
  result.output_sha256 = row.hash.Hex();
  result.lossless = !row.is_lossy && result.output_sha256 == rows_.front()->hash.Hex();
  if (row.is_lossy) {
    result.copies = CopyName(options_.copies->spec().copies);
    result.exact_match = row.quality.exact_match();
    result.logit_kl = row.quality.logit_kl();
    result.perplexity_change = row.quality.perplexity_change();
    result.compared_sequences = row.quality.sequences();
  }
  result.speculation_used = stats.speculations > 0
                                ? static_cast<double>(stats.speculations_used) /
                                      static_cast<double>(stats.speculations)
                                : 0;
  result.switched_off = !row.runtime->speculation_helps(phase);
  return result;
}

void Comparison::AddBounds(std::vector<RowResult>* rows) const {
  size_t from = 0;
  const auto visits = AllVisits(&from);
  const MissCount best =
      CountMisses(workload_->geometry(), slots_, Eviction::kBelady, visits, from);
  for (RowResult& row : *rows) {
    const int s = static_cast<int>(row.phase);
    // Tc: computing with nothing to wait for. Tx: moving what on-demand LRU moves.
    double tc = compute_[s] * options_.rounds, tx = 0;
    for (const RowResult& other : *rows) {
      if (other.phase != row.phase || other.copies != "lossless") continue;
      if (other.policy == "resident") tc = other.compute_seconds;
      if (other.policy == "on_demand" && other.eviction == "lru")
        tx = other.transfer_seconds;
    }
    row.bound = tc + tx > 0 ? (tc + tx) / std::max(tc, tx) : 1;
    if (row.policy != "resident") {
      row.bytes_belady =
          best.misses[s] * static_cast<int64_t>(file_->spec().blob_bytes());
    }
  }
}

ComparisonResult Comparison::Run() {
  Record();
  ChooseLink();
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
  peak_ = std::max(peak_, engine_->MeasurePeak(options_.peak_seconds));

  ComparisonResult result = Result();
  if (options_.timeline) DrawRound(rounds);
  return result;
}

ComparisonResult Comparison::Result() {
  ComparisonResult result;
  size_t baseline = 0;
  while (rows_[baseline]->eviction != "lru") ++baseline;
  result.lossless = true;
  for (Stack phase : {Stack::kEncoder, Stack::kDecoder}) {
    if (!workload_->runs(phase)) continue;
    for (const auto& row : rows_) {
      RowResult summary = Summarise(*row, phase);
      const auto& base = rows_[baseline]->rates[static_cast<int>(phase)];
      std::vector<double> ratios;
      for (size_t i = 0; i < base.size(); ++i) {
        ratios.push_back(row->rates[static_cast<int>(phase)][i] / base[i]);
      }
      summary.speed_up = Quantile(ratios, 0.5);
      result.lossless = result.lossless && (summary.lossless || row->is_lossy);
      result.rows.push_back(std::move(summary));
    }
  }
  AddBounds(&result.rows);
  result.device = "cpu";
  result.link = engine_->description();
  result.link_peak_bytes_per_second = peak_;
  result.link_bytes_per_second = pace_ > 0 ? pace_ : peak_;
  result.emulated = pace_ > 0;
  result.synthetic_weights = options_.synthetic_weights;
  for (const auto& row : result.rows) {
    if (row.switched_off) {
      notes_.push_back(row.predictor + " (" + StackName(row.phase) +
                       "): prefetching did not help here and is off");
    }
  }
  result.notes = notes_;
  return result;
}

}  // namespace routecast
