#include "common/foreign_text.h"

#include <algorithm>
#include <set>
#include <vector>

#include "common/errors.h"

namespace routecast {
namespace {

using ForeignJson = nlohmann::json;

[[noreturn]] void Refuse(const std::string& what, const std::string& reason) {
  throw DataError(
      ErrorText(what + " is not usable JSON", reason, "fetch or write the file again"));
}

// Sees every value while it is parsed, and ends the parsing by throwing.
class Guard {
 public:
  Guard(const std::string& what, int max_depth) : what_(what), max_depth_(max_depth) {}

  bool operator()(int depth, ForeignJson::parse_event_t event, ForeignJson& value) {
    if (event == ForeignJson::parse_event_t::object_start ||
        event == ForeignJson::parse_event_t::array_start) {
      if (depth >= max_depth_) {
        Refuse(what_, "nested deeper than " + std::to_string(max_depth_));
      }
    }
    if (event == ForeignJson::parse_event_t::object_start) keys_.emplace_back();
    if (event == ForeignJson::parse_event_t::object_end) keys_.pop_back();
    if (event == ForeignJson::parse_event_t::key) {
      const auto& key = value.get_ref<const std::string&>();
      if (!keys_.back().insert(key).second) {
        Refuse(what_, "key " + Quoted(key) + " stands twice in one object");
      }
    }
    return true;
  }

 private:
  const std::string& what_;
  int max_depth_;
  std::vector<std::set<std::string>> keys_;  // of the open objects
};

}  // namespace

nlohmann::json ParseForeignJson(std::string_view text, const std::string& what,
                                int max_depth) {
  ForeignJson value;
  try {
    value = ForeignJson::parse(text, Guard(what, max_depth));
  } catch (const nlohmann::json::exception& e) {
    Refuse(what, Quoted(e.what(), 240));
  }
  if (!value.is_object()) Refuse(what, "it must be one object { ... }");
  return value;
}

std::string OneLine(std::string_view text, size_t max_shown) {
  std::string line;
  for (const char c : text.substr(0, max_shown)) {
    const auto byte = static_cast<unsigned char>(c);
    line += byte < 0x20 || byte >= 0x7f ? '?' : c;
  }
  return line + (text.size() > max_shown ? "..." : "");
}

std::string JoinedLines(std::string_view text) {
  std::string joined;
  for (size_t from = 0; from < text.size();) {
    const size_t end = std::min(text.find('\n', from), text.size());
    const size_t begin = std::min(text.find_first_not_of(' ', from), end);
    if (begin < end) {
      if (!joined.empty()) joined += "; ";
      joined += text.substr(begin, end - begin);
    }
    from = end + 1;
  }
  return OneLine(joined, 480);
}

std::string Quoted(std::string_view text, size_t max_shown) {
  std::string quoted = "\"";
  quoted += OneLine(text, max_shown);
  return quoted + "\"";
}

}  // namespace routecast
