// The directory of a zip archive whose entries are stored, not compressed: what PyTorch
// writes since 1.6. Format: PKWARE's APPNOTE 6.3.3, with zip64; no encryption, one disk,
// names without wildcards. Nothing is unpacked: an entry is a range of the file.
// Thread rule: free functions, safe from any thread on different files.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "common/byte_file.h"

namespace routecast {

struct ZipEntry {
  std::string name;
  uint64_t offset = 0;  // of the data, from the start of the file
  uint64_t size_bytes = 0;
  uint32_t crc = 0;  // CRC-32 of the data, as the directory says; not checked
};

// Entries in file order. Throws DataError naming the rule that the file breaks; every
// range is checked against the file, no two overlap, no name stands twice.
std::vector<ZipEntry> ReadZipDirectory(const ByteFile& file);

}  // namespace routecast
