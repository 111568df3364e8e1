#include "storage/shard_seal.h"

#include <algorithm>
#include <charconv>

#include "common/byte_file.h"
#include "common/errors.h"
#include "common/run_record.h"
#include "storage/shard_db.h"

namespace routecast {
namespace {

constexpr int kSealVersion = 1;
constexpr size_t kTailBytes = 18;  // newline, 16 digits, newline
constexpr uint64_t kMaxSealBytes = uint64_t{1} << 32;

fs::path SealPath(const fs::path& store, int shard) {
  return ShardPath(store, shard).string() + ".seal";
}

// Files whose bytes mean something: RocksDB's lock is empty, its logs are for people.
std::map<std::string, fs::path> FilesToSeal(const fs::path& store, int shard) {
  std::map<std::string, fs::path> files;
  for (const auto& entry : fs::directory_iterator(ShardPath(store, shard))) {
    const std::string name = entry.path().filename().string();
    if (name == "LOCK" || name.starts_with("LOG")) continue;
    files[entry.path().lexically_relative(store).string()] = entry.path();
  }
  for (const char* name : {"store.json", "routers.safetensors", "context.model"}) {
    if (fs::exists(store / name)) files[name] = store / name;
  }
  return files;
}

std::string ToHex(const std::string& bytes) {
  constexpr char kDigits[] = "0123456789abcdef";
  std::string text;
  text.reserve(2 * bytes.size());
  for (const char c : bytes) {
    text += kDigits[static_cast<uint8_t>(c) >> 4];
    text += kDigits[static_cast<uint8_t>(c) & 15];
  }
  return text;
}

std::string FromHex(const std::string& text) {
  const auto digit = [](char c) { return c <= '9' ? c - '0' : c - 'a' + 10; };
  std::string bytes;
  for (size_t i = 0; i + 1 < text.size(); i += 2) {
    bytes += static_cast<char>(digit(text[i]) << 4 | digit(text[i + 1]));
  }
  return bytes;
}

// The checksum holds, but who wrote it is not known: values of other kinds are refused.
ShardSeal ParseSeal(const Json& json, const fs::path& path) {
  if (!json.is_object() || json.value("version", Json()) != kSealVersion) {
    throw DataError(ErrorText(path.string() + " is no seal of this version", "",
                              "use the routecast that wrote it"));
  }
  ShardSeal seal;
  try {
    seal.config = json.at("config").get<std::string>();
    for (const auto& [name, file] : json.at("files").items()) {
      seal.files[name] = {file.at("bytes").get<uint64_t>(),
                          file.at("hash").get<uint64_t>()};
    }
    for (const auto& [chunk, mark] : json.at("marks").items()) {
      seal.marks[static_cast<uint32_t>(std::stoul(chunk))] =
          FromHex(mark.get<std::string>());
    }
  } catch (const std::exception& e) {
    throw DataError(ErrorText(path.string() + " is no seal", e.what(),
                              "the shard itself may be sound: remove the seal, verify"));
  }
  return seal;
}

}  // namespace

void WriteShardSeal(const fs::path& store, int shard,
                    const std::map<uint32_t, std::string>& marks,
                    const std::optional<ShardSeal>& before,
                    const std::function<void()>& on_block) {
  Json json = {{"version", kSealVersion}, {"config", ReadFile(store / "store.json")}};
  json["files"] = Json::object();
  for (const auto& [name, path] : FilesToSeal(store, shard)) {
    const uint64_t bytes = fs::file_size(path);
    uint64_t hash = 0;
    const auto known =
        before ? before->files.find(name) : decltype(before->files.end()){};
    const bool kept = before && path.extension() == ".sst" &&
                      known != before->files.end() && known->second.bytes == bytes;
    hash = kept ? known->second.hash : HashFile(path, 0, on_block);
    json["files"][name] = {{"bytes", bytes}, {"hash", hash}};
  }
  json["marks"] = Json::object();
  for (const auto& [chunk, value] : marks) {
    json["marks"][std::to_string(chunk)] = ToHex(value);
  }
  const std::string text = json.dump(1);
  WriteFileAtomic(SealPath(store, shard), text + "\n" + Hex64(Hash64(text)) + "\n");
}

std::vector<int> SealedShards(const fs::path& store) {
  std::vector<int> shards;
  std::error_code none;  // a store without this folder has no seal
  for (const auto& entry : fs::directory_iterator(store / "shards", none)) {
    const std::string stem = entry.path().stem();
    int shard = 0;
    const auto [end, error] =
        std::from_chars(stem.data(), stem.data() + stem.size(), shard);
    if (error != std::errc() || entry.path() != SealPath(store, shard)) continue;
    shards.push_back(shard);
  }
  std::sort(shards.begin(), shards.end());
  return shards;
}

std::optional<ShardSeal> ReadShardSeal(const fs::path& store, int shard) {
  const fs::path path = SealPath(store, shard);
  if (!fs::exists(path)) return std::nullopt;
  std::string text = ReadFile(path, kMaxSealBytes);
  const std::string tail =
      text.size() < kTailBytes ? "" : text.substr(text.size() - kTailBytes);
  text.resize(text.size() - tail.size());
  // Everything after this is as it was written.
  if (tail != "\n" + Hex64(Hash64(text)) + "\n") {
    throw DataError(ErrorText(path.string() + " is damaged",
                              "its checksum is not that of its text",
                              "the shard itself may be sound: remove the seal, verify"));
  }
  return ParseSeal(ParseJson(text, path.string()), path);
}

void RemoveShardSeal(const fs::path& store, int shard) {
  const fs::path path = SealPath(store, shard);
  std::error_code error;
  if (!fs::remove(path, error) && !error) return;
  if (error) ThrowErrno(error.value(), "remove", path);
  SyncPath(path.parent_path());
}

void CompareWithSeal(const fs::path& store, int shard, const ShardSeal& seal,
                     const std::function<void(const std::string&)>& problem) {
  const std::map<std::string, fs::path> there = FilesToSeal(store, shard);
  for (const auto& [name, file] : seal.files) {
    const auto found = there.find(name);
    if (found == there.end()) {
      problem((store / name).string() + " is missing");
    } else if (fs::file_size(found->second) != file.bytes) {
      problem((store / name).string() + ": " +
              std::to_string(fs::file_size(found->second)) + " bytes, not " +
              std::to_string(file.bytes));
    } else if (HashFile(found->second) != file.hash) {
      problem((store / name).string() + ": its bytes are not those that were sealed");
    }
  }
  for (const auto& [name, path] : there) {
    if (!seal.files.contains(name)) problem(path.string() + " does not belong there");
  }
}

}  // namespace routecast
