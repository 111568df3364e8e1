// What the published settings decide: the memory manager's regimes, counts and eagerness,
// the limit of pressure, the band of an adaptive k, the presets of devices.
#include "evaluator/memory_manager.h"

#include "evaluator/device_presets.h"
#include "gtest/gtest.h"
#include "tests/evaluator/planner_rig.h"

namespace routecast {
namespace {

TEST(MemoryManagerTest, TheRegimeFollowsFromFourFifthsOfTheSlots) {
  MemoryManager manager(8, 4, 1);
  const auto regime = [&](int slots) {
    manager.SetSlots(slots);
    return manager.regime();
  };
  EXPECT_EQ(regime(10), MemoryRegime::kDoubleBuffer);
  EXPECT_EQ(manager.max_lead(), 2);
  EXPECT_EQ(regime(9), MemoryRegime::kSingle);
  EXPECT_EQ(regime(5), MemoryRegime::kSingle);
  EXPECT_EQ(manager.max_lead(), 1);
  EXPECT_EQ(regime(4), MemoryRegime::kStreaming);
  EXPECT_EQ(regime(3), MemoryRegime::kStreaming);
  EXPECT_EQ(regime(2), MemoryRegime::kHost);
  EXPECT_EQ(manager.max_lead(), 0);
}

TEST(MemoryManagerTest, TheCountFollowsFromConfidence) {
  MemoryManager manager(8, 6, 0.7);
  manager.SetSlots(16);
  EXPECT_EQ(manager.PrefetchCount(0.49), 0);
  EXPECT_EQ(manager.PrefetchCount(0.5), 2);
  EXPECT_EQ(manager.PrefetchCount(0.9), 3);
  EXPECT_EQ(manager.PrefetchCount(1), 4);
  manager.SetSlots(4);
  EXPECT_EQ(manager.PrefetchCount(1), 1) << "streaming";
  manager.SetSlots(2);
  EXPECT_EQ(manager.PrefetchCount(1), 0) << "host";
}

TEST(MemoryManagerTest, SlowLoadsMakeItLessEagerAndFastOnesMore) {
  MemoryManager manager(8, 10, 0.7);
  const auto load = [&](int times, double seconds) {
    for (int i = 0; i < times; ++i) manager.Loaded(seconds);
    return manager.aggressiveness();
  };
  EXPECT_EQ(load(99, 0.02), 0.7) << "the mean is of a hundred";
  EXPECT_NEAR(load(1, 0.02), 0.63, 1e-12);
  EXPECT_NEAR(load(100, 0.007), 0.63, 1e-12);
  EXPECT_NEAR(load(100, 0.001), 0.693, 1e-12);
  EXPECT_EQ(load(1000, 0.001), 1);
  EXPECT_EQ(load(10'000, 0.02), 0.1);
}

TEST(DevicePresetTest, GoesByNameThenByMemory) {
  const auto preset = [](const std::string& name, uint64_t gigabytes) {
    const DevicePreset p = PublishedPreset(name, gigabytes * 1'000'000'000);
    char text[80];
    std::snprintf(text, sizeof text, "%d/%.1f/%s/%d", p.most_experts, p.aggressiveness,
                  p.compression.c_str(), p.batch);
    return std::string(text);
  };
  EXPECT_EQ(preset("NVIDIA GeForce RTX 3090", 24), "6/0.7/int8/8");
  EXPECT_EQ(preset("rtx3090", 24), "6/0.7/int8/8");
  EXPECT_EQ(preset("Jetson AGX", 32), "4/0.9/int4/4");
  EXPECT_EQ(preset("NVIDIA A100-SXM4", 40), "16/0.5/none/32");
  EXPECT_EQ(preset("NVIDIA RTX A6000", 48), "8/0.6/int8/16");
  EXPECT_EQ(preset("NVIDIA RTX 3080", 12), "4/0.6/int8/8");
  EXPECT_EQ(preset("NVIDIA RTX 2060", 6), "2/0.6/int4/4");
  EXPECT_EQ(preset("cpu", 0), "2/0.8/int8/2");
}

constexpr MoeGeometry kEight{0, 2, 8, 1, 8};

SpeculationPolicy Managed(int most) {
  SpeculationPolicy policy = ParsePolicy("memory_manager");
  policy.most_experts = most;
  policy.aggressiveness = 1;
  return policy;
}

// Speculations for a visit of layer 1 so far ahead, whose likeliest expert has `p`.
size_t Fetched(int slots, int distance, float p) {
  Rig rig(slots, Managed(4), true, 1, kEight);
  rig.Layer(0, {0});
  const size_t demands = rig.started.size();
  rig.Predict(1, distance, {p, 0.4f, 0.3f, 0.2f, 0.1f, 0.1f, 0.1f, 0.1f});
  rig.link.AdvanceTo(rig.clock.Now() + 20);
  return rig.started.size() - demands;
}

TEST(MemoryManagerTest, ThePlannerFetchesAsManyAsItSays) {
  EXPECT_EQ(Fetched(10, 1, 0.8f), 3u);  // floor(4 * 0.8)
  EXPECT_EQ(Fetched(10, 2, 0.8f), 3u) << "both buffers";
  EXPECT_EQ(Fetched(6, 1, 0.8f), 3u);
  EXPECT_EQ(Fetched(6, 2, 0.8f), 0u) << "one buffer";
  EXPECT_EQ(Fetched(4, 1, 0.8f), 1u) << "streaming";
  EXPECT_EQ(Fetched(2, 1, 0.8f), 0u);
  EXPECT_EQ(Fetched(10, 1, 0.45f), 0u) << "not sure enough";
}

// Of two experts a token the visit is as sure as the two likeliest together, and twice as
// many are fetched.
TEST(MemoryManagerTest, OfSeveralExpertsATokenTheSetsConfidenceCounts) {
  const auto fetched = [](float first, float second) {
    Rig rig(12, Managed(2), true, 1, {0, 2, 8, 2, 8});
    rig.Layer(0, {0, 1});
    const size_t demands = rig.started.size();
    rig.Predict(1, 1, {first, second, 0.04f, 0.04f, 0.04f, 0.04f, 0.04f, 0.04f});
    rig.link.AdvanceTo(rig.clock.Now() + 20);
    return rig.started.size() - demands;
  };
  EXPECT_EQ(fetched(0.9f, 0.7f), 3u);  // floor(4 * 0.8)
  EXPECT_EQ(fetched(1, 1), 4u);
  EXPECT_EQ(fetched(0.9f, 0.05f), 0u) << "half of the set is not known";
}

TEST(MemoryManagerTest, SlotsThatLeaveServiceChangeTheRegime) {
  Rig rig(10, Managed(4), true, 1, kEight);
  EXPECT_EQ(rig.planner.memory_manager()->regime(), MemoryRegime::kDoubleBuffer);
  rig.planner.SetCapacity(3);
  EXPECT_EQ(rig.planner.memory_manager()->regime(), MemoryRegime::kStreaming);
}

TEST(MemoryManagerTest, ThePlannerTellsItHowLongLoadsTake) {
  Rig rig(2, Managed(4), true, 1, kEight);  // a second a load
  for (int i = 0; i < 100; ++i) rig.Layer(i % 2, {(i / 2) % 8});
  EXPECT_NEAR(rig.planner.memory_manager()->aggressiveness(), 0.9, 1e-12);
}

// Of five slots four may be spoken for.
TEST(PressureTest, SpeculationStopsWhereTooFewSlotsWouldBeLeft) {
  const auto fetched = [](double limit) {
    SpeculationPolicy policy = Eager();
    policy.pressure_limit = limit;
    Rig rig(5, policy, true, 1, kEight);
    rig.Layer(0, {0});
    const size_t demands = rig.started.size();
    rig.Predict(1, 1, std::vector<float>(8, 0.9f));
    rig.link.AdvanceTo(rig.clock.Now() + 20);
    return rig.started.size() - demands;
  };
  EXPECT_EQ(fetched(1), 5u);
  EXPECT_EQ(fetched(0.8), 4u);
  EXPECT_EQ(fetched(0.5), 2u);
}

TEST(PressureTest, WhatIsUsedMakesRoomForMore) {
  SpeculationPolicy policy = Eager();
  policy.pressure_limit = 0.4;  // of five: two
  Rig rig(5, policy, true, 1, kEight);
  rig.Layer(0, {0});
  rig.Predict(1, 1, {0.9f, 0.9f, 0.9f, 0.9f, 0, 0, 0, 0});
  rig.link.AdvanceTo(rig.clock.Now() + 20);
  EXPECT_EQ(rig.started.size(), 3u);
  rig.Layer(1, {0, 1});
  rig.Predict(0, 1, {0, 0.9f, 0.9f, 0.9f, 0, 0, 0, 0});
  rig.link.AdvanceTo(rig.clock.Now() + 20);
  EXPECT_EQ(rig.started.size(), 5u);
}

TEST(PressureTest, IsThePublishedLimitOfTheIntelligentPolicy) {
  EXPECT_EQ(ParsePolicy("intelligent").pressure_limit, 0.8);
  EXPECT_EQ(ParsePolicy("auto").pressure_limit, 1);
}

// Counts of candidates are for each expert that a token takes, and never more than half
// of the experts where they adapt.
TEST(TopKTest, IsForEachExpertOfAToken) {
  const auto fetched = [](int chosen) {
    SpeculationPolicy policy = Eager();
    policy.top_k = 2;
    Rig rig(16, policy, true, 1, {0, 2, 8, chosen, 8});
    rig.Layer(0, {0});
    const size_t demands = rig.started.size();
    rig.Predict(1, 1, std::vector<float>(8, 0.9f));
    rig.link.AdvanceTo(rig.clock.Now() + 20);
    return rig.started.size() - demands;
  };
  EXPECT_EQ(fetched(1), 2u);
  EXPECT_EQ(fetched(3), 6u);
  EXPECT_EQ(fetched(5), 8u) << "there are no more";
  Rig banded(2, ParsePolicy("adaptive_top_k"), true, 1, {0, 1, 128, 4, 8});
  EXPECT_EQ(banded.planner.top_k(), 16) << "64 candidates: half of the experts";
}

TEST(AdaptiveTopKTest, MovesByTheBandOfItsWindow) {
  Rig rig(2, ParsePolicy("adaptive_top_k"), true, 1, {0, 1, 128, 1, 8});
  EXPECT_EQ(rig.planner.top_k(), 32);
  // A hundred uses, of which the first `misses` bring another expert than the one before.
  int expert = 0;
  const auto window = [&](int misses) {
    for (int i = 0; i < 100; ++i) {
      if (i < misses) expert = (expert + 1) % 128;
      rig.Layer(0, {expert});
    }
    return rig.planner.top_k();
  };
  EXPECT_EQ(window(1), 30) << "99 % in time";
  EXPECT_EQ(window(5), 30) << "95 %";
  EXPECT_EQ(window(100), 34);
  for (int i = 0; i < 20; ++i) window(100);
  EXPECT_EQ(rig.planner.top_k(), 64) << "half of the experts";
  for (int i = 0; i < 60; ++i) window(0);
  EXPECT_EQ(rig.planner.top_k(), 8);
}

}  // namespace
}  // namespace routecast
