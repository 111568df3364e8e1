// What predictors said of each token, as files that NumPy opens.
#include "evaluator/answer_log.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cmath>
#include <map>
#include <memory>
#include <sstream>

#include "evaluator/predictor_set.h"
#include "evaluator/quality.h"
#include "tests/evaluator/synthetic_store.h"
#include "tests/models/switch_test_support.h"
#include "tests/support/reference.h"

namespace routecast {
namespace {

using testing::HasSubstr;

class AnswerLogTest : public testing::Test {
 protected:
  static void SetUpTestSuite() {
    folder_ =
        fs::temp_directory_path() / ("answer_log_test." + std::to_string(::getpid()));
    WriteSyntheticStore(folder_ / "store", SmallConfig());
  }
  static void TearDownTestSuite() { fs::remove_all(folder_); }
  // The answers of two predictors on the store, into `to`.
  static std::vector<PredictorQuality> Measure(AnswerFormat format, int ranks,
                                               const fs::path& to) {
    const TraceReader reader(folder_ / "store");
    const std::vector<std::string> names = {"markov", "frequency"};
    const auto predictors =
        MakePredictors(names, names, reader.config().geometry, {}, &reader, true);
    fs::create_directories(to);
    AnswerLog log(to, format, ranks);
    QualityOptions options;
    options.quiet = true;
    options.answers = &log;
    const auto all = MeasureQuality(reader, predictors, options);
    log.Finish();
    return all;
  }
  static inline fs::path folder_;
};

TEST_F(AnswerLogTest, ARowIsAnExpertOfAnAnswerTheLikeliestFirst) {
  const fs::path to = folder_ / "rows";
  fs::create_directories(to);
  AnswerLog log(to, AnswerFormat::kCsv, 3);
  const std::vector<float> probabilities = {0.1f, 0.5f, 0.1f, 0.25f};
  const std::vector<int64_t> chosen = {3, 0}, unlabelled = {-100, -100};
  log.Add({1, 18446744073709551615u, Stack::kDecoder, 7, -1, 2, probabilities, chosen});
  log.Add({0, 5, Stack::kEncoder, 0, 3, 1, probabilities, unlabelled});
  log.Finish();
  EXPECT_EQ(ReadFile(to / "answers.csv", 1 << 20),
            "predictor,sequence,stack,token,layer,lead,rank,expert,probability,used\n"
            "1,18446744073709551615,1,7,-1,2,1,1,0.5,0\n"
            "1,18446744073709551615,1,7,-1,2,2,3,0.25,1\n"
            "1,18446744073709551615,1,7,-1,2,3,0,0.100000001,1\n"
            "0,5,0,0,3,1,1,1,0.5,-1\n"
            "0,5,0,0,3,1,2,3,0.25,-1\n"
            "0,5,0,0,3,1,3,0,0.100000001,-1\n");
}

// As docs/examples reads it, and as quality.json has it.
TEST_F(AnswerLogTest, TheExampleFindsTheScoresAgain) {
  const fs::path to = folder_ / "example";
  const auto all = Measure(AnswerFormat::kNpz, 2, to);
  std::map<std::pair<int, int>, std::pair<int64_t, int64_t>> expected;  // samples, right
  for (size_t p = 0; p < all.size(); ++p) {
    for (const QualityScores& place : all[p].places) {
      const LeadScores& s = place.scores;
      if (s.phase != Stack::kDecoder) continue;
      auto& [samples, right] = expected[{static_cast<int>(p), s.lead}];
      samples += s.samples;
      right += std::llround(s.top[0] * static_cast<double>(s.samples));
    }
  }
  std::string lines;
  for (const auto& [key, counts] : expected) {
    lines += std::to_string(key.first) + " " + std::to_string(key.second) + " " +
             std::to_string(counts.first) + " " + std::to_string(counts.second) + "\n";
  }
  const std::string printed = (to / "printed").string();
  ASSERT_EQ(RunReference("../../docs/examples/answers_numpy.py",
                         (to / "answers.npz").string() + " >" + printed),
            0);
  EXPECT_EQ(ReadFile(printed, 1 << 20), lines);
  EXPECT_GT(expected.size(), 2u);
}

TEST_F(AnswerLogTest, BothFormatsHoldTheSame) {
  const fs::path to = folder_ / "both";
  Measure(AnswerFormat::kCsv, 2, to);
  Measure(AnswerFormat::kNpz, 2, to);
  const fs::path script = to / "compare.py";
  WriteFileAtomic(script,
                  "import sys\nimport numpy as np\n"
                  "npz = np.load(sys.argv[1] + '/answers.npz')\n"
                  "csv = np.genfromtxt(sys.argv[1] + '/answers.csv', delimiter=',', "
                  "names=True)\n"
                  "assert list(npz) == list(csv.dtype.names)\n"
                  "for name in npz:\n"
                  "    assert np.array_equal(npz[name], "
                  "csv[name].astype(npz[name].dtype)), name\n"
                  "assert len(csv) > 100\n");
  EXPECT_EQ(
      RunReference(fs::relative(script, fs::path(EnvOr("ROUTECAST_SOURCE_DIR", ".")) /
                                            "tests/golden")
                       .string(),
                   to.string()),
      0);
}

TEST_F(AnswerLogTest, WithoutAnEndNothingIsLeft) {
  const fs::path to = folder_ / "unfinished";
  fs::create_directories(to);
  const std::vector<float> probabilities = {0.5f, 0.5f};
  const std::vector<int64_t> chosen = {1};
  for (const AnswerFormat format : {AnswerFormat::kCsv, AnswerFormat::kNpz}) {
    AnswerLog log(to, format, 2);
    for (int i = 0; i < 100'000; ++i)
      log.Add({0, 1, Stack::kDecoder, i, 0, 1, probabilities, chosen});
  }
  EXPECT_TRUE(fs::is_empty(to));
}

TEST_F(AnswerLogTest, NoAnswersAreAnEmptyTable) {
  const fs::path to = folder_ / "empty";
  fs::create_directories(to);
  AnswerLog log(to, AnswerFormat::kNpz, 2);
  log.Finish();
  EXPECT_GT(fs::file_size(to / "answers.npz"), 100u);
}

}  // namespace
}  // namespace routecast
