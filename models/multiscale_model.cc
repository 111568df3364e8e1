// `multiscale`: three views of a token's newest 2, 3 and 4 layers, each with an encoder
// of its own, adapted to one width and fused by learnt weights and by attention over the
// three. The published shapes; contexts are left-padded and masked, so that no row of
// attention is without a key that counts (the original's masks were inverted, and its
// loss was no number from the first step on).
#include <ATen/ATen.h>

#include <vector>

#include "models/multiscale_shapes.h"
#include "models/token_inputs.h"
#include "models/trunk_model.h"

namespace routecast {
namespace {

constexpr double kGain = 0.1;

struct Branch {
  Branch(ParameterMaker* make, const std::string& name, const SpeculationConfig& c,
         BranchShape shape)
      : context(shape.context),
        slot(make->Normal(name + ".slot", {shape.context, c.width}, 0.02)),
        before(make->Normal("ours." + name + ".slot_before", {shape.context, c.width},
                            0.02)),
        read(make, name + ".read", c.width, HeadsFor(c.width, shape.heads), kGain),
        norm(make, name + ".norm", c.width) {
    for (int i = 0; i < shape.layers; ++i) {
      layers.emplace_back(make, name + ".layer." + std::to_string(i), c.width,
                          HeadsFor(c.width, shape.heads), c.ff, false, kGain);
    }
  }
  int context;
  at::Tensor slot, before;  // the own token's layers; the token's before (decoder)
  std::vector<EncoderLayer> layers;
  AttentionLayer read;  // the newest slot asks, all rows of all tokens answer
  NormLayer norm;
};

struct Adapter {
  Adapter(ParameterMaker* make, const std::string& name, int64_t width, int64_t inner)
      : in(make, name + ".in", width, inner, kGain),
        out(make, name + ".out", inner, width, kGain) {}
  LinearLayer in, out;
};

class MultiscaleModel final : public TrunkModel {
 public:
  MultiscaleModel(const SpeculationConfig& c, const ModelSeeds& seeds)
      : TrunkModel(c, static_cast<int64_t>(seeds.size())),
        make_(&parameters_, seeds),
        expert_(&make_, "expert.embedding", c.geometry.num_experts, c.width, 0.02),
        unknown_(&make_, "ours.unknown_expert", 1, c.width, 0.02),
        features_(&make_, FeaturesOf(c), c.width),
        mix_(make_.Constant("fusion.weights", {kBranches}, 1.0 / kBranches)),
        fuse_(&make_, "fusion.attention", c.width, HeadsFor(c.width, kFusionHeads),
              kGain),
        norm_(&make_, "fusion.norm", c.width),
        head_(&make_, "head", c.geometry, c.width, kGain),
        confidence_(&make_, "confidence", c.width, 1, kGain),
        lead_(&make_, "ours.lead", c.geometry.num_layers(), c.width, 0.02),
        inputs_(&make_, c, c.width) {
    constexpr double kInner[kBranches] = {0.5, 1, 2};
    for (int i = 0; i < kBranches; ++i) {
      const std::string name = "branch." + std::to_string(i);
      branches_.emplace_back(&make_, name, c, kBranchShapes[i]);
      adapters_.emplace_back(&make_, "adapter." + std::to_string(i), c.width,
                             static_cast<int64_t>(c.width * kInner[i]));
    }
  }

 protected:
  SpeculationOutput Compute(const RoutingWindow& window, KeyedDropout* dropout,
                            TokenMemory* past) override;

 private:
  // Of the source layer alone.
  static SpeculationConfig FeaturesOf(SpeculationConfig c) {
    c.vocab_size = c.hidden_width = 0;  // those are TokenInputs'
    return c;
  }
  at::Tensor Experts(const at::Tensor& ids) const;
  at::Tensor View(const Branch& branch, const RoutingWindow& window,
                  KeyedDropout* dropout, TokenMemory* past) const;

