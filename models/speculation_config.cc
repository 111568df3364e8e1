#include "models/speculation_config.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>

#include "common/errors.h"
#include "models/speculation_json.h"
#include "models/speculation_kinds.h"

namespace routecast {
namespace {

constexpr double kMaxParameters = 1e9;
constexpr size_t kMaxMembers = 64;

struct Bound {
  const char* key;
  int64_t value, low, high;
};

std::string SizeProblem(const SpeculationConfig& c) {
  const MoeGeometry& g = c.geometry;
  const Bound bounds[] = {{"encoder_layers", g.encoder_layers, 0, 1024},
                          {"decoder_layers", g.decoder_layers, 0, 1024},
                          {"num_experts", g.num_experts, 1, 65535},
                          {"experts_per_token", g.experts_per_token, 1, 64},
                          {"d_model", g.d_model, 0, 1 << 20},
                          {"vocab_size", c.vocab_size, 0, 1 << 24},
                          {"hidden_width", c.hidden_width, 0, 1 << 16},
                          {"width", c.width, 2, 8192},
                          {"heads", c.heads, 1, 256},
                          {"ff", c.ff, 2, 1 << 16},
                          {"layers", c.layers, 0, 64},
                          {"context", c.context, 1, 1024},
                          {"neighbours", c.neighbours, 0, 64},
                          {"attention_heads", c.attention_heads, 0, 4096},
                          {"beams", c.beams, 1, c.kind == "autoregressive" ? 64 : 1},
                          {"backup_experts", c.backup_experts, 0,
                           std::min(15, std::max(0, g.num_experts - 1))}};
  for (const Bound& b : bounds) {
    if (b.value < b.low || b.value > b.high) {
      return std::string(b.key) + "=" + std::to_string(b.value) + ", expected " +
             std::to_string(b.low) + ".." + std::to_string(b.high);
    }
  }
  if (g.num_layers() == 0) return "no MoE layers, expected at least one";
  if (!(c.dropout >= 0 && c.dropout < 1)) {
    return "dropout=" + std::to_string(c.dropout) + ", expected 0 <= dropout < 1";
  }
  if (c.width % c.heads != 0) {
    return "width=" + std::to_string(c.width) +
           ", expected a multiple of heads=" + std::to_string(c.heads);
  }
  return "";
}

// About the largest that any kind makes of these sizes.
double Elements(const SpeculationConfig& c) {
  const double width = c.width, wide = std::max(c.width, c.hidden_width);
  const double keys = c.geometry.num_keys(), experts = c.geometry.num_experts;
  return 64.0 * c.vocab_size + 3.0 * keys * width + keys * c.ff +
         (c.layers + 1.0) * 8 * (4 * width * width + 2 * width * c.ff) +
         c.ff * (c.ff / 2.0 + (c.backup_experts + 1) * experts) +
         (c.geometry.num_layers() + 4.0) * wide * (c.hidden_width + experts) +
         (c.context + 8.0) * wide * (wide / 4 + experts) + 128.0 * c.neighbours * width +
         (c.router_inputs ? c.geometry.num_layers() * width * c.hidden_width : 0) +
         130.0 * c.attention_heads * c.geometry.num_layers() * width +
         (c.priors ? PriorElements(c) : 0);
}

std::string EnsembleProblem(const SpeculationConfig& c) {
  if (c.kind != "ensemble") {
    return c.members.empty() ? "" : "members of a kind that has none";
  }
  if (c.members.empty() || c.members.size() > kMaxMembers) {
    return std::to_string(c.members.size()) + " members, expected 1.." +
           std::to_string(kMaxMembers);
  }
  double sum = 0;
  for (const double w : c.weights) sum += w >= 0 && std::isfinite(w) ? w : 1e9;
  if (c.weights.size() != c.members.size() || std::abs(sum - 1) > 1e-3) {
    return "weights that do not sum to 1 over the members";
  }
  if (c.combine != "probabilities" && c.combine != "logits" && c.combine != "vote" &&
      c.combine != "stack") {
    return "combine=" + c.combine.substr(0, 64) +
           ", expected probabilities, logits, vote or stack";
  }
  for (const SpeculationConfig& member : c.members) {
    if (member.kind == "ensemble") return "an ensemble in an ensemble";
    if (!(member.geometry == c.geometry)) return "a member of another geometry";
    if (member.attention_heads > 0) return "a member that reads attention summaries";
    if (const std::string problem = ProblemOf(member); !problem.empty()) {
      return "a member with " + problem;
    }
  }
  return "";
}

// Of inputs that not every kind may have.
std::string InputProblem(const SpeculationConfig& c) {
  struct Input {
    const char* key;
    bool wanted;
    unsigned use;
    bool possible;
  };
  const Input inputs[] = {
      {"token_inputs", c.token_inputs, kTakesTokens, c.vocab_size > 0},
      {"router_inputs", c.router_inputs, kTakesRouterInputs, c.hidden_width > 0},
      {"topk_inputs", c.topk_inputs, kTakesTopK, true}};
  for (const Input& input : inputs) {
    if (!input.wanted || ((KindOf(c.kind).uses & input.use) && input.possible)) continue;
    return std::string(input.key) + "=true, expected false of " + c.kind +
           (input.possible ? "" : " without a size for it");
  }
  return "";
}

}  // namespace

std::string ProblemOf(const SpeculationConfig& c) {
  if (c.kind == "ensemble") return EnsembleProblem(c);
  if (const std::string problem = SizeProblem(c); !problem.empty()) return problem;
  const SpeculationKind& kind = KindOf(c.kind);
  if (kind.token_ids && c.vocab_size == 0) return "vocab_size=0, expected at least 1";
  if (kind.router_inputs == RouterInputs::kRequired && c.hidden_width == 0) {
    return "hidden_width=0, expected the width of the router's input";
  }
  if (c.backup_experts > 0 && !kind.backups) {
    return "backup_experts=" + std::to_string(c.backup_experts) + ", expected 0 of " +
           c.kind;
  }
  if (c.positions && c.kind != "hidden") {
    return "positions=true, expected false of " + c.kind;
  }
  if (c.attention_heads > 0 && (!kind.attention || c.hidden_width == 0)) {
    return "attention_heads=" + std::to_string(c.attention_heads) + ", expected 0 of " +
           c.kind + (kind.attention ? " without router inputs" : "");
  }
  if (c.encoder_attention && (c.kind != "hidden" || c.layers == 0)) {
    return "encoder_attention=true, expected false of " + c.kind +
           (c.layers == 0 ? " without blocks" : "");
  }
  if (c.later_use && (c.kind != "hidden" || c.geometry.decoder_layers == 0)) {
    return "later_use=true, expected false of " + c.kind +
           (c.kind == "hidden" ? " without a decoder" : "");
  }
  if (const std::string problem = InputProblem(c); !problem.empty()) return problem;
  if (c.next_token && (!c.priors || c.geometry.decoder_layers == 0)) {
    return "next_token=true, expected false without priors and a decoder";
  }
  if (Elements(c) > kMaxParameters) {
    return "sizes that make about " + std::to_string(Elements(c)) +
           " parameters, expected at most 1e9";
  }
  return EnsembleProblem(c);
}

Json SpeculationConfig::ToJson() const {
  Json json{{"kind", kind},
            {"geometry",
             {{"encoder_layers", geometry.encoder_layers},
              {"decoder_layers", geometry.decoder_layers},
              {"num_experts", geometry.num_experts},
              {"experts_per_token", geometry.experts_per_token},
              {"d_model", geometry.d_model}}},
            {"vocab_size", vocab_size},
            {"hidden_width", hidden_width},
            {"width", width},
            {"heads", heads},
            {"ff", ff},
            {"layers", layers},
            {"context", context},
            {"neighbours", neighbours},
            {"priors", priors},
            {"next_token", next_token},
            {"dropout", dropout}};
  if (positions) json["positions"] = true;
  if (token_inputs) json["token_inputs"] = true;
  if (router_inputs) json["router_inputs"] = true;
  if (topk_inputs) json["topk_inputs"] = true;
  if (beams > 1) json["beams"] = beams;
  if (backup_experts > 0) json["backup_experts"] = backup_experts;
  if (attention_heads > 0) json["attention_heads"] = attention_heads;
  if (encoder_attention) json["encoder_attention"] = true;
  if (later_use) json["later_use"] = true;
  if (members.empty()) return json;
  json["weights"] = weights;
  json["combine"] = combine;
  for (const SpeculationConfig& member : members) {
    json["members"].push_back(member.ToJson());
  }
  return json;
}

namespace {

void ReadMembers(const SpeculationJson& in, const std::string& what,
                 SpeculationConfig* c) {
  c->combine = in.Text("combine");
  const Json& members = in.Field("members");
  const Json& weights = in.Field("weights");
  if (!members.is_array() || members.size() > kMaxMembers || !weights.is_array()) {
    in.Bad("members is not a list of at most " + std::to_string(kMaxMembers));
  }
  for (const Json& weight : weights) {
    if (!weight.is_number()) in.Bad("weights holds " + weight.dump());
    c->weights.push_back(weight.get<double>());
  }
  for (const Json& member : members) {
    // Looked at before it is read: an ensemble in an ensemble could nest without end.
    if (member.is_object() && member.contains("members")) {
      in.Bad("an ensemble in an ensemble");
    }
    c->members.push_back(SpeculationConfig::FromJson(member, what));
  }
}

}  // namespace

SpeculationConfig SpeculationConfig::FromJson(const Json& json, const std::string& what) {
  const SpeculationJson in(json, what);
  SpeculationConfig c;
  c.kind = in.Text("kind");
  const auto kinds = SpeculationKinds();
  if (std::find(kinds.begin(), kinds.end(), c.kind) == kinds.end()) {
    in.Bad("kind=" + c.kind.substr(0, 64) + ", did you mean " +
           NearestName(c.kind.substr(0, 64), kinds) + "?");
  }
  const SpeculationJson g(in.Field("geometry"), what);
  c.geometry = {g.Int("encoder_layers"), g.Int("decoder_layers"), g.Int("num_experts"),
                g.Int("experts_per_token"), g.Int("d_model")};
  c.vocab_size = in.Int("vocab_size");
  c.hidden_width = in.Int("hidden_width");
  c.width = in.Int("width");
  c.heads = in.Int("heads");
  c.ff = in.Int("ff");
  c.layers = in.Int("layers");
  c.context = in.Int("context");
  c.neighbours = in.Int("neighbours");
  c.priors = in.Flag("priors");
  c.next_token = in.Flag("next_token");
  c.dropout = in.Number("dropout");
  if (json.contains("beams")) c.beams = in.Int("beams");
  if (json.contains("positions")) c.positions = in.Flag("positions");
  if (json.contains("token_inputs")) c.token_inputs = in.Flag("token_inputs");
  if (json.contains("router_inputs")) c.router_inputs = in.Flag("router_inputs");
  if (json.contains("topk_inputs")) c.topk_inputs = in.Flag("topk_inputs");
  if (json.contains("backup_experts")) c.backup_experts = in.Int("backup_experts");
  if (json.contains("attention_heads")) c.attention_heads = in.Int("attention_heads");
  if (json.contains("encoder_attention")) {
    c.encoder_attention = in.Flag("encoder_attention");
  }
  if (json.contains("later_use")) c.later_use = in.Flag("later_use");
  if (c.kind == "ensemble") ReadMembers(in, what, &c);
  if (const std::string problem = ProblemOf(c); !problem.empty()) in.Bad(problem);
  return c;
}

bool ReadsTopK(const SpeculationConfig& config) {
  return config.topk_inputs ||
         std::any_of(config.members.begin(), config.members.end(), ReadsTopK);
}

bool ReadsTokenIds(const SpeculationConfig& config) {
  const SpeculationKind& kind = KindOf(config.kind);
  // Kinds of one state a token have the id beside it where the store had ids.
  const bool beside =
      kind.router_inputs == RouterInputs::kRequired && config.vocab_size > 0;
  return kind.token_ids || config.token_inputs || beside ||
         std::any_of(config.members.begin(), config.members.end(), ReadsTokenIds);
}

int NumLeadsOf(const MoeGeometry& geometry, Stack stack, int source_layer) {
  const int layers = geometry.layers(stack);
  if (source_layer < -1 || source_layer >= layers) {
    throw std::logic_error("no source layer " + std::to_string(source_layer) + " in a " +
                           StackName(stack) + " of " + std::to_string(layers));
  }
  return stack == Stack::kEncoder ? layers - 1 - source_layer : layers;
}

}  // namespace routecast
