#include <algorithm>

#include "models/activation.h"

namespace routecast {

const std::vector<std::string>& ActivationNames() {
  static const std::vector<std::string> names = {"relu", "gelu", "gelu_new", "silu"};
  return names;
}

const std::string& ActivationName(Activation activation) {
  return ActivationNames().at(static_cast<size_t>(activation));
}

std::optional<Activation> FindActivation(const std::string& name) {
  const auto& names = ActivationNames();
  const auto it = std::find(names.begin(), names.end(), name);
  if (it == names.end()) return std::nullopt;
  return static_cast<Activation>(it - names.begin());
}

}  // namespace routecast
