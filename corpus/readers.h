// Bounded readers: bytes of a file -> records, one a document. What each kind calls a
// document is in docs/corpus.md. Foreign bytes: a damaged file is a DataError with its
// name and offset, never a crash or an allocation that the file's size does not explain.
// Thread rule: pure functions.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <string_view>

#include "corpus/source.h"

namespace routecast {

// One document before cleaning. `raw` is valid only during the call of the sink.
struct RawRecord {
  std::string_view raw;
  uint64_t offset = 0;  // in the (unpacked) file; of the file's start for squad
  uint64_t line = 0;    // of jsonl, from 1; 0 = records of this kind are no lines
};
using RecordSink = std::function<void(const RawRecord&)>;

// Cuts `bytes` into records and hands them to the sink in order. `what` names the file.
void ReadRecords(const SourceSpec& spec, std::string_view bytes, const std::string& what,
                 const RecordSink& sink);

// The records of a file. Kinds whose records are lines (jsonl, blocks, wikitext) are read
// in windows, so that memory is bounded by `window_bytes` and the longest record; others
// as a whole, up to 8 GiB. A file that gets shorter meanwhile is a DataError.
inline constexpr size_t kWindowBytes = size_t{4} << 20;
void ReadFileRecords(const SourceSpec& spec, const SourceFile& file,
                     const std::string& what, const RecordSink& sink,
                     size_t window_bytes = kWindowBytes);

// The text of a record: for jsonl its field is parsed here (the costly part, so that
// threads can share it), for others it is the record. Then CleanText.
std::string RecordText(const SourceSpec& spec, const RawRecord& record,
                       const std::string& what);

// Bytes that are not UTF-8, and NULs: what CleanText replaces.
uint64_t CountForeignBytes(std::string_view text);
// A record with at least kBinaryBytes of them, more than one byte in kBinaryShare, is no
// text: an image among texts, another encoding. It is dropped and counted.
inline constexpr uint64_t kBinaryBytes = 64, kBinaryShare = 10;
bool IsBinary(uint64_t foreign_bytes, uint64_t bytes);

// Valid UTF-8 (each invalid byte becomes U+FFFD), LF line ends, no byte order mark, no
// NUL, no blank around.
std::string CleanText(std::string_view text);

}  // namespace routecast
