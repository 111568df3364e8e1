// What every row of a comparison runs: the same segments with the same kernels, whatever
// brings the experts. B sequences, S source tokens, T target tokens. Thread rule: one
// thread.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "evaluator/output_hash.h"
#include "models/checkpoint.h"
#include "models/expert_source.h"
#include "models/generation.h"
#include "models/routing_observer.h"
#include "models/static_decoder.h"

namespace routecast {

// Hands each call to the source of the row that is on.
class SourceSwitch : public ExpertSource {
 public:
  void Set(ExpertSource* source) { source_ = source; }
  void Begin(int layer, std::span<const int> experts) override {
    source_->Begin(layer, experts);
  }
  ExpertLease Next() override { return source_->Next(); }
  int LeasesAtOnce() override { return source_->LeasesAtOnce(); }

 private:
  ExpertSource* source_ = nullptr;
};

// In which memory decoder steps are computed, in every row alike: on a GPU in fixed one,
// recorded between two choices of experts (models/static_decoder.h), on a CPU in one that
// grows; or in fixed memory anywhere (tests).
enum class StepMemory { kByDevice, kFixed };
// The fixed one, for num_source source and num_steps target tokens a row; null where
// memory grows, as it does where StaticDecoder does not serve.
std::unique_ptr<StaticDecoder> FixedSteps(StepMemory memory, SwitchModel* model,
                                          int64_t rows, int64_t num_source,
                                          int64_t num_steps,
                                          const ForwardOptions& options);

struct SegmentTimes {
  std::vector<double>
      step_seconds[2];         // by stack: encoder passes, decoder steps with head
  int64_t tokens[2] = {0, 0};  // real source tokens; generated tokens
};

class Workload {
 public:
  virtual ~Workload() = default;
  virtual int num_segments() const = 0;
  virtual const MoeGeometry& geometry() const = 0;
  virtual const SwitchConfig& config() const = 0;
  virtual bool runs(Stack stack) const = 0;
  // Keys and values that are held when a pass of the segment under way ends (0 after the
  // encoder's: they are the decoder's), the least and the most that any comes to. Of
  // steps in fixed memory all of that memory, always, with what its recording keeps so
  // far.
  virtual uint64_t KeyValueBytes(const PassInfo& pass) const = 0;
  virtual uint64_t MinKeyValueBytes() const { return 0; }
  virtual uint64_t MaxKeyValueBytes() const = 0;
  // Runs one segment. `observer` may be null. Every step's fp32 logits (encoder: output)
  // and ids go into `hash`, outside the measured time.
  virtual SegmentTimes Run(int segment, ExpertSource* source, RoutingObserver* observer,
                           OutputHash* hash) = 0;
  // What the first run of each segment that was run put out; nothing in a replay.
  struct Generated {
    std::vector<int64_t> prompt, ids;  // token ids without padding
  };
  virtual std::vector<Generated> generated() const { return {}; }
};

// Greedy decoding of prompts by a checkpoint. A segment is one batch.
class GenerateWorkload : public Workload {
 public:
  // `checkpoint` without experts, on the device that runs it. prompts: token ids, ended
  // as the model was trained; batches of `batch` in the order given, right-padded with
  // the pad id.
  GenerateWorkload(Checkpoint checkpoint,
                   const std::vector<std::vector<int64_t>>& prompts, int batch,
                   int max_new_tokens, StepMemory memory = StepMemory::kByDevice);
  int num_segments() const override { return static_cast<int>(ids_BS_.size()); }
  const MoeGeometry& geometry() const override { return geometry_; }
  const SwitchConfig& config() const override { return checkpoint_.config; }
  bool runs(Stack) const override { return true; }
  uint64_t KeyValueBytes(const PassInfo& pass) const override;
  uint64_t MinKeyValueBytes() const override {
    return steps_ ? steps_->memory_bytes() : 0;
  }
  uint64_t MaxKeyValueBytes() const override;
  SegmentTimes Run(int segment, ExpertSource* source, RoutingObserver* observer,
                   OutputHash* hash) override;
  std::vector<Generated> generated() const override;

 private:
  Checkpoint checkpoint_;
  MoeGeometry geometry_;
  int max_new_tokens_;
  SourceSwitch source_;
  LocalExpertExecutor executor_;
  SwitchModel model_;
  std::vector<at::Tensor> ids_BS_, valid_BS_;
  std::unique_ptr<StaticDecoder> steps_;           // null: memory grows
  size_t running_ = 0;                             // segment
  std::vector<std::vector<Generated>> generated_;  // by segment; empty: not run yet
};

}  // namespace routecast
