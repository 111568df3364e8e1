#include "models/speculation_layers.h"

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <c10/core/GradMode.h>

#include <cmath>

#include "common/random.h"

namespace routecast {

at::Generator ParameterMaker::NextStream() {
  return at::detail::createCPUGenerator(Mix(seed_, ++count_));
}

at::Tensor ParameterMaker::Leaf(const std::string& name, at::Tensor tensor) {
  tensor.set_requires_grad(true);
  parameters_->Add(name, tensor);
  return tensor;
}

at::Tensor ParameterMaker::Xavier(const std::string& name, std::vector<int64_t> shape) {
  const double fans = static_cast<double>(shape.end()[-1] + shape.end()[-2]);
  const double bound = std::sqrt(6.0 / fans);
  return Leaf(name, at::empty(shape).uniform_(-bound, bound, NextStream()));
}

at::Tensor ParameterMaker::Normal(const std::string& name, std::vector<int64_t> shape,
                                  double deviation) {
  return Leaf(name, at::empty(shape).normal_(0, deviation, NextStream()));
}

at::Tensor ParameterMaker::Constant(const std::string& name, std::vector<int64_t> shape,
                                    double value) {
  return Leaf(name, at::full(shape, value, at::kFloat));
}

LinearLayer::LinearLayer(ParameterMaker* make, const std::string& name, int64_t in,
                         int64_t out)
    : weight(make->Xavier(name + ".weight", {out, in})),
      bias(make->Constant(name + ".bias", {out}, 0)) {}

at::Tensor LinearLayer::operator()(const at::Tensor& x) const {
  return at::linear(x, weight, bias);
}

NormLayer::NormLayer(ParameterMaker* make, const std::string& name, int64_t width)
    : weight(make->Constant(name + ".weight", {width}, 1)),
      bias(make->Constant(name + ".bias", {width}, 0)) {}

at::Tensor NormLayer::operator()(const at::Tensor& x) const {
  return at::layer_norm(x, weight.sizes(), weight, bias, 1e-5);
}

AttentionLayer::AttentionLayer(ParameterMaker* make, const std::string& name,
                               int64_t width, int heads)
    : heads(heads),
      q(make, name + ".q", width, width),
      k(make, name + ".k", width, width),
      v(make, name + ".v", width, width),
      out(make, name + ".out", width, width) {}

at::Tensor AttentionLayer::operator()(const at::Tensor& query, const at::Tensor& memory,
                                      const at::Tensor& mask) const {
  const auto split = [&](const at::Tensor& x) {
    return x.view({x.size(0), x.size(1), heads, x.size(2) / heads}).transpose(1, 2);
  };
  const auto mixed = at::scaled_dot_product_attention(
      split(q(query)), split(k(memory)), split(v(memory)),
      mask.defined() ? std::optional<at::Tensor>(mask) : std::nullopt);
  return out(mixed.transpose(1, 2).reshape(query.sizes()));
}

at::Tensor KeyedDropout::operator()(const at::Tensor& x) {
  ++uses_;
  if (key_ == 0 || probability_ == 0) return x;
  // A generator of the device's kind with a state of its own: nothing global is touched.
  auto generator = at::globalContext().defaultGenerator(x.device()).clone();
  generator.set_current_seed(Mix(key_, uses_));
  at::Tensor kept;
  {
    c10::NoGradGuard no_grad;
    kept = at::empty_like(x).bernoulli_(1 - probability_, generator);
    kept.mul_(1 / (1 - probability_));
  }
  return x * kept;
}

}  // namespace routecast
