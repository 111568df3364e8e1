#include "models/ensemble_model.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <numeric>
#include <stdexcept>

#include "common/random.h"
#include "models/trunk_model.h"

namespace routecast {
namespace {

constexpr uint64_t kMemberStream = 0x6d656d626572ULL;
constexpr char kStackWeights[] = "stack.weights";  // [stacks, sources, leads, M]

// Members of one shape, in the order of the configuration.
struct MemberGroup {
  std::vector<size_t> members;  // their places in the ensemble
  std::unique_ptr<SpeculationModel> model;
};

at::Tensor PartOf(const at::Tensor& x, int64_t parts, int64_t part) {
  if (!x.defined() || parts == 1) return x;
  const int64_t rows = x.size(0) / parts;
  return x.narrow(0, part * rows, rows);
}

class EnsembleModel final : public SpeculationModel {
 public:
  EnsembleModel(const SpeculationConfig& config, uint64_t seed)
      : SpeculationModel(config) {
    for (size_t m = 0; m < config.members.size(); ++m) {
      MemberGroup* group = nullptr;
      for (MemberGroup& g : groups_) {
        if (config.members[g.members[0]] == config.members[m]) group = &g;
      }
      if (!group) group = &groups_.emplace_back();
      group->members.push_back(m);
    }
    for (size_t i = 0; i < groups_.size(); ++i) {
      MemberGroup& group = groups_[i];
      std::vector<uint64_t> seeds;
      for (const size_t m : group.members) {
        seeds.push_back(MemberSeed(seed, static_cast<int64_t>(m)));
      }
      const SpeculationConfig& member = config.members[group.members[0]];
      group.model = KindOf(member.kind).make(member, seeds);
      const std::string prefix = "group." + std::to_string(i) + ".";
      for (const auto& [name, tensor] : group.model->parameters().items()) {
        parameters_.Add(prefix + name, tensor);
      }
      for (const auto& [name, tensor] : group.model->constants().items()) {
        constants_.Add(prefix + name, tensor);
      }
    }
    if (config.combine != "stack") return;
    const auto members = static_cast<int64_t>(config.members.size());
    const int64_t layers =
        std::max(config.geometry.encoder_layers, config.geometry.decoder_layers);
    constants_.Add(kStackWeights, at::full({2, layers + 1, layers, members},
                                           1.0 / static_cast<double>(members)));
  }

  void FitPriors(const BaselineTables& tables) override {
    for (MemberGroup& group : groups_) group.model->FitPriors(tables);
  }
  void FitRouters(const std::vector<RouterWeights>& routers) override {
    for (MemberGroup& group : groups_) group.model->FitRouters(routers);
  }
  int history_tokens() const override {
    int most = 1;
    for (const MemberGroup& group : groups_) {
      most = std::max(most, group.model->history_tokens());
    }
    return most;
  }

  bool keeps_tokens() const override {
    return std::any_of(groups_.begin(), groups_.end(), [](const MemberGroup& group) {
      return group.model->keeps_tokens();
    });
  }
  void PrepareServing() override {
    for (MemberGroup& group : groups_) group.model->PrepareServing();
  }

  std::vector<SpeculationOutput> ForwardMembers(const RoutingWindow& window,
                                                uint64_t dropout_key) override {
    std::vector<SpeculationOutput> outputs(config_.members.size());
    for (size_t i = 0; i < groups_.size(); ++i) {
      const uint64_t key = MemberKey(dropout_key, static_cast<int64_t>(i));
      Spread(groups_[i], groups_[i].model->Forward(window, key), &outputs);
    }
    return outputs;
  }

  SpeculationOutput Forward(const RoutingWindow& window, uint64_t dropout_key) override {
    return Combine(window, ForwardMembers(window, dropout_key));
  }

  SpeculationOutput ForwardLast(const RoutingWindow& window) override {
    std::vector<SpeculationOutput> outputs(config_.members.size());
    for (const MemberGroup& group : groups_) {
      Spread(group, group.model->ForwardLast(window), &outputs);
    }
    return Combine(window, outputs);
  }

  std::vector<std::vector<ParameterSlice>> MemberParameters() const override {
    std::vector<std::vector<ParameterSlice>> members(config_.members.size());
    for (size_t i = 0; i < groups_.size(); ++i) {
      const MemberGroup& group = groups_[i];
      const bool shared = group.members.size() > 1;
      for (size_t p = 0; p < group.members.size(); ++p) {
        for (const auto& [name, tensor] : group.model->parameters().items()) {
          members[group.members[p]].push_back({"group." + std::to_string(i) + "." + name,
                                               tensor,
                                               shared ? static_cast<int64_t>(p) : -1});
        }
      }
    }
    return members;
  }

