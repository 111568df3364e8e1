// Models that learn routing: what is known of a window -> experts of the layers ahead.
// B sequences, T tokens, H leads, E experts, D router input width, W context layers.
#pragma once

#include <ATen/core/Tensor.h>

#include <map>
#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include "common/files.h"
#include "common/run_record.h"
#include "models/parameters.h"
#include "models/routing_window.h"
#include "models/speculation_config.h"
#include "models/speculation_kinds.h"

namespace routecast {

class BaselineTables;
struct RouterWeights;

struct SpeculationOutput {
  // H = NumLeads(stack, source layer); [.., h, ..] is lead h + 1. float32.
  at::Tensor logits_BTHE;
  at::Tensor confidence_BTH;  // in (0, 1): the model's guess that its top-1 is right
  // Scores of the next token's id, where the model guesses it in training; else
  // undefined.
  at::Tensor next_token_BTV{};
  // A loss of the model's own, summed over the tokens of the batch; [members] where
  // several models compute as one. Else undefined.
  at::Tensor own_loss{};
  // What the contrastive term compares: a vector a lead, and one an expert ([E,D]).
  // Undefined where a kind has none, or is not trained.
  at::Tensor features_BTHD{}, expert_keys_ED{};
  // Decoder, source layer -1: logits of how much each expert of each decoder layer (L)
  // will be used by the tokens after this one, where a model says so; else undefined.
  at::Tensor later_BTLE{};
  // Logits of the router's second, third .. choice [B,T,H,K,E], where a model has
  // heads for them; else undefined.
  at::Tensor backups_BTHKE{};
  // Entropy in nats of a token's attention over the pattern memory, mean over heads;
  // where a kind has one and training asks for it (TrainingHints), else undefined.
  at::Tensor pattern_entropy_BT{};
};

// Both stacks in one model. Thread rule: one thread at a time. Rows of padding are
// arbitrary but finite. Decoder rows depend on tokens <= their own alone.
class SpeculationModel {
 public:
  virtual ~SpeculationModel();
  const SpeculationConfig& config() const { return config_; }
  // Float32 leaves that require gradients. The model shares them: what is written into
  // them is what Forward computes with.
  virtual Parameters& parameters() { return parameters_; }
  const Parameters& parameters() const { return parameters_; }
  // Float32 tensors that are kept with the parameters but not trained; may be none.
  const Parameters& constants() const { return constants_; }
  // Sets the constants from the counts of the train part; before training.
  virtual void FitPriors(const BaselineTables&) {}
  // Sets the constants from the traced model's routers, by global layer; before training.
  // Throws UsageError where a kind needs them and there are none.
  virtual void FitRouters(const std::vector<RouterWeights>&) {}
  // How many of the newest tokens of a decoder window matter to its last row.
  virtual int history_tokens() const = 0;
  // ForwardLast costs less where a window goes on from the one before it than where it
  // begins with a later token.
  virtual bool keeps_tokens() const { return false; }
  // REQUIRES tensors of the window on the parameters' device. dropout_key 0 = no dropout
  // (serving); otherwise masks are functions of (key, layer) and the batch's shape only.
  virtual SpeculationOutput Forward(const RoutingWindow& window,
                                    uint64_t dropout_key) = 0;
  // What is trained: one output a member, each with a loss of its own. One for all kinds
  // but `ensemble`.
  virtual std::vector<SpeculationOutput> ForwardMembers(const RoutingWindow& window,
                                                        uint64_t dropout_key);
  // Each member's parameters. Together they are parameters(), once each.
  virtual std::vector<std::vector<ParameterSlice>> MemberParameters() const;
  // Forward(window, 0) of the newest token alone, T = 1: what serving a decoder needs.
  virtual SpeculationOutput ForwardLast(const RoutingWindow& window);
  // Parameters and constants will not change any more: a model may keep cheaper forms of
  // them, and what it computed of a decoder's tokens; ForwardLast (and Forward of few
  // rows) then differ from the trained one by rounding that does not matter to a ranking.
  // Again after every change.
  virtual void PrepareServing() {}
  // Leads predicted from a source are 1..NumLeads; encoder: L-1-source; decoder: L
  // (wraps into the next token).
  int NumLeads(Stack stack, int source_layer) const;
  // Moves parameters and constants, before gradients and optimizer states refer to them.
  void To(at::Device device);

 protected:
  explicit SpeculationModel(SpeculationConfig config) : config_(std::move(config)) {}
  // Leads of a window that has none, or no tokens.
  SpeculationOutput NoOutput(const RoutingWindow& window) const;
  SpeculationConfig config_;
  Parameters parameters_, constants_;
};

// Throws UsageError where no model has such a configuration, naming the nearest kind.
void RequirePossible(const SpeculationConfig& config);
// Seeded parameters on the CPU. Throws as RequirePossible does.
std::unique_ptr<SpeculationModel> MakeSpeculationModel(const SpeculationConfig& config,
                                                       uint64_t seed);
// Sizes that suit the geometry: `interlayer` is the published baseline, smaller where
// E <= 32. hidden_width 0 = no router inputs.
SpeculationConfig DefaultSpeculationConfig(const std::string& kind,
                                           const MoeGeometry& geometry, int vocab_size,
                                           int hidden_width);
// softmax(logits / temperature), fitted on validation data; 1 where nothing was fitted.
struct Calibration {
  std::map<std::tuple<Stack, int, int>, double> temperatures;  // stack, source, lead
  double Temperature(Stack stack, int source_layer, int lead) const;
  void Set(Stack stack, int source_layer, int lead, double temperature);
  Json ToJson() const;
  static Calibration FromJson(const Json& json, const std::string& what);
  bool operator==(const Calibration&) const = default;
};

// Writes model.safetensors, then config.json, which names the weights by hash: a reader
// never pairs new weights with an old configuration. Makes the folder; `extra` is kept
// under "extra" and never read here.
void SaveSpeculationModel(const fs::path& folder, const SpeculationModel& model,
                          const Calibration& calibration, const Json& extra = {});
struct SavedSpeculationModel {
  std::unique_ptr<SpeculationModel> model;  // on the CPU
  Calibration calibration;
};
// Throws UsageError (no such folder or file) or DataError (corrupt or inconsistent).
SavedSpeculationModel LoadSpeculationModel(const fs::path& folder);

}  // namespace routecast
