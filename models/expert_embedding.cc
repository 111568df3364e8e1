#include "models/expert_embedding.h"

#include <ATen/ATen.h>

#include <algorithm>

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
      source(make, "source.embedding", MostLayers(c.geometry) + 1, c.width, 0.02) {
  if (c.geometry.experts_per_token > 1) {
    others.emplace_back(make, "others.embedding", c.geometry.num_experts + 1, c.width,
                        kExpertStd);
  }
}

at::Tensor ExpertEmbedding::operator()(const ExpertSlots& slots,
                                       const RoutingWindow& window,
                                       KeyedDropout* dropout) const {
  const int64_t B = slots.ids_BTR.size(0), T = slots.ids_BTR.size(1);
  const int64_t R = slots.ids_BTR.size(2), W = context;
  auto rows = slot.Rows(0, W);
  if (R > W) rows = at::cat({slot.Rows(W, W), rows}, rows.dim() - 2);
  auto x = expert(slots.ids_BTR);
  if (!others.empty() && slots.others_BTRK.defined()) {
    x = x + others[0](slots.others_BTRK).sum(3);
  }
  x = AddRows(x, rows);
  x = AddRow(x, stack.Row(static_cast<int64_t>(window.stack)));
  x = AddRow(x, source.Row(window.source_layer + 1));
  x = x.view({B, T * R, width});
  x = Mixed(x, window.training);
  if (window.training.noise > 0) x = dropout->AddNoise(x, window.training.noise);
  return x + Sinusoid(T * R, width, x.options().requires_grad(false));
}

at::Tensor ExpertEmbedding::Keys() const {
  const auto keys = expert.Rows(0, expert.rows() - 1);
  return keys.reshape({-1, width});
}

}  // namespace routecast
