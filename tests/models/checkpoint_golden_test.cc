// Checkpoints against transformers 5.23.0: what it and PyTorch wrote is read with the
// same values and gives the same logits; what we write in shards it reads with no key
// missing.
#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "common/errors.h"
#include "models/checkpoint.h"
#include "models/synthetic_checkpoint.h"
#include "tests/models/switch_test_support.h"
#include "tests/support/reference.h"

namespace routecast {
namespace {

const char* const kForms[] = {"sharded",    "only_shared", "only_head", "only_decoder",
                              "all_four",   "untied",      "half",      "bin",
                              "bin_untied", "bin_views",   "bin_mixed", "bin_sharded"};

const fs::path& Reference() {
  static const fs::path folder = [] {
    const fs::path made = TestFolder("checkpoint-forms");
    EXPECT_EQ(RunReference("checkpoint_forms.py", made.string()), 0);
    return made;
  }();
  return folder;
}

at::Tensor LogitsOf(SwitchModel* model, const at::Tensor& ids,
                    const at::Tensor& decoder_ids) {
  const at::Tensor valid = at::ones_like(ids, at::kBool);
  const at::Tensor decoder_valid = at::ones_like(decoder_ids, at::kBool);
  return model->Logits(model->Decode(decoder_ids, decoder_valid,
                                     model->Encode(ids, valid), valid, nullptr));
}

class CheckpointForms : public testing::TestWithParam<const char*> {};

TEST_P(CheckpointForms, EveryWeightIsTheReferences) {
  const fs::path folder = Reference() / GetParam();
  const Checkpoint read = LoadCheckpoint(folder, at::kFloat, at::kCPU);
  const Parameters loaded = ReadParameters(folder / "loaded.safetensors", at::kFloat);
  for (const auto& [name, tensor] : read.parameters.items()) {
    EXPECT_TRUE(at::equal(tensor, loaded.Get(name))) << name;
  }
  // And nothing else is there, but names that are tied to one of these.
  const bool tied = read.config.tie_word_embeddings;
  for (const auto& [name, tensor] : loaded.items()) {
    if (read.parameters.Has(name)) continue;
    EXPECT_TRUE(tied) << name;
    EXPECT_TRUE(at::equal(tensor, read.parameters.Get("shared.weight"))) << name;
  }
}

TEST_P(CheckpointForms, LogitsAreTheReferences) {
  const fs::path folder = Reference() / GetParam();
  ResidentModel model(LoadCheckpoint(folder, at::kFloat, at::kCPU));
  const Parameters golden =
      ReadParameters(folder / "golden.safetensors", at::ScalarType::Undefined);
  const at::Tensor logits =
      LogitsOf(&model.model(), golden.Get("ids"), golden.Get("decoder_ids"));
  const at::Tensor expected = golden.Get("logits");
  EXPECT_LT((logits - expected).abs().max().item<double>(),
            1e-4 * expected.abs().max().item<double>());
}

INSTANTIATE_TEST_SUITE_P(Forms, CheckpointForms, testing::ValuesIn(kForms),
                         [](const auto& info) { return std::string(info.param); });

TEST(CheckpointFormsLegacy, AFileBefore1_6IsRefusedWithTheWayOut) {
  try {
    LoadCheckpoint(Reference() / "legacy", at::kFloat, at::kCPU);
    FAIL() << "read";
  } catch (const DataError& e) {
    EXPECT_THAT(e.what(), testing::HasSubstr("of the kind before 1.6"));
    EXPECT_THAT(e.what(), testing::HasSubstr("torch.save(torch.load(file), file)"));
  }
}

// One process reads all of them: starting the reference costs more than the reading.
TEST(CheckpointRoundTrip, ShardsAndSyntheticWeightsLoadInTransformers) {
  std::string folders;
  for (const bool tied : {false, true}) {
    SwitchConfig config = SmallConfig();
    config.tie_word_embeddings = tied;
    const std::string kind = tied ? "tied" : "untied";
    const fs::path sharded = TestFolder("roundtrip-sharded-" + kind);
    SaveCheckpoint(sharded, config, RandomCheckpoint(config, 3).parameters, at::kFloat,
                   40'000);
    const fs::path synthetic = TestFolder("roundtrip-synthetic-" + kind);
    WriteSyntheticCheckpoint(synthetic, {config, at::kBFloat16, 1, 40'000});
    for (const fs::path& folder : {sharded, synthetic}) {
      ASSERT_TRUE(fs::exists(folder / "model.safetensors.index.json"));
      ResidentModel model(LoadCheckpoint(folder, at::kFloat, at::kCPU));
      const at::Tensor ids = at::arange(3, 33, at::kLong).view({2, 15});
      const at::Tensor decoder_ids = at::arange(40, 52, at::kLong).view({2, 6});
      Parameters golden;
      golden.Add("ids", ids);
      golden.Add("valid", at::ones_like(ids, at::kByte));
      golden.Add("decoder_ids", decoder_ids);
      golden.Add("logits", LogitsOf(&model.model(), ids, decoder_ids));
      WriteParameters(folder / "golden.safetensors", golden, at::ScalarType::Undefined);
      folders += " " + folder.string();
    }
  }
  EXPECT_EQ(RunReference("switch_roundtrip.py", folders), 0);
}

}  // namespace
}  // namespace routecast
