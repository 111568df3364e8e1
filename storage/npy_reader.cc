#include "storage/npy_reader.h"

#include <zlib.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <set>
#include <utility>

#include "common/errors.h"
#include "common/foreign_text.h"
#include "common/stop.h"

namespace routecast {
namespace {

constexpr uint64_t kMaxHeaderBytes = 64 << 10;
constexpr uint64_t kBlockBytes = 1 << 20;
constexpr size_t kMaxDims = 8;
constexpr const char* kMagic = "\x93NUMPY";
constexpr size_t kMagicBytes = 6;
// Around elements that lie apart: so many are read for each that is wanted, at most.
constexpr uint64_t kMostBlockItems = 256;

[[noreturn]] void Bad(
    const std::string& where, const std::string& rule,
    const std::string& fix = "write it again with numpy.save or numpy.savez") {
  throw DataError(ErrorText(where + " is not a usable NumPy array", rule, fix));
}

// Reads the literal that NumPy writes: {'descr': '<u2', 'fortran_order': False,
// 'shape': (3, 4), }
class Literal {
 public:
  Literal(const std::string& text, const std::string& where)
      : text_(text), where_(where) {}
  bool Take(char c) {
    while (at_ < text_.size() && (text_[at_] == ' ' || text_[at_] == '\n')) ++at_;
    if (at_ == text_.size() || text_[at_] != c) return false;
    ++at_;
    return true;
  }
  void Expect(char c) {
    if (!Take(c)) Fail(std::string("'") + c + "' is missing");
  }
  std::string String() {
    const char quote = Take('\'') ? '\'' : '"';
    if (quote == '"') Expect('"');
    const size_t end = text_.find(quote, at_);
    if (end == std::string::npos) Fail("a text does not end");
    std::string value = text_.substr(at_, end - at_);
    at_ = end + 1;
    return value;
  }
  bool Bool() {
    Take(' ');
    for (const bool value : {true, false}) {
      const std::string word = value ? "True" : "False";
      if (text_.compare(at_, word.size(), word) != 0) continue;
      at_ += word.size();
      return value;
    }
    Fail("True or False is missing");
  }
  int64_t Number() {
    Take(' ');
    int64_t value = 0;
    const size_t from = at_;
    for (; at_ < text_.size() && text_[at_] >= '0' && text_[at_] <= '9'; ++at_) {
      if (at_ - from == 18) Fail("a number is too large");
      value = value * 10 + (text_[at_] - '0');
    }
    if (at_ == from) Fail("a number is missing");
    return value;
  }
  bool AtEnd() {
    while (Take(' ')) {
    }
    return at_ == text_.size();
  }
  [[noreturn]] void Fail(const std::string& rule) const {
    Bad(where_,
        rule + " at byte " + std::to_string(at_) + " of the header " + Quoted(text_, 60));
  }

