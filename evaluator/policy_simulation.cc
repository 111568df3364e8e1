#include "evaluator/policy_simulation.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <chrono>

#include "common/errors.h"
#include "common/stop.h"
#include "evaluator/question_guard.h"
#include "report/table.h"

namespace routecast {
namespace {

constexpr size_t kOracleHorizon = 12;
constexpr int kMaxSource = 128;  // encoder tokens, as in a replay
constexpr uint64_t kChunk = 1 << 20;
constexpr double kBytesAWeight = 4;

struct Recording {
  std::vector<SimulatedVisit> visits;
  size_t counted_from = 0, tokens = 0;
  int64_t failed_questions = 0;
  std::string first_failure;
};

std::vector<uint64_t> SequencesOf(const TraceReader& reader,
                                  const PolicySimulationOptions& options, bool hidden) {
  const MoeGeometry& g = reader.config().geometry;
  if (g.decoder_layers == 0 || (options.encoder && g.encoder_layers == 0)) {
    throw UsageError(ErrorText(
        "the store's model has no " + std::string(g.decoder_layers == 0 ? "de" : "en") +
            "coder to simulate",
        reader.path().string(),
        g.decoder_layers == 0 ? "give a store of decoder records"
                              : "leave --phase=both out: decoder steps are simulated"));
  }
  std::vector<uint64_t> ids;
  for (const SequenceInfo& info : reader.sequences()) {
    if (SplitOf(info.group_id) != options.part || info.decoder_tokens < 4) continue;
    if (hidden && !info.has_hidden) continue;
    if (options.encoder && info.encoder_tokens == 0) continue;
    ids.push_back(info.sequence_id);
    if (ids.size() == static_cast<size_t>(options.sequences)) break;
  }
  if (ids.size() <= static_cast<size_t>(options.warmup_sequences)) {
    throw UsageError(
        ErrorText("the store has too few decoder sequences" +
                      std::string(hidden ? " with router inputs" : "") + " in this part",
                  std::to_string(ids.size()) + " found, more than " +
                      std::to_string(options.warmup_sequences) + " are needed",
                  hidden ? "collect more, with --record=ids,probs,hidden"
                         : "collect or import more; --phase=both wants encoder records"));
  }
  return ids;
}

class Playground {
 public:
  Playground(const TraceReader& reader, const DeviceProfile& profile,
             const PolicySimulationOptions& options, bool hidden)
      : reader_(reader),
        options_(options),
        g_(reader.config().geometry),
        costs_(CostsOf(profile, options)),
        ids_(SequencesOf(reader, options, hidden)),
        hidden_(hidden) {
    const int layers = g_.decoder_layers + (options.encoder ? g_.encoder_layers : 0);
    const int experts = layers * g_.num_experts;
    slots_ = static_cast<int>(options.budget_share * experts);
    if (slots_ < 2) {
      throw UsageError(ErrorText(
          "--expert_budget is smaller than one step needs",
          Percent(options.budget_share) + " of " + std::to_string(experts) +
              " experts; two are needed: one runs, one arrives",
          "use --expert_budget=" + std::to_string(200 / experts + 1) + "% or more"));
    }
    planner_.expert_bytes = static_cast<uint64_t>(2 * kBytesAWeight * options.d_model *
                                                  static_cast<double>(options.d_ff));
    planner_.engine_can_cancel = true;
    planner_.late_allowance = 0.95;
    planner_.link_bytes_per_second = profile.link_bytes_per_second;
    link_.expert_bytes = planner_.expert_bytes;
    link_.chunk_bytes = kChunk;
    link_.bytes_per_second = profile.link_bytes_per_second;
    link_.fixed_seconds = profile.link_fixed_seconds;
    const at::Tensor head = ReadVocabularyHead(reader.routers_path(), g_.d_model);
    if (hidden && head.defined()) next_token_ = std::make_shared<NextTokenGuess>(head);
  }

  Recording Record(ExpertPredictor* predictor, int max_lead) const {
    Recording recording;
    QuestionGuard guard;
    std::unique_ptr<PredictorForesight> unguarded;
    std::unique_ptr<GuardedForesight> foresight;
    if (predictor) {
      unguarded =
          std::make_unique<PredictorForesight>(predictor, g_, max_lead, next_token_);
      foresight = std::make_unique<GuardedForesight>(unguarded.get(), &guard);
    }
    for (size_t i = 0; i < ids_.size(); ++i) {
      ThrowIfStopped("while asking for the simulation");
      if (i == static_cast<size_t>(options_.warmup_sequences)) {
        recording.counted_from = recording.visits.size();
      }
      const RoutingTrace trace =
          reader_.Read(ids_[i], hidden_ ? WithHidden::kYes : WithHidden::kNo);
      if (options_.encoder)
        AppendEncoderVisits(trace, g_, kMaxSource, costs_, foresight.get(),
                            &recording.visits);
      const size_t before = recording.visits.size();
      AppendVisits(trace, g_, options_.tokens, costs_, foresight.get(),
                   &recording.visits);
      if (i < static_cast<size_t>(options_.warmup_sequences)) continue;
      recording.tokens +=
          (recording.visits.size() - before) / static_cast<size_t>(g_.decoder_layers);
    }
    recording.failed_questions = guard.failed();
    recording.first_failure = guard.first_failure();
    return recording;
  }

