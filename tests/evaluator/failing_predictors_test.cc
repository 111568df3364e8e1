// A predictor that fails, throws or answers nonsense ends no mode: what it fails is left
// out of a simulation, is wrong in quality's scores, and is said.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cmath>
#include <memory>

#include "evaluator/policy_simulation.h"
#include "evaluator/predictor_set.h"
#include "evaluator/quality.h"
#include "tests/evaluator/strange_predictor.h"
#include "tests/evaluator/synthetic_store.h"
#include "tests/models/switch_test_support.h"

namespace routecast {
namespace {

using testing::HasSubstr;

class FailingPredictorsTest : public testing::Test {
 protected:
  static void SetUpTestSuite() {
    folder_ = fs::temp_directory_path() / ("failing_test." + std::to_string(::getpid()));
    WriteSyntheticStore(folder_ / "store", SmallConfig());
    reader_ = std::make_unique<TraceReader>(folder_ / "store");
  }
  static void TearDownTestSuite() {
    reader_.reset();
    fs::remove_all(folder_);
  }
  static std::vector<std::unique_ptr<ExpertPredictor>> Markov() {
    const std::vector<std::string> names = {"markov"};
    return MakePredictors(names, names, reader_->config().geometry, {}, reader_.get(),
                          true);
  }
  static inline fs::path folder_;
  static inline std::unique_ptr<TraceReader> reader_;
};

std::vector<std::unique_ptr<ExpertPredictor>> Strange(StrangePredictor::Mode mode) {
  std::vector<std::unique_ptr<ExpertPredictor>> predictors;
  predictors.push_back(std::make_unique<StrangePredictor>(mode));
  return predictors;
}

constexpr StrangePredictor::Mode kFailing[] = {
    StrangePredictor::kThrowing, StrangePredictor::kThrowingInt, StrangePredictor::kNan,
    StrangePredictor::kTooLikely, StrangePredictor::kMisshapen};

// What is left out would flatter it.
TEST_F(FailingPredictorsTest, AFailedQuestionCountsAsAWrongAnswerAndIsSaid) {
  QualityOptions options;
  options.quiet = true;
  const auto sound = MeasureQuality(*reader_, Markov(), options);
  for (const auto mode : kFailing) {
    const auto all = MeasureQuality(*reader_, Strange(mode), options);
    const PredictorQuality& strange = all[0];
    const std::string failure = StrangePredictor::FailureOf(mode);
    EXPECT_GT(strange.failed_questions, 0) << failure;
    EXPECT_EQ(strange.questions, sound[0].questions) << failure;
    EXPECT_THAT(strange.first_failure, testing::StartsWith(failure));
    EXPECT_THAT(QualityTable(all), HasSubstr("strange: "));
    EXPECT_THAT(QualityTable(all), HasSubstr(strange.first_failure));
    EXPECT_EQ(strange.ToJson()["failed_questions"], strange.failed_questions);
    ASSERT_EQ(strange.places.size(), sound[0].places.size()) << failure;
    int64_t unanswered = 0;
    for (size_t i = 0; i < strange.places.size(); ++i) {
      const QualityScores& place = strange.places[i];
      EXPECT_EQ(place.scores.samples, sound[0].places[i].scores.samples) << failure;
      unanswered += place.unanswered;
      if (StrangePredictor::Answers(mode)) continue;
      EXPECT_EQ(place.unanswered, place.scores.samples) << failure;
      EXPECT_EQ(place.scores.top[5], 0) << failure << ": right by the order of ids";
      EXPECT_NEAR(place.scores.cross_entropy, -std::log(1e-12), 1e-6) << failure;
    }
    EXPECT_GT(unanswered, 0) << failure;
  }
  EXPECT_EQ(sound[0].failed_questions, 0);
  EXPECT_EQ(sound[0].ToJson().count("failed_questions"), 0u);
}

TEST_F(FailingPredictorsTest, AFailedQuestionIsLeftOutOfASimulationAndSaid) {
  PolicySimulationOptions options;
  options.encoder = true;
  DeviceProfile profile;
  profile.link_bytes_per_second = 2e9;
  profile.memory_bytes_per_second = 10e9;
  for (const auto mode : kFailing) {
    const auto result = SimulatePolicies(*reader_, Strange(mode), profile, options);
    ASSERT_EQ(result.rows.size(), 4u);  // on demand, strange, the oracle, resident
    const std::string failure = StrangePredictor::FailureOf(mode);
    const SimulatedRow& demand = result.rows[0];
    const SimulatedRow& strange = result.rows[1];
    EXPECT_GT(strange.failed_questions, 0) << failure;
    EXPECT_THAT(strange.first_failure, testing::StartsWith(failure));
    EXPECT_THAT(PolicyTable(result), HasSubstr(strange.first_failure));
    EXPECT_EQ(strange.ToJson()["failed_questions"], strange.failed_questions);
    EXPECT_EQ(demand.ToJson().count("failed_questions"), 0u);
    if (StrangePredictor::Answers(mode)) continue;
    EXPECT_EQ(strange.bytes_wasted + strange.bytes_late, 0u) << failure;
    EXPECT_EQ(strange.bytes_useful, demand.bytes_useful) << failure;
  }
}

}  // namespace
}  // namespace routecast
