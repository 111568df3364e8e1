#include "models/checkpoint.h"

#include <ATen/ATen.h>

#include <array>

#include "common/errors.h"
#include "common/foreign_text.h"

namespace routecast {
namespace {

constexpr char kShared[] = "shared.weight", kHead[] = "lm_head.weight";
// The names that transformers ties to shared.weight, in the order in which it looks for
// one that is there.
const std::array<std::string, 4> kEmbeddings = {kShared, "encoder.embed_tokens.weight",
                                                "decoder.embed_tokens.weight", kHead};
constexpr char kAdvice[] = "does config.json belong to these weights?";

bool IsRouter(const std::string& name) {
  return name.find(".mlp.router.") != std::string::npos;
}

// The reference decodes with the ids of generation_config.json where it says others.
// Returns whether it does; then they stand in `config`.
bool TakeGenerationIds(const fs::path& file, const Json& known, Json* config) {
  if (!fs::exists(file)) return false;
  const Json generation = ReadJsonFile(file);
  if (!generation.is_object()) {
    throw DataError(ErrorText(file.string() + " is not a JSON object", "",
                              "fetch it again, or remove it"));
  }
  bool other = false;
  for (const char* key : {"pad_token_id", "eos_token_id", "decoder_start_token_id"}) {
    const Json id = generation.value(key, Json());
    if (id.is_null() || id == known.at(key)) continue;
    (*config)[key] = id;
    other = true;
  }
  return other;
}

}  // namespace

CheckpointReader::CheckpointReader(const fs::path& folder)
    : folder_(folder), files_(folder) {
  const fs::path config = folder / "config.json";
  const fs::path generation = folder / "generation_config.json";
  config_json_ = ReadJsonFile(config);
  config_ = SwitchConfig::FromJson(config_json_, config.string());
  if (TakeGenerationIds(generation, config_.ToJson(), &config_json_)) {
    config_ = SwitchConfig::FromJson(config_json_, generation.string());
  }
  for (const WeightEntry& entry : files_.tensors()) entries_[entry.name] = &entry;
  ResolveEmbeddings();
  Check();
}

// Not tied: each stack has its own; one that equals shared.weight need not be kept twice.
void CheckpointReader::ResolveEmbeddings() {
  if (config_.tie_word_embeddings) return ResolveTied();
  const auto shared = entries_.find(kShared);
  if (shared == entries_.end()) return;
  for (const std::string& name : kEmbeddings) {
    const auto it = entries_.find(name);
    if (name == kShared || name == kHead || it == entries_.end()) continue;
    if (files_.SameBytes(*shared->second, *it->second)) entries_.erase(it);
  }
}

// One tensor under up to four names; files may hold any of them.
void CheckpointReader::ResolveTied() {
  const WeightEntry* first = nullptr;
  for (const std::string& name : kEmbeddings) {
    const auto it = entries_.find(name);
    if (it == entries_.end()) continue;
    const WeightEntry* entry = it->second;
    entries_.erase(it);
    if (first == nullptr) first = entry;
    if (files_.SameBytes(*first, *entry)) continue;
    throw DataError(ErrorText(files_.FileOf(*entry).string() + ": " +
                                  Quoted(first->name) + " and " + Quoted(name) +
                                  " differ",
                              "config.json ties them: tie_word_embeddings is true",
                              "use the config.json that belongs to these weights"));
  }
  if (first != nullptr) entries_[kShared] = first;
}

void CheckpointReader::Check() const {
  // Before the list of names is made: config.json may ask for any number of experts.
  const auto wanted = 2 * static_cast<size_t>(config_.geometry().num_keys());
  if (wanted > entries_.size()) {
    throw DataError(ErrorText(files_.source().string() + " lacks experts",
                              "config.json asks for " + std::to_string(wanted) +
                                  " of their tensors, all in all there are " +
                                  std::to_string(entries_.size()),
                              kAdvice));
  }
  std::map<std::string, std::vector<int64_t>> shapes;
  for (auto& [name, shape] : ParameterShapes(config_)) shapes[name] = std::move(shape);
  std::vector<std::string> missing, misshaped, unexpected;
  for (const auto& [name, shape] : shapes) {
    if (entries_.count(name) == 0) missing.push_back(name);
  }
  for (const std::string& name : kEmbeddings) shapes.emplace(name, shapes[kShared]);
  for (const auto& [name, entry] : entries_) {
    const auto it = shapes.find(name);
    if (it == shapes.end()) {
      unexpected.push_back(name);
    } else if (it->second != entry->shape) {
      misshaped.push_back(name);
    }
    CheckType(name, *entry);
  }
  if (!misshaped.empty()) {
    Refuse(misshaped, "has the wrong shape", ShapeText(shapes[misshaped[0]]));
  }
  if (!missing.empty()) Refuse(missing, "is missing", ShapeText(shapes[missing[0]]));
  if (!unexpected.empty()) Refuse(unexpected, "is unexpected", "none");
}

void CheckpointReader::CheckType(const std::string& name,
                                 const WeightEntry& entry) const {
  if (entry.dtype[0] == 'F' || entry.dtype == "BF16") return;
  throw DataError(ErrorText(
      files_.FileOf(entry).string() + ": tensor " + Quoted(name) + " holds no weights",
      "found dtype " + entry.dtype + ", weights are F32, BF16, F16 or F64", kAdvice));
}

// `names` is not empty; the first is told, with its file and both shapes.
void CheckpointReader::Refuse(const std::vector<std::string>& names,
                              const std::string& rule, const std::string& wanted) const {
  const auto it = entries_.find(names[0]);
  const bool there = it != entries_.end();
  const fs::path& file = there ? files_.FileOf(*it->second) : files_.source();
  const std::string more =
      names.size() > 1 ? " (and " + std::to_string(names.size() - 1) + " more)" : "";
  throw DataError(
      ErrorText(file.string() + ": tensor " + Quoted(names[0]) + " " + rule + more,
                "found " + (there ? ShapeText(it->second->shape) : std::string("none")) +
                    ", config.json asks for " + wanted,
                kAdvice));
}

std::string CheckpointReader::Fingerprint() const {
  return Hex64(files_.Hash(Hash64(config_json_.dump())));
}

at::Tensor CheckpointReader::Read(const std::string& parameter,
                                  at::ScalarType dtype) const {
  const auto it = entries_.find(parameter);
  if (it == entries_.end()) throw std::logic_error("no such parameter: " + parameter);
  const WeightEntry& entry = *it->second;
  const bool keep = IsRouter(parameter) && entry.dtype == "F32";
  return ReadTensor(files_.Open(entry), entry, keep ? at::kFloat : dtype);
}

ExpertWeights CheckpointReader::ReadExpert(ExpertKey key, at::ScalarType dtype) const {
  const auto read = [&](const char* tensor) {
    return Read(ExpertTensorName(config_, key, tensor), dtype);
  };
  if (config_.is_gated_act) return {read("wi_0"), read("wo"), read("wi_1")};
  return {read("wi"), read("wo"), {}};
}

std::vector<std::string> CheckpointReader::names() const {
  std::map<const WeightEntry*, std::string> by_place;  // entries lie in one vector
  for (const auto& [name, entry] : entries_) by_place[entry] = name;
  std::vector<std::string> names;
  for (const auto& [entry, name] : by_place) names.push_back(name);
  return names;
}

Checkpoint LoadCheckpoint(const fs::path& folder, at::ScalarType dtype, at::Device device,
                          ExpertLoading experts) {
  const CheckpointReader reader(folder);
  Checkpoint checkpoint;
  checkpoint.config = reader.config();
  checkpoint.fingerprint = reader.Fingerprint();
  const bool stacks =
      experts == ExpertLoading::kStack ||
      (experts == ExpertLoading::kLoad && HasGroupedProducts(device, dtype));
  ExpertStacker stacker(checkpoint.config.num_experts);
  for (const std::string& name : reader.names()) {
    const bool expert = IsExpertTensor(name);
    if (experts == ExpertLoading::kLeaveOut && expert) continue;
    const at::Tensor weight = reader.Read(name, dtype);
    checkpoint.parameters.Add(
        name, stacks && expert ? stacker.Place(name, weight, device) : weight.to(device));
  }
  return checkpoint;
}

WeightSizes SizesOfWeights(const SwitchConfig& config, at::ScalarType dtype) {
  WeightSizes sizes;
  for (const auto& [name, shape] : ParameterShapes(config)) {
    uint64_t bytes = c10::elementSize(dtype);
    for (const int64_t size : shape) bytes *= static_cast<uint64_t>(size);
    (IsExpertTensor(name) ? sizes.experts : sizes.dense) += bytes;
  }
  return sizes;
}

Checkpoint LoadRouters(const fs::path& folder) {
  const CheckpointReader reader(folder);
  Checkpoint checkpoint{reader.config(), {}, ""};
  for (const std::string& name : reader.names()) {
    if (!IsRouter(name) && !name.ends_with(".layer_norm.weight")) continue;
    checkpoint.parameters.Add(name, reader.Read(name, at::kFloat));
  }
  return checkpoint;
}

void SaveCheckpoint(const fs::path& folder, const SwitchConfig& config,
                    const Parameters& parameters, at::ScalarType dtype,
                    uint64_t max_shard_bytes) {
  Parameters all = parameters;
  if (!config.tie_word_embeddings) {  // transformers 5 keeps one embedding a stack there
    for (const char* name :
         {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight"}) {
      if (!all.Has(name)) all.Add(name, parameters.Get(kShared));
    }
  }
  std::vector<TensorHeader> headers;
  for (const auto& [name, tensor] : all.items()) {
    headers.push_back({name, DtypeName(StoredType(tensor, dtype)), tensor.sizes().vec()});
  }
  CheckpointWriter writer(folder, headers, max_shard_bytes);
  for (const auto& [name, tensor] : all.items()) {
    const at::Tensor t = ToStore(tensor, dtype);
    writer.Append(t.const_data_ptr(), t.nbytes());
  }
  writer.Finish(config, dtype);
}

at::Tensor VocabularyHeadOf(const SwitchConfig& config, const Parameters& parameters) {
  const bool tied = config.tie_word_embeddings;
  const at::Tensor head =
      parameters.Get(tied ? kShared : kHead).to(at::kCPU, at::kFloat).contiguous();
  return tied ? head * std::pow(static_cast<double>(config.d_model), -0.5) : head;
}

std::vector<RouterWeights> RoutersOf(const SwitchConfig& config,
                                     const Parameters& parameters) {
  std::vector<RouterWeights> routers;
  for (Stack stack : {Stack::kEncoder, Stack::kDecoder}) {
    for (int i = 0; i < config.blocks(stack); ++i) {
      if (!config.IsSparse(stack, i)) continue;
      const std::string ff = std::string(StackName(stack)) + ".block." +
                             std::to_string(i) + ".layer." +
                             (stack == Stack::kEncoder ? "1." : "2.");
      const auto fp32 = [&](const std::string& name) {
        return parameters.Get(name).detach().to(at::kCPU, at::kFloat).contiguous();
      };
      RouterWeights router{
          fp32(ff + "mlp.router.classifier.weight"), {}, fp32(ff + "layer_norm.weight")};
      if (config.router_bias) router.bias_E = fp32(ff + "mlp.router.classifier.bias");
      routers.push_back(std::move(router));
    }
  }
  return routers;
}

std::vector<RouterWeights> ReadRouters(const fs::path& file,
                                       const MoeGeometry& geometry) {
  const Parameters stored = ReadParameters(file, at::kFloat);
  std::vector<RouterWeights> routers;
  for (int l = 0; l < geometry.num_layers(); ++l) {
    const std::string prefix = "layer." + std::to_string(l) + ".";
    RouterWeights r;
    r.weight_ED = stored.Get(prefix + "weight");
    if (stored.Has(prefix + "bias")) r.bias_E = stored.Get(prefix + "bias");
    r.norm_gain_D = stored.Get(prefix + "norm_gain");
    const auto check = [&](const char* name, const at::Tensor& tensor,
                           const std::vector<int64_t>& shape) {
      if (!tensor.defined() || tensor.sizes() == at::IntArrayRef(shape)) return;
      throw DataError(ErrorText(
          file.string() + ": " + prefix + name + " has another shape",
          "found " + ShapeText(tensor.sizes().vec()) + ", expected " + ShapeText(shape),
          "collect the store again"));
    };
    check("weight", r.weight_ED, {geometry.num_experts, geometry.d_model});
    check("bias", r.bias_E, {geometry.num_experts});
    check("norm_gain", r.norm_gain_D, {geometry.d_model});
    routers.push_back(r);
  }
  return routers;
}

ResidentModel::ResidentModel(Checkpoint checkpoint, Grouping grouping)
    : checkpoint_(std::move(checkpoint)) {
  source_ = std::make_unique<ResidentExpertSource>(
      checkpoint_.config.geometry(),
      ExpertWeightsOf(checkpoint_.config, checkpoint_.parameters), grouping);
  executor_ =
      std::make_unique<LocalExpertExecutor>(source_.get(), checkpoint_.config.activation);
  model_ = std::make_unique<SwitchModel>(checkpoint_.config, checkpoint_.parameters,
                                         executor_.get());
}

}  // namespace routecast
