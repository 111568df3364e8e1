// One question to a speculation model about a decoder's newest token, by the number of
// tokens before it: computed over the whole window, and as it is served, with what was
// kept of those tokens (models/token_memory.h). Both sides interleaved in one run, of the
// kinds' usual sizes; weights are random, since no answer is looked at.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <c10/core/GradMode.h>
#include <gflags/gflags.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <sstream>

#include "models/speculation_model.h"

DEFINE_int32(threads, 1, "Threads");
DEFINE_int32(rounds, 7, "Rounds; both sides once a round");
DEFINE_string(kinds, "interlayer,moe,multiscale,contextual,lstm", "Comma-separated");
DEFINE_int32(layers, 6, "MoE layers of the decoder");
DEFINE_int32(experts, 128, "Experts a layer");
DEFINE_int32(d_model, 768, "Width of the router's input");

namespace routecast {
namespace {

constexpr int kVocabulary = 32128;

double Milliseconds(SpeculationModel* model, const RoutingWindow& window) {
  const auto begin = std::chrono::steady_clock::now();
  model->ForwardLast(window);
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() -
                                                   begin)
      .count();
}

RoutingWindow WindowOfTokens(const MoeGeometry& g, int64_t tokens) {
  RoutingWindow window;
  window.stack = Stack::kDecoder;
  window.source_layer = g.decoder_layers / 2;
  window.num_layers = g.decoder_layers;
  window.num_experts = g.num_experts;
  window.token_ids_BT = at::randint(0, kVocabulary, {1, tokens}, at::kLong);
  window.valid_BT = at::ones({1, tokens}, at::kBool);
  window.experts_BTL =
      at::randint(0, g.num_experts, {1, tokens, g.decoder_layers}, at::kLong);
  window.hidden_BTD = at::randn({1, tokens, g.d_model});
  window.context_BTD = at::randn({1, tokens, g.d_model});
  return window;
}

void Print(const char* side, std::vector<double> times) {
  std::sort(times.begin(), times.end());
  std::printf("   %s %8.2f [%.2f-%.2f] ms", side, times[times.size() / 2], times.front(),
              times.back());
}

void Measure(const std::string& kind) {
  const MoeGeometry g{0, FLAGS_layers, FLAGS_experts, 1, FLAGS_d_model};
  SpeculationConfig config = DefaultSpeculationConfig(kind, g, kVocabulary, g.d_model);
  config.priors = config.next_token = false;
  const auto whole = MakeSpeculationModel(config, 1);
  const auto served = MakeSpeculationModel(config, 1);
  served->PrepareServing();
  std::printf("%s, %.1f M parameters\n", kind.c_str(),
              static_cast<double>(whole->parameters().num_elements()) / 1e6);
  for (const int64_t tokens : {8, 16, 32, 64, 128}) {
    const RoutingWindow window = WindowOfTokens(g, tokens);
    std::vector<double> over_all, kept;
    for (int round = -1; round < FLAGS_rounds; ++round) {
      const double a = Milliseconds(whole.get(), window);
      const double b = Milliseconds(served.get(), window);  // after the first: one token
      if (round < 0) continue;
      over_all.push_back(a);
      kept.push_back(b);
    }
    std::printf("%5lld tokens", static_cast<long long>(tokens));
    Print("whole window", over_all);
    Print("served", kept);
    std::printf("\n");
  }
}

}  // namespace
}  // namespace routecast

int main(int argc, char** argv) {
  gflags::SetUsageMessage("a question to a speculation model, by the tokens before it");
  gflags::ParseCommandLineFlags(&argc, &argv, true);
  const c10::AutoGradMode no_gradient(false);
  at::set_num_threads(FLAGS_threads);
  at::manual_seed(1);
  std::stringstream kinds(FLAGS_kinds);
  for (std::string kind; std::getline(kinds, kind, ',');) routecast::Measure(kind);
  return 0;
}
