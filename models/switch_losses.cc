#include "models/switch_losses.h"

#include <ATen/ATen.h>

namespace routecast {
namespace {

// Keeps each layer's router logits and passes everything on.
class RouterLogits final : public RoutingObserver {
 public:
  explicit RouterLogits(RoutingObserver* next) : next_(next) {}
  void OnPassBegin(const PassInfo& pass) override {
    stack_ = pass.stack;
    if (next_) next_->OnPassBegin(pass);
  }
  void OnRouting(const LayerRouting& routing) override {
    logits_[static_cast<size_t>(stack_)].push_back(routing.logits_BTE);
    if (next_) next_->OnRouting(routing);
  }
  void OnPassEnd(const PassInfo& pass) override {
    if (next_) next_->OnPassEnd(pass);
  }
  const std::vector<at::Tensor>& of(Stack stack) const {
    return logits_[static_cast<size_t>(stack)];
  }

 private:
  RoutingObserver* next_;
  Stack stack_ = Stack::kEncoder;
  std::vector<at::Tensor> logits_[2];
};

struct RouterLosses {
  at::Tensor z, aux;
};

RouterLosses LossesOf(const SwitchConfig& config, Stack stack, at::ScalarType type,
                      const std::vector<at::Tensor>& layers) {
  if (config.SparseStep(stack) <= 1 || layers.empty()) {
    return {at::zeros({}), at::zeros({})};
  }
  const at::Tensor logits_BTE = at::cat(layers, 1).to(type);
  return {RouterZLoss(logits_BTE), LoadBalancingLoss(logits_BTE)};
}

}  // namespace

at::Tensor ShiftRight(const SwitchConfig& config, const at::Tensor& labels_BT) {
  const int64_t batch = labels_BT.size(0), length = labels_BT.size(1);
  const at::Tensor start =
      at::full({batch, 1}, config.decoder_start_token_id, labels_BT.options());
  const at::Tensor ids = at::cat({start, labels_BT.narrow(1, 0, length - 1)}, 1);
  return ids.masked_fill(ids == kIgnoredLabel, config.pad_token_id);
}

at::Tensor RouterZLoss(const at::Tensor& logits_BTE) {
  const int64_t tokens = logits_BTE.size(0) * logits_BTE.size(1);
  return at::logsumexp(logits_BTE, -1).pow(2).sum() / tokens;
}

at::Tensor LoadBalancingLoss(const at::Tensor& logits_BTE) {
  const int64_t experts = logits_BTE.size(-1);
  const at::Tensor routed_BE =
      at::one_hot(logits_BTE.argmax(-1), experts).to(at::kFloat).mean(-2);
  const at::Tensor probs_BE = at::softmax(logits_BTE, -1).mean(-2);
  return (routed_BE * probs_BE).mean() * (experts * experts);
}

ConditionalLosses ComputeLosses(SwitchModel* model, const at::Tensor& ids_BS,
                                const at::Tensor& valid_BS, const at::Tensor& labels_BT,
                                const ForwardOptions& options) {
  const SwitchConfig& config = model->config();
  RouterLogits routers(options.observer);
  ForwardOptions watched = options;
  watched.observer = &routers;
  const at::Tensor encoded = model->Encode(ids_BS, valid_BS, watched);
  const at::Tensor hidden =
      model->Decode(ShiftRight(config, labels_BT), labels_BT != kIgnoredLabel, encoded,
                    valid_BS, nullptr, watched);
  ConditionalLosses losses;
  losses.logits_BTV = model->Logits(hidden);
  losses.cross_entropy = at::cross_entropy_loss(losses.logits_BTV.flatten(0, 1),
                                                labels_BT.flatten().to(model->device()),
                                                {}, at::Reduction::Mean, kIgnoredLabel);
  const at::ScalarType type = model->router_type();
  const RouterLosses encoder =
      LossesOf(config, Stack::kEncoder, type, routers.of(Stack::kEncoder));
  const RouterLosses decoder =
      LossesOf(config, Stack::kDecoder, type, routers.of(Stack::kDecoder));
  losses.encoder_z = encoder.z;
  losses.encoder_aux = encoder.aux;
  losses.decoder_z = decoder.z;
  losses.decoder_aux = decoder.aux;
  losses.total = losses.cross_entropy +
                 config.router_z_loss_coef * (encoder.z + decoder.z) +
                 config.router_aux_loss_coef * (encoder.aux + decoder.aux);
  return losses;
}

}  // namespace routecast
