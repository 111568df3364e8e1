// The first weights of a Switch Transformer that learns to route in minutes.
#pragma once

#include "models/parameters.h"
#include "models/switch_config.h"

namespace routecast {

// Normal weights, fan-in scaled (query also by d_kv^-0.5), embeddings std 0.5, routers
// `router_deviation`/sqrt(d_model), so that their logits begin with that deviation,
// output projections scaled by 0.3. The relative position bias starts with slopes instead
// of noise (heads by turns: left, right, both neighbourhoods, global): without them the
// encoder finds no use for context in this time. fp32, CPU, requires_grad set.
Parameters InitialParameters(const SwitchConfig& config, double router_deviation,
                             uint64_t seed);

}  // namespace routecast
