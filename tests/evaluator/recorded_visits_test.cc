// Recorded routing of models that take several experts a token, without token ids, as
// imports bring it: what a simulation plays.
#include "evaluator/recorded_visits.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

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
  span.topk_ids = {3, 1, 0, 0, 2, 1, 2, 3, 1, 1, 0, 2, 1, 3, 0, 0, 1, 2};
  EXPECT_THAT(ChoicesOf(span, kGeometry, 0, 1), ElementsAre(0, 2));
  EXPECT_THAT(ChoicesOf(span, kGeometry, 1, 2), ElementsAre(0, 1));
}

}  // namespace
}  // namespace routecast
