#include <algorithm>
#include <cmath>
#include <numeric>

#include "evaluator/comparison.h"
#include "evaluator/comparison_row.h"
#include "evaluator/expert_cache.h"

namespace routecast {

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

namespace {
FiveNumbers Spread(const std::vector<double>& values) {
  return {Quantile(values, 0), Quantile(values, 0.25), Quantile(values, 0.5),
          Quantile(values, 0.75), Quantile(values, 1)};
}

double Share(int64_t part, int64_t of) {
  return of > 0 ? static_cast<double>(part) / static_cast<double>(of) : 0;
}

// Of ratios to 1: how many of their deviations they lie off it.
double EffectSize(const std::vector<double>& ratios) {
  const auto count = static_cast<double>(ratios.size());
  if (count < 2) return 0;
  const double mean = Sum(ratios) / count;
  double square = 0;
  for (double ratio : ratios) square += (ratio - mean) * (ratio - mean);
  return square > 0 ? (mean - 1) / std::sqrt(square / (count - 1)) : 0;
}

// "3, 4"
std::string ShutLeads(const RowResult& row) {
  std::string leads;
  for (const LeadResult& lead : row.speculation) {
    if (lead.account.open()) continue;
    leads += (leads.empty() ? "" : ", ") + std::to_string(lead.account.lead);
  }
  return leads;
}

// "hidden (decoder, int8)"
std::string SpeculatorName(const RowResult& row) {
  return row.predictor + (row.policy == "auto" ? "" : ", " + row.policy) + " (" +
         StackName(row.phase) + (row.copies == "lossless" ? "" : ", " + row.copies) + ")";
}

double MovedBytes(const PhaseStats& stats) {
  return static_cast<double>(stats.bytes_useful + stats.bytes_late + stats.bytes_wasted);
}
}  // namespace

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

RowResult Comparison::Summarise(const Row& row, Stack phase) const {
  const int s = static_cast<int>(phase);
  const PhaseStats stats = row.runtime->stats(phase);
  const MoeGeometry& g = workload_->geometry();
  RowResult result;
  result.policy = row.policy;
  result.predictor = row.predictor;
  result.eviction = row.eviction;
  result.tier = options_.tiers.chain.fastest();
  result.phase = phase;
  result.budget_bytes = static_cast<uint64_t>(row.slots) * file_->spec().stride_bytes();
  result.held_bytes_peak = static_cast<uint64_t>(row.runtime->held_peak_slots()) *
                           file_->spec().stride_bytes();
  if (row.is_lossy) {  // those on their way as well
    result.budget_bytes += staging_bytes();
    result.held_bytes_peak += staging_bytes();
  }
  if (options_.kv_in_budget && !row.is_resident) {
    result.budget_bytes = options_.budget_bytes;
    result.memory_bytes_peak =
        row.runtime->memory_peak_bytes() + (row.is_lossy ? staging_bytes() : 0);
    result.least_slots = row.runtime->least_slots();
  }
  result.budget_phase_share =
      std::min(1.0, static_cast<double>(row.slots) / (g.layers(phase) * g.num_experts));
  result.batch = options_.batch;
  result.emulated = pace_ > 0 || options_.profile.has_value();
  result.pairs = static_cast<int>(row.rates[s].size());
  result.tokens_per_second = Quantile(row.rates[s], 0.5);
  result.spread = Quantile(row.rates[s], 0.75) - Quantile(row.rates[s], 0.25);
  result.p50_ms = 1e3 * Quantile(row.steps[s], 0.50);
  result.p95_ms = 1e3 * Quantile(row.steps[s], 0.95);
  result.p99_ms = 1e3 * Quantile(row.steps[s], 0.99);
  result.hit_rate = Share(stats.hits, stats.uses);
  const int64_t prefetched = stats.speculations_used + stats.speculations_unused;
  result.prefetch_precision = Share(stats.speculations_used, prefetched);
  result.prefetch_timely = Share(stats.speculations_in_time, prefetched);
  result.prefetch_recall = Share(stats.speculations_used, stats.uses);
  if (stats.requests > 0) result.batch_dedup = 1 - Share(stats.uses, stats.requests);
  result.bytes_useful = stats.bytes_useful;
  result.bytes_late = stats.bytes_late;
  result.bytes_wasted = stats.bytes_wasted;
  result.stall_seconds = stats.stall_seconds;
  result.predictor_seconds = stats.predictor_seconds;
  result.predictor_aside_seconds = stats.aside_seconds;
  const double total = Sum(row.seconds[s]);
  result.compute_seconds = total - stats.stall_seconds - stats.predictor_seconds;
  result.compute_ms_spread = Spread(row.compute_ms[s]);
  result.stall_ms_spread = Spread(row.stall_ms[s]);
  const PhaseStats both[2] = {row.runtime->stats(Stack::kEncoder),
                              row.runtime->stats(Stack::kDecoder)};
  // What was read from disk counts for the stacks as what they moved.
  const double all = MovedBytes(both[0]) + MovedBytes(both[1]);
  const double read =
      all > 0 ? static_cast<double>(row.disk_bytes) * MovedBytes(stats) / all : 0;
  result.transfer_seconds = LinkSeconds(MovedBytes(stats), read);
  if (total > 0) {
    result.predictor_share = result.predictor_seconds / total;
    result.link_share = result.transfer_seconds / total;
    result.compute_share = result.compute_seconds / total;
  }
  if (row.warm_seconds > 0) {
    result.warm_start = options_.warm_start->source;
    result.warm_start_experts = row.warm_experts;
    result.warm_start_bytes =
        static_cast<uint64_t>(row.warm_experts) * Moved(row).spec().blob_bytes();
    result.warm_start_seconds = row.warm_seconds;
  }
  result.output_sha256 = row.hash.Hex();
  result.lossless = !row.is_lossy && result.output_sha256 == rows_.front()->hash.Hex();
  if (row.is_lossy) {
    result.copies = CopyName(options_.copies->spec().copies);
    result.exact_match = row.quality.exact_match();
    result.logit_kl = row.quality.logit_kl();
    result.perplexity_change = row.quality.perplexity_change();
    result.compared_sequences = row.quality.sequences();
  }
  const auto blob = static_cast<double>(file_->spec().blob_bytes());
  const double seconds_each = blob / row.runtime->measured_link_bytes_per_second(),
               bytes_each = static_cast<double>(Moved(row).spec().blob_bytes());
  for (const SpeculationAccount& account : row.runtime->speculation(phase)) {
    if (account.judged == 0) continue;
    result.speculation.push_back(
        {account, static_cast<int64_t>(account.moved_in_vain * bytes_each),
         account.saved * seconds_each});
  }
  result.memory_manager = row.runtime->memory_manager();
  result.switched_off = !row.runtime->speculation_helps(phase);
  return result;
}

const ExpertFile& Comparison::Moved(const Row& row) const {
  return row.is_lossy ? *options_.copies : *file_;
}

void Comparison::AddBounds(std::vector<RowResult>* rows) const {
  size_t from = 0;
  const auto visits = AllVisits(&from);
  const MissCount best =
      CountMisses(workload_->geometry(), slots_, Eviction::kBelady, visits, from);
  for (RowResult& row : *rows) {
    const int s = static_cast<int>(row.phase);
    // Tc: computing with nothing to wait for. Tx: moving what on-demand LRU moves, and
    // `own` what it moves of the row's copies.
    double tc = compute_[s] * options_.rounds, tx = 0, own = 0;
    for (const RowResult& other : *rows) {
      if (other.phase != row.phase) continue;
      if (other.policy == "resident") tc = other.compute_seconds;
      if (other.policy != "on_demand" || other.eviction != "lru") continue;
      if (other.copies == "lossless") tx = other.transfer_seconds;
      if (other.copies == row.copies) own = other.transfer_seconds;
    }
    row.bound = tc + tx > 0 ? (tc + tx) / std::max(tc, own) : 1;
    if (row.policy != "resident") {
      const bool lossy = row.copies != "lossless";
      const ExpertFileSpec& moved = (lossy ? *options_.copies : *file_).spec();
      row.bytes_belady = best.misses[s] * static_cast<int64_t>(moved.blob_bytes());
    }
  }
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
      summary.speed_up_spread = Spread(ratios);
      summary.effect_size = EffectSize(ratios);
      summary.round_rates = row->rates[static_cast<int>(phase)];
      summary.round_speed_ups = std::move(ratios);
      result.lossless = result.lossless && (summary.lossless || row->is_lossy);
      result.rows.push_back(std::move(summary));
    }
  }
  AddBounds(&result.rows);
  result.device = tiers_.device;
  result.link = tiers_.engine->description();
  result.device_peak_bytes = device_peak_bytes_;
  result.link_peak_bytes_per_second = peak_;
  result.link_bytes_per_second = pace_ > 0 ? pace_ : peak_;
  result.emulated = pace_ > 0 || options_.profile.has_value();
  result.synthetic_weights = options_.synthetic_weights;
  for (const auto& row : result.rows) {
    const std::string shut = ShutLeads(row);
    if (!shut.empty() && !row.switched_off) {
      notes_.push_back(
          SpeculatorName(row) +
          ": what it said this many layers ahead was not worth fetching: " + shut);
    }
    if (row.switched_off) {
      notes_.push_back(SpeculatorName(row) +
                       ": prefetching did not help here and is off");
    }
  }
  for (const auto& row : rows_) {
    const QuestionGuard& questions = row->runtime->questions();
    if (questions.failed() == 0) continue;
    notes_.push_back(FailureText(row->predictor, questions.failed(), "were left out",
                                 questions.first_failure()));
  }
  result.notes = notes_;
  return result;
}

}  // namespace routecast
