#include "models/expert_embedding.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>

namespace routecast {
namespace {

constexpr int kPublishedSlots = 12;
// The published 0.02 drowns in the positions, whose sines and cosines are of the order
// of 1: it takes hundreds of steps until an expert's id is seen at all.
constexpr double kExpertStd = 1;

int MostLayers(const MoeGeometry& g) {
  return std::max(g.encoder_layers, g.decoder_layers);
}

}  // namespace

ExpertEmbedding::ExpertEmbedding(ParameterMaker* make, const SpeculationConfig& c)
    : context(c.context),
      width(c.width),
      expert(make, "expert.embedding", c.geometry.num_experts + 1, c.width, kExpertStd),
      slot(make, "slot.embedding", std::max(kPublishedSlots, 2 * c.context), c.width,
           0.02),
      stack(make, "stack.embedding", 2, c.width, 0.02),
      source(make, "source.embedding", MostLayers(c.geometry) + 1, c.width, 0.02),
      others(c.geometry.experts_per_token > 1
                 ? std::vector{EmbeddingLayer(make, "others.embedding",
                                              c.geometry.num_experts + 1, c.width,
                                              kExpertStd)}
                 : std::vector<EmbeddingLayer>()),
      inputs(make, c, c.width) {}

at::Tensor ExpertEmbedding::operator()(const ExpertSlots& slots,
                                       const RoutingWindow& window, KeyedDropout* dropout,
                                       int64_t first_token) const {
  const int64_t B = slots.ids_BTR.size(0), T = slots.ids_BTR.size(1);
  const int64_t R = slots.ids_BTR.size(2), W = context;
  const bool before = window.stack == Stack::kDecoder;  // the token before has rows, too
  const int64_t seen = before ? R / 2 : R, first = W - seen;
  auto rows = slot.Rows(first, seen);
  if (before) rows = at::cat({slot.Rows(W + first, seen), rows}, rows.dim() - 2);
  auto x = expert(slots.ids_BTR);
  if (!others.empty() && slots.others_BTRK.defined()) {
    x = x + others[0](slots.others_BTRK).sum(3);
  }
  x = AddRows(x, rows);
  x = AddRow(x, stack.Row(static_cast<int64_t>(window.stack)));
  x = AddRow(x, source.Row(window.source_layer + 1));
  x = inputs.AddToNewest(x, window).view({B, T * R, width});
  x = Mixed(x, window.training);
  if (window.training.noise > 0) x = dropout->AddNoise(x, window.training.noise);
  const int64_t parts = before ? 2 : 1;
  const auto places = Sinusoid(T * parts * W, width, x.options().requires_grad(false),
                               first_token * parts * W)
                          .view({T * parts, W, width})
                          .narrow(1, first, seen);
  return x + places.reshape({T * R, width});
}

at::Tensor ExpertEmbedding::HiddenIdLoss(const at::Tensor& x_BND,
                                         const RoutingWindow& window) const {
  const int64_t M = expert.weight.dim() == 3 ? expert.weight.size(0) : 1;
  const auto labels =
      SlotRows(window.training.hidden_ids_BTL, window, ContextOf(window, context), -100);
  const auto keys = Keys().view({M, -1, width}) / std::sqrt(static_cast<double>(width));
  const auto logits = at::matmul(x_BND.reshape({M, -1, width}), keys.transpose(1, 2));
  return at::cross_entropy_loss(logits.flatten(0, 1).to(at::kFloat), labels.flatten(), {},
                                at::Reduction::None, -100)
      .view({M, -1})
      .sum(1);
}

at::Tensor ExpertEmbedding::Keys() const {
  const auto keys = expert.Rows(0, expert.rows() - 1);
  return keys.reshape({-1, width});
}

}  // namespace routecast
