// What models of expert ids may see of a token beside them: its id, the router's input at
// the source layer, the probabilities of the router's likeliest experts there.
// M members (speculation_layers.h), B sequences, T tokens, R rows a token, E experts, D
// width.
#pragma once

#include <vector>

#include "models/routing_window.h"
#include "models/speculation_config.h"
#include "models/speculation_layers.h"

namespace routecast {

// A linear map of a normed router input.
struct StateInput {
  StateInput(ParameterMaker* make, const std::string& name, int64_t hidden_width,
             int64_t width)
      : norm(make, name + ".norm", hidden_width),
        linear(make, name + ".linear", hidden_width, width) {}
  at::Tensor operator()(const at::Tensor& hidden_BTD) const {
    return linear(norm(hidden_BTD));
  }
  NormLayer norm;
  LinearLayer linear;
};

class TokenInputs {
 public:
  // Parameters "inputs.*"; none where the configuration asks for nothing.
  TokenInputs(ParameterMaker* make, const SpeculationConfig& config, int64_t width);
  // x [M * B,T,R,D]: the newest row of each token + what the window says of the token. A
  // decoder before its first layer sees the router's input of the token before at the
  // last one. Throws std::logic_error where the window lacks what is asked for.
  at::Tensor AddToNewest(const at::Tensor& x_BTRD, const RoutingWindow& window) const;

 private:
  void AddState(const RoutingWindow& window, at::Tensor* sum) const;
  MoeGeometry geometry_;
  std::vector<EmbeddingLayer> token_;  // one or none, as the next one
  std::vector<LinearLayer> token_in_;
  std::vector<StateInput> states_;  // by global source layer, then the token before's; or
                                    // none. Nothing lies ahead of the encoder's last one
  std::vector<LinearLayer> gates_;  // one or none
};

}  // namespace routecast
