// What tests of decoding with leased experts share: sources that move experts about, and
// a log of what source and observers are told, in order.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <limits>
#include <span>
#include <string>
#include <vector>

#include "common/errors.h"
#include "tests/models/switch_test_support.h"

namespace routecast {

using Events = std::vector<std::string>;

inline std::string Listed(const std::string& what, std::span<const int> experts) {
  std::string text = what;
  for (int e : experts) text += " " + std::to_string(e);
  return text;
}

// Experts in a few slots, each time in another one; what nobody leases is no numbers.
class MovingSource : public ExpertSource {
 public:
  MovingSource(const SwitchConfig& config, std::vector<ExpertWeights> experts, int slots,
               Events* events = nullptr)
      : geometry_(config.geometry()), experts_(std::move(experts)), events_(events) {
    for (int slot = 0; slot < slots; ++slot) {
      slots_.push_back(Like(experts_[0]));
      free_.push_back(static_cast<size_t>(slot));
    }
  }
  void Begin(int layer, std::span<const int> experts) override {
    EXPECT_EQ(held, 0) << "the layer before is over";
    layer_ = layer;
    pending_.assign(experts.rbegin(), experts.rend());  // the last is ready first
    if (events_) events_->push_back(Listed("begin " + std::to_string(layer), experts));
  }
  ExpertLease Next() override {
    if (++asked == fails_at) throw EnvironmentError("no such disk");
    EXPECT_FALSE(free_.empty()) << "more leases than there are slots";
    const int expert = pending_.at(0);
    pending_.erase(pending_.begin());
    const size_t slot = free_.front();
    free_.erase(free_.begin());
    const ExpertWeights& from = experts_[ExpertKey{layer_, expert}.Index(geometry_)];
    Copy(slots_[slot], from);
    most_held = std::max(most_held, ++held);
    return {expert, slots_[slot], [this, slot] {
              Fill(slots_[slot], std::numeric_limits<double>::quiet_NaN());
              free_.push_back(slot);
              --held;
            }};
  }
  int LeasesAtOnce() override { return static_cast<int>(slots_.size()); }
  int held = 0, most_held = 0, asked = 0, fails_at = -1;

 private:
  static ExpertWeights Like(const ExpertWeights& e) {
    return {at::empty_like(e.wi_FD), at::empty_like(e.wo_DF),
            e.gate_FD.defined() ? at::empty_like(e.gate_FD) : at::Tensor()};
  }
  static void Copy(const ExpertWeights& to, const ExpertWeights& from) {
    to.wi_FD.copy_(from.wi_FD);
    to.wo_DF.copy_(from.wo_DF);
    if (to.gate_FD.defined()) to.gate_FD.copy_(from.gate_FD);
  }
  static void Fill(const ExpertWeights& e, double value) {
    for (const at::Tensor& t : {e.wi_FD, e.wo_DF, e.gate_FD}) {
      if (t.defined()) t.fill_(value);
    }
  }
  MoeGeometry geometry_;
  std::vector<ExpertWeights> experts_, slots_;
  std::vector<size_t> free_;
  Events* events_;
  int layer_ = 0;
  std::vector<int> pending_;
};

// Everything is there and stays, but only by lease.
class LeasedResident : public ExpertSource {
 public:
  explicit LeasedResident(ExpertSource* inner) : inner_(inner) {}
  void Begin(int layer, std::span<const int> e) override { inner_->Begin(layer, e); }
  ExpertLease Next() override { return inner_->Next(); }
  int LeasesAtOnce() override { return inner_->LeasesAtOnce(); }

 private:
  ExpertSource* inner_;
};

class EventLog : public RoutingLog {
 public:
  explicit EventLog(Events* events) : events_(events) {}
  void OnPassBegin(const PassInfo& pass) override {
    RoutingLog::OnPassBegin(pass);
    events_->push_back("pass " + std::to_string(pass.first_position));
  }
  void OnRouting(const LayerRouting& r) override {
    // The next step's replay writes over it.
    LayerRouting kept = r;
    for (at::Tensor* t : {&kept.input_BTD, &kept.expert_ids_BT, &kept.gate_probs_BT,
                          &kept.dropped_BT, &kept.margins_BT, &kept.logits_BTE}) {
      *t = t->to(at::kCPU, false, /*copy=*/true);
    }
    RoutingLog::OnRouting(kept);
    shown_.push_back(r);
    events_->push_back("routing " + std::to_string(r.layer));
  }
  void OnPassEnd(const PassInfo& pass) override {
    const size_t first = routings.size() - shown_.size();
    for (size_t i = 0; i < shown_.size(); ++i) {  // not written over in the step
      const LayerRouting &now = shown_[i], &then = routings[first + i];
      EXPECT_TRUE(at::equal(now.expert_ids_BT.to(at::kCPU), then.expert_ids_BT));
      EXPECT_TRUE(at::equal(now.input_BTD.to(at::kCPU), then.input_BTD));
      EXPECT_TRUE(at::equal(now.gate_probs_BT.to(at::kCPU), then.gate_probs_BT));
    }
    shown_.clear();
    outputs.push_back(pass.output_BTD.to(at::kCPU, false, /*copy=*/true));
    events_->push_back("end");
  }
  std::vector<at::Tensor> outputs;

 private:
  Events* events_;
  std::vector<LayerRouting> shown_;  // of this pass, as it came
};

}  // namespace routecast
