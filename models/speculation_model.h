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

namespace routecast {

class BaselineTables;

struct SpeculationConfig {
  std::string kind;      // one of SpeculationKinds()
  MoeGeometry geometry;  // of the model whose routing is learnt
  int vocab_size = 0;    // `interlayer` sees no token ids
  int hidden_width = 0;  // D; 0 = the router's input is not a feature
  int width = 0, heads = 0, ff = 0, layers = 0;
  int context = 0;          // W: the newest layers that `interlayer` sees of a token
  int neighbours = 0;       // tokens on each side (decoder: left) whose ids `hidden` sees
  bool priors = false;      // starts from the counts of the train part
  bool next_token = false;  // `hidden` guesses the decoder's next token; needs priors
  double dropout = 0;       // training only

  Json ToJson() const;
  // Throws DataError naming `what`, the key and the value; every size is bounded.
  static SpeculationConfig FromJson(const Json& json, const std::string& what);
  bool operator==(const SpeculationConfig&) const = default;
};

struct SpeculationOutput {
  // H = NumLeads(stack, source layer); [.., h, ..] is lead h + 1. float32.
  at::Tensor logits_BTHE;
  at::Tensor confidence_BTH;  // in (0, 1): the model's guess that its top-1 is right
  // Scores of the next token's id, where the model guesses it in training; else
  // undefined.
  at::Tensor next_token_BTV{};
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
  // How many of the newest tokens of a decoder window matter to its last row.
  virtual int history_tokens() const = 0;
  // REQUIRES tensors of the window on the parameters' device. dropout_key 0 = no dropout
  // (serving); otherwise masks are functions of (key, layer) and the batch's shape only.
  virtual SpeculationOutput Forward(const RoutingWindow& window,
                                    uint64_t dropout_key) = 0;
  // Forward(window, 0) of the newest token alone, T = 1: what serving a decoder needs.
  virtual SpeculationOutput ForwardLast(const RoutingWindow& window);
  // Leads predicted from a source are 1..NumLeads; encoder: L-1-source; decoder: L
  // (wraps into the next token).
  int NumLeads(Stack stack, int source_layer) const;
  // Moves parameters and constants, before gradients and optimizer states refer to them.
  void To(at::Device device);

 protected:
  explicit SpeculationModel(SpeculationConfig config) : config_(std::move(config)) {}
  SpeculationConfig config_;
  Parameters parameters_, constants_;
};

std::vector<std::string> SpeculationKinds();  // "hidden", "interlayer"
// Seeded parameters on the CPU. Throws UsageError naming the nearest kind.
std::unique_ptr<SpeculationModel> MakeSpeculationModel(const SpeculationConfig& config,
                                                       uint64_t seed);
// Sizes that suit the geometry: `interlayer` is the published baseline, smaller where
// E <= 32. hidden_width 0 = no router inputs.
SpeculationConfig DefaultSpeculationConfig(const std::string& kind,
                                           const MoeGeometry& geometry, int vocab_size,
                                           int hidden_width);
// Number of leads of a geometry from a source.
int NumLeadsOf(const MoeGeometry& geometry, Stack stack, int source_layer);

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
