// Batches of pre-training, and the measures that are made of them.
#include "trainer/denoising_batch.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <numeric>
#include <optional>

#include "models/checkpoint.h"
#include "tests/storage/temp_folder.h"
#include "tests/support/synthetic_text.h"
#include "trainer/pretrain_options.h"
#include "trainer/switch_initializer.h"
#include "trainer/switch_losses.h"

namespace routecast {
namespace {

class DenoisingTest : public testing::Test {
 protected:
  static void SetUpTestSuite() {
    folder_ = new TempFolder;
    const fs::path text = folder_->path() / "text.txt";
    WriteFileAtomic(text, SyntheticText(150, 120, 9));
    corpus_ = new Corpus(Corpus::Open({"text:" + text.string() + "#blocks"},
                                      folder_->path() / "cache", 1, /*quiet=*/true));
    Tokenizer::Train(
        corpus_->size(), [](uint64_t i) { return std::string(corpus_->Text(i)); },
        {.pieces = 120, .extra_ids = 8}, folder_->path() / "tokenizer");
  }
  static void TearDownTestSuite() {
    delete corpus_;
    delete folder_;
  }
  TokenRows Rows(int sequence_tokens, uint64_t max_rows) const {
    return {*corpus_, tokenizer_, SplitPart::kTrain, sequence_tokens,
            max_rows, 1,          /*quiet=*/true};
  }
  Tokenizer tokenizer_ = Tokenizer::Load(folder_->path() / "tokenizer");
  static TempFolder* folder_;
  static Corpus* corpus_;
};
TempFolder* DenoisingTest::folder_ = nullptr;
Corpus* DenoisingTest::corpus_ = nullptr;

// More spans than sentinels are there for: the last one is the mask's alone.
TEST_F(DenoisingTest, NoSpanHasTheSentinelOfMaskedTokens) {
  const TokenRows rows = Rows(200, 2);
  const std::vector<uint64_t> ids = {0, 1};
  const int64_t mask_id = tokenizer_.Sentinel(7);
  DenoisingOptions options;
  options.spans.noise_density = 0.3;  // 20 spans of 3 tokens
  const DenoisingBatch masked = MakeDenoisingBatch(rows, ids, ids, tokenizer_, options);
  EXPECT_FALSE(masked.targets_BT.eq(mask_id).any().item<bool>());
  EXPECT_TRUE(at::equal(masked.ids_BS.eq(mask_id), masked.masked_targets_BS.ge(0)));
  options.mask_share = 0;
  const DenoisingBatch unmasked = MakeDenoisingBatch(rows, ids, ids, tokenizer_, options);
  EXPECT_TRUE(unmasked.targets_BT.eq(mask_id).any().item<bool>());
}

// Small batches may have no masked token: they say nothing, not 0.
TEST_F(DenoisingTest, TheMaskedLossIsThatOfBatchesWithMaskedTokens) {
  SwitchConfig config = PretrainPreset("demo").model;
  config.vocab_size = tokenizer_.vocab_size();
  ResidentModel model({config, InitialParameters(config, 4, 1), ""});
  const TokenRows rows = Rows(16, 12);
  DenoisingOptions options;
  options.mask_share = 0.05;
  const auto measures =
      MeasureRouting(&model.model(), rows, tokenizer_, options, /*batch_rows=*/1, 12);
  double sum = 0;
  int with_masked = 0;
  for (uint64_t row = 0; row < 12; ++row) {
    const std::vector<uint64_t> ids = {row};
    const DenoisingLoss loss = DenoisingLosses(
        &model.model(), MakeDenoisingBatch(rows, ids, ids, tokenizer_, options), {});
    if (!loss.masked.defined()) continue;
    sum += loss.masked.item<double>();
    ++with_masked;
  }
  ASSERT_GT(with_masked, 0);
  ASSERT_LT(with_masked, 12);
  EXPECT_NEAR(measures->masked_loss, sum / with_masked, 1e-5);
}

}  // namespace
}  // namespace routecast
