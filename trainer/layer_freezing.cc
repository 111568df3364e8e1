#include "trainer/layer_freezing.h"

#include <cstdlib>

namespace routecast {
namespace {

// Of "layer.3.in.weight" or "group.0.block.3.in.weight"; -1 where it is of no layer.
int LayerOf(const std::string& parameter) {
  for (const std::string part : {"layer.", "block."}) {
    const size_t at = parameter.find(part);
    if (at != std::string::npos && (at == 0 || parameter[at - 1] == '.')) {
      return std::atoi(parameter.c_str() + at + part.size());
    }
  }
  return parameter.ends_with(".embedding") ? 0 : -1;
}

}  // namespace

int64_t LayerFreezing::ReleasedAt(const std::string& parameter) const {
  const int layer = LayerOf(parameter);
  if (layer < 0 || layer >= layers) return 0;
  return int64_t{epochs} * (layers - layer);
}

Json LayerFreezing::ToJson() const { return {{"layers", layers}, {"epochs", epochs}}; }

}  // namespace routecast
