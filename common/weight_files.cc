#include "common/weight_files.h"

#include <algorithm>
#include <cstring>
#include <set>

#include "common/errors.h"
#include "common/foreign_text.h"
#include "common/safetensors.h"
#include "common/torch_file.h"

namespace routecast {
namespace {

constexpr char kSafetensors[] = ".safetensors", kBin[] = ".bin", kIndex[] = ".index.json";
constexpr size_t kCompareBytes = size_t{1} << 20;

// In the order in which transformers looks for them.
const char* const kForms[] = {"model.safetensors", "model.safetensors.index.json",
                              "pytorch_model.bin", "pytorch_model.bin.index.json"};

[[noreturn]] void BadIndex(const std::string& what, const std::string& rule) {
  throw DataError(ErrorText(what + " is not a usable index of shards", rule,
                            "fetch the checkpoint again"));
}

void CheckShardName(const std::string& name, const std::string& suffix,
                    const std::string& what) {
  const auto refuse = [&](const std::string& rule) {
    BadIndex(what, "shard " + Quoted(name) + ": " + rule);
  };
  if (name.empty()) refuse("the name is empty");
  if (name.size() > 255) refuse("the name is longer than a file's may be");
  if (name[0] == '/') refuse("an absolute path; shards lie beside their index");
  if (name.find("..") != std::string::npos) refuse("'..' leads out of the folder");
  if (name.find_first_of("/\\") != std::string::npos) {
    refuse("a path; shards lie beside their index");
  }
  for (const char c : name) {
    if (static_cast<unsigned char>(c) < 0x20) refuse("the name has control characters");
  }
  if (!name.ends_with(suffix)) refuse("its name does not end with " + suffix);
}

}  // namespace

std::unordered_map<std::string, std::string> ParseShardIndex(const std::string& text,
                                                             const std::string& suffix,
                                                             const std::string& what) {
  constexpr int kMaxDepth = 8;  // metadata may hold anything
  if (const std::string other = KnownImpostor(text.substr(0, 32)); !other.empty()) {
    BadIndex(what, "it is " + other);
  }
  const nlohmann::json json = ParseForeignJson(text, what, kMaxDepth);
  const auto map = json.find("weight_map");
  if (map == json.end()) BadIndex(what, "it has no weight_map");
  if (!map->is_object()) BadIndex(what, "weight_map is no object");
  if (map->empty()) BadIndex(what, "weight_map is empty");
  std::unordered_map<std::string, std::string> shards;
  std::set<std::string> names;
  for (const auto& [tensor, shard] : map->items()) {
    if (tensor.empty()) BadIndex(what, "a tensor in weight_map has no name");
    if (!shard.is_string()) {
      BadIndex(what, "tensor " + Quoted(tensor) + ": its shard is no file name");
    }
    const auto& name = shard.get_ref<const std::string&>();
    if (names.insert(name).second) CheckShardName(name, suffix, what);
    shards.emplace(tensor, name);
  }
  if (names.size() > WeightFiles::kMaxShards) {
    BadIndex(what, std::to_string(names.size()) + " shards, above the limit of " +
                       std::to_string(WeightFiles::kMaxShards));
  }
  return shards;
}

WeightFiles::WeightFiles(const fs::path& folder) {
  if (!fs::is_directory(folder)) {
    throw UsageError(ErrorText(folder.string() + " is not a folder", "",
                               "give a folder with config.json and model.safetensors"));
  }
  for (const std::string form : kForms) {
    const fs::path file = folder / form;
    if (!fs::exists(file)) continue;
    source_ = file;
    form.ends_with(kIndex) ? ReadSharded(file) : AddFile(file);
    return;
  }
  throw UsageError(ErrorText(
      folder.string() + " has no weights",
      "looked for model.safetensors, pytorch_model.bin, and either one's .index.json",
      "give a Hugging Face folder; an unfinished download is completed by: hf download"));
}

void WeightFiles::AddFile(const fs::path& file) {
  const ByteFile bytes(file);
  std::vector<TensorEntry> tensors = file.filename().string().ends_with(kBin)
                                         ? ReadTorchFileIndex(bytes)
                                         : ReadSafetensorsIndex(bytes).tensors;
  for (TensorEntry& tensor : tensors) {
    const auto [it, is_new] = by_name_.emplace(tensor.name, tensors_.size());
    if (!is_new) {
      BadIndex(source_.string(), "tensor " + Quoted(tensor.name) +
                                     " lies in two shards: " +
                                     FileOf(tensors_[it->second]).filename().string() +
                                     " and " + file.filename().string());
    }
    tensors_.push_back({std::move(tensor), files_.size()});
  }
  files_.push_back(file);
}

void WeightFiles::ReadSharded(const fs::path& index) {
  const std::string what = index.string();
  const std::string suffix =
      what.ends_with(std::string(kBin) + kIndex) ? kBin : kSafetensors;
  const auto map = ParseShardIndex(ReadFile(index, kMaxIndexBytes), suffix, what);
  std::set<std::string> names;
  for (const auto& [tensor, shard] : map) names.insert(shard);
  for (const std::string& name : names) {
    const fs::path file = index.parent_path() / name;
    if (!fs::exists(file)) {
      throw DataError(ErrorText("shard " + file.string() + " is missing",
                                index.filename().string() + " names " +
                                    std::to_string(names.size()) + " shards",
                                "complete the download"));
    }
    AddFile(file);
  }
  std::set<std::string> missing;  // sorted: the message does not depend on a hash
  for (const auto& [tensor, shard] : map) {
    if (Find(tensor) == nullptr) missing.insert(tensor);
  }
  if (!missing.empty()) {
    BadIndex(what, "tensor " + Quoted(*missing.begin()) + " is not in its shard " +
                       map.at(*missing.begin()));
  }
  for (const WeightEntry& entry : tensors_) {
    const std::string lies_in = FileOf(entry).filename().string();
    const auto it = map.find(entry.name);
    if (it == map.end()) {
      BadIndex(what, "tensor " + Quoted(entry.name) + " of " + lies_in +
                         " is not in weight_map");
    }
    if (it->second != lies_in) {
      BadIndex(what, "tensor " + Quoted(entry.name) + " lies in " + lies_in +
                         ", weight_map says " + it->second);
    }
  }
}

const WeightEntry* WeightFiles::Find(const std::string& name) const {
  const auto it = by_name_.find(name);
  return it == by_name_.end() ? nullptr : &tensors_[it->second];
}

const ByteFile& WeightFiles::Open(const WeightEntry& entry) const {
  if (!open_ || open_file_ != entry.file) {
    open_ = std::make_unique<ByteFile>(files_[entry.file]);
    open_file_ = entry.file;
  }
  return *open_;
}

bool WeightFiles::SameBytes(const WeightEntry& a, const WeightEntry& b) const {
  if (a.dtype != b.dtype || a.shape != b.shape || a.strides != b.strides) return false;
  if (a.file == b.file && a.offset == b.offset) return true;
  const ByteFile file_a(FileOf(a)), file_b(FileOf(b));
  for (uint64_t at = 0; at < a.SpanBytes(); at += kCompareBytes) {
    const size_t count = std::min<uint64_t>(kCompareBytes, a.SpanBytes() - at);
    if (file_a.Read(a.offset + at, count) != file_b.Read(b.offset + at, count)) {
      return false;
    }
  }
  return true;
}

uint64_t WeightFiles::Hash(uint64_t seed) const {
  for (const fs::path& file : files_) seed = HashFile(file, seed);
  return seed;
}

}  // namespace routecast
