#include "trainer/training_log.h"

#include <algorithm>

namespace routecast {
namespace {

Json LineOf(const TrainingPlace& place) {
  return {{"step", place.step}, {"epoch", place.epoch}, {"samples", place.samples}};
}

}  // namespace

void StepMeter::Add(const Step& step) {
  loss_sum_ += step.loss;
  ++loss_steps_;
  samples_ += static_cast<int64_t>(step.windows);
  process_samples_ += step.windows;
  step_seconds_ += step.seconds;
  data_seconds_ += step.waited;
}

StepFigures StepMeter::Take(double learning_rate, double grad_norm, double running,
                            double loading) {
  const double seconds = std::max(1e-9, step_seconds_);
  const StepFigures figures = {loss_sum_ / static_cast<double>(loss_steps_),
                               learning_rate,
                               grad_norm,
                               process_samples_ / std::max(1e-9, running),
                               data_seconds_ / seconds,
                               (loading - loading_) / seconds};
  loss_sum_ = data_seconds_ = step_seconds_ = 0;
  loss_steps_ = 0;
  loading_ = loading;
  return figures;
}

Json StepMeter::ToJson() const {
  return {{"loss_sum", loss_sum_}, {"loss_steps", loss_steps_}, {"samples", samples_}};
}

void StepMeter::Load(const Json& json) {
  loss_sum_ = json.at("loss_sum");
  loss_steps_ = json.at("loss_steps");
  samples_ = json.at("samples");
}

TrainingLog::TrainingLog(const fs::path& out, int64_t step) {
  const fs::path file = out / "metrics.jsonl";
  if (step > 0) TruncateJsonLines(file, "step", step);
  metrics_.emplace(file, step > 0);
  events_.emplace(out / "tensorboard", step + 1);
}

void TrainingLog::Write(const TrainingPlace& place, const StepFigures& figures) {
  if (!metrics_) return;
  Json line = LineOf(place);
  line.update({{"train_loss", figures.loss},
               {"learning_rate", figures.learning_rate},
               {"grad_norm", figures.grad_norm},
               {"samples_per_second", figures.samples_per_second},
               {"waiting_for_data", figures.waiting_for_data},
               {"making_batches", figures.making_batches}});
  metrics_->Write(line);
  events_->Write(place.step, {{"train/loss", figures.loss},
                              {"train/learning_rate", figures.learning_rate},
                              {"train/grad_norm", figures.grad_norm},
                              {"train/samples_per_second", figures.samples_per_second}});
}

void TrainingLog::Write(const TrainingPlace& place, const ValidationScores& scores) {
  if (!metrics_) return;
  Json line = LineOf(place);
  line.update({{"valid_loss", scores.loss},
               {"top1", scores.top1},
               {"top4", scores.top4},
               {"recall", scores.recall}});
  metrics_->Write(line);
  events_->Write(place.step, {{"valid/loss", scores.loss},
                              {"valid/top1", scores.top1},
                              {"valid/top4", scores.top4},
                              {"valid/recall", scores.recall}});
}

}  // namespace routecast
