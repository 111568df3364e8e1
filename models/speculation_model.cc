#include "models/speculation_model.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include <algorithm>

#include "common/errors.h"
#include "models/speculation_kinds.h"

namespace routecast {
namespace {

constexpr double kMaxParameters = 1e9;
constexpr double kMostPriorElements = 8e6;  // by default: 32 MB beside the weights
constexpr int kVersion = 3;
constexpr const char* kFormat = "routecast-speculation";
constexpr uint64_t kMaxConfigBytes = 16 << 20;

struct Kind {
  const char* name;
  std::unique_ptr<SpeculationModel> (*make)(const SpeculationConfig&, uint64_t);
};
constexpr Kind kKinds[] = {{"hidden", MakeHiddenModel},
                           {"interlayer", MakeInterlayerModel}};

struct Bound {
  const char* key;
  int64_t value, low, high;
};

double PriorElements(const SpeculationConfig& c) {
  const MoeGeometry& g = c.geometry;
  if (c.kind == "interlayer") {
    const double leads = std::max(g.encoder_layers, g.decoder_layers);
    return g.num_layers() * (g.num_experts + 1.0) * leads * g.num_experts;
  }
  const double decoder_keys = double(g.decoder_layers) * g.num_experts;
  return double(c.vocab_size) * g.num_keys() + decoder_keys * decoder_keys;
}

// Why the configuration cannot be, as "key=value, expected ..."; empty where it can.
std::string Problem(const SpeculationConfig& c) {
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
                          {"neighbours", c.neighbours, 0, 64}};
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
  if (c.kind == "hidden" && c.vocab_size == 0) return "vocab_size=0, expected at least 1";
  if (c.next_token && (!c.priors || g.decoder_layers == 0)) {
    return "next_token=true, expected false without priors and a decoder";
  }
  const double width = c.width;
  const double parameters = 64.0 * c.vocab_size + 3.0 * g.num_keys() * width +
                            (c.layers + 1.0) * (4 * width * width + 2 * width * c.ff) +
                            c.ff * (c.ff / 2.0 + g.num_experts) +
                            (g.num_layers() + 1.0) * width * c.hidden_width +
                            2.0 * width * c.context + 128.0 * c.neighbours * width +
                            (c.priors ? PriorElements(c) : 0);
  if (parameters > kMaxParameters) {
    return "sizes that make about " + std::to_string(parameters) +
           " parameters, expected at most 1e9";
  }
  return "";
}

[[noreturn]] void Bad(const std::string& what, const std::string& values) {
  throw DataError(ErrorText(what + " is not the configuration of a speculation model",
                            values, "train the model again, or copy its folder again"));
}

const Json& Field(const Json& json, const std::string& key, const std::string& what) {
  if (!json.is_object() || !json.contains(key)) Bad(what, key + " is missing");
  return json[key];
}

int Int(const Json& json, const std::string& key, const std::string& what) {
  const Json& value = Field(json, key, what);
  // Unsigned values above int64's range come back negative and are refused here, too.
  const int64_t number = value.is_number_integer() ? value.get<int64_t>() : -2;
  if (number < -1 || number > (1 << 30)) {
    Bad(what, key + "=" + value.dump() + ", expected an integer in range");
  }
  return static_cast<int>(number);
}

bool Flag(const Json& json, const std::string& key, const std::string& what) {
  const Json& value = Field(json, key, what);
  if (!value.is_boolean())
    Bad(what, key + "=" + value.dump() + ", expected true or false");
  return value.get<bool>();
}

double Number(const Json& json, const std::string& key, const std::string& what) {
  const Json& value = Field(json, key, what);
  if (!value.is_number()) Bad(what, key + "=" + value.dump() + ", expected a number");
  return value.get<double>();
}

std::string Text(const Json& json, const std::string& key, const std::string& what) {
  const Json& value = Field(json, key, what);
  if (!value.is_string()) Bad(what, key + "=" + value.dump() + ", expected a text");
  return value.get<std::string>();
}

}  // namespace

