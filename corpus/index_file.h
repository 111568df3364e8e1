// The cached result of the index pass: a sealed folder with `index.bin` (documents,
// counts) and `text.bin` (the cleaned texts, one after the other). Grammar in
// docs/corpus.md. Thread rule: free functions on different folders.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "common/files.h"

namespace routecast {

constexpr uint32_t kIndexMagic = 0x49584352;  // "RCXI"
// Of the format, and of what is read into it: since 3 names in capitals (.GZ, .ZST) are
// unpacked, too, which were read as they were.
constexpr uint32_t kIndexVersion = 3;

// One document of the index. Fixed size; written as it lies in memory (little-endian).
struct IndexEntry {
  uint64_t content_hash = 0;   // of the cleaned text
  uint64_t group = 0;          // the smallest content hash of its near-duplicates
  uint64_t text_offset = 0;    // in text.bin
  uint64_t source_offset = 0;  // in the unpacked source file
  uint32_t length_bytes = 0;   // of the cleaned text
  uint32_t file = 0;           // number of the source file
};
static_assert(sizeof(IndexEntry) == 40);

struct IndexContents {
  std::vector<std::string> files;   // paths of the sources
  std::vector<IndexEntry> entries;  // in the order of the sources
  uint64_t exact_duplicates = 0;    // dropped
  uint64_t binary_documents = 0;    // dropped
  uint64_t replaced_bytes = 0;      // not UTF-8, or NUL, in documents that stayed
  uint64_t text_bytes = 0;
  uint64_t text_hash = 0;  // XXH3 of text.bin
};

std::string SerializeIndex(const IndexContents& contents);
// Throws DataError where bytes are not a whole, sound index.
IndexContents ParseIndex(const std::string& bytes, const std::string& what);

}  // namespace routecast
