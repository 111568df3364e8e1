// What planner settings and a predictor would buy, by simulation: recorded sequences of a
// store, a trained predictor, a serial link under a manual clock. Deterministic, so that
// settings can be told apart that a measurement cannot. Settings are chosen on
// --part=validation; figures to report are the runtime's own, on the test part.
#include <ATen/ATen.h>
#include <c10/core/GradMode.h>
#include <gflags/gflags.h>

#include <algorithm>
#include <cstdio>

#include "evaluator/foresight.h"
#include "evaluator/prefetch_simulation.h"
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
DEFINE_string(policy, "auto", "As routecast-evaluate's; auto without its gauge");
DEFINE_double(min_probability, -1, "Overrides the policy's");
DEFINE_int32(top_k, 0, "Overrides the policy's");
DEFINE_int32(max_lead, 0, "Overrides the policy's");
DEFINE_double(late_allowance, 0.95, "PlannerOptions");

namespace routecast {
namespace {

constexpr int kDModel = 768, kDff = 3072;

struct Play {
  std::vector<SimulatedVisit> visits;
  size_t counted_from = 0, tokens = 0;
};

// The visits of the decoder's passes over one sequence, with what `foresight` says.
void AddSequence(const RoutingTrace& trace, const MoeGeometry& g, Foresight* foresight,
                 Play* play) {
  const RoutingSpan& span = trace.decoder;
  std::vector<at::Tensor> hidden;
  const RoutingWindow source = WindowOf(trace, Stack::kDecoder, -1, g.num_experts);
  for (int l = 0; l < g.decoder_layers; ++l) {
    hidden.push_back(
        WindowOf(trace, Stack::kDecoder, l, g.num_experts).hidden_BTD.contiguous());
  }
  for (int t = 0; t < std::min(span.num_tokens, FLAGS_tokens); ++t) {
    PassInfo pass;
    pass.stack = Stack::kDecoder;
    pass.token_ids_BT = at::full({1, 1}, int64_t{span.token_ids[size_t(t)]}, at::kLong);
    pass.valid_BT = at::ones({1, 1}, at::kBool);
    pass.first_position = t;
    pass.source_BSD = source.source_BSD;
    pass.source_valid_BS = source.source_valid_BS;
    const auto at_begin = foresight->AtPassBegin(pass);
    for (int l = 0; l < g.decoder_layers; ++l) {
      SimulatedVisit visit;
      visit.layer = g.GlobalLayer(Stack::kDecoder, l);
      const int expert = span.expert_ids[size_t(l) * size_t(span.num_tokens) + size_t(t)];
      visit.experts = {expert};
      visit.seconds_before = (l == 0 ? FLAGS_head_ms : FLAGS_gap_ms) / 1e3;
      visit.begins_pass = l == 0;
      visit.seconds_in_pass = l == 0 ? FLAGS_gap_ms / 1e3 : 0;
      visit.seconds_expert = FLAGS_expert_ms / 1e3;
      visit.seconds_predict = FLAGS_predict_ms / 1e3;
      if (l == 0) visit.at_pass_begin = at_begin;
      LayerRouting routing;
      routing.layer = visit.layer;
      routing.input_BTD = hidden[size_t(l)].narrow(1, t, 1).contiguous();
      routing.expert_ids_BT = at::full({1, 1}, expert, at::kLong);
      visit.at_layer = foresight->AtLayer(routing);
      play->visits.push_back(std::move(visit));
    }
    ++play->tokens;
  }
}

Play Record(const TraceReader& reader, const MoeGeometry& g, Foresight* foresight) {
  const SplitPart part = FLAGS_part == "test" ? SplitPart::kTest : SplitPart::kValidation;
  Play play;
  int count = 0;
  for (const SequenceInfo& info : reader.sequences()) {
    if (SplitOf(info.group_id) != part || !info.has_hidden || info.decoder_tokens < 4) {
      continue;
    }
    if (count == 4) play.counted_from = play.visits.size();  // the cache fills
    AddSequence(reader.Read(info.sequence_id, WithHidden::kYes), g, foresight, &play);
    if (++count == FLAGS_sequences) break;
  }
  return play;
}

std::vector<SimulatedVisit> TellFuture(std::vector<SimulatedVisit> visits,
                                       int num_experts, size_t horizon) {
  for (size_t i = 0; i < visits.size(); ++i) {
    visits[i].at_pass_begin.clear();
    visits[i].at_layer.clear();
    for (size_t d = 1; d <= horizon && i + d < visits.size(); ++d) {
      LayerForecast forecast{visits[i + d].layer, int(d),
                             std::vector<float>(size_t(num_experts), 0.f)};
      for (int e : visits[i + d].experts) forecast.probabilities[size_t(e)] = 1;
      visits[i].at_layer.push_back(std::move(forecast));
    }
    visits[i].seconds_predict = 0;
  }
  return visits;
}

void Print(const char* name, const SimulationResult& r, double base, size_t uses) {
  const TransferLedger& l = r.ledger;
  const double n = double(uses), one = 8.0 * kDModel * kDff;
  std::printf(
      "%-10s %6.3fx  hits %5.1f%%  late %5.1f%%  wasted %5.1f%%  stall %6.2f s  "
      "of %6.2f s  link %4.1f%%\n",
      name, base / r.seconds, 100 * double(l.hits) / n,
      100 * double(l.bytes_late) / one / n, 100 * double(l.bytes_wasted) / one / n,
      r.stall_seconds, r.seconds, 100 * r.link_seconds / r.seconds);
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
        for (const auto& f : play.visits[i - d].at_layer) {
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
  SpeculationPolicy policy = ParsePolicy(FLAGS_policy);
  if (FLAGS_min_probability >= 0) policy.min_probability = FLAGS_min_probability;
  if (FLAGS_top_k > 0) policy.top_k = FLAGS_top_k;
  if (FLAGS_max_lead > 0) policy.max_lead = FLAGS_max_lead;
  PredictorForesight foresight(predictor.get(), g, policy.max_lead);
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
  const auto run = [&](const SpeculationPolicy& p,
                       std::span<const SimulatedVisit> visits) {
    PlannerOptions o = options;
    o.policy = p;
    o.link_bytes_per_second = link.bytes_per_second;
    return SimulatePrefetch(decoder, slots, Eviction::kLru, o, link, visits,
                            play.counted_from);
  };
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
  Print("lru", lru, lru.seconds, uses);
  Print(FLAGS_policy.c_str(), run(policy, play.visits), lru.seconds, uses);
  PrintLayers(run(policy, play.visits), play);
  SpeculationPolicy far = policy;
  far.max_lead = 12;
  for (const size_t horizon : {1, 2, 3, 12}) {
    Print(("oracle " + std::to_string(horizon)).c_str(),
          run(far, TellFuture(play.visits, g.num_experts, horizon)), lru.seconds, uses);
  }
  std::printf("goal       %6.3fx\n", 1 + 0.8 * (lru.seconds / compute - 1));
  return 0;
}

}  // namespace
}  // namespace routecast

int main(int argc, char** argv) {
  gflags::SetUsageMessage("simulates prefetching over recorded routing");
  gflags::ParseCommandLineFlags(&argc, &argv, true);
  return routecast::Main();
}
