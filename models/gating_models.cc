// The learnable gating predictors of the original system: the router's input and the
// experts of the newest four layers. Published shapes; ours: means over what is real and
// known instead of the padded sequence, causal attention in decoders, and leads.
#include <ATen/ATen.h>

#include <algorithm>
#include <vector>

#include "models/trunk_model.h"

namespace routecast {
namespace {

constexpr int64_t kPositions = 512;  // later tokens share the last one

// Two layers with ReLU between.
struct Mlp {
  Mlp(ParameterMaker* make, const std::string& name, int64_t in, int64_t inner,
      int64_t out)
      : first(make, name + ".in", in, inner), second(make, name + ".out", inner, out) {}
  at::Tensor operator()(const at::Tensor& h) const { return second(at::relu(first(h))); }
  LinearLayer first, second;
};

class GatingModel : public TrunkModel {
 protected:
  GatingModel(const SpeculationConfig& c, const ModelSeeds& seeds)
      : TrunkModel(c, static_cast<int64_t>(seeds.size())), make_(&parameters_, seeds) {}
  void AddOurs() {
    const MoeGeometry& g = config_.geometry;
    features_.emplace_back(&make_, config_, S());
    lead_.emplace_back(&make_, "ours.lead", std::max(g.encoder_layers, g.decoder_layers),
                       S(), 0.02);
  }
  int64_t S() const { return config_.hidden_width; }
  int64_t E() const { return config_.geometry.num_experts; }
  const SourceFeatures& features() const { return features_[0]; }
  // [B,T,C,E]
  at::Tensor Gates(const RoutingWindow& window) const {
    return NewestGates(window, config_, config_.context);
  }
  // h [B,T,S] -> [B,T,H,S], each lead's row added.
  at::Tensor ByLead(const at::Tensor& h, const RoutingWindow& window) const {
    const int64_t H = NumLeads(window.stack, window.source_layer);
    return AddRows(h.unsqueeze(2).expand({-1, -1, H, -1}), lead_[0].Rows(0, H));
  }
  ParameterMaker make_;

 private:
  std::vector<SourceFeatures> features_;
  std::vector<EmbeddingLayer> lead_;
};

// What `contextual` is made of, and most of `hierarchical`.
class ContextualModel : public GatingModel {
 public:
  ContextualModel(const SpeculationConfig& c, const ModelSeeds& seeds)
      : GatingModel(c, seeds),
        in_(&make_, "in", S(), S()),
        position_(&make_, "position", kPositions, S(), 1),
        attention_(&make_, "attention", S(), c.heads),
        gate_norm_(&make_, "norm", S()),
        mix_(&make_, "mix", S() + c.context * (S() / 4), S(), S()),
        head_(&make_, "head", S(), S() / 2, E()),
        confidence_(&make_, "confidence", S(), S() / 4, 1) {
    for (int i = 0; i < c.context; ++i) {
      gates_.emplace_back(&make_, "gates." + std::to_string(i), E(), S() / 4);
    }
    AddOurs();
  }

 protected:
  // [B,T,S]
  at::Tensor Trunk(const RoutingWindow& window, KeyedDropout* dropout,
                   TokenMemory* past) const {
    const auto state = features().Add(in_(features().State(window)), window);
    const auto x = AddRows(state, Positions(KnownTokens(past), state.size(1)));
    const auto seen = (*dropout)(attention_(x, x, TokenMask(window, past), past));
    const auto gates = Gates(window);
    std::vector<at::Tensor> parts{seen};
    for (size_t i = 0; i < gates_.size(); ++i) {
      parts.push_back(gates_[i](gates.select(2, static_cast<int64_t>(i))));
    }
    return gate_norm_(state + (*dropout)(mix_(at::cat(parts, 2))));
  }
  SpeculationOutput Compute(const RoutingWindow& window, KeyedDropout* dropout,
                            TokenMemory* past) override {
    const auto h = ByLead(Trunk(window, dropout, past), window);
    SpeculationOutput out;
    out.logits_BTHE = head_(h);
    out.confidence_BTH = at::sigmoid(confidence_(h).to(at::kFloat)).squeeze(3);
    return out;
  }

