// ONNX files in onnxruntime, and the PyTorch twin: equal to Forward in every stack, from
// every source layer, for several numbers of sequences and tokens, padding included.
#include "models/speculation_onnx.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "common/errors.h"
#include "speculation_test_support.h"
#include "tests/support/reference.h"

namespace routecast {
namespace {

constexpr int kExperts = 5;

// A name of SmallSpeculation, or "KIND_plain": without router inputs and priors.
SpeculationConfig ConfigNamed(const std::string& name) {
  const bool plain = name.ends_with("_plain");
  SpeculationConfig c = SmallSpeculation(plain ? name.substr(0, name.find('_')) : name);
  if (c.kind == "hidden") c.vocab_size = 40;  // more than it guesses at
  if (plain) {
    c.hidden_width = 0;
    c.priors = c.next_token = c.positions = false;
  }
  return c;
}

// Every tensor far from what it starts as: no zero bias, no gain of one.
std::unique_ptr<SpeculationModel> RandomModel(const SpeculationConfig& config) {
  auto model = MakeSpeculationModel(config, 7);
  const c10::NoGradGuard no_grad;
  at::manual_seed(5);
  for (const auto& [name, tensor] : model->constants().items()) tensor.normal_();
  for (const auto& [name, tensor] : model->parameters().items()) {
    tensor.add_(at::randn(tensor.sizes()) * 0.2);
  }
  return model;
}

// K experts a token that follow from its first one.
void AddTopk(int k, RoutingSpan* span) {
  span->top_k = k;
  for (const uint16_t id : span->expert_ids) {
    for (int i = 0; i < k; ++i) {
      span->topk_ids.push_back(static_cast<uint16_t>((id + 2 * i) % kExperts));
    }
  }
}

// Of sequences of these lengths (encoder tokens, decoder tokens).
RoutingWindow Batch(const std::vector<std::pair<int, int>>& lengths, Stack stack,
                    int source, const MoeGeometry& geometry) {
  const int k = geometry.experts_per_token;
  std::vector<RoutingTrace> traces;
  for (const auto& [encoder, decoder] : lengths) {
    traces.push_back(RandomTrace(SmallGeometry(), encoder, decoder, traces.size() + 1));
    if (k == 1) continue;
    AddTopk(k, &traces.back().encoder);
    AddTopk(k, &traces.back().decoder);
  }
  return BatchOf(traces, stack, source, kExperts, k);
}

void WriteCase(const fs::path& file, const RoutingWindow& window,
               SpeculationModel* model) {
  const SpeculationOutput out = model->Forward(window, 0);
  const std::pair<const char*, at::Tensor> tensors[] = {
      {"token_ids_BT", window.token_ids_BT}, {"valid_BT", window.valid_BT},
      {"experts_BTL", window.experts_BTL},   {"others_BTLK", window.others_BTLK},
      {"hidden_BTD", window.hidden_BTD},     {"context_BTD", window.context_BTD},
      {"source_BSD", window.source_BSD},     {"source_valid_BS", window.source_valid_BS},
      {"logits_BTHE", out.logits_BTHE},      {"confidence_BTH", out.confidence_BTH}};
  Parameters all;
  for (const auto& [name, tensor] : tensors) {
    if (tensor.defined()) all.Add(name, tensor.detach().contiguous());
  }
  const Json place{{"stack", StackName(window.stack)}, {"source", window.source_layer}};
  WriteParameters(file, all, at::ScalarType::Undefined, {{"case", place.dump()}});
}

void WriteCases(const fs::path& folder, SpeculationModel* model) {
  const c10::NoGradGuard no_grad;
  const std::vector<std::pair<int, int>> batches[] = {
      {{1, 1}}, {{6, 5}, {4, 3}}, {{3, 2}, {9, 8}, {1, 1}}, {{40, 300}}};
  MakeFolder(folder);
  int number = 100;
  for (const Stack stack : {Stack::kEncoder, Stack::kDecoder}) {
    for (int s = -1; s < SmallGeometry().layers(stack); ++s) {
      if (model->NumLeads(stack, s) == 0) continue;
      for (const auto& lengths : batches) {
        WriteCase(folder / (std::to_string(number++) + ".safetensors"),
                  Batch(lengths, stack, s, model->config().geometry), model);
      }
    }
  }
}

constexpr const char* kNames[] = {"interlayer",   "interlayer_plain", "hidden",
                                  "hidden_plain", "hidden_mixed",     "multiscale"};

// Folders of cases and of what `write` leaves there, of all models in one: the reference
// takes longer to start than to compute.
template <typename Write>
std::string FoldersOf(const std::string& test, const Write& write) {
  std::string folders;
  for (const char* name : kNames) {
    const auto model = RandomModel(ConfigNamed(name));
    const fs::path folder = TestFolder(test + "_" + name);
    write(folder, *model);
    WriteCases(folder / "cases", model.get());
    folders += " " + folder.string();
  }
  return folders;
}

TEST(SpeculationOnnxTest, OnnxruntimeGivesWhatForwardGives) {
  const std::string folders =
      FoldersOf("onnx", [](const auto& folder, const auto& model) {
        WriteSpeculationOnnx(folder / "onnx", model);
      });
  EXPECT_EQ(RunReference("check_speculation.py", "onnx" + folders), 0);
}

// `interlayer` reads all of a token's experts, the other two its first.
TEST(SpeculationOnnxTest, OfSeveralExpertsATokenItGivesWhatForwardGives) {
  std::string folders;
  for (const char* name : {"interlayer", "hidden", "multiscale"}) {
    SpeculationConfig config = ConfigNamed(name);
    config.geometry.experts_per_token = 3;
    const auto model = RandomModel(config);
    const fs::path folder = TestFolder(std::string("onnx_several_") + name);
    WriteSpeculationOnnx(folder / "onnx", *model);
    WriteCases(folder / "cases", model.get());
    folders += " " + folder.string();
  }
  EXPECT_EQ(RunReference("check_speculation.py", "onnx" + folders), 0);
}

TEST(SpeculationOnnxTest, TwinGivesWhatForwardGives) {
  const std::string folders =
      FoldersOf("twin", [](const auto& folder, const auto& model) {
        SaveSpeculationModel(folder, model, {});
      });
  EXPECT_EQ(RunReference("check_speculation.py", "twin" + folders), 0);
}

TEST(SpeculationOnnxTest, AnotherModelsOutputsAreNoticed) {
  const auto model = RandomModel(ConfigNamed("interlayer"));
  const fs::path folder = TestFolder("onnx_other");
  WriteSpeculationOnnx(folder / "onnx", *model);
  {
    const c10::NoGradGuard no_grad;
    model->parameters().Get("head.out.bias")[2].add_(0.01);
  }
  WriteCases(folder / "cases", model.get());
  EXPECT_NE(RunReference("check_speculation.py", "onnx " + folder.string()), 0);
}

TEST(SpeculationOnnxTest, OneForEachSourceWithLeads) {
  const fs::path folder = TestFolder("onnx_names");
  WriteSpeculationOnnx(folder, *RandomModel(ConfigNamed("interlayer")));
  std::vector<std::string> names;
  for (const auto& entry : fs::directory_iterator(folder)) {
    names.push_back(entry.path().filename().string());
  }
  EXPECT_THAT(names, testing::UnorderedElementsAre(
                         "encoder-before.onnx", "encoder-0.onnx", "encoder-1.onnx",
                         "encoder-2.onnx", "decoder-before.onnx", "decoder-0.onnx",
                         "decoder-1.onnx", "decoder-2.onnx"));
}

TEST(SpeculationOnnxTest, OtherKindsAreRefusedByName) {
  for (const std::string& kind : SpeculationKinds()) {
    if (kind == "interlayer" || kind == "hidden" || kind == "multiscale") continue;
    const fs::path folder = TestFolder("onnx_refused") / "onnx";
    try {
      WriteSpeculationOnnx(folder, *MakeSpeculationModel(SmallSpeculation(kind), 1));
      ADD_FAILURE() << kind << " was written";
    } catch (const UsageError& error) {
      EXPECT_THAT(error.what(), testing::HasSubstr(kind + " cannot"));
    }
    EXPECT_FALSE(fs::exists(folder)) << kind;
  }
}

TEST(OnnxGraphTest, RefusesMoreBytesThanReadersTake) {
  OnnxGraph graph;
  graph.Ints({1, 2, 3});
  const std::string bytes = graph.Model("small");
  EXPECT_EQ(graph.Model("small", bytes.size()), bytes);
  EXPECT_THROW(graph.Model("small", bytes.size() - 1), UsageError);
}

}  // namespace
}  // namespace routecast
