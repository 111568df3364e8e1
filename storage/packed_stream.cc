#include "storage/packed_stream.h"

#include <zlib.h>
#include <zstd.h>

#include <algorithm>
#include <stdexcept>
#include <utility>

#include "common/errors.h"
#include "storage/import_source.h"

namespace routecast {
namespace {

constexpr size_t kBlockBytes = 1 << 20;

class ZstdUnpacker final : public Unpacker {
 public:
  ~ZstdUnpacker() override { ZSTD_freeDStream(stream_); }
  Used Unpack(std::string_view in, std::string* out) override {
    ZSTD_inBuffer from{in.data(), in.size(), 0};
    ZSTD_outBuffer to{out->data(), out->size(), 0};
    const size_t result = ZSTD_decompressStream(stream_, &to, &from);
    if (ZSTD_isError(result)) {
      throw std::runtime_error(std::string("zstd: ") + ZSTD_getErrorName(result));
    }
    at_end_ = result == 0;
    return {from.pos, to.pos};
  }
  bool AtEnd() const override { return at_end_; }

 private:
  ZSTD_DStream* const stream_ = ZSTD_createDStream();
  bool at_end_ = true;
};

class GzipUnpacker final : public Unpacker {
 public:
  GzipUnpacker() {
    if (inflateInit2(&stream_, 15 + 16) != Z_OK) {  // 16: a gzip header
      throw EnvironmentError("zlib does not start");
    }
  }
  ~GzipUnpacker() override { inflateEnd(&stream_); }
  Used Unpack(std::string_view in, std::string* out) override {
    // Files may be concatenated: behind an end another one begins.
    if (ended_ && !in.empty()) {
      inflateReset(&stream_);
      ended_ = false;
    }
    stream_.next_in = reinterpret_cast<Bytef*>(const_cast<char*>(in.data()));
    stream_.avail_in = static_cast<uInt>(in.size());
    stream_.next_out = reinterpret_cast<Bytef*>(out->data());
    stream_.avail_out = static_cast<uInt>(out->size());
    const int status = ended_ ? Z_STREAM_END : inflate(&stream_, Z_NO_FLUSH);
    if (status != Z_OK && status != Z_STREAM_END && status != Z_BUF_ERROR) {
      throw std::runtime_error(std::string("gzip: ") +
                               (stream_.msg ? stream_.msg : "damaged"));
    }
    ended_ = status == Z_STREAM_END;
    return {in.size() - stream_.avail_in, out->size() - stream_.avail_out};
  }
  bool AtEnd() const override { return ended_; }

 private:
  z_stream stream_{};
  bool ended_ = true;
};

std::unique_ptr<Unpacker> UnpackerOf(const fs::path& path) {
  if (path.extension() == ".zst") return std::make_unique<ZstdUnpacker>();
  if (path.extension() == ".gz") return std::make_unique<GzipUnpacker>();
  return nullptr;
}

}  // namespace

PackedStream::PackedStream(const fs::path& path)
    : file_(path), unpacker_(UnpackerOf(path)) {}

std::string PackedStream::Read(uint64_t offset, uint64_t count,
                               const std::string& where) {
  while (at_ + left_.size() <= offset) {
    at_ += left_.size();
    left_ = {};
    Fill(offset, where);
  }
  left_.remove_prefix(offset - at_);
  at_ = offset;
  std::string bytes;
  while (bytes.size() < count) {
    if (left_.empty()) Fill(offset + count, where);
    const std::string_view part = left_.substr(0, count - bytes.size());
    bytes += part;
    left_.remove_prefix(part.size());
    at_ += part.size();
  }
  return bytes;
}

std::string_view PackedStream::NextPart() {
  if (!Next()) {
    if (unpacker_ && !unpacker_->AtEnd()) {
      RefuseImport(file_.path().string(), "the packed file ends early");
    }
    return {};
  }
  at_ += left_.size();
  return std::exchange(left_, {});
}

uint64_t PackedStream::Size() {
  do {
    at_ += left_.size();
    left_ = {};
  } while (Next());
  return at_;
}

void PackedStream::Fill(uint64_t wanted, const std::string& where) {
  if (Next()) return;
  RefuseImport(where, file_.path().string() + " ends at byte " + std::to_string(at_) +
                          ", " + std::to_string(wanted) + " are needed");
}

// The next bytes, where all before them are taken; false at the end.
bool PackedStream::Next() {
  while (left_.empty()) {
    if (input_at_ == input_.size() && !pending_) {
      const uint64_t more = file_.size() - file_at_;
      if (more == 0) return false;
      input_ = file_.Read(file_at_, std::min<uint64_t>(more, kBlockBytes));
      input_at_ = 0;
      file_at_ += input_.size();
    }
    unpacker_ ? Unpack() : Take();
  }
  return true;
}

void PackedStream::Take() {
  buffer_.swap(input_);
  input_.clear();
  input_at_ = 0;
  left_ = buffer_;
}

void PackedStream::Unpack() {
  buffer_.resize(kBlockBytes);
  Unpacker::Used used;
  try {
    used = unpacker_->Unpack(std::string_view(input_).substr(input_at_), &buffer_);
  } catch (const std::runtime_error& error) {
    RefuseImport(file_.path().string(),
                 std::string(error.what()) + " before byte " + std::to_string(file_at_));
  }
  input_at_ += used.in;
  pending_ = used.out == buffer_.size();
  left_ = std::string_view(buffer_).substr(0, used.out);
}

}  // namespace routecast
