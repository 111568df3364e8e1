// Experts in stacks and their grouped products against experts one by one. On a GPU the
// same product is one kernel; here it is the library's loop.
#include "models/expert_stack.h"

#include <unistd.h>

#include "gtest/gtest.h"
#include "tests/models/device_test.h"
#include "tests/models/switch_test_support.h"

namespace routecast {
namespace {

class ExpertStackTest : public DeviceTest {
 protected:
  void SetUp() override {
    DeviceTest::SetUp();
    folder_ = fs::temp_directory_path() / ("expert_stack." + std::to_string(::getpid()));
    fs::create_directories(folder_);
  }
  void TearDown() override { fs::remove_all(folder_); }
  fs::path folder_;
};

TEST_P(ExpertStackTest, AModelOfStacksEqualsOneOfSingleExperts) {
  // On a GPU in the type whose grouped product is a kernel; a tie may fall otherwise
  // there.
  const bool gpu = device().is_cuda();
  const at::ScalarType dtype = gpu ? at::kBFloat16 : at::kFloat;
  const double tolerance = gpu ? 0.1 : 1e-5;
  at::manual_seed(7);
  const at::Tensor ids = at::randint(2, 96, {3, 14}, at::kLong);
  const at::Tensor valid =
      at::arange(14).unsqueeze(0) < at::tensor({14, 9, 5}).unsqueeze(1);
  for (const bool gated : {false, true}) {
    for (const int capacity : {64, 2}) {
      SwitchConfig config = SmallConfig();
      config.is_gated_act = gated;
      config.expert_capacity = capacity;
      const Checkpoint made = RandomCheckpoint(config, 5);
      SaveCheckpoint(folder_, made.config, made.parameters, at::kFloat);
      ResidentModel single(LoadCheckpoint(folder_, dtype, device()));
      ResidentModel stacked(
          LoadCheckpoint(folder_, dtype, device(), ExpertLoading::kStack),
          Grouping::kAlways);
      RoutingLog one, other;
      const at::Tensor expected = single.model().Encode(ids, valid, {&one});
      const at::Tensor found = stacked.model().Encode(ids, valid, {&other});
      EXPECT_TRUE(at::allclose(found, expected, tolerance, tolerance))
          << gated << capacity;
      ASSERT_EQ(one.routings.size(), other.routings.size());
      int64_t dropped = 0;
      for (size_t l = 0; l < one.routings.size(); ++l) {
        if (!gpu) {
          EXPECT_TRUE(
              at::equal(one.routings[l].expert_ids_BT, other.routings[l].expert_ids_BT));
        }
        dropped += one.routings[l].dropped_BT.sum().item<int64_t>();
      }
      EXPECT_EQ(dropped > 0, capacity == 2);
    }
  }
}

// Experts with no row, with one and with many, and rows behind the last expert's.
TEST_P(ExpertStackTest, GroupedRowsEqualTheirExpertsOneByOne) {
  const bool gpu = device().is_cuda();
  const at::ScalarType dtype = gpu ? at::kBFloat16 : at::kFloat;
  const double tolerance = gpu ? 3e-2 : 1e-5;
  at::manual_seed(8);
  const int64_t d = 32, f = 48, ends[] = {0, 0, 1, 34, 34, 40};
  const auto make = [&](at::IntArrayRef shape) {
    return On((0.2 * at::randn(shape)).to(dtype));
  };
  const at::Tensor rows = make({45, d});
  const at::Tensor offsets =
      On(at::tensor(at::ArrayRef<int64_t>(ends, 6), at::TensorOptions(at::kLong)));
  for (const bool gated : {false, true}) {
    ExpertStack stack{make({5, f, d}), make({5, d, f})};
    if (gated) stack.gate_EFD = make({5, f, d});
    const at::Tensor found = GroupedFeedForward(Activation::kRelu, stack, rows, offsets);
    EXPECT_EQ(found.sizes(), rows.sizes());
    for (int64_t e = 0; e < 5; ++e) {
      if (ends[e + 1] == ends[e]) continue;
      ExpertWeights expert{stack.wi_EFD[e], stack.wo_EDF[e]};
      if (gated) expert.gate_FD = stack.gate_EFD[e];
      const auto part = [&](const at::Tensor& all) {
        return all.narrow(0, ends[e], ends[e + 1] - ends[e]);
      };
      EXPECT_TRUE(at::allclose(
          part(found).to(at::kFloat),
          ApplyFeedForward(Activation::kRelu, expert, part(rows)).to(at::kFloat),
          tolerance, tolerance))
          << "expert " << e << (gated ? " gated" : "");
    }
  }
}

// What a loader puts into stacks is what the files hold, once.
TEST_P(ExpertStackTest, StackedWeightsAreThoseOfTheFile) {
  const Checkpoint made = RandomCheckpoint(SmallConfig(), 6);
  SaveCheckpoint(folder_, made.config, made.parameters, at::kFloat);
  const Checkpoint single =
      LoadCheckpoint(folder_, at::kBFloat16, device(), ExpertLoading::kLoad);
  const Checkpoint stacked =
      LoadCheckpoint(folder_, at::kBFloat16, device(), ExpertLoading::kStack);
  ASSERT_EQ(single.parameters.items().size(), stacked.parameters.items().size());
  for (const auto& [name, tensor] : single.parameters.items())
    EXPECT_TRUE(at::equal(tensor, stacked.parameters.Get(name))) << name;
  const auto experts = ExpertWeightsOf(stacked.config, stacked.parameters);
  const auto layer = std::span(experts).first(
      static_cast<size_t>(stacked.config.geometry().num_experts));
  const auto stack = StackOf(layer);
  ASSERT_TRUE(stack.has_value());
  for (size_t e = 0; e < layer.size(); ++e) {
    EXPECT_EQ(stack->wi_EFD[static_cast<int64_t>(e)].const_data_ptr(),
              layer[e].wi_FD.const_data_ptr());
  }
}

TEST(StackOfTest, OnlyEvenlyStackedExpertsAreAStack) {
  const auto layer_of = [](const at::Tensor& wi, const at::Tensor& wo) {
    std::vector<ExpertWeights> layer;
    for (int64_t e = 0; e < wi.size(0); ++e) layer.push_back({wi[e], wo[e]});
    return layer;
  };
  const at::Tensor wi = at::randn({3, 8, 4}), wo = at::randn({3, 4, 8});
  EXPECT_TRUE(StackOf(layer_of(wi, wo)).has_value());
  auto swapped = layer_of(wi, wo);
  std::swap(swapped[0], swapped[2]);
  EXPECT_FALSE(StackOf(swapped).has_value());
  auto copied = layer_of(wi, wo);
  copied[1].wi_FD = copied[1].wi_FD.clone();
  EXPECT_FALSE(StackOf(copied).has_value());
  // Rows of 12 bytes: the grouped product refuses them.
  EXPECT_FALSE(StackOf(layer_of(at::randn({3, 8, 3}), at::randn({3, 3, 8}))).has_value());
  EXPECT_FALSE(StackOf({}).has_value());
}

ROUTECAST_INSTANTIATE_DEVICES(ExpertStackTest);

TEST(GroupedProducts, AreNoKernelOnACpu) {
  EXPECT_FALSE(HasGroupedProducts(at::kCPU, at::kBFloat16));
}

}  // namespace
}  // namespace routecast
