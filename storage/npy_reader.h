// Arrays that NumPy wrote: .npy files (formats 1 to 3) and stored .npz archives.
// Source: numpy/lib/format.py. Foreign bytes: every size is held against the file before
// memory is taken. Thread rule: an object belongs to one thread at a time.
#pragma once

#include <cstdint>
#include <string>
#include <unordered_map>
#include <vector>

#include "common/zip_archive.h"

namespace routecast {

// Where an array's elements lie, little-endian.
struct NpyArray {
  std::string name;  // in an archive without ".npy"; of a file its stem
  std::string type;  // "<i8", "|u1", ...
  std::vector<int64_t> shape;
  uint64_t offset = 0;  // of the first element, from the start of the file
  uint64_t item_bytes = 0;
  uint64_t num_items = 0;
  bool fortran = false;  // the first index runs fastest in the file
};

class NpyFile {
 public:
  // By its first bytes a .npz or a .npy. Throws UsageError (missing), DataError (damage,
  // compressed entries, a type that is no plain number).
  explicit NpyFile(const fs::path& path);
  const fs::path& path() const { return file_.path(); }
  const std::vector<NpyArray>& arrays() const { return arrays_; }  // file order
  const NpyArray* Find(const std::string& name) const;  // nullptr where it is not

  // `count` elements from `first` on in C order, however they lie in the file (of Fortran
  // order one by one or in a block around them), of an array whose type is T's. DataError
  // for another type or a range outside the array.
  template <typename T>
  std::vector<T> Read(const NpyArray& array, uint64_t first, uint64_t count) const;
  // The same of any integer type, as uint16_t or uint32_t; DataError where one does not
  // fit.
  template <typename T>
  std::vector<T> ReadIntegers(const NpyArray& array, uint64_t first,
                              uint64_t count) const;
  // Reads all of an archive. DataError where an array is not what its checksum says.
  void VerifyChecksums() const;
  // "FILE: array NAME", for errors.
  std::string Where(const NpyArray& array) const;

 private:
  NpyArray ReadHeader(const std::string& name, uint64_t offset, uint64_t size) const;
  // The bytes of such elements, in C order. REQUIRES that they are in the array.
  std::string ReadBytes(const NpyArray& array, uint64_t first, uint64_t count) const;
  void CheckRange(const NpyArray& array, uint64_t first, uint64_t count) const;

  ByteFile file_;
  std::vector<NpyArray> arrays_;
  std::vector<ZipEntry> entries_;                   // of an archive: one an array
  std::unordered_map<std::string, size_t> places_;  // in arrays_, by name
};

// What stands in an array's header: a Python dict of three keys. DataError otherwise.
struct NpyHeader {
  std::string type;
  bool fortran_order = false;
  std::vector<int64_t> shape;
};
NpyHeader ParseNpyHeader(const std::string& text, const std::string& where);

}  // namespace routecast
