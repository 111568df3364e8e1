// Checkpoints: every form gives the same model, ties, types, shards, what does not fit.
#include "models/checkpoint.h"

#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/resource.h>

#include <csignal>
#include <fstream>

#include "common/errors.h"
#include "common/safetensors.h"
#include "models/synthetic_checkpoint.h"
#include "tests/models/switch_test_support.h"
#include "tests/support/reference.h"

namespace routecast {
namespace {

using testing::HasSubstr;

constexpr char kShared[] = "shared.weight", kHead[] = "lm_head.weight";
constexpr char kRouter[] = "encoder.block.1.layer.1.mlp.router.classifier.weight";

// A saved checkpoint whose weights a test then writes again, changed.
class CheckpointTest : public testing::Test {
 protected:
  void Save(bool tied, uint64_t max_shard_bytes = kDefaultShardBytes) {
    SwitchConfig config = SmallConfig();
    config.tie_word_embeddings = tied;
    made_ = RandomCheckpoint(config, 8);
    folder_ = TestFolder(std::string("checkpoint-") +
                         testing::UnitTest::GetInstance()->current_test_info()->name());
    SaveCheckpoint(folder_, config, made_.parameters, at::kFloat, max_shard_bytes);
  }
  // The weights with one tensor replaced; removed where `tensor` is undefined.
  void Change(const std::string& name, const at::Tensor& tensor) {
    const Parameters old =
        ReadParameters(folder_ / "model.safetensors", at::ScalarType::Undefined);
    Parameters changed;
    for (const auto& [n, t] : old.items()) {
      if (n != name) changed.Add(n, t);
    }
    if (tensor.defined()) changed.Add(name, tensor);
    WriteParameters(folder_ / "model.safetensors", changed, at::ScalarType::Undefined);
  }
  Checkpoint Load(at::ScalarType dtype = at::kFloat) {
    return LoadCheckpoint(folder_, dtype, at::kCPU);
  }
  std::string Refusal() {
    try {
      Load();
      return "(loaded)";
    } catch (const DataError& e) {
      return e.what();
    }
  }
  void ExpectSameParameters(const Checkpoint& read) {
    EXPECT_EQ(read.parameters.items().size(), made_.parameters.items().size());
    for (const auto& [name, tensor] : made_.parameters.items()) {
      ASSERT_TRUE(read.parameters.Has(name)) << name;
      EXPECT_TRUE(at::equal(tensor, read.parameters.Get(name))) << name;
    }
  }
  Checkpoint made_;
  fs::path folder_;
};

TEST_F(CheckpointTest, FingerprintOfOneFileIsTheHashOfConfigAndBytes) {
  Save(false);
  const Json config = ReadJsonFile(folder_ / "config.json");
  EXPECT_EQ(Load().fingerprint, Hex64(Hash64(ReadFile(folder_ / "model.safetensors"),
                                             Hash64(config.dump()))));
}

TEST_F(CheckpointTest, FingerprintChangesWithAnyShardAndWithTheConfig) {
  Save(false, 40'000);
  const std::string before = Load().fingerprint;
  EXPECT_EQ(Load(at::kBFloat16).fingerprint, before);
  const WeightFiles files(folder_);
  ASSERT_GT(files.files().size(), 2u);
  std::string bytes = ReadFile(files.files().back());
  bytes.back() = static_cast<char>(bytes.back() ^ 1);
  WriteFileAtomic(files.files().back(), bytes);
  const std::string after = Load().fingerprint;
  EXPECT_NE(after, before);
  Json config = ReadJsonFile(folder_ / "config.json");
  config["expert_capacity"] = 7;
  WriteFileAtomic(folder_ / "config.json", config.dump());
  EXPECT_NE(Load().fingerprint, after);
}

// What the reference's generate() takes them from; the fingerprint follows.
TEST_F(CheckpointTest, SpecialIdsOfTheGenerationConfigWin) {
  Save(false);
  const fs::path file = folder_ / "generation_config.json";
  const std::string before = Load().fingerprint;
  WriteFileAtomic(file, R"({"eos_token_id": null, "max_length": 20})");
  EXPECT_EQ(Load().config.eos_token_id, made_.config.eos_token_id);
  EXPECT_EQ(Load().fingerprint, before);
  WriteFileAtomic(file, R"({"eos_token_id": 7, "decoder_start_token_id": 5})");
  EXPECT_EQ(Load().config.eos_token_id, 7);
  EXPECT_EQ(Load().config.decoder_start_token_id, 5);
  EXPECT_EQ(Load().config.pad_token_id, made_.config.pad_token_id);
  EXPECT_NE(Load().fingerprint, before);
  fs::remove(file);
  EXPECT_EQ(Load().fingerprint, before);
}

TEST_F(CheckpointTest, SpecialIdsThatCannotBeAreRefusedByFileAndKey) {
  Save(false);
  for (const char* ids : {"[1, 2]", "-1", "1000000", "\"1\""}) {
    WriteFileAtomic(folder_ / "generation_config.json",
                    std::string(R"({"eos_token_id": )") + ids + "}");
    EXPECT_THAT(Refusal(), testing::AllOf(HasSubstr("generation_config.json"),
                                          HasSubstr("eos_token_id")));
  }
  WriteFileAtomic(folder_ / "generation_config.json", "[]");
  EXPECT_THAT(Refusal(), HasSubstr("generation_config.json"));
}

TEST_F(CheckpointTest, ShardsHoldTheSameAndStayBelowTheirSize) {
  Save(false, 40'000);
  const WeightFiles files(folder_);
  EXPECT_FALSE(fs::exists(folder_ / "model.safetensors"));
  for (const fs::path& file : files.files()) {
    uint64_t bytes = 0;
    for (const TensorEntry& t : ReadSafetensorsIndex(file).tensors) bytes += t.size_bytes;
    EXPECT_LE(bytes, 40'000u) << file;
  }
  ExpectSameParameters(Load());
}

TEST_F(CheckpointTest, ALargeTensorGetsAShardOfItsOwn) {
  Save(false, 1);
  EXPECT_EQ(WeightFiles(folder_).files().size(), WeightFiles(folder_).tensors().size());
  ExpectSameParameters(Load());
}

TEST_F(CheckpointTest, SavingAgainInAnotherFormLeavesNoOldWeights) {
  Save(false, 40'000);
  SaveCheckpoint(folder_, made_.config, made_.parameters, at::kFloat);
  EXPECT_FALSE(fs::exists(folder_ / "model.safetensors.index.json"));
  EXPECT_EQ(std::distance(fs::directory_iterator(folder_), {}), 3);
  SaveCheckpoint(folder_, made_.config, made_.parameters, at::kFloat, 100'000);
  EXPECT_FALSE(fs::exists(folder_ / "model.safetensors"));
  ExpectSameParameters(Load());
}

// Saving over shards ends between two of them: names and shapes would fit, half of the
// weights would be old.
TEST_F(CheckpointTest, AnInterruptedSaveOverShardsIsNoCheckpoint) {
  Save(false, 40'000);
  const fs::path second = WeightFiles(folder_).files()[1];
  fs::remove(second);
  fs::create_directory(second);  // the rename onto it fails
  std::ofstream(second / "in-the-way") << "x";
  EXPECT_THROW(
      SaveCheckpoint(folder_, made_.config, made_.parameters, at::kFloat, 40'000),
      UsageError);
  EXPECT_FALSE(fs::exists(folder_ / "config.json"));
  EXPECT_THROW(Load(), UsageError);
}

// The same of one file: its shapes would fit the configuration before, which says another
// activation.
TEST_F(CheckpointTest, AnInterruptedSaveOfAnotherConfigurationIsNoCheckpoint) {
  Save(false);
  const fs::path between = folder_ / "generation_config.json";
  fs::remove(between);
  fs::create_directory(between);  // the rename onto it fails
  std::ofstream(between / "in-the-way") << "x";
  made_.config.activation = Activation::kSilu;
  EXPECT_THROW(SaveCheckpoint(folder_, made_.config, made_.parameters, at::kFloat),
               UsageError);
  EXPECT_FALSE(fs::exists(folder_ / "config.json"));
}

TEST_F(CheckpointTest, TiedFilesMayHoldAnyOfTheFourNames) {
  for (const char* only :
       {kHead, "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"}) {
    Save(true);
    const at::Tensor shared = made_.parameters.Get(kShared);
    Change(kShared, {});
    Change(only, shared);
    ExpectSameParameters(Load());
  }
}

TEST_F(CheckpointTest, TiedCopiesThatAreEqualAreOne) {
  Save(true);
  Change(kHead, made_.parameters.Get(kShared));
  ExpectSameParameters(Load());
}

TEST_F(CheckpointTest, TiedCopiesThatDifferAreRefused) {
  Save(true);
  Change(kHead, made_.parameters.Get(kShared) + 1);
  EXPECT_THAT(Refusal(), HasSubstr("\"shared.weight\" and \"lm_head.weight\" differ"));
}

TEST_F(CheckpointTest, UntiedStacksKeepTheirOwnEmbedding) {
  Save(false);
  const at::Tensor own = made_.parameters.Get(kShared) * 2;
  Change("encoder.embed_tokens.weight", own);
  const Checkpoint read = Load();
  EXPECT_TRUE(at::equal(read.parameters.Get("encoder.embed_tokens.weight"), own));
  EXPECT_FALSE(read.parameters.Has("decoder.embed_tokens.weight"));  // equals shared
}

TEST_F(CheckpointTest, UntiedNeedsItsHead) {
  Save(false);
  Change(kHead, {});
  EXPECT_THAT(Refusal(), HasSubstr("\"lm_head.weight\" is missing"));
}

TEST_F(CheckpointTest, TypesAreConvertedAndFp32RoutersStay) {
  Save(true);
  const Checkpoint read = Load(at::kBFloat16);
  for (const auto& [name, tensor] : read.parameters.items()) {
    const bool router = name.find(".router.") != std::string::npos;
    const at::Tensor made = made_.parameters.Get(name);
    EXPECT_EQ(tensor.scalar_type(), router ? at::kFloat : at::kBFloat16) << name;
    EXPECT_TRUE(at::equal(tensor, router ? made : made.to(at::kBFloat16))) << name;
  }
}

TEST_F(CheckpointTest, ARouterStoredAsBf16FollowsTheAskedType) {
  Save(true);
  Change(kRouter, made_.parameters.Get(kRouter).to(at::kBFloat16));
  EXPECT_EQ(Load(at::kBFloat16).parameters.Get(kRouter).scalar_type(), at::kBFloat16);
  EXPECT_EQ(Load(at::kFloat).parameters.Get(kRouter).scalar_type(), at::kFloat);
}

TEST_F(CheckpointTest, AMisshapenTensorIsNamedWithBothShapesAndItsFile) {
  Save(false);
  Change(kRouter, at::zeros({8, 31}));
  const std::string message = Refusal();
  EXPECT_THAT(message, HasSubstr((folder_ / "model.safetensors").string()));
  EXPECT_THAT(message, HasSubstr(kRouter));
  EXPECT_THAT(message, HasSubstr("found [8, 31], config.json asks for [8, 32]"));
}

TEST_F(CheckpointTest, MissingTensorsAreNamedAndCounted) {
  Save(false);
  Change(kRouter, {});
  EXPECT_THAT(Refusal(), HasSubstr(std::string(kRouter) + "\" is missing\n"));
  Change("decoder.final_layer_norm.weight", {});
  const std::string message = Refusal();
  EXPECT_THAT(message,
              HasSubstr("\"decoder.final_layer_norm.weight\" is missing (and 1"));
  EXPECT_THAT(message, HasSubstr("found none, config.json asks for [32]"));
  EXPECT_LE(std::count(message.begin(), message.end(), '\n'), 2);
}

TEST_F(CheckpointTest, AnUnexpectedTensorIsNamedWithItsShape) {
  Save(false);
  Change("encoder.block.9.layer.0.layer_norm.weight", at::zeros({32}));
  EXPECT_THAT(Refusal(),
              HasSubstr("\"encoder.block.9.layer.0.layer_norm.weight\" is "
                        "unexpected\n  found [32], config.json asks for none"));
}

TEST_F(CheckpointTest, AWeightOfWholeNumbersIsRefused) {
  Save(false);
  Change("decoder.final_layer_norm.weight", at::ones({32}, at::kLong));
  EXPECT_THAT(Refusal(), HasSubstr("found dtype I64"));
}

TEST_F(CheckpointTest, AConfigThatAsksForABillionExpertsIsRefusedAtOnce) {
  Save(false);
  Json config = ReadJsonFile(folder_ / "config.json");
  config["num_layers"] = config["num_decoder_layers"] = 4096;
  config["num_sparse_encoder_layers"] = config["num_sparse_decoder_layers"] = 4096;
  config["num_experts"] = 65535;
  WriteFileAtomic(folder_ / "config.json", config.dump());
  EXPECT_THAT(Refusal(), HasSubstr("lacks experts"));
}

TEST_F(CheckpointTest, SyntheticWeightsAreAFunctionOfTheSeedAlone) {
  SwitchConfig config = SmallConfig();
  const fs::path one = TestFolder("synthetic-one"), shards = TestFolder("synthetic-two");
  const uint64_t bytes = WriteSyntheticCheckpoint(one, {config, at::kFloat, 5});
  WriteSyntheticCheckpoint(shards, {config, at::kFloat, 5, 30'000});
  EXPECT_GT(WeightFiles(shards).files().size(), 3u);
  const Checkpoint a = LoadCheckpoint(one, at::kFloat, at::kCPU);
  const Checkpoint b = LoadCheckpoint(shards, at::kFloat, at::kCPU);
  uint64_t seen = 2 * a.parameters.Get(kShared).nbytes();  // the stacks' copies
  for (const auto& [name, tensor] : a.parameters.items()) {
    EXPECT_TRUE(at::equal(tensor, b.parameters.Get(name))) << name;
    seen += tensor.nbytes();
  }
  EXPECT_EQ(bytes, seen);
  EXPECT_NEAR(a.parameters.Get(kShared).std().item<double>(), 1.0, 0.05);
  WriteSyntheticCheckpoint(one, {config, at::kFloat, 6});
  const Checkpoint other = LoadCheckpoint(one, at::kFloat, at::kCPU);
  EXPECT_FALSE(at::equal(a.parameters.Get(kShared), other.parameters.Get(kShared)));
}

TEST_F(CheckpointTest, ACheckpointLargerThanTheDiskIsRefusedBeforeItIsBegun) {
  SwitchConfig config = SmallConfig();
  config.vocab_size = 1 << 24;
  config.d_model = config.d_ff = 1 << 20;
  const fs::path folder = TestFolder("synthetic-huge");
  EXPECT_THROW(WriteSyntheticCheckpoint(folder, {config}), EnvironmentError);
  EXPECT_TRUE(fs::is_empty(folder));
}

TEST_F(CheckpointTest, ADiskThatFillsUpLeavesNoHalfCheckpoint) {
  const fs::path folder = TestFolder("synthetic-full");
  rlimit before;
  ::getrlimit(RLIMIT_FSIZE, &before);
  const auto handler = std::signal(SIGXFSZ, SIG_IGN);
  const rlimit limit = {50'000, before.rlim_max};
  ::setrlimit(RLIMIT_FSIZE, &limit);
  // The first shard fits, a later one does not.
  EXPECT_THROW(WriteSyntheticCheckpoint(
                   folder, {SmallConfig(), at::kFloat, 1, /*max_shard_bytes=*/60'000}),
               EnvironmentError);
  ::setrlimit(RLIMIT_FSIZE, &before);
  std::signal(SIGXFSZ, handler);
  EXPECT_TRUE(fs::is_empty(folder));
}

TEST(StoredRouters, ThoseOfAnotherGeometryAreRefused) {
  const fs::path file = TestFolder("routers") / "routers.safetensors";
  Parameters routers;
  routers.Add("layer.0.weight", at::randn({4, 8}));
  routers.Add("layer.0.norm_gain", at::randn({8}));
  WriteParameters(file, routers, at::ScalarType::Undefined);
  EXPECT_EQ(ReadRouters(file, {0, 1, 4, 1, 8}).size(), 1u);
  EXPECT_THROW(ReadRouters(file, {0, 1, 5, 1, 8}), DataError) << "experts";
  EXPECT_THROW(ReadRouters(file, {0, 1, 4, 1, 9}), DataError) << "width";
  EXPECT_THROW(ReadRouters(file, {0, 2, 4, 1, 8}), DataError) << "a layer is missing";
  for (const int64_t experts : {4, 1}) {  // one number would be added to all logits
    Parameters biased = routers;
    biased.Add("layer.0.bias", at::randn({experts}));
    WriteParameters(file, biased, at::ScalarType::Undefined);
    if (experts == 4) {
      EXPECT_TRUE(ReadRouters(file, {0, 1, 4, 1, 8})[0].bias_E.defined());
    } else {
      EXPECT_THROW(ReadRouters(file, {0, 1, 4, 1, 8}), DataError) << "bias";
    }
  }
}

}  // namespace
}  // namespace routecast
