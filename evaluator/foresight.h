// What is expected of the layers ahead, as the planner wants it: one probability an
// expert that any live token needs it. B sequences, T tokens, L MoE layers of a stack, E
// experts, D width. Thread rule: the forward thread.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "evaluator/layer_forecast.h"
#include "models/expert_predictor.h"
#include "models/next_token_guess.h"
#include "models/routing_observer.h"

namespace routecast {

class Foresight {
 public:
  virtual ~Foresight() = default;
  virtual std::string name() const = 0;
  // A pass starts; its tokens are known, its routing is not.
  virtual std::vector<LayerForecast> AtPassBegin(const PassInfo& pass) = 0;
  // A layer has chosen and its experts are about to run.
  virtual std::vector<LayerForecast> AtLayer(const LayerRouting& routing) = 0;
  // The pass' layers are done; the vocabulary head and the next token are still to come.
  virtual std::vector<LayerForecast> AtPassEnd(const PassInfo&) { return {}; }
  // The same news without the question (speculation is off): keeps histories whole.
  virtual void SkipPass(const PassInfo& pass) = 0;
  virtual void Skip(const LayerRouting& routing) = 0;
};

// An ExpertPredictor served with windows built from the routing so far. The probabilities
// of the tokens that count (encoder: all valid ones; decoder: the newest of each
// sequence) are joined as 1 - prod(1 - p); where a token takes K experts, p is that it
// takes this one (UseProbability).
class PredictorForesight : public Foresight {
 public:
  // `predictor` outlives this. max_lead in layer visits. With `next_token` a decoder's
  // next pass is asked about as soon as this one's layers are done, under the token that
  // is guessed then; the last layer's own question, which would not know it, is left out.
  PredictorForesight(ExpertPredictor* predictor, const MoeGeometry& geometry,
                     int max_lead,
                     std::shared_ptr<const NextTokenGuess> next_token = nullptr);
  std::string name() const override;
  std::vector<LayerForecast> AtPassBegin(const PassInfo& pass) override;
  std::vector<LayerForecast> AtLayer(const LayerRouting& routing) override;
  std::vector<LayerForecast> AtPassEnd(const PassInfo& pass) override;
  void SkipPass(const PassInfo& pass) override;
  void Skip(const LayerRouting& routing) override;

 private:
  bool AsksAtEnd(int source_layer) const {
    return window_.stack == Stack::kDecoder &&
           source_layer == geometry_.decoder_layers - 1 && next_token_ != nullptr;
  }
  // Plain rows on the CPU.
  struct Window {
    Stack stack = Stack::kEncoder;
    int pass_tokens = 0;      // of the pass under way: the newest columns
    int64_t first_token = 0;  // place of the first column
    at::Tensor tokens_BT, valid_BT, experts_BTL;
    at::Tensor others_BTLK;  // where tokens take several experts
  };
  void StartPass(const PassInfo& pass);
  void Remember(const LayerRouting& routing);
  std::vector<LayerForecast> Ask(int source_layer);
  void AddLaterUse(const RoutingWindow& window,
                   std::vector<LayerForecast>* forecasts) const;
  at::Tensor Context(bool newest_known) const;  // RoutingWindow::context_BTD

  ExpertPredictor* predictor_;
  MoeGeometry geometry_;
  int max_lead_;
  std::shared_ptr<const NextTokenGuess> next_token_;
  at::Tensor guessed_B1_;  // what the next pass was asked about under; undefined: nothing
  Window window_;
  std::vector<at::Tensor> hidden_BTD_;  // by layer of the stack; kept where needed
  at::Tensor source_BSD_,
      source_valid_BS_;  // of the encoder's newest pass, or a replay's
};

// The true future, recorded in an earlier pass over the same inputs.
class OracleForesight : public Foresight {
 public:
  struct Visit {
    int layer = 0;
    std::vector<int> experts;
  };
  // `horizon`: how many visits ahead it tells.
  OracleForesight(MoeGeometry geometry, int horizon);
  // Visits of the run that comes, in order.
  void SetFuture(std::vector<Visit> visits);
  std::string name() const override { return "oracle"; }
  std::vector<LayerForecast> AtPassBegin(const PassInfo& pass) override;
  std::vector<LayerForecast> AtLayer(const LayerRouting& routing) override;
  void SkipPass(const PassInfo&) override {}
  void Skip(const LayerRouting&) override { ++next_; }

 private:
  std::vector<LayerForecast> Tell() const;
  MoeGeometry geometry_;
  int horizon_;
  std::vector<Visit> visits_;
  size_t next_ = 0;  // the first visit that has not begun
};

}  // namespace routecast
