#include "common/safetensors.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <stdexcept>

#include "common/errors.h"
#include "common/foreign_text.h"
#include "common/run_record.h"

namespace routecast {
namespace {

using ForeignJson = nlohmann::json;

constexpr uint64_t kMaxHeaderBytes = 100'000'000;
constexpr size_t kMaxNameBytes = 1024;
constexpr size_t kMaxDimensions = 64;
constexpr int kMaxHeaderDepth = 4;  // header, entry, shape, number

[[noreturn]] void Bad(const std::string& what, const std::string& rule) {
  throw DataError(ErrorText(what + " is not a valid safetensors file", rule,
                            "fetch or write the file again"));
}

// One entry of the header: checks it and says which with every error.
class EntryReader {
 public:
  EntryReader(const std::string& name, const ForeignJson& value, const std::string& what)
      : name_(name), value_(value), what_(what) {}

  TensorEntry Read(uint64_t data_start, uint64_t file_size) const {
    CheckName();
    for (const auto& [key, unused] : value_.items()) {
      if (key != "dtype" && key != "shape" && key != "data_offsets") {
        Refuse("key " + Quoted(key) + " is unknown");
      }
    }
    TensorEntry t;
    t.name = name_;
    t.dtype = Dtype();
    t.shape = Shape();
    const ForeignJson& offsets = Field("data_offsets");
    if (!offsets.is_array()) Refuse("data_offsets is no list");
    if (offsets.size() != 2) {
      Refuse("data_offsets has " + std::to_string(offsets.size()) + " numbers, not 2");
    }
    const uint64_t begin = Offset(offsets[0]), end = Offset(offsets[1]);
    if (begin > end) {
      Refuse("data ends at " + std::to_string(end) + ", before it begins at " +
             std::to_string(begin));
    }
    if (end > file_size - data_start) {
      Refuse("data ends at " + std::to_string(end) + ", the file holds " +
             std::to_string(file_size - data_start) + " bytes of data");
    }
    t.size_bytes = end - begin;
    t.offset = data_start + begin;
    if (const uint64_t bytes = Bytes(t); bytes != t.size_bytes) {
      Refuse("shape " + ShapeText(t.shape) + " of " + t.dtype + " takes " +
             std::to_string(bytes) + " bytes, data_offsets give " +
             std::to_string(t.size_bytes));
    }
    return t;
  }

 private:
  [[noreturn]] void Refuse(const std::string& rule) const {
    Bad(what_, "tensor " + Quoted(name_) + ": " + rule);
  }
  void CheckName() const {
    if (name_.empty()) Refuse("the name is empty");
    if (name_.size() > kMaxNameBytes) {
      Refuse("the name has " + std::to_string(name_.size()) + " bytes, above " +
             std::to_string(kMaxNameBytes));
    }
    for (const char c : name_) {
      if (static_cast<unsigned char>(c) < 0x20) Refuse("the name has control characters");
    }
    if (!value_.is_object()) Refuse("the entry is no object");
  }
  const ForeignJson& Field(const char* key) const {
    const auto it = value_.find(key);
    if (it == value_.end()) Refuse(std::string(key) + " is missing");
    return *it;
  }
  std::string Dtype() const {
    const ForeignJson& dtype = Field("dtype");
    if (!dtype.is_string()) Refuse("dtype is no string");
    const auto& name = dtype.get_ref<const std::string&>();
    if (DtypeBytes(name) == 0) Refuse("dtype " + Quoted(name) + " is unknown");
    return name;
  }
  std::vector<int64_t> Shape() const {
    const ForeignJson& shape = Field("shape");
    if (!shape.is_array()) Refuse("shape is no list");
    if (shape.size() > kMaxDimensions) {
      Refuse("shape has " + std::to_string(shape.size()) + " dimensions, above " +
             std::to_string(kMaxDimensions));
    }
    std::vector<int64_t> dims;
    for (const ForeignJson& dim : shape) {
      if (!dim.is_number_unsigned()) {
        Refuse("dimension " + Quoted(dim.dump()) + " is no count");
      }
      if (dim.get<uint64_t>() > uint64_t{1} << 62) {
        Refuse("dimension " + dim.dump() + " is above 2^62");
      }
      dims.push_back(dim.get<int64_t>());
    }
    return dims;
  }
  uint64_t Offset(const ForeignJson& offset) const {
    if (!offset.is_number_unsigned()) {
      Refuse("offset " + Quoted(offset.dump()) + " is no count");
    }
    return offset.get<uint64_t>();
  }
  uint64_t Bytes(const TensorEntry& t) const {
    uint64_t bytes = DtypeBytes(t.dtype);
    for (const int64_t dim : t.shape) {
      const auto d = static_cast<uint64_t>(dim);
      if (d != 0 && bytes > std::numeric_limits<uint64_t>::max() / d) {
        Refuse("shape " + ShapeText(t.shape) + " overflows 64 bits");
      }
      bytes *= d;
    }
    return bytes;
  }

