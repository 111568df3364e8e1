#include "common/torch_file.h"

#include <algorithm>
#include <map>
#include <set>

#include "common/errors.h"
#include "common/foreign_text.h"
#include "common/pickle.h"
#include "common/zip_archive.h"

namespace routecast {
namespace {

using Kind = Pickle::Kind;

constexpr int64_t kMaxDimension = int64_t{1} << 62;
constexpr size_t kMaxDimensions = 16;
// A name of a few bytes may point to a tensor that is there already; an entry takes more.
constexpr size_t kMaxTensors = 200'000;

[[noreturn]] void Bad(const ByteFile& file, const std::string& rule) {
  throw DataError(ErrorText(
      file.path().string() + " is not a usable PyTorch file", rule,
      "fetch the file again, or write torch.save(model.state_dict(), file) again"));
}

// The typed storages: pickled name -> dtype.
const std::map<std::string_view, std::string>& StorageTypes() {
  static const std::map<std::string_view, std::string> kTypes = {
      {"torch FloatStorage", "F32"},     {"torch HalfStorage", "F16"},
      {"torch BFloat16Storage", "BF16"}, {"torch DoubleStorage", "F64"},
      {"torch LongStorage", "I64"},      {"torch IntStorage", "I32"},
      {"torch ShortStorage", "I16"},     {"torch CharStorage", "I8"},
      {"torch ByteStorage", "U8"},       {"torch BoolStorage", "BOOL"}};
  return kTypes;
}

const std::vector<std::string>& AllowedGlobals() {
  static const std::vector<std::string> kGlobals = [] {
    std::vector<std::string> globals = {"collections OrderedDict",
                                        "torch._utils _rebuild_tensor_v2",
                                        "torch._utils _rebuild_parameter"};
    for (const auto& [name, dtype] : StorageTypes()) globals.emplace_back(name);
    return globals;
  }();
  return kGlobals;
}

// The archive's entries by what they are to PyTorch.
class TorchArchive {
 public:
  explicit TorchArchive(const ByteFile& file) : file_(file) {
    CheckKind();
    for (ZipEntry& entry : ReadZipDirectory(file)) {
      const std::string name = entry.name;
      entries_.emplace(name, std::move(entry));
    }
    FindPrefix();
    if (const ZipEntry* order = Find("byteorder")) {
      const std::string text =
          file_.Read(order->offset, std::min<uint64_t>(order->size_bytes, 16));
      if (text != "little") Bad(file_, "byte order " + Quoted(text) + ", not little");
    }
  }

  const ZipEntry* Find(const std::string& name) const {
    const auto it = entries_.find(prefix_ + name);
    return it == entries_.end() ? nullptr : &it->second;
  }
  std::string ReadPickle() const {
    const ZipEntry* entry = Find("data.pkl");
    if (entry->size_bytes > Pickle::kMaxBytes) {
      Bad(file_, "data.pkl has " + std::to_string(entry->size_bytes) +
                     " bytes, above the limit of " + std::to_string(Pickle::kMaxBytes));
    }
    return file_.Read(entry->offset, entry->size_bytes);
  }

 private:
  void CheckKind() const {
    const std::string start = file_.Read(0, std::min<uint64_t>(file_.size(), 32));
    if (start.empty()) Bad(file_, "it is empty");
    if (start[0] == '\x80') {
      throw DataError(ErrorText(
          file_.path().string() + " is a PyTorch file of the kind before 1.6",
          "it begins with a pickle, not with a zip archive",
          "write it again: torch.save(torch.load(file), file) with a newer PyTorch"));
    }
    if (start.rfind("PK\x03\x04", 0) == 0) return;
    const std::string other = KnownImpostor(start);
    Bad(file_, other.empty() ? "it does not begin like a zip archive" : "it is " + other);
  }
  void FindPrefix() {
    static constexpr std::string_view kPickle = "/data.pkl";
    int found = 0;
    for (const auto& [name, entry] : entries_) {
      if (name.size() <= kPickle.size() || !name.ends_with(kPickle)) continue;
      const std::string folder = name.substr(0, name.size() - kPickle.size() + 1);
      if (folder.find('/') != folder.size() - 1) continue;  // deeper: not this one
      prefix_ = folder;
      ++found;
    }
    if (found != 1) {
      Bad(file_, std::to_string(found) + " entries are called NAME/data.pkl, not 1");
    }
  }

