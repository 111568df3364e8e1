// Training steps of a speculation model beside the same model as a PyTorch loop (goal
// P6), and eight members together beside one alone (P7). Rounds are interleaved; medians
// and the spread of the ratios are printed.
//   trainer_bench --python=build/python/bin/python [--threads=2] [--rounds=9]
#include <ATen/ATen.h>
#include <gflags/gflags.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <memory>

#include "bench/child_process.h"
#include "common/process_memory.h"
#include "common/random.h"
#include "models/ensemble_model.h"
#include "trainer/gradient_reducer.h"
#include "trainer/member_optimizer.h"
#include "trainer/speculation_loss.h"

DEFINE_string(python, "", "Python with torch; empty = without the reference");
DEFINE_int32(threads, 2, "Threads of both sides");
DEFINE_int32(rounds, 9, "Interleaved rounds");
DEFINE_int32(batch, 16, "Windows a step");
DEFINE_int32(tokens, 32, "Tokens a window");
DEFINE_double(dropout, 0.1, "Of both sides");
DEFINE_double(seconds, 1, "About so long is each side's part of a round");

namespace routecast {
namespace {

constexpr int kExperts = 128, kSource = 2, kLayers = 6;

struct Shape {
  const char* name;
  int width, heads, ff, layers;
};
constexpr Shape kShapes[] = {{"0.6M", 96, 4, 384, 2},
                             {"4.6M (published baseline)", 256, 8, 1024, 4},
                             {"8.4M (published extended)", 320, 10, 1280, 5}};

double Seconds(std::chrono::steady_clock::time_point since) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - since).count();
}

SpeculationConfig ConfigOf(const Shape& shape) {
  SpeculationConfig c = DefaultSpeculationConfig(
      "interlayer", MoeGeometry{kLayers, 0, kExperts, 1, 768}, 0, 0);
  c.width = shape.width;
  c.heads = shape.heads;
  c.ff = shape.ff;
  c.layers = shape.layers;
  c.dropout = FLAGS_dropout;
  c.priors = false;
  return c;
}

SpeculationConfig EnsembleOf(const SpeculationConfig& member, int members) {
  SpeculationConfig c = member;
  c.kind = "ensemble";
  c.combine = "probabilities";
  c.members.assign(static_cast<size_t>(members), member);
  c.weights.assign(static_cast<size_t>(members), 1.0 / members);
  return c;
}

SpeculationBatch RandomBatch() {
  SpeculationBatch batch;
  RoutingWindow& w = batch.window;
  w.stack = Stack::kEncoder;
  w.source_layer = kSource;
  w.num_layers = kLayers;
  w.num_experts = kExperts;
  const int64_t B = FLAGS_batch, T = FLAGS_tokens;
  w.token_ids_BT = at::zeros({B, T}, at::kLong);
  w.valid_BT = at::ones({B, T}, at::kBool);
  w.experts_BTL = at::randint(0, kExperts, {B, T, kLayers}, at::kLong);
  w.experts_BTL.narrow(2, kSource + 1, kLayers - kSource - 1).fill_(kExperts);
  batch.labels_BTH = at::randint(0, kExperts, {B, T, kLayers - 1 - kSource}, at::kLong);
  batch.num_labels = batch.labels_BTH.numel();
  return batch;
}

// The steps of the trainer's loop on one rank: reducer, members' losses, clips, AdamW.
class Loop {
 public:
  Loop(const SpeculationConfig& config, SpeculationBatch batch)
      : model_(MakeSpeculationModel(config, 1)),
        batch_(std::move(batch)),
        reducer_(model_->parameters().tensors(), &comm_),
        optimizer_(*model_,
                   std::vector<MemberOptions>(std::max<size_t>(1, config.members.size()),
                                              {1e-4, 0.01, 1, 0}),
                   0.9, 0.999, 0) {}
  double Run(int steps) {
    const auto start = std::chrono::steady_clock::now();
    for (int i = 0; i < steps; ++i) {
      reducer_.BeginStep();
      reducer_.LastBackward();
      at::Tensor total;
      for (const SpeculationOutput& out :
           model_->ForwardMembers(batch_.window, Mix(7, ++step_))) {
        LossWeights weights;
        weights.confidence = 0.1;
        const at::Tensor loss = SpeculationLoss(out, batch_, weights).total;
        total = total.defined() ? total + loss : loss;
      }
      total.backward();
      reducer_.Finalize(1);
      reducer_.Scale(1.0 / static_cast<double>(batch_.num_labels));
      optimizer_.Step(1);
    }
    return Seconds(start);
  }
  int StepsIn(double seconds) {
    Run(2);
    return std::max(1, static_cast<int>(seconds / (Run(2) / 2)));
  }
  int64_t parameters() const { return model_->parameters().num_elements(); }