  const std::string& name_;
  const ForeignJson& value_;
  const std::string& what_;
};

std::map<std::string, std::string> Metadata(const ForeignJson& value,
                                            const std::string& what) {
  if (!value.is_object()) Bad(what, "__metadata__ is no object");
  std::map<std::string, std::string> metadata;
  for (const auto& [key, text] : value.items()) {
    if (!text.is_string()) Bad(what, "metadata " + Quoted(key) + " is no string");
    metadata[key] = text.get<std::string>();
  }
  return metadata;
}

// The format allows neither holes nor overlaps: bytes that nobody names could hide
// anything, and bytes named twice are not two tensors.
void CheckLayout(const SafetensorsIndex& index, uint64_t data_start, uint64_t file_size,
                 const std::string& what) {
  uint64_t expected = data_start;
  for (const TensorEntry& t : index.tensors) {
    if (t.offset != expected) {
      Bad(what, "tensor " + Quoted(t.name) + ": data begins at " +
                    std::to_string(t.offset - data_start) +
                    (t.offset > expected ? ", a hole after " : ", an overlap before ") +
                    std::to_string(expected - data_start));
    }
    expected += t.size_bytes;
  }
  if (expected != file_size) {
    Bad(what, "the tensors end at byte " + std::to_string(expected) + ", the file at " +
                  std::to_string(file_size));
  }
}

}  // namespace

const TensorEntry* SafetensorsIndex::Find(const std::string& name) const {
  for (const TensorEntry& t : tensors) {
    if (t.name == name) return &t;
  }
  return nullptr;
}

SafetensorsIndex ParseSafetensorsHeader(const std::string& header_json,
                                        uint64_t file_size, const std::string& what) {
  if (header_json.empty()) Bad(what, "the header is empty");
  if (header_json[0] != '{') Bad(what, "the header does not start with {");
  const uint64_t data_start = 8 + header_json.size();
  if (data_start > file_size) Bad(what, "the header is longer than the file");
  const ForeignJson header =
      ParseForeignJson(header_json, what + " (header)", kMaxHeaderDepth);
  SafetensorsIndex index;
  for (const auto& [name, value] : header.items()) {
    if (name == "__metadata__") {
      index.metadata = Metadata(value, what);
    } else {
      index.tensors.push_back(EntryReader(name, value, what).Read(data_start, file_size));
    }
  }
  std::stable_sort(index.tensors.begin(), index.tensors.end(),
                   [](const TensorEntry& a, const TensorEntry& b) {
                     return a.offset != b.offset ? a.offset < b.offset
                                                 : a.size_bytes < b.size_bytes;
                   });
  CheckLayout(index, data_start, file_size, what);
  return index;
}

SafetensorsIndex ReadSafetensorsIndex(const ByteFile& file) {
  const std::string what = file.path().string();
  if (file.size() < 8) {
    Bad(what, "it has " + std::to_string(file.size()) + " bytes, not even a header");
  }
  const std::string start = file.Read(0, std::min<uint64_t>(file.size(), 32));
  if (const std::string other = KnownImpostor(start); !other.empty()) {
    Bad(what, "it is " + other);
  }
  uint64_t length = 0;
  std::memcpy(&length, start.data(), sizeof length);
  if (length > kMaxHeaderBytes) {
    Bad(what, "the header has " + std::to_string(length) + " bytes, above the limit of " +
                  std::to_string(kMaxHeaderBytes));
  }
  if (length > file.size() - 8) {
    Bad(what, "the header has " + std::to_string(length) +
                  " bytes, and the file ends after " + std::to_string(file.size() - 8));
  }
  return ParseSafetensorsHeader(file.Read(8, length), file.size(), what);
}

SafetensorsIndex ReadSafetensorsIndex(const fs::path& path) {
  return ReadSafetensorsIndex(ByteFile(path));
}

std::string ReadTensorBytes(const fs::path& path, const TensorEntry& entry) {
  return ByteFile(path).Read(entry.offset, entry.size_bytes);
}

uint64_t TensorHeader::size_bytes() const {
  uint64_t bytes = DtypeBytes(dtype);
  if (bytes == 0) throw std::logic_error("no safetensors dtype: " + dtype);
  for (const int64_t dim : shape) bytes *= static_cast<uint64_t>(dim);
  return bytes;
}

namespace {

// Written by hand, not as a JSON object: that would look every name up in all before it.
std::string HeaderText(const std::vector<TensorHeader>& tensors,
                       const std::map<std::string, std::string>& metadata) {
  std::string text = "{";
  if (!metadata.empty()) text += "\"__metadata__\":" + Json(metadata).dump();
  uint64_t offset = 0;
  for (const TensorHeader& t : tensors) {
    const uint64_t end = offset + t.size_bytes();
    const Json entry = {
        {"dtype", t.dtype}, {"shape", t.shape}, {"data_offsets", {offset, end}}};
    text += (text.size() > 1 ? "," : "") + Json(t.name).dump() + ":" + entry.dump();
    offset = end;
  }
  text += "}";
  text.append((8 - text.size() % 8) % 8, ' ');
  const uint64_t length = text.size();
  return std::string(reinterpret_cast<const char*>(&length), sizeof length) + text;
}

uint64_t DataBytes(const std::vector<TensorHeader>& tensors) {
  uint64_t bytes = 0;
  for (const TensorHeader& t : tensors) bytes += t.size_bytes();
  return bytes;
}

}  // namespace

SafetensorsWriter::SafetensorsWriter(const fs::path& path,
                                     const std::vector<TensorHeader>& tensors,
                                     const std::map<std::string, std::string>& metadata)
    : header_(HeaderText(tensors, metadata)),
      file_bytes_(header_.size() + DataBytes(tensors)),
      file_(path, file_bytes_) {
  file_.Append(header_.data(), header_.size());
}

void SafetensorsWriter::Append(const void* data, size_t count) {
  file_.Append(data, count);
}

void SafetensorsWriter::Finish() {
  if (file_.written() != file_bytes_) {
    throw std::logic_error("SafetensorsWriter: the header promised " +
                           std::to_string(file_bytes_) + " bytes, " +
                           std::to_string(file_.written()) + " came");
  }
  file_.Commit();
}

void WriteSafetensors(const fs::path& path, const std::vector<TensorToWrite>& tensors,
                      const std::map<std::string, std::string>& metadata) {
  std::vector<TensorHeader> headers;
  for (const TensorToWrite& t : tensors) headers.push_back({t.name, t.dtype, t.shape});
  SafetensorsWriter writer(path, headers, metadata);
  for (size_t i = 0; i < tensors.size(); ++i) {
    writer.Append(tensors[i].data, headers[i].size_bytes());
  }
  writer.Finish();
}

}  // namespace routecast
