#include "common/zip_archive.h"

#include <algorithm>
#include <cstring>
#include <set>

#include "common/errors.h"
#include "common/foreign_text.h"

namespace routecast {
namespace {

constexpr uint32_t kLocalMagic = 0x04034b50, kEntryMagic = 0x02014b50;
constexpr uint32_t kEndMagic = 0x06054b50, kEnd64Magic = 0x06064b50;
constexpr uint32_t kLocator64Magic = 0x07064b50;
constexpr size_t kLocalBytes = 30, kEntryBytes = 46, kEndBytes = 22;
constexpr size_t kEnd64Bytes = 56, kLocator64Bytes = 20;
constexpr uint64_t kMaxComment = 65535, kMaxDirectoryBytes = uint64_t{128} << 20;
constexpr uint64_t kMaxEntries = 1'000'000;
constexpr uint16_t kEncrypted = 1 | 1 << 6 | 1 << 13, kSizesFollow = 1 << 3;

[[noreturn]] void Bad(const ByteFile& file, const std::string& rule,
                      const char* fix = "fetch or write the file again") {
  throw DataError(
      ErrorText(file.path().string() + " is not a usable zip archive", rule, fix));
}

template <typename T>
T At(const std::string& bytes, size_t at) {
  T value;
  std::memcpy(&value, bytes.data() + at, sizeof value);
  return value;
}

struct Directory {
  uint64_t offset = 0, size_bytes = 0, count = 0;
  uint64_t end = 0;  // of what the directory may cover: where the end records begin
};

// The record that every archive ends with, and its 64-bit twin before it.
class EndRecords {
 public:
  explicit EndRecords(const ByteFile& file) : file_(file) {
    const uint64_t size = std::min(file.size(), kEndBytes + kMaxComment);
    tail_ = file.Read(file.size() - size, size);
    tail_offset_ = file.size() - size;
  }

  Directory Read() const {
    const size_t at = FindEnd();
    Directory d;
    d.end = tail_offset_ + at;
    const bool several = At<uint16_t>(tail_, at + 4) != 0 ||
                         At<uint16_t>(tail_, at + 6) != 0 ||
                         At<uint16_t>(tail_, at + 8) != At<uint16_t>(tail_, at + 10);
    if (several) Bad(file_, "it is one of several disks");
    d.count = At<uint16_t>(tail_, at + 10);
    d.size_bytes = At<uint32_t>(tail_, at + 12);
    d.offset = At<uint32_t>(tail_, at + 16);
    if (d.count == 0xffff || d.size_bytes == 0xffffffff || d.offset == 0xffffffff) {
      Read64(&d);
    }
    if (d.count > kMaxEntries) {
      Bad(file_, std::to_string(d.count) + " entries, above the limit of " +
                     std::to_string(kMaxEntries));
    }
    if (d.size_bytes > kMaxDirectoryBytes) {
      Bad(file_, "a directory of " + std::to_string(d.size_bytes) +
                     " bytes, above the limit of " + std::to_string(kMaxDirectoryBytes));
    }
    if (d.offset > d.end || d.size_bytes > d.end - d.offset) {
      Bad(file_, "the directory at " + std::to_string(d.offset) + ", " +
                     std::to_string(d.size_bytes) + " bytes, reaches beyond " +
                     std::to_string(d.end));
    }
    return d;
  }

