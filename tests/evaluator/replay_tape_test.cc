// A replay shows an observer the recorded model's states, never the synthetic one's.
#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include "evaluator/replay.h"
#include "tests/models/speculation_test_support.h"

namespace routecast {
namespace {

class LastPass : public RoutingObserver {
 public:
  void OnPassBegin(const PassInfo&) override {}
  void OnRouting(const LayerRouting&) override {}
  void OnPassEnd(const PassInfo& pass) override { seen = pass; }
  PassInfo seen;
};

PassInfo Step(int64_t position) {
  PassInfo pass;
  pass.stack = Stack::kDecoder;
  pass.token_ids_BT = at::zeros({1, 1}, at::kLong);
  pass.valid_BT = at::ones({1, 1}, at::kBool);
  pass.first_position = static_cast<int>(position);
  return pass;
}

at::Tensor SeenAt(ReplayTape* tape, LastPass* last, int64_t position) {
  PassInfo pass = Step(position);
  tape->OnPassBegin(pass);
  pass.output_BTD = at::full({1, 1, 768}, 9.f);  // the synthetic model's
  tape->OnPassEnd(pass);
  return last->seen.output_BTD;
}

TEST(ReplayTapeTest, ShowsTheRecordedOutputOfEachStep) {
  const RoutingTrace trace = RandomTrace(SmallGeometry(), 4, 5, 1);
  ReplayTape tape(SmallGeometry());
  LastPass last;
  tape.SetInner(&last);
  tape.Load(Stack::kDecoder, {&trace.decoder}, 5);
  const at::Tensor recorded =
      WindowOf(trace, Stack::kDecoder, SmallGeometry().decoder_layers - 1, 5).output_BTD;
  for (int64_t t = 0; t < 5; ++t) {
    EXPECT_TRUE(at::equal(SeenAt(&tape, &last, t), recorded.narrow(1, t, 1))) << t;
  }
}

TEST(ReplayTapeTest, ShowsNoOutputWhereNoneWasRecorded) {
  RoutingTrace trace = RandomTrace(SmallGeometry(), 4, 5, 1);
  trace.decoder.output.clear();
  ReplayTape tape(SmallGeometry());
  LastPass last;
  tape.SetInner(&last);
  tape.Load(Stack::kDecoder, {&trace.decoder}, 5);
  EXPECT_FALSE(SeenAt(&tape, &last, 0).defined());
}

}  // namespace
}  // namespace routecast
