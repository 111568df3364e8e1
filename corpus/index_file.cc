#include "corpus/index_file.h"

#include <cstring>

#include "common/errors.h"

namespace routecast {
namespace {

template <typename T>
void Append(std::string* out, const T& value) {
  out->append(reinterpret_cast<const char*>(&value), sizeof value);
}

// Reads fields and refuses to read past the end.
class Cursor {
 public:
  Cursor(std::string_view bytes, const std::string& what) : bytes_(bytes), what_(what) {}
  template <typename T>
  T Read() {
    T value;
    std::memcpy(&value, Take(sizeof value).data(), sizeof value);
    return value;
  }
  std::string_view Take(uint64_t size) {
    if (size > bytes_.size() - at_)
      Fail("it ends at byte " + std::to_string(bytes_.size()));
    at_ += size;
    return bytes_.substr(at_ - size, size);
  }
  uint64_t left() const { return bytes_.size() - at_; }
  [[noreturn]] void Fail(const std::string& why) const {
    throw DataError(ErrorText(what_ + " is not a sound corpus index", why,
                              "remove it; it is made again"));
  }

 private:
  std::string_view bytes_;
  const std::string& what_;
  uint64_t at_ = 0;
};

}  // namespace

std::string SerializeIndex(const IndexContents& contents) {
  std::string out;
  Append(&out, kIndexMagic);
  Append(&out, kIndexVersion);
  Append(&out, contents.exact_duplicates);
  Append(&out, contents.binary_documents);
  Append(&out, contents.replaced_bytes);
  Append(&out, contents.text_bytes);
  Append(&out, contents.text_hash);
  Append(&out, static_cast<uint64_t>(contents.files.size()));
  Append(&out, static_cast<uint64_t>(contents.entries.size()));
  for (const std::string& file : contents.files) {
    Append(&out, static_cast<uint32_t>(file.size()));
    out += file;
  }
  for (const IndexEntry& entry : contents.entries) Append(&out, entry);
  Append(&out, Hash64(out));
  return out;
}

IndexContents ParseIndex(const std::string& bytes, const std::string& what) {
  Cursor whole(bytes, what);
  if (bytes.size() < sizeof(uint64_t)) whole.Fail("it is empty");
  const std::string_view body(bytes.data(), bytes.size() - sizeof(uint64_t));
  uint64_t checksum;
  std::memcpy(&checksum, bytes.data() + body.size(), sizeof checksum);
  Cursor cursor(body, what);
  if (checksum != Hash64(body)) cursor.Fail("the checksum does not match");
  if (cursor.Read<uint32_t>() != kIndexMagic) cursor.Fail("another kind of file");
  const auto version = cursor.Read<uint32_t>();
  if (version != kIndexVersion) cursor.Fail("version " + std::to_string(version));
  IndexContents contents;
  contents.exact_duplicates = cursor.Read<uint64_t>();
  contents.binary_documents = cursor.Read<uint64_t>();
  contents.replaced_bytes = cursor.Read<uint64_t>();
  contents.text_bytes = cursor.Read<uint64_t>();
  contents.text_hash = cursor.Read<uint64_t>();
  const auto num_files = cursor.Read<uint64_t>();
  const auto num_entries = cursor.Read<uint64_t>();
  if (num_files > cursor.left() / sizeof(uint32_t)) cursor.Fail("too many files");
  for (uint64_t i = 0; i < num_files; ++i) {
    contents.files.emplace_back(cursor.Take(cursor.Read<uint32_t>()));
  }
  if (cursor.left() % sizeof(IndexEntry) != 0 ||
      cursor.left() / sizeof(IndexEntry) != num_entries) {
    cursor.Fail("it does not hold " + std::to_string(num_entries) + " documents");
  }
  contents.entries.resize(num_entries);
  for (IndexEntry& entry : contents.entries) {
    entry = cursor.Read<IndexEntry>();
    if (entry.file >= num_files || entry.text_offset > contents.text_bytes ||
        entry.length_bytes > contents.text_bytes - entry.text_offset) {
      cursor.Fail("a document lies outside the text");
    }
  }
  return contents;
}

}  // namespace routecast