 private:
  size_t FindEnd() const {
    for (size_t at = tail_.size() < kEndBytes ? 0 : tail_.size() - kEndBytes + 1;
         at-- > 0;) {
      if (At<uint32_t>(tail_, at) != kEndMagic) continue;
      // The comment must end with the file, or these bytes are part of something else.
      if (at + kEndBytes + At<uint16_t>(tail_, at + 20) == tail_.size()) return at;
    }
    Bad(file_, "no end record: the file is cut, or no archive");
  }
  void Read64(Directory* d) const {
    if (d->end < kLocator64Bytes) Bad(file_, "no room for a zip64 locator");
    const std::string locator = file_.Read(d->end - kLocator64Bytes, kLocator64Bytes);
    if (At<uint32_t>(locator, 0) != kLocator64Magic) Bad(file_, "no zip64 locator");
    const auto at = At<uint64_t>(locator, 8);
    if (d->end - kLocator64Bytes < kEnd64Bytes ||
        at > d->end - kLocator64Bytes - kEnd64Bytes) {
      Bad(file_,
          "the zip64 end record lies at " + std::to_string(at) + ", outside the file");
    }
    const std::string record = file_.Read(at, kEnd64Bytes);
    if (At<uint32_t>(record, 0) != kEnd64Magic) Bad(file_, "no zip64 end record");
    d->count = At<uint64_t>(record, 32);
    d->size_bytes = At<uint64_t>(record, 40);
    d->offset = At<uint64_t>(record, 48);
    d->end = at;
  }

