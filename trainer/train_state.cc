#include "trainer/train_state.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <cstdio>

#include "common/errors.h"

namespace routecast {
namespace {

constexpr size_t kKept = 2;
constexpr char kPrefix[] = "step-";

fs::path StepFolder(const fs::path& folder, int64_t step) {
  char name[32];
  std::snprintf(name, sizeof name, "%s%08lld", kPrefix, static_cast<long long>(step));
  return folder / name;
}

// Whole checkpoints by name (so by step), oldest first.
std::vector<fs::path> Checkpoints(const fs::path& folder) {
  std::vector<fs::path> found;
  if (!fs::is_directory(folder)) return found;
  for (const auto& entry : fs::directory_iterator(folder)) {
    const std::string name = entry.path().filename().string();
    if (name.rfind(kPrefix, 0) == 0 && entry.path().extension() != ".tmp") {
      found.push_back(entry.path());
    }
  }
  std::sort(found.begin(), found.end());
  return found;
}

}  // namespace

void SaveTrainState(const fs::path& folder, const TrainState& state,
                    const Parameters& parameters, const AdamW& optimizer) {
  MakeFolder(folder);
  SealedFolder sealed(StepFolder(folder, state.step));
  WriteParameters(sealed.path() / "parameters.safetensors", parameters,
                  at::ScalarType::Undefined);
  WriteParameters(sealed.path() / "optimizer.safetensors", optimizer.State(),
                  at::ScalarType::Undefined);
  const Json json = {{"step", state.step},
                     {"configuration", state.configuration},
                     {"extra", state.extra}};
  WriteFileAtomic(sealed.path() / "state.json", json.dump(2) + "\n");
  sealed.Commit();
  std::vector<fs::path> all = Checkpoints(folder);
  for (size_t i = 0; i + kKept < all.size(); ++i) fs::remove_all(all[i]);
}

std::optional<TrainState> FindTrainState(const fs::path& folder) {
  const std::vector<fs::path> all = Checkpoints(folder);
  if (all.empty()) return std::nullopt;
  const fs::path file = all.back() / "state.json";
  const Json json = ReadJsonFile(file);
  if (!json.is_object() || !json.contains("step") || !json["step"].is_number_integer() ||
      !json.contains("configuration") || !json.contains("extra")) {
    throw DataError(ErrorText(file.string() + " is not a training state", "",
                              "remove that folder to go on from an older one"));
  }
  return TrainState{json["step"].get<int64_t>(), json["configuration"], json["extra"]};
}

void LoadTrainState(const fs::path& folder, int64_t step, const Parameters& parameters,
                    AdamW* optimizer) {
  const c10::NoGradGuard no_grad;
  const fs::path from = StepFolder(folder, step);
  const Parameters stored =
      ReadParameters(from / "parameters.safetensors", at::ScalarType::Undefined);
  for (const auto& [name, tensor] : parameters.items()) tensor.copy_(stored.Get(name));
  optimizer->Load(
      ReadParameters(from / "optimizer.safetensors", at::ScalarType::Undefined));
}

void CheckSameConfiguration(const Json& stored, const Json& current,
                            const fs::path& folder) {
  for (const auto& [key, value] : current.items()) {
    if (!stored.contains(key) || stored[key] != value) {
      throw UsageError(ErrorText(
          folder.string() + " holds an unfinished run of another configuration: " + key,
          "there " + (stored.contains(key) ? stored[key].dump() : "absent") + ", now " +
              value.dump(),
          "use the same flags, another --out, or --resume=never"));
    }
  }
}

}  // namespace routecast
