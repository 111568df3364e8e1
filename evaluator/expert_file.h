// Experts on disk, each contiguous and 4 KiB-aligned, so that one direct read brings one
// expert.
//
// Little-endian. Page 0: the header below, zero-padded to 4096 bytes. Then `count` blobs,
// each `stride` bytes apart: wi [d_ff, d_model] then wo [d_model, d_ff], row-major (or
// compressed, expert_codec.h: version 2), zero-padded to 4 KiB. Then the index: `count`
// times { u32 layer, u32 expert, u64 XXH3-64 of the blob without padding }, at
// index_offset, to the end of the file. The header is written last and the file renamed
// into place after it: a file under its final name is whole.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "common/files.h"
#include "common/routing.h"
#include "evaluator/expert_codec.h"

namespace routecast {

struct ExpertFileSpec {
  MoeGeometry geometry;
  int d_ff = 0;
  ExpertDtype dtype = ExpertDtype::kFloat32;
  uint64_t content_id = 0;  // whose weights: a model's fingerprint, or a synthetic seed
  CopyKind copies = CopyKind::kLossless;  // how the blobs are stored
  // Of an expert as the model reads it.
  uint64_t expert_bytes() const {
    return 2 * static_cast<uint64_t>(geometry.d_model) * d_ff * DtypeBytes(dtype);
  }
  // Of an expert in the file.
  uint64_t blob_bytes() const {
    if (copies == CopyKind::kLossless) return expert_bytes();
    const auto d = static_cast<uint64_t>(geometry.d_model),
               f = static_cast<uint64_t>(d_ff);
    return CodedBytes(copies, f, d) + CodedBytes(copies, d, f);
  }
  uint64_t stride_bytes() const { return (blob_bytes() + 4095) / 4096 * 4096; }
  bool operator==(const ExpertFileSpec&) const = default;
};

// Thread rule: one thread. Nothing is under the final name before Finish.
class ExpertFileWriter {
 public:
  ExpertFileWriter(fs::path path, const ExpertFileSpec& spec);
  ~ExpertFileWriter();  // removes what was not finished
  ExpertFileWriter(const ExpertFileWriter&) = delete;
  ExpertFileWriter& operator=(const ExpertFileWriter&) = delete;
  // REQUIRES blob_bytes() bytes in all; each key once. EnvironmentError when the disk is
  // full.
  void Append(ExpertKey key, std::span<const std::byte> wi,
              std::span<const std::byte> wo);
  void Finish();

 private:
  void Write(const void* data, uint64_t size, uint64_t offset);
  fs::path path_, temporary_;
  ExpertFileSpec spec_;
  int fd_ = -1;
  struct IndexEntry {
    uint32_t layer, expert;
    uint64_t hash;
  };
  std::vector<IndexEntry> index_;
};

// An open, checked expert file. Thread rule: immutable but for what CheckOnce remembers;
// any thread.
class ExpertFile {
 public:
  // Throws UsageError (missing), DataError naming the broken rule (magic, version,
  // checksum, size). Blobs are checked by Check and CheckOnce, against the index.
  explicit ExpertFile(const fs::path& path);
  const ExpertFileSpec& spec() const { return spec_; }
  const fs::path& path() const { return path_; }
  bool Contains(ExpertKey key) const { return position_[key.Index(spec_.geometry)] >= 0; }
  int count() const { return count_; }
  std::vector<ExpertKey> keys() const;   // those it contains, ascending
  uint64_t Offset(ExpertKey key) const;  // REQUIRES Contains
  uint64_t size_bytes() const { return size_; }
  // Throws DataError when `blob` (blob_bytes) is not what was written for `key`.
  void Check(ExpertKey key, const std::byte* blob) const;
  // The same until it was right once; then nothing. What a process reads over and over is
  // compared at its first read.
  void CheckOnce(ExpertKey key, const std::byte* blob) const;

 private:
  fs::path path_;
  ExpertFileSpec spec_;
  uint64_t size_ = 0;
  std::unique_ptr<std::atomic<bool>[]> was_right_;  // by position
  int count_ = 0;
  std::vector<int> position_;     // by key index, -1 absent
  std::vector<uint64_t> hashes_;  // by position
};

// The file, where it is there, sound, of this content and with `count` experts; else null
// (a damaged one is named on stderr: who asks writes it again).
std::shared_ptr<const ExpertFile> OpenIfGood(const fs::path& path,
                                             const ExpertFileSpec& spec, int count);

// Writes distinct weights for every expert of `layers` (global MoE layers), uniform with
// the deviation that keeps activations near one: a pure function of content_id, key and
// element. `quiet` silences the progress line.
void WriteSyntheticExperts(const fs::path& path, const ExpertFileSpec& spec,
                           const std::vector<int>& layers, bool quiet);

}  // namespace routecast
