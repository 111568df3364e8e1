#include "trainer/switch_losses.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <numeric>

#include "common/random.h"
#include "common/stop.h"

namespace routecast {
namespace {

// Uniformly random experts; the gate is what the router gave to its own choice.
class RandomRouting : public RoutingOverride {
 public:
  RandomRouting(Stack stack, const MoeGeometry& g, uint64_t key)
      : stack_(stack), geometry_(g), key_(key) {}
  void Replace(int layer, at::Tensor* ids, at::Tensor*) override {
    if (geometry_.StackOf(layer) != stack_) return;
    at::Tensor random = at::empty(ids->sizes(), at::kLong);
    int64_t* value = random.data_ptr<int64_t>();
    for (int64_t i = 0; i < random.numel(); ++i) {
      value[i] = static_cast<int64_t>(
          ToRange(Mix(key_, static_cast<uint64_t>(layer), static_cast<uint64_t>(i)),
                  static_cast<uint64_t>(geometry_.num_experts)));
    }
    *ids = random.to(ids->device());
  }

 private:
  Stack stack_;
  MoeGeometry geometry_;
  uint64_t key_;
};

double Value(const at::Tensor& t) { return t.defined() ? t.item<double>() : 0.0; }

}  // namespace

void RoutingCollector::OnRouting(const LayerRouting& routing) {
  const at::Tensor real =
      at::nonzero(valid_.reshape({-1})).squeeze(1).to(routing.logits_BTE.device());
  const int64_t experts = routing.logits_BTE.size(-1);
  layers_.push_back(
      {routing.layer,
       at::softmax(routing.logits_BTE.reshape({-1, experts}).index_select(0, real), -1),
       routing.expert_ids_BT.reshape({-1}).index_select(0, real)});
}

at::Tensor BalanceLoss(const RoutingCollector& routing) {
  at::Tensor total;
  for (const auto& layer : routing.layers()) {
    const int64_t experts = layer.probs_NE.size(1);
    const at::Tensor load = at::one_hot(layer.ids_N, experts).to(at::kFloat).mean(0);
    const at::Tensor loss = experts * (load * layer.probs_NE.mean(0)).sum();
    total = total.defined() ? total + loss : loss;
  }
  return total / static_cast<double>(routing.layers().size());
}

DenoisingLoss DenoisingLosses(SwitchModel* model, const DenoisingBatch& batch,
                              const ForwardOptions& options) {
  const at::Device device = model->device();
  const at::Tensor encoded = model->Encode(batch.ids_BS, batch.valid_BS, options);
  const at::Tensor decoded = model->Decode(batch.decoder_ids_BT, batch.decoder_valid_BT,
                                           encoded, batch.valid_BS, nullptr, options);
  const at::Tensor logits = model->Logits(decoded);
  DenoisingLoss loss;
  loss.span = at::cross_entropy_loss(logits.reshape({-1, logits.size(-1)}).to(at::kFloat),
                                     batch.targets_BT.reshape({-1}).to(device), {},
                                     at::Reduction::Mean, -100);
  const at::Tensor flat = batch.masked_targets_BS.reshape({-1});
  const at::Tensor masked = at::nonzero(flat >= 0).squeeze(1);
  if (masked.numel() > 0) {
    const at::Tensor hidden =
        encoded.reshape({-1, encoded.size(-1)}).index_select(0, masked.to(device));
    loss.masked = at::cross_entropy_loss(model->Logits(hidden).to(at::kFloat),
                                         flat.index_select(0, masked).to(device));
  }
  return loss;
}

Json RoutingMeasures::ToJson() const {
  return Json{{"span_loss", span_loss},
              {"masked_loss", masked_loss},
              {"encoder",
               {{"random_routing_costs_nats", gain_nats[0]},
                {"load_entropy", load_entropy[0]},
                {"mean_gate", mean_gate[0]}}},
              {"decoder",
               {{"random_routing_costs_nats", gain_nats[1]},
                {"load_entropy", load_entropy[1]},
                {"mean_gate", mean_gate[1]}}}};
}

std::string RoutingMeasures::Table() const {
  char text[512];
  std::snprintf(
      text, sizeof text,
      "held-out text   loss (nats)  random routing costs  load entropy  mean gate\n"
      "encoder masked  %11.3f  %20.3f  %12.3f  %9.3f\n"
      "decoder spans   %11.3f  %20.3f  %12.3f  %9.3f\n",
      masked_loss, gain_nats[0], load_entropy[0], mean_gate[0], span_loss, gain_nats[1],
      load_entropy[1], mean_gate[1]);
  return text;
}

std::optional<RoutingMeasures> MeasureRouting(SwitchModel* model, const TokenRows& rows,
                                              const Tokenizer& tokenizer,
                                              const DenoisingOptions& options,
                                              int batch_rows, uint64_t max_rows) {
  const c10::NoGradGuard no_grad;
  const MoeGeometry& g = model->geometry();
  const uint64_t total = std::min<uint64_t>(rows.size(), max_rows);
  std::vector<at::Tensor> load(static_cast<size_t>(g.num_layers()));
  double gate_sum[2] = {0, 0}, gate_count[2] = {0, 0}, random_loss[2] = {0, 0};
  RoutingMeasures m;
  int batches = 0, with_masked = 0;  // a small batch may have no masked token
  for (uint64_t first = 0; first < total; first += static_cast<uint64_t>(batch_rows)) {
    if (StopRequested()) return std::nullopt;
    std::vector<uint64_t> ids(std::min<uint64_t>(batch_rows, total - first));
    std::iota(ids.begin(), ids.end(), first);
    const DenoisingBatch batch = MakeDenoisingBatch(rows, ids, ids, tokenizer, options);
    RoutingCollector routing;
    ForwardOptions forward;
    forward.observer = &routing;
    const DenoisingLoss loss = DenoisingLosses(model, batch, forward);
    m.span_loss += Value(loss.span);
    m.masked_loss += Value(loss.masked);
    with_masked += loss.masked.defined() ? 1 : 0;
    for (const auto& layer : routing.layers()) {
      const at::Tensor counts = at::bincount(layer.ids_N.to(at::kCPU), {}, g.num_experts);
      at::Tensor& sum = load[static_cast<size_t>(layer.layer)];
      sum = sum.defined() ? sum + counts : counts;
      const auto stack = static_cast<size_t>(g.StackOf(layer.layer));
      gate_sum[stack] += Value(std::get<0>(layer.probs_NE.max(-1)).sum());
      gate_count[stack] += static_cast<double>(layer.probs_NE.size(0));
    }
    for (Stack stack : {Stack::kEncoder, Stack::kDecoder}) {
      RandomRouting random(stack, g, Mix(options.seed, first));
      ForwardOptions with_random;
      with_random.routing_override = &random;
      const DenoisingLoss r = DenoisingLosses(model, batch, with_random);
      random_loss[static_cast<size_t>(stack)] +=
          Value(stack == Stack::kEncoder ? r.masked : r.span);
    }
    ++batches;
  }
  m.span_loss /= batches;
  const int masked_batches = std::max(with_masked, 1);
  m.masked_loss /= masked_batches;
  m.gain_nats[0] = random_loss[0] / masked_batches - m.masked_loss;
  m.gain_nats[1] = random_loss[1] / batches - m.span_loss;
  m.load_entropy[0] = m.load_entropy[1] = 1.0;
  for (int layer = 0; layer < g.num_layers(); ++layer) {
    const at::Tensor p = load[static_cast<size_t>(layer)].to(at::kDouble) /
                         Value(load[static_cast<size_t>(layer)].sum().to(at::kDouble));
    const double entropy =
        -Value(at::xlogy(p, p).sum()) / std::log(double(g.num_experts));
    double& least = m.load_entropy[static_cast<size_t>(g.StackOf(layer))];
    least = std::min(least, entropy);
  }
  for (int s = 0; s < 2; ++s) m.mean_gate[s] = gate_sum[s] / std::max(gate_count[s], 1.0);
  return m;
}

}  // namespace routecast
