// Arrays as NumPy opens them: .npy (format 1.0) inside a stored (uncompressed) zip: an
// .npz. Source: numpy/lib/format.py; PKWARE APPNOTE 6.3 with zip64 for what is over 4
// GiB. Thread rule: plain functions.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "common/files.h"

namespace routecast {

// One array to write; `data` stays valid until the write returns.
struct NamedArray {
  std::string name;
  std::string npy_type;  // "<i8", "<u4", "<u2", "<f4", "|u1", "<u8"
  std::vector<int64_t> shape;
  const void* data = nullptr;
  uint64_t size_bytes = 0;
};

// Written under a temporary name, synced and renamed. EnvironmentError when the disk is
// full.
void WriteNpz(const fs::path& path, const std::vector<NamedArray>& arrays);

}  // namespace routecast