  const ByteFile& file_;
  std::map<std::string, ZipEntry> entries_;
  std::string prefix_;  // "archive/"
};

struct Storage {
  std::string dtype;
  uint64_t offset = 0, num_elements = 0;
};

// Reads the pickle's graph as tensors.
class StateDict {
 public:
  StateDict(const ByteFile& file, const TorchArchive& archive, const Pickle& pickle)
      : file_(file), archive_(archive), pickle_(pickle) {}

  std::vector<TensorEntry> Read() {
    const Pickle::Value& dict = pickle_[pickle_.result()];
    if (dict.kind != Kind::kDict) Bad(file_, "it holds no dictionary of tensors");
    if (dict.items.size() / 2 > kMaxTensors) {
      Bad(file_, std::to_string(dict.items.size() / 2) + " tensors, above the limit of " +
                     std::to_string(kMaxTensors));
    }
    std::vector<TensorEntry> tensors;
    std::set<std::string_view> names;
    for (size_t i = 0; i < dict.items.size(); i += 2) {
      const Pickle::Value& key = pickle_[dict.items[i]];
      if (key.kind != Kind::kString) Bad(file_, "a tensor's name is no text");
      name_ = std::string(key.text);
      if (name_.empty()) Bad(file_, "a tensor has an empty name");
      if (!names.insert(key.text).second) Refuse("it stands in the dictionary twice");
      tensors.push_back(ReadTensor(dict.items[i + 1]));
    }
    std::stable_sort(
        tensors.begin(), tensors.end(),
        [](const TensorEntry& a, const TensorEntry& b) { return a.offset < b.offset; });
    return tensors;
  }

 private:
  [[noreturn]] void Refuse(const std::string& rule) const {
    Bad(file_, "tensor " + Quoted(name_) + ": " + rule);
  }
  const Pickle::Value& Argument(const Pickle::Value& call, size_t i) const {
    return pickle_[pickle_[call.items[1]].items[i]];
  }
  void CheckCount(const Pickle::Value& call, const char* function, size_t low,
                  size_t high) const {
    const size_t count = pickle_[call.items[1]].items.size();
    if (count < low || count > high) {
      Refuse(std::string(function) + " with " + std::to_string(count) + " arguments");
    }
  }

  TensorEntry ReadTensor(Pickle::Id id) {
    const Pickle::Value* value = &pickle_[id];
    if (value->kind == Kind::kCall &&
        pickle_[value->items[0]].text == "torch._utils _rebuild_parameter") {
      CheckCount(*value, "_rebuild_parameter", 3, 3);
      value = &Argument(*value, 0);
    }
    if (value->kind != Kind::kCall ||
        pickle_[value->items[0]].text != "torch._utils _rebuild_tensor_v2") {
      Refuse("its value is no tensor");
    }
    CheckCount(*value, "_rebuild_tensor_v2", 6, 7);
    const Storage storage = ReadStorage(Argument(*value, 0));
    const Pickle::Value& first = Argument(*value, 1);
    if (first.kind != Kind::kInt || first.number < 0) Refuse("its offset is no count");
    TensorEntry t;
    t.name = name_;
    t.dtype = storage.dtype;
    t.shape = Counts(Argument(*value, 2), "size");
    t.strides = Counts(Argument(*value, 3), "stride");
    Place(storage, static_cast<uint64_t>(first.number), &t);
    return t;
  }

  std::vector<int64_t> Counts(const Pickle::Value& value, const char* what) const {
    if (value.kind != Kind::kTuple) Refuse(std::string("its ") + what + " is no tuple");
    if (value.items.size() > kMaxDimensions) {
      Refuse(std::to_string(value.items.size()) + " dimensions, above " +
             std::to_string(kMaxDimensions));
    }
    std::vector<int64_t> counts;
    for (const Pickle::Id id : value.items) {
      const Pickle::Value& n = pickle_[id];
      if (n.kind != Kind::kInt || n.number < 0 || n.number > kMaxDimension) {
        Refuse(std::string("its ") + what + " holds " +
               (n.kind == Kind::kInt ? std::to_string(n.number) : "no number"));
      }
      counts.push_back(n.number);
    }
    return counts;
  }

