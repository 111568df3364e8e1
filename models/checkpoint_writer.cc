#include "models/checkpoint_writer.h"

#include <cstdio>
#include <regex>
#include <set>

#include "common/errors.h"
#include "models/parameters.h"
#include "models/switch_model.h"

namespace routecast {
namespace {

constexpr char kSingle[] = "model.safetensors";
constexpr char kIndex[] = "model.safetensors.index.json";

uint64_t TotalBytes(const std::vector<TensorHeader>& tensors, size_t from, size_t to) {
  uint64_t bytes = 0;
  for (size_t i = from; i < to; ++i) bytes += tensors[i].size_bytes();
  return bytes;
}

std::vector<size_t> ShardBegins(const std::vector<TensorHeader>& tensors,
                                uint64_t max_bytes) {
  std::vector<size_t> begins = {0};
  uint64_t bytes = 0;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const uint64_t size = tensors[i].size_bytes();
    if (i > begins.back() && bytes + size > max_bytes) {
      begins.push_back(i);
      bytes = 0;
    }
    bytes += size;
  }
  begins.push_back(tensors.size());
  return begins;
}

std::string DtypeOfConfig(at::ScalarType dtype) {
  return dtype == at::kBFloat16 ? "bfloat16" : dtype == at::kHalf ? "float16" : "float32";
}

}  // namespace

std::vector<TensorHeader> CheckpointTensors(const SwitchConfig& config,
                                            at::ScalarType dtype) {
  std::vector<TensorHeader> tensors;
  for (auto& [name, shape] : ParameterShapes(config)) {
    tensors.push_back({name, DtypeName(dtype), shape});
  }
  if (!config.tie_word_embeddings) {
    for (const char* name :
         {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight"}) {
      tensors.push_back({name, DtypeName(dtype), {config.vocab_size, config.d_model}});
    }
  }
  return tensors;
}

CheckpointWriter::CheckpointWriter(fs::path folder, std::vector<TensorHeader> tensors,
                                   uint64_t max_shard_bytes)
    : folder_(std::move(folder)),
      tensors_(std::move(tensors)),
      shard_begin_(ShardBegins(tensors_, max_shard_bytes)) {
  const uint64_t needed = TotalBytes(tensors_, 0, tensors_.size());
  const uint64_t free_bytes = FreeBytes(folder_);
  if (needed > free_bytes) {
    throw EnvironmentError(ErrorText(
        "no room for a checkpoint in " + folder_.string(),
        FormatBytes(needed) + " are needed, " + FormatBytes(free_bytes) + " are free",
        "free some space or choose another folder"));
  }
  BeginShard();
}

std::string CheckpointWriter::ShardName(size_t shard) const {
  const size_t count = shard_begin_.size() - 1;
  if (count == 1) return kSingle;
  char name[64];
  std::snprintf(name, sizeof name, "model-%05zu-of-%05zu.safetensors", shard + 1, count);
  return name;
}

void CheckpointWriter::BeginShard() {
  const size_t shard = shards_.size();
  const size_t from = shard_begin_[shard], to = shard_begin_[shard + 1];
  const std::vector<TensorHeader> mine(
      tensors_.begin() + static_cast<std::ptrdiff_t>(from),
      tensors_.begin() + static_cast<std::ptrdiff_t>(to));
  shards_.push_back(std::make_unique<SafetensorsWriter>(
      folder_ / ShardName(shard), mine,
      std::map<std::string, std::string>{{"format", "pt"}}));
  left_bytes_ = TotalBytes(tensors_, from, to);
}

void CheckpointWriter::Append(const void* data, size_t count) {
  const char* from = static_cast<const char*>(data);
  while (count > 0) {
    if (left_bytes_ == 0) BeginShard();
    const size_t part = std::min<uint64_t>(count, left_bytes_);
    shards_.back()->Append(from, part);
    from += part;
    count -= part;
    left_bytes_ -= part;
  }
}

void CheckpointWriter::Finish(const SwitchConfig& config, at::ScalarType dtype) {
  Json json = config.ToJson();
  json["dtype"] = DtypeOfConfig(dtype);
  const fs::path config_file = folder_ / "config.json";
  const std::string config_text = json.dump(2) + "\n";
  // Several files change: without a configuration nobody takes a mixture of old and new
  // ones for a checkpoint. It is written last.
  if (shards_.size() > 1 || fs::exists(folder_ / kIndex) ||
      (fs::exists(config_file) && ReadFile(config_file) != config_text)) {
    fs::remove(config_file);
    fs::remove(folder_ / kIndex);
  }
  for (const auto& shard : shards_) shard->Finish();
  if (shards_.size() > 1) {
    nlohmann::json map = nlohmann::json::object();
    for (size_t s = 0; s < shards_.size(); ++s) {
      for (size_t i = shard_begin_[s]; i < shard_begin_[s + 1]; ++i) {
        map[tensors_[i].name] = ShardName(s);
      }
    }
    const nlohmann::json index = {
        {"metadata", {{"total_size", TotalBytes(tensors_, 0, tensors_.size())}}},
        {"weight_map", map}};
    WriteFileAtomic(folder_ / kIndex, index.dump(2) + "\n");
  }
  RemoveOthers();
  const Json generation = {{"pad_token_id", config.pad_token_id},
                           {"eos_token_id", config.eos_token_id},
                           {"decoder_start_token_id", config.decoder_start_token_id}};
  WriteFileAtomic(folder_ / "generation_config.json", generation.dump(2) + "\n");
  WriteFileAtomic(config_file, config_text);
}

void CheckpointWriter::RemoveOthers() const {
  static const std::regex kWeights(
      "model(-\\d{5}-of-\\d{5})?\\.safetensors(\\.index\\.json)?");
  std::set<std::string> mine;
  for (size_t s = 0; s < shards_.size(); ++s) mine.insert(ShardName(s));
  if (shards_.size() > 1) mine.insert(kIndex);
  for (const auto& entry : fs::directory_iterator(folder_)) {
    const std::string name = entry.path().filename().string();
    if (std::regex_match(name, kWeights) && mine.count(name) == 0) {
      fs::remove(entry.path());
    }
  }
}

}  // namespace routecast
