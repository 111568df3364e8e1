// The kinds of speculation models, one row each: what a kind sees, its usual sizes, and
// how it is made. A new kind is a file of its own and a row in speculation_kinds.cc.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "models/speculation_config.h"

namespace routecast {

class Parameters;
class SpeculationModel;

// What not every kind has a use for; its row names those it has.
enum KindUse : unsigned {
  kUsesWidth = 1,
  kUsesHeads = 2,
  kUsesFf = 4,
  kUsesLayers = 8,
  kUsesContext = 16,
  kUsesDropout = 32,
  kLearnsConfidence = 64,  // one of its own; others answer with their largest probability
  kUsesOlderLayers = 128,  // sees more of a token than the newest layer's experts
  kHasPatterns = 256,      // attends to a pattern memory
  // Inputs that it may have and usually does not (SpeculationConfig).
  kTakesTokens = 512,
  kTakesRouterInputs = 1024,
  kTakesTopK = 2048,
};

enum class RouterInputs { kNever, kOptional, kRequired };

// What a new model's parameters are. One seed a member: several make several models of
// one shape in one (see speculation_layers.h), whose Forward returns the members one
// after another.
struct ModelSeeds {
  ModelSeeds(std::initializer_list<uint64_t> seeds) : each(seeds) {}
  ModelSeeds(std::vector<uint64_t> seeds) : each(std::move(seeds)) {}
  size_t size() const { return each.size(); }
  std::vector<uint64_t> each;
  // Borrowed while the model is made: parameters of these names are not drawn but shared.
  const Parameters* shared = nullptr;
};
using MakeKind = std::unique_ptr<SpeculationModel> (*)(const SpeculationConfig& config,
                                                       const ModelSeeds& seeds);

struct SpeculationKind {
  const char* name;
  RouterInputs router_inputs;
  bool token_ids;                     // needs a vocabulary
  double learning_rate;               // peak, unless told otherwise
  void (*sizes)(SpeculationConfig*);  // fills in what suits the geometry
  MakeKind make;                      // null: see ensemble_model.h
  unsigned uses;                      // of KindUse; an ensemble has its members' sizes
  // Embeds expert ids: what mixup, noise and the contrastive term work on.
  bool embeds_experts = false;
  bool routers = false;    // needs the traced model's routers
  bool backups = false;    // may have heads for the router's further choices
  bool attention = false;  // may read attention summaries
};

std::vector<std::string> SpeculationKinds();
// Of kinds that embed experts: a parameter whose shape or meaning depends on the traced
// model, on its numbers of layers and experts and what they are.
bool OfTracedModel(const std::string& parameter);
// REQUIRES a name of SpeculationKinds().
const SpeculationKind& KindOf(const std::string& name);
// Counts that a kind with priors keeps beside its weights.
double PriorElements(const SpeculationConfig& config);

// One function for the name of each file <name>_model.cc.
std::unique_ptr<SpeculationModel> MakeHidden(const SpeculationConfig& config,
                                             const ModelSeeds& seeds);
// `interlayer`, and `moe` with experts in place of two of its feed-forward layers.
std::unique_ptr<SpeculationModel> MakeInterlayer(const SpeculationConfig& config,
                                                 const ModelSeeds& seeds);
std::unique_ptr<SpeculationModel> MakeMultiscale(const SpeculationConfig& config,
                                                 const ModelSeeds& seeds);
// autoregressive.
std::unique_ptr<SpeculationModel> MakeAutoregressive(const SpeculationConfig& config,
                                                     const ModelSeeds& seeds);
// contextual, transformer, hierarchical.
std::unique_ptr<SpeculationModel> MakeGating(const SpeculationConfig& config,
                                             const ModelSeeds& seeds);
// simple, lstm, attention, conv1d, legacy_multiscale.
std::unique_ptr<SpeculationModel> MakeLegacy(const SpeculationConfig& config,
                                             const ModelSeeds& seeds);
// stale_correction.
std::unique_ptr<SpeculationModel> MakeStaleCorrection(const SpeculationConfig& config,
                                                      const ModelSeeds& seeds);

}  // namespace routecast
