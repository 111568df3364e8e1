// Speculation models of several traced models over one trunk: each has its own embeddings
// of experts, source layers and leads and its own heads (OfTracedModel), all else is one
// set of tensors. Pre-training on traces of several models learns such a trunk. Of one
// traced model it is that model, whatever its kind.
#pragma once

#include <memory>
#include <vector>

#include "models/speculation_model.h"

namespace routecast {

class JointModel final : public SpeculationModel {
 public:
  // `configs` differ in geometry, and in what follows from it, alone. REQUIRES a kind
  // that embeds experts where there are several. Throws what MakeSpeculationModel throws.
  JointModel(const std::vector<SpeculationConfig>& configs, uint64_t seed);

  size_t size() const { return parts_.size(); }
  // The model of one traced model; shares its parameters with this. Part 0's have the
  // same names here, what others do not share has "model.N." before it.
  SpeculationModel& part(size_t i) { return *parts_.at(i); }

  // By window.traced_model.
  SpeculationOutput Forward(const RoutingWindow& window, uint64_t dropout_key) override;
  std::vector<SpeculationOutput> ForwardMembers(const RoutingWindow& window,
                                                uint64_t dropout_key) override;
  std::vector<std::vector<ParameterSlice>> MemberParameters() const override;
  int history_tokens() const override { return parts_[0]->history_tokens(); }

 private:
  SpeculationModel& PartOf(const RoutingWindow& window);
  std::vector<std::unique_ptr<SpeculationModel>> parts_;
};

}  // namespace routecast
