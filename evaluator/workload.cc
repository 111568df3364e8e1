#include "evaluator/workload.h"

#include <ATen/ATen.h>

#include <algorithm>

#include "common/errors.h"
#include "common/stop.h"
#include "evaluator/clock.h"
#include "models/device_choice.h"

namespace routecast {
namespace {

// Passes everything on, and notes when passes begin and end.
class PassWatch : public RoutingObserver {
 public:
  PassWatch(RoutingObserver* inner, const Clock* clock, at::Device device)
      : inner_(inner), clock_(clock), device_(device) {}
  void OnPassBegin(const PassInfo& pass) override {
    begin_ = clock_->Now();
    if (inner_) inner_->OnPassBegin(pass);
  }
  void OnRouting(const LayerRouting& routing) override {
    if (inner_) inner_->OnRouting(routing);
  }
  void OnPassEnd(const PassInfo& pass) override {
    if (inner_) inner_->OnPassEnd(pass);
    if (pass.stack != Stack::kEncoder) return;  // a step ends with its ids on the host
    Synchronize(device_);
    encoder_seconds_ = clock_->Now() - begin_;
  }
  double begin() const { return begin_; }
  double encoder_seconds() const { return encoder_seconds_; }

 private:
  RoutingObserver* inner_;
  const Clock* clock_;
  at::Device device_;
  double begin_ = 0, encoder_seconds_ = 0;
};

}  // namespace

std::unique_ptr<StaticDecoder> FixedSteps(StepMemory memory, SwitchModel* model,
                                          int64_t rows, int64_t num_source,
                                          int64_t num_steps,
                                          const ForwardOptions& options) {
  const bool fixed = memory == StepMemory::kFixed || model->device().is_cuda();
  if (!fixed || !StaticDecoder::Serves(*model, options, rows)) return nullptr;
  return std::make_unique<StaticDecoder>(model, rows, num_source, num_steps, options);
}

GenerateWorkload::GenerateWorkload(Checkpoint checkpoint,
                                   const std::vector<std::vector<int64_t>>& prompts,
                                   int batch, int max_new_tokens, StepMemory memory)
    : checkpoint_(std::move(checkpoint)),
      geometry_(checkpoint_.config.geometry()),
      max_new_tokens_(max_new_tokens),
      executor_(&source_, checkpoint_.config.activation),
      model_(checkpoint_.config, checkpoint_.parameters, &executor_) {
  const auto size = static_cast<size_t>(batch);
  int64_t longest = 1;
  for (size_t first = 0; first + size <= prompts.size(); first += size) {
    size_t length = 1;
    for (size_t b = 0; b < size; ++b)
      length = std::max(length, prompts[first + b].size());
    const auto rows = static_cast<int64_t>(size), columns = static_cast<int64_t>(length);
    at::Tensor ids =
        at::full({rows, columns}, checkpoint_.config.pad_token_id, at::kLong);
    at::Tensor valid = at::zeros({rows, columns}, at::kBool);
    for (size_t b = 0; b < size; ++b) {
      const std::vector<int64_t>& prompt = prompts[first + b];
      const auto row = static_cast<int64_t>(b), end = static_cast<int64_t>(prompt.size());
      ids[row].slice(0, 0, end).copy_(at::tensor(prompt, at::kLong));
      valid[row].slice(0, 0, end).fill_(true);
    }
    ids_BS_.push_back(ids);
    valid_BS_.push_back(valid);
    longest = std::max(longest, columns);
  }
  generated_.resize(ids_BS_.size());
  steps_ = FixedSteps(memory, &model_, batch, longest, max_new_tokens, {});
}

uint64_t GenerateWorkload::KeyValueBytes(const PassInfo& pass) const {
  if (steps_) return steps_->memory_bytes();
  if (pass.stack == Stack::kEncoder) return 0;
  const at::Tensor& ids = pass.token_ids_BT;
  return routecast::KeyValueBytes(checkpoint_.config, model_.dtype(), ids.size(0),
                                  ids_BS_[running_].size(1),
                                  pass.first_position + ids.size(1));
}

uint64_t GenerateWorkload::MaxKeyValueBytes() const {
  if (steps_) return steps_->memory_bytes();
  uint64_t most = 0;
  for (const at::Tensor& ids : ids_BS_) {
    most = std::max(
        most, routecast::KeyValueBytes(checkpoint_.config, model_.dtype(), ids.size(0),
                                       ids.size(1), max_new_tokens_));
  }
  return most;
}

SegmentTimes GenerateWorkload::Run(int segment, ExpertSource* source,
                                   RoutingObserver* observer, OutputHash* hash) {
  source_.Set(source);
  running_ = static_cast<size_t>(segment);
  const SteadyClock clock;
  PassWatch watch(observer, &clock, model_.device());
  SegmentTimes times;
  GenerationOptions options;
  options.max_new_tokens = max_new_tokens_;
  options.forward.observer = &watch;
  options.steps_in = steps_.get();
  options.on_step = [&](int, const at::Tensor& logits_BV, const at::Tensor& ids_B) {
    times.step_seconds[1].push_back(clock.Now() - watch.begin());
    hash->Add(logits_BV);
    hash->Add(ids_B);
    ThrowIfStopped("while generating");
    return true;
  };
  const auto index = static_cast<size_t>(segment);
  const auto generated = Generate(&model_, ids_BS_[index], valid_BS_[index], options);
  times.step_seconds[0].push_back(watch.encoder_seconds());
  times.tokens[0] = valid_BS_[index].sum().item<int64_t>();
  for (const auto& row : generated)
    times.tokens[1] += static_cast<int64_t>(row.ids.size());
  std::vector<Generated>& kept = generated_[index];
  if (!kept.empty()) return times;
  for (size_t b = 0; b < generated.size(); ++b) {
    const auto row = static_cast<int64_t>(b);
    const at::Tensor prompt =
        ids_BS_[index][row].masked_select(valid_BS_[index][row]).contiguous();
    const int64_t* first = prompt.const_data_ptr<int64_t>();
    kept.push_back({{first, first + prompt.numel()},
                    {generated[b].ids.begin(), generated[b].ids.end()}});
  }
  return times;
}

std::vector<Workload::Generated> GenerateWorkload::generated() const {
  std::vector<Generated> all;
  for (const auto& segment : generated_)
    all.insert(all.end(), segment.begin(), segment.end());
  return all;
}

}  // namespace routecast
