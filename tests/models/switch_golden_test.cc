// The Switch Transformer against transformers 5.23.0: hidden states, logits, routing,
// greedy tokens; and a checkpoint of ours read back by it.
#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include "models/checkpoint.h"
#include "models/generation.h"
#include "tests/models/switch_test_support.h"
#include "tests/support/reference.h"

namespace routecast {
namespace {

const char* const kCases[] = {"plain",     "capacity",
                              "tied_bias", "every_block_sparse",
                              "long",      "one_decoder_block_deeper"};

// What the reference wrote, a folder a case. Starting it costs more than its work: once.
const fs::path& Reference() {
  static const fs::path folder = [] {
    const fs::path made = TestFolder("switch-golden");
    EXPECT_EQ(RunReference("switch_reference.py", made.string()), 0);
    return made;
  }();
  return folder;
}

class SwitchGolden : public testing::TestWithParam<const char*> {
 protected:
  void SetUp() override {
    const fs::path folder = Reference() / GetParam();
    model_ =
        std::make_unique<ResidentModel>(LoadCheckpoint(folder, at::kFloat, at::kCPU));
    golden_ = ReadParameters(folder / "golden.safetensors", at::ScalarType::Undefined);
    ids_ = golden_.Get("ids");
    valid_ = golden_.Get("valid").to(at::kBool);
  }
  std::unique_ptr<ResidentModel> model_;
  Parameters golden_;
  at::Tensor ids_, valid_;
};

double MaxDifference(const at::Tensor& a, const at::Tensor& b) {
  return (a.to(at::kDouble) - b.to(at::kDouble)).abs().max().item<double>();
}

TEST_P(SwitchGolden, LogitsAndRoutingEqualTheReference) {
  RoutingLog log;
  ForwardOptions options;
  options.observer = &log;
  SwitchModel& model = model_->model();
  const at::Tensor decoder_ids = golden_.Get("decoder_ids");
  const at::Tensor hidden = model.Encode(ids_, valid_, options);
  const at::Tensor logits =
      model.Logits(model.Decode(decoder_ids, at::ones_like(decoder_ids, at::kBool),
                                hidden, valid_, nullptr, options));
  const at::Tensor rows = valid_.unsqueeze(-1);
  EXPECT_LT(MaxDifference(hidden * rows, golden_.Get("encoder_hidden") * rows), 2e-4);
  EXPECT_LT(MaxDifference(logits, golden_.Get("logits")), 1e-3);

  const MoeGeometry g = model.geometry();
  ASSERT_EQ(static_cast<int>(log.routings.size()), g.num_layers());
  for (int layer = 0; layer < g.num_layers(); ++layer) {
    const Stack stack = g.StackOf(layer);
    const at::Tensor reference = golden_.Get(std::string(StackName(stack)) + "_router_" +
                                             std::to_string(g.LayerInStack(layer)));
    const at::Tensor probs = at::softmax(reference, -1);
    const auto top2 = std::get<0>(reference.topk(2, -1));
    const at::Tensor margin = top2.select(-1, 0) - top2.select(-1, 1);
    const at::Tensor clear =
        margin > 1e-3;  // nearer than the two builds' rounding: a tie
    const at::Tensor ids = log.routings[static_cast<size_t>(layer)].expert_ids_BT;
    EXPECT_TRUE(
        (ids == probs.argmax(-1)).logical_or(clear.logical_not()).all().item<bool>())
        << "layer " << layer;
    EXPECT_GT(clear.to(at::kFloat).mean().item<float>(), 0.95f);
    // Capacity by the reference's own rule.
    const at::Tensor one_hot = at::one_hot(ids, g.num_experts);
    const at::Tensor kept =
        (one_hot * (one_hot.cumsum(-2) <= model.config().expert_capacity)).sum(-1) > 0;
    EXPECT_TRUE(at::equal(kept.logical_not(),
                          log.routings[static_cast<size_t>(layer)].dropped_BT));
  }
  if (std::string(GetParam()) == "capacity") {
    EXPECT_TRUE(log.routings[0].dropped_BT.any().item<bool>())
        << "the case must drop tokens";
  }
}

TEST_P(SwitchGolden, GreedyTokensEqualTheReference) {
  GenerationOptions options;
  options.max_new_tokens = 8;
  // The reference forbids end-of-sequence for eight steps; ours ends there: compare up to
  // it.
  const auto generated = GreedyDecode(&model_->model(), ids_, valid_, options);
  const at::Tensor reference = golden_.Get("generated");  // start token first
  for (size_t b = 0; b < generated.size(); ++b) {
    for (size_t t = 0; t < generated[b].size(); ++t) {
      if (generated[b][t] == 1) break;
      EXPECT_EQ(
          generated[b][t],
          reference[static_cast<int64_t>(b)][static_cast<int64_t>(t) + 1].item<int64_t>())
          << "row " << b << " step " << t;
    }
  }
}

TEST_P(SwitchGolden, IncrementalDecodingEqualsTeacherForcing) {
  if (model_->model().config().expert_capacity < 9)
    return;  // capacity acts in one of the two
  SwitchModel& model = model_->model();
  const at::Tensor decoder_ids = golden_.Get("decoder_ids");
  const at::Tensor all = at::ones_like(decoder_ids, at::kBool);
  const at::Tensor hidden = model.Encode(ids_, valid_);
  const at::Tensor whole = model.Decode(decoder_ids, all, hidden, valid_, nullptr);
  DecoderCache cache;
  std::vector<at::Tensor> steps;
  for (int64_t t = 0; t < decoder_ids.size(1); ++t) {
    steps.push_back(model.Decode(decoder_ids.narrow(1, t, 1), all.narrow(1, t, 1), hidden,
                                 valid_, &cache));
  }
  EXPECT_LT(MaxDifference(whole, at::cat(steps, 1)), 1e-3);
}

INSTANTIATE_TEST_SUITE_P(Geometries, SwitchGolden, testing::ValuesIn(kCases),
                         [](const auto& info) { return std::string(info.param); });

// Writes what `model` makes of the ids beside the checkpoint, for the reference to
// compare.
void WriteLogits(SwitchModel* model, const at::Tensor& ids, const at::Tensor& valid,
                 const at::Tensor& decoder_ids, const fs::path& folder) {
  const at::Tensor all = at::ones_like(decoder_ids, at::kBool);
  Parameters golden;
  golden.Add("ids", ids);
  golden.Add("valid", valid.to(at::kByte));
  golden.Add("decoder_ids", decoder_ids);
  golden.Add("logits", model->Logits(model->Decode(
                           decoder_ids, all, model->Encode(ids, valid), valid, nullptr)));
  WriteParameters(folder / "golden.safetensors", golden, at::ScalarType::Undefined);
}

// One process reads all of them: starting the reference costs more than the reading.
TEST(SwitchGoldenRoundTrip, WrittenCheckpointsLoadInTransformers) {
  std::string folders;
  for (const char* name : kCases) {
    ResidentModel resident(LoadCheckpoint(Reference() / name, at::kFloat, at::kCPU));
    const fs::path folder = TestFolder(std::string("switch-roundtrip-") + name);
    SaveCheckpoint(folder, resident.checkpoint().config, resident.checkpoint().parameters,
                   at::kFloat);
    const Parameters source = ReadParameters(Reference() / name / "golden.safetensors",
                                             at::ScalarType::Undefined);
    WriteLogits(&resident.model(), source.Get("ids"), source.Get("valid").to(at::kBool),
                source.Get("decoder_ids"), folder);
    folders += " " + folder.string();
  }
  // And the one that the repository ships.
  const fs::path folder = TestFolder("switch-roundtrip-shipped");
  fs::copy(fs::path(EnvOr("ROUTECAST_SOURCE_DIR", ".")) / "configs/checkpoints/small-16",
           folder, fs::copy_options::recursive);
  ResidentModel shipped(LoadCheckpoint(folder, at::kFloat, at::kCPU));
  at::manual_seed(3);
  const at::Tensor ids = at::randint(3, 400, {3, 40}, at::kLong);
  WriteLogits(&shipped.model(), ids, at::ones_like(ids, at::kBool),
              at::randint(3, 400, {3, 12}, at::kLong), folder);
  EXPECT_EQ(RunReference("switch_roundtrip.py", folders + " " + folder.string()), 0);
}

}  // namespace
}  // namespace routecast
