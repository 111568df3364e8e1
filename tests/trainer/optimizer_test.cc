// AdamW, the reducer and checkpoints of training against slow, obvious references.
#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <cmath>
#include <set>
#include <string>

#include "common/errors.h"
#include "tests/support/reference.h"
#include "trainer/adamw.h"
#include "trainer/gradient_reducer.h"
#include "trainer/train_state.h"

namespace routecast {
namespace {

Parameters TwoParameters() {
  at::manual_seed(3);
  Parameters p;
  p.Add("matrix", at::randn({4, 3}).requires_grad_());
  p.Add("gain", at::randn({3}).requires_grad_());
  return p;
}

TEST(AdamW, EqualsTheFormulaElementByElement) {
  const Parameters p = TwoParameters();
  AdamWOptions options;
  options.beta1 = 0.9;
  options.beta2 = 0.95;
  options.weight_decay = 0.1;
  for (const auto& [name, tensor] : p.items()) {
    const double decay = name == "matrix" ? 0.1 : 0.0;
    const at::Tensor flat = tensor.detach().reshape({-1}).to(at::kDouble).clone();
    std::vector<double> x(flat.data_ptr<double>(),
                          flat.data_ptr<double>() + flat.numel());
    std::vector<double> m(x.size()), v(x.size());
    const double lr = 0.01;
    for (int step = 1; step <= 3; ++step) {
      for (size_t i = 0; i < x.size(); ++i) {
        const double g = std::sin(double(i) + step);
        x[i] -= lr * decay * x[i];
        m[i] = 0.9 * m[i] + 0.1 * g;
        v[i] = 0.95 * v[i] + 0.05 * g * g;
        x[i] -= lr * (m[i] / (1 - std::pow(0.9, step))) /
                (std::sqrt(v[i] / (1 - std::pow(0.95, step))) + 1e-8);
      }
    }
    // The same gradients through the optimizer, on a copy of the parameters.
    Parameters copy;
    copy.Add(name, tensor.detach().clone().requires_grad_());
    AdamW under_test(copy, options);
    const at::Tensor& c = copy.Get(name);
    for (int step = 1; step <= 3; ++step) {
      c.mutable_grad() =
          at::sin(at::arange(c.numel(), at::kFloat) + double(step)).view_as(c);
      under_test.Step(lr);
    }
    for (size_t i = 0; i < x.size(); ++i) {
      EXPECT_NEAR(c.detach().reshape({-1})[int64_t(i)].item<double>(), x[i], 1e-5)
          << name;
    }
  }
}

TEST(GradientReducer, AccumulatesMicroBatchesLikePlainAutograd) {
  const Parameters p = TwoParameters();
  const at::Tensor x = at::randn({5, 4}), y = at::randn({2, 4});
  const auto loss = [&](const Parameters& q, const at::Tensor& in) {
    return (at::matmul(in, q.Get("matrix")) * q.Get("gain")).pow(2).sum();
  };
  Parameters plain;
  for (const auto& [name, t] : p.items())
    plain.Add(name, t.detach().clone().requires_grad_());
  loss(plain, x).backward();
  loss(plain, y).backward();

  LocalCommunicator comm;
  GradientReducer reducer(p.tensors(), &comm, /*bucket_bytes=*/16);
  for (int repeat = 0; repeat < 2; ++repeat) {  // the second step must not see the first
    reducer.BeginStep();
    loss(p, x).backward();
    reducer.LastBackward();
    loss(p, y).backward();
    reducer.Finalize(0.5);
    for (const auto& [name, t] : p.items()) {
      EXPECT_TRUE(at::allclose(t.grad(), plain.Get(name).grad() * 0.5)) << name;
    }
  }
  double sum = 0;
  for (const auto& [name, t] : plain.items())
    sum += t.grad().pow(2).sum().item<double>() / 4;
  const double norm = std::sqrt(sum);
  EXPECT_NEAR(reducer.GradientNorm().item<double>(), norm, 1e-4 * norm);
  reducer.Scale(at::scalar_tensor(0.5, at::kDouble));
  EXPECT_NEAR(reducer.GradientNorm().item<double>(), norm / 2, 1e-4 * norm);
}

TEST(GradientReducer, AParameterWithoutGradientCountsAsZero) {
  const Parameters p = TwoParameters();
  LocalCommunicator comm;
  GradientReducer reducer(p.tensors(), &comm);
  reducer.BeginStep();
  reducer.LastBackward();
  p.Get("matrix").sum().backward();
  reducer.Finalize(1);
  EXPECT_EQ(p.Get("gain").grad().abs().sum().item<float>(), 0);
}

TEST(TrainState, SavesLoadsAndKeepsTheNewestTwo) {
  const fs::path folder = TestFolder("train-state");
  const Parameters p = TwoParameters();
  AdamW optimizer(p, {});
  const Json configuration = {{"steps", 10}};
  for (int64_t step : {1, 2, 3}) {
    for (const auto& [name, t] : p.items()) t.mutable_grad() = at::ones_like(t);
    optimizer.Step(0.1);
    SaveTrainState(folder, {step, configuration, Json::object()}, p, optimizer);
  }
  EXPECT_FALSE(fs::exists(folder / "step-00000001"));
  Parameters other = TwoParameters();
  AdamW other_optimizer(other, {});
  const auto state = FindTrainState(folder);
  ASSERT_TRUE(state.has_value());
  EXPECT_EQ(state->step, 3);
  LoadTrainState(folder, 3, other, &other_optimizer);
  for (const auto& [name, t] : p.items()) EXPECT_TRUE(at::equal(t, other.Get(name)));
  const Parameters saved = optimizer.State(), loaded = other_optimizer.State();
  for (const auto& [name, t] : saved.items()) {
    EXPECT_TRUE(at::equal(t, loaded.Get(name))) << name;
  }
}

TEST(TrainState, KeepsAsManyAsAskedForAndWhatTheyName) {
  const Parameters p = TwoParameters();
  for (const int keep : {1, 3}) {
    const fs::path folder = TestFolder("train-state-" + std::to_string(keep));
    MakeFolder(folder);
    for (int64_t step = 1; step <= 6; ++step) {
      // A best every second step.
      const std::string best = "best-" + std::to_string((step + 1) / 2) + ".safetensors";
      WriteParameters(folder / best, p, at::kFloat);
      SaveTrainState(folder, {step, Json::object(), Json::object(), {best}}, p,
                     AdamW(p, {}), keep);
      RemoveUnnamed(folder);
    }
    std::set<std::string> found;
    for (const auto& entry : fs::directory_iterator(folder)) {
      found.insert(entry.path().filename());
    }
    std::set<std::string> expected = {"step-00000006", "best-3.safetensors"};
    if (keep == 3) {
      expected.insert({"step-00000004", "step-00000005", "best-2.safetensors"});
    }
    EXPECT_EQ(found, expected);
    // Of a damaged one it is not known what it needs.
    WriteParameters(folder / "best-9.safetensors", p, at::kFloat);
    WriteFileAtomic(folder / "step-00000006" / "state.json", "{}");
    RemoveUnnamed(folder);
    EXPECT_TRUE(fs::exists(folder / "best-9.safetensors"));
  }
}

TEST(TrainState, AnUnsealedCheckpointIsNotSeen) {
  const fs::path folder = TestFolder("train-state-cut");
  const Parameters p = TwoParameters();
  SaveTrainState(folder, {5, Json::object(), Json::object()}, p, AdamW(p, {}));
  MakeFolder(folder / "step-00000009.tmp");
  EXPECT_EQ(FindTrainState(folder)->step, 5);
}

TEST(TrainState, AnotherConfigurationIsRefusedByName) {
  try {
    CheckSameConfiguration({{"steps", 10}, {"seed", 1}}, {{"steps", 10}, {"seed", 2}},
                           "out");
    FAIL();
  } catch (const UsageError& e) {
    EXPECT_NE(std::string(e.what()).find("seed"), std::string::npos);
  }
}

TEST(TrainState, OnlyWhatDiffersOfALongConfigurationIsPrinted) {
  const Json stored = {{"model", {{"width", 8}, {"geometry", {{"num_experts", 16}}}}}};
  Json current = stored;
  current["model"]["geometry"]["num_experts"] = 128;
  try {
    CheckSameConfiguration(stored, current, "out");
    FAIL();
  } catch (const UsageError& e) {
    const std::string text = e.what();
    EXPECT_NE(text.find("model.geometry.num_experts\n  there 16, now 128\n"),
              std::string::npos)
        << text;
  }
  current = stored;
  current["model"].erase("width");
  EXPECT_THROW(CheckSameConfiguration(stored, current, "out"), UsageError);
  current = stored;
  current["also"] = std::vector<int>(500, 7);
  for (const bool left_out : {false, true}) {  // what is only there, or only now
    try {
      CheckSameConfiguration(left_out ? current : stored, left_out ? stored : current,
                             "out");
      FAIL();
    } catch (const UsageError& e) {
      EXPECT_NE(std::string(e.what()).find("configuration: also"), std::string::npos);
      EXPECT_LT(std::string(e.what()).size(), 300u) << e.what();
    }
  }
}

}  // namespace
}  // namespace routecast
