#include "evaluator/question_guard.h"

#include <ATen/ATen.h>

#include <exception>
#include <stdexcept>

namespace routecast {
namespace {

constexpr float kRounding = 1e-3f;  // a probability may lie so far beyond 0 and 1

std::string SizesText(const at::Tensor& tensor) {
  std::string sizes;
  for (int64_t i = 0; tensor.defined() && i < tensor.dim(); ++i)
    sizes += (i == 0 ? "" : ", ") + std::to_string(tensor.size(i));
  return "[" + sizes + "]";
}

void RequireShape(const at::Tensor& probs_BTE, int64_t batch, int64_t tokens,
                  int64_t experts) {
  if (probs_BTE.defined() && probs_BTE.dim() == 3 && probs_BTE.size(0) == batch &&
      probs_BTE.size(1) == tokens && probs_BTE.size(2) == experts)
    return;
  throw std::runtime_error("an answer of shape " + SizesText(probs_BTE) + ", not [" +
                           std::to_string(batch) + ", " + std::to_string(tokens) + ", " +
                           std::to_string(experts) + "]");
}

void RequireNumbers(const at::Tensor& probs_BTE, const at::Tensor& valid_BT) {
  const at::Tensor probs = probs_BTE.to(at::kCPU, at::kFloat).contiguous();
  const at::Tensor valid = valid_BT.to(at::kCPU, at::kBool).contiguous();
  const int64_t tokens = probs.size(1), experts = probs.size(2);
  const int64_t before = valid.size(1) - tokens;
  const float* p = probs.const_data_ptr<float>();
  for (int64_t row = 0; row < probs.size(0) * tokens; ++row, p += experts) {
    const int64_t at = row / tokens * valid.size(1) + before + row % tokens;
    if (!valid.const_data_ptr<bool>()[at]) continue;
    bool sound = true;
    for (int64_t e = 0; e < experts; ++e)
      sound &= (p[e] >= -kRounding) & (p[e] <= 1 + kRounding);
    for (int64_t e = 0; !sound; ++e) {
      if (p[e] >= -kRounding && p[e] <= 1 + kRounding) continue;
      throw std::runtime_error("an answer with " + std::to_string(p[e]) +
                               " as the probability of expert " + std::to_string(e));
    }
  }
}

}  // namespace

bool QuestionGuard::Run(const std::function<void()>& question) {
  std::string words = "something that is no exception";
  try {
    question();
    return true;
  } catch (const std::exception& e) {
    words = e.what();
  } catch (...) {
  }
  const std::lock_guard lock(mutex_);
  if (failed_++ == 0) first_ = words.substr(0, words.find('\n'));
  return false;
}

int64_t QuestionGuard::failed() const {
  const std::lock_guard lock(mutex_);
  return failed_;
}

std::string QuestionGuard::first_failure() const {
  const std::lock_guard lock(mutex_);
  return first_;
}

void QuestionGuard::AddTo(Json* json) const {
  if (failed() == 0) return;
  (*json)["failed_questions"] = failed();
  (*json)["first_failure"] = first_failure();
}

std::string FailureText(const std::string& predictor, int64_t failed,
                        const std::string& consequence, const std::string& first) {
  return predictor + ": " + std::to_string(failed) + " questions failed and " +
         consequence + ", the first with: " + first;
}

void RequireAnswers(const std::vector<std::optional<at::Tensor>>& answers,
                    const RoutingWindow& window, int64_t tokens) {
  for (const std::optional<at::Tensor>& probs : answers) {
    if (!probs) continue;
    RequireShape(*probs, window.token_ids_BT.size(0), tokens, window.num_experts);
    RequireNumbers(*probs, window.valid_BT);
  }
}

}  // namespace routecast
