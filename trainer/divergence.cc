#include "trainer/divergence.h"

#include <ATen/ATen.h>

#include <utility>

namespace routecast {
namespace {

using Named = std::vector<std::pair<std::string, at::Tensor>>;

bool IsFinite(const at::Tensor& x) {
  return !x.defined() || !x.is_floating_point() || x.isfinite().all().item<bool>();
}

Named Inputs(const SpeculationBatch& batch) {
  const RoutingWindow& w = batch.window;
  return {{"router input (hidden_BTD)", w.hidden_BTD},
          {"router input of the token before (context_BTD)", w.context_BTD},
          {"router input of the encoder (source_BSD)", w.source_BSD},
          {"attention summary (attention_entropy_BTA)", w.attention_entropy_BTA},
          {"router's top-k (teacher_probs_BTHK)", batch.teacher_probs_BTHK},
          {"weight of labels (weights_BT)", batch.weights_BT}};
}

Named Outputs(const SpeculationOutput& o) {
  return {{"features", o.features_BTHD},    {"expert keys", o.expert_keys_ED},
          {"logits", o.logits_BTHE},        {"confidence", o.confidence_BTH},
          {"next token", o.next_token_BTV}, {"backups", o.backups_BTHKE},
          {"loss of the kind", o.own_loss}};
}

}  // namespace

std::string FirstNotFinite(const SpeculationModel& model, const SpeculationBatch& batch,
                           const std::vector<SpeculationOutput>& outputs) {
  Named all;
  for (const auto& [name, x] : model.parameters().items()) {
    all.emplace_back("parameter " + name, x);
  }
  for (const auto& [name, x] : model.constants().items()) {
    all.emplace_back("constant " + name, x);
  }
  for (const auto& [name, x] : Inputs(batch)) all.emplace_back(name, x);
  for (size_t m = 0; m < outputs.size(); ++m) {
    const std::string member =
        outputs.size() > 1 ? " of member " + std::to_string(m) : std::string();
    for (const auto& [name, x] : Outputs(outputs[m])) {
      all.emplace_back("output " + name + member, x);
    }
  }
  for (const auto& [name, x] : all) {
    if (!IsFinite(x)) return name;
  }
  return "";
}

void ThrowDiverged(const std::string& where, const SpeculationModel& model,
                   const SpeculationBatch& batch,
                   const std::vector<SpeculationOutput>& outputs) {
  const std::string first = FirstNotFinite(model, batch, outputs);
  throw DivergedError(ErrorText(
      "the loss is not finite in " + where + " (micro-batch " + std::to_string(batch.id) +
          ", " + StackName(batch.window.stack) + ", source layer " +
          std::to_string(batch.window.source_layer) + ")",
      first.empty() ? "parameters, inputs and outputs are: a sum of the loss overflowed"
                    : "first tensor that is not finite: " + first,
      kDivergedAdvice));
}

}  // namespace routecast
