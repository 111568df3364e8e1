#include "tests/models/switch_golden_support.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <cstdio>

namespace routecast {
namespace {

constexpr double kMarginFactor = 8;  // ids: of the reference's spread
constexpr double kValueFactor = 8;   // values: another build sums in another order

at::ScalarType DtypeOf(const fs::path& folder) {
  constexpr at::ScalarType kTypes[] = {at::kFloat, at::kBFloat16, at::kHalf};
  const Parameters golden =
      ReadParameters(folder / "golden.safetensors", at::ScalarType::Undefined,
                     [](const std::string& name) { return name == "dtype"; });
  return kTypes[golden.Get("dtype")[0].item<int64_t>()];
}

double MaxDifference(const at::Tensor& a, const at::Tensor& b) {
  return (a.to(at::kDouble) - b.to(at::kDouble)).abs().max().item<double>();
}

// A row of the reference's tokens up to its end-of-sequence, which belongs to it.
std::vector<int64_t> UpToEnd(const at::Tensor& row, int64_t end_token) {
  std::vector<int64_t> ids;
  for (int64_t i = 0; i < row.size(0); ++i) {
    ids.push_back(row[i].item<int64_t>());
    if (ids.back() == end_token) break;
  }
  return ids;
}

}  // namespace

GoldenCase::GoldenCase(const fs::path& folder)
    : resident_(std::make_unique<ResidentModel>(
          LoadCheckpoint(folder, DtypeOf(folder), at::kCPU))),
      golden_(ReadParameters(folder / "golden.safetensors", at::ScalarType::Undefined)) {}

void GoldenCase::CompareRows(const std::string& name, const at::Tensor& ours,
                             double tolerance, const std::vector<bool>& same) const {
  const at::Tensor reference = Get(name);
  ASSERT_EQ(ours.sizes(), reference.sizes()) << name;
  for (size_t b = 0; b < same.size(); ++b) {
    if (!same[b]) continue;
    const auto row = static_cast<int64_t>(b);
    EXPECT_LE(MaxDifference(ours[row], reference[row]), tolerance)
        << name << ", row " << b;
  }
}

void GoldenCase::CompareLayer(const LayerRouting& routing, std::vector<bool>* same) {
  const MoeGeometry g = model().geometry();
  const std::string stack = StackName(g.StackOf(routing.layer));
  const std::string layer = std::to_string(g.LayerInStack(routing.layer));
  CompareRows(stack + "_router_" + layer, routing.logits_BTE,
              kValueFactor * router_spread(), *same);
  const at::Tensor logits = Get(stack + "_router_" + layer);
  const at::Tensor chosen = Get(stack + "_chosen_" + layer).to(at::kLong);
  const at::Tensor dropped = Get(stack + "_dropped_" + layer).to(at::kBool);
  for (int64_t b = 0; b < chosen.size(0); ++b) {
    if (!(*same)[static_cast<size_t>(b)]) continue;
    for (int64_t t = 0; t < chosen.size(1); ++t) {
      const int64_t ours = routing.expert_ids_BT[b][t].item<int64_t>();
      const int64_t theirs = chosen[b][t].item<int64_t>();
      if (ours == theirs) continue;
      const double margin =
          std::abs((logits[b][t][theirs] - logits[b][t][ours]).item<double>());
      std::printf(
          "%s layer %s row %d token %d: expert %d, the reference's %d, margin %g, "
          "spread %g\n",
          stack.c_str(), layer.c_str(), static_cast<int>(b), static_cast<int>(t),
          static_cast<int>(ours), static_cast<int>(theirs), margin, router_spread());
      EXPECT_LT(margin, kMarginFactor * router_spread());
      (*same)[static_cast<size_t>(b)] = false;
    }
    if (!(*same)[static_cast<size_t>(b)]) continue;
    EXPECT_TRUE(at::equal(routing.dropped_BT[b], dropped[b]))
        << stack << " layer " << layer << " row " << b;
  }
}

void GoldenCase::CompareForward() {
  RoutingLog log;
  ForwardOptions options;
  options.observer = &log;
  const at::Tensor decoder_ids = Get("decoder_ids");
  const at::Tensor all = at::ones_like(decoder_ids, at::kBool);
  const at::Tensor hidden = model().Encode(Get("ids"), valid(), options);
  const at::Tensor logits =
      model().Logits(model().Decode(decoder_ids, all, hidden, valid(), nullptr, options));
  const MoeGeometry g = model().geometry();
  ASSERT_EQ(static_cast<int>(log.routings.size()), g.num_layers());
  std::vector<bool> same(static_cast<size_t>(decoder_ids.size(0)), true);
  const double tolerance = kValueFactor * std::max(logit_spread(), router_spread());
  for (int layer = 0; layer < g.encoder_layers; ++layer) {
    CompareLayer(log.routings[static_cast<size_t>(layer)], &same);
  }
  CompareRows("encoder_hidden", hidden, tolerance, same);
  for (int layer = g.encoder_layers; layer < g.num_layers(); ++layer) {
    CompareLayer(log.routings[static_cast<size_t>(layer)], &same);
  }
  CompareRows("logits", logits, kValueFactor * logit_spread(), same);
  EXPECT_GT(std::count(same.begin(), same.end(), true), 0) << "no row was compared whole";
}

void GoldenCase::CompareLosses() {
  const ConditionalLosses losses =
      ComputeLosses(&model(), Get("ids"), valid(), Get("labels"));
  const at::Tensor ours =
      at::stack({losses.total.to(at::kFloat), losses.cross_entropy.to(at::kFloat),
                 losses.encoder_z.to(at::kFloat), losses.encoder_aux.to(at::kFloat),
                 losses.decoder_z.to(at::kFloat), losses.decoder_aux.to(at::kFloat)});
  const bool narrow =
      model().dtype() != at::kFloat || model().router_type() != at::kFloat;
  // One near tie in fp32 would move the auxiliary loss by more than this.
  const double relative = narrow ? 2e-2 : 1e-5;
  for (int64_t i = 0; i < ours.size(0); ++i) {
    const double reference = Get("losses")[i].item<double>();
    EXPECT_NEAR(ours[i].item<double>(), reference, relative * std::abs(reference))
        << "loss " << i;
  }
}

void GoldenCase::CompareSequence(const std::vector<int64_t>& ours,
                                 const at::Tensor& reference,
                                 const std::function<double(size_t)>& margin,
                                 const std::string& where) const {
  const std::vector<int64_t> theirs = UpToEnd(reference, end_token());
  for (size_t t = 0; t < std::max(ours.size(), theirs.size()); ++t) {
    const int64_t a = t < ours.size() ? ours[t] : -1;
    const int64_t b = t < theirs.size() ? theirs[t] : -1;
    if (a == b) continue;
    std::printf("%s step %d: id %d, the reference's %d, margin %g, spread %g\n",
                where.c_str(), static_cast<int>(t), static_cast<int>(a),
                static_cast<int>(b), margin(t), logit_spread());
    EXPECT_LT(margin(t), kMarginFactor * logit_spread()) << where;
    return;
  }
}

void GoldenCase::CompareGreedy() {
  GenerationOptions options;
  options.max_new_tokens = 8;
  const auto generated = Generate(&model(), Get("ids"), valid(), options);
  const at::Tensor margins = Get("greedy_margins");
  for (size_t b = 0; b < generated.size(); ++b) {
    const auto row = static_cast<int64_t>(b);
    const auto margin = [&](size_t t) {
      return margins[row][static_cast<int64_t>(t)].item<double>();
    };
    CompareSequence(generated[b].ids, Get("greedy")[row], margin,
                    "greedy, row " + std::to_string(b));
  }
}

void GoldenCase::CompareBeams() {
  const at::Tensor settings = Get("beam_settings");
  GenerationOptions options;
  options.max_new_tokens = 8;
  options.min_new_tokens = settings[2].item<int>();
  options.num_return_sequences = 2;
  options.beams.num_beams = 4;
  options.beams.length_penalty = settings[0].item<double>();
  constexpr EarlyStopping kRules[] = {EarlyStopping::kHeuristic, EarlyStopping::kWhenFull,
                                      EarlyStopping::kNever};
  options.beams.early_stopping = kRules[settings[1].item<int>()];
  const auto generated = Generate(&model(), Get("ids"), valid(), options);
  const at::Tensor reference = Get("beams"), scores = Get("beam_scores");
  ASSERT_EQ(static_cast<int64_t>(generated.size()), reference.size(0));
  for (size_t i = 0; i < generated.size(); ++i) {
    const auto index = static_cast<int64_t>(i);
    const double margin = Get("beam_margins")[index / 2].item<double>();
    CompareSequence(
        generated[i].ids, reference[index], [&](size_t) { return margin; },
        "beam " + std::to_string(i));
    if (generated[i].ids != UpToEnd(reference[index], end_token())) continue;
    // A sum of up to eight log probabilities, divided by a power of the length.
    const double tolerance = 8 * kValueFactor * logit_spread() *
                             std::max(1.0, std::pow(8, -options.beams.length_penalty));
    EXPECT_NEAR(generated[i].score, scores[index].item<double>(), tolerance)
        << "beam " << i;
  }
}

void CompareWarpers(const fs::path& folder) {
  const Parameters golden =
      ReadParameters(folder / "sampling.safetensors", at::ScalarType::Undefined);
  const at::Tensor settings = golden.Get("settings");
  for (int64_t i = 0; i < settings.size(0); ++i) {
    SamplingOptions options;
    options.temperature = settings[i][0].item<double>();
    options.top_k = settings[i][1].item<int>();
    options.top_p = settings[i][2].item<double>();
    const at::Tensor ours = WarpLogits(golden.Get("logits"), options);
    const at::Tensor theirs = golden.Get("warped_" + std::to_string(i));
    EXPECT_TRUE(at::equal(at::isinf(ours), at::isinf(theirs))) << "setting " << i;
    EXPECT_TRUE(at::allclose(at::softmax(ours, -1), at::softmax(theirs, -1), 1e-5, 1e-7))
        << "setting " << i;
  }
}

}  // namespace routecast
