#include "storage/one_model.h"

#include "common/errors.h"

namespace routecast {
namespace {

std::string Text(const StoreModel& store) {
  const MoeGeometry& g = store.geometry;
  return store.name + ": " + std::to_string(g.encoder_layers) + " + " +
         std::to_string(g.decoder_layers) + " layers of " +
         std::to_string(g.num_experts) + " experts, width " + std::to_string(g.d_model) +
         ", " + std::to_string(g.experts_per_token) + " a token";
}

}  // namespace

void RequireOneModel(const StoreModel& a, const StoreModel& b) {
  if (a.geometry == b.geometry) return;
  throw UsageError(ErrorText("the two stores are of models of other geometries",
                             Text(a) + "; " + Text(b), "give two stores of one model"));
}

}  // namespace routecast
