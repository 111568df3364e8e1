#include "evaluator/policy_simulation.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <chrono>
#include <span>

#include "common/errors.h"
#include "common/stop.h"
#include "evaluator/question_guard.h"
#include "report/result_values.h"
#include "report/svg_chart.h"
#include "report/table.h"

namespace routecast {
namespace {

constexpr size_t kOracleHorizon = 12;
constexpr int kMaxSource = 128;  // encoder tokens, as in a replay
constexpr uint64_t kChunk = 1 << 20;

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

bool AnyNeedsHidden(const std::vector<std::unique_ptr<ExpertPredictor>>& predictors) {
  return std::any_of(predictors.begin(), predictors.end(),
                     [](const auto& p) { return p->needs_hidden(); });
}

// A hair more than the product: 29 % of a hundred experts are 29.
int SlotsOf(double budget_share, int experts) {
  return static_cast<int>(budget_share * experts * (1 + 1e-12));
}

void RequireTwoSlots(double budget_share, int experts) {
  if (SlotsOf(budget_share, experts) >= 2) return;
  throw UsageError(ErrorText(
      "--expert_budget is smaller than one step needs",
      Percent(budget_share) + " of " + std::to_string(experts) +
          " experts; two are needed: one runs, one arrives",
      "use --expert_budget=" + std::to_string(200 / experts + 1) + "% or more"));
}

StepCosts CostsOf(const ImaginedModel& model, double question_seconds) {
  StepCosts costs;
  costs.between_layers = model.layer.value;
  costs.expert = model.expert.value;
  costs.head = model.head.value;
  costs.question = question_seconds;
  return costs;
}

class Playground {
 public:
  Playground(const TraceReader& reader, const DeviceProfile& profile,
             const PolicySimulationOptions& options, bool hidden)
      : reader_(reader),
        options_(options),
        g_(reader.config().geometry),
        model_(ImaginedModelOf(profile, options)),
        costs_(CostsOf(model_, options.question_seconds)),
        ids_(SequencesOf(reader, options, hidden)),
        hidden_(hidden) {
    for (const double share : options.budget_shares)
      RequireTwoSlots(share, num_experts());
    planner_.expert_bytes = static_cast<uint64_t>(model_.expert_bytes.value);
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

  // One budget's row.
  SimulatedRow Run(size_t budget, const std::string& predictor, const std::string& policy,
                   const std::string& eviction, const Recording& recording,
                   const RankedVisits& ranked, const SpeculationPolicy& settings) const {
    ThrowIfStopped("between two simulations");
    SimulatedRow row =
        BudgetRow(budget, SlotsOf(options_.budget_shares[budget], num_experts()));
    PlannerOptions planner = planner_;
    planner.policy = settings;
    const auto start = std::chrono::steady_clock::now();
    const SimulationResult r =
        SimulatePrefetch(g_, row.slots, ParseEviction(eviction), planner, link_, ranked,
                         recording.counted_from, options_.warm_start.get());
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
    const TransferLedger& l = r.ledger;
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
  // Every expert stays: nothing is moved, nobody waits.
  SimulatedRow Resident(size_t budget, const Recording& recording) const {
    SimulatedRow row = BudgetRow(budget, num_experts());
    row.predictor = "none";
    row.policy = "resident";
    row.eviction = "none";
    row.seconds = ComputeSeconds(recording);
    row.tokens_per_second = static_cast<double>(recording.tokens) / row.seconds;
    row.hit_rate = 1;
    return row;
  }
  const MoeGeometry& geometry() const { return g_; }
  const ImaginedModel& model() const { return model_; }

 private:
  int num_experts() const { return NumSimulatedExperts(g_, options_); }
  SimulatedRow BudgetRow(size_t budget, int slots) const {
    SimulatedRow row;
    if (options_.budget_shares.size() > 1) {
      row.budget = options_.budget_names.empty()
                       ? ShortNumber(100 * options_.budget_shares[budget]) + "%"
                       : options_.budget_names[budget];
    }
    row.slots = slots;
    row.budget_bytes = static_cast<uint64_t>(slots) * link_.expert_bytes;
    if (options_.warm_start) {
      row.warm_start_seconds =
          slots * (link_.fixed_seconds +
                   static_cast<double>(link_.expert_bytes) / link_.bytes_per_second);
    }
    return row;
  }

  const TraceReader& reader_;
  const PolicySimulationOptions& options_;
  MoeGeometry g_;
  ImaginedModel model_;
  StepCosts costs_;
  std::vector<uint64_t> ids_;
  bool hidden_;
  PlannerOptions planner_;
  SimulatedLinkOptions link_;
  std::shared_ptr<const NextTokenGuess> next_token_;  // null: no head, or no outputs
};

}  // namespace

ImaginedModel ImaginedModelOf(const DeviceProfile& profile,
                              const PolicySimulationOptions& o) {
  const double d = o.d_model, f = o.d_ff;
  LayerWork work;
  // Two blocks, one of them sparse: self- and cross-attention (4 d^2 each) in both, one
  // dense feed-forward layer.
  work.between[1] = 2 * 2 * 4 * d * d + 2 * d * f;
  work.expert = 2 * d * f;
  work.head = d * o.vocab_size;
  return Imagine(o.sizes, work, profile);
}

int NumSimulatedExperts(const MoeGeometry& g, const PolicySimulationOptions& options) {
  return (g.decoder_layers + (options.encoder ? g.encoder_layers : 0)) * g.num_experts;
}

void CheckSimulation(const TraceReader& reader,
                     const std::vector<std::unique_ptr<ExpertPredictor>>& predictors,
                     const PolicySimulationOptions& options) {
  SequencesOf(reader, options, AnyNeedsHidden(predictors));
  for (const double share : options.budget_shares)
    RequireTwoSlots(share, NumSimulatedExperts(reader.config().geometry, options));
}

PolicySimulationResult SimulatePolicies(
    const TraceReader& reader,
    const std::vector<std::unique_ptr<ExpertPredictor>>& predictors,
    const DeviceProfile& profile, const PolicySimulationOptions& options) {
  const c10::NoGradGuard no_grad;
  const Playground ground(reader, profile, options, AnyNeedsHidden(predictors));
  PolicySimulationResult result;
  result.profile = profile;
  result.imagined = ground.model();
  result.question_us = 1e6 * options.question_seconds;
  if (options.warm_start) result.warm_start = options.warm_start->source;
  const Recording plain = ground.Record(nullptr, 0);
  result.tokens = plain.tokens;
  result.sequence_tokens = options.tokens;
  // A predictor is asked once, and what it said played with every budget, policy and
  // eviction: one that learns while it serves must not have seen the sequences before.
  std::vector<std::vector<SimulatedRow>> rows(options.budget_shares.size());
  const auto play = [&](const std::string& predictor, const std::string& policy,
                        const std::string& eviction, const Recording& recording,
                        const RankedVisits& ranked, const SpeculationPolicy& settings) {
    for (size_t b = 0; b < rows.size(); ++b) {
      rows[b].push_back(
          ground.Run(b, predictor, policy, eviction, recording, ranked, settings));
    }
  };
  const SpeculationPolicy demand = ParsePolicy("on_demand");
  const RankedVisits unforeseen(plain.visits);
  play("none", "on_demand", "lru", plain, unforeseen, demand);
  for (const std::string& eviction : options.evictions) {
    if (eviction != "lru") play("none", "on_demand", eviction, plain, unforeseen, demand);
  }
  int farthest = 0;  // layer visits that some policy looks ahead
  for (const std::string& policy : options.policies)
    farthest = std::max(farthest, PolicyFor(policy, ground.geometry()).max_lead);
  for (const auto& predictor : predictors) {
    if (farthest == 0) break;  // nobody is asked: rows of no predictor, above
    const Recording told = ground.Record(predictor.get(), farthest);
    const RankedVisits ranked(told.visits);
    for (const std::string& policy : options.policies) {
      SpeculationPolicy settings = PolicyFor(policy, ground.geometry());
      if (!settings.speculate) continue;
      settings.auto_off = false;  // the gauge compares measured times
      settings.most_experts = PresetOf(profile).most_experts;
      settings.aggressiveness = PresetOf(profile).aggressiveness;
      for (const std::string& eviction : options.evictions) {
        if (eviction == "belady") continue;  // a row on demand alone: what is least
        play(predictor->label(), policy, eviction, told, ranked, settings);
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
  play("oracle", "auto", "lru", oracle, RankedVisits(oracle.visits), far);
  const double compute = ground.ComputeSeconds(plain);
  for (size_t b = 0; b < rows.size(); ++b) {
    rows[b].push_back(ground.Resident(b, plain));
    const double lru = rows[b][0].seconds;
    for (SimulatedRow& row : rows[b]) {
      row.bound = lru / std::max(compute, lru - compute);
      row.speed_up = lru / row.seconds;
      row.imagined = ground.model();
      result.rows.push_back(std::move(row));
    }
  }
  return result;
}

Json SimulatedRow::ToJson() const {
  Json json = {{"predictor", predictor},       {"policy", policy},
               {"eviction", eviction},         {"slots", slots},
               {"budget_bytes", budget_bytes}, {"tokens_per_second", tokens_per_second},
               {"speed_up", speed_up},         {"bound", bound},
               {"hit_rate", hit_rate},         {"stall_seconds", stall_seconds},
               {"seconds", seconds},           {"question_seconds", question_seconds},
               {"bytes_useful", bytes_useful}, {"bytes_late", bytes_late},
               {"bytes_wasted", bytes_wasted}, {"simulated", true}};
  const Json sizes = imagined.ToJson();
  for (const auto& [key, figure] : sizes.items()) json[key] = figure.at("value");
  json["imagined_from"] = imagined.From();
  if (!budget.empty()) json["budget"] = budget;
  if (warm_start_seconds > 0) json["warm_start_seconds"] = warm_start_seconds;
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
  Json json = {{"profile", profile.ToJson()},        {"imagined", imagined.ToJson()},
               {"question_us", question_us},         {"tokens", tokens},
               {"sequence_tokens", sequence_tokens}, {"rows", Json::array()}};
  if (!warm_start.empty()) json["warm_start"] = warm_start;
  for (const SimulatedRow& row : rows) json["rows"].push_back(row.ToJson());
  return json;
}

std::string PolicySimulationResult::ToCsv() const { return RowsCsv(ToJson().at("rows")); }

namespace {

std::string Mebibytes(uint64_t bytes) {
  return Fixed(static_cast<double>(bytes) / (1 << 20), 0);
}

Table TableOf(std::span<const SimulatedRow> rows) {
  Table table({"<policy", "<predictor", "<evict", "tokens/s", "speed", "hits",
               "useful MiB", "late", "wasted", "stall s", "asking s", "bound"});
  for (const SimulatedRow& r : rows) {
    table.AddRow({r.policy, r.predictor, r.eviction, Fixed(r.tokens_per_second, 1),
                  Fixed(r.speed_up, 2) + "x", Percent(r.hit_rate),
                  Mebibytes(r.bytes_useful), Mebibytes(r.bytes_late),
                  Mebibytes(r.bytes_wasted), Fixed(r.stall_seconds, 2),
                  Fixed(r.question_seconds, 2), Fixed(r.bound, 2)});
  }
  return table;
}

// The slots of a table's rows, which are of one budget.
std::string BudgetText(const SimulatedRow& row) {
  return (row.budget.empty() ? "" : row.budget + ": ") + std::to_string(row.slots) +
         " slots (" + Mebibytes(row.budget_bytes) +
         " MiB of the imagined model's experts)" +
         (row.warm_start_seconds > 0
              ? ", filled in " + Fixed(row.warm_start_seconds, 2) + " s"
              : "") +
         "\n";
}

// Rows that no such device could have.
std::string RoomText(const PolicySimulationResult& result) {
  uint64_t most = 0;
  for (const SimulatedRow& row : result.rows) most = std::max(most, row.budget_bytes);
  const uint64_t memory = result.profile.memory_bytes;
  if (memory == 0 || most <= memory) return "";
  return "rows of up to " + FormatBytes(most) + " of experts are more than " +
         result.profile.name + " has: " + FormatBytes(memory) + "\n";
}

}  // namespace

std::string PolicyTable(const PolicySimulationResult& result) {
  std::string text, failures;
  double visits = 0;
  for (size_t begin = 0, end; begin < result.rows.size(); begin = end) {
    end = begin + 1;
    while (end < result.rows.size() &&
           result.rows[end].budget == result.rows[begin].budget)
      ++end;
    text += BudgetText(result.rows[begin]);
    text += TableOf({result.rows.data() + begin, end - begin}).ToText();
  }
  for (const SimulatedRow& r : result.rows) {
    visits = std::max(visits, r.visits_per_second);
    if (r.failed_questions == 0) continue;
    const std::string failure =
        FailureText(r.predictor + ", " + r.policy, r.failed_questions, "were left out",
                    r.first_failure) +
        "\n";
    if (failures.find(failure) == std::string::npos) failures += failure;  // once
  }
  const std::string warm =
      result.warm_start.empty()
          ? ""
          : "slots begin with the most used experts (" + result.warm_start + ")\n";
  return text + failures + warm + result.imagined.Text() + "\n" + RoomText(result) +
         "simulated: " + result.profile.name +
         (result.profile.emulated ? " (emulated)" : "") + ", " +
         std::to_string(result.tokens) + " tokens, the first " +
         std::to_string(result.sequence_tokens) +
         " of a sequence at most (--max_new_tokens), " + Fixed(result.question_us, 0) +
         " us a question (--question_us, whatever the predictor); the simulator played "
         "up to " +
         Fixed(visits / 1e3, 0) +
         " thousand layer visits a second\n"
         "bound: what prefetching alone can gain over on-demand LRU, with LRU's misses; "
         "a "
         "row that keeps other experts may pass it\n";
}

}  // namespace routecast