  SimulatedRow Run(const std::string& predictor, const std::string& policy,
                   const std::string& eviction, const Recording& recording,
                   const RankedVisits& ranked, SpeculationPolicy settings) const {
    ThrowIfStopped("between two simulations");
    PlannerOptions planner = planner_;
    planner.policy = settings;
    const auto start = std::chrono::steady_clock::now();
    const SimulationResult r =
        SimulatePrefetch(g_, slots_, ParseEviction(eviction), planner, link_, ranked,
                         recording.counted_from, options_.warm_start.get());
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
    const TransferLedger& l = r.ledger;
    SimulatedRow row;
    row.predictor = predictor;
    row.policy = policy;
    row.eviction = eviction;
    row.tokens_per_second = static_cast<double>(recording.tokens) / r.seconds;
    row.hit_rate = static_cast<double>(l.hits) / static_cast<double>(l.uses);
    row.stall_seconds = r.stall_seconds;
    row.seconds = r.seconds;
    row.question_seconds = r.question_seconds;
    row.bytes_useful = l.bytes_useful;
    row.bytes_late = l.bytes_late;
    row.bytes_wasted = l.bytes_wasted;
    row.visits_per_second = static_cast<double>(recording.visits.size()) / took.count();
    row.memory_manager = r.memory_manager;
    row.failed_questions = recording.failed_questions;
    row.first_failure = recording.first_failure;
    return row;
  }

  // The model's own work over the counted visits.
  double ComputeSeconds(const Recording& recording) const {
    double seconds = 0;
    for (size_t i = recording.counted_from; i < recording.visits.size(); ++i) {
      const SimulatedVisit& v = recording.visits[i];
      seconds += v.seconds_before + v.seconds_in_pass +
                 static_cast<double>(v.experts.size()) * v.seconds_expert;
    }
    return seconds;
  }
  int slots() const { return slots_; }
  uint64_t expert_bytes() const { return link_.expert_bytes; }
  double TransferSeconds() const {
    return link_.fixed_seconds +
           static_cast<double>(link_.expert_bytes) / link_.bytes_per_second;
  }
  const MoeGeometry& geometry() const { return g_; }

