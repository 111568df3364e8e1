#include "storage/subset.h"

#include <algorithm>
#include <cmath>
#include <set>

#include "common/errors.h"
#include "common/random.h"
#include "storage/merge.h"
#include "storage/verify.h"
#include "tests/storage/store_fixture.h"

namespace routecast {
namespace {

class SubsetTest : public TraceStoreTest {
 protected:
  fs::path At(const std::string& name) const { return folder_.path() / name; }
  static std::vector<RoutingTrace> Read(const fs::path& store) {
    std::vector<RoutingTrace> traces;
    TraceReader(store).Scan([&](RoutingTrace&& t) { traces.push_back(std::move(t)); },
                            WithHidden::kYes);
    return traces;
  }
};

TEST_F(SubsetTest, HoldsTheDrawnGroupsWholeAndUnchanged) {
  Fill();
  const SubsetOptions options{.share = 0.5, .seed = 3};
  std::vector<RoutingTrace> expected;
  for (auto& [id, trace] : All()) {
    if (InSubset(trace.group_id, options)) expected.push_back(trace);
  }
  EXPECT_LT(expected.size(), All().size());
  EXPECT_EQ(SubsetStore(store(), At("s"), options), expected.size());
  EXPECT_EQ(Read(At("s")), expected);
}

TEST_F(SubsetTest, TheResultIsSound) {
  Fill();
  SubsetStore(store(), At("s"), {.share = 0.5});
  const VerifyReport report = VerifyStore(At("s"));
  EXPECT_TRUE(report.sound()) << report.problems.at(0);
  EXPECT_TRUE(TraceReader(At("s")).complete());
}

TEST_F(SubsetTest, TheWholeIsTheStore) {
  Fill();
  EXPECT_EQ(SubsetStore(store(), At("s"), {.share = 1}), All().size());
}

TEST(InSubsetTest, SharesAreNested) {
  for (uint64_t group = 0; group < 5000; ++group) {
    if (!InSubset(Mix(group), {.share = 0.1, .seed = 7})) continue;
    ASSERT_TRUE(InSubset(Mix(group), {.share = 0.2, .seed = 7}));
  }
}

TEST(InSubsetTest, TheShareIsKept) {
  int drawn = 0;
  for (uint64_t g = 0; g < 20000; ++g) drawn += InSubset(Mix(g), {.share = 0.1});
  EXPECT_NEAR(drawn, 2000, 5 * std::sqrt(20000 * 0.1 * 0.9));
}

TEST(InSubsetTest, SeedsDrawIndependently) {
  int both = 0;
  for (uint64_t g = 0; g < 20000; ++g) {
    both += InSubset(Mix(g), {.share = 0.3, .seed = 1}) &&
            InSubset(Mix(g), {.share = 0.3, .seed = 2});
  }
  EXPECT_NEAR(both, 1800, 5 * std::sqrt(20000 * 0.09 * 0.91));
}

// A subset must not be drawn from one part of the split alone.
TEST(InSubsetTest, TheDrawDoesNotFollowTheSplit) {
  int drawn = 0, test = 0;
  for (uint64_t g = 0; g < 20000; ++g) {
    if (!InSubset(Mix(g), {.share = 0.3})) continue;
    ++drawn;
    test += SplitOf(Mix(g)) == SplitPart::kTest;
  }
  EXPECT_NEAR(test, 0.3 * drawn, 5 * std::sqrt(drawn * 0.3 * 0.7));
}

TEST_F(SubsetTest, TwoSubsetsMergeToTheLarger) {
  Fill();
  SubsetStore(store(), At("small"), {.share = 0.4});
  SubsetStore(store(), At("large"), {.share = 0.7});
  MergeStores({At("small"), At("large")}, At("merged"), {});
  EXPECT_EQ(Read(At("merged")), Read(At("large")));
}

TEST_F(SubsetTest, RoutersAreCopied) {
  Fill();
  WriteFileAtomic(store() / "routers.safetensors", "weights");
  SubsetStore(store(), At("s"), {.share = 0.5});
  EXPECT_EQ(ReadFile(At("s") / "routers.safetensors"), "weights");
}

TEST_F(SubsetTest, AnEmptyDrawIsRefused) {
  Fill();
  EXPECT_THROW(SubsetStore(store(), At("s"), {.share = 1e-9}), UsageError);
  EXPECT_FALSE(fs::exists(At("s")));
}

TEST_F(SubsetTest, SharesOutsideTheirRangeAreRefused) {
  Fill();
  for (const double share : {0.0, -1.0, 1.5, std::nan("")}) {
    EXPECT_THROW(SubsetStore(store(), At("s"), {.share = share}), UsageError) << share;
  }
}

TEST_F(SubsetTest, AnUnfinishedStoreIsRefused) {
  Fill(kChunks - 1);
  EXPECT_THROW(SubsetStore(store(), At("s"), {.share = 0.5}), UsageError);
}

}  // namespace
}  // namespace routecast