Json SpeculationConfig::ToJson() const {
  return Json{{"kind", kind},
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
}

SpeculationConfig SpeculationConfig::FromJson(const Json& json, const std::string& what) {
  SpeculationConfig c;
  c.kind = Text(json, "kind", what);
  const auto kinds = SpeculationKinds();
  if (std::find(kinds.begin(), kinds.end(), c.kind) == kinds.end()) {
    Bad(what, "kind=" + c.kind.substr(0, 64) + ", did you mean " +
                  NearestName(c.kind.substr(0, 64), kinds) + "?");
  }
  const Json& g = Field(json, "geometry", what);
  c.geometry = {Int(g, "encoder_layers", what), Int(g, "decoder_layers", what),
                Int(g, "num_experts", what), Int(g, "experts_per_token", what),
                Int(g, "d_model", what)};
  c.vocab_size = Int(json, "vocab_size", what);
  c.hidden_width = Int(json, "hidden_width", what);
  c.width = Int(json, "width", what);
  c.heads = Int(json, "heads", what);
  c.ff = Int(json, "ff", what);
  c.layers = Int(json, "layers", what);
  c.context = Int(json, "context", what);
  c.neighbours = Int(json, "neighbours", what);
  c.priors = Flag(json, "priors", what);
  c.next_token = Flag(json, "next_token", what);
  c.dropout = Number(json, "dropout", what);
  if (const std::string problem = Problem(c); !problem.empty()) Bad(what, problem);
  return c;
}

SpeculationModel::~SpeculationModel() = default;

SpeculationOutput SpeculationModel::ForwardLast(const RoutingWindow& window) {
  const SpeculationOutput all = Forward(window, 0);
  const int64_t last = all.logits_BTHE.size(1) - 1;
  return {all.logits_BTHE.narrow(1, last, 1), all.confidence_BTH.narrow(1, last, 1), {}};
}

int NumLeadsOf(const MoeGeometry& geometry, Stack stack, int source_layer) {
  const int layers = geometry.layers(stack);
  if (source_layer < -1 || source_layer >= layers) {
    throw std::logic_error("no source layer " + std::to_string(source_layer) + " in a " +
                           StackName(stack) + " of " + std::to_string(layers));
  }
  return stack == Stack::kEncoder ? layers - 1 - source_layer : layers;
}

int SpeculationModel::NumLeads(Stack stack, int source_layer) const {
  return NumLeadsOf(config_.geometry, stack, source_layer);
}

void SpeculationModel::To(at::Device device) {
  for (const Parameters* part : {&parameters_, &constants_}) {
    for (const auto& [name, tensor] : part->items()) {
      at::Tensor handle = tensor;
      handle.set_data(tensor.detach().to(device));
    }
  }
}

std::vector<std::string> SpeculationKinds() {
  std::vector<std::string> names;
  for (const Kind& kind : kKinds) names.push_back(kind.name);
  return names;
}

std::unique_ptr<SpeculationModel> MakeSpeculationModel(const SpeculationConfig& config,
                                                       uint64_t seed) {
  const int kind = ParseChoice("--kind", config.kind, SpeculationKinds());
  if (const std::string problem = Problem(config); !problem.empty()) {
    throw UsageError(ErrorText("no speculation model has these sizes", problem, ""));
  }
  return kKinds[kind].make(config, seed);
}

SpeculationConfig DefaultSpeculationConfig(const std::string& kind,
                                           const MoeGeometry& geometry, int vocab_size,
                                           int hidden_width) {
  ParseChoice("--kind", kind, SpeculationKinds());
  const bool small = geometry.num_experts <= 32;
  SpeculationConfig c;
  c.kind = kind;
  c.geometry = geometry;
  c.context = 3;
  c.vocab_size = vocab_size;
  c.priors = PriorElements(c) <= kMostPriorElements;
  if (kind == "hidden") {
    c.hidden_width = hidden_width;
    c.width = small ? 128 : 256;
    c.heads = 4;
    c.ff = 2 * c.width;
    c.layers = 2;
    c.neighbours = 2;
    c.next_token = c.priors && geometry.decoder_layers > 0;
    return c;
  }
  c.dropout = 0.1;
  c.width = small ? 128 : 256;
  c.heads = small ? 4 : 8;
  c.ff = 4 * c.width;
  c.layers = small ? 2 : 4;
  return c;
}

double Calibration::Temperature(Stack stack, int source_layer, int lead) const {
  const auto it = temperatures.find({stack, source_layer, lead});
  return it == temperatures.end() ? 1.0 : it->second;
}

void Calibration::Set(Stack stack, int source_layer, int lead, double temperature) {
  if (!(temperature >= 1e-3 && temperature <= 1e3)) {
    throw std::logic_error("a temperature of " + std::to_string(temperature));
  }
  temperatures[{stack, source_layer, lead}] = temperature;
}

Json Calibration::ToJson() const {
  Json all = Json::array();
  for (const auto& [key, temperature] : temperatures) {
    const auto& [stack, source, lead] = key;
    all.push_back(Json{{"phase", StackName(stack)},
                       {"layer", source},
                       {"lead", lead},
                       {"temperature", temperature}});
  }
  return all;
}

Calibration Calibration::FromJson(const Json& json, const std::string& what) {
  if (!json.is_array()) Bad(what, "calibration is not a list");
  Calibration calibration;
  for (const Json& entry : json) {
    const std::string phase = Text(entry, "phase", what);
    if (phase != "encoder" && phase != "decoder")
      Bad(what, "phase=" + phase.substr(0, 64));
    const double temperature = Number(entry, "temperature", what);
    if (!(temperature >= 1e-3 && temperature <= 1e3)) {
      Bad(what, "temperature=" + std::to_string(temperature) + ", expected 1e-3..1e3");
    }
    calibration.Set(phase == "encoder" ? Stack::kEncoder : Stack::kDecoder,
                    Int(entry, "layer", what), Int(entry, "lead", what), temperature);
  }
  return calibration;
}

namespace {

// What the file of weights holds.
Parameters AllTensors(const SpeculationModel& model) {
  Parameters all;
  for (const Parameters* part : {&model.parameters(), &model.constants()}) {
    for (const auto& [name, tensor] : part->items()) all.Add(name, tensor);
  }
  return all;
}

}  // namespace

void SaveSpeculationModel(const fs::path& folder, const SpeculationModel& model,
                          const Calibration& calibration, const Json& extra) {
  MakeFolder(folder);
  const fs::path weights = folder / "model.safetensors";
  WriteParameters(weights, AllTensors(model), at::ScalarType::Undefined);
  const Json json{{"format", kFormat},
                  {"version", kVersion},
                  {"config", model.config().ToJson()},
                  {"calibration", calibration.ToJson()},
                  {"weights_hash", Hex64(Hash64(ReadFile(weights)))},
                  {"extra", extra}};
  WriteFileAtomic(folder / "config.json", json.dump(2) + "\n");
}

namespace {

// Every tensor of the model from the file, and nothing else in it.
void CopyWeights(const fs::path& file, SpeculationModel* model) {
  c10::NoGradGuard no_grad;
  const Parameters stored = ReadParameters(file, at::ScalarType::Undefined);
  const Parameters wanted = AllTensors(*model);
  if (stored.items().size() != wanted.items().size()) {
    Bad(file.string(), std::to_string(stored.items().size()) + " tensors, expected " +
                           std::to_string(wanted.items().size()));
  }
  for (const auto& [name, tensor] : wanted.items()) {
    const at::Tensor& value = stored.Get(name);
    if (value.sizes() != tensor.sizes() || value.scalar_type() != at::kFloat) {
      Bad(file.string(), "tensor " + name + " has another shape or type");
    }
    if (!at::isfinite(value).all().item<bool>()) {
      Bad(file.string(), "tensor " + name + " holds values that are not finite");
    }
    tensor.copy_(value);
  }
}

}  // namespace

SavedSpeculationModel LoadSpeculationModel(const fs::path& folder) {
  const fs::path file = folder / "config.json", weights = folder / "model.safetensors";
  const std::string what = file.string();
  const Json json = ParseJson(ReadFile(file, kMaxConfigBytes), what);
  if (Text(json, "format", what) != kFormat) {
    Bad(what, "format=" + Text(json, "format", what).substr(0, 64));
  }
  if (Int(json, "version", what) != kVersion) {
    Bad(what, "version=" + Field(json, "version", what).dump() + ", this build reads " +
                  std::to_string(kVersion));
  }
  SavedSpeculationModel saved;
  const auto config = SpeculationConfig::FromJson(Field(json, "config", what), what);
  saved.calibration = Calibration::FromJson(Field(json, "calibration", what), what);
  if (Hex64(Hash64(ReadFile(weights))) != Text(json, "weights_hash", what)) {
    Bad(weights.string(), "the weights are not those that config.json names");
  }
  saved.model = MakeSpeculationModel(config, 0);
  CopyWeights(weights, saved.model.get());
  return saved;
}

}  // namespace routecast