  ParameterMaker make_;
  EmbeddingLayer expert_, unknown_;
  SourceFeatures features_;
  std::vector<Branch> branches_;
  std::vector<Adapter> adapters_;
  at::Tensor mix_;  // [3]
  AttentionLayer fuse_;
  NormLayer norm_;
  TargetHead head_;
  LinearLayer confidence_;
  EmbeddingLayer lead_;
  TokenInputs inputs_;
};

at::Tensor MultiscaleModel::Experts(const at::Tensor& ids) const {
  const auto absent = ids.eq(config_.geometry.num_experts);
  const auto known = expert_(ids.masked_fill(absent, 0));
  const auto unknown = AddRow(at::zeros_like(known), unknown_.Row(0));
  return at::where(absent.unsqueeze(-1), unknown, known);
}

// [B,T,D] of one branch.
at::Tensor MultiscaleModel::View(const Branch& branch, const RoutingWindow& window,
                                 KeyedDropout* dropout, TokenMemory* past) const {
  const ExpertSlots slots = SlotsOf(window, branch.context);
  const int64_t B = slots.ids_BTR.size(0), T = slots.ids_BTR.size(1);
  const int64_t R = slots.ids_BTR.size(2), D = config_.width;
  const auto embedded = inputs_.AddToNewest(Experts(slots.ids_BTR), window);
  auto slot = branch.slot;
  if (R > branch.context) slot = at::cat({branch.before, slot}, slot.dim() - 2);
  auto x = AddRows(embedded, slot).view({B, T * R, D});
  const int64_t first = KnownTokens(past) * R;
  x = x + Sinusoid(T * R, D, x.options().requires_grad(false), first);
  const auto mask = SlotMask(slots, window.stack, past);
  for (const EncoderLayer& layer : branch.layers) x = layer(x, mask, dropout, past);
  const auto query = features_.Add(embedded.select(2, R - 1), window);
  // A token's rows end at R * (t + 1): the mask of its newest row is the query's.
  const auto read_mask =
      mask.size(2) == 1 ? mask : mask.view({B, 1, T, R, first + T * R}).select(3, R - 1);
  return branch.norm(query + (*dropout)(branch.read(query, x, read_mask, past)));
}

SpeculationOutput MultiscaleModel::Compute(const RoutingWindow& window,
                                           KeyedDropout* dropout, TokenMemory* past) {
  const int64_t H = NumLeads(window.stack, window.source_layer);
  std::vector<at::Tensor> views;
  for (size_t i = 0; i < kBranches; ++i) {
    const auto view = View(branches_[i], window, dropout, past);
    const auto inner = at::gelu(adapters_[i].in(view));
    views.push_back(adapters_[i].out((*dropout)(inner)));
  }
  const auto a = at::stack(views, 2);  // [B,T,3,D]
  const int64_t B = a.size(0), T = a.size(1), D = a.size(3);
  const auto weights = at::softmax(mix_, -1).view({members(), 1, kBranches, 1});
  const auto weighted = [&](const at::Tensor& x) {
    return (x.reshape({members(), -1, kBranches, D}) * weights).sum(2).view({B, T, D});
  };
  const auto rows = a.view({B * T, kBranches, D});
  const auto h = norm_(weighted(fuse_(rows, rows, {})) + weighted(a));
  SpeculationOutput out;
  out.logits_BTHE = head_(h, window);
  const auto by_lead = AddRows(h.unsqueeze(2).expand({-1, -1, H, -1}), lead_.Rows(0, H));
  out.confidence_BTH = at::sigmoid(confidence_(by_lead).to(at::kFloat)).squeeze(3);
  return out;
}

}  // namespace

std::unique_ptr<SpeculationModel> MakeMultiscale(const SpeculationConfig& config,
                                                 const ModelSeeds& seeds) {
  return std::make_unique<MultiscaleModel>(config, seeds);
}

}  // namespace routecast
