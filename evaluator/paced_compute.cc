#include "evaluator/paced_compute.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <chrono>
#include <thread>

#include "models/device_choice.h"

namespace routecast {
namespace {
constexpr double kSpinSeconds = 200e-6;  // a sleep may come back that much late
}

LayerWork LayerWorkOf(const SwitchConfig& config, double weight_bytes) {
  const double d = config.d_model, f = config.d_ff;
  const double attention = 4.0 * d * config.num_heads * config.d_kv;
  const double projections = config.is_gated_act ? 3 : 2;
  LayerWork work;
  work.weight_bytes = weight_bytes;
  work.expert = projections * d * f;
  work.head = d * config.vocab_size;
  const MoeGeometry g = config.geometry();
  for (const Stack stack : {Stack::kEncoder, Stack::kDecoder}) {
    const int blocks = config.blocks(stack), sparse = g.layers(stack);
    if (sparse == 0) continue;
    const double attentions = stack == Stack::kDecoder ? 2 : 1;
    work.between[static_cast<int>(stack)] =
        (blocks * attentions * attention + (blocks - sparse) * projections * d * f) /
        sparse;
  }
  return work;
}

void PacedCompute::Set(ExpertSource* source, RoutingObserver* observer) {
  source_ = source;
  observer_ = observer;
}

void PacedCompute::Begin(int layer, std::span<const int> experts) {
  experts_ += static_cast<double>(experts.size());
  source_->Begin(layer, experts);
}

ExpertLease PacedCompute::Next() {
  const double from = clock_->Now();
  ExpertLease lease = source_->Next();
  waited_ += clock_->Now() - from;
  return lease;
}

void PacedCompute::Pace(double dense_weights) {
  // Each token passes each of these weights; of the experts, one expert's.
  const double moved = dense_weights + experts_ * work_.expert;
  const double products =
      2 * tokens_ * (dense_weights + (experts_ > 0 ? work_.expert : 0));
  double needed = moved * work_.weight_bytes / profile_.memory_bytes_per_second;
  if (profile_.flops_per_second > 0)
    needed = std::max(needed, products / profile_.flops_per_second);
  Synchronize(device_);
  const double until = mark_ + waited_ + needed;
  ++parts_;
  if (clock_->Now() >= until) ++slower_;
  for (double left = until - clock_->Now(); left > 0; left = until - clock_->Now()) {
    if (left > kSpinSeconds) {
      std::this_thread::sleep_for(std::chrono::duration<double>(left - kSpinSeconds));
    } else {
      std::this_thread::yield();
    }
  }
  mark_ = clock_->Now();
  waited_ = experts_ = 0;
}

void PacedCompute::OnPassBegin(const PassInfo& pass) {
  stack_ = pass.stack;
  tokens_ = static_cast<double>(pass.token_ids_BT.numel());
  waited_ = experts_ = 0;
  observer_->OnPassBegin(pass);
  mark_ = clock_->Now();
}

void PacedCompute::OnRouting(const LayerRouting& routing) {
  Pace(work_.between[static_cast<int>(stack_)]);
  observer_->OnRouting(routing);
}

void PacedCompute::OnPassEnd(const PassInfo& pass) {
  // The head comes after the pass; its time is taken here, where the next experts move.
  observer_->OnPassEnd(pass);
  Pace(stack_ == Stack::kDecoder ? work_.head : 0);
}

}  // namespace routecast
