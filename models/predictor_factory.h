// A predictor by name or by the folder of a trained run.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "models/baseline_predictors.h"
#include "models/expert_predictor.h"
#include "models/speculation_model.h"

namespace routecast {

// A learned model with its calibration. One Forward serves all leads of PredictLeads.
// Token ids that the model has no row for read as padding does.
class LearnedPredictor final : public ExpertPredictor {
 public:
  LearnedPredictor(std::string name, SavedSpeculationModel saved);
  std::string name() const override { return name_; }
  bool needs_hidden() const override;
  bool needs_token_ids() const override { return ReadsTokenIds(config()); }
  int history_tokens() const override;
  bool keeps_tokens() const override { return saved_.model->keeps_tokens(); }
  void PrepareServing() override { saved_.model->PrepareServing(); }
  std::optional<at::Tensor> Predict(const RoutingWindow& window, int lead) override;
  std::vector<std::optional<at::Tensor>> PredictLeads(const RoutingWindow& window,
                                                      int num_leads) override;
  std::vector<std::optional<at::Tensor>> PredictLast(const RoutingWindow& window,
                                                     int num_leads) override;
  std::optional<at::Tensor> LaterUse() const override { return later_BLE_; }
  const SpeculationConfig& config() const { return saved_.model->config(); }

 private:
  void RequireOwn(const RoutingWindow& window) const;
  RoutingWindow Known(const RoutingWindow& window) const;
  std::vector<std::optional<at::Tensor>> Calibrated(const RoutingWindow& window,
                                                    const at::Tensor& logits_BTHE,
                                                    int num_leads) const;
  std::string name_;
  SavedSpeculationModel saved_;
  std::optional<at::Tensor> later_BLE_;
};

// `name_or_folder`: one of BaselineNames() or ServingStrategyNames(), or a folder that
// holds config.json and model.safetensors (itself or in its subfolder "model"), plain or
// after "online:" (OnlinePredictor) or "adaptive_context:" (AdaptiveContextPredictor).
// `baselines_file` (what BaselineTables::Save wrote) is read for counting predictors
// only; `routers` serve stale_gate. Throws UsageError (unknown, missing what it needs, or
// a model of attention summaries or of the router's likeliest experts, which is offline
// only), DataError (corrupt, or of another geometry than `geometry`).
std::unique_ptr<ExpertPredictor> LoadPredictor(const std::string& name_or_folder,
                                               const MoeGeometry& geometry,
                                               const fs::path& baselines_file,
                                               const std::vector<RouterWeights>& routers);

}  // namespace routecast
