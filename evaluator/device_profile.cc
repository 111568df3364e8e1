#include "evaluator/device_profile.h"

#include <algorithm>

#include "common/errors.h"
#include "report/table.h"

namespace routecast {

void FitLink(const std::vector<TransferPoint>& points, double* fixed_seconds,
             double* bytes_per_second) {
  // Weights of 1 / seconds^2: small transfers count as much as large ones.
  double w = 0, wx = 0, wy = 0, wxx = 0, wxy = 0;
  for (const TransferPoint& p : points) {
    const double x = static_cast<double>(p.bytes), y = p.seconds;
    const double weight = 1 / (y * y);
    w += weight;
    wx += weight * x;
    wy += weight * y;
    wxx += weight * x * x;
    wxy += weight * x * y;
  }
  const double slope = (w * wxy - wx * wy) / (w * wxx - wx * wx);
  *fixed_seconds = std::max(0.0, (wy - slope * wx) / w);
  *bytes_per_second = 1 / slope;
}

Json DeviceProfile::ToJson() const {
  Json json = {{"name", name},
               {"emulated", emulated},
               {"cpu", cpu},
               {"published_preset", PresetOf(*this).ToJson()},
               {"link_bytes_per_second", link_bytes_per_second},
               {"link_fixed_seconds", link_fixed_seconds},
               {"memory_bytes_per_second", memory_bytes_per_second},
               {"memory_bytes", memory_bytes},
               {"flops_per_second", flops_per_second},
               {"bytes_at_90_percent", bytes_at_90_percent},
               {"memory_share_with_transfers", memory_share_with_transfers},
               {"sweep", Json::array()}};
  for (const TransferPoint& p : sweep) {
    json["sweep"].push_back({{"bytes", p.bytes},
                             {"threads", p.threads},
                             {"direct", p.direct},
                             {"with_compute", p.with_compute},
                             {"both_ways", p.both_ways},
                             {"to_device", p.to_device},
                             {"pinned", p.pinned},
                             {"seconds", p.seconds},
                             {"spread", p.spread},
                             {"repeats", p.repeats},
                             {"bytes_per_second", p.bytes_per_second()}});
  }
  json["experts"] = Json::array();
  for (const ExpertTransfer& e : experts) {
    json["experts"].push_back({{"what", e.what},
                               {"d_model", e.d_model},
                               {"d_ff", e.d_ff},
                               {"experts", e.experts},
                               {"bytes", e.bytes},
                               {"mean_seconds", e.mean},
                               {"deviation_seconds", e.deviation},
                               {"trials", e.trials},
                               {"bytes_per_second", e.bytes_per_second()}});
  }
  return json;
}

DeviceProfile DeviceProfile::FromJson(const Json& json, const std::string& what) {
  const auto number = [&](const char* key) {
    const bool there = json.is_object() && json.contains(key) && json[key].is_number();
    const double value = there ? json[key].get<double>() : -1;
    if (!(value >= 0 && value < 1e18)) {
      throw DataError(
          ErrorText(what + " is not a device profile",
                    std::string(key) + " is missing or out of range",
                    "make one: routecast-evaluate --mode=transfer --out=..."));
    }
    return value;
  };
  DeviceProfile profile;
  profile.link_bytes_per_second = number("link_bytes_per_second");
  profile.link_fixed_seconds = number("link_fixed_seconds");
  profile.memory_bytes_per_second = number("memory_bytes_per_second");
  if (profile.link_bytes_per_second < 1 || profile.memory_bytes_per_second < 1) {
    number("a rate above 0");
  }
  // Files of earlier versions lack these.
  if (json.contains("memory_bytes"))
    profile.memory_bytes = static_cast<uint64_t>(number("memory_bytes"));
  if (json.contains("flops_per_second"))
    profile.flops_per_second = number("flops_per_second");
  profile.name = json.value("name", what);
  profile.emulated = json.value("emulated", false);
  profile.cpu = json.value("cpu", false);
  return profile;
}

DeviceProfile FindProfile(const std::string& name_or_file) {
  if (name_or_file == "rtx3090") {
    DeviceProfile profile;
    profile.name = "rtx3090";
    profile.emulated = true;
    profile.link_bytes_per_second = 25e9;
    profile.link_fixed_seconds = 10e-6;
    profile.memory_bytes_per_second = 936e9;
    profile.memory_bytes = uint64_t{24} << 30;
    profile.flops_per_second = 71e12;
    return profile;
  }
  fs::path file = name_or_file;
  if (fs::is_directory(file)) file /= "device_profile.json";
  if (!fs::exists(file)) {
    throw UsageError(ErrorText("no device profile: " + name_or_file,
                               "known by name: rtx3090",
                               "or a file of routecast-evaluate --mode=transfer"));
  }
  return DeviceProfile::FromJson(ReadJsonFile(file), file.string());
}

DevicePreset PresetOf(const DeviceProfile& profile) {
  return PublishedPreset(profile.name, profile.cpu ? 0 : profile.memory_bytes);
}

namespace {

const char* WayOf(const TransferPoint& p) {
  if (p.to_device) return p.pinned ? "to the device, pinned" : "to the device, pageable";
  return p.direct ? "direct" : "page cache";
}

const char* BesideOf(const TransferPoint& p) {
  if (p.both_ways) return "as much the other way";
  return p.with_compute ? "work that streams memory" : "nothing";
}

// Nothing where nothing was measured.
std::string ExpertsText(const std::vector<ExpertTransfer>& experts) {
  if (experts.empty()) return "";
  Table table({"<experts", "d_model", "d_ff", "number", "mean ms", "deviation ms",
               "trials", "MB/s"});
  for (const ExpertTransfer& e : experts) {
    table.AddRow({e.what, std::to_string(e.d_model), std::to_string(e.d_ff),
                  std::to_string(e.experts), Fixed(1e3 * e.mean, 3),
                  Fixed(1e3 * e.deviation, 3), std::to_string(e.trials),
                  Fixed(e.bytes_per_second() / 1e6, 0)});
  }
  return table.ToText();
}

}  // namespace

std::string ProfileTable(const DeviceProfile& profile) {
  const DevicePreset preset = PresetOf(profile);
  Table table({"bytes", "threads", "<way", "<beside", "ms", "spread ms", "GB/s"});
  for (const TransferPoint& p : profile.sweep) {
    table.AddRow({FormatBytes(p.bytes), std::to_string(p.threads), WayOf(p), BesideOf(p),
                  Fixed(1e3 * p.seconds, 3), Fixed(1e3 * p.spread, 3),
                  Fixed(p.bytes_per_second() / 1e9, 2)});
  }
  return table.ToText() + ExpertsText(profile.experts) +
         "link: " + Fixed(profile.link_bytes_per_second / 1e9, 2) + " GB/s, " +
         Fixed(1e6 * profile.link_fixed_seconds, 0) +
         " us a transfer, 90 % of the peak from " +
         FormatBytes(profile.bytes_at_90_percent) +
         " on\nmemory: " + Fixed(profile.memory_bytes_per_second / 1e9, 2) + " GB/s, " +
         Fixed(100 * profile.memory_share_with_transfers, 0) +
         " % of it beside transfers; " + FormatBytes(profile.memory_bytes) +
         " free\nproducts: " + Fixed(profile.flops_per_second / 1e9, 1) + " GFLOP/s\n" +
         "published preset (" + preset.device +
         "): " + std::to_string(preset.most_experts) + " experts ahead, aggressiveness " +
         Fixed(preset.aggressiveness, 1) + ", compression " + preset.compression +
         ", batch " + std::to_string(preset.batch) + "\n";
}

}  // namespace routecast
