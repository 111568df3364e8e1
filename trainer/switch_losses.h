// Losses and routing measures of pre-training.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

#include "models/switch_model.h"
#include "trainer/denoising_batch.h"

namespace routecast {

// Keeps each MoE layer's routing with its gradient, for the balance loss and the
// measures.
class RoutingCollector : public RoutingObserver {
 public:
  void OnPassBegin(const PassInfo& pass) override { valid_ = pass.valid_BT; }
  void OnRouting(const LayerRouting& routing) override;
  void OnPassEnd(const PassInfo&) override {}

  struct Layer {
    int layer = 0;
    at::Tensor probs_NE;  // fp32, real tokens only
    at::Tensor ids_N;
  };
  const std::vector<Layer>& layers() const { return layers_; }

 private:
  at::Tensor valid_;
  std::vector<Layer> layers_;
};

// Mean over layers of E * sum_e f_e P_e (Fedus et al. 2022, eq. 4-6): 1 when balanced.
at::Tensor BalanceLoss(const RoutingCollector& routing);

struct DenoisingLoss {
  at::Tensor span;    // mean cross-entropy of the decoder's targets, nats
  at::Tensor masked;  // mean cross-entropy of masked encoder inputs; undefined where none
};
DenoisingLoss DenoisingLosses(SwitchModel* model, const DenoisingBatch& batch,
                              const ForwardOptions& options);

// What shows that routing is worth learning, on held-out rows; one entry a stack.
struct RoutingMeasures {
  double span_loss = 0, masked_loss = 0;
  double gain_nats[2] = {0, 0};     // loss with random routing minus loss: masked, span
  double load_entropy[2] = {0, 0};  // least over layers, divided by log(E): 1 = balanced
  double mean_gate[2] = {0, 0};
  Json ToJson() const;
  std::string Table() const;  // for people
};
// Nothing where a stop was requested meanwhile: that is looked for before each batch.
std::optional<RoutingMeasures> MeasureRouting(SwitchModel* model, const TokenRows& rows,
                                              const Tokenizer& tokenizer,
                                              const DenoisingOptions& options,
                                              int batch_rows, uint64_t max_rows);

}  // namespace routecast
