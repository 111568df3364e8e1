// Replay: recorded routing played into a model of full-size geometry with synthetic
// weights. Token ids, expert ids and gates are forced from the traces; the router inputs
// that were recorded are what predictors see. Results carry `synthetic_weights`. B
// sequences, T tokens, L MoE layers of a stack, D recorded width.
#pragma once

#include <memory>
#include <vector>

#include "common/routing.h"
#include "evaluator/workload.h"

namespace routecast {

struct ReplayOptions {
  int d_model = 768, d_ff = 3072, d_kv = 64, num_heads = 12;  // switch-base
  int vocab_size = 32128;
  int batch = 1;
  int tokens = 16;       // decoder steps a segment, at most
  int max_source = 128;  // encoder tokens a segment, at most
  bool encoder = false;  // replay encoder passes (expert file with encoder layers)
  bool decoder = true;
  uint64_t seed = 1;  // of the dense weights
  at::ScalarType dtype = at::kFloat;
  at::Device device = at::kCPU;
  StepMemory steps = StepMemory::kByDevice;
};

// Forces the routing of a batch of traces, and shows the recorded router inputs to
// `inner`.
class ReplayTape : public RoutingOverride, public RoutingObserver {
 public:
  explicit ReplayTape(const MoeGeometry& geometry) : geometry_(geometry) {}
  // Spans of one stack, cut or padded to `tokens`. Padding is routed like the last token.
  void Load(Stack stack, const std::vector<const RoutingSpan*>& spans, int64_t tokens);
  // The encoder's spans of the same sequences, whose router inputs decoder passes show.
  void LoadSource(const std::vector<const RoutingSpan*>& spans, int64_t tokens);
  void SetInner(RoutingObserver* inner) { inner_ = inner; }

  void Replace(int layer, at::Tensor* expert_ids_BT, at::Tensor* gate_probs_BT) override;
  void OnPassBegin(const PassInfo& pass) override;
  void OnRouting(const LayerRouting& routing) override;
  void OnPassEnd(const PassInfo& pass) override;

 private:
  struct Stream {
    at::Tensor experts_LBT;  // int64
    at::Tensor gates_LBT;    // fp32; ones where none were recorded
    at::Tensor hidden_LBTD;  // fp32; undefined where none were recorded
    at::Tensor output_BTD;   // fp32; undefined where none were recorded
  };
  MoeGeometry geometry_;
  Stream streams_[2];
  at::Tensor source_BSD_, source_valid_BS_;  // undefined where none were recorded
  RoutingObserver* inner_ = nullptr;
  int64_t from_ = 0, tokens_ = 0;  // of the pass under way
};

// The full-size configuration that replays a store of this geometry.
SwitchConfig ReplayConfig(const MoeGeometry& recorded, const ReplayOptions& options);

class ReplayWorkload : public Workload {
 public:
  // Traces in batches of options.batch, each batch one segment: an encoder pass (where
  // asked for), then decoder steps. The decoder attends to the encoder's output, or,
  // where only the decoder is replayed, to a fixed synthetic one of the recorded length.
  ReplayWorkload(const MoeGeometry& recorded, std::vector<RoutingTrace> traces,
                 const ReplayOptions& options);
  int num_segments() const override;
  const MoeGeometry& geometry() const override { return geometry_; }
  const SwitchConfig& config() const override { return config_; }
  bool runs(Stack stack) const override {
    return stack == Stack::kEncoder ? options_.encoder : options_.decoder;
  }
  uint64_t KeyValueBytes(const PassInfo& pass) const override;
  uint64_t MinKeyValueBytes() const override {
    return steps_ ? steps_->memory_bytes() : 0;
  }
  uint64_t MaxKeyValueBytes() const override;
  SegmentTimes Run(int segment, ExpertSource* source, RoutingObserver* observer,
                   OutputHash* hash) override;

 private:
  int64_t SourceLength(int segment) const;
  at::Tensor Source(const std::vector<const RoutingSpan*>& spans, OutputHash* hash,
                    SegmentTimes* times, at::Tensor* valid_BS);
  void Steps(const std::vector<const RoutingSpan*>& spans, const at::Tensor& encoded_BSD,
             const at::Tensor& valid_BS, OutputHash* hash, SegmentTimes* times);

  ReplayOptions options_;
  std::vector<RoutingTrace> traces_;
  SwitchConfig config_;
  MoeGeometry geometry_;
  SourceSwitch source_;
  LocalExpertExecutor executor_;
  std::unique_ptr<SwitchModel> model_;
  ReplayTape tape_;
  std::unique_ptr<StaticDecoder> steps_;  // null: memory grows
  int running_ = 0;                       // segment
};

}  // namespace routecast
