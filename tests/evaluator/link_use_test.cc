#include "evaluator/link_use.h"

#include "gtest/gtest.h"

namespace routecast {
namespace {

// Visits of a second, of which transfers have the link for `busy` seconds.
void Visits(LinkUse* use, Stack stack, int visits, double busy, double* now) {
  for (int i = 0; i < visits; ++i) {
    use->BeginVisit(stack, *now);
    use->Moved(*now, *now + busy);
    *now += 1;
  }
}

TEST(LinkUseTest, ALinkCountsAsBusyUntilThereIsEvidence) {
  LinkUse use;
  EXPECT_DOUBLE_EQ(use.Share(Stack::kDecoder), 1);
  double now = 5;
  Visits(&use, Stack::kDecoder, 2, 0, &now);
  EXPECT_GT(use.Share(Stack::kDecoder), 0.8);
}

TEST(LinkUseTest, TheShareIsThatOfTheTimeThatTransfersHad) {
  LinkUse use;
  double now = 0;
  Visits(&use, Stack::kDecoder, 1000, 0.25, &now);
  EXPECT_NEAR(use.Share(Stack::kDecoder), 0.25, 0.07);
  Visits(&use, Stack::kDecoder, 1000, 0.9, &now);
  EXPECT_NEAR(use.Share(Stack::kDecoder), 0.9, 0.02);
}

TEST(LinkUseTest, EachStackHasItsOwn) {
  LinkUse use;
  double now = 0;
  for (int i = 0; i < 100; ++i) {
    Visits(&use, Stack::kEncoder, 10, 1, &now);
    Visits(&use, Stack::kDecoder, 10, 0, &now);
  }
  EXPECT_GT(use.Share(Stack::kEncoder), 0.95);
  EXPECT_LT(use.Share(Stack::kDecoder), 0.1);
}

TEST(LinkUseTest, TheTimeInWhichTheModelRestsIsNotCounted) {
  LinkUse use;
  double now = 0;
  for (int i = 0; i < 300; ++i) {
    Visits(&use, Stack::kDecoder, 10, 0.5, &now);
    const double began =
        now - 0.25;  // a transfer that ends in the pause, then a long one
    use.BeginPass(now + 50, /*rested=*/true);
    now += 50;
    use.Moved(began, now);
  }
  EXPECT_NEAR(use.Share(Stack::kDecoder), 0.5, 0.06);
}

}  // namespace
}  // namespace routecast
