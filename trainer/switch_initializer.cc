#include "trainer/switch_initializer.h"

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>

#include <cmath>

#include "common/files.h"
#include "common/random.h"
#include "models/switch_model.h"

namespace routecast {
namespace {

constexpr double kEmbeddingStd = 0.5;
constexpr double kOutputScale = 0.3;
constexpr double kSlope = 2.0;  // bias lost a bucket away, in logits

bool EndsWith(const std::string& text, const std::string& end) {
  return text.size() >= end.size() &&
         text.compare(text.size() - end.size(), end.size(), end) == 0;
}

// Buckets count distance: 0.. to the left (and self), half.. to the right in the encoder.
at::Tensor SlopedBias(int64_t buckets, int64_t heads, bool bidirectional) {
  at::Tensor bias = at::zeros({buckets, heads});
  auto value = bias.accessor<float, 2>();
  const int64_t half = bidirectional ? buckets / 2 : buckets;
  for (int64_t h = 0; h < heads; ++h) {
    for (int64_t i = 0; i < buckets; ++i) {
      const bool right = bidirectional && i >= half;
      const double distance = static_cast<double>(right ? i - half : i);
      const double near = -kSlope * distance, far = -kSlope * static_cast<double>(half);
      double b = 0;  // the global head
      switch (h % 4) {
        case 0:
          b = right || distance == 0 ? far : near;
          break;  // left
        case 1:   // right; the decoder's looks further left
          b = bidirectional ? (right ? near : far) : (distance > 0 ? near / 4 : far);
          break;
        case 2:
          b = distance == 0 ? far : near;
          break;  // both
      }
      value[i][h] = static_cast<float>(b);
    }
  }
  return bias;
}

double StdOf(const std::string& name, const SwitchConfig& c, double router_deviation) {
  const double d = c.d_model, f = c.d_ff, inner = double(c.num_heads) * c.d_kv;
  if (name == "shared.weight") return kEmbeddingStd;
  if (name == "lm_head.weight") return 1.0 / std::sqrt(d);
  if (EndsWith(name, "router.classifier.weight")) return router_deviation / std::sqrt(d);
  if (EndsWith(name, ".q.weight")) return 1.0 / std::sqrt(d * c.d_kv);
  if (EndsWith(name, ".k.weight") || EndsWith(name, ".v.weight"))
    return 1.0 / std::sqrt(d);
  if (EndsWith(name, ".o.weight")) return kOutputScale / std::sqrt(inner);
  if (EndsWith(name, ".wi.weight")) return 1.0 / std::sqrt(d);
  if (EndsWith(name, ".wo.weight")) return kOutputScale / std::sqrt(f);
  throw std::logic_error("no initialisation for " + name);
}

}  // namespace

Parameters InitialParameters(const SwitchConfig& config, double router_deviation,
                             uint64_t seed) {
  Parameters parameters;
  for (const auto& [name, shape] : ParameterShapes(config)) {
    at::Tensor tensor;
    if (name.find("layer_norm") != std::string::npos) {
      tensor = at::ones(shape);
    } else if (EndsWith(name, "relative_attention_bias.weight")) {
      tensor = SlopedBias(shape[0], shape[1], name.rfind("encoder", 0) == 0);
    } else if (EndsWith(name, "classifier.bias")) {
      tensor = at::zeros(shape);
    } else {
      // Seeded by name: the weights do not depend on the order of creation.
      at::Generator generator = at::detail::createCPUGenerator(Mix(seed, Hash64(name)));
      tensor =
          at::empty(shape).normal_(0, StdOf(name, config, router_deviation), generator);
    }
    parameters.Add(name, tensor.requires_grad_());
  }
  return parameters;
}

}  // namespace routecast
