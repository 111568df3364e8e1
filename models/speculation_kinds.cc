#include "models/speculation_kinds.h"

#include <algorithm>
#include <stdexcept>

#include "models/ensemble_model.h"
#include "models/speculation_model.h"

namespace routecast {
namespace {

// Geometries of few experts get models of a size that their traces can fit.
bool Small(const SpeculationConfig& c) { return c.geometry.num_experts <= 32; }

void HiddenSizes(SpeculationConfig* c) {
  c->width = Small(*c) ? 128 : 256;
  c->heads = 4;
  c->ff = 2 * c->width;
  c->layers = 2;
  c->neighbours = 2;
  c->next_token = c->priors && c->geometry.decoder_layers > 0;
}

// The published baseline, smaller where E <= 32.
void InterlayerSizes(SpeculationConfig* c) {
  c->dropout = 0.1;
  c->width = Small(*c) ? 128 : 256;
  c->heads = Small(*c) ? 4 : 8;
  c->ff = 4 * c->width;
  c->layers = Small(*c) ? 2 : 4;
}

void MultiscaleSizes(SpeculationConfig* c) {
  c->dropout = 0.1;
  c->width = Small(*c) ? 96 : 384;
  c->heads = 8;
  c->ff = 4 * c->width;
  c->layers = 3;
  c->context = 4;
}

// As wide as the state, whatever the geometry; four layers of context.
void GatingSizes(SpeculationConfig* c) {
  c->dropout = 0.1;
  c->width = std::max(8, c->hidden_width);
  c->heads = 8;
  while (c->width % c->heads != 0) --c->heads;
  c->ff = 4 * c->width;
  c->layers = 3;
  c->context = 4;
}

void LegacySizes(SpeculationConfig* c) {
  c->dropout = 0.1;
  c->width = c->kind == "simple" ? 256 : c->kind == "conv1d" ? 96 : 128;
  c->heads = 4;
  c->ff = c->kind == "conv1d" ? 64 : 128;
  c->layers = 2;
  c->context = 1;
}

void StaleCorrectionSizes(SpeculationConfig* c) {
  c->dropout = 0;
  c->width = Small(*c) ? 32 : 64;
  c->heads = 1;
  c->ff = 2;
  c->layers = 0;
  c->context = 1;
}

// Three members of the published kind, differing in depth, width and dropout.
void EnsembleSizes(SpeculationConfig* c) {
  const int context = c->context;
  const auto member = [&](int width, int heads, int layers, double dropout) {
    SpeculationConfig m = *c;
    m.kind = "interlayer";
    m.context = context;
    m.priors = PriorElements(m) <= 8e6;
    InterlayerSizes(&m);
    m.width = Small(m) ? width / 4 : width;
    m.heads = Small(m) ? heads / 2 : heads;
    m.ff = 4 * m.width;
    m.layers = Small(m) ? layers / 2 : layers;
    m.dropout = dropout;
    return m;
  };
  c->members = {member(512, 16, 6, .1), member(384, 12, 4, .15), member(256, 8, 4, .2)};
  c->weights.assign(3, 1.0 / 3);
  c->combine = "probabilities";
  c->width = c->members[0].width;
  c->heads = c->members[0].heads;
  c->ff = c->members[0].ff;
  c->layers = c->members[0].layers;
}

constexpr unsigned kUsesEverything = 255;
constexpr unsigned kTakesAll = kTakesTokens | kTakesRouterInputs | kTakesTopK;
constexpr unsigned kGating = kUsesHeads | kUsesContext | kUsesDropout |
                             kLearnsConfidence | kUsesOlderLayers | kTakesTopK;
constexpr unsigned kLegacy = kUsesWidth | kUsesDropout | kTakesTopK;

constexpr SpeculationKind kKinds[] = {
    {"hidden", RouterInputs::kOptional, true, 6e-3, HiddenSizes, MakeHidden,
     (kUsesEverything & ~kUsesContext) | kTakesTopK, false, false, false, true},
    {"stale_correction", RouterInputs::kRequired, false, 3e-3, StaleCorrectionSizes,
     MakeStaleCorrection, kLegacy, false, true},
    {"interlayer", RouterInputs::kNever, false, 1e-3, InterlayerSizes, MakeInterlayer,
     kUsesEverything | kHasPatterns | kTakesAll, true, false, true},
    {"autoregressive", RouterInputs::kNever, false, 1e-3, InterlayerSizes,
     MakeAutoregressive, (kUsesEverything & ~kLearnsConfidence) | kTakesAll, true},
    {"multiscale", RouterInputs::kNever, false, 1e-3, MultiscaleSizes, MakeMultiscale,
     kUsesWidth | kUsesFf | kUsesDropout | kLearnsConfidence | kUsesOlderLayers |
         kTakesAll},
    {"moe", RouterInputs::kNever, false, 1e-3, InterlayerSizes, MakeInterlayer,
     kUsesEverything | kHasPatterns | kTakesAll, true, false, true},
    {"ensemble", RouterInputs::kNever, false, 1e-3, EnsembleSizes, MakeEnsemble,
     kLearnsConfidence | kUsesOlderLayers | kHasPatterns | kTakesAll},
    {"contextual", RouterInputs::kRequired, false, 1e-3, GatingSizes, MakeGating,
     kGating},
    {"transformer", RouterInputs::kRequired, false, 1e-3, GatingSizes, MakeGating,
     kGating | kUsesLayers},
    {"hierarchical", RouterInputs::kRequired, false, 1e-3, GatingSizes, MakeGating,
     kGating},
    {"simple", RouterInputs::kRequired, false, 3e-3, LegacySizes, MakeLegacy, kLegacy},
    {"lstm", RouterInputs::kRequired, false, 3e-3, LegacySizes, MakeLegacy,
     kLegacy | kUsesLayers},
    {"attention", RouterInputs::kRequired, false, 3e-3, LegacySizes, MakeLegacy,
     kLegacy | kUsesHeads},
    {"conv1d", RouterInputs::kRequired, false, 3e-3, LegacySizes, MakeLegacy,
     kLegacy | kUsesFf},
    {"legacy_multiscale", RouterInputs::kRequired, false, 3e-3, LegacySizes, MakeLegacy,
     kLegacy},
};

}  // namespace

std::vector<std::string> SpeculationKinds() {
  std::vector<std::string> names;
  for (const SpeculationKind& kind : kKinds) names.emplace_back(kind.name);
  return names;
}

bool OfTracedModel(const std::string& parameter) {
  for (const char* prefix :
       {"inputs.", "expert.", "others.", "source.", "lead.", "before.", "prior.",
        "head.out.", "head.backup.", "head.weight", "head.bias"}) {
    if (parameter.starts_with(prefix)) return true;
  }
  return false;
}

const SpeculationKind& KindOf(const std::string& name) {
  for (const SpeculationKind& kind : kKinds) {
    if (name == kind.name) return kind;
  }
  throw std::logic_error("no kind of speculation model is named " + name);
}

double PriorElements(const SpeculationConfig& c) {
  const MoeGeometry& g = c.geometry;
  if (KindOf(c.kind).embeds_experts) {
    const double leads = std::max(g.encoder_layers, g.decoder_layers);
    return g.num_layers() * (g.num_experts + 1.0) * leads * g.num_experts;
  }
  if (c.kind != "hidden") return 0;
  const double decoder_keys = double(g.decoder_layers) * g.num_experts;
  return double(c.vocab_size) * g.num_keys() + decoder_keys * decoder_keys;
}

}  // namespace routecast