 private:
  // Of the places from `first` on, for AddRows.
  at::Tensor Positions(int64_t first, int64_t count) const {
    const int64_t own = std::clamp(kPositions - first, int64_t{0}, count);
    auto rows = position_.Rows(std::min(first, kPositions - 1), own);
    if (own == count) return rows;
    const auto last = position_.Rows(kPositions - 1, 1);
    auto sizes = last.sizes().vec();
    sizes[sizes.size() - 2] = count - own;
    return at::cat({rows, last.expand(sizes)}, rows.dim() - 2);
  }

  LinearLayer in_;
  EmbeddingLayer position_;
  AttentionLayer attention_;
  std::vector<LinearLayer> gates_;
  NormLayer gate_norm_;
  Mlp mix_;
  Mlp head_, confidence_;
};

// `contextual` with a second opinion from the mean of the sequence.
class HierarchicalModel final : public ContextualModel {
 public:
  HierarchicalModel(const SpeculationConfig& c, const ModelSeeds& seeds)
      : ContextualModel(c, seeds),
        sequence_(&make_, "sequence", S(), S() / 2, E()),
        share_(make_.Constant("share", {2}, 0)) {
    // softmax of these is .7 and .3.
    share_.detach().select(-1, 0).fill_(0.8472979);
  }

 protected:
  SpeculationOutput Compute(const RoutingWindow& window, KeyedDropout* dropout,
                            TokenMemory* past) override {
    SpeculationOutput out = ContextualModel::Compute(window, dropout, past);
    const auto state = features().State(window);
    const auto mean = SequenceMean(state, window, past).expand(state.sizes());
    const auto second = sequence_(ByLead(mean, window));
    const auto share = at::softmax(share_, -1).view({members(), 1, 2});
    const auto by_member = [&](const at::Tensor& x, int64_t which) {
      return (x.reshape({members(), -1, 1}) * share.narrow(2, which, 1)).view(x.sizes());
    };
    out.logits_BTHE = by_member(out.logits_BTHE, 0) + by_member(second, 1);
    return out;
  }

 private:
  Mlp sequence_;
  at::Tensor share_;  // [2]
};

// Encoder layers over the state and a memory of the gates.
class TransformerModel final : public GatingModel {
 public:
  TransformerModel(const SpeculationConfig& c, const ModelSeeds& seeds)
      : GatingModel(c, seeds),
        in_(&make_, "in", S(), S()),
        memory_{{&make_, "gates.0", c.context * E(), S() / 4},
                {&make_, "gates.1", S() / 4, S() / 4}},
        memory_out_(&make_, "gates.out", S() / 4, S()),
        head_(&make_, "head", c.geometry, S()),
        confidence_(&make_, "confidence", S(), 1) {
    for (int i = 0; i < c.layers; ++i) {
      layers_.emplace_back(&make_, "layer." + std::to_string(i), S(), c.heads, 4 * S(),
                           /*relu=*/true);
    }
    AddOurs();
  }

 protected:
  SpeculationOutput Compute(const RoutingWindow& window, KeyedDropout* dropout,
                            TokenMemory* past) override {
    const auto gates = Gates(window).flatten(2, 3);
    auto x = features().Add(in_(features().State(window)), window) +
             memory_out_(memory_[1]((*dropout)(memory_[0](gates, past)), past));
    const auto mask = TokenMask(window, past);
    for (const EncoderLayer& layer : layers_) x = layer(x, mask, dropout, past);
    SpeculationOutput out;
    out.logits_BTHE = head_(x, window);
    out.confidence_BTH =
        at::sigmoid(confidence_(ByLead(x, window)).to(at::kFloat)).squeeze(3);
    return out;
  }

 private:
  LinearLayer in_;
  LstmLayer memory_[2];
  LinearLayer memory_out_;
  std::vector<EncoderLayer> layers_;
  TargetHead head_;
  LinearLayer confidence_;
};

}  // namespace

std::unique_ptr<SpeculationModel> MakeGating(const SpeculationConfig& config,
                                             const ModelSeeds& seeds) {
  if (config.kind == "contextual") {
    return std::make_unique<ContextualModel>(config, seeds);
  }
  if (config.kind == "hierarchical") {
    return std::make_unique<HierarchicalModel>(config, seeds);
  }
  return std::make_unique<TransformerModel>(config, seeds);
}

}  // namespace routecast
