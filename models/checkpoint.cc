#include "models/checkpoint.h"

#include <ATen/ATen.h>

#include "common/errors.h"
#include "common/safetensors.h"

namespace routecast {
namespace {

fs::path WeightsFile(const fs::path& folder) {
  const fs::path file = folder / "model.safetensors";
  if (!fs::is_directory(folder)) {
    throw UsageError(ErrorText("--model=" + folder.string() + " is not a folder", "",
                               "give a folder with config.json and model.safetensors"));
  }
  if (!fs::exists(file)) {
    throw UsageError(ErrorText(folder.string() + " has no model.safetensors", "",
                               "give a Hugging Face folder with config.json and "
                               "model.safetensors"));
  }
  return file;
}

}  // namespace

Checkpoint LoadCheckpoint(const fs::path& folder, at::ScalarType dtype, at::Device device,
                          ExpertLoading experts) {
  const fs::path file = WeightsFile(folder);
  Checkpoint checkpoint;
  const Json config = ReadJsonFile(folder / "config.json");
  checkpoint.config = SwitchConfig::FromJson(config, (folder / "config.json").string());
  const std::string weights = ReadFile(file, uint64_t{1} << 40);
  checkpoint.fingerprint = Hex64(Hash64(weights, Hash64(config.dump())));
  const Parameters read = ReadParameters(file, dtype, [&](const std::string& name) {
    return experts == ExpertLoading::kLoad || !IsExpertTensor(name);
  });
  for (const auto& [name, tensor] : read.items()) {
    checkpoint.parameters.Add(name, tensor.to(device));
  }
  return checkpoint;
}

void SaveCheckpoint(const fs::path& folder, const SwitchConfig& config,
                    const Parameters& parameters, at::ScalarType dtype) {
  Json json = config.ToJson();
  json["dtype"] = dtype == at::kBFloat16 ? "bfloat16"
                  : dtype == at::kHalf   ? "float16"
                                         : "float32";
  WriteFileAtomic(folder / "config.json", json.dump(2) + "\n");
  const Json generation = {{"pad_token_id", config.pad_token_id},
                           {"eos_token_id", config.eos_token_id},
                           {"decoder_start_token_id", config.decoder_start_token_id}};
  WriteFileAtomic(folder / "generation_config.json", generation.dump(2) + "\n");
  Parameters all = parameters;
  if (!config.tie_word_embeddings) {  // transformers 5 keeps one embedding a stack there
    for (const char* name :
         {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight"}) {
      if (!all.Has(name)) all.Add(name, parameters.Get("shared.weight"));
    }
  }
  WriteParameters(folder / "model.safetensors", all, dtype, {{"format", "pt"}});
}

ExpertWeights LoadExpert(const fs::path& folder, const SwitchConfig& config,
                         ExpertKey key, at::ScalarType dtype) {
  const bool gated = config.is_gated_act;
  const std::string wi = ExpertTensorName(config, key, gated ? "wi_0" : "wi");
  const std::string wo = ExpertTensorName(config, key, "wo");
  const std::string gate = gated ? ExpertTensorName(config, key, "wi_1") : wi;
  const Parameters both = ReadParameters(
      WeightsFile(folder), dtype,
      [&](const std::string& n) { return n == wi || n == wo || n == gate; });
  return {both.Get(wi), both.Get(wo), gated ? both.Get(gate) : at::Tensor()};
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

ResidentModel::ResidentModel(Checkpoint checkpoint) : checkpoint_(std::move(checkpoint)) {
  source_ = std::make_unique<ResidentExpertSource>(
      checkpoint_.config.geometry(),
      ExpertWeightsOf(checkpoint_.config, checkpoint_.parameters));
  executor_ =
      std::make_unique<LocalExpertExecutor>(source_.get(), checkpoint_.config.activation);
  model_ = std::make_unique<SwitchModel>(checkpoint_.config, checkpoint_.parameters,
                                         executor_.get());
}

}  // namespace routecast
