// Python pickles as data: the opcodes that torch.save writes (protocol 2), and no others,
// become a graph of values. Nothing is imported, called or constructed: a call in the
// pickle is a value that says which function, from a list that the caller gives, and with
// which arguments. Format: Python's pickletools.
// Thread rule: a Pickle is immutable after construction.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace routecast {

class Pickle {
 public:
  enum class Kind : uint8_t {
    kNone,
    kBool,
    kInt,
    kFloat,
    kString,
    kTuple,
    kList,
    kDict,
    kGlobal,      // a name from the allow-list
    kCall,        // items: function (a kGlobal), arguments (a kTuple)
    kPersistent,  // items: the id
  };
  using Id = uint32_t;  // of a value; the graph may be cyclic
  struct Value {
    Kind kind = Kind::kNone;
    bool ordered = false;   // kDict: made as collections.OrderedDict()
    int64_t number = 0;     // kBool, kInt
    std::string_view text;  // kString; kGlobal: "module name"
    std::vector<Id> items;  // kTuple, kList; kDict: key, value, key, value ...
  };
  static constexpr size_t kMaxBytes = size_t{32} << 20;
  static constexpr size_t kMaxValues = 2'000'000;
  static constexpr size_t kMaxStack = 100'000;

  // `allowed_globals`: "module name" each. `what` is for messages, usually the path.
  // Throws DataError naming the byte, the opcode and the rule. Memory: about a hundred
  // bytes a value, and a value takes at least a byte of the pickle. REQUIRES that `bytes`
  // and `allowed_globals` outlive the object.
  Pickle(std::string_view bytes, const std::vector<std::string>& allowed_globals,
         const std::string& what);

  const Value& operator[](Id id) const { return values_[id]; }
  Id result() const { return result_; }

 private:
  friend class PickleReader;  // pickle.cc
  std::vector<Value> values_;
  Id result_ = 0;
};

}  // namespace routecast
