// Predictors that count instead of learning, and the stale gate.
// V vocabulary, E experts, L layers of a stack. In the decoder the layers of consecutive
// tokens form one chain: a lead past the last layer is in the next token.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "common/files.h"
#include "models/checkpoint.h"
#include "models/count_rows.h"
#include "models/expert_predictor.h"

namespace routecast {

// Counts of a store's train part, one set for all counting predictors. What counts
// are labels: choices of tokens that capacity dropped are none, though what follows from
// them counts. Where tokens take several experts, each of them counts alike, as what is
// predicted and as what it is predicted from (order 2: with the first choice of the layer
// before). Thread rule: const from any thread; Fit
// and Merge by one.
class BaselineTables {
 public:
  BaselineTables(const MoeGeometry& geometry, int vocab_size);
  // Traces without token ids leave the token table empty. Throws DataError where the
  // trace does not fit the geometry or the vocabulary.
  void Fit(const RoutingTrace& trace);
  void Merge(const BaselineTables& other);  // REQUIRES equal geometry and vocabulary
  void Save(const fs::path& file) const;    // one safetensors file
  static BaselineTables Load(const fs::path& file);
  const MoeGeometry& geometry() const { return geometry_; }
  int vocab_size() const { return vocab_size_; }

  // Each fills probs[E], which sums to 1. layer = global.
  // (count + .1) / (n + .1 E).
  void Frequency(int layer, float* probs) const;
  // (count + .1 E f) / (n + .1 E): a token never seen gives the frequency f.
  void Token(int layer, int64_t token, float* probs) const;
  // From `expert` at global layer `source` to `lead` layers on; weight 2 on the
  // frequency.
  void Markov1(int source, int lead, int target, int expert, float* probs) const;
  // The same given also the expert one layer before the source; weight 2 on order 1.
  void Markov2(int source, int lead, int target, int before, int expert,
               float* probs) const;
  // From the previous token's expert at the same layer; weight 2 on the frequency.
  void PreviousToken(int layer, int expert, float* probs) const;
  double Markov1Count(int source, int lead, int expert) const;  // how often it was seen

 private:
  void FitSpan(const RoutingSpan& span, Stack stack);
  void CheckSpan(const RoutingSpan& span, int layers) const;
  uint64_t MarkovKey(int source, int lead, int expert) const;
  uint64_t Markov2Key(int source, int lead, int before, int expert) const;

  MoeGeometry geometry_;
  int vocab_size_;
  std::vector<double> frequency_;  // [layers, E] counts
  // By key: (layer, token); (source, lead, expert); (source, lead, before, expert);
  // (layer, previous expert).
  CountRows token_, markov1_, markov2_, previous_;
};

// Names of the predictors below, in the order of reports.
std::vector<std::string> BaselineNames();
// `name` of BaselineNames(). Tables may be null for `stale_gate`, routers empty for all
// others. Throws UsageError naming the nearest name, or what is missing.
std::unique_ptr<ExpertPredictor> MakeBaseline(
    const std::string& name, std::shared_ptr<const BaselineTables> tables,
    const MoeGeometry& geometry, const std::vector<RouterWeights>& routers);

// The target layer's router applied to the state at the source layer. The recorded input
// is RMS-normed and scaled by the source's gain, so gain_target / gain_source gives what
// the target's norm would make of the same state. Has nothing to say for the next token.
class StaleGatePredictor final : public ExpertPredictor {
 public:
  StaleGatePredictor(MoeGeometry geometry, std::vector<RouterWeights> routers);
  std::string name() const override { return "stale_gate"; }
  bool needs_hidden() const override { return true; }
  int history_tokens() const override { return 1; }
  std::optional<at::Tensor> Predict(const RoutingWindow& window, int lead) override;
  // The control: the source layer's own router on its own input. Must be right always.
  at::Tensor PredictLead0(const RoutingWindow& window) const;

 private:
  at::Tensor Apply(const RoutingWindow& window, int target) const;
  MoeGeometry geometry_;
  std::vector<RouterWeights> routers_;
};

}  // namespace routecast
