#include "trainer/train_state.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <set>

#include "common/byte_file.h"
#include "common/errors.h"

namespace routecast {
namespace {

constexpr char kPrefix[] = "step-";
constexpr char kTemporary[] = ".tmp";
constexpr char kStateFile[] = "state.json", kChecksum[] = "checksum";
constexpr char kParametersFile[] = "parameters.safetensors";
constexpr char kOptimizerFile[] = "optimizer.safetensors";

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
    if (name.rfind(kPrefix, 0) == 0 && entry.path().extension() != kTemporary) {
      found.push_back(entry.path());
    }
  }
  std::sort(found.begin(), found.end());
  return found;
}

void RemoveAll(const fs::path& path) {
  std::error_code error;
  fs::remove_all(path, error);
  if (error) ThrowErrno(error.value(), "remove", path);
}

// Under another name first: what a kill leaves of it is not taken for the whole.
void RemoveWhole(const fs::path& path) {
  const fs::path leaving = path.string() + kTemporary;
  RemoveAll(leaving);
  std::error_code error;
  fs::rename(path, leaving, error);
  if (error == std::errc::no_such_file_or_directory) return;
  if (error) ThrowErrno(error.value(), "rename", path);
  RemoveAll(leaving);
}

void RemoveOrphans(const fs::path& folder) {
  std::vector<fs::path> orphans;
  for (const auto& entry : fs::directory_iterator(folder)) {
    if (entry.path().extension() == kTemporary) orphans.push_back(entry.path());
  }
  for (const fs::path& path : orphans) RemoveAll(path);
}

int64_t StepOf(const fs::path& checkpoint) {
  const std::string digits = checkpoint.filename().string().substr(sizeof kPrefix - 1);
  return std::strtoll(digits.c_str(), nullptr, 10);
}

// Of everything but itself.
std::string ChecksumOf(Json state) {
  state.erase(kChecksum);
  return Hex64(Hash64(state.dump()));
}

// What is wrong with a file that a checkpoint needs.
struct Damage {
  fs::path file;
  std::string why;
};

std::optional<Damage> ReadState(const fs::path& checkpoint, Json* state) {
  const fs::path file = checkpoint / kStateFile;
  if (!fs::exists(file)) return Damage{file, "it is not there"};
  try {
    *state = ReadJsonFile(file);
  } catch (const DataError&) {
    return Damage{file, "it is not JSON"};
  }
  if (!state->is_object() || !state->contains(kChecksum) ||
      (*state)[kChecksum] != ChecksumOf(*state)) {
    return Damage{file, "its checksum does not hold"};
  }
  return std::nullopt;
}

// The same of every file that the checkpoint needs.
std::optional<Damage> ReadWhole(const fs::path& checkpoint, Json* state) {
  if (const auto damage = ReadState(checkpoint, state)) return damage;
  for (const auto& [name, checksum] : state->at("files").items()) {
    const fs::path file = (checkpoint / name).lexically_normal();
    if (!fs::exists(file)) return Damage{file, "it is not there"};
    if (checksum != Hex64(HashFile(file))) {
      return Damage{file, "its checksum does not hold"};
    }
  }
  return std::nullopt;
}

// Of checkpoints, oldest first: how many of the newest ones are damaged.
size_t NumDamaged(const std::vector<fs::path>& all) {
  Json state;
  size_t damaged = 0;
  while (damaged < all.size() && ReadWhole(all[all.size() - 1 - damaged], &state)) {
    ++damaged;
  }
  return damaged;
}

[[noreturn]] void Refuse(const std::vector<fs::path>& all, const Damage& damage) {
  const size_t damaged = NumDamaged(all);
  const bool none = damaged == all.size();
  throw DataError(ErrorText(
      damage.file.string() + " is damaged: " + damage.why,
      none ? "checkpoints that are whole: none"
           : "the last good checkpoint is that of step " +
                 std::to_string(StepOf(all[all.size() - 1 - damaged])),
      none ? std::string("start anew with --resume=never")
           : "--resume=last_good removes what is damaged and goes on from there; "
             "--resume=never starts anew"));
}

}  // namespace