  const ByteFile& file_;
  std::string tail_;
  uint64_t tail_offset_ = 0;
};

// One entry of the directory, with where its local header lies.
struct Listed {
  ZipEntry entry;
  uint64_t packed_bytes = 0, header_offset = 0;
  uint16_t flags = 0;
};

// Numbers that did not fit 32 bits stand in an extra field, in this order.
void Read64BitFields(const ByteFile& file, const std::string& extra, Listed* listed) {
  uint64_t* const wide[] = {&listed->entry.size_bytes, &listed->packed_bytes,
                            &listed->header_offset};
  if (std::none_of(std::begin(wide), std::end(wide),
                   [](const uint64_t* n) { return *n == 0xffffffff; })) {
    return;
  }
  for (size_t at = 0; at + 4 <= extra.size();) {
    const auto id = At<uint16_t>(extra, at), size = At<uint16_t>(extra, at + 2);
    at += 4;
    if (size > extra.size() - at) break;
    if (id == 1) {
      size_t from = at;
      for (uint64_t* n : wide) {
        if (*n != 0xffffffff) continue;
        if (from + 8 > at + size) {
          Bad(file, "entry " + Quoted(listed->entry.name) + ": its zip64 field is cut");
        }
        *n = At<uint64_t>(extra, from);
        from += 8;
      }
      return;
    }
    at += size;
  }
  Bad(file, "entry " + Quoted(listed->entry.name) + ": its zip64 field is missing");
}

Listed ReadListed(const ByteFile& file, const std::string& directory, size_t* at) {
  if (directory.size() - *at < kEntryBytes) Bad(file, "the directory is cut");
  const size_t from = *at;
  if (At<uint32_t>(directory, from) != kEntryMagic) {
    Bad(file, "no directory entry at byte " + std::to_string(from) + " of the directory");
  }
  const size_t name = At<uint16_t>(directory, from + 28);
  const size_t extra = At<uint16_t>(directory, from + 30);
  const size_t comment = At<uint16_t>(directory, from + 32);
  if (directory.size() - from - kEntryBytes < name + extra + comment) {
    Bad(file, "a directory entry reaches beyond the directory");
  }
  Listed listed;
  listed.entry.name = directory.substr(from + kEntryBytes, name);
  const auto refuse = [&](const std::string& rule) {
    Bad(file, "entry " + Quoted(listed.entry.name) + ": " + rule);
  };
  listed.flags = At<uint16_t>(directory, from + 8);
  const auto method = At<uint16_t>(directory, from + 10);
  listed.entry.crc = At<uint32_t>(directory, from + 16);
  listed.packed_bytes = At<uint32_t>(directory, from + 20);
  listed.entry.size_bytes = At<uint32_t>(directory, from + 24);
  listed.header_offset = At<uint32_t>(directory, from + 42);
  if ((listed.flags & kEncrypted) != 0) refuse("it is encrypted");
  if (method != 0) {
    Bad(file,
        "entry " + Quoted(listed.entry.name) + ": it is compressed (method " +
            std::to_string(method) + ")",
        "write it without compression; of NumPy arrays, with numpy.savez");
  }
  Read64BitFields(file, directory.substr(from + kEntryBytes + name, extra), &listed);
  if (listed.packed_bytes != listed.entry.size_bytes) {
    refuse("stored as " + std::to_string(listed.packed_bytes) + " bytes, of " +
           std::to_string(listed.entry.size_bytes));
  }
  *at = from + kEntryBytes + name + extra + comment;
  return listed;
}

// The local header says where the data begin; it must tell of the same entry.
ZipEntry Locate(const ByteFile& file, Listed listed, uint64_t data_end) {
  ZipEntry& entry = listed.entry;
  const auto refuse = [&](const std::string& rule) {
    Bad(file, "entry " + Quoted(entry.name) + ": " + rule);
  };
  if (listed.header_offset > data_end || data_end - listed.header_offset < kLocalBytes) {
    refuse("its header at " + std::to_string(listed.header_offset) +
           " lies beyond the data, which end at " + std::to_string(data_end));
  }
  const std::string header = file.Read(listed.header_offset, kLocalBytes);
  if (At<uint32_t>(header, 0) != kLocalMagic) refuse("no local header");
  if (At<uint16_t>(header, 8) != 0) refuse("compressed by its local header");
  const size_t name = At<uint16_t>(header, 26), extra = At<uint16_t>(header, 28);
  entry.offset = listed.header_offset + kLocalBytes + name + extra;
  if (entry.offset > data_end || entry.size_bytes > data_end - entry.offset) {
    refuse(std::to_string(entry.size_bytes) + " bytes at " +
           std::to_string(entry.offset) + " reach beyond the data's end at " +
           std::to_string(data_end));
  }
  if (file.Read(listed.header_offset + kLocalBytes, name) != entry.name) {
    refuse("its local header has another name");
  }
  const auto size = At<uint32_t>(header, 22);
  if ((listed.flags & kSizesFollow) == 0 && size != 0xffffffff &&
      size != entry.size_bytes) {
    refuse("its local header says " + std::to_string(size) + " bytes, the directory " +
           std::to_string(entry.size_bytes));
  }
  return entry;
}

void CheckApart(const ByteFile& file, const std::vector<ZipEntry>& entries) {
  std::set<std::string> names;
  uint64_t end = 0;
  for (const ZipEntry& e : entries) {
    if (!names.insert(e.name).second) {
      Bad(file, "entry " + Quoted(e.name) + " stands in it twice");
    }
    // Many names for the same bytes make a small file look like a huge one.
    if (e.offset < end) Bad(file, "entry " + Quoted(e.name) + " overlaps another");
    end = e.offset + e.size_bytes;
  }
}

}  // namespace

std::vector<ZipEntry> ReadZipDirectory(const ByteFile& file) {
  if (file.size() < kEndBytes) {
    Bad(file, "it has " + std::to_string(file.size()) + " bytes, not even an end record");
  }
  const Directory directory = EndRecords(file).Read();
  const std::string bytes = file.Read(directory.offset, directory.size_bytes);
  std::vector<ZipEntry> entries;
  size_t at = 0;
  for (uint64_t i = 0; i < directory.count; ++i) {
    entries.push_back(Locate(file, ReadListed(file, bytes, &at), directory.offset));
  }
  if (at != bytes.size()) {
    Bad(file, "the directory has " + std::to_string(bytes.size() - at) +
                  " bytes after its " + std::to_string(directory.count) + " entries");
  }
  std::sort(entries.begin(), entries.end(), [](const ZipEntry& a, const ZipEntry& b) {
    return a.offset != b.offset ? a.offset < b.offset : a.size_bytes < b.size_bytes;
  });
  CheckApart(file, entries);
  return entries;
}

}  // namespace routecast
