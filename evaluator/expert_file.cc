#include "evaluator/expert_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cmath>
#include <cstdio>
#include <cstring>

#include "common/errors.h"
#include "common/progress.h"
#include "common/random.h"
#include "common/stop.h"
#include "common/temporary_file.h"

namespace routecast {
namespace {

constexpr uint64_t kPage = 4096;
constexpr char kMagic[8] = {'R', 'C', 'E', 'X', 'P', 'R', 'T', '1'};
constexpr uint32_t kVersion = 1;
constexpr uint32_t kCompressedVersion = 2;  // and the second byte of dtype is a CopyKind
// A checksum does not make a number sane: no file makes its reader take more memory.
constexpr uint32_t kMostKeys = 1 << 22, kMostWidth = 1 << 20;

struct Header {
  char magic[8];
  uint32_t version, encoder_layers, decoder_layers, num_experts, d_model, d_ff, dtype,
      count;
  uint64_t content_id, stride, index_offset, index_hash, file_size;
  uint64_t header_hash;  // of the bytes before it
};
static_assert(sizeof(Header) == 88);

[[noreturn]] void Bad(const fs::path& path, const std::string& rule) {
  throw DataError(ErrorText(path.string() + " is not a whole expert file", rule,
                            "remove it; it is written again when it is missing"));
}

uint64_t HeaderHash(const Header& header) {
  return Hash64(&header, offsetof(Header, header_hash));
}

// What the numbers of a header must be, whoever wrote them.
void CheckHeader(const Header& h, const fs::path& path) {
  const uint64_t layers = uint64_t{h.encoder_layers} + h.decoder_layers;
  const uint32_t dtype = h.dtype & 0xff, copies = h.dtype >> 8;
  if (layers > kMostKeys || layers * h.num_experts > kMostKeys ||
      h.count > layers * h.num_experts || h.d_model > kMostWidth || h.d_ff > kMostWidth) {
    Bad(path, "sizes are out of range");
  }
  if (dtype > kLastExpertDtype || copies > kLastCopyKind ||
      (h.version == kVersion) != (copies == 0)) {
    Bad(path, "stored as " + std::to_string(h.dtype) + " in version " +
                  std::to_string(h.version) + ", which is no type");
  }
}

std::string ReadAt(int fd, uint64_t offset, uint64_t size, const fs::path& path) {
  std::string bytes(size, '\0');
  uint64_t done = 0;
  while (done < size) {
    const ssize_t n =
        ::pread(fd, bytes.data() + done, size - done, static_cast<off_t>(offset + done));
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) ThrowErrno(errno, "read", path);
    if (n == 0) Bad(path, "cut at byte " + std::to_string(offset + done));
    done += static_cast<uint64_t>(n);
  }
  return bytes;
}

}  // namespace

ExpertFileWriter::ExpertFileWriter(fs::path path, const ExpertFileSpec& spec)
    : path_(std::move(path)), spec_(spec) {
  fd_ = OpenTemporary(path_, &temporary_);
}

ExpertFileWriter::~ExpertFileWriter() {
  if (fd_ < 0) return;
  ::unlink(temporary_.c_str());
  ::close(fd_);
}

void ExpertFileWriter::Write(const void* data, uint64_t size, uint64_t offset) {
  const char* bytes = static_cast<const char*>(data);
  while (size > 0) {
    const ssize_t n = ::pwrite(fd_, bytes, size, static_cast<off_t>(offset));
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) ThrowErrno(errno, "write", temporary_);
    bytes += n;
    offset += static_cast<uint64_t>(n);
    size -= static_cast<uint64_t>(n);
  }
}

void ExpertFileWriter::Append(ExpertKey key, std::span<const std::byte> wi,
                              std::span<const std::byte> wo) {
  const bool halves = wi.size() == wo.size() || spec_.copies != CopyKind::kLossless;
  if (!halves || wi.size() + wo.size() != spec_.blob_bytes()) {
    throw std::logic_error("ExpertFileWriter: an expert of another size");
  }
  const uint64_t offset = kPage + index_.size() * spec_.stride_bytes();
  std::string blob(spec_.stride_bytes(), '\0');
  std::memcpy(blob.data(), wi.data(), wi.size());
  std::memcpy(blob.data() + wi.size(), wo.data(), wo.size());
  index_.push_back({static_cast<uint32_t>(key.layer), static_cast<uint32_t>(key.expert),
                    Hash64(blob.data(), spec_.blob_bytes())});
  Write(blob.data(), blob.size(), offset);
}

