// Checkpoints as Hugging Face folders: config.json, model.safetensors, tokenizer files.
#pragma once

#include <memory>
#include <string>

#include "models/expert_execution.h"
#include "models/switch_model.h"

namespace routecast {

struct Checkpoint {
  SwitchConfig config;
  Parameters parameters;    // on `device`, dtype as asked; routers may stay fp32
  std::string fingerprint;  // of config.json and the weights' bytes
};

enum class ExpertLoading { kLoad, kLeaveOut };

// Throws UsageError (no such folder or file), DataError (corrupt, or weights that do not
// fit config.json).
Checkpoint LoadCheckpoint(const fs::path& folder, at::ScalarType dtype, at::Device device,
                          ExpertLoading experts = ExpertLoading::kLoad);
// Writes config.json, generation_config.json and model.safetensors into an existing
// folder.
void SaveCheckpoint(const fs::path& folder, const SwitchConfig& config,
                    const Parameters& parameters, at::ScalarType dtype);
// One expert's weights from a checkpoint folder, without reading the others.
ExpertWeights LoadExpert(const fs::path& folder, const SwitchConfig& config,
                         ExpertKey key, at::ScalarType dtype);
// Per MoE layer: the router's weight [E,D], bias [E] (undefined where none), norm gain
// [D]; fp32.
struct RouterWeights {
  at::Tensor weight_ED, bias_E, norm_gain_D;
};
std::vector<RouterWeights> RoutersOf(const SwitchConfig& config,
                                     const Parameters& parameters);

// A model with every expert resident: what collection and the all-resident row run.
class ResidentModel {
 public:
  explicit ResidentModel(Checkpoint checkpoint);
  SwitchModel& model() { return *model_; }
  const Checkpoint& checkpoint() const { return checkpoint_; }

 private:
  Checkpoint checkpoint_;
  std::unique_ptr<ResidentExpertSource> source_;
  std::unique_ptr<LocalExpertExecutor> executor_;
  std::unique_ptr<SwitchModel> model_;
};

}  // namespace routecast
