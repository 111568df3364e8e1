#include "common/pickle.h"

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstring>
#include <unordered_map>

#include "common/errors.h"
#include "common/foreign_text.h"

namespace routecast {
namespace {

constexpr size_t kMaxGlobalBytes = 200;

// Opcodes that are known and refused, for messages; what is not here has no name.
const char* NameOf(uint8_t opcode) {
  static const std::unordered_map<uint8_t, const char*> kNames = {
      {'i', "INST"},
      {'o', "OBJ"},
      {'d', "DICT"},
      {'l', "LIST"},
      {'P', "PERSID"},
      {'I', "INT"},
      {'L', "LONG"},
      {'F', "FLOAT"},
      {'S', "STRING"},
      {'T', "BINSTRING"},
      {'U', "SHORT_BINSTRING"},
      {'V', "UNICODE"},
      {'0', "POP"},
      {'1', "POP_MARK"},
      {'2', "DUP"},
      {'g', "GET"},
      {'p', "PUT"},
      {0x81, "NEWOBJ"},
      {0x82, "EXT1"},
      {0x83, "EXT2"},
      {0x84, "EXT4"},
      {0x8b, "LONG4"},
      {0x8c, "SHORT_BINUNICODE"},
      {0x8d, "BINUNICODE8"},
      {0x8e, "BINBYTES8"},
      {0x8f, "EMPTY_SET"},
      {0x90, "ADDITEMS"},
      {0x91, "FROZENSET"},
      {0x92, "NEWOBJ_EX"},
      {0x93, "STACK_GLOBAL"},
      {0x94, "MEMOIZE"},
      {0x95, "FRAME"},
      {0x96, "BYTEARRAY8"},
      {0x97, "NEXT_BUFFER"},
      {0x98, "READONLY_BUFFER"},
      {'B', "BINBYTES"},
      {'C', "SHORT_BINBYTES"}};
  const auto it = kNames.find(opcode);
  return it == kNames.end() ? "of no name" : it->second;
}

}  // namespace

// One pass over the opcodes with a stack, marks in it, and a memo.
class PickleReader {
 public:
  using Id = Pickle::Id;
  using Kind = Pickle::Kind;

  PickleReader(std::string_view bytes, const std::vector<std::string>& globals,
               const std::string& what, Pickle* pickle)
      : bytes_(bytes), globals_(globals), what_(what), values_(pickle->values_) {}

  Id Run() {
    if (bytes_.size() > Pickle::kMaxBytes) {
      Refuse(std::to_string(bytes_.size()) + " bytes, above the limit of " +
             std::to_string(Pickle::kMaxBytes));
    }
    for (;;) {
      opcode_at_ = at_;
      if (at_ == bytes_.size()) {
        Refuse(at_ == 0 ? "it is empty" : "it ends without the opcode STOP");
      }
      const uint8_t opcode = Byte();
      if (opcode == '.') break;
      const Handler handler = Handlers()[opcode];
      if (handler == nullptr) RefuseOpcode(opcode);
      handler(*this);
    }
    if (stack_.size() != 1 || !marks_.empty()) {
      Refuse(std::to_string(stack_.size()) + " values are left at its end, not 1");
    }
    if (at_ != bytes_.size()) {
      Refuse(std::to_string(bytes_.size() - at_) + " bytes follow its end");
    }
    return stack_[0];
  }

 private:
  [[noreturn]] void Refuse(const std::string& rule) const {
    throw DataError(ErrorText(
        what_ + ": its pickle is refused",
        "byte " + std::to_string(opcode_at_) + ": " + rule,
        "only a dictionary of tensors is read: torch.save(model.state_dict(), file)"));
  }

  std::string_view Bytes(size_t count) {
    if (count > bytes_.size() - at_) {
      Refuse(std::to_string(count) + " bytes are announced, " +
             std::to_string(bytes_.size() - at_) + " are left");
    }
    at_ += count;
    return bytes_.substr(at_ - count, count);
  }
  uint8_t Byte() { return static_cast<uint8_t>(Bytes(1)[0]); }
  template <typename T>
  T Number() {
    T value;
    std::memcpy(&value, Bytes(sizeof value).data(), sizeof value);
    return value;
  }
  std::string_view Line() {
    const size_t end =
        bytes_.substr(0, std::min(bytes_.size(), at_ + kMaxGlobalBytes)).find('\n', at_);
    if (end == std::string_view::npos) Refuse("a global's name does not end");
    const std::string_view line = bytes_.substr(at_, end - at_);
    at_ = end + 1;
    return line;
  }

