// The model that a rank runs while it collects: whole, or with its share of a group's
// experts (collector/expert_parallel.h). Thread rule: the forward thread.
#pragma once

#include <memory>

#include "collector/expert_parallel.h"
#include "common/run_record.h"
#include "corpus/tokenizer.h"
#include "models/checkpoint.h"

namespace routecast {

// Throws UsageError where a group would lack ranks.
void RequireWholeGroups(int expert_parallel, int world);

// The files of a checkpoint by absolute path: size, inode, and the times of the last
// change of contents and of anything at all, which no program can set back. Null where
// one cannot be looked at. Taken before a checkpoint is read, and compared afterwards.
Json CheckpointFiles(const fs::path& folder);
// What run.json keeps of a checkpoint: the fingerprint of what was read, and `before`,
// its files then. Null where they are others now: nothing says which of them was read.
Json CheckpointRecord(const fs::path& folder, const std::string& fingerprint,
                      const Json& before);

// What can be refused before a weight is read: its configuration, where names and shapes
// of the weights are as it says. Throws as CollectedModel does. Every rank of the job
// calls it.
SwitchConfig CollectedConfig(const fs::path& folder, at::ScalarType dtype,
                             at::Device device, const RankInfo& rank,
                             int expert_parallel);

// DataError where the tokenizer knows ids that `model`, of `config`, has no row for.
void RequireVocabulary(const std::string& model, const Tokenizer& tokenizer,
                       const SwitchConfig& config);

// UsageError where `task` runs no MoE layer of `model`: its store would be empty.
void RequireRouting(const std::string& model, const MoeGeometry& geometry, Task task);

// A dry run's part of a checkpoint: its configuration; names and shapes of the weights
// are looked at as CollectedModel looks at them, and none is read. Where there is a
// `store`, the fingerprint is that of its last run whose files these are, by
// CheckpointFiles; else every byte passes through a small buffer. Throws as
// CollectedModel does.
Checkpoint PlannedModel(const fs::path& folder, at::Device device, const RankInfo& rank,
                        int expert_parallel, const fs::path& store);

// Throws EnvironmentError where weights of `bytes`, of all `local_ranks` of a machine,
// are more than its memory of `total` bytes: the system would end some process.
void RequireMemoryFor(uint64_t bytes, int local_ranks, uint64_t total);

class CollectedModel {
 public:
  // What the weights of a rank take on its device.
  static uint64_t WeightBytes(const SwitchConfig& config, at::ScalarType dtype,
                              const RankInfo& rank, int expert_parallel);
  // RequireMemoryFor of these and this machine, where `device` is the CPU.
  static void RequireMemory(const SwitchConfig& config, at::ScalarType dtype,
                            at::Device device, const RankInfo& rank, int expert_parallel);
  // `expert_parallel`: ranks of a group; 1 = every rank has all experts. Every rank of
  // the job makes one. Throws UsageError where the group does not fit the ranks or the
  // model, or two of its ranks have one CUDA device, what RequireMemoryFor throws on the
  // CPU, and what LoadCheckpoint throws.
  CollectedModel(const fs::path& folder, at::ScalarType dtype, at::Device device,
                 const RankInfo& rank, int expert_parallel);
  SwitchModel& model() { return whole_ ? whole_->model() : *model_; }
  const Checkpoint& checkpoint() const {
    return whole_ ? whole_->checkpoint() : checkpoint_;
  }
  // A rank that waits calls it again and again: its group may wait for its experts.
  void Serve() {
    if (group_) group_->Serve();
  }

 private:
  std::unique_ptr<ResidentModel> whole_;
  Checkpoint checkpoint_;  // without experts
  std::unique_ptr<ResidentExpertSource> source_;
  std::unique_ptr<LocalExpertExecutor> local_;
  std::unique_ptr<ExpertParallelExecutor> group_;
  std::unique_ptr<SwitchModel> model_;
};

}  // namespace routecast
