#include "evaluator/prefetch_simulation.h"

#include <gtest/gtest.h>

#include "common/random.h"

namespace routecast {
namespace {

constexpr double kTransfer = 0.010;  // seconds an expert
const MoeGeometry kGeometry{0, 3, 8, 1, 16};

SimulatedLinkOptions Link() {
  SimulatedLinkOptions link;
  link.expert_bytes = 1 << 20;
  link.chunk_bytes = 1 << 18;
  link.bytes_per_second = (1 << 20) / kTransfer;
  return link;
}

PlannerOptions Planner(const std::string& policy) {
  PlannerOptions options;
  options.expert_bytes = 1 << 20;
  options.link_bytes_per_second = (1 << 20) / kTransfer;
  options.engine_can_cancel = true;
  options.policy = ParsePolicy(policy);
  return options;
}

// 200 visits, 8 ms of work around each and 1 ms in the expert; the next two are foretold.
std::vector<SimulatedVisit> Visits(double gap) {
  std::vector<SimulatedVisit> visits(200);
  for (size_t i = 0; i < visits.size(); ++i) {
    visits[i].layer = static_cast<int>(i % 3);
    visits[i].experts = {static_cast<int>(ToRange(Mix(i, 3), 8))};
    visits[i].seconds_before = gap;
    visits[i].seconds_expert = 0.001;
  }
  for (size_t i = 0; i < visits.size(); ++i) {
    for (size_t d = 1; d <= 2 && i + d < visits.size(); ++d) {
      LayerForecast forecast{visits[i + d].layer, static_cast<int>(d),
                             std::vector<float>(8, 0.f)};
      forecast.probabilities[static_cast<size_t>(visits[i + d].experts[0])] = 1;
      visits[i].at_layer.push_back(forecast);
    }
  }
  return visits;
}

TEST(PrefetchSimulationTest, OnDemandWaitsATransferAMiss) {
  const auto visits = Visits(0.008);
  const auto r = SimulatePrefetch(kGeometry, 6, Eviction::kLru, Planner("on_demand"),
                                  Link(), visits, 0);
  const double misses = static_cast<double>(r.ledger.uses - r.ledger.hits);
  EXPECT_EQ(r.ledger.uses, 200u);
  EXPECT_GT(misses, 50);
  EXPECT_NEAR(r.stall_seconds, misses * kTransfer, 1e-9);
  EXPECT_NEAR(r.seconds, 200 * 0.009 + r.stall_seconds, 1e-9);
  EXPECT_NEAR(r.link_seconds, misses * kTransfer, 1e-9);
}

TEST(PrefetchSimulationTest, AKnownFutureHidesEveryTransferThatFits) {
  const auto r = SimulatePrefetch(kGeometry, 6, Eviction::kLru, Planner("auto"), Link(),
                                  Visits(0.012), 10);
  EXPECT_NEAR(r.stall_seconds, 0, 1e-9);
  EXPECT_EQ(r.stalls.size(), 190u);
}

TEST(PrefetchSimulationTest, ASlowLinkLeavesWaiting) {
  const auto quick = Visits(0.002);
  const auto ahead =
      SimulatePrefetch(kGeometry, 6, Eviction::kLru, Planner("auto"), Link(), quick, 10);
  const auto demand = SimulatePrefetch(kGeometry, 6, Eviction::kLru, Planner("on_demand"),
                                       Link(), quick, 10);
  EXPECT_GT(ahead.stall_seconds, 0.1);
  EXPECT_LT(ahead.stall_seconds, demand.stall_seconds);
  EXPECT_GE(ahead.seconds, ahead.link_seconds - 0.1);
}

TEST(PrefetchSimulationTest, TheTimeOfAskingCounts) {
  auto visits = Visits(0.012);
  for (SimulatedVisit& visit : visits) visit.seconds_predict = 0.002;
  const auto r =
      SimulatePrefetch(kGeometry, 6, Eviction::kLru, Planner("auto"), Link(), visits, 0);
  EXPECT_GE(r.seconds, 198 * 0.015);
}

}  // namespace
}  // namespace routecast
