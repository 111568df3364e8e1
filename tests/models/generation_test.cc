// Decoding: sampling, beam search, lengths, and that a row in a batch is a row alone.
#include "models/generation.h"

#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <limits>
#include <set>

#include "common/errors.h"
#include "tests/models/switch_test_support.h"

namespace routecast {
namespace {

constexpr double kMinusInfinity = -std::numeric_limits<double>::infinity();

struct Prompts {
  at::Tensor ids = at::randint(2, 96, {4, 12}, at::kLong);
  at::Tensor valid = at::arange(12).unsqueeze(0) < at::tensor({12, 7, 3, 9}).unsqueeze(1);
};

// Every prompt alone, without its padding, under the same key as in the batch.
std::vector<GeneratedSequence> OneByOne(SwitchModel* model, const Prompts& in,
                                        GenerationOptions options) {
  std::vector<GeneratedSequence> all;
  for (int64_t b = 0; b < in.ids.size(0); ++b) {
    const int64_t length = in.valid[b].sum().item<int64_t>();
    options.sampling.row_keys = {static_cast<uint64_t>(b)};
    for (GeneratedSequence& s :
         Generate(model, in.ids.narrow(0, b, 1).narrow(1, 0, length),
                  at::ones({1, length}, at::kBool), options)) {
      all.push_back(std::move(s));
    }
  }
  return all;
}

void ExpectRowsEqualSingleRuns(const GenerationOptions& options, uint64_t seed) {
  ResidentModel model(RandomCheckpoint(SmallConfig(), seed));
  const Prompts in;
  const auto batch = Generate(&model.model(), in.ids, in.valid, options);
  const auto alone = OneByOne(&model.model(), in, options);
  ASSERT_EQ(batch.size(), alone.size());
  std::set<std::vector<int64_t>> distinct;
  for (size_t i = 0; i < batch.size(); ++i) {
    EXPECT_EQ(batch[i].ids, alone[i].ids) << "sequence " << i;
    EXPECT_NEAR(batch[i].score, alone[i].score, 1e-4) << "sequence " << i;
    distinct.insert(batch[i].ids);
  }
  EXPECT_GT(distinct.size(), 1u) << "all rows say the same: nothing was compared";
}

TEST(Generate, GreedyRowsEqualSingleRuns) {
  ExpectRowsEqualSingleRuns({.max_new_tokens = 10}, 11);
}

TEST(Generate, SampledRowsEqualSingleRuns) {
  GenerationOptions options{.max_new_tokens = 10};
  options.sampling = {.temperature = 1.5, .top_k = 40, .top_p = 0.95, .seed = 7};
  ExpectRowsEqualSingleRuns(options, 12);
}

TEST(Generate, BeamsOfARowEqualThoseOfASingleRun) {
  GenerationOptions options{.max_new_tokens = 8, .num_return_sequences = 3};
  options.beams.num_beams = 4;
  ExpectRowsEqualSingleRuns(options, 13);
}

TEST(Generate, SamplingIsAFunctionOfSeedAndRowKey) {
  ResidentModel model(RandomCheckpoint(SmallConfig(), 14));
  const Prompts in;
  const auto ids = [&](uint64_t seed, std::vector<uint64_t> keys) {
    GenerationOptions options{.max_new_tokens = 12};
    options.sampling = {.temperature = 2, .seed = seed, .row_keys = std::move(keys)};
    std::vector<std::vector<int64_t>> all;
    for (const auto& s : Generate(&model.model(), in.ids, in.valid, options)) {
      all.push_back(s.ids);
    }
    return all;
  };
  EXPECT_EQ(ids(1, {}), ids(1, {0, 1, 2, 3}));
  EXPECT_NE(ids(1, {}), ids(2, {}));
  EXPECT_NE(ids(1, {}), ids(1, {4, 5, 6, 7}));
}

// What one row's steps give when each is chosen from a whole new pass over all before.
TEST(Generate, GreedyEqualsDecodingFromTheBeginningAtEachStep) {
  ResidentModel resident(RandomCheckpoint(SmallConfig(), 15));
  SwitchModel& model = resident.model();
  const Prompts in;
  const auto generated = Generate(&model, in.ids, in.valid, {.max_new_tokens = 6});
  const at::Tensor encoded = model.Encode(in.ids, in.valid);
  for (int64_t b = 0; b < 4; ++b) {
    std::vector<int64_t> inputs = {0}, expected;
    for (int step = 0; step < 6 && (expected.empty() || expected.back() != 1); ++step) {
      const at::Tensor ids = at::tensor(inputs, at::kLong).unsqueeze(0);
      const at::Tensor hidden =
          model.Decode(ids, at::ones_like(ids, at::kBool), encoded.narrow(0, b, 1),
                       in.valid.narrow(0, b, 1), nullptr);
      expected.push_back(model.Logits(hidden)[0][-1].argmax().item<int64_t>());
      inputs.push_back(expected.back());
    }
    EXPECT_EQ(generated[static_cast<size_t>(b)].ids, expected) << "row " << b;
  }
}

// A beam's score is the sum of its tokens' log probabilities under teacher forcing: true
// only if its cache follows it from beam to beam.
TEST(Generate, BeamScoresEqualTeacherForcing) {
  ResidentModel resident(RandomCheckpoint(SmallConfig(), 16));
  SwitchModel& model = resident.model();
  const Prompts in;
  GenerationOptions options{.max_new_tokens = 8, .num_return_sequences = 4};
  options.beams = {.num_beams = 4, .length_penalty = 0};
  const auto beams = Generate(&model, in.ids, in.valid, options);
  const at::Tensor encoded = model.Encode(in.ids, in.valid);
  for (size_t i = 0; i < beams.size(); ++i) {
    const auto b = static_cast<int64_t>(i / 4);
    std::vector<int64_t> inputs = beams[i].ids;
    inputs.insert(inputs.begin(), 0);
    inputs.pop_back();
    const at::Tensor ids = at::tensor(inputs, at::kLong).unsqueeze(0);
    const at::Tensor log_probs =
        at::log_softmax(model.Logits(model.Decode(ids, at::ones_like(ids, at::kBool),
                                                  encoded.narrow(0, b, 1),
                                                  in.valid.narrow(0, b, 1), nullptr)),
                        -1);
    double sum = 0;
    for (size_t t = 0; t < beams[i].ids.size(); ++t) {
      sum += log_probs[0][static_cast<int64_t>(t)][beams[i].ids[t]].item<double>();
    }
    EXPECT_NEAR(beams[i].score, sum, 1e-3) << "beam " << i;
  }
}

TEST(Generate, EndsWithTheEndTokenAndNotBeforeMinNewTokens) {
  Checkpoint c = RandomCheckpoint(SmallConfig(), 17);
  // A head that finds the end-of-sequence token most probable wherever it may.
  Parameters changed;
  for (const auto& [name, tensor] : c.parameters.items()) {
    changed.Add(name, name == "lm_head.weight" ? at::zeros_like(tensor) : tensor);
  }
  c.parameters = changed;
  c.config.eos_token_id = 0;  // of equal logits the lowest id wins
  ResidentModel model(c);
  const Prompts in;
  for (const auto& s :
       Generate(&model.model(), in.ids, in.valid, {.max_new_tokens = 9})) {
    EXPECT_EQ(s.ids, std::vector<int64_t>({0}));
  }
  for (const auto& s : Generate(&model.model(), in.ids, in.valid,
                                {.max_new_tokens = 9, .min_new_tokens = 3})) {
    EXPECT_EQ(s.ids, std::vector<int64_t>({1, 1, 1, 0}));
  }
}

TEST(Generate, ARowEndsAtItsOwnLimit) {
  ResidentModel model(RandomCheckpoint(SmallConfig(), 11));
  const Prompts in;
  GenerationOptions options{.max_new_tokens = 9, .min_new_tokens = 9};
  const auto whole = Generate(&model.model(), in.ids, in.valid, options);
  options.row_max_new_tokens = {9, 1, 4, 7};
  options.min_new_tokens = 0;
  const auto cut = Generate(&model.model(), in.ids, in.valid, options);
  for (size_t b = 0; b < cut.size(); ++b) {
    const auto limit = static_cast<size_t>(options.row_max_new_tokens[b]);
    EXPECT_LE(cut[b].ids.size(), limit);
    for (size_t t = 0; t < cut[b].ids.size(); ++t) {
      if (cut[b].ids[t] == 1) break;  // there the whole row was forbidden to end
      EXPECT_EQ(cut[b].ids[t], whole[b].ids[t]) << "row " << b << " step " << t;
    }
  }
  EXPECT_EQ(cut[1].ids.size(), 1u);
}

TEST(Generate, RefusesOptionsThatCannotBe) {
  const auto refuses = [](const std::function<void(GenerationOptions*)>& change,
                          const std::string& name) {
    GenerationOptions options;
    change(&options);
    try {
      options.Validate();
      ADD_FAILURE() << name << " was accepted";
    } catch (const UsageError& e) {
      EXPECT_NE(std::string(e.what()).find(name), std::string::npos) << e.what();
    }
  };
  using O = GenerationOptions;
  refuses([](O* o) { o->sampling.temperature = -1; }, "temperature");
  refuses([](O* o) { o->sampling.top_k = -1; }, "top_k");
  refuses([](O* o) { o->sampling.top_p = 0; }, "top_p");
  refuses([](O* o) { o->sampling.top_p = 1.01; }, "top_p");
  refuses([](O* o) { o->max_new_tokens = 0; }, "max_new_tokens");
  refuses([](O* o) { o->min_new_tokens = 33; }, "min_new_tokens");
  refuses([](O* o) { o->beams.num_beams = 0; }, "num_beams");
  refuses([](O* o) { o->num_return_sequences = 2; }, "num_return_sequences");
  refuses([](O* o) { o->beams.num_beams = 2, o->sampling.temperature = 1; }, "sampling");
}

TEST(Generate, BeamsNeedAVocabularyTwiceAsLarge) {
  ResidentModel model(RandomCheckpoint(SmallConfig(), 18));
  const Prompts in;
  GenerationOptions options;
  options.beams.num_beams = 49;  // of 96 tokens
  EXPECT_THROW(Generate(&model.model(), in.ids, in.valid, options), UsageError);
}

// A damaged weight, or an overflow: the first id is no answer, nor is any order of beams.
TEST(Generate, LogitsThatAreNoNumbersEndEveryChoiceByRowAndStep) {
  Checkpoint checkpoint = RandomCheckpoint(SmallConfig(), 19);
  checkpoint.parameters.Get("shared.weight")[50].fill_(std::nan(""));
  ResidentModel model(std::move(checkpoint));
  Prompts in;
  in.ids.masked_fill_(in.ids == 50, 51);
  in.ids[1][0] = 50;
  for (const auto& [num_beams, temperature] : {std::pair{1, 0.0}, {3, 0.0}, {1, 1.0}}) {
    GenerationOptions options;
    options.beams.num_beams = num_beams;
    options.sampling.temperature = temperature;
    try {
      Generate(&model.model(), in.ids, in.valid, options);
      ADD_FAILURE() << "tokens were chosen with " << num_beams << " beams";
    } catch (const DataError& e) {
      EXPECT_NE(std::string(e.what()).find("row 1, step 0"), std::string::npos)
          << e.what();
    }
  }
}

// As of an overflow: the first of several infinite logits is no answer.
TEST(Generate, InfiniteLogitsAreNoNumbers) {
  Checkpoint checkpoint = RandomCheckpoint(SmallConfig(), 19);
  at::Tensor head = checkpoint.parameters.Get("lm_head.weight");
  for (const int token : {60, 61}) {  // one is infinite, the other its negative
    head[token].zero_();
    head[token][0] = (token == 60 ? 1 : -1) * std::numeric_limits<float>::infinity();
  }
  ResidentModel model(std::move(checkpoint));
  Prompts in;
  in.ids.masked_fill_(in.ids >= 60, 51);
  EXPECT_THROW(Generate(&model.model(), in.ids, in.valid, {}), DataError);
}

TEST(Generate, WhereAskedForSuchARowEndsAndTheOthersGoOn) {
  ResidentModel whole(RandomCheckpoint(SmallConfig(), 19));
  Checkpoint checkpoint = RandomCheckpoint(SmallConfig(), 19);
  checkpoint.parameters.Get("shared.weight")[50].fill_(std::nan(""));
  ResidentModel broken(std::move(checkpoint));
  Prompts in;
  in.ids.masked_fill_(in.ids == 50, 51);
  for (const double temperature : {0.0, 1.0}) {
    GenerationOptions options;
    options.max_new_tokens = 6;
    options.sampling.temperature = temperature;
    options.sampling.seed = 3;  // row 0 does not draw that token
    options.end_without_numbers = true;
    at::Tensor ids = in.ids.clone();
    const auto expected = Generate(&whole.model(), ids, in.valid, options);
    ids[1][0] = 50;
    const auto got = Generate(&broken.model(), ids, in.valid, options);
    ASSERT_EQ(got.size(), expected.size());
    EXPECT_TRUE(got[1].no_numbers);
    EXPECT_TRUE(got[1].ids.empty());
    EXPECT_FALSE(got[0].no_numbers);
    EXPECT_EQ(got[0].ids, expected[0].ids);
  }
}

// Observers may keep what a pass began with (PassInfo): the row ended behind it.
TEST(Generate, ARowThatEndsWithoutNumbersWasThereInItsLastPass) {
  Checkpoint checkpoint = RandomCheckpoint(SmallConfig(), 19);
  checkpoint.parameters.Get("shared.weight")[50].fill_(std::nan(""));
  ResidentModel model(std::move(checkpoint));
  Prompts in;
  in.ids.masked_fill_(in.ids == 50, 51);
  in.ids[1][0] = 50;
  RoutingLog log;
  GenerationOptions options{.max_new_tokens = 3, .end_without_numbers = true};
  options.forward.observer = &log;
  Generate(&model.model(), in.ids, in.valid, options);
  ASSERT_GE(log.passes.size(), 3u);
  EXPECT_TRUE(log.passes[1].valid_BT.all().item<bool>()) << "the first step";
  EXPECT_FALSE(log.passes[2].valid_BT[1].item<bool>());
}

// Memory for tokens to come changes no token.
TEST(Generate, RoomForStepsToComeChangesNothing) {
  ResidentModel model(RandomCheckpoint(SmallConfig(), 20));
  const Prompts in;
  for (const int beams : {1, 3}) {
    GenerationOptions options{.max_new_tokens = 11, .min_new_tokens = 7};
    options.beams.num_beams = beams;
    const auto expected = Generate(&model.model(), in.ids, in.valid, options);
    options.record_steps = true;
    const auto got = Generate(&model.model(), in.ids, in.valid, options);
    ASSERT_EQ(got.size(), expected.size());
    for (size_t b = 0; b < got.size(); ++b) {
      EXPECT_EQ(got[b].ids, expected[b].ids) << "row " << b << ", beams " << beams;
      EXPECT_EQ(got[b].score, expected[b].score) << "row " << b << ", beams " << beams;
    }
  }
}

TEST(SampleIds, FrequenciesAreTheProbabilities) {
  const at::Tensor probs = at::tensor({0.5, 0.0, 0.3, 0.2}, at::kDouble);
  const int64_t rows = 20000;
  const at::Tensor ids =
      SampleIds(probs.log().unsqueeze(0).expand({rows, 4}), {.seed = 3}, 0);
  const at::Tensor shares = at::bincount(ids, {}, 4).to(at::kDouble) / rows;
  // Five standard deviations of the largest.
  EXPECT_LT((shares - probs).abs().max().item<double>(), 5 * 0.5 / std::sqrt(rows));
  EXPECT_EQ(shares[1].item<double>(), 0);
}

TEST(SampleIds, WhatIsLeftOutIsNeverDrawn) {
  const at::Tensor logits = at::randn({200, 30});
  const SamplingOptions options{.temperature = 1, .top_k = 3, .seed = 5};
  const at::Tensor kept = std::get<1>(logits.topk(3, -1));
  for (int step = 0; step < 5; ++step) {
    const at::Tensor ids = SampleIds(WarpLogits(logits, options), options, step);
    EXPECT_TRUE((kept == ids.unsqueeze(1)).any(-1).all().item<bool>());
  }
}

// As of an overflow in fp16: an id beyond the vocabulary must not come out.
TEST(SampleIds, OfLogitsThatAreNoNumbersNothingIsDrawn) {
  at::Tensor logits = at::randn({3, 30});
  const SamplingOptions options{.temperature = 1, .seed = 5};
  at::Tensor expected = SampleIds(WarpLogits(logits, options), options, 6);
  logits[1][4] = std::nan("");
  expected[1] = kNoToken;
  EXPECT_TRUE(at::equal(SampleIds(WarpLogits(logits, options), options, 6), expected));
}

TEST(WarpLogits, TopPKeepsTheFewestThatReachIt) {
  const at::Tensor logits = at::tensor({0.4, 0.3, 0.2, 0.1}).log().unsqueeze(0);
  const auto kept = [&](double p) {
    return (WarpLogits(logits, {.temperature = 1, .top_p = p}) > kMinusInfinity)
        .sum()
        .item<int64_t>();
  };
  EXPECT_EQ(kept(0.01), 1);
  EXPECT_EQ(kept(0.65), 2);
  EXPECT_EQ(kept(0.75), 3);
  EXPECT_EQ(kept(1.0), 4);
}

}  // namespace
}  // namespace routecast
