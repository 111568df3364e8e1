#include "evaluator/expert_store.h"

#include <ATen/ATen.h>

#include <cstdio>
#include <cstdlib>

#include "common/errors.h"
#include "common/progress.h"
#include "common/stop.h"

namespace routecast {
namespace {

std::span<const std::byte> Bytes(const at::Tensor& tensor) {
  return {static_cast<const std::byte*>(tensor.data_ptr()), tensor.nbytes()};
}

// Of a file's name.
const char* TypeSuffix(ExpertDtype dtype) {
  constexpr const char* kTypes[] = {"-fp32", "-bf16", "-fp16"};
  return kTypes[static_cast<uint32_t>(dtype)];
}

}  // namespace

fs::path ExpertCacheFolder(const std::string& flag) {
  if (!flag.empty()) return flag;
  if (const char* folder = std::getenv("ROUTECAST_CACHE"))
    return fs::path(folder) / "experts";
  if (const char* folder = std::getenv("XDG_CACHE_HOME")) {
    return fs::path(folder) / "routecast/experts";
  }
  const char* home = std::getenv("HOME");
  return fs::path(home ? home : ".") / ".cache/routecast/experts";
}

ExpertDtype ExpertDtypeOf(at::ScalarType dtype) {
  if (dtype == at::kFloat) return ExpertDtype::kFloat32;
  return dtype == at::kBFloat16 ? ExpertDtype::kBfloat16 : ExpertDtype::kFloat16;
}

ExpertFileSpec SpecOfCheckpoint(const SwitchConfig& config, at::ScalarType dtype) {
  if (config.is_gated_act) {
    throw UsageError(ErrorText("experts with a gate cannot be moved one by one",
                               "the model's config.json: is_gated_act=true",
                               "use a checkpoint whose experts have wi and wo alone"));
  }
  ExpertFileSpec spec;
  spec.geometry = config.geometry();
  spec.geometry.experts_per_token = 1;
  spec.d_ff = config.d_ff;
  spec.dtype = ExpertDtypeOf(dtype);
  return spec;
}

std::shared_ptr<const ExpertFile> ExpertsOfCheckpoint(const fs::path& cache_folder,
                                                      const fs::path& checkpoint,
                                                      const SwitchConfig& config,
                                                      const std::string& fingerprint,
                                                      at::ScalarType dtype, bool quiet) {
  ExpertFileSpec spec = SpecOfCheckpoint(config, dtype);
  spec.content_id = Hash64(fingerprint);
  MakeFolder(cache_folder);
  const fs::path path = cache_folder / ("checkpoint-" + Hex64(spec.content_id) +
                                        TypeSuffix(spec.dtype) + ".experts");
  const int count = spec.geometry.num_keys();
  if (auto file = OpenIfGood(path, spec, count)) return file;
  ExpertFileWriter writer(path, spec);
  const CheckpointReader reader(checkpoint);
  Progress progress("experts to disk", "experts", static_cast<uint64_t>(count), quiet);
  for (int i = 0; i < count; ++i) {
    ThrowIfStopped("while writing experts");
    const ExpertKey key = ExpertKey::FromIndex(i, spec.geometry);
    const ExpertWeights weights = reader.ReadExpert(key, dtype);
    writer.Append(key, Bytes(weights.wi_FD.contiguous()),
                  Bytes(weights.wo_DF.contiguous()));
    progress.Update(static_cast<uint64_t>(i) + 1);
  }
  writer.Finish();
  progress.Finish();
  return std::make_shared<const ExpertFile>(path);
}

std::shared_ptr<const ExpertFile> SyntheticExperts(const fs::path& cache_folder,
                                                   const MoeGeometry& geometry, int d_ff,
                                                   uint64_t seed, bool encoder,
                                                   bool decoder, at::ScalarType dtype,
                                                   bool quiet) {
  ExpertFileSpec spec;
  spec.dtype = ExpertDtypeOf(dtype);
  spec.geometry = geometry;
  spec.geometry.experts_per_token = 1;
  spec.d_ff = d_ff;
  spec.content_id = seed;
  std::vector<int> layers;
  for (int layer = 0; layer < geometry.num_layers(); ++layer) {
    if (geometry.StackOf(layer) == Stack::kEncoder ? encoder : decoder)
      layers.push_back(layer);
  }
  MakeFolder(cache_folder);
  const std::string name =
      "synthetic-" + std::to_string(geometry.encoder_layers) + "+" +
      std::to_string(geometry.decoder_layers) + "x" +
      std::to_string(geometry.num_experts) + "-" + std::to_string(geometry.d_model) +
      "x" + std::to_string(d_ff) + "-" + (encoder ? "e" : "") + (decoder ? "d" : "") +
      "-" + std::to_string(seed) + (dtype == at::kFloat ? "" : TypeSuffix(spec.dtype)) +
      ".experts";
  const fs::path path = cache_folder / name;
  const int count = static_cast<int>(layers.size()) * geometry.num_experts;
  if (auto file = OpenIfGood(path, spec, count)) return file;
  WriteSyntheticExperts(path, spec, layers, quiet);
  return std::make_shared<const ExpertFile>(path);
}

}  // namespace routecast
