#include "storage/npy.h"

#include <zlib.h>

#include <algorithm>
#include <limits>

#include "common/byte_file.h"
#include "storage/byte_codec.h"

namespace routecast {
namespace {

constexpr uint64_t kZip32 = 0xFFFFFFFFu;
constexpr uint32_t kLocalMagic = 0x04034b50, kCentralMagic = 0x02014b50,
                   kEndMagic = 0x06054b50;
constexpr uint32_t kEnd64Magic = 0x06064b50, kLocator64Magic = 0x07064b50;
constexpr uint16_t kVersion64 = 45, kZip64Field = 1;
constexpr uint16_t kDosDate = 0x21;  // 1980-01-01: equal exports are equal bytes

template <typename T>
void Put(std::string* out, T value) {
  out->append(reinterpret_cast<const char*>(&value), sizeof value);
}

std::string NpyHeader(const NamedArray& array) {
  std::string shape;
  for (const int64_t dim : array.shape) shape += std::to_string(dim) + ", ";
  if (array.shape.size() > 1) shape.resize(shape.size() - 2);
  std::string text = "{'descr': '" + array.npy_type +
                     "', 'fortran_order': False, 'shape': (" + shape + "), }";
  constexpr size_t kPrefix = 10;
  text.append((64 - (kPrefix + text.size() + 1) % 64) % 64, ' ');
  text += '\n';
  std::string header("\x93NUMPY\x01\x00", 8);
  Put(&header, static_cast<uint16_t>(text.size()));
  return header + text;
}

struct Entry {
  std::string name, header;
  uint64_t size = 0, offset = 0;
  uint32_t crc = 0;
};

uint32_t Crc(uint32_t crc, const void* data, uint64_t size) {
  const auto* bytes = static_cast<const Bytef*>(data);
  while (size > 0) {
    const auto part = static_cast<uInt>(std::min<uint64_t>(size, 1u << 30));
    crc = static_cast<uint32_t>(crc32(crc, bytes, part));
    bytes += part;
    size -= part;
  }
  return crc;
}

// Sizes always stand in the zip64 field: one form for small and large.
std::string LocalHeader(const Entry& e) {
  std::string out;
  Put(&out, kLocalMagic);
  for (const uint16_t v : {kVersion64, uint16_t{0}, uint16_t{0}, uint16_t{0}, kDosDate}) {
    Put(&out, v);
  }
  Put(&out, e.crc);
  Put(&out, static_cast<uint32_t>(kZip32));
  Put(&out, static_cast<uint32_t>(kZip32));
  Put(&out, static_cast<uint16_t>(e.name.size()));
  Put(&out, uint16_t{20});
  out += e.name;
  Put(&out, kZip64Field);
  Put(&out, uint16_t{16});
  Put(&out, e.size);
  Put(&out, e.size);
  return out;
}

std::string CentralHeader(const Entry& e) {
  std::string out;
  Put(&out, kCentralMagic);
  for (const uint16_t v :
       {kVersion64, kVersion64, uint16_t{0}, uint16_t{0}, uint16_t{0}, kDosDate}) {
    Put(&out, v);
  }
  Put(&out, e.crc);
  Put(&out, static_cast<uint32_t>(kZip32));
  Put(&out, static_cast<uint32_t>(kZip32));
  Put(&out, static_cast<uint16_t>(e.name.size()));
  Put(&out, uint16_t{28});
  for (int i = 0; i < 3; ++i)
    Put(&out, uint16_t{0});  // comment, disk, internal attributes
  Put(&out, uint32_t{0});    // external attributes
  Put(&out, static_cast<uint32_t>(kZip32));
  out += e.name;
  Put(&out, kZip64Field);
  Put(&out, uint16_t{24});
  Put(&out, e.size);
  Put(&out, e.size);
  Put(&out, e.offset);
  return out;
}

std::string EndRecords(uint64_t count, uint64_t start, uint64_t size) {
  std::string out;
  Put(&out, kEnd64Magic);
  Put(&out, uint64_t{44});
  Put(&out, kVersion64);
  Put(&out, kVersion64);
  Put(&out, uint32_t{0});
  Put(&out, uint32_t{0});
  for (const uint64_t v : {count, count, size, start}) Put(&out, v);
  Put(&out, kLocator64Magic);
  Put(&out, uint32_t{0});
  Put(&out, start + size);
  Put(&out, uint32_t{1});
  Put(&out, kEndMagic);
  Put(&out, uint16_t{0});
  Put(&out, uint16_t{0});
  Put(&out, static_cast<uint16_t>(0xFFFF));
  Put(&out, static_cast<uint16_t>(0xFFFF));
  Put(&out, static_cast<uint32_t>(kZip32));
  Put(&out, static_cast<uint32_t>(kZip32));
  Put(&out, uint16_t{0});
  return out;
}

}  // namespace

void WriteNpz(const fs::path& path, const std::vector<NamedArray>& arrays) {
  uint64_t size = 0;
  for (const NamedArray& array : arrays) size += array.size_bytes;
  AtomicFileWriter file(path, size);
  std::string central;
  for (const NamedArray& array : arrays) {
    Entry e;
    e.name = array.name + ".npy";
    e.header = NpyHeader(array);
    e.size = e.header.size() + array.size_bytes;
    e.offset = file.written();
    e.crc = Crc(Crc(0, e.header.data(), e.header.size()), array.data, array.size_bytes);
    const std::string local = LocalHeader(e);
    file.Append(local.data(), local.size());
    file.Append(e.header.data(), e.header.size());
    file.Append(array.data, array.size_bytes);
    central += CentralHeader(e);
  }
  const uint64_t start = file.written();
  central += EndRecords(arrays.size(), start, central.size());
  file.Append(central.data(), central.size());
  file.Commit();
}

}  // namespace routecast
