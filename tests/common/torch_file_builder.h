// Builds PyTorch's .bin files by hand, well formed or damaged in one place, and foreign
// files in general.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace routecast {

// `value` as little-endian bytes.
template <typename T>
std::string Raw(T value) {
  return std::string(reinterpret_cast<const char*>(&value), sizeof value);
}

// An entry of a zip archive; the fields after `data` damage it.
struct ZipPart {
  std::string name, data;
  uint16_t method = 0, flags = 0;
  std::string local_name = name;
  uint32_t local_magic = 0x04034b50;
  uint16_t local_method = 0;
  int64_t packed_bytes = -1, size_bytes = -1, local_size = -1;  // -1: as it is
  int64_t header_offset = -1;
  std::string extra = {};  // of the directory's entry
};

struct ZipDamage {
  uint16_t disk = 0;
  int64_t count = -1, directory_bytes = -1, directory_offset = -1;
  bool zip64 = false;  // sizes in the zip64 records, none in the end record
  uint32_t locator_magic = 0x07064b50, end64_magic = 0x06064b50;
  int64_t end64_offset = -1;
  std::string before_end = {};  // bytes after the directory's entries, counted as its own
};

inline std::string MakeZip(const std::vector<ZipPart>& parts,
                           const ZipDamage& damage = {}) {
  const auto pick = [](int64_t damaged, uint64_t good) {
    return damaged >= 0 ? static_cast<uint64_t>(damaged) : good;
  };
  std::string file, directory;
  for (const ZipPart& p : parts) {
    const uint64_t offset = file.size(), size = p.data.size();
    file += Raw(p.local_magic) + Raw<uint16_t>(20) + Raw(p.flags) + Raw(p.local_method) +
            Raw<uint32_t>(0) + Raw<uint32_t>(0) + Raw<uint32_t>(size) +
            Raw<uint32_t>(pick(p.local_size, size)) + Raw<uint16_t>(p.local_name.size()) +
            Raw<uint16_t>(0) + p.local_name + p.data;
    directory += Raw<uint32_t>(0x02014b50) + Raw<uint16_t>(20) + Raw<uint16_t>(20) +
                 Raw(p.flags) + Raw(p.method) + Raw<uint32_t>(0) + Raw<uint32_t>(0) +
                 Raw<uint32_t>(pick(p.packed_bytes, size)) +
                 Raw<uint32_t>(pick(p.size_bytes, size)) + Raw<uint16_t>(p.name.size()) +
                 Raw<uint16_t>(p.extra.size()) + Raw<uint16_t>(0) + Raw<uint16_t>(0) +
                 Raw<uint16_t>(0) + Raw<uint32_t>(0) +
                 Raw<uint32_t>(pick(p.header_offset, offset)) + p.name + p.extra;
  }
  directory += damage.before_end;
  const uint64_t at = pick(damage.directory_offset, file.size());
  const uint64_t bytes = pick(damage.directory_bytes, directory.size());
  const uint64_t count = pick(damage.count, parts.size());
  file += directory;
  if (damage.zip64) {
    const uint64_t end64 = pick(damage.end64_offset, file.size());
    file += Raw(damage.end64_magic) + Raw<uint64_t>(44) + Raw<uint32_t>(0) +
            Raw<uint64_t>(0) + Raw(count) + Raw(count) + Raw(bytes) + Raw(at);
    file += Raw(damage.locator_magic) + Raw<uint32_t>(0) + Raw(end64) + Raw<uint32_t>(1);
  }
  const auto short_count = static_cast<uint16_t>(damage.zip64 ? 0xffff : count);
  return file + Raw<uint32_t>(0x06054b50) + Raw(damage.disk) + Raw<uint16_t>(0) +
         Raw(short_count) + Raw(short_count) +
         Raw<uint32_t>(damage.zip64 ? 0xffffffff : bytes) +
         Raw<uint32_t>(damage.zip64 ? 0xffffffff : at) + Raw<uint16_t>(0);
}

// Opcodes.
namespace pickle {

inline std::string Text(const std::string& text) {
  return "X" + Raw<uint32_t>(text.size()) + text;
}
inline std::string Int(int64_t n) {
  return n >= INT32_MIN && n <= INT32_MAX ? "J" + Raw<int32_t>(n) : "\x8a\x08" + Raw(n);
}
inline std::string Ints(const std::vector<int64_t>& numbers) {
  std::string text = "(";
  for (const int64_t n : numbers) text += Int(n);
  return text + "t";
}
inline std::string Global(const std::string& module, const std::string& name) {
  return "c" + module + "\n" + name + "\n";
}
inline std::string OrderedDict() { return Global("collections", "OrderedDict") + ")R"; }
inline std::string Storage(const std::string& type, const std::string& key, int64_t n) {
  return "(" + Text("storage") + Global("torch", type) + Text(key) + Text("cpu") +
         Int(n) + "tQ";
}
inline std::string Tensor(const std::string& storage, int64_t offset,
                          const std::vector<int64_t>& shape,
                          const std::vector<int64_t>& strides) {
  return Global("torch._utils", "_rebuild_tensor_v2") + "(" + storage + Int(offset) +
         Ints(shape) + Ints(strides) + "\x89" + OrderedDict() + "tR";
}
inline std::string Parameter(const std::string& tensor) {
  return Global("torch._utils", "_rebuild_parameter") + "(" + tensor + "\x88" +
         OrderedDict() + "tR";
}
// A whole pickle: an OrderedDict of `items` (a key and a value each).
inline std::string Dict(const std::string& items) {
  return "\x80\x02" + OrderedDict() + "(" + items + "u.";
}
// A whole pickle that holds `value`.
inline std::string Whole(const std::string& value) { return "\x80\x02" + value + "."; }

}  // namespace pickle

// The parts of an archive: one storage "0" of `storage_bytes` zeros, and data.pkl.
inline std::vector<ZipPart> TorchParts(const std::string& data_pkl,
                                       size_t storage_bytes = 24) {
  return {{"archive/data.pkl", data_pkl},
          {"archive/byteorder", "little"},
          {"archive/data/0", std::string(storage_bytes, '\0')},
          {"archive/version", "3\n"}};
}

// A tensor "w" [2, 3] of fp32 over storage "0".
inline std::string OneTensor() {
  return pickle::Text("w") +
         pickle::Tensor(pickle::Storage("FloatStorage", "0", 6), 0, {2, 3}, {3, 1});
}

inline std::string GoodTorchFile() {
  return MakeZip(TorchParts(pickle::Dict(OneTensor())));
}

// A safetensors file of this header.
inline std::string MakeSafetensors(const std::string& header, size_t data_bytes) {
  return Raw<uint64_t>(header.size()) + header + std::string(data_bytes, 'd');
}

}  // namespace routecast