 private:
  LocalCommunicator comm_;
  std::unique_ptr<SpeculationModel> model_;
  SpeculationBatch batch_;
  GradientReducer reducer_;
  MemberOptimizer optimizer_;
  uint64_t step_ = 0;
};

double Median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

void Print(const char* what, const std::vector<double>& ratios, double goal,
           const std::string& more) {
  const auto [low, high] = std::minmax_element(ratios.begin(), ratios.end());
  std::printf("%-52s %5.2fx (%.2f-%.2f), goal %.2fx; %s\n", what, Median(ratios), *low,
              *high, goal, more.c_str());
  std::fflush(stdout);
}

std::string Line(const char* format, double a, double b) {
  char text[128];
  std::snprintf(text, sizeof text, format, a, b);
  return text;
}

void BesidePyTorch(const Shape& shape) {
  const SpeculationConfig c = ConfigOf(shape);
  Loop loop(c, RandomBatch());
  const auto number = [](auto x) { return std::to_string(x); };
  LineProcess reference({FLAGS_python, "bench/reference_trainer.py",
                         number(FLAGS_threads), number(c.width), number(c.heads),
                         number(c.ff), number(c.layers), number(kExperts),
                         number(c.context), number(FLAGS_batch), number(FLAGS_tokens),
                         number(kLayers - 1 - kSource), number(FLAGS_dropout)});
  reference.Read();
  reference.Ask("2");
  const int steps = loop.StepsIn(FLAGS_seconds);
  std::vector<double> ratios, ours, theirs;
  for (int round = 0; round < FLAGS_rounds; ++round) {
    const double a = loop.Run(steps), b = std::stod(reference.Ask(number(steps)));
    ratios.push_back(b / a);
    ours.push_back(steps * FLAGS_batch / a);
    theirs.push_back(steps * FLAGS_batch / b);
  }
  Print((std::string("samples/s beside PyTorch, ") + shape.name).c_str(), ratios, 1.2,
        Line("%.0f and %.0f windows/s", Median(ours), Median(theirs)));
}

void Members(const Shape& shape, int members) {
  const SpeculationConfig c = ConfigOf(shape);
  const SpeculationBatch batch = RandomBatch();
  Loop one(c, batch), all(EnsembleOf(c, members), batch);
  const int steps = one.StepsIn(FLAGS_seconds);
  const int fewer = std::max(1, steps / members);
  all.Run(1);
  std::vector<double> ratios, alone, together;
  for (int round = 0; round < FLAGS_rounds; ++round) {
    const double a = one.Run(steps) / steps, b = all.Run(fewer) / fewer;
    ratios.push_back(members * a / b);
    alone.push_back(1e3 * a);
    together.push_back(1e3 * b);
  }
  Print((std::to_string(members) + " members together, each of " + shape.name).c_str(),
        ratios, 0.95,
        Line("%.1f ms a step of one, %.1f of all", Median(alone), Median(together)));
}

}  // namespace

int Main() {
  SetComputeThreads(FLAGS_threads);
  std::printf("%d threads, %d windows x %d tokens x 3 layers, dropout %.2f, %d rounds\n",
              FLAGS_threads, FLAGS_batch, FLAGS_tokens, FLAGS_dropout, FLAGS_rounds);
  if (!FLAGS_python.empty()) {
    for (const Shape& shape : kShapes) BesidePyTorch(shape);
  }
  Members(kShapes[0], 8);
  Members(kShapes[1], 8);
  return 0;
}

}  // namespace routecast

int main(int argc, char** argv) {
  routecast::KeepFreedMemory();
  routecast::KeepAllFreedMemory();
  routecast::PreferLargePages();
  gflags::SetUsageMessage("times training steps of speculation models");
  gflags::ParseCommandLineFlags(&argc, &argv, true);
  try {
    return routecast::Main();
  } catch (const std::exception& e) {
    std::fprintf(stderr, "trainer_bench: %s\n", e.what());
    return 1;
  }
}
