#include "models/speculation_model.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include <algorithm>

#include "common/errors.h"
#include "models/speculation_json.h"

namespace routecast {
namespace {

constexpr double kMostPriorElements = 8e6;  // by default: 32 MB beside the weights
constexpr int kVersion = 3;
constexpr const char* kFormat = "routecast-speculation";
constexpr uint64_t kMaxConfigBytes = 16 << 20;

}  // namespace

SpeculationModel::~SpeculationModel() = default;

SpeculationOutput SpeculationModel::ForwardLast(const RoutingWindow& window) {
  const SpeculationOutput all = Forward(window, 0);
  const int64_t last = all.logits_BTHE.size(1) - 1;
  SpeculationOutput newest{
      all.logits_BTHE.narrow(1, last, 1), all.confidence_BTH.narrow(1, last, 1), {}};
  if (all.later_BTLE.defined()) newest.later_BTLE = all.later_BTLE.narrow(1, last, 1);
  return newest;
}

std::vector<SpeculationOutput> SpeculationModel::ForwardMembers(
    const RoutingWindow& window, uint64_t dropout_key) {
  return {Forward(window, dropout_key)};
}

std::vector<std::vector<ParameterSlice>> SpeculationModel::MemberParameters() const {
  return {SlicesOf(parameters_)};
}

SpeculationOutput SpeculationModel::NoOutput(const RoutingWindow& window) const {
  const int64_t B = window.token_ids_BT.size(0), T = window.token_ids_BT.size(1);
  const int64_t H = NumLeads(window.stack, window.source_layer);
  const auto options = window.token_ids_BT.options().dtype(at::kFloat);
  return {at::zeros({B, T, H, config_.geometry.num_experts}, options),
          at::zeros({B, T, H}, options)};
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

void RequirePossible(const SpeculationConfig& config) {
  ParseChoice("--kind", config.kind, SpeculationKinds());
  if (const std::string problem = ProblemOf(config); !problem.empty()) {
    throw UsageError(ErrorText("no speculation model has these sizes", problem, ""));
  }
}

std::unique_ptr<SpeculationModel> MakeSpeculationModel(const SpeculationConfig& config,
                                                       uint64_t seed) {
  RequirePossible(config);
  return KindOf(config.kind).make(config, {seed});
}

SpeculationConfig DefaultSpeculationConfig(const std::string& kind,
                                           const MoeGeometry& geometry, int vocab_size,
                                           int hidden_width) {
  ParseChoice("--kind", kind, SpeculationKinds());
  SpeculationConfig c;
  c.kind = kind;
  c.geometry = geometry;
  c.context = 3;
  c.vocab_size = vocab_size;
  if (KindOf(kind).router_inputs != RouterInputs::kNever) c.hidden_width = hidden_width;
  c.priors = PriorElements(c) > 0 && PriorElements(c) <= kMostPriorElements;
  KindOf(kind).sizes(&c);
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
  if (!json.is_array()) SpeculationJson(json, what).Bad("calibration is not a list");
  Calibration calibration;
  for (const Json& item : json) {
    const SpeculationJson entry(item, what);
    const std::string phase = entry.Text("phase");
    if (phase != "encoder" && phase != "decoder") {
      entry.Bad("phase=" + phase.substr(0, 64));
    }
    const double temperature = entry.Number("temperature");
    if (!(temperature >= 1e-3 && temperature <= 1e3)) {
      entry.Bad("temperature=" + std::to_string(temperature) + ", expected 1e-3..1e3");
    }
    calibration.Set(phase == "encoder" ? Stack::kEncoder : Stack::kDecoder,
                    entry.Int("layer"), entry.Int("lead"), temperature);
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

[[noreturn]] void Bad(const std::string& what, const std::string& values) {
  SpeculationJson(Json(), what).Bad(values);
}

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
  const SpeculationJson in(json, what);
  if (in.Text("format") != kFormat) in.Bad("format=" + in.Text("format").substr(0, 64));
  if (in.Int("version") != kVersion) {
    in.Bad("version=" + in.Field("version").dump() + ", this build reads " +
           std::to_string(kVersion));
  }
  SavedSpeculationModel saved;
  const auto config = SpeculationConfig::FromJson(in.Field("config"), what);
  saved.calibration = Calibration::FromJson(in.Field("calibration"), what);
  if (Hex64(Hash64(ReadFile(weights))) != in.Text("weights_hash")) {
    Bad(weights.string(), "the weights are not those that config.json names");
  }
  saved.model = MakeSpeculationModel(config, 0);
  CopyWeights(weights, saved.model.get());
  return saved;
}

}  // namespace routecast