 private:
  const std::string& text_;
  const std::string& where_;
  size_t at_ = 0;
};

uint64_t ItemBytes(const std::string& type, const std::string& where) {
  static const std::set<std::string> known = {"|u1", "|i1", "|b1", "<u2", "<i2", "<f2",
                                              "<u4", "<i4", "<f4", "<u8", "<i8", "<f8"};
  if (!known.contains(type)) {
    Bad(where, "elements of type " + Quoted(type, 40) + ", not plain numbers");
  }
  return static_cast<uint64_t>(type[2] - '0');
}

// Where the element that is number `item` in C order lies in Fortran order.
uint64_t FortranPlace(const std::vector<int64_t>& shape, uint64_t item) {
  uint64_t stride = 1, place = 0;
  for (const int64_t dim : shape) stride *= static_cast<uint64_t>(dim);
  for (size_t d = shape.size(); d-- > 0;) {
    const auto dim = static_cast<uint64_t>(shape[d]);
    stride /= dim;
    place += item % dim * stride;
    item /= dim;
  }
  return place;
}

template <typename T>
const char* TypeOf();
template <>
const char* TypeOf<uint8_t>() {
  return "|u1";
}
template <>
const char* TypeOf<uint16_t>() {
  return "<u2";
}
template <>
const char* TypeOf<uint32_t>() {
  return "<u4";
}
template <>
const char* TypeOf<uint64_t>() {
  return "<u8";
}
template <>
const char* TypeOf<int64_t>() {
  return "<i8";
}
template <>
const char* TypeOf<float>() {
  return "<f4";
}

// `count` integers of type From, each as a To; the index of the first that does not fit,
// or `count`.
template <typename From, typename To>
uint64_t Narrow(const std::string& bytes, std::vector<To>* to) {
  for (uint64_t i = 0; i < to->size(); ++i) {
    From value;
    std::memcpy(&value, bytes.data() + i * sizeof value, sizeof value);
    if (!std::in_range<To>(value)) return i;
    (*to)[i] = static_cast<To>(value);
  }
  return to->size();
}

template <typename To>
uint64_t NarrowAny(const std::string& type, const std::string& bytes,
                   std::vector<To>* to) {
  if (type == "|u1") return Narrow<uint8_t>(bytes, to);
  if (type == "|i1") return Narrow<int8_t>(bytes, to);
  if (type == "<u2") return Narrow<uint16_t>(bytes, to);
  if (type == "<i2") return Narrow<int16_t>(bytes, to);
  if (type == "<u4") return Narrow<uint32_t>(bytes, to);
  if (type == "<i4") return Narrow<int32_t>(bytes, to);
  if (type == "<u8") return Narrow<uint64_t>(bytes, to);
  return Narrow<int64_t>(bytes, to);
}

}  // namespace

NpyHeader ParseNpyHeader(const std::string& text, const std::string& where) {
  Literal in(text, where);
  NpyHeader header;
  std::set<std::string> keys;
  in.Expect('{');
  while (!in.Take('}')) {
    const std::string key = in.String();
    if (!keys.insert(key).second) in.Fail("key " + Quoted(key, 20) + " stands twice");
    in.Expect(':');
    if (key == "descr") {
      in.Take(' ');
      header.type = in.String();
    } else if (key == "fortran_order") {
      header.fortran_order = in.Bool();
    } else if (key == "shape") {
      in.Expect('(');
      while (!in.Take(')')) {
        if (header.shape.size() == kMaxDims) in.Fail("more than 8 dimensions");
        header.shape.push_back(in.Number());
        if (in.Take(',')) continue;
        in.Expect(')');
        break;
      }
    } else {
      in.Fail("unknown key " + Quoted(key, 20));
    }
    if (in.Take(',')) continue;
    in.Expect('}');
    break;
  }
  if (keys.size() != 3) in.Fail("descr, fortran_order or shape is missing");
  if (!in.AtEnd() && !in.Take('\n')) in.Fail("something follows the dict");
  return header;
}

NpyFile::NpyFile(const fs::path& path) : file_(path) {
  const std::string start =
      file_.Read(0, static_cast<size_t>(std::min<uint64_t>(file_.size(), kMagicBytes)));
  if (start == std::string(kMagic, kMagicBytes)) {
    arrays_.push_back(ReadHeader(path.stem(), 0, file_.size()));
    places_[arrays_[0].name] = 0;
    return;
  }
  entries_ = ReadZipDirectory(file_);
  for (const ZipEntry& entry : entries_) {
    if (!entry.name.ends_with(".npy")) {
      Bad(path.string() + ": " + Quoted(entry.name), "its name does not end with .npy");
    }
    arrays_.push_back(ReadHeader(entry.name.substr(0, entry.name.size() - 4),
                                 entry.offset, entry.size_bytes));
    places_.emplace(arrays_.back().name, arrays_.size() - 1);
  }
}

NpyArray NpyFile::ReadHeader(const std::string& name, uint64_t offset,
                             uint64_t size) const {
  NpyArray array;
  array.name = name;
  const std::string where = Where(array);
  constexpr uint64_t kShortest = kMagicBytes + 2 + 2;
  if (size < kShortest) Bad(where, std::to_string(size) + " bytes, not even a header");
  const std::string prefix = file_.Read(offset, kShortest);
  if (prefix.compare(0, kMagicBytes, kMagic, kMagicBytes) != 0) {
    Bad(where, "its first bytes are not NumPy's");
  }
  const auto version = static_cast<uint8_t>(prefix[kMagicBytes]);
  if (version < 1 || version > 3) {
    Bad(where, "format " + std::to_string(version) + ", this program reads 1 to 3");
  }
  const uint64_t length_bytes = version == 1 ? 2 : 4;
  const uint64_t begin = kMagicBytes + 2 + length_bytes;
  if (size < begin) Bad(where, "the header is cut");
  uint32_t length = 0;
  std::memcpy(&length, file_.Read(offset + kMagicBytes + 2, length_bytes).data(),
              length_bytes);
  if (length > kMaxHeaderBytes || length > size - begin) {
    Bad(where, "a header of " + std::to_string(length) + " bytes, " +
                   std::to_string(size - begin) + " are left");
  }
  NpyHeader header = ParseNpyHeader(file_.Read(offset + begin, length), where);
  array.type = header.type;
  array.item_bytes = ItemBytes(header.type, where);
  array.shape = std::move(header.shape);
  array.fortran = header.fortran_order && array.shape.size() > 1;
  array.offset = offset + begin + length;
  array.num_items = 1;
  const uint64_t left = size - begin - length;
  bool fits = true;
  // A zero among the dimensions makes the others harmless, but they must not overflow.
  for (const int64_t dim : array.shape) {
    fits = fits && !__builtin_mul_overflow(array.num_items, static_cast<uint64_t>(dim),
                                           &array.num_items);
  }
  if (!fits || array.num_items > left / array.item_bytes ||
      array.num_items * array.item_bytes != left) {
    Bad(where, (fits ? std::to_string(array.num_items) : "too many") + " elements of " +
                   std::to_string(array.item_bytes) + " bytes by its shape, " +
                   std::to_string(left) + " bytes are there");
  }
  return array;
}

void NpyFile::VerifyChecksums() const {
  for (size_t i = 0; i < entries_.size(); ++i) {
    const ZipEntry& entry = entries_[i];
    uint64_t crc = ::crc32(0, nullptr, 0);
    for (uint64_t at = 0; at < entry.size_bytes; at += kBlockBytes) {
      ThrowIfStopped("while reading the input");
      const std::string block = file_.Read(
          entry.offset + at, std::min<uint64_t>(kBlockBytes, entry.size_bytes - at));
      crc = ::crc32(crc, reinterpret_cast<const Bytef*>(block.data()),
                    static_cast<uInt>(block.size()));
    }
    if (crc == entry.crc) continue;
    Bad(Where(arrays_[i]), "its bytes have CRC-32 " + std::to_string(crc) +
                               ", the archive says " + std::to_string(entry.crc));
  }
}

std::string NpyFile::Where(const NpyArray& array) const {
  return path().string() + ": array " + Quoted(array.name, 60);
}

const NpyArray* NpyFile::Find(const std::string& name) const {
  const auto found = places_.find(name);
  return found == places_.end() ? nullptr : &arrays_[found->second];
}

void NpyFile::CheckRange(const NpyArray& array, uint64_t first, uint64_t count) const {
  if (first <= array.num_items && count <= array.num_items - first) return;
  Bad(Where(array), std::to_string(array.num_items) + " elements, " +
                        std::to_string(count) + " are needed from " +
                        std::to_string(first) + " on");
}

std::string NpyFile::ReadBytes(const NpyArray& array, uint64_t first,
                               uint64_t count) const {
  const uint64_t each = array.item_bytes;
  if (!array.fortran || count == 0) {
    return file_.Read(array.offset + first * each, count * each);
  }
  std::vector<uint64_t> places(count);
  for (uint64_t i = 0; i < count; ++i) places[i] = FortranPlace(array.shape, first + i);
  const auto [low, high] = std::minmax_element(places.begin(), places.end());
  const uint64_t from = *low, span = *high - from + 1;
  const bool block = span / count <= kMostBlockItems;
  const std::string around =
      block ? file_.Read(array.offset + from * each, span * each) : "";
  std::string bytes(count * each, '\0');
  for (uint64_t i = 0; i < count; ++i) {
    char* const to = bytes.data() + i * each;
    if (block) {
      std::memcpy(to, around.data() + (places[i] - from) * each, each);
    } else {
      file_.Read(array.offset + places[i] * each, to, each);
    }
  }
  return bytes;
}

template <typename T>
std::vector<T> NpyFile::Read(const NpyArray& array, uint64_t first,
                             uint64_t count) const {
  if (array.type != TypeOf<T>()) {
    Bad(Where(array), "elements of type " + array.type + ", not " + TypeOf<T>());
  }
  CheckRange(array, first, count);
  std::vector<T> values(count);
  if (array.fortran) {
    const std::string bytes = ReadBytes(array, first, count);
    if (count > 0) std::memcpy(values.data(), bytes.data(), bytes.size());
  } else if (count > 0) {
    file_.Read(array.offset + first * sizeof(T), values.data(), count * sizeof(T));
  }
  return values;
}
template std::vector<uint8_t> NpyFile::Read(const NpyArray&, uint64_t, uint64_t) const;
template std::vector<uint16_t> NpyFile::Read(const NpyArray&, uint64_t, uint64_t) const;
template std::vector<uint32_t> NpyFile::Read(const NpyArray&, uint64_t, uint64_t) const;
template std::vector<uint64_t> NpyFile::Read(const NpyArray&, uint64_t, uint64_t) const;
template std::vector<int64_t> NpyFile::Read(const NpyArray&, uint64_t, uint64_t) const;
template std::vector<float> NpyFile::Read(const NpyArray&, uint64_t, uint64_t) const;

template <typename T>
std::vector<T> NpyFile::ReadIntegers(const NpyArray& array, uint64_t first,
                                     uint64_t count) const {
  if (array.type[1] != 'u' && array.type[1] != 'i') {
    Bad(Where(array), "elements of type " + array.type + ", not integers",
        "write it with .astype(numpy.int32)");
  }
  CheckRange(array, first, count);
  const std::string bytes = ReadBytes(array, first, count);
  std::vector<T> values(count);
  const uint64_t fitting = NarrowAny(array.type, bytes, &values);
  if (fitting < count) {
    Bad(Where(array),
        "element " + std::to_string(first + fitting) + " is negative or above " +
            std::to_string(std::numeric_limits<T>::max()),
        "ids count from 0; leave rows of padding out");
  }
  return values;
}
template std::vector<uint16_t> NpyFile::ReadIntegers(const NpyArray&, uint64_t,
                                                     uint64_t) const;
template std::vector<uint32_t> NpyFile::ReadIntegers(const NpyArray&, uint64_t,
                                                     uint64_t) const;

}  // namespace routecast
