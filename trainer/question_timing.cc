#include "trainer/question_timing.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <chrono>
#include <limits>
#include <memory>

#include "common/errors.h"
#include "models/checkpoint.h"
#include "models/speculation_model.h"
#include "trainer/flop_count.h"
#include "trainer/model_setup.h"
#include "trainer/speculation_batch.h"

namespace routecast {
namespace {

constexpr size_t kRounds = 25;
constexpr int kStepsOfASequence = 64;  // then the decoder starts again
constexpr int64_t kPromptTokens = 32;

template <typename Work>
double Microseconds(const Work& work) {
  const auto start = std::chrono::steady_clock::now();
  work();
  return std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() -
                                                   start)
      .count();
}

double Median(std::vector<double> values) {
  if (values.empty()) return std::numeric_limits<double>::quiet_NaN();
  const auto middle = values.begin() + static_cast<int64_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

// A test sequence (else one of the train part) that has what `hidden` asks for.
std::shared_ptr<const RoutingTrace> AnySequence(TraceDataset* dataset, Stack stack,
                                                WithHidden hidden) {
  for (const SplitPart part : {SplitPart::kTest, SplitPart::kTrain}) {
    const auto sequences = dataset->Select(part, stack, hidden);
    if (!sequences.empty()) return dataset->Read({&sequences[0], 1}, hidden)[0];
  }
  return nullptr;
}

// One served model and the questions of one token, from every source layer in turn; what
// came before the token was asked about before.
class AskedModel {
 public:
  AskedModel(const fs::path& folder, TraceDataset* dataset)
      : model_(LoadSpeculationModel(folder).model) {
    const MoeGeometry& g = dataset->geometry();
    const Stack stack = g.decoder_layers > 0 ? Stack::kDecoder : Stack::kEncoder;
    const WithHidden hidden = HiddenOf(model_->config());
    const auto trace = AnySequence(dataset, stack, hidden);
    for (int i = 0; trace && i < g.layers(stack); ++i) {
      const int source = i - (stack == Stack::kEncoder ? 1 : 0);
      RoutingWindow window =
          WindowOf(*trace, stack, source, g.num_experts, g.experts_per_token);
      if (hidden == WithHidden::kNo) ForgetRouterInputs(&window);
      if (dataset->keeps_top_k()) AddGates({trace.get()}, &window);
      const int64_t tokens = window.token_ids_BT.size(1);
      // Where a window grows until it has twice that: the mean.
      const int64_t held =
          model_->history_tokens() * (model_->keeps_tokens() ? 3 : 2) / 2;
      const int64_t kept = std::min<int64_t>(tokens, held);
      for (at::Tensor* x : {&window.token_ids_BT, &window.valid_BT, &window.experts_BTL,
                            &window.others_BTLK, &window.hidden_BTD, &window.context_BTD,
                            &window.gates_BTE, &window.attention_entropy_BTA,
                            &window.attended_ids_BTAK}) {
        if (x->defined()) *x = x->narrow(1, tokens - kept, kept).contiguous();
      }
      window.first_token = tokens - kept;
      windows_.push_back(window);
      flops_ += static_cast<double>(
                    MatrixFlops([&] { model_->Forward(window, /*dropout_key=*/0); })) /
                static_cast<double>(kept);
    }
    model_->PrepareServing();
  }
  double MeanFlops() const {
    return windows_.empty() ? std::numeric_limits<double>::quiet_NaN()
                            : flops_ / static_cast<double>(windows_.size());
  }
  void Ask(std::vector<double>* times) {
    for (const RoutingWindow& window : windows_) {
      times->push_back(Microseconds([&] { model_->ForwardLast(window); }));
    }
  }

 private:
  std::unique_ptr<SpeculationModel> model_;
  std::vector<RoutingWindow> windows_;
  double flops_ = 0;
};

// Greedy decoding at batch 1, a step at a time.
class TimedDecoder {
 public:
  TimedDecoder(const fs::path& checkpoint, at::Device device, TraceDataset* dataset)
      : model_(LoadCheckpoint(checkpoint, at::ScalarType::Undefined, device)) {
    const auto trace = AnySequence(dataset, Stack::kEncoder, WithHidden::kNo);
    std::vector<int64_t> ids;
    if (trace)
      ids.assign(trace->encoder.token_ids.begin(), trace->encoder.token_ids.end());
    if (ids.empty()) ids.push_back(model_.model().config().eos_token_id);
    source_ids_ = at::tensor(ids, at::kLong).unsqueeze(0);
    source_ids_ =
        source_ids_.narrow(1, 0, std::min<int64_t>(kPromptTokens, source_ids_.size(1)));
    source_valid_ = at::ones_like(source_ids_, at::kBool);
    source_ = model_.model().Encode(source_ids_, source_valid_);
    valid_ = at::ones({1, 1}, at::kBool);
  }
  void Step(std::vector<double>* times) {
    SwitchModel& model = model_.model();
    if (cache_.length == 0 || cache_.length >= kStepsOfASequence) {
      cache_ = {};
      token_ = at::full({1, 1}, model.config().decoder_start_token_id, at::kLong);
      Decode();  // the first step computes the encoder's keys as well
    }
    times->push_back(Microseconds([&] { Decode(); }));
  }

 private:
  void Decode() {
    SwitchModel& model = model_.model();
    const at::Tensor hidden =
        model.Decode(token_, valid_, source_, source_valid_, &cache_);
    token_ = model.Logits(hidden).argmax(-1).to(at::kCPU);
  }
  ResidentModel model_;
  at::Tensor source_ids_, source_valid_, source_, token_, valid_;
  DecoderCache cache_;
};

}  // namespace

void RequireTracedModel(const fs::path& checkpoint, const MoeGeometry& geometry) {
  const MoeGeometry g = CheckpointReader(checkpoint).config().geometry();
  const auto text = [](const MoeGeometry& m) {
    return std::to_string(m.encoder_layers) + " + " + std::to_string(m.decoder_layers) +
           " MoE layers of " + std::to_string(m.num_experts) + " experts, width " +
           std::to_string(m.d_model);
  };
  if (g == geometry) return;
  throw UsageError(ErrorText("--model=" + checkpoint.string() + " is not what was traced",
                             "it has " + text(g) + "; the store " + text(geometry),
                             "name the checkpoint that the store was collected from"));
}

QuestionTimes TimeQuestions(const std::vector<fs::path>& models,
                            const fs::path& checkpoint, at::Device device,
                            TraceDataset* dataset) {
  const c10::NoGradGuard no_grad;
  std::vector<AskedModel> asked;
  for (const fs::path& folder : models) asked.emplace_back(folder, dataset);
  std::unique_ptr<TimedDecoder> decoder;
  if (!checkpoint.empty()) {
    decoder = std::make_unique<TimedDecoder>(checkpoint, device, dataset);
  }
  std::vector<std::vector<double>> times(asked.size());
  std::vector<double> passes;
  for (size_t round = 0; round <= kRounds; ++round) {
    for (size_t i = 0; i < asked.size(); ++i) {
      const size_t m = (round + i) % asked.size();  // another one begins each time
      asked[m].Ask(&times[m]);
    }
    if (decoder) decoder->Step(&passes);
    if (round > 0) continue;  // the first round is for the caches
    for (auto& t : times) t.clear();
    passes.clear();
  }
  QuestionTimes result;
  for (const auto& t : times) result.question_us.push_back(Median(t));
  for (const AskedModel& model : asked)
    result.question_flops.push_back(model.MeanFlops());
  result.pass_us = Median(passes);
  return result;
}

}  // namespace routecast