void ExpertFileWriter::Finish() {
  const uint64_t index_offset = kPage + index_.size() * spec_.stride_bytes();
  const uint64_t index_bytes = index_.size() * sizeof(IndexEntry);
  Write(index_.data(), index_bytes, index_offset);
  Header header = {};
  std::memcpy(header.magic, kMagic, sizeof kMagic);
  const bool lossless = spec_.copies == CopyKind::kLossless;
  header.version = lossless ? kVersion : kCompressedVersion;
  header.encoder_layers = static_cast<uint32_t>(spec_.geometry.encoder_layers);
  header.decoder_layers = static_cast<uint32_t>(spec_.geometry.decoder_layers);
  header.num_experts = static_cast<uint32_t>(spec_.geometry.num_experts);
  header.d_model = static_cast<uint32_t>(spec_.geometry.d_model);
  header.d_ff = static_cast<uint32_t>(spec_.d_ff);
  header.dtype = static_cast<uint32_t>(spec_.dtype) | static_cast<uint32_t>(spec_.copies)
                                                          << 8;
  header.count = static_cast<uint32_t>(index_.size());
  header.content_id = spec_.content_id;
  header.stride = spec_.stride_bytes();
  header.index_offset = index_offset;
  header.index_hash = Hash64(index_.data(), index_bytes);
  header.file_size = index_offset + index_bytes;
  header.header_hash = HeaderHash(header);
  std::string page(kPage, '\0');
  if (::fsync(fd_) != 0) ThrowErrno(errno, "fsync", temporary_);
  std::memcpy(page.data(), &header, sizeof header);
  Write(page.data(), page.size(), 0);
  if (::fsync(fd_) != 0) ThrowErrno(errno, "fsync", temporary_);
  ::posix_fadvise(fd_, 0, 0, POSIX_FADV_DONTNEED);  // leaves the page cache to others
  ::close(fd_);
  fd_ = -1;
  fs::rename(temporary_, path_);
  SyncPath(fs::absolute(path_).parent_path());
}

ExpertFile::ExpertFile(const fs::path& path) : path_(path) {
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) ThrowErrno(errno, "open", path);
  struct Closer {
    int fd;
    ~Closer() { ::close(fd); }
  } closer{fd};
  struct stat info;
  if (::fstat(fd, &info) != 0) ThrowErrno(errno, "stat", path);
  size_ = static_cast<uint64_t>(info.st_size);
  if (!S_ISREG(info.st_mode) || size_ < kPage) Bad(path, "shorter than its header");
  Header header;
  std::memcpy(&header, ReadAt(fd, 0, sizeof header, path).data(), sizeof header);
  if (std::memcmp(header.magic, kMagic, sizeof kMagic) != 0)
    Bad(path, "magic is missing");
  if (header.version != kVersion && header.version != kCompressedVersion) {
    Bad(path, "version " + std::to_string(header.version) + ", known " +
                  std::to_string(kVersion) + " and " +
                  std::to_string(kCompressedVersion));
  }
  if (header.header_hash != HeaderHash(header)) Bad(path, "header checksum differs");
  CheckHeader(header, path);
  spec_.geometry = {
      static_cast<int>(header.encoder_layers), static_cast<int>(header.decoder_layers),
      static_cast<int>(header.num_experts), 1, static_cast<int>(header.d_model)};
  spec_.d_ff = static_cast<int>(header.d_ff);
  spec_.dtype = static_cast<ExpertDtype>(header.dtype & 0xff);
  spec_.copies = static_cast<CopyKind>(header.dtype >> 8);
  spec_.content_id = header.content_id;
  count_ = static_cast<int>(header.count);
  const uint64_t index_bytes = uint64_t{header.count} * 16;
  if (header.file_size != size_ || header.stride != spec_.stride_bytes() ||
      header.index_offset != kPage + header.count * header.stride ||
      header.index_offset + index_bytes != size_) {
    Bad(path, "sizes disagree: header " + std::to_string(header.file_size) + ", file " +
                  std::to_string(size_) + " bytes");
  }
  const std::string index = ReadAt(fd, header.index_offset, index_bytes, path);
  if (Hash64(index) != header.index_hash) Bad(path, "index checksum differs");
  position_.assign(static_cast<size_t>(spec_.geometry.num_keys()), -1);
  for (int i = 0; i < count_; ++i) {
    uint32_t key[2];
    uint64_t hash;
    std::memcpy(key, index.data() + 16 * i, 8);
    std::memcpy(&hash, index.data() + 16 * i + 8, 8);
    if (key[0] >= static_cast<uint32_t>(spec_.geometry.num_layers()) ||
        key[1] >= header.num_experts) {
      Bad(path, "index entry " + std::to_string(i) + " is out of range");
    }
    position_[key[0] * header.num_experts + key[1]] = i;
    hashes_.push_back(hash);
  }
  was_right_ = std::make_unique<std::atomic<bool>[]>(hashes_.size());
}

