// What planner settings and a predictor would buy, by simulation: recorded sequences of a
// store, a trained predictor, a serial link under a manual clock. Deterministic, so that
// settings can be told apart that a measurement cannot. Settings are chosen on
// --part=validation; figures to report are the runtime's own, on the test part.
#include <ATen/ATen.h>
#include <c10/core/GradMode.h>
#include <gflags/gflags.h>

#include <algorithm>
#include <cstdio>

#include "evaluator/comparison.h"
#include "evaluator/foresight.h"
#include "evaluator/policy_simulation.h"
#include "models/predictor_factory.h"
#include "storage/trace_reader.h"

DEFINE_string(store, "", "Trace store with router inputs");
DEFINE_string(predictor, "", "Folder of a trained run");
DEFINE_string(part, "validation", "validation or test");
DEFINE_int32(sequences, 200, "Sequences, at most");
DEFINE_int32(tokens, 16, "Decoder steps a sequence, at most");
DEFINE_double(budget, 0.25, "Share of the expert bytes");
DEFINE_double(gap_ms, 4.0, "Work between two MoE layers");
DEFINE_double(expert_ms, 1.6, "Work of an expert");
DEFINE_double(head_ms, 8.3, "Work after the last layer");
DEFINE_double(predict_ms, 0.2, "Work of one question");
DEFINE_double(bound, 1.71, "The link's rate is set to this bound");
DEFINE_bool(guess, true, "Guess the next token where the store has outputs and the head");
DEFINE_string(policy, "auto", "As routecast-evaluate's; auto without its gauge");
DEFINE_double(min_probability, -1, "Overrides the policy's");
DEFINE_int32(top_k, 0, "Overrides the policy's");
DEFINE_int32(max_lead, 0, "Overrides the policy's");
DEFINE_double(late_allowance, 0.95, "PlannerOptions");
DEFINE_bool(heed_later_use, true, "What a predictor says of it counts in who leaves");
DEFINE_string(eviction, "lru", "As routecast-evaluate's, of every row but the first");
DEFINE_bool(layers, true, "Prints what was waited layer by layer");

