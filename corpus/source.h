// Where text comes from: `kind:path[#option]` and the files behind it.
// Thread rule: free functions; File is immutable.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "common/byte_file.h"
#include "common/files.h"

namespace routecast {

enum class SourceKind : uint8_t { kText, kTextBlocks, kJsonl, kWikitext, kSquad, kGlue };

struct SourceSpec {
  SourceKind kind = SourceKind::kText;
  std::string path;   // a file, a folder or a glob pattern
  std::string field;  // jsonl: the field that holds the text; glue: the task, or empty
};

// Parses "text:PATH", "text:PATH#blocks", "jsonl:PATH#field" (default field: text),
// "wikitext:PATH", "squad:PATH", "glue:PATH", "glue:PATH#task". UsageError naming the
// nearest kind.
SourceSpec ParseSourceSpec(const std::string& text);

// Files of a folder that are called otherwise than files of the kind, hidden ones apart.
struct SkippedFiles {
  uint64_t count = 0;
  std::string first;  // in the order of paths
};

// The regular files of a source, sorted by path: a file itself, a folder's files
// (recursively, hidden ones left out; of a kind with a format of its own those that are
// called so, in small or capital letters: docs/corpus.md) or a glob's matches. UsageError
// where there is none. What a folder holds beside is added to `skipped`.
std::vector<fs::path> ListFiles(const SourceSpec& spec, SkippedFiles* skipped = nullptr);

// A file of text. One that ends in .zst or .gz is unpacked into memory (at most 8 GiB,
// and 256 times the packed size and 16 MiB, so that a small file cannot fill the memory);
// others are read where they are asked for. Never mapped: a file that is cut while it is
// read, or a bad sector, would then end the process by a signal.
class SourceFile {
 public:
  // Throws UsageError (missing, no permission), DataError (damaged archive, too large).
  explicit SourceFile(const fs::path& path);
  uint64_t size() const { return packed_ ? unpacked_.size() : file_.size(); }
  // REQUIRES offset + count <= size(). Throws DataError where the file has become
  // shorter, EnvironmentError (I/O).
  std::string Read(uint64_t offset, size_t count) const;

 private:
  ByteFile file_;
  bool packed_ = false;
  std::string unpacked_;
};

}  // namespace routecast