std::vector<ExpertKey> ExpertFile::keys() const {
  std::vector<ExpertKey> keys;
  for (size_t i = 0; i < position_.size(); ++i) {
    if (position_[i] >= 0)
      keys.push_back(ExpertKey::FromIndex(static_cast<int>(i), spec_.geometry));
  }
  return keys;
}

uint64_t ExpertFile::Offset(ExpertKey key) const {
  const int position = position_[key.Index(spec_.geometry)];
  if (position < 0) throw std::logic_error("ExpertFile: the expert is not in this file");
  return kPage + static_cast<uint64_t>(position) * spec_.stride_bytes();
}

void ExpertFile::Check(ExpertKey key, const std::byte* blob) const {
  const int position = position_[key.Index(spec_.geometry)];
  if (Hash64(blob, spec_.blob_bytes()) != hashes_[position]) {
    Bad(path_, "layer " + std::to_string(key.layer) + " expert " +
                   std::to_string(key.expert) + ": checksum differs");
  }
}

void ExpertFile::CheckOnce(ExpertKey key, const std::byte* blob) const {
  std::atomic<bool>& was_right =
      was_right_[static_cast<size_t>(position_[key.Index(spec_.geometry)])];
  if (was_right) return;
  Check(key, blob);
  was_right = true;
}

void WriteSyntheticExperts(const fs::path& path, const ExpertFileSpec& spec,
                           const std::vector<int>& layers, bool quiet) {
  const uint64_t count = layers.size() * static_cast<uint64_t>(spec.geometry.num_experts);
  const uint64_t needed = count * spec.stride_bytes() + (uint64_t{64} << 20);
  if (FreeBytes(path) < needed) {
    throw EnvironmentError(ErrorText(
        "no room for the synthetic experts: " + path.string(),
        FormatBytes(needed) + " needed, " + FormatBytes(FreeBytes(path)) + " free",
        "free some space or choose another cache folder"));
  }
  ExpertFileWriter writer(path, spec);
  Progress progress("synthetic experts", "experts", count, quiet);
  const uint64_t half = spec.blob_bytes() / 2 / DtypeBytes(spec.dtype);
  std::vector<float> weights(2 * half);
  std::vector<std::byte> stored(spec.blob_bytes());
  uint64_t done = 0;
  for (int layer : layers) {
    for (int expert = 0; expert < spec.geometry.num_experts; ++expert) {
      ThrowIfStopped("while writing synthetic experts");
      const uint64_t stream = Mix(spec.content_id, static_cast<uint64_t>(layer),
                                  static_cast<uint64_t>(expert));
      const auto fill = [&](uint64_t from, int fan_in) {
        const float scale = std::sqrt(3.f / static_cast<float>(fan_in)) * 0x1.0p-31f;
        for (uint64_t i = 0; i < half; i += 2) {
          const uint64_t bits = Mix(stream ^ (from + i));
          weights[from + i] = scale * static_cast<float>(static_cast<int32_t>(bits));
          weights[from + i + 1] =
              scale * static_cast<float>(static_cast<int32_t>(bits >> 32));
        }
      };
      fill(0, spec.geometry.d_model);
      fill(half, spec.d_ff);
      StoreWeights(weights.data(), weights.size(), spec.dtype, stored.data());
      const std::span<const std::byte> bytes(stored);
      writer.Append({layer, expert}, bytes.first(stored.size() / 2),
                    bytes.subspan(stored.size() / 2));
      progress.Update(++done);
    }
  }
  writer.Finish();
  progress.Finish();
}

std::shared_ptr<const ExpertFile> OpenIfGood(const fs::path& path,
                                             const ExpertFileSpec& spec, int count) {
  if (!fs::exists(path)) return nullptr;
  try {
    auto file = std::make_shared<const ExpertFile>(path);
    if (file->spec() == spec && file->count() == count) return file;
  } catch (const DataError& e) {
    std::fprintf(stderr, "%s\nit is written again\n", e.what());
  }
  return nullptr;
}

}  // namespace routecast