namespace routecast {
namespace {

constexpr int kDModel = 768, kDff = 3072;

struct Play {
  std::vector<SimulatedVisit> visits;
  size_t counted_from = 0, tokens = 0;
};

Play Record(const TraceReader& reader, const MoeGeometry& g, Foresight* foresight) {
  const SplitPart part = FLAGS_part == "test" ? SplitPart::kTest : SplitPart::kValidation;
  const StepCosts costs{FLAGS_gap_ms / 1e3, FLAGS_expert_ms / 1e3, FLAGS_head_ms / 1e3,
                        FLAGS_predict_ms / 1e3};
  Play play;
  int count = 0;
  for (const SequenceInfo& info : reader.sequences()) {
    if (SplitOf(info.group_id) != part || !info.has_hidden || info.decoder_tokens < 4) {
      continue;
    }
    if (count == 4) play.counted_from = play.visits.size();  // the cache fills
    const size_t before = play.visits.size();
    AppendVisits(reader.Read(info.sequence_id, WithHidden::kYes), g, FLAGS_tokens, costs,
                 foresight, &play.visits);
    play.tokens += (play.visits.size() - before) / size_t(g.decoder_layers);
    if (++count == FLAGS_sequences) break;
  }
  return play;
}

void Print(const char* name, const SimulationResult& r, double base, size_t uses,
           int64_t belady) {
  const TransferLedger& l = r.ledger;
  const double n = double(uses), one = 8.0 * kDModel * kDff;
  std::printf(
      "%-12s %6.3fx  hits %5.1f%%  late %5.1f%%  wasted %5.1f%%  stall %6.2f s  "
      "of %6.2f s  link %4.1f%%  moved %.3fx Belady's\n",
      name, base / r.seconds, 100 * double(l.hits) / n,
      100 * double(l.bytes_late) / one / n, 100 * double(l.bytes_wasted) / one / n,
      r.stall_seconds, r.seconds, 100 * r.link_seconds / r.seconds,
      double(l.bytes_moved()) / one / double(belady));
}

// By layer: what was waited, and where the expert stood in what was said of it before, by
// the distance of the saying (1 = the layer before it).
void PrintLayers(const SimulationResult& r, const Play& play) {
  for (int layer = 0; layer < 64; ++layer) {
    double stall = 0;
    size_t uses = 0, late = 0;
    double first[4] = {};
    for (size_t i = play.counted_from; i < play.visits.size(); ++i) {
      if (play.visits[i].layer != layer) continue;
      ++uses;
      const double waited = r.stalls[i - play.counted_from];
      stall += waited;
      late += waited > 0;
      for (size_t d = 1; d <= 3 && d <= i; ++d) {
        const SimulatedVisit& said = play.visits[i - d];
        for (const auto& f :
             said.at_pass_end.empty() ? said.at_layer : said.at_pass_end) {
          if (f.distance != int(d)) continue;
          const auto& p = f.probabilities;
          first[d] += std::max_element(p.begin(), p.end()) - p.begin() ==
                      play.visits[i].experts[0];
        }
      }
    }
    if (uses == 0) continue;
    std::printf(
        "  layer %d: waited at %4.1f%% of %zu uses, %.2f s, %.2f ms each; top-1 at "
        "lead 1, 2, 3: %.1f %.1f %.1f %%\n",
        layer, 100.0 * double(late) / double(uses), uses, stall,
        1e3 * stall / double(std::max<size_t>(late, 1)), 100 * first[1] / double(uses),
        100 * first[2] / double(uses), 100 * first[3] / double(uses));
  }
}

int Main() {
  const c10::NoGradGuard no_grad;
  const TraceReader reader(FLAGS_store);
  const MoeGeometry g = reader.config().geometry;
  const auto predictor = LoadPredictor(FLAGS_predictor, g, "", {});
  predictor->PrepareServing();
  SpeculationPolicy policy = ParsePolicy(FLAGS_policy);
  if (FLAGS_min_probability >= 0) policy.min_probability = FLAGS_min_probability;
  if (FLAGS_top_k > 0) policy.top_k = FLAGS_top_k;
  if (FLAGS_max_lead > 0) policy.max_lead = FLAGS_max_lead;
  policy.heed_later_use = FLAGS_heed_later_use;
  const at::Tensor head = ReadVocabularyHead(reader.routers_path(), g.d_model);
  std::shared_ptr<const NextTokenGuess> guess;
  if (FLAGS_guess && head.defined()) guess = std::make_shared<NextTokenGuess>(head);
  PredictorForesight foresight(predictor.get(), g, policy.max_lead, guess);
  const Play play = Record(reader, g, &foresight);
  MoeGeometry decoder = g;
  const auto slots = int(FLAGS_budget * double(g.decoder_layers * g.num_experts));
  PlannerOptions options;
  options.expert_bytes = uint64_t(8) * kDModel * kDff;
  options.engine_can_cancel = true;
  options.late_allowance = FLAGS_late_allowance;
  SimulatedLinkOptions link;
  link.expert_bytes = options.expert_bytes;
  link.chunk_bytes = 1 << 20;
  Eviction eviction = Eviction::kLru;
  const auto run = [&](const SpeculationPolicy& p,
                       std::span<const SimulatedVisit> visits) {
    PlannerOptions o = options;
    o.policy = p;
    o.link_bytes_per_second = link.bytes_per_second;
    return SimulatePrefetch(decoder, slots, eviction, o, link, visits, play.counted_from);
  };
  std::vector<OracleForesight::Visit> plain;
  for (const SimulatedVisit& v : play.visits) plain.push_back({v.layer, v.experts});
  const int64_t belady =
      CountMisses(g, slots, Eviction::kBelady, plain, play.counted_from).misses[1];
  const SpeculationPolicy demand = ParsePolicy("on_demand");
  link.bytes_per_second = 1e15;
  const double compute = run(demand, play.visits).seconds;  // nothing to wait for
  const SimulationResult probe = run(demand, play.visits);
  link.bytes_per_second =
      double(probe.ledger.bytes_moved()) / ((FLAGS_bound - 1) * compute);
  const SimulationResult lru = run(demand, play.visits);
  const size_t uses = play.visits.size() - play.counted_from;
  std::printf("%zu tokens, %d slots, an expert takes %.2f ms\n", play.tokens, slots,
              1e3 * double(link.expert_bytes) / link.bytes_per_second);
  const auto print = [&](const std::string& name, const SimulationResult& r) {
    Print(name.c_str(), r, lru.seconds, uses, belady);
  };
  print("lru", lru);
  for (const char* other : {"lfu", "lfru", "least_stale"}) {
    eviction = ParseEviction(other);
    print(other, run(demand, play.visits));
  }
  eviction = ParseEviction(FLAGS_eviction);
  print(FLAGS_policy, run(policy, play.visits));
  if (FLAGS_layers) PrintLayers(run(policy, play.visits), play);
  SpeculationPolicy far = policy;
  for (const int horizon : {1, 2, 3, 12, 48, 192}) {
    far.max_lead = horizon;
    print("oracle " + std::to_string(horizon),
          run(far, WithOracle(play.visits, g.num_experts, size_t(horizon))));
  }
  std::printf("goal       %6.3fx\n", 1 + 0.8 * (lru.seconds / compute - 1));
  return 0;
}

}  // namespace
}  // namespace routecast

int main(int argc, char** argv) {
  gflags::SetUsageMessage("simulates prefetching over recorded routing");
  gflags::ParseCommandLineFlags(&argc, &argv, true);
  try {
    return routecast::Main();
  } catch (const std::exception& e) {
    std::fprintf(stderr, "planner_bench: %s\n", e.what());
    return 1;
  }
}
