#include "evaluator/lossy_quality.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <utility>

namespace routecast {

void OutputLog::Add(const at::Tensor& tensor) {
  const at::Tensor before = std::exchange(last_, tensor);
  const bool is_step = tensor.scalar_type() == at::kLong && tensor.dim() == 1 &&
                       before.defined() && before.dim() == 2 &&
                       before.size(0) == tensor.size(0);
  if (!is_step || !whole_) return;
  const uint64_t bytes = before.nbytes() + tensor.nbytes();
  if (bytes_ + bytes > room_) {
    whole_ = false;
    steps_.clear();
    return;
  }
  bytes_ += bytes;
  // Copies: the model may write into the same memory in its next step.
  steps_.push_back(
      {before.to(at::kCPU, at::kFloat).clone(), tensor.to(at::kCPU).clone()});
}

void LossyQuality::Compare(const OutputLog& reference, const OutputLog& lossy) {
  const size_t steps = std::min(reference.steps().size(), lossy.steps().size());
  if (steps == 0) return;
  const int64_t batch = reference.steps()[0].ids_B.size(0);
  at::Tensor same = at::ones({batch}, at::kBool);
  for (size_t t = 0; t < steps; ++t) {
    const auto& [logits, ids] = reference.steps()[t];
    // Of nearly equal distributions the divergence is less than float32 rounds off.
    const at::Tensor p = logits.log_softmax(1, at::kDouble),
                     q = lossy.steps()[t].logits_BV.log_softmax(1, at::kDouble);
    const at::Tensor weight = same.to(at::kDouble), y = ids.unsqueeze(1);
    steps_ += same.sum().item<int64_t>();
    kl_ += ((p.exp() * (p - q)).sum(1) * weight).sum().item<double>();
    nll_ -= (p.gather(1, y).squeeze(1) * weight).sum().item<double>();
    nll_lossy_ -= (q.gather(1, y).squeeze(1) * weight).sum().item<double>();
    same = same.logical_and(ids == lossy.steps()[t].ids_B);
  }
  sequences_ += batch;
  const bool as_long = reference.steps().size() == lossy.steps().size();
  equal_ += as_long ? same.sum().item<int64_t>() : 0;
}

double LossyQuality::exact_match() const {
  return sequences_ > 0 ? static_cast<double>(equal_) / static_cast<double>(sequences_)
                        : 0;
}
double LossyQuality::logit_kl() const {
  return steps_ > 0 ? kl_ / static_cast<double>(steps_) : 0;
}
double LossyQuality::perplexity_change() const {
  if (steps_ == 0) return 0;
  return std::exp((nll_lossy_ - nll_) / static_cast<double>(steps_)) - 1;
}

}  // namespace routecast