 private:
  const TraceReader& reader_;
  const PolicySimulationOptions& options_;
  MoeGeometry g_;
  StepCosts costs_;
  std::vector<uint64_t> ids_;
  bool hidden_;
  int slots_ = 2;
  PlannerOptions planner_;
  SimulatedLinkOptions link_;
  std::shared_ptr<const NextTokenGuess> next_token_;  // null: no head, or no outputs
};

}  // namespace

StepCosts CostsOf(const DeviceProfile& profile, const PolicySimulationOptions& o) {
  const double second_a_weight = kBytesAWeight / profile.memory_bytes_per_second;
  const double d = o.d_model, f = o.d_ff;
  StepCosts costs;
  // Two blocks, one of them sparse: self- and cross-attention (4 d^2 each) in both, one
  // dense feed-forward layer.
  costs.between_layers = (2 * 2 * 4 * d * d + 2 * d * f) * second_a_weight;
  costs.expert = 2 * d * f * second_a_weight;
  costs.head = d * o.vocab_size * second_a_weight;
  costs.question = o.question_seconds;
  return costs;
}

PolicySimulationResult SimulatePolicies(
    const TraceReader& reader,
    const std::vector<std::unique_ptr<ExpertPredictor>>& predictors,
    const DeviceProfile& profile, const PolicySimulationOptions& options) {
  const c10::NoGradGuard no_grad;
  const bool hidden = std::any_of(predictors.begin(), predictors.end(),
                                  [](const auto& p) { return p->needs_hidden(); });
  const Playground ground(reader, profile, options, hidden);
  PolicySimulationResult result;
  result.profile = profile;
  result.slots = ground.slots();
  result.budget_bytes = static_cast<uint64_t>(result.slots) * ground.expert_bytes();
  result.question_us = 1e6 * options.question_seconds;
  const Recording plain = ground.Record(nullptr, 0);
  if (options.warm_start) {
    result.warm_start = options.warm_start->source;
    result.warm_start_seconds = result.slots * ground.TransferSeconds();
  }
  result.tokens = plain.tokens;
  const SpeculationPolicy demand = ParsePolicy("on_demand");
  const RankedVisits unforeseen(plain.visits);
  result.rows.push_back(
      ground.Run("none", "on_demand", "lru", plain, unforeseen, demand));
  for (const std::string& eviction : options.evictions) {
    if (eviction == "lru") continue;
    result.rows.push_back(
        ground.Run("none", "on_demand", eviction, plain, unforeseen, demand));
  }
  for (const auto& predictor : predictors) {
    for (const std::string& policy : options.policies) {
      SpeculationPolicy settings = PolicyFor(policy, ground.geometry());
      if (!settings.speculate) continue;  // a row of no predictor, above
      settings.auto_off = false;          // the gauge compares measured times
      settings.most_experts = PresetOf(profile).most_experts;
      settings.aggressiveness = PresetOf(profile).aggressiveness;
      const Recording told = ground.Record(predictor.get(), settings.max_lead);
      const RankedVisits ranked(told.visits);
      for (const std::string& eviction : options.evictions) {
        if (eviction == "belady") continue;  // a row on demand alone: what is least
        result.rows.push_back(
            ground.Run(predictor->name(), policy, eviction, told, ranked, settings));
      }
    }
  }
  SpeculationPolicy far = PolicyFor("auto", ground.geometry());
  far.auto_off = false;
  far.top_k = ground.geometry().num_experts;  // a visit may need all
  far.max_lead = std::max(far.max_lead, static_cast<int>(kOracleHorizon));
  Recording oracle = plain;
  oracle.visits = WithOracle(std::move(oracle.visits), ground.geometry().num_experts,
                             static_cast<size_t>(far.max_lead));
  result.rows.push_back(
      ground.Run("oracle", "auto", "lru", oracle, RankedVisits(oracle.visits), far));
  const double compute = ground.ComputeSeconds(plain);
  for (SimulatedRow& row : result.rows) {
    const double transfer = result.rows[0].seconds - compute;  // of on-demand LRU
    row.bound = (compute + transfer) / std::max(compute, transfer);
    row.speed_up = result.rows[0].seconds / row.seconds;
  }
  return result;
}

Json SimulatedRow::ToJson() const {
  Json json = {{"predictor", predictor},       {"policy", policy},
               {"eviction", eviction},         {"tokens_per_second", tokens_per_second},
               {"speed_up", speed_up},         {"bound", bound},
               {"hit_rate", hit_rate},         {"stall_seconds", stall_seconds},
               {"seconds", seconds},           {"question_seconds", question_seconds},
               {"bytes_useful", bytes_useful}, {"bytes_late", bytes_late},
               {"bytes_wasted", bytes_wasted}, {"simulated", true}};
  if (memory_manager) {
    json["memory_regime"] = memory_manager->regime;
    json["most_experts"] = memory_manager->most_experts;
    json["aggressiveness"] = memory_manager->aggressiveness;
  }
  if (failed_questions > 0) {
    json["failed_questions"] = failed_questions;
    json["first_failure"] = first_failure;
  }
  return json;
}

Json PolicySimulationResult::ToJson() const {
  Json json = {
      {"profile", profile.ToJson()}, {"slots", slots},   {"budget_bytes", budget_bytes},
      {"question_us", question_us},  {"tokens", tokens}, {"rows", Json::array()}};
  if (!warm_start.empty()) {
    json["warm_start"] = warm_start;
    json["warm_start_seconds"] = warm_start_seconds;
  }
  for (const SimulatedRow& row : rows) json["rows"].push_back(row.ToJson());
  return json;
}

std::string PolicyTable(const PolicySimulationResult& result) {
  Table table({"<policy", "<predictor", "<evict", "tokens/s", "speed", "hits",
               "useful MiB", "late", "wasted", "stall s", "asking s", "bound"});
  const auto mib = [](uint64_t bytes) {
    return Fixed(static_cast<double>(bytes) / (1 << 20), 0);
  };
  double visits = 0;
  std::string failures;
  for (const SimulatedRow& r : result.rows) {
    const std::string failure =
        r.failed_questions == 0
            ? ""
            : FailureText(r.predictor + ", " + r.policy, r.failed_questions,
                          "were left out", r.first_failure) +
                  "\n";
    if (failures.find(failure) == std::string::npos) failures += failure;  // once
    table.AddRow({r.policy, r.predictor, r.eviction, Fixed(r.tokens_per_second, 1),
                  Fixed(r.speed_up, 2) + "x", Percent(r.hit_rate), mib(r.bytes_useful),
                  mib(r.bytes_late), mib(r.bytes_wasted), Fixed(r.stall_seconds, 2),
                  Fixed(r.question_seconds, 2), Fixed(r.bound, 2)});
    visits = std::max(visits, r.visits_per_second);
  }
  const std::string warm = result.warm_start.empty()
                               ? ""
                               : "slots begin with the most used experts (" +
                                     result.warm_start +
                                     "): " + Fixed(result.warm_start_seconds, 2) +
                                     " s before the first step\n";
  return table.ToText() + failures + warm + "simulated: " + result.profile.name +
         (result.profile.emulated ? " (emulated)" : "") + ", " +
         std::to_string(result.slots) + " slots (" + mib(result.budget_bytes) +
         " MiB of the imagined model's experts), " + std::to_string(result.tokens) +
         " tokens, " + Fixed(result.question_us, 0) +
         " us a question; the simulator played up to " + Fixed(visits / 1e3, 0) +
         " thousand layer visits a second\n"
         "bound: what prefetching alone can gain over on-demand LRU, with LRU's misses; "
         "a "
         "row that keeps other experts may pass it\n";
}

}  // namespace routecast
