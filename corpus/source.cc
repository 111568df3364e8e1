#include "corpus/source.h"

#include <glob.h>
#include <zlib.h>
#include <zstd.h>

#include <algorithm>

#include "common/errors.h"
#include "corpus/task_prompts.h"

namespace routecast {
namespace {

constexpr uint64_t kMaxUnpackedBytes = uint64_t{8} << 30;
constexpr uint64_t kMaxRatio = 256, kFreeBytes = uint64_t{16} << 20;
constexpr size_t kPiece = size_t{1} << 20;

[[noreturn]] void ThrowArchive(const fs::path& path, uint64_t offset,
                               const std::string& why) {
  throw DataError(ErrorText(path.string() + " cannot be unpacked",
                            "at byte " + std::to_string(offset) + ": " + why,
                            "copy or make the file again"));
}

// Grows `out` by one piece within the limit for a packed file of `packed` bytes.
void Grow(const fs::path& path, uint64_t packed, std::string* out) {
  const uint64_t limit = std::min(kMaxUnpackedBytes, packed * kMaxRatio + kFreeBytes);
  if (out->size() + kPiece > limit) {
    ThrowArchive(path, packed, "it unpacks to more than " + FormatBytes(limit));
  }
  if (out->capacity() < out->size() + kPiece) out->reserve(2 * out->size() + kPiece);
  out->resize(out->size() + kPiece);
}

// The packed bytes, a piece at a time.
class PackedPieces {
 public:
  explicit PackedPieces(const ByteFile& file) : file_(file) {}
  // The bytes from `at` on that are at hand: none at the file's end.
  std::string_view From(uint64_t at) {
    if (at == begin_ + piece_.size()) {
      begin_ = at;
      piece_ = file_.Read(at, std::min<uint64_t>(kPiece, file_.size() - at));
    }
    return std::string_view(piece_).substr(at - begin_);
  }