  Pickle::Value& Push(Kind kind) {
    if (values_.size() >= Pickle::kMaxValues) {
      Refuse("more than " + std::to_string(Pickle::kMaxValues) + " values");
    }
    values_.emplace_back().kind = kind;
    PushId(static_cast<Id>(values_.size() - 1));
    return values_.back();
  }
  void PushId(Id id) {
    if (stack_.size() >= Pickle::kMaxStack) {
      Refuse("more than " + std::to_string(Pickle::kMaxStack) + " values on the stack");
    }
    stack_.push_back(id);
  }
  size_t Floor() const { return marks_.empty() ? 0 : marks_.back(); }
  Id Pop() {
    if (stack_.size() <= Floor()) {
      Refuse(marks_.empty() ? "a value is taken from an empty stack"
                            : "a value is taken from below a mark");
    }
    const Id id = stack_.back();
    stack_.pop_back();
    return id;
  }
  std::vector<Id> PopToMark() {
    if (marks_.empty()) Refuse("there is no mark");
    std::vector<Id> items(stack_.begin() + static_cast<std::ptrdiff_t>(marks_.back()),
                          stack_.end());
    stack_.resize(marks_.back());
    marks_.pop_back();
    return items;
  }
  Pickle::Value& Top(Kind kind, const char* name) {
    if (stack_.size() <= Floor()) Refuse("a value is looked for on an empty stack");
    Pickle::Value& value = values_[stack_.back()];
    if (value.kind != kind) Refuse("items are added to what is no " + std::string(name));
    return value;
  }

  void PushInt(int64_t number) { Push(Kind::kInt).number = number; }
  void PushBool(bool value) { Push(Kind::kBool).number = value; }
  void PushFloat() {
    Bytes(8);  // no float is of use here
    Push(Kind::kFloat);
  }
  void PushText() {
    const std::string_view text = Bytes(Number<uint32_t>());
    Push(Kind::kString).text = text;
  }
  void PushTuple(size_t count) {
    std::vector<Id> items(count);
    for (size_t i = count; i-- > 0;) items[i] = Pop();
    Push(Kind::kTuple).items = std::move(items);
  }
  void PushMarkedTuple() {
    std::vector<Id> items = PopToMark();
    Push(Kind::kTuple).items = std::move(items);
  }
  void PushLong() {
    const size_t count = Byte();
    if (count > 8) Refuse("an integer of " + std::to_string(count) + " bytes");
    const std::string_view bytes = Bytes(count);
    uint64_t number = 0;
    for (size_t i = 0; i < count; ++i) {
      number |= static_cast<uint64_t>(static_cast<uint8_t>(bytes[i])) << (8 * i);
    }
    if (count > 0 && count < 8 && (bytes[count - 1] & 0x80) != 0) {
      number |= ~uint64_t{0} << (8 * count);  // the sign
    }
    PushInt(static_cast<int64_t>(number));
  }
  void PushGlobal() {
    const size_t from = at_;
    Line();
    Line();
    std::string name(bytes_.substr(from, at_ - 1 - from));
    std::replace(name.begin(), name.end(), '\n', ' ');
    const auto it = std::find(globals_.begin(), globals_.end(), name);
    if (it == globals_.end()) Refuse("global " + Quoted(name) + " is not on the list");
    Push(Kind::kGlobal).text = *it;
  }
  void Put(uint32_t index) {
    if (index >= Pickle::kMaxValues) {
      Refuse("memo " + std::to_string(index) + " is above the limit of " +
             std::to_string(Pickle::kMaxValues));
    }
    if (stack_.size() <= Floor()) Refuse("nothing is there to remember");
    memo_[index] = stack_.back();
  }
  void Get(uint32_t index) {
    const auto it = memo_.find(index);
    if (it == memo_.end()) Refuse("memo " + std::to_string(index) + " was never set");
    PushId(it->second);
  }
  void Reduce() {
    const Id arguments = Pop(), function = Pop();
    if (values_[function].kind != Kind::kGlobal) Refuse("what is called is no global");
    if (values_[arguments].kind != Kind::kTuple)
      Refuse("a call's arguments are no tuple");
    if (values_[function].text == "collections OrderedDict") {
      if (!values_[arguments].items.empty()) Refuse("OrderedDict() with arguments");
      Push(Kind::kDict).ordered = true;
    } else {
      Push(Kind::kCall).items = {function, arguments};
    }
  }
  // The attributes that torch gives a state dict (_metadata) tell nothing of the tensors.
  void Build() {
    const Id state = Pop();
    if (!Top(Kind::kDict, "dictionary").ordered || values_[state].kind != Kind::kDict) {
      Refuse("BUILD of something other than an OrderedDict");
    }
  }
  void Persistent() {
    const Id id = Pop();
    Push(Kind::kPersistent).items = {id};
  }
  void SetItems(const std::vector<Id>& items) {
    if (items.size() % 2 != 0) Refuse("a key has no value");
    for (size_t i = 0; i < items.size(); i += 2) {
      const Kind key = values_[items[i]].kind;
      if (key != Kind::kString && key != Kind::kInt) {
        Refuse("a key is neither text nor a number");
      }
    }
    std::vector<Id>& all = Top(Kind::kDict, "dictionary").items;
    all.insert(all.end(), items.begin(), items.end());
  }
  void SetItem() {
    const Id value = Pop(), key = Pop();
    SetItems({key, value});
  }
  void Appends(const std::vector<Id>& items) {
    std::vector<Id>& all = Top(Kind::kList, "list").items;
    all.insert(all.end(), items.begin(), items.end());
  }
  void Protocol() {
    const int version = Byte();
    if (version != 2) {
      Refuse("pickle protocol " + std::to_string(version) + ", only 2 is read");
    }
  }
  void Mark() {
    if (marks_.size() >= Pickle::kMaxStack) Refuse("marks without end");
    marks_.push_back(stack_.size());
  }

