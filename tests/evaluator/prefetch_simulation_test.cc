#include "evaluator/prefetch_simulation.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

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

TEST(PrefetchSimulationTest, TheFixedCostIsPaidOnceATransferHoweverManyChunksItHas) {
  SimulatedLinkOptions link = Link();
  link.fixed_seconds = 0.002;
  const auto r = SimulatePrefetch(kGeometry, 6, Eviction::kLru, Planner("on_demand"),
                                  link, Visits(0.008), 0);
  const double misses = static_cast<double>(r.ledger.uses - r.ledger.hits);
  EXPECT_NEAR(r.stall_seconds, misses * (kTransfer + 0.002), 1e-9);
}

TEST(PrefetchSimulationTest, AKnownFutureHidesEveryTransferThatFits) {
  const auto r = SimulatePrefetch(kGeometry, 6, Eviction::kLru, Planner("auto"), Link(),
                                  Visits(0.012), 10);
  EXPECT_NEAR(r.stall_seconds, 0, 1e-9);
  EXPECT_EQ(r.stalls.size(), 190u);
  EXPECT_EQ(r.ledger.uses, 190u);
  EXPECT_NEAR(r.seconds, 190 * 0.013, 1e-9);
}

// Told when the experts are computed, or when the next pass begins: either way before the
// work that hides the transfer.
TEST(PrefetchSimulationTest, WhatIsToldAroundAPassIsHeeded) {
  const auto run = [](const std::vector<SimulatedVisit>& visits) {
    const auto r = SimulatePrefetch(kGeometry, 6, Eviction::kLru, Planner("auto"), Link(),
                                    visits, 10);
    EXPECT_NEAR(r.stall_seconds, 0, 1e-9);
    EXPECT_NEAR(r.seconds, 190 * 0.013, 1e-9);
  };
  auto at_end = Visits(0.012);
  for (SimulatedVisit& visit : at_end) visit.at_pass_end.swap(visit.at_layer);
  run(at_end);
  auto at_begin = Visits(0.012);
  for (size_t i = at_begin.size() - 1; i > 0; --i) {
    at_begin[i].at_pass_begin.swap(at_begin[i - 1].at_layer);
    at_begin[i].begins_pass = true;
    std::swap(at_begin[i].seconds_before, at_begin[i].seconds_in_pass);
  }
  at_begin.back().at_layer.clear();
  run(at_begin);
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
  EXPECT_NEAR(r.question_seconds, 199 * 0.002, 1e-9);  // the last visit is told nothing
  const auto counted = SimulatePrefetch(kGeometry, 6, Eviction::kLru, Planner("auto"),
                                        Link(), visits, 100);
  EXPECT_NEAR(counted.question_seconds, 99 * 0.002, 1e-9);
  const auto demand = SimulatePrefetch(kGeometry, 6, Eviction::kLru, Planner("on_demand"),
                                       Link(), visits, 0);
  EXPECT_EQ(demand.question_seconds, 0);
}

TEST(PrefetchSimulationTest, AWarmStartHoldsTheMostUsedOfTheLayersThatRun) {
  const MoeGeometry g{1, 3, 8, 1, 16};  // an encoder that never runs
  auto visits = Visits(0.008);
  for (SimulatedVisit& visit : visits) {
    ++visit.layer;
    visit.experts = {0};
  }
  std::vector<uint64_t> counts(32, 1);
  counts[0] = 1000;  // the encoder's
  for (const size_t layer : {1, 2, 3}) counts[8 * layer] = 100;
  const UseShares shares = SharesOf(counts, g, "test");
  const auto run = [&](const UseShares* warm) {
    return SimulatePrefetch(g, 3, Eviction::kLru, Planner("on_demand"), Link(), visits, 0,
                            warm);
  };
  EXPECT_NEAR(run(nullptr).stall_seconds, 3 * kTransfer, 1e-9);
  EXPECT_EQ(run(&shares).stall_seconds, 0);
  EXPECT_EQ(run(&shares).ledger.bytes_moved(), 0u);
}

