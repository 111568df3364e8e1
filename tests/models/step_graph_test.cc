// A step in parts: whatever is recorded of it, every step computes what it says.
#include "models/step_graph.h"

#include <c10/core/CachingDeviceAllocator.h>

#include "models/host_copy.h"
#include "tests/models/device_test.h"

namespace routecast {
namespace {

// out = 2 in + 1: the first part makes what the second one reads.
class StepGraphTest : public DeviceTest {
 protected:
  void SetUp() override {
    DeviceTest::SetUp();
    if (IsSkipped()) return;
    in_ = On(at::zeros({5}));
    out_ = On(at::zeros({5}));
    graph_ = std::make_unique<StepGraph>(device(), 2);
  }
  void First(float value) {
    SendTo(in_, at::full({5}, value));
    graph_->Run([this] { between_ = in_ * 2; }, 0);
  }
  void Second() {
    graph_->Run(
        [this] {
          if (asks_) asked_ = between_[0].item<float>();
          out_.copy_(between_ + 1);
        },
        1);
  }
  void ExpectWholeStep(float value) {
    First(value);
    Second();
    EXPECT_EQ(out_.sum().item<float>(), 5 * (2 * value + 1));
  }

  at::Tensor in_, between_, out_;
  bool asks_ = false;  // what no recording allows
  float asked_ = 0;
  std::unique_ptr<StepGraph> graph_;
};
ROUTECAST_INSTANTIATE_DEVICES(StepGraphTest);

TEST_P(StepGraphTest, EveryStepComputesWhatItsPartsSay) {
  for (int step = 0; step < 6; ++step) ExpectWholeStep(static_cast<float>(step));
  EXPECT_EQ(graph_->recorded(), device().is_cuda());
  EXPECT_EQ(graph_->kept_bytes() > 0, device().is_cuda());
  EXPECT_STREQ(graph_->failure(), "");
}

TEST_P(StepGraphTest, TheMemoryOfRecordingsGoesBack) {
  const auto reserved = [&]() -> int64_t {
    if (device().is_cpu()) return 0;
    return at::getDeviceAllocator(at::kCUDA)->getDeviceStats(0).reserved_bytes[0].current;
  };
  std::vector<int64_t> after;
  for (int made = 0; made < 4; ++made) {
    graph_ = std::make_unique<StepGraph>(device(), 2);
    for (int step = 0; step < 4; ++step) ExpectWholeStep(static_cast<float>(step));
    between_.reset();
    graph_.reset();
    after.push_back(reserved());
  }
  EXPECT_EQ(after.back(), after[1]) << "the first one's warm-up leaves what others use";
}

TEST_P(StepGraphTest, AStepMayEndEarly) {
  for (int ended = 0; ended < 5; ++ended) {
    graph_ = std::make_unique<StepGraph>(device(), 2);
    for (int step = 0; step < 6; ++step) {
      if (step == ended) First(-1);
      ExpectWholeStep(static_cast<float>(step));
    }
    EXPECT_EQ(graph_->recorded(), device().is_cuda()) << ended;
  }
}

TEST_P(StepGraphTest, WhereAPartCannotBeRecordedEveryPartRunsAsItIs) {
  asks_ = true;
  for (int step = 0; step < 6; ++step) {
    ExpectWholeStep(static_cast<float>(step));
    EXPECT_EQ(asked_, static_cast<float>(2 * step));
  }
  EXPECT_FALSE(graph_->recorded());
  EXPECT_EQ(std::string(graph_->failure()).empty(), !device().is_cuda());
  EXPECT_EQ(graph_->kept_bytes(), 0u);
}

}  // namespace
}  // namespace routecast