  using Handler = void (*)(PickleReader&);

  // The list of opcodes: null where there is none.
  static const std::array<Handler, 256>& Handlers() {
    using R = PickleReader;
    static const std::array<Handler, 256> kHandlers = [] {
      std::array<Handler, 256> h{};
      h[0x80] = [](R& r) { r.Protocol(); };
      h['('] = [](R& r) { r.Mark(); };
      h['N'] = [](R& r) { r.Push(Kind::kNone); };
      h[0x88] = [](R& r) { r.PushBool(true); };
      h[0x89] = [](R& r) { r.PushBool(false); };
      h['J'] = [](R& r) { r.PushInt(r.Number<int32_t>()); };
      h['K'] = [](R& r) { r.PushInt(r.Number<uint8_t>()); };
      h['M'] = [](R& r) { r.PushInt(r.Number<uint16_t>()); };
      h[0x8a] = [](R& r) { r.PushLong(); };
      h['G'] = [](R& r) { r.PushFloat(); };
      h['X'] = [](R& r) { r.PushText(); };
      h[')'] = [](R& r) { r.PushTuple(0); };
      h[0x85] = [](R& r) { r.PushTuple(1); };
      h[0x86] = [](R& r) { r.PushTuple(2); };
      h[0x87] = [](R& r) { r.PushTuple(3); };
      h['t'] = [](R& r) { r.PushMarkedTuple(); };
      h[']'] = [](R& r) { r.Push(Kind::kList); };
      h['}'] = [](R& r) { r.Push(Kind::kDict); };
      h['a'] = [](R& r) { r.Appends({r.Pop()}); };
      h['e'] = [](R& r) { r.Appends(r.PopToMark()); };
      h['s'] = [](R& r) { r.SetItem(); };
      h['u'] = [](R& r) { r.SetItems(r.PopToMark()); };
      h['q'] = [](R& r) { r.Put(r.Number<uint8_t>()); };
      h['r'] = [](R& r) { r.Put(r.Number<uint32_t>()); };
      h['h'] = [](R& r) { r.Get(r.Number<uint8_t>()); };
      h['j'] = [](R& r) { r.Get(r.Number<uint32_t>()); };
      h['c'] = [](R& r) { r.PushGlobal(); };
      h['Q'] = [](R& r) { r.Persistent(); };
      h['R'] = [](R& r) { r.Reduce(); };
      h['b'] = [](R& r) { r.Build(); };
      return h;
    }();
    return kHandlers;
  }
  [[noreturn]] void RefuseOpcode(uint8_t opcode) const {
    char hex[8];
    std::snprintf(hex, sizeof hex, "0x%02x", opcode);
    Refuse(std::string("opcode ") + NameOf(opcode) + " (" + hex + ") is not on the list");
  }

  std::string_view bytes_;
  const std::vector<std::string>& globals_;
  const std::string& what_;
  std::vector<Pickle::Value>& values_;
  size_t at_ = 0, opcode_at_ = 0;
  std::vector<Id> stack_;
  std::vector<size_t> marks_;  // positions in the stack
  std::unordered_map<uint32_t, Id> memo_;
};

Pickle::Pickle(std::string_view bytes, const std::vector<std::string>& allowed_globals,
               const std::string& what) {
  result_ = PickleReader(bytes, allowed_globals, what, this).Run();
}

}  // namespace routecast
