// Sequences for which the model's arithmetic gives no numbers.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>

#include "common/errors.h"
#include "storage/trace_reader.h"
#include "tests/collector/collect_fixture.h"

namespace routecast {
namespace {

// A model whose arithmetic gives no numbers where one token is: a row of its embedding.
class NotFiniteTest : public CollectFixture {
 protected:
  using Sequences = std::map<uint64_t, RoutingTrace>;
  static Sequences Read(const std::string& store) {
    Sequences all;
    TraceReader(folder_ / store)
        .Scan([&](RoutingTrace&& t) { all[t.sequence_id] = t; }, WithHidden::kYes);
    return all;
  }
  static bool Has(const RoutingTrace& t, uint32_t token) {
    for (const auto* ids : {&t.encoder.token_ids, &t.decoder.token_ids}) {
      if (std::find(ids->begin(), ids->end(), token) != ids->end()) return true;
    }
    return false;
  }
  // A token of a few of the sequences, and the model that cannot take it.
  static uint32_t Break(const Sequences& sound) {
    const auto vocabulary = static_cast<uint32_t>(TinyConfig().vocab_size);
    for (uint32_t token = 3; token < vocabulary; ++token) {
      const auto count =
          std::count_if(sound.begin(), sound.end(),
                        [token](const auto& entry) { return Has(entry.second, token); });
      if (count < 3 || count > 90) continue;  // run.json names a hundred
      Parameters parameters = RandomParameters(TinyConfig(), 1);
      parameters.Get("shared.weight")[token].fill_(std::nan(""));
      SaveBroken(parameters);
      return token;
    }
    ADD_FAILURE() << "no token is rare";
    return 0;
  }
  static void SaveBroken(const Parameters& parameters) {
    fs::copy(folder_ / "model", folder_ / "broken",
             fs::copy_options::recursive | fs::copy_options::overwrite_existing);
    SaveCheckpoint(folder_ / "broken", TinyConfig(), parameters, at::kFloat);
  }
  // What a verb of routecast-trace prints.
  static std::string Says(const std::string& verb, const std::string& store) {
    const fs::path out = folder_ / "said";
    EXPECT_EQ(RunProgram({"/bin/sh", "-c",
                          Bin("routecast-trace") + " " + verb + " --store=" +
                              (folder_ / store).string() + " >" + out.string()}),
              0);
    return ReadFile(out);
  }
  static int CollectBroken(int ranks, const std::string& store,
                           std::vector<std::string> more) {
    more.push_back("--model=" + (folder_ / "broken").string());
    return Collect(ranks, store, more);
  }
};

TEST_F(NotFiniteTest, SkippedSequencesAreNamedAndTheOthersAreAsTheyWere) {
  Golden();
  Sequences expected = Read("golden");
  const uint32_t token = Break(expected);
  std::vector<uint64_t> left_out;
  for (const auto& [id, trace] : expected) {
    if (Has(trace, token)) left_out.push_back(id);
  }
  for (const uint64_t id : left_out) expected.erase(id);
  EXPECT_EQ(CollectBroken(1, "refused", {}), kExitBadData);
  // It goes on with what it has: as a job of days does.
  ASSERT_EQ(CollectBroken(2, "refused", {"--nonfinite=skip"}), 0);
  ASSERT_EQ(CollectBroken(3, "skipped", {"--nonfinite=skip"}), 0);
  // Nor need the run that completes a store be one that skips.
  ASSERT_EQ(CollectBroken(1, "skipped", {}), 0);
  for (const std::string store : {"refused", "skipped"}) {
    EXPECT_TRUE(Read(store) == expected) << store;
    std::vector<uint64_t> named;
    const TraceReader reader(folder_ / store);
    for (const SequenceInfo& info : reader.left_out()) named.push_back(info.sequence_id);
    EXPECT_EQ(named, left_out);
    EXPECT_EQ(ReadJsonFile(folder_ / store / "store.json")["schema"], kLeftOutSchema);
    Json results = ReadJsonFile(folder_ / store / "run.json")["results"];
    EXPECT_EQ(results["left_out"]["sequences"], left_out.size());
    EXPECT_EQ(results["left_out"]["ids"], Json(left_out));
  }
  EXPECT_EQ(Export("skipped"), Export("refused"));
  const std::string count = std::to_string(left_out.size()) + " sequences";
  EXPECT_NE(Says("info", "skipped")
                .find(count + ", for which the model gave no numbers: " +
                      std::to_string(left_out[0])),
            std::string::npos);
  EXPECT_NE(Says("verify", "skipped").find(count + " left out"), std::string::npos);
}

// Tokens drawn differ by sequence.
TEST_F(NotFiniteTest, GenerationLeavesOutTheSameInAnyBatch) {
  const std::vector<std::string> task = {"--task=generate", "--temperature=1",
                                         "--max_sequences=150", "--hidden_share=0"};
  ASSERT_EQ(Collect(1, "sound", task), 0);
  const uint32_t token = Break(Read("sound"));
  std::vector<std::vector<SequenceInfo>> left_out;
  for (const char* batch : {"--batch_size=8", "--batch_size=3"}) {
    auto flags = task;
    flags.insert(flags.end(), {"--nonfinite=skip", batch});
    ASSERT_EQ(CollectBroken(1, batch, flags), 0);
    left_out.push_back(TraceReader(folder_ / batch).left_out());
    for (const auto& [id, trace] : Read(batch)) EXPECT_FALSE(Has(trace, token)) << id;
  }
  EXPECT_GT(left_out[0].size(), 2u);
  EXPECT_EQ(left_out[0], left_out[1]);
}

TEST_F(NotFiniteTest, GenerationLeavesOutWhereLogitsAloneAreNone) {
  Parameters parameters = RandomParameters(TinyConfig(), 1);
  parameters.Get("lm_head.weight")[5].fill_(std::nan(""));
  SaveBroken(parameters);
  // Forced targets ask for no logits: the routers' are numbers.
  ASSERT_EQ(CollectBroken(1, "forced", {"--max_sequences=30"}), 0);
  EXPECT_TRUE(TraceReader(folder_ / "forced").left_out().empty());
  const std::vector<std::string> task = {"--task=generate", "--max_sequences=30"};
  EXPECT_EQ(CollectBroken(1, "no_logits", task), kExitBadData);
  auto skip = task;
  skip.push_back("--nonfinite=skip");
  ASSERT_EQ(CollectBroken(1, "no_logits", skip), 0);
  const TraceReader reader(folder_ / "no_logits");
  EXPECT_EQ(reader.left_out().size(), TraceReader(folder_ / "forced").sequences().size());
  EXPECT_TRUE(reader.sequences().empty());
}

// By the signs of a state, token by token: a logit is infinite, or the text ends.
TEST_F(NotFiniteTest, LogitsOfSomeSequencesAreNoneInAnyBatch) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  Parameters parameters = RandomParameters(TinyConfig(), 1);
  const at::Tensor head = parameters.Get("lm_head.weight");
  for (const int64_t token : {int64_t{5}, int64_t{Tokenizer::kEos}}) head[token].zero_();
  head[5][0].fill_(kInfinity);
  head[Tokenizer::kEos][1].fill_(1000);
  SaveBroken(parameters);
  std::vector<std::vector<SequenceInfo>> left_out;
  for (const char* batch : {"--batch_size=8", "--batch_size=3"}) {
    const std::string store = std::string("some") + batch;
    ASSERT_EQ(CollectBroken(
                  1, store,
                  {"--task=generate", "--max_sequences=60", batch, "--nonfinite=skip"}),
              0);
    const TraceReader reader(folder_ / store);
    EXPECT_GT(reader.sequences().size(), 2u);
    left_out.push_back(reader.left_out());
  }
  EXPECT_GT(left_out[0].size(), 2u);
  EXPECT_EQ(left_out[0], left_out[1]);
}

}  // namespace
}  // namespace routecast
