// `stale_correction`: the traced model's own routers, applied to the state at the source
// layer plus a learnt correction of low rank. It starts as the stale gate and learns what
// the layers between change.
#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include <vector>

#include "common/errors.h"
#include "models/checkpoint.h"
#include "models/trunk_model.h"

namespace routecast {
namespace {

constexpr double kGone = 1e-12;  // a channel whose gain is below cannot come back

class StaleCorrectionModel final : public TrunkModel {
 public:
  StaleCorrectionModel(const SpeculationConfig& c, const ModelSeeds& seeds)
      : TrunkModel(c, static_cast<int64_t>(seeds.size())),
        make_(&parameters_, seeds),
        features_(&make_, c, c.width),
        gates_(&make_, "gates", c.geometry.num_experts, c.width),
        up_(make_.Xavier("up", {c.geometry.num_layers(), c.hidden_width, c.width}, 0.1)),
        scale_(make_.Constant("scale", {c.geometry.num_layers()}, 1)) {
    const int64_t layers = c.geometry.num_layers();
    // Sources of the encoder but its last, after which nothing lies, then the decoder's.
    for (int source = 0; source < layers + 1; ++source) {
      down_.emplace_back(&make_, "down." + std::to_string(source), c.hidden_width,
                         c.width);
    }
    router_ = at::zeros({layers, c.geometry.num_experts, c.hidden_width});
    bias_ = at::zeros({layers, c.geometry.num_experts});
    gain_ = at::ones({layers, c.hidden_width});
    constants_.Add("router.weight", router_);
    constants_.Add("router.bias", bias_);
    constants_.Add("router.norm_gain", gain_);
  }

  void FitRouters(const std::vector<RouterWeights>& routers) override {
    if (static_cast<int>(routers.size()) != config_.geometry.num_layers()) {
      throw UsageError(
          ErrorText("--kind=stale_correction is not available for this store",
                    "it has no routers.safetensors",
                    "collect with routecast-collect, or use another kind"));
    }
    const c10::NoGradGuard no_grad;
    for (size_t l = 0; l < routers.size(); ++l) {
      const auto at = static_cast<int64_t>(l);
      router_.select(0, at).copy_(routers[l].weight_ED);
      if (routers[l].bias_E.defined()) bias_.select(0, at).copy_(routers[l].bias_E);
      gain_.select(0, at).copy_(routers[l].norm_gain_D);
    }
  }

 protected:
  SpeculationOutput Compute(const RoutingWindow& window, KeyedDropout* dropout,
                            TokenMemory*) override {
    const MoeGeometry& g = config_.geometry;
    const int64_t L = g.layers(window.stack), base = g.GlobalLayer(window.stack, 0);
    const int64_t H = NumLeads(window.stack, window.source_layer);
    const auto x = Normed(window);
    const int row = window.source_layer + 1 +
                    (window.stack == Stack::kEncoder ? 0 : g.encoder_layers);
    auto z = down_[static_cast<size_t>(row)](x) +
             gates_(NewestGates(window, config_, 1).squeeze(2));
    z = (*dropout)(features_.Add(z, window));
    std::vector<at::Tensor> leads;
    for (int64_t lead = 1; lead <= H; ++lead) {
      const int64_t target = base + (window.source_layer + lead) % L;
      const auto state = x + Product(z, up_.select(up_.dim() - 3, target));
      const auto logits = at::linear(state * gain_.select(0, target),
                                     router_.select(0, target), bias_.select(0, target));
      const auto scale = scale_.select(-1, target).view({members(), 1, 1});
      leads.push_back(
          (logits.reshape({members(), -1, g.num_experts}) * scale).view(logits.sizes()));
    }
    SpeculationOutput out;
    out.logits_BTHE = at::stack(leads, 2);
    out.confidence_BTH = LargestProbability(out.logits_BTHE);
    return out;
  }

 private:
  // The state as the norm leaves it, without the gain of the layer that it was recorded
  // at.
  at::Tensor Normed(const RoutingWindow& window) const {
    const MoeGeometry& g = config_.geometry;
    const auto state = features_.State(window);
    if (window.source_layer < 0 && window.stack == Stack::kEncoder) return state;
    const int layer = window.source_layer < 0
                          ? g.num_layers() - 1  // the token before, last layer
                          : g.GlobalLayer(window.stack, window.source_layer);
    const auto gain = gain_.select(0, layer);
    const auto gone = gain.abs().lt(kGone);
    return (state / gain.masked_fill(gone, 1)).masked_fill(gone, 0);
  }

  ParameterMaker make_;
  SourceFeatures features_;
  LinearLayer gates_;
  std::vector<LinearLayer> down_;
  at::Tensor up_;     // [layers,S,width]
  at::Tensor scale_;  // [layers]
  at::Tensor router_, bias_, gain_;
};

}  // namespace

std::unique_ptr<SpeculationModel> MakeStaleCorrection(const SpeculationConfig& config,
                                                      const ModelSeeds& seeds) {
  return std::make_unique<StaleCorrectionModel>(config, seeds);
}

}  // namespace routecast