 private:
  const ByteFile& file_;
  uint64_t begin_ = 0;
  std::string piece_;
};

std::string UnpackZstd(const ByteFile& file) {
  std::unique_ptr<ZSTD_DStream, decltype(&ZSTD_freeDStream)> stream(ZSTD_createDStream(),
                                                                    &ZSTD_freeDStream);
  ZSTD_DCtx_setParameter(stream.get(), ZSTD_d_windowLogMax,
                         27);  // zstd's own default limit
  PackedPieces pieces(file);
  std::string out;
  uint64_t at = 0;
  size_t used = 0, hint = 1;
  while (at < file.size() || hint != 0) {
    if (out.size() - used < kPiece / 2) Grow(file.path(), file.size(), &out);
    const std::string_view packed = pieces.From(at);
    ZSTD_inBuffer in{packed.data(), packed.size(), 0};
    ZSTD_outBuffer buffer{out.data(), out.size(), used};
    hint = ZSTD_decompressStream(stream.get(), &buffer, &in);
    at += in.pos;
    if (ZSTD_isError(hint)) ThrowArchive(file.path(), at, ZSTD_getErrorName(hint));
    const bool stuck = in.pos == 0 && buffer.pos == used;
    used = buffer.pos;
    if (stuck && hint != 0) ThrowArchive(file.path(), at, "the file ends early");
  }
  out.resize(used);
  return out;
}

std::string UnpackGzip(const ByteFile& file) {
  z_stream stream{};
  if (inflateInit2(&stream, 15 + 16) != Z_OK)
    throw EnvironmentError("zlib does not start");
  std::unique_ptr<z_stream, decltype(&inflateEnd)> guard(&stream, &inflateEnd);
  PackedPieces pieces(file);
  std::string out;
  uint64_t at = 0;
  size_t used = 0;
  int status = Z_OK;
  while (at < file.size() || status != Z_STREAM_END) {
    if (status == Z_STREAM_END) inflateReset(&stream);  // gzip files may be concatenated
    if (out.size() - used < kPiece / 2) Grow(file.path(), file.size(), &out);
    const std::string_view packed = pieces.From(at);
    stream.next_in = reinterpret_cast<Bytef*>(const_cast<char*>(packed.data()));
    stream.avail_in = static_cast<uInt>(packed.size());
    stream.next_out = reinterpret_cast<Bytef*>(out.data() + used);
    stream.avail_out = static_cast<uInt>(out.size() - used);
    const uInt given = stream.avail_in, room = stream.avail_out;
    status = inflate(&stream, Z_NO_FLUSH);
    at += given - stream.avail_in;
    used += room - stream.avail_out;
    if (status == Z_BUF_ERROR ||
        (status == Z_OK && given == 0 && room == stream.avail_out)) {
      ThrowArchive(file.path(), at, "the file ends early");
    }
    if (status != Z_OK && status != Z_STREAM_END) {
      ThrowArchive(file.path(), at, stream.msg ? stream.msg : "damaged gzip data");
    }
  }
  out.resize(used);
  return out;
}

std::vector<fs::path> GlobFiles(const std::string& pattern) {
  glob_t found{};
  std::vector<fs::path> files;
  if (::glob(pattern.c_str(), 0, nullptr, &found) == 0) {
    for (size_t i = 0; i < found.gl_pathc; ++i) {
      std::error_code none;
      if (fs::is_regular_file(found.gl_pathv[i], none))
        files.emplace_back(found.gl_pathv[i]);
    }
  }
  ::globfree(&found);
  return files;
}

// How files of a kind are called; empty: any name. Beside them folders hold a README, a
// licence.
std::vector<std::string> NamesOf(SourceKind kind) {
  switch (kind) {
    case SourceKind::kJsonl:
      return {".jsonl", ".json", ".ndjson"};
    case SourceKind::kWikitext:
      return {".txt", ".tokens", ".raw"};
    case SourceKind::kSquad:
      return {".json"};
    case SourceKind::kGlue:
      return {".tsv"};
    default:
      return {};
  }
}

std::string LowerExtension(const fs::path& path) {
  std::string name = path.extension().string();
  for (char& c : name) c = c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c;
  return name;
}

bool IsPacked(const fs::path& path) {
  return LowerExtension(path) == ".zst" || LowerExtension(path) == ".gz";
}

bool IsOfKind(const fs::path& path, SourceKind kind) {
  const std::vector<std::string> names = NamesOf(kind);
  const std::string name = LowerExtension(IsPacked(path) ? path.stem() : path);
  return names.empty() || std::find(names.begin(), names.end(), name) != names.end();
}

void Skip(const fs::path& path, SkippedFiles* skipped) {
  ++skipped->count;
  if (skipped->first.empty() || path.string() < skipped->first) {
    skipped->first = path.string();
  }
}

std::vector<fs::path> FolderFiles(const fs::path& folder, SourceKind kind,
                                  SkippedFiles* skipped) {
  std::vector<fs::path> files;
  std::error_code error, none;  // none: of a link in a circle, which is no file
  fs::recursive_directory_iterator it(folder, error), end;
  for (; !error && it != end; it.increment(error)) {
    const bool hidden = it->path().filename().string().starts_with('.');
    if (hidden && it->is_directory(none)) it.disable_recursion_pending();
    if (hidden || !it->is_regular_file(none)) continue;
    if (IsOfKind(it->path(), kind)) {
      files.push_back(it->path());
    } else {
      Skip(it->path(), skipped);
    }
  }
  if (error) ThrowErrno(error.value(), "list", folder);
  return files;
}

[[noreturn]] void ThrowNoText(const SourceSpec& spec, bool folder) {
  std::string names;
  for (const std::string& name : NamesOf(spec.kind)) {
    names += (names.empty() ? "" : ", ") + name;
  }
  const bool by_name = folder && !names.empty();
  const bool list = spec.path.find(',') != std::string::npos;
  throw UsageError(ErrorText(
      "no text at " + spec.path,
      by_name ? "no file in this folder ends in " + names + " (or these with .gz, .zst)"
              : "no such file, or an empty folder",
      by_name ? "name the files by a pattern: " + spec.path + "/*"
      : list  ? "give --data once for each source, not a list"
              : "check the path given with --data"));
}

}  // namespace

SourceSpec ParseSourceSpec(const std::string& text) {
  static const std::vector<std::string> kKinds = {"text", "jsonl", "wikitext", "squad",
                                                  "glue"};
  const size_t colon = text.find(':');
  if (colon == text.npos || colon + 1 == text.size()) {
    throw UsageError(
        ErrorText("--data=" + text + " is not kind:path", "",
                  "kinds are text, jsonl, wikitext, squad, glue: text:book.txt"));
  }
  const int kind = ParseChoice("--data", text.substr(0, colon), kKinds);
  constexpr SourceKind kByName[] = {SourceKind::kText, SourceKind::kJsonl,
                                    SourceKind::kWikitext, SourceKind::kSquad,
                                    SourceKind::kGlue};
  SourceSpec spec{.kind = kByName[kind], .path = text.substr(colon + 1), .field = ""};
  const size_t hash = spec.path.rfind('#');
  std::error_code none;
  const bool takes_option = spec.kind == SourceKind::kText ||
                            spec.kind == SourceKind::kJsonl ||
                            spec.kind == SourceKind::kGlue;
  std::string option;
  // A '#' that belongs to a file's name stays: the longest existing path wins.
  if (hash != std::string::npos && takes_option && !fs::exists(spec.path, none)) {
    option = spec.path.substr(hash + 1);
    spec.path.resize(hash);
  }
  if (spec.kind == SourceKind::kJsonl) spec.field = option.empty() ? "text" : option;
  if (spec.kind == SourceKind::kGlue && !option.empty()) {
    ParseChoice("what follows # in --data", option, GlueTasks());
    spec.field = option;
  }
  if (spec.kind == SourceKind::kText && !option.empty()) {
    ParseChoice("what follows # in --data", option, {"blocks"});
    spec.kind = SourceKind::kTextBlocks;
  }
  if (spec.path.empty()) {
    throw UsageError(ErrorText("--data=" + text + " names no path", "",
                               "give a file, a folder or a glob: text:book.txt"));
  }
  return spec;
}

std::vector<fs::path> ListFiles(const SourceSpec& spec, SkippedFiles* skipped) {
  SkippedFiles unheeded;
  std::vector<fs::path> files;
  std::error_code error;  // of a link in a circle: there is nothing
  const fs::file_status at = fs::status(spec.path, error);
  if (fs::is_regular_file(at)) {
    files.emplace_back(spec.path);
  } else if (fs::is_directory(at)) {
    files = FolderFiles(spec.path, spec.kind, skipped ? skipped : &unheeded);
  } else if (fs::exists(at)) {
    throw UsageError(ErrorText(spec.path + " is neither a file nor a folder",
                               "a pipe or a device cannot be read twice",
                               "write it to a file first"));
  } else {
    files = GlobFiles(spec.path);
  }
  if (files.empty()) ThrowNoText(spec, fs::is_directory(at));
  std::sort(files.begin(), files.end());
  return files;
}

SourceFile::SourceFile(const fs::path& path) : file_(path) {
  packed_ = IsPacked(path);
  if (!packed_) return;
  if (file_.size() == 0) ThrowArchive(path, 0, "the file is empty");
  unpacked_ = LowerExtension(path) == ".zst" ? UnpackZstd(file_) : UnpackGzip(file_);
}

std::string SourceFile::Read(uint64_t offset, size_t count) const {
  return packed_ ? unpacked_.substr(offset, count) : file_.Read(offset, count);
}

}  // namespace routecast
