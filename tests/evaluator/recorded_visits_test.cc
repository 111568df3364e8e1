// Recorded routing of models that take several experts a token, without token ids, as
// imports bring it: what a simulation plays.
#include "evaluator/recorded_visits.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include "common/errors.h"
#include "common/files.h"
#include "common/random.h"
#include "common/run_record.h"
#include "evaluator/policy_simulation.h"
#include "storage/import.h"

namespace routecast {
namespace {

using testing::ElementsAre;

// Two decoder layers of three tokens that take two of four experts.
RoutingTrace Trace() {
  RoutingTrace trace;
  RoutingSpan& span = trace.decoder;
  span.num_tokens = 3;
  span.num_layers = 2;
  span.expert_ids = {3, 0, 2, 1, 1, 0};
  span.top_k = 2;
  span.topk_ids = {3, 1, 0, 2, 2, 3, 1, 0, 1, 3, 0, 1};
  return trace;
}
constexpr MoeGeometry kGeometry{0, 2, 4, 2, 8};

TEST(RecordedVisitsTest, AVisitNeedsEveryExpertOfItsToken) {
  std::vector<SimulatedVisit> visits;
  AppendVisits(Trace(), kGeometry, 2, {}, nullptr, &visits);
  ASSERT_EQ(visits.size(), 4u);  // two tokens of two layers
  EXPECT_THAT(visits[0].experts, ElementsAre(1, 3));
  EXPECT_THAT(visits[1].experts, ElementsAre(0, 1));
  EXPECT_THAT(visits[2].experts, ElementsAre(0, 2));
  EXPECT_THAT(visits[3].experts, ElementsAre(1, 3));
  EXPECT_EQ(visits[3].layer, 1);
  EXPECT_TRUE(visits[2].begins_pass);
}

TEST(RecordedVisitsTest, OfMoreChoicesThanTheModelTakesTheFirstCount) {
  RoutingTrace trace = Trace();
  MoeGeometry one = kGeometry;
  one.experts_per_token = 1;
  EXPECT_THAT(ChoicesOf(trace.decoder, one, 1, 2), ElementsAre(0));
  RoutingSpan& span = trace.decoder;  // three are recorded of each
  span.top_k = 3;
  span.topk_ids = {3, 1, 0, 0, 2, 1, 2, 3, 1, 1, 0, 2, 1, 3, 0, 0, 1, 2};
  EXPECT_THAT(ChoicesOf(span, kGeometry, 0, 1), ElementsAre(0, 2));
  EXPECT_THAT(ChoicesOf(span, kGeometry, 1, 2), ElementsAre(0, 1));
}

TEST(RecordedVisitsTest, ATraceThatLacksChoicesIsBadData) {
  RoutingTrace trace = Trace();
  trace.decoder.topk_ids.clear();
  trace.decoder.top_k = 0;
  std::vector<SimulatedVisit> visits;
  EXPECT_THROW(AppendVisits(trace, kGeometry, 2, {}, nullptr, &visits), DataError);
  MoeGeometry four = kGeometry;
  four.experts_per_token = 4;
  EXPECT_THROW(ChoicesOf(Trace().decoder, four, 0, 0), DataError);
}

// Six of sixteen experts a token; whoever knows the future has all of them there in time
// where the link is fast enough.
TEST(RecordedVisitsTest, AnOracleForetellsEveryExpertOfAToken) {
  const fs::path folder = fs::path(testing::TempDir()) /
                          ("recorded_visits_test." + std::to_string(::getpid()));
  fs::create_directories(folder);
  std::string lines;
  for (uint64_t request = 0; request < 40; ++request) {
    Json routing = Json::array();
    for (uint64_t token = 0; token < 6; ++token) {
      Json layers = Json::array();
      for (uint64_t layer = 0; layer < 2; ++layer) {
        const uint64_t first = Mix(request, token, layer) % 16;
        Json experts = Json::array();
        for (uint64_t k = 0; k < 6; ++k) experts.push_back((first + 3 * k) % 16);
        layers.push_back(experts);
      }
      routing.push_back(layers);
    }
    lines += Json{{"routing", routing}}.dump() + "\n";
  }
  WriteFileAtomic(folder / "in.jsonl", lines);
  ImportTraces(folder / "in.jsonl", folder / "store",
               {.format = "jsonl", .num_experts = 16});
  DeviceProfile profile;
  profile.link_bytes_per_second = 1e15;
  profile.memory_bytes_per_second = 1e11;
  PolicySimulationOptions options;
  options.budget_shares = {0.75};
  const auto result = SimulatePolicies(TraceReader(folder / "store", NeedTokens::kNo), {},
                                       profile, options);
  fs::remove_all(folder);
  ASSERT_EQ(result.rows.size(), 3u);
  EXPECT_LT(result.rows[0].hit_rate, 0.99);
  EXPECT_EQ(result.rows[1].predictor, "oracle");
  EXPECT_GT(result.rows[1].hit_rate, 0.999);
}

}  // namespace
}  // namespace routecast
