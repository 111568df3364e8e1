#include "corpus/tokenizer.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <thread>

#include "common/errors.h"
#include "common/random.h"
#include "common/run_record.h"

namespace routecast {
namespace {

constexpr int kPieces = 120, kExtraIds = 16;

// Sentences of made-up words over a small set of syllables.
std::vector<std::string> Texts() {
  const char* syllables[] = {"ba",  "ko",  "li", "mu",  "ter",
                             "sin", "dor", "va", "gre", "pha"};
  std::vector<std::string> texts;
  for (uint64_t i = 0; i < 400; ++i) {
    std::string text;
    for (uint64_t w = 0; w < 20; ++w) {
      for (uint64_t s = 0; s < 1 + ToRange(Mix(i, w), 3); ++s) {
        text += syllables[ToRange(Mix(i, w, s), 10)];
      }
      text += w == 19 ? "." : " ";
    }
    texts.push_back(text);
  }
  return texts;
}

class TokenizerTest : public testing::Test {
 protected:
  static void SetUpTestSuite() {
    folder_ =
        fs::temp_directory_path() / ("tokenizer_test." + std::to_string(::getpid()));
    Tokenizer::Train(Texts(), {.pieces = kPieces, .extra_ids = kExtraIds, .threads = 2},
                     folder_);
  }
  static void TearDownTestSuite() { fs::remove_all(folder_); }
  static fs::path folder_;
};
fs::path TokenizerTest::folder_;

TEST_F(TokenizerTest, TrainedModelHasTheSizesAskedFor) {
  const Tokenizer tokenizer = Tokenizer::Load(folder_);
  EXPECT_EQ(tokenizer.num_pieces(), kPieces);
  EXPECT_EQ(tokenizer.num_sentinels(), kExtraIds);
  EXPECT_EQ(tokenizer.vocab_size(), kPieces + kExtraIds);
}

TEST_F(TokenizerTest, DecodeInvertsEncode) {
  const Tokenizer tokenizer = Tokenizer::Load(folder_);
  for (const std::string& text : Texts()) {
    const auto ids = tokenizer.EncodePlain(text);
    ASSERT_EQ(tokenizer.Decode(ids), text);
    for (const int32_t id : ids) ASSERT_LT(id, kPieces);
  }
}

TEST_F(TokenizerTest, SentinelsCountDownFromTheEnd) {
  const Tokenizer tokenizer = Tokenizer::Load(folder_);
  for (int k = 0; k < kExtraIds; ++k) {
    const std::string name = "<extra_id_" + std::to_string(k) + ">";
    EXPECT_EQ(tokenizer.Encode(name), std::vector<int32_t>{kPieces + kExtraIds - 1 - k});
    EXPECT_EQ(tokenizer.Sentinel(k), kPieces + kExtraIds - 1 - k);
    EXPECT_EQ(tokenizer.Decode(tokenizer.Encode("ba " + name + " ko")),
              "ba " + name + " ko");
  }
  EXPECT_THROW(tokenizer.Sentinel(kExtraIds), UsageError);
  EXPECT_THROW(tokenizer.Sentinel(-1), UsageError);
}

TEST_F(TokenizerTest, WhatIsNoSentinelStaysText) {
  const Tokenizer tokenizer = Tokenizer::Load(folder_);
  for (const char* text :
       {"<extra_id_16>", "<extra_id_01>", "<extra_id_-1>", "<extra_id_", "<extra_id_1",
        "<extra_id_99999999999999999999>", "<", "<<"}) {
    EXPECT_EQ(tokenizer.Encode(text), tokenizer.EncodePlain(text)) << text;
  }
}

TEST_F(TokenizerTest, PlainTextCannotMakeSpecialIds) {
  const Tokenizer tokenizer = Tokenizer::Load(folder_);
  for (const int32_t id : tokenizer.EncodePlain("<extra_id_0> </s> <pad>")) {
    EXPECT_GE(id, Tokenizer::kUnk);
    EXPECT_LT(id, kPieces);
  }
}

TEST_F(TokenizerTest, BlankTextHasNoIds) {
  const Tokenizer tokenizer = Tokenizer::Load(folder_);
  EXPECT_TRUE(tokenizer.Encode("").empty());
  EXPECT_TRUE(tokenizer.Encode(" \n\t ").empty());
  EXPECT_EQ(tokenizer.Decode({}), "");
}

TEST_F(TokenizerTest, TrainingRepeats) {
  const fs::path again = folder_.string() + ".again";
  Tokenizer::Train(Texts(), {.pieces = kPieces, .extra_ids = kExtraIds, .threads = 2},
                   again);
  EXPECT_EQ(Tokenizer::Load(again).fingerprint(), Tokenizer::Load(folder_).fingerprint());
  fs::remove_all(again);
}

TEST_F(TokenizerTest, ManyThreadsEncodeAlike) {
  const Tokenizer tokenizer = Tokenizer::Load(folder_);
  const auto texts = Texts();
  std::vector<std::vector<int32_t>> expected, got(texts.size());
  for (const auto& text : texts) expected.push_back(tokenizer.Encode(text));
  std::vector<std::thread> threads;
  for (size_t t = 0; t < 4; ++t) {
    threads.emplace_back([&, t] {
      for (size_t i = t; i < texts.size(); i += 4) got[i] = tokenizer.Encode(texts[i]);
    });
  }
  for (auto& thread : threads) thread.join();
  EXPECT_EQ(got, expected);
}

TEST_F(TokenizerTest, DamagedModelsAreDataErrors) {
  const std::string model = ReadFile(folder_ / "spiece.model");
  EXPECT_THROW(Tokenizer::FromModel("", 1, "m"), DataError);
  EXPECT_THROW(Tokenizer::FromModel("not a model at all", 1, "m"), DataError);
  EXPECT_THROW(Tokenizer::FromModel(model.substr(0, model.size() / 2), 1, "m"),
               DataError);
}

TEST_F(TokenizerTest, MissingModelIsUsageError) {
  EXPECT_THROW(Tokenizer::Load(folder_ / "nothing"), UsageError);
}

TEST_F(TokenizerTest, BadExtraIdsAreDataErrors) {
  const fs::path bad = folder_.string() + ".bad";
  MakeFolder(bad);
  fs::copy(folder_ / "spiece.model", bad / "spiece.model");
  for (const char* config : {"{\"extra_ids\": -1}", "{\"extra_ids\": 1e9}", "[]", "{",
                             "{\"extra_ids\": \"many\"}"}) {
    WriteFileAtomic(bad / "tokenizer_config.json", config);
    EXPECT_THROW(Tokenizer::Load(bad), DataError) << config;
  }
  fs::remove_all(bad);
}

// The sample ends inside a text that has no blank to end at, but not inside a letter.
TEST_F(TokenizerTest, TextWithoutBlanksIsSampled) {
  std::string text;
  for (uint64_t i = 0; i < 20'000; ++i) {
    text += "\xe4\xb8";
    text += static_cast<char>(0x80 + ToRange(Mix(9, i), 40));
  }
  const fs::path out = folder_.string() + ".dense";
  Tokenizer::Train({text}, {.pieces = 60, .max_sample_bytes = 20'000}, out);
  const Tokenizer tokenizer = Tokenizer::Load(out);
  const auto ids = tokenizer.Encode(text.substr(0, 300));
  EXPECT_EQ(std::count(ids.begin(), ids.end(), Tokenizer::kUnk), 0);
  EXPECT_FALSE(ids.empty());
  fs::remove_all(out);
}

TEST_F(TokenizerTest, TooLittleTextIsUsageError) {
  const fs::path out = folder_.string() + ".little";
  EXPECT_THROW(Tokenizer::Train({"a b c"}, {.pieces = 4000}, out), UsageError);
  EXPECT_THROW(Tokenizer::Train({}, {.pieces = 400}, out), UsageError);
  EXPECT_THROW(Tokenizer::Train({"a b c"}, {.pieces = 0}, out), UsageError);
  EXPECT_FALSE(fs::exists(out));
}

TEST_F(TokenizerTest, NegativeIdsAreRefused) {
  const Tokenizer tokenizer = Tokenizer::Load(folder_);
  EXPECT_THROW(tokenizer.Decode(std::vector<int32_t>{5, -1}), UsageError);
}

}  // namespace
}  // namespace routecast