// Random work: several experts a visit, encoder and decoder passes, questions that cost
// time, forecasts of which some are wrong and some are no probabilities.
std::vector<SimulatedVisit> RandomVisits(const MoeGeometry& g, uint64_t seed) {
  const auto experts_at = [&](uint64_t visit) {
    std::vector<int> experts;
    for (uint64_t i = 0; i <= ToRange(Mix(seed, visit, 1), 3); ++i) {
      const double u = ToUnit(Mix(seed, visit, 2, i));
      const int expert = static_cast<int>(u * u * g.num_experts);
      if (std::count(experts.begin(), experts.end(), expert) == 0) {
        experts.push_back(expert);
      }
    }
    return experts;
  };
  const auto layers = static_cast<uint64_t>(g.num_layers());
  const auto told = [&](uint64_t i, uint64_t what) {
    std::vector<LayerForecast> forecasts;
    for (uint64_t lead = 1; lead <= ToRange(Mix(seed, i, 3, what), 6); ++lead) {
      LayerForecast forecast{
          static_cast<int>((i + lead) % layers), static_cast<int>(lead), {}};
      for (uint64_t e = 0; e < static_cast<uint64_t>(g.num_experts); ++e) {
        const double u = ToUnit(Mix(seed, i, 4 + what, lead, e));
        forecast.probabilities.push_back(static_cast<float>(u * u * u * u * 0.3));
      }
      const bool right = ToUnit(Mix(seed, i, 5, lead)) < 0.8;
      for (int e : experts_at(right ? i + lead : i))
        forecast.probabilities[static_cast<size_t>(e)] +=
            0.1f + 0.6f * static_cast<float>(ToUnit(Mix(seed, i, lead, e)));
      const float nonsense[] = {std::nanf(""), -1, 7, 0.5f};
      if (Mix(seed, i, 6) % 4 == 0)
        forecast.probabilities[0] = nonsense[Mix(seed, i, 7) % 4];
      forecasts.push_back(std::move(forecast));
    }
    return forecasts;
  };
  std::vector<SimulatedVisit> visits(250);
  for (uint64_t i = 0; i < visits.size(); ++i) {
    SimulatedVisit& visit = visits[i];
    visit.layer = static_cast<int>(i % layers);
    visit.experts = experts_at(i);
    visit.seconds_before = 0.004 * ToUnit(Mix(seed, i, 8));
    visit.begins_pass = visit.layer == 0;
    visit.seconds_in_pass = visit.begins_pass ? 0.002 : 0;
    visit.seconds_expert = 0.001;
    visit.seconds_predict = 0.0002;
    if (visit.begins_pass) visit.at_pass_begin = told(i - 1, 10);
    if (i % 7 != 3) visit.at_layer = told(i, 20);
    if (visit.layer + 1 == g.num_layers()) visit.at_pass_end = told(i, 30);
  }
  return visits;
}

// Everything that a ledger counts, and what was waited in whole microseconds.
uint64_t Fingerprint(const SimulationResult& r) {
  const TransferLedger& l = r.ledger;
  return Mix(l.uses, l.hits, l.bytes_useful, l.bytes_late, l.bytes_wasted, l.speculations,
             l.speculations_used, l.speculations_in_time, l.speculations_unused,
             std::llround(r.stall_seconds * 1e6));
}

struct PinnedDecisions {
  std::string policy;
  uint64_t phase_aware, others;  // by eviction
  bool limited = true;           // by its pressure limit
};

// What is made faster must not decide otherwise: every policy and eviction rule, links
// that cancel and links that do not.
TEST(PrefetchSimulationTest, DecisionsStayWhatTheyWere) {
  const std::vector<PinnedDecisions> pinned = {
      {"on_demand", 14556351193717003112u, 5215880253049396787u},
      {"multi_look", 13011014739334089492u, 8932422351212202368u},
      {"top_k", 4504008360201117703u, 9945243435450569878u},
      {"intelligent", 15162152781345988065u, 3549268656767090167u, false},
      {"confident", 1600877594127843372u, 7697037165092585072u},
      {"auto", 10470801327519497454u, 9545874228095406660u},
      {"intelligent", 15162152781345988065u, 2362613318294570559u},
      {"adaptive_top_k", 12619137304677590018u, 15871055973430159081u},
      {"memory_manager", 5540809604273155389u, 8180356486733039941u}};
  const MoeGeometry g{2, 3, 24, 1, 16};
  for (const auto& [policy, phase_aware, others, limited] : pinned) {
    uint64_t found = 0, found_phase_aware = 0;
    for (uint64_t seed = 0; seed < 24; ++seed) {
      PlannerOptions planner = Planner(policy);
      if (!limited) planner.policy.pressure_limit = 1;
      SimulatedLinkOptions link = Link();
      link.bytes_per_second *= static_cast<double>(1 + seed % 3);
      link.can_cancel = planner.engine_can_cancel = seed % 4 != 0;
      planner.late_allowance = seed % 4 != 0 ? 0.95 : 0;
      const auto eviction = static_cast<Eviction>(seed % 6);
      const int slots = 4 + static_cast<int>(seed * 5 % 60);
      const auto r =
          SimulatePrefetch(g, slots, eviction, planner, link, RandomVisits(g, seed), 50);
      uint64_t& all = eviction == Eviction::kPhaseAware ? found_phase_aware : found;
      all = Mix(all, Fingerprint(r));
    }
    EXPECT_EQ(found, others) << policy;
    EXPECT_EQ(found_phase_aware, phase_aware) << policy;
  }
}

}  // namespace
}  // namespace routecast
