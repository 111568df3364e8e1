// Passes no faster than a slower device would make them (--profile): around a row's
// source and observer, and before each MoE layer's choice and each pass' end it waits
// until the slower device would be there too. What a layer takes there: its weights once
// through memory, or its products, whichever is longer. A machine that is slower itself
// is left alone. Thread rule: the forward thread.
#pragma once

#include "evaluator/clock.h"
#include "evaluator/device_profile.h"
#include "models/expert_source.h"
#include "models/routing_observer.h"
#include "models/switch_config.h"

namespace routecast {

// Weights that a token meets, by stack: between two MoE layers of it (a mean), in one
// expert, and in the vocabulary head.
struct LayerWork {
  double between[2] = {0, 0}, expert = 0, head = 0;  // weights
  double weight_bytes = 4;
};
LayerWork LayerWorkOf(const SwitchConfig& config, double weight_bytes);

class PacedCompute : public ExpertSource, public RoutingObserver {
 public:
  PacedCompute(const LayerWork& work, const DeviceProfile& profile, at::Device device,
               const Clock* clock)
      : work_(work), profile_(profile), device_(device), clock_(clock) {}
  // Of the row that runs next; both outlive the run.
  void Set(ExpertSource* source, RoutingObserver* observer);

  void Begin(int layer, std::span<const int> experts) override;
  ExpertLease Next() override;
  int LeasesAtOnce() override { return source_->LeasesAtOnce(); }
  void OnPassBegin(const PassInfo& pass) override;
  void OnRouting(const LayerRouting& routing) override;
  bool WantsAttention() const override { return observer_->WantsAttention(); }
  void OnAttention(const LayerAttention& a) override { observer_->OnAttention(a); }
  void OnPassEnd(const PassInfo& pass) override;

  // Share of the parts of passes in which this machine itself was slower.
  double slower_share() const {
    return parts_ > 0 ? static_cast<double>(slower_) / static_cast<double>(parts_) : 0;
  }

 private:
  void Pace(double dense_weights);  // to the end of the part that began at mark_
  LayerWork work_;
  DeviceProfile profile_;
  at::Device device_;
  const Clock* clock_;
  ExpertSource* source_ = nullptr;
  RoutingObserver* observer_ = nullptr;
  Stack stack_ = Stack::kEncoder;
  double tokens_ = 0, experts_ = 0;  // of the pass; run since mark_
  double mark_ = 0, waited_ = 0;     // a part's begin; for experts, since then
  int64_t parts_ = 0, slower_ = 0;
};

}  // namespace routecast
