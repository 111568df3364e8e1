#include "models/speculation_layers.h"

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <c10/core/GradMode.h>

#include <cmath>
#include <stdexcept>

#include "common/random.h"
#include "models/dropout_mask.h"
#include "models/onednn_linear.h"
#include "models/token_memory.h"

namespace routecast {

at::Tensor ParameterMaker::Leaf(const std::string& name, at::Tensor tensor) {
  if (shared_.Has(name)) {
    if (shared_.Get(name).sizes() != tensor.sizes()) {
      throw std::logic_error("the shared parameter " + name + " has another shape");
    }
    parameters_->Add(name, shared_.Get(name));
    return shared_.Get(name);
  }
  tensor.set_requires_grad(true);
  parameters_->Add(name, tensor);
  return tensor;
}

template <typename Fill>
at::Tensor ParameterMaker::Draw(const std::string& name,
                                const std::vector<int64_t>& shape, const Fill& fill) {
  ++count_;
  std::vector<at::Tensor> members;
  for (const uint64_t seed : seeds_) {
    members.push_back(at::empty(shape));
    fill(members.back(), at::detail::createCPUGenerator(Mix(seed, count_)));
  }
  return Leaf(name, members.size() == 1 ? members[0] : at::stack(members));
}

at::Tensor ParameterMaker::Xavier(const std::string& name, std::vector<int64_t> shape,
                                  double gain) {
  const double fans = static_cast<double>(shape.end()[-1] + shape.end()[-2]);
  const double bound = gain * std::sqrt(6.0 / fans);
  return Draw(name, shape, [&](at::Tensor& t, const at::Generator& stream) {
    t.uniform_(-bound, bound, stream);
  });
}

at::Tensor ParameterMaker::Normal(const std::string& name, std::vector<int64_t> shape,
                                  double deviation) {
  return Draw(name, shape, [&](at::Tensor& t, const at::Generator& stream) {
    t.normal_(0, deviation, stream);
  });
}

at::Tensor ParameterMaker::Constant(const std::string& name, std::vector<int64_t> shape,
                                    double value) {
  if (members() > 1) shape.insert(shape.begin(), members());
  return Leaf(name, at::full(shape, value, at::kFloat));
}

namespace {

// [M * ..,D] -> [M,..,D] as one dimension between.
at::Tensor ByMember(const at::Tensor& x, int64_t members) {
  return x.reshape({members, -1, x.size(-1)});
}

at::Tensor WithWidth(const at::Tensor& y, const at::Tensor& x, int64_t width) {
  auto sizes = x.sizes().vec();
  sizes.back() = width;
  return y.view(sizes);
}

}  // namespace

at::Tensor AddRow(const at::Tensor& x, const at::Tensor& row) {
  if (row.dim() == 1) return x + row;
  return (ByMember(x, row.size(0)) + row.unsqueeze(1)).view(x.sizes());
}

at::Tensor AddRows(const at::Tensor& x, const at::Tensor& rows) {
  if (rows.dim() == 2) return x + rows;
  const auto grouped = x.reshape({rows.size(0), -1, x.size(-2), x.size(-1)});
  return (grouped + rows.unsqueeze(1)).view(x.sizes());
}

at::Tensor Product(const at::Tensor& x, const at::Tensor& weight) {
  if (weight.dim() == 2) return TrainedLinear(x, weight);
  return WithWidth(TrainedLinear(ByMember(x, weight.size(0)), weight), x, weight.size(1));
}

LinearLayer::LinearLayer(ParameterMaker* make, const std::string& name, int64_t in,
                         int64_t out, double gain)
    : weight(make->Xavier(name + ".weight", {out, in}, gain)),
      bias(make->Constant(name + ".bias", {out}, 0)) {}

at::Tensor LinearLayer::operator()(const at::Tensor& x) const {
  if (weight.dim() == 2) return TrainedLinear(x, weight, bias);
  return WithWidth(TrainedLinear(ByMember(x, weight.size(0)), weight, bias), x,
                   weight.size(1));
}

NormLayer::NormLayer(ParameterMaker* make, const std::string& name, int64_t width)
    : weight(make->Constant(name + ".weight", {width}, 1)),
      bias(make->Constant(name + ".bias", {width}, 0)) {}

at::Tensor NormLayer::operator()(const at::Tensor& x) const {
  constexpr double kEpsilon = 1e-5;
  if (weight.dim() == 1) {
    return at::layer_norm(x, weight.sizes(), weight, bias, kEpsilon);
  }
  const auto normed =
      ByMember(at::layer_norm(x, {x.size(-1)}, {}, {}, kEpsilon), weight.size(0));
  return at::addcmul(bias.unsqueeze(1), normed, weight.unsqueeze(1)).view(x.sizes());
}

at::Tensor EmbeddingLayer::operator()(const at::Tensor& ids) const {
  if (weight.dim() == 2) return at::embedding(weight, ids);
  const int64_t members = weight.size(0), rows = weight.size(1);
  const auto first = at::arange(members, ids.options()).mul(rows).unsqueeze(1);
  const auto all = (ids.reshape({members, -1}) + first).view(ids.sizes());
  return at::embedding(weight.view({members * rows, -1}), all);
}

at::Tensor EmbeddingLayer::Row(int64_t row) const {
  return weight.select(weight.dim() - 2, row);
}

at::Tensor EmbeddingLayer::Rows(int64_t first, int64_t count) const {
  return weight.narrow(weight.dim() - 2, first, count);
}

at::Tensor AdditiveMask(const at::Tensor& may_attend) {
  return at::zeros(may_attend.sizes(), may_attend.options().dtype(at::kFloat))
      .masked_fill(may_attend.logical_not(), kMasked);
}

namespace {

at::Tensor ByHead(const at::Tensor& x, int64_t heads) {
  return x.view({x.size(0), x.size(1), heads, x.size(2) / heads}).transpose(1, 2);
}

}  // namespace

AttentionLayer::AttentionLayer(ParameterMaker* make, const std::string& name,
                               int64_t width, int heads, double gain)
    : heads(heads),
      q(make, name + ".q", width, width, gain),
      k(make, name + ".k", width, width, gain),
      v(make, name + ".v", width, width, gain),
      out(make, name + ".out", width, width, gain) {}

at::Tensor AttentionLayer::operator()(const at::Tensor& query, const at::Tensor& memory,
                                      const at::Tensor& mask, TokenMemory* past) const {
  const auto keys = WithKnown(ByHead(k(memory), heads), 2, past);
  const auto values = WithKnown(ByHead(v(memory), heads), 2, past);
  const auto mixed = at::scaled_dot_product_attention(
      ByHead(q(query), heads), keys, values,
      mask.defined() ? std::optional<at::Tensor>(mask) : std::nullopt);
  return out(mixed.transpose(1, 2).reshape(query.sizes()));
}

at::Tensor AttentionLayer::Weights(const at::Tensor& query,
                                   const at::Tensor& memory) const {
  const auto asked = ByHead(q(query), heads), keys = ByHead(k(memory), heads);
  const auto scores = at::matmul(asked, keys.transpose(2, 3)) /
                      std::sqrt(static_cast<double>(asked.size(3)));
  return at::softmax(scores, -1, at::kFloat).mean(1);
}

template <typename Fill>
at::Tensor KeyedDropout::Draw(const at::Tensor& x, const Fill& fill) {
  const c10::NoGradGuard no_grad;
  at::Tensor drawn = at::empty_like(x, x.options().dtype(at::kFloat));
  const auto members = static_cast<int64_t>(keys_.size());
  for (int64_t m = 0; m < members; ++m) {
    // A generator of the device's kind with a state of its own: nothing global is
    // touched.
    auto generator = at::globalContext().defaultGenerator(x.device()).clone();
    generator.set_current_seed(Mix(keys_[static_cast<size_t>(m)], uses_));
    fill(drawn.narrow(0, m * (x.size(0) / members), x.size(0) / members), generator);
  }
  return drawn;
}

namespace {

at::Tensor CpuMask(const at::Tensor& x, const std::vector<uint64_t>& keys, uint64_t use,
                   double probability) {
  const c10::NoGradGuard no_grad;
  at::Tensor mask = at::empty(x.sizes(), at::kFloat);
  const int64_t part = x.numel() / static_cast<int64_t>(keys.size());
  float* out = mask.data_ptr<float>();
  for (const uint64_t key : keys) {
    FillDropoutMask(Mix(key, use), probability, part, out);
    out += part;
  }
  return mask;
}

}  // namespace

at::Tensor KeyedDropout::operator()(const at::Tensor& x) {
  ++uses_;
  if (keys_[0] == 0 || probability_ == 0) return x;
  if (x.is_cpu()) return x * CpuMask(x, keys_, uses_, probability_);
  at::Tensor kept = Draw(x, [&](at::Tensor part, at::Generator& generator) {
    part.bernoulli_(1 - probability_, generator);
  });
  return x * kept.mul_(1 / (1 - probability_));
}

at::Tensor KeyedDropout::AddNoise(const at::Tensor& x, double deviation) {
  ++uses_;
  if (keys_[0] == 0 || deviation == 0) return x;
  return x + Draw(x, [&](at::Tensor part, at::Generator& generator) {
           part.normal_(0, deviation, generator);
         });
}

at::Tensor AttentionBlock::operator()(const at::Tensor& x, const at::Tensor& mask,
                                      KeyedDropout* dropout, TokenMemory* past) const {
  return norm(x + (*dropout)(attention(x, x, mask, past)));
}

at::Tensor EncoderLayer::operator()(const at::Tensor& x, const at::Tensor& mask,
                                    KeyedDropout* dropout, TokenMemory* past) const {
  const auto y = attention(x, mask, dropout, past);
  const auto inner = relu ? at::relu(in(y)) : at::gelu(in(y));
  return out_norm(y + (*dropout)(out((*dropout)(inner))));
}

at::Tensor LstmLayer::operator()(const at::Tensor& x_BTI, TokenMemory* past) const {
  const int64_t B = x_BTI.size(0), T = x_BTI.size(1), width = state.weight.size(-1);
  const auto inputs = input(x_BTI);
  auto h = at::zeros({B, 1, width}, x_BTI.options().dtype(at::kFloat)), c = h;
  if (KnownTokens(past) > 0) {
    const auto newest = past->Newest().chunk(2, 2);
    h = newest[0];
    c = newest[1];
  }
  std::vector<at::Tensor> outputs, cells;
  for (int64_t t = 0; t < T; ++t) {
    const auto gates = (inputs.narrow(1, t, 1) + state(h)).chunk(4, 2);
    c = at::sigmoid(gates[1]) * c + at::sigmoid(gates[0]) * at::tanh(gates[2]);
    h = at::sigmoid(gates[3]) * at::tanh(c);
    outputs.push_back(h);
    if (past) cells.push_back(c);
  }
  const auto all = at::cat(outputs, 1);
  if (past) past->Append(at::cat({all, at::cat(cells, 1)}, 2), 1);
  return all;
}

}  // namespace routecast
