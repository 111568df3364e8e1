#include "common/safetensors.h"

#include <algorithm>
#include <cstring>
#include <fstream>
#include <limits>
#include <set>

#include "common/errors.h"
#include "common/run_record.h"

namespace routecast {
namespace {

constexpr uint64_t kMaxHeaderBytes = 100'000'000;

[[noreturn]] void Bad(const std::string& what, const std::string& rule) {
  throw DataError(ErrorText(what + " is not a valid safetensors file", rule,
                            "fetch or write the file again"));
}

uint64_t CheckedBytes(const TensorEntry& t, const std::string& what) {
  uint64_t bytes = DtypeBytes(t.dtype);
  if (bytes == 0) Bad(what, "tensor " + t.name + ": unknown dtype " + t.dtype);
  for (int64_t dim : t.shape) {
    if (dim < 0) Bad(what, "tensor " + t.name + ": negative dimension");
    const auto d = static_cast<uint64_t>(dim);
    if (d != 0 && bytes > std::numeric_limits<uint64_t>::max() / d) {
      Bad(what, "tensor " + t.name + ": shape product overflows");
    }
    bytes *= d;
  }
  return bytes;
}

}  // namespace

uint64_t DtypeBytes(const std::string& dtype) {
  static const std::map<std::string, uint64_t> kBytes = {
      {"F64", 8},  {"I64", 8}, {"U64", 8}, {"F32", 4}, {"I32", 4}, {"U32", 4}, {"F16", 2},
      {"BF16", 2}, {"I16", 2}, {"U16", 2}, {"I8", 1},  {"U8", 1},  {"BOOL", 1}};
  const auto it = kBytes.find(dtype);
  return it == kBytes.end() ? 0 : it->second;
}

const TensorEntry* SafetensorsIndex::Find(const std::string& name) const {
  for (const TensorEntry& t : tensors) {
    if (t.name == name) return &t;
  }
  return nullptr;
}

SafetensorsIndex ParseSafetensorsHeader(const std::string& header_json,
                                        uint64_t file_size, const std::string& what) {
  if (header_json.empty() || header_json[0] != '{')
    Bad(what, "header does not start with {");
  const Json header = ParseJson(header_json, what + " (header)");
  if (!header.is_object()) Bad(what, "header is not an object");
  const uint64_t data_start = 8 + header_json.size();
  SafetensorsIndex index;
  std::set<std::string> names;
  for (const auto& [name, value] : header.items()) {
    if (!names.insert(name).second) Bad(what, "tensor " + name + " is named twice");
    if (!value.is_object()) Bad(what, "entry " + name + " is not an object");
    if (name == "__metadata__") {
      for (const auto& [key, text] : value.items()) {
        if (!text.is_string()) Bad(what, "metadata " + key + " is not a string");
        index.metadata[key] = text.get<std::string>();
      }
      continue;
    }
    TensorEntry t;
    t.name = name;
    const bool complete = value.contains("dtype") && value["dtype"].is_string() &&
                          value.contains("shape") && value["shape"].is_array() &&
                          value.contains("data_offsets") &&
                          value["data_offsets"].is_array() &&
                          value["data_offsets"].size() == 2;
    if (!complete) Bad(what, "entry " + name + " lacks dtype, shape or data_offsets");
    t.dtype = value["dtype"].get<std::string>();
    for (const auto& dim : value["shape"]) {
      if (!dim.is_number_unsigned()) Bad(what, "entry " + name + ": bad dimension");
      if (dim.get<uint64_t>() > uint64_t{1} << 62)
        Bad(what, "entry " + name + ": dimension");
      t.shape.push_back(dim.get<int64_t>());
    }
    for (const auto& o : value["data_offsets"]) {
      if (!o.is_number_unsigned()) Bad(what, "entry " + name + ": bad offset");
    }
    const auto begin = value["data_offsets"][0].get<uint64_t>();
    const auto end = value["data_offsets"][1].get<uint64_t>();
    if (begin > end || end > file_size)
      Bad(what, "entry " + name + ": offsets out of range");
    t.size_bytes = end - begin;
    t.offset = data_start + begin;
    if (CheckedBytes(t, what) != t.size_bytes) {
      Bad(what, "tensor " + name + ": shape and offsets disagree");
    }
    index.tensors.push_back(std::move(t));
  }
  std::stable_sort(index.tensors.begin(), index.tensors.end(),
                   [](const TensorEntry& a, const TensorEntry& b) {
                     return a.offset != b.offset ? a.offset < b.offset
                                                 : a.size_bytes < b.size_bytes;
                   });
  uint64_t expected = data_start;
  for (const TensorEntry& t : index.tensors) {
    if (t.offset != expected) Bad(what, "hole or overlap before tensor " + t.name);
    expected += t.size_bytes;
  }
  if (expected != file_size) {
    Bad(what, "data ends at " + std::to_string(expected) + ", file at " +
                  std::to_string(file_size));
  }
  return index;
}

SafetensorsIndex ReadSafetensorsIndex(const fs::path& path) {
  std::ifstream in(path, std::ios::binary);
  if (!in || !fs::is_regular_file(path)) {
    throw UsageError(ErrorText("cannot open " + path.string(), "", "check the path"));
  }
  const uint64_t file_size = fs::file_size(path);
  uint64_t length = 0;
  if (file_size < 8 || !in.read(reinterpret_cast<char*>(&length), 8)) {
    Bad(path, "shorter than 8 bytes");
  }
  if (length > kMaxHeaderBytes || length > file_size - 8) {
    Bad(path, "header length " + std::to_string(length) + ", file " +
                  std::to_string(file_size) + " bytes");
  }
  std::string header(length, '\0');
  if (!in.read(header.data(), static_cast<std::streamsize>(length)))
    Bad(path, "cut header");
  return ParseSafetensorsHeader(header, file_size, path.string());
}

std::string ReadTensorBytes(const fs::path& path, const TensorEntry& entry) {
  std::ifstream in(path, std::ios::binary);
  std::string bytes(entry.size_bytes, '\0');
  in.seekg(static_cast<std::streamoff>(entry.offset));
  if (!in.read(bytes.data(), static_cast<std::streamsize>(bytes.size())) &&
      !bytes.empty()) {
    Bad(path, "cut inside tensor " + entry.name);
  }
  return bytes;
}

void WriteSafetensors(const fs::path& path, const std::vector<TensorToWrite>& tensors,
                      const std::map<std::string, std::string>& metadata) {
  Json header = Json::object();
  if (!metadata.empty()) {
    Json meta = Json::object();
    for (const auto& [key, value] : metadata) meta[key] = value;
    header["__metadata__"] = meta;
  }
  uint64_t offset = 0;
  std::vector<uint64_t> sizes;
  for (const TensorToWrite& t : tensors) {
    const uint64_t bytes = CheckedBytes({t.name, t.dtype, t.shape, 0, 0}, path.string());
    header[t.name] = {{"dtype", t.dtype},
                      {"shape", t.shape},
                      {"data_offsets", {offset, offset + bytes}}};
    offset += bytes;
    sizes.push_back(bytes);
  }
  std::string text = header.dump();
  text.append((8 - text.size() % 8) % 8, ' ');
  const uint64_t length = text.size();
  std::string file;
  file.reserve(8 + text.size() + offset);
  file.append(reinterpret_cast<const char*>(&length), 8);
  file += text;
  for (size_t i = 0; i < tensors.size(); ++i) {
    file.append(static_cast<const char*>(tensors[i].data), sizes[i]);
  }
  WriteFileAtomic(path, file);
}

}  // namespace routecast