void SaveTrainState(const fs::path& folder, const TrainState& state,
                    const Parameters& parameters, const AdamW& optimizer, int keep) {
  MakeFolder(folder);
  RemoveOrphans(folder);
  SealedFolder sealed(StepFolder(folder, state.step));
  Json files;  // by path from the checkpoint
  const auto write = [&](const char* name, const Parameters& tensors) {
    WriteParameters(sealed.path() / name, tensors, at::ScalarType::Undefined);
    files[name] = Hex64(HashFile(sealed.path() / name));
  };
  write(kParametersFile, parameters);
  write(kOptimizerFile, optimizer.State());
  for (const std::string& name : state.beside) {
    files["../" + name] = Hex64(HashFile(folder / name));
  }
  Json json = {{"step", state.step},
               {"configuration", state.configuration},
               {"extra", state.extra},
               {"beside", state.beside},
               {"files", files}};
  json[kChecksum] = ChecksumOf(json);
  WriteFileAtomic(sealed.path() / kStateFile, json.dump(2) + "\n");
  sealed.Commit();
  std::vector<fs::path> all = Checkpoints(folder);
  const auto kept = static_cast<size_t>(keep);
  for (size_t i = 0; i + kept < all.size(); ++i) RemoveWhole(all[i]);
}

void RemoveUnnamed(const fs::path& folder) {
  std::set<std::string> named;
  for (const fs::path& checkpoint : Checkpoints(folder)) {
    Json state;
    if (ReadState(checkpoint, &state)) return;
    for (const Json& name : state.at("beside")) named.insert(name);
  }
  std::vector<fs::path> unnamed;
  for (const auto& entry : fs::directory_iterator(folder)) {
    const fs::path& p = entry.path();
    if (p.extension() == ".safetensors" && !named.contains(p.filename().string())) {
      unnamed.push_back(p);
    }
  }
  for (const fs::path& path : unnamed) RemoveAll(path);
}

std::optional<TrainState> FindTrainState(const fs::path& folder) {
  const std::vector<fs::path> all = Checkpoints(folder);
  if (all.empty()) return std::nullopt;
  Json json;
  if (const auto damage = ReadWhole(all.back(), &json)) Refuse(all, *damage);
  return TrainState{json.at("step"), json.at("configuration"), json.at("extra"),
                    json.at("beside")};
}

std::optional<int64_t> NewestStep(const fs::path& folder) {
  const std::vector<fs::path> all = Checkpoints(folder);
  if (all.empty()) return std::nullopt;
  return StepOf(all.back());
}

void RemoveTrainStates(const fs::path& folder) { RemoveWhole(folder); }

void RemoveDamagedStates(const fs::path& folder) {
  const std::vector<fs::path> all = Checkpoints(folder);
  const size_t damaged = NumDamaged(all);
  if (damaged == all.size()) return;
  for (size_t i = all.size(); i > all.size() - damaged; --i) {
    RemoveWhole(all[i - 1]);
    std::fprintf(stderr, "removed %s, which was damaged\n", all[i - 1].c_str());
  }
}

void LoadTrainState(const fs::path& folder, int64_t step, const Parameters& parameters,
                    AdamW* optimizer) {
  const c10::NoGradGuard no_grad;
  const fs::path from = StepFolder(folder, step);
  const Parameters stored =
      ReadParameters(from / kParametersFile, at::ScalarType::Undefined);
  for (const auto& [name, tensor] : parameters.items()) tensor.copy_(stored.Get(name));
  optimizer->Load(ReadParameters(from / kOptimizerFile, at::ScalarType::Undefined));
}

namespace {

// `where` names the place of both in the whole configuration.
void CheckSame(const Json& stored, const Json& current, const std::string& where,
               const fs::path& folder) {
  const auto text = [](const Json& json, const std::string& key) {
    constexpr size_t kMost = 80;
    const std::string all = json.contains(key) ? json[key].dump() : "absent";
    return all.size() <= kMost ? all : all.substr(0, kMost) + " ..";
  };
  Json all = current;
  all.update(stored);  // what is not said any more is another configuration, too
  for (const auto& [key, unused] : all.items()) {
    const std::string name = where + key;
    const bool both = stored.contains(key) && current.contains(key);
    if (both && stored[key] == current[key]) continue;
    if (both && stored[key].is_object() && current[key].is_object()) {
      // A short line, not all of it.
      CheckSame(stored[key], current[key], name + ".", folder);
    }
    throw UsageError(ErrorText(
        folder.string() + " holds an unfinished run of another configuration: " + name,
        "there " + text(stored, key) + ", now " + text(current, key),
        "use the same flags, another --out, or --resume=never"));
  }
}

}  // namespace

void CheckSameConfiguration(const Json& stored, const Json& current,
                            const fs::path& folder) {
  CheckSame(stored, current, "", folder);
}

}  // namespace routecast
