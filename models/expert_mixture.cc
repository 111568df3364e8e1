#include "models/expert_mixture.h"

#include <ATen/ATen.h>

#include "models/onednn_linear.h"

namespace routecast {

ExpertMixture::ExpertMixture(ParameterMaker* make, const std::string& name, int64_t width,
                             int64_t ff)
    : router_(make->Xavier(name + ".router", {kExperts, width})),
      in_(make->Xavier(name + ".in.weight", {kExperts, ff, width})),
      in_bias_(make->Constant(name + ".in.bias", {kExperts, ff}, 0)),
      out_(make->Xavier(name + ".out.weight", {kExperts, width, ff})),
      out_bias_(make->Constant(name + ".out.bias", {kExperts, width}, 0)) {}

ExpertMixture::Output ExpertMixture::operator()(const at::Tensor& x,
                                                const at::Tensor& counts,
                                                KeyedDropout* dropout) const {
  const int64_t members = router_.dim() == 3 ? router_.size(0) : 1;
  const auto probs = at::softmax(Product(x, router_), -1, at::kFloat);
  const auto [gate, choice] = probs.max(-1, /*keepdim=*/true);

  // How even the load is, as the Switch Transformer measures it.
  const auto weight = counts.reshape({members, -1, 1}).to(at::kFloat);
  const auto total = weight.sum(1).clamp_min(1);
  const auto share = (at::one_hot(choice.squeeze(-1), kExperts)
                          .view({members, -1, kExperts})
                          .to(at::kFloat) *
                      weight)
                         .sum(1) /
                     total;
  const auto mean = (probs.view({members, -1, kExperts}) * weight).sum(1) / total;

  // Rows sorted by (member, expert), each run through its own matrices, and back.
  const int64_t rows = choice.numel() / members;
  const auto member = at::arange(members, choice.options()).repeat_interleave(rows);
  const auto [sorted, order] =
      (choice.flatten() + member * kExperts).sort(/*stable=*/true, 0, false);
  const auto run = at::bincount(sorted, {}, members * kExperts).cpu();
  const auto input = x.reshape({-1, x.size(-1)}).index_select(0, order);
  const auto table = [&](const at::Tensor& t, int64_t trailing) {
    return t.reshape([&] {
      std::vector<int64_t> sizes{members * kExperts};
      for (int64_t i = t.dim() - trailing; i < t.dim(); ++i) sizes.push_back(t.size(i));
      return sizes;
    }());
  };
  const auto in = table(in_, 2), in_bias = table(in_bias_, 1);
  const auto out = table(out_, 2), out_bias = table(out_bias_, 1);
  std::vector<at::Tensor> inner, outer;
  std::vector<int64_t> sizes(run.data_ptr<int64_t>(),
                             run.data_ptr<int64_t>() + run.numel());
  const auto parts = input.split_with_sizes(sizes);
  for (size_t i = 0; i < parts.size(); ++i) {
    const auto at = static_cast<int64_t>(i);
    inner.push_back(at::gelu(TrainedLinear(parts[i], in[at], in_bias[at])));
  }
  const auto back = at::argsort(order);
  // Dropout in the order of x, so that a member draws what it would draw alone.
  const auto dropped =
      (*dropout)(at::cat(inner).index_select(0, back).view({x.size(0), x.size(1), -1}))
          .view({x.size(0) * x.size(1), -1})
          .index_select(0, order)
          .split_with_sizes(sizes);
  for (size_t i = 0; i < dropped.size(); ++i) {
    const auto at = static_cast<int64_t>(i);
    outer.push_back(TrainedLinear(dropped[i], out[at], out_bias[at]));
  }
  return {at::cat(outer).index_select(0, back).view(x.sizes()) * gate,
          (share * mean).sum(1) * kExperts};
}

}  // namespace routecast
