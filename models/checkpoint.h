// Checkpoints as Hugging Face folders: config.json, weights in any form that
// common/weight_files.h reads, tokenizer files. docs/checkpoints.md says what is read,
// written and refused.
#pragma once

#include <map>
#include <memory>
#include <string>

#include "common/weight_files.h"
#include "models/checkpoint_writer.h"
#include "models/expert_execution.h"
#include "models/switch_model.h"

namespace routecast {

struct Checkpoint {
  SwitchConfig config;
  Parameters parameters;    // on `device`, dtype as asked; routers may stay fp32
  std::string fingerprint;  // of config.json and the weights' bytes
};

// kLoad: in stacks (expert_stack.h) where grouped products are one kernel, else one by
// one. kStack: in stacks.
enum class ExpertLoading { kLoad, kStack, kLeaveOut };

// A checkpoint's headers, checked against its config.json: every parameter is there once,
// with its shape, and nothing else. Weights are read one at a time.
// Thread rule: one thread at a time.
class CheckpointReader {
 public:
  // Throws UsageError (no such folder or file), DataError (corrupt, or weights that do
  // not fit config.json: the first tensor named, with both shapes and its file).
  explicit CheckpointReader(const fs::path& folder);

  // config.json, with generation_config.json's special ids where it has others.
  const SwitchConfig& config() const { return config_; }
  // Reads every byte of the weights through a small buffer.
  std::string Fingerprint() const;
  // A parameter of ParameterShapes(config), on the CPU; as stored where `dtype` is
  // Undefined, else converted, but a router that is stored as fp32 stays fp32.
  at::Tensor Read(const std::string& parameter, at::ScalarType dtype) const;
  ExpertWeights ReadExpert(ExpertKey key, at::ScalarType dtype) const;
  // The parameters' names in the order of their bytes in the files.
  std::vector<std::string> names() const;

 private:
  void ResolveEmbeddings();
  void ResolveTied();
  void Check() const;
  void CheckType(const std::string& name, const WeightEntry& entry) const;
  [[noreturn]] void Refuse(const std::vector<std::string>& names, const std::string& rule,
                           const std::string& wanted) const;

  fs::path folder_;
  Json config_json_;
  SwitchConfig config_;
  WeightFiles files_;
  std::map<std::string, const WeightEntry*> entries_;  // by parameter
};

// Bytes of a model's weights in `dtype`.
struct WeightSizes {
  uint64_t dense = 0, experts = 0;
};
WeightSizes SizesOfWeights(const SwitchConfig& config, at::ScalarType dtype);

// A dry run's part of LoadCheckpoint: of the weights what RoutersOf reads, on the CPU,
// and no fingerprint. All names and shapes are checked. Throws as CheckpointReader does.
Checkpoint LoadRouters(const fs::path& folder);
// All parameters, or all but the experts. Takes the memory of what is kept and a small
// buffer. Throws as CheckpointReader does.
Checkpoint LoadCheckpoint(const fs::path& folder, at::ScalarType dtype, at::Device device,
                          ExpertLoading experts = ExpertLoading::kLoad);
// Writes config.json, generation_config.json and the weights into an existing folder; the
// weights in shards where they are larger than `max_shard_bytes`.
void SaveCheckpoint(const fs::path& folder, const SwitchConfig& config,
                    const Parameters& parameters, at::ScalarType dtype,
                    uint64_t max_shard_bytes = kDefaultShardBytes);
// Per MoE layer: the router's weight [E,D], bias [E] (undefined where none), norm gain
// [D]; fp32.
struct RouterWeights {
  at::Tensor weight_ED, bias_E, norm_gain_D;
};
std::vector<RouterWeights> RoutersOf(const SwitchConfig& config,
                                     const Parameters& parameters);

// The same of a trace store's file. Throws DataError where they do not fit the geometry.
std::vector<RouterWeights> ReadRouters(const fs::path& file, const MoeGeometry& geometry);

// What the decoder's output is multiplied with, float32 on the CPU: [V,D], the tied
// embedding's factor included.
at::Tensor VocabularyHeadOf(const SwitchConfig& config, const Parameters& parameters);

// A model with every expert resident: what collection and the all-resident row run.
class ResidentModel {
 public:
  explicit ResidentModel(Checkpoint checkpoint, Grouping grouping = Grouping::kWhereFast);
  SwitchModel& model() { return *model_; }
  const Checkpoint& checkpoint() const { return checkpoint_; }

 private:
  Checkpoint checkpoint_;
  std::unique_ptr<ResidentExpertSource> source_;
  std::unique_ptr<LocalExpertExecutor> executor_;
  std::unique_ptr<SwitchModel> model_;
};

}  // namespace routecast
