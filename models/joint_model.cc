#include "models/joint_model.h"

#include "common/errors.h"
#include "common/random.h"

namespace routecast {
namespace {

constexpr uint64_t kPartStream = 0x70617274ULL;

// What is not of part 0 and not shared, under a name of its own.
void AddOwn(const Parameters& from, const Parameters& shared, size_t part,
            Parameters* to) {
  for (const auto& [name, tensor] : from.items()) {
    if (shared.Has(name)) continue;
    to->Add("model." + std::to_string(part) + "." + name, tensor);
  }
}

}  // namespace

JointModel::JointModel(const std::vector<SpeculationConfig>& configs, uint64_t seed)
    : SpeculationModel(configs.at(0)) {
  parts_.push_back(MakeSpeculationModel(configs[0], seed));
  parameters_ = parts_[0]->parameters();
  constants_ = parts_[0]->constants();
  Parameters trunk;
  for (const auto& [name, tensor] : parameters_.items()) {
    if (!OfTracedModel(name)) trunk.Add(name, tensor);
  }
  for (size_t i = 1; i < configs.size(); ++i) {
    RequirePossible(configs[i]);
    ModelSeeds seeds{Mix(seed, kPartStream, static_cast<uint64_t>(i))};
    seeds.shared = &trunk;
    parts_.push_back(KindOf(configs[i].kind).make(configs[i], seeds));
    AddOwn(parts_[i]->parameters(), trunk, i, &parameters_);
    AddOwn(parts_[i]->constants(), {}, i, &constants_);
  }
}

SpeculationModel& JointModel::PartOf(const RoutingWindow& window) {
  return *parts_.at(static_cast<size_t>(window.traced_model));
}

SpeculationOutput JointModel::Forward(const RoutingWindow& window, uint64_t dropout_key) {
  return PartOf(window).Forward(window, dropout_key);
}

std::vector<SpeculationOutput> JointModel::ForwardMembers(const RoutingWindow& window,
                                                          uint64_t dropout_key) {
  return PartOf(window).ForwardMembers(window, dropout_key);
}

std::vector<std::vector<ParameterSlice>> JointModel::MemberParameters() const {
  if (parts_.size() == 1) return parts_[0]->MemberParameters();
  return {SlicesOf(parameters_)};
}

}  // namespace routecast