  // [leads, M]
  at::Tensor StackSource(Stack stack, int source_layer) const {
    return constants_.Get(kStackWeights)
        .select(0, static_cast<int64_t>(stack))
        .select(0, source_layer + 1);
  }

  void SetWeights(std::vector<double> weights) {
    const double sum = std::accumulate(weights.begin(), weights.end(), 0.0);
    if (weights.size() != config_.members.size() || !(sum > 0)) {
      throw std::logic_error("weights of an ensemble that do not fit it");
    }
    for (double& w : weights) w /= sum;
    config_.weights = std::move(weights);
  }

 private:
  // A group's output holds its members one after another.
  static void Spread(const MemberGroup& group, const SpeculationOutput& all,
                     std::vector<SpeculationOutput>* outputs) {
    const auto parts = static_cast<int64_t>(group.members.size());
    for (int64_t p = 0; p < parts; ++p) {
      SpeculationOutput& out = (*outputs)[group.members[static_cast<size_t>(p)]];
      out.logits_BTHE = PartOf(all.logits_BTHE, parts, p);
      out.confidence_BTH = PartOf(all.confidence_BTH, parts, p);
      out.next_token_BTV = PartOf(all.next_token_BTV, parts, p);
      out.own_loss = PartOf(all.own_loss, parts, p);
      out.features_BTHD = PartOf(all.features_BTHD, parts, p);
      out.expert_keys_ED = PartOf(all.expert_keys_ED, parts, p);
      out.pattern_entropy_BT = PartOf(all.pattern_entropy_BT, parts, p);
    }
  }

  // A member's answer [B,T,H,E] as it counts.
  at::Tensor Weighted(const RoutingWindow& window, size_t m, const at::Tensor& x) const {
    if (config_.combine != "stack") return x * config_.weights[m];
    return x * StackSource(window.stack, window.source_layer)
                   .narrow(0, 0, x.size(2))
                   .narrow(1, static_cast<int64_t>(m), 1);
  }

  SpeculationOutput Combine(const RoutingWindow& window,
                            const std::vector<SpeculationOutput>& outputs) const {
    SpeculationOutput mixed;
    for (size_t m = 0; m < outputs.size(); ++m) {
      const at::Tensor& logits = outputs[m].logits_BTHE;
      at::Tensor vote = logits;
      if (config_.combine == "probabilities") vote = at::softmax(logits, -1);
      if (config_.combine == "vote") {
        vote = at::one_hot(logits.argmax(-1), logits.size(-1)).to(at::kFloat);
      }
      if (config_.combine == "stack") vote = at::log_softmax(logits, -1);
      const at::Tensor part = Weighted(window, m, vote);
      const auto share = outputs[m].confidence_BTH * config_.weights[m];
      mixed.logits_BTHE = m == 0 ? part : mixed.logits_BTHE + part;
      mixed.confidence_BTH = m == 0 ? share : mixed.confidence_BTH + share;
    }
    // Shares of votes tie and are zero often: a floor keeps them finite as logits.
    constexpr double kLeast = 1e-6;
    if (config_.combine == "probabilities" || config_.combine == "vote") {
      mixed.logits_BTHE = mixed.logits_BTHE.clamp_min(kLeast).log();
    }
    return mixed;
  }

  std::vector<MemberGroup> groups_;
};

}  // namespace

uint64_t MemberSeed(uint64_t seed, int64_t m) {
  return Mix(seed, kMemberStream, static_cast<uint64_t>(m));
}

std::unique_ptr<SpeculationModel> MakeEnsemble(const SpeculationConfig& config,
                                               const ModelSeeds& seeds) {
  if (seeds.size() != 1) throw std::logic_error("an ensemble in an ensemble");
  return std::make_unique<EnsembleModel>(config, seeds.each[0]);
}

void SetMemberWeights(SpeculationModel* ensemble, const std::vector<double>& weights) {
  auto* model = dynamic_cast<EnsembleModel*>(ensemble);
  if (!model) throw std::logic_error("weights for a model that has no members");
  model->SetWeights(weights);
}

at::Tensor StackWeights(const SpeculationModel& ensemble, Stack stack, int source_layer,
                        int lead) {
  const auto* model = dynamic_cast<const EnsembleModel*>(&ensemble);
  if (!model || model->config().combine != "stack") {
    throw std::logic_error("stack weights of a model that has none");
  }
  return model->StackSource(stack, source_layer).select(0, lead - 1);
}

}  // namespace routecast
