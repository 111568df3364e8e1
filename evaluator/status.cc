#include "evaluator/status.h"

#include <ATen/Context.h>
#include <sys/sysinfo.h>
#include <torch/version.h>

#include <algorithm>
#include <chrono>
#include <ctime>
#include <thread>

#include "common/errors.h"
#include "models/device_choice.h"
#include "report/table.h"

namespace routecast {
namespace {

constexpr uint64_t kMaxJson = 16 << 20;

std::string Text(const Json& json, const char* key) {
  return json.is_object() && json.contains(key) && json[key].is_string()
             ? json[key].get<std::string>().substr(0, 80)
             : "";
}

int Number(const Json& json, const char* key) {
  return json.is_object() && json.contains(key) && json[key].is_number_integer()
             ? json[key].get<int>()
             : 0;
}

// What is no JSON is no artefact of ours.
Json ReadOrNull(const fs::path& file) {
  try {
    if (!fs::exists(file)) return nullptr;
    return ParseJson(ReadFile(file, kMaxJson), file.string());
  } catch (const std::exception&) {
    return nullptr;
  }
}

std::string LocalTime(fs::file_time_type time) {
  const auto age = fs::file_time_type::clock::now() - time;
  const std::time_t when = std::chrono::system_clock::to_time_t(
      std::chrono::system_clock::now() -
      std::chrono::duration_cast<std::chrono::system_clock::duration>(age));
  std::tm local = {};
  ::localtime_r(&when, &local);
  char text[32];
  std::strftime(text, sizeof text, "%Y-%m-%d %H:%M", &local);
  return text;
}

uint64_t BytesBelow(const fs::path& folder) {
  uint64_t bytes = 0;
  std::error_code error;
  for (auto it = fs::recursive_directory_iterator(
           folder, fs::directory_options::skip_permission_denied, error);
       !error && it != fs::recursive_directory_iterator(); it.increment(error)) {
    std::error_code ignored;
    if (it->is_regular_file(ignored) && !it->is_symlink(ignored)) {
      bytes += it->file_size(ignored);
    }
  }
  return bytes;
}

std::string Geometry(const Json& g) {
  return std::to_string(Number(g, "encoder_layers")) + "+" +
         std::to_string(Number(g, "decoder_layers")) + " MoE layers x " +
         std::to_string(Number(g, "num_experts")) + " experts";
}

std::string RunDetail(const Json& run) {
  if (!run.is_object()) return "";
  std::string detail = Text(run, "program");
  if (run.contains("exit_status") && run["exit_status"].is_number_integer()) {
    const int code = run["exit_status"].get<int>();
    detail += code == kExitDone      ? ", done"
              : code == kExitStopped ? ", stopped: the same command goes on"
                                     : ", ended with " + std::to_string(code);
  } else {
    detail += ", running or killed";
  }
  return detail;
}

// How far a store is, as its last run left it.
std::string ChunkCount(const Json& run) {
  const Json results = run.is_object() ? run.value("results", Json()) : Json();
  const int whole = Number(results, "num_chunks");
  if (whole == 0) return "";
  return ", " + std::to_string(Number(results, "chunks")) + " of " +
         std::to_string(whole) + " chunks";
}

// The folder's own kind; empty where it is none of ours.
Artefact Look(const fs::path& folder) {
  Artefact found;
  found.path = folder;
  const Json run = ReadOrNull(folder / "run.json");
  const Json store = ReadOrNull(folder / "store.json");
  const Json config = ReadOrNull(folder / "config.json");
  const std::string ran = RunDetail(run);
  if (store.is_object() && store.contains("geometry")) {
    found.kind = fs::exists(folder / "lock.json") ? "locked" : "store";
    found.detail =
        Geometry(store["geometry"]) + ", " + Text(store, "task") + ChunkCount(run);
  } else if (Text(config, "format") == "routecast-speculation") {
    found.kind = "predictor";
    found.detail = config.contains("config")
                       ? Text(config["config"], "kind") + ", " +
                             Geometry(config["config"].value("geometry", Json::object()))
                       : "";
  } else if (Text(config, "model_type") == "switch_transformers") {
    found.kind = "model";
    found.detail = std::to_string(Number(config, "num_experts")) + " experts, width " +
                   std::to_string(Number(config, "d_model"));
  } else if (run.is_object() && run.contains("program")) {
    found.kind = "run";
  }
  if (!ran.empty()) found.detail += (found.detail.empty() ? "" : "; ") + ran;
  return found;
}

bool IsPartial(const fs::path& path) { return path.extension() == ".tmp"; }

}  // namespace

std::vector<Artefact> FindArtefacts(const fs::path& folder, size_t most) {
  if (!fs::is_directory(folder)) {
    throw UsageError(ErrorText("no such folder: " + folder.string(), "",
                               "name a folder to look into with --in"));
  }
  std::vector<Artefact> found;
  std::vector<fs::path> open = {folder};
  for (size_t looked = 0; !open.empty() && looked < most; ++looked) {
    const fs::path path = open.back();
    open.pop_back();
    Artefact artefact = Look(path);
    std::vector<fs::path> below;
    std::error_code error;
    for (const auto& entry : fs::directory_iterator(
             path, fs::directory_options::skip_permission_denied, error)) {
      std::error_code ignored;
      if (entry.is_symlink(ignored)) continue;
      if (IsPartial(entry.path())) {
        const uint64_t bytes = entry.is_directory(ignored) ? BytesBelow(entry.path())
                                                           : entry.file_size(ignored);
        found.push_back({"partial", entry.path(), "left by an interrupted write",
                         LocalTime(entry.last_write_time(ignored)), bytes});
      } else if (entry.is_directory(ignored)) {
        below.push_back(entry.path());
      }
    }
    if (!artefact.kind.empty()) {
      std::error_code ignored;
      artefact.changed = LocalTime(fs::last_write_time(path, ignored));
      artefact.bytes = BytesBelow(path);
      const bool closed = artefact.kind == "store" || artefact.kind == "locked";
      found.push_back(std::move(artefact));
      if (closed) continue;  // what is in a store is the store's
    }
    std::sort(below.begin(), below.end(), std::greater<>());
    open.insert(open.end(), below.begin(), below.end());
  }
  std::stable_sort(found.begin(), found.end(),
                   [](const Artefact& a, const Artefact& b) { return a.path < b.path; });
  return found;
}

Json DeviceStatus(int count,
                  const std::function<std::unique_ptr<DeviceCopy>(int)>& open) {
  Json devices = Json::array();
  for (int i = 0; i < count; ++i) {
    try {
      const std::unique_ptr<DeviceCopy> device = open(i);
      devices.push_back(
          {{"name", device->description()}, {"free_bytes", device->FreeBytes()}});
    } catch (const EnvironmentError& e) {  // all is said of the others
      devices.push_back({{"name", e.what()}, {"free_bytes", nullptr}});
    }
  }
  return devices;
}

namespace {

// The driver's own words, as " (no driver ...)".
std::string WhyNoDevice() {
  try {
    OpenCudaDevice(0);
  } catch (const EnvironmentError& e) {
    const std::string text = e.what();
    const size_t second = text.find('\n'), third = text.find('\n', second + 1);
    if (second != std::string::npos)
      return " (" + text.substr(second + 3, third - second - 3) + ")";
  }
  return "";
}

}  // namespace

Json MachineStatus() {
  struct sysinfo info = {};
  ::sysinfo(&info);
  const bool built = at::globalContext().hasCUDART();  // not hasCUDA: that wants a device
  const int devices = NumCudaDevices();
  Json machine = {{"version", Version()},
                  {"commit", GitCommit()},
                  {"torch", TORCH_VERSION},
                  {"cuda_built", built},
                  {"cuda_devices", devices},
                  {"devices", DeviceStatus(devices, OpenCudaDevice)},
                  {"cores", std::thread::hardware_concurrency()},
                  {"memory_bytes", uint64_t{info.totalram} * info.mem_unit},
                  {"missing", Json::array()}};
  if (!built) machine["missing"].push_back("CUDA: this build serves the CPU alone");
  if (built && devices == 0) {
    machine["missing"].push_back("a CUDA device: --device=cuda is refused" +
                                 WhyNoDevice());
  }
  return machine;
}

std::string StatusText(const Json& machine, const std::vector<Artefact>& artefacts) {
  std::string text =
      "routecast " + machine.at("version").get<std::string>() + ", torch " +
      machine.at("torch").get<std::string>() + ", " +
      std::to_string(machine.at("cores").get<int>()) + " cores, " +
      FormatBytes(machine.at("memory_bytes").get<uint64_t>()) +
      ", CUDA devices: " + std::to_string(machine.at("cuda_devices").get<int64_t>()) +
      "\n";
  for (const Json& device : machine.at("devices")) {
    text += "device: " + device.at("name").get<std::string>();
    if (device.at("free_bytes").is_number()) {
      text += ", " + FormatBytes(device.at("free_bytes").get<uint64_t>()) + " free";
    }
    text += "\n";
  }
  for (const Json& missing : machine.at("missing")) {
    text += "missing: " + missing.get<std::string>() + "\n";
  }
  if (artefacts.empty()) return text + "nothing of ours was found\n";
  Table table({"<kind", "size", "<changed", "<what", "<path"});
  for (const Artefact& a : artefacts) {
    table.AddRow({a.kind, FormatBytes(a.bytes), a.changed, a.detail, a.path.string()});
  }
  return text + table.ToText();
}

Json StatusJson(const Json& machine, const std::vector<Artefact>& artefacts) {
  Json json = {{"machine", machine}, {"artefacts", Json::array()}};
  for (const Artefact& a : artefacts) {
    json["artefacts"].push_back({{"kind", a.kind},
                                 {"path", a.path.string()},
                                 {"detail", a.detail},
                                 {"changed", a.changed},
                                 {"bytes", a.bytes}});
  }
  return json;
}

}  // namespace routecast