  // ("storage", type, key, device, number of elements)
  Storage ReadStorage(const Pickle::Value& value) {
    if (value.kind != Kind::kPersistent) Refuse("it has no storage");
    const Pickle::Value& id = pickle_[value.items[0]];
    if (id.kind != Kind::kTuple || id.items.size() != 5) {
      Refuse("its storage's id is no tuple of five");
    }
    const auto part = [&](size_t i) -> const Pickle::Value& {
      return pickle_[id.items[i]];
    };
    if (part(0).kind != Kind::kString || part(0).text != "storage") {
      Refuse("its storage's id does not begin with 'storage'");
    }
    const auto type = StorageTypes().find(part(1).text);
    if (part(1).kind != Kind::kGlobal || type == StorageTypes().end()) {
      Refuse("its storage has no type");
    }
    if (part(2).kind != Kind::kString) Refuse("its storage's key is no text");
    if (part(4).kind != Kind::kInt || part(4).number < 0) {
      Refuse("its storage's length is no count");
    }
    return FindStorage(std::string(part(2).text), type->second,
                       static_cast<uint64_t>(part(4).number));
  }

  Storage FindStorage(const std::string& key, const std::string& dtype, uint64_t count) {
    const ZipEntry* entry = archive_.Find("data/" + key);
    if (entry == nullptr) Refuse("its storage " + Quoted(key) + " is not in the archive");
    if (count > entry->size_bytes || count * DtypeBytes(dtype) != entry->size_bytes) {
      Refuse("its storage " + Quoted(key) + " should hold " + std::to_string(count) +
             " of " + dtype + ", and has " + std::to_string(entry->size_bytes) +
             " bytes");
    }
    const Storage storage{dtype, entry->offset, count};
    const auto [it, is_new] = storages_.emplace(key, storage);
    if (!is_new && it->second.dtype != storage.dtype) {
      Refuse("its storage " + Quoted(key) + " is " + dtype + " here and " +
             it->second.dtype + " elsewhere");
    }
    return storage;
  }

  // Checks the view against its storage and gives it its place in the file.
  void Place(const Storage& storage, uint64_t first, TensorEntry* t) const {
    if (t->shape.size() != t->strides.size()) {
      Refuse("it has " + std::to_string(t->shape.size()) + " sizes and " +
             std::to_string(t->strides.size()) + " strides");
    }
    const bool empty = std::count(t->shape.begin(), t->shape.end(), 0) > 0;
    const uint64_t count = empty ? 0 : CountApart(*t, storage, first);
    if (empty && first > storage.num_elements) Refuse("it begins beyond its storage");
    const uint64_t bytes = DtypeBytes(t->dtype);
    t->offset = storage.offset + first * bytes;
    t->size_bytes = count * bytes;
    if (empty || IsRowMajor(*t)) t->strides.clear();
  }

  // The number of elements, all of them inside the storage and no two the same. So the
  // number is at most the storage's: a view cannot promise more than the file holds.
  uint64_t CountApart(const TensorEntry& t, const Storage& storage,
                      uint64_t first) const {
    std::vector<std::pair<uint64_t, uint64_t>> dims;  // stride, size
    for (size_t i = 0; i < t.shape.size(); ++i) {
      if (t.shape[i] == 1) continue;
      dims.emplace_back(static_cast<uint64_t>(t.strides[i]),
                        static_cast<uint64_t>(t.shape[i]));
    }
    std::sort(dims.begin(), dims.end());
    unsigned __int128 last = 0;  // of the elements, from the first one
    uint64_t count = 1;
    for (const auto& [stride, size] : dims) {
      if (stride <= last) Refuse("two of its elements share their bytes");
      last += static_cast<unsigned __int128>(stride) * (size - 1);
      if (last >= storage.num_elements) break;
      count *= size;
    }
    if (first + last >= storage.num_elements) {
      Refuse("size " + ShapeText(t.shape) + " with stride " + ShapeText(t.strides) +
             " from " + std::to_string(first) + " reaches beyond its storage of " +
             std::to_string(storage.num_elements));
    }
    return count;
  }

  static bool IsRowMajor(const TensorEntry& t) {
    int64_t expected = 1;
    for (size_t i = t.shape.size(); i-- > 0;) {
      if (t.shape[i] != 1 && t.strides[i] != expected) return false;
      expected *= t.shape[i];
    }
    return true;
  }

  const ByteFile& file_;
  const TorchArchive& archive_;
  const Pickle& pickle_;
  std::string name_;                         // of the tensor at work
  std::map<std::string, Storage> storages_;  // by key
};

}  // namespace

std::vector<TensorEntry> ReadTorchFileIndex(const ByteFile& file) {
  const TorchArchive archive(file);
  const std::string bytes = archive.ReadPickle();
  const Pickle pickle(bytes, AllowedGlobals(), file.path().string());
  return StateDict(file, archive, pickle).Read();
}

}  // namespace routecast
