#include "corpus/source.h"

#include <fcntl.h>
#include <glob.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#include <zlib.h>
#include <zstd.h>

#include <algorithm>
#include <cerrno>

#include "common/errors.h"
#include "corpus/task_prompts.h"

namespace routecast {
namespace {

constexpr uint64_t kMaxUnpackedBytes = uint64_t{8} << 30;
constexpr uint64_t kMaxRatio = 256, kFreeBytes = uint64_t{16} << 20;
constexpr size_t kPiece = size_t{1} << 20;

struct Mapping {
  void* data = nullptr;
  size_t size = 0;
};

Mapping MapFile(const fs::path& path) {
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) ThrowErrno(errno, "open", path);
  struct stat info;
  const bool regular = ::fstat(fd, &info) == 0 && S_ISREG(info.st_mode);
  Mapping mapping;
  if (regular && info.st_size > 0) {
    mapping.size = static_cast<size_t>(info.st_size);
    mapping.data = ::mmap(nullptr, mapping.size, PROT_READ, MAP_PRIVATE, fd, 0);
  }
  const int error = errno;
  ::close(fd);
  if (!regular) throw UsageError(path.string() + " is not a regular file");
  if (mapping.data == MAP_FAILED) ThrowErrno(error, "map", path);
  return mapping;
}

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

std::string UnpackZstd(const fs::path& path, std::string_view packed) {
  std::unique_ptr<ZSTD_DStream, decltype(&ZSTD_freeDStream)> stream(ZSTD_createDStream(),
                                                                    &ZSTD_freeDStream);
  ZSTD_DCtx_setParameter(stream.get(), ZSTD_d_windowLogMax,
                         27);  // zstd's own default limit
  ZSTD_inBuffer in{packed.data(), packed.size(), 0};
  std::string out;
  size_t used = 0, hint = 1;
  while (in.pos < in.size || hint != 0) {
    if (out.size() - used < kPiece / 2) Grow(path, packed.size(), &out);
    ZSTD_outBuffer buffer{out.data(), out.size(), used};
    const size_t before = in.pos;
    hint = ZSTD_decompressStream(stream.get(), &buffer, &in);
    if (ZSTD_isError(hint)) ThrowArchive(path, in.pos, ZSTD_getErrorName(hint));
    const bool stuck = in.pos == before && buffer.pos == used;
    used = buffer.pos;
    if (stuck && hint != 0) ThrowArchive(path, in.pos, "the file ends early");
  }
  out.resize(used);
  return out;
}

std::string UnpackGzip(const fs::path& path, std::string_view packed) {
  z_stream stream{};
  if (inflateInit2(&stream, 15 + 16) != Z_OK)
    throw EnvironmentError("zlib does not start");
  std::unique_ptr<z_stream, decltype(&inflateEnd)> guard(&stream, &inflateEnd);
  std::string out;
  size_t used = 0, at = 0;
  int status = Z_OK;
  while (at < packed.size() || status != Z_STREAM_END) {
    if (status == Z_STREAM_END) inflateReset(&stream);  // gzip files may be concatenated
    if (out.size() - used < kPiece / 2) Grow(path, packed.size(), &out);
    stream.next_in = reinterpret_cast<Bytef*>(const_cast<char*>(packed.data() + at));
    stream.avail_in = static_cast<uInt>(std::min(packed.size() - at, kPiece));
    stream.next_out = reinterpret_cast<Bytef*>(out.data() + used);
    stream.avail_out = static_cast<uInt>(out.size() - used);
    const uInt given = stream.avail_in, room = stream.avail_out;
    status = inflate(&stream, Z_NO_FLUSH);
    at += given - stream.avail_in;
    used += room - stream.avail_out;
    if (status == Z_BUF_ERROR ||
        (status == Z_OK && given == 0 && room == stream.avail_out)) {
      ThrowArchive(path, at, "the file ends early");
    }
    if (status != Z_OK && status != Z_STREAM_END) {
      ThrowArchive(path, at, stream.msg ? stream.msg : "damaged gzip data");
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
      if (fs::is_regular_file(found.gl_pathv[i])) files.emplace_back(found.gl_pathv[i]);
    }
  }
  ::globfree(&found);
  return files;
}

std::vector<fs::path> FolderFiles(const fs::path& folder) {
  std::vector<fs::path> files;
  std::error_code error;
  fs::recursive_directory_iterator it(folder, error), end;
  for (; !error && it != end; it.increment(error)) {
    const bool hidden = it->path().filename().string().starts_with('.');
    if (hidden && it->is_directory()) it.disable_recursion_pending();
    if (!hidden && it->is_regular_file()) files.push_back(it->path());
  }
  if (error) ThrowErrno(error.value(), "list", folder);
  return files;
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
  const bool takes_option = spec.kind == SourceKind::kText ||
                            spec.kind == SourceKind::kJsonl ||
                            spec.kind == SourceKind::kGlue;
  std::string option;
  // A '#' that belongs to a file's name stays: the longest existing path wins.
  if (hash != std::string::npos && takes_option && !fs::exists(spec.path)) {
    option = spec.path.substr(hash + 1);
    spec.path.resize(hash);
  }
  if (spec.kind == SourceKind::kJsonl) spec.field = option.empty() ? "text" : option;
  if (spec.kind == SourceKind::kGlue && !option.empty()) {
    ParseChoice("--data=glue:...#", option, GlueTasks());
    spec.field = option;
  }
  if (spec.kind == SourceKind::kText && !option.empty()) {
    ParseChoice("--data=text:...#", option, {"blocks"});
    spec.kind = SourceKind::kTextBlocks;
  }
  if (spec.path.empty()) throw UsageError("--data=" + text + " names no path");
  return spec;
}

std::vector<fs::path> ListFiles(const SourceSpec& spec) {
  std::vector<fs::path> files;
  if (fs::is_regular_file(spec.path)) {
    files.emplace_back(spec.path);
  } else if (fs::is_directory(spec.path)) {
    files = FolderFiles(spec.path);
  } else if (fs::exists(spec.path)) {
    throw UsageError(spec.path + " is neither a file nor a folder");
  } else {
    files = GlobFiles(spec.path);
  }
  if (files.empty()) {
    throw UsageError(ErrorText("no text at " + spec.path,
                               "no such file, or an empty folder",
                               "check the path given with --data"));
  }
  std::sort(files.begin(), files.end());
  return files;
}

SourceFile::SourceFile(const fs::path& path) {
  const Mapping mapping = MapFile(path);
  map_ = mapping.data;
  map_size_ = mapping.size;
  bytes_ = {static_cast<const char*>(map_), map_size_};
  const std::string extension = path.extension().string();
  if (extension != ".zst" && extension != ".gz") return;
  try {
    if (map_size_ == 0) ThrowArchive(path, 0, "the file is empty");
    owned_ = extension == ".zst" ? UnpackZstd(path, bytes_) : UnpackGzip(path, bytes_);
  } catch (...) {
    if (map_) ::munmap(map_, map_size_);
    throw;
  }
  bytes_ = owned_;
}

SourceFile::~SourceFile() {
  if (map_) ::munmap(map_, map_size_);
}

}  // namespace routecast
