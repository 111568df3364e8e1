// What the readers of foreign text share: lines, and the error of a damaged record.
// Thread rule: pure functions.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <string_view>

#include "common/errors.h"

namespace routecast {

inline constexpr uint64_t kMaxLineBytes = uint64_t{256} << 20;  // of jsonl and glue
inline constexpr int kMaxJsonDepth = 100;

// `line` counts from 1; 0 = not known.
inline std::string PlaceText(uint64_t line, uint64_t offset) {
  const std::string byte = "at byte " + std::to_string(offset);
  return line == 0 ? byte : "line " + std::to_string(line) + ", " + byte;
}

[[noreturn]] inline void ThrowRecord(const std::string& what, uint64_t offset,
                                     const std::string& why, uint64_t line = 0) {
  throw DataError(ErrorText(what + ": damaged record",
                            PlaceText(line, offset) + ": " + why,
                            "repair or leave out the file"));
}

inline bool IsBlank(std::string_view line) {
  return line.find_first_not_of(" \t\r\n\v\f") == line.npos;
}

// Calls f(line without its end, offset) for each line.
template <typename F>
void ForEachLine(std::string_view bytes, const F& f) {
  for (size_t at = 0; at < bytes.size();) {
    const size_t end = std::min(bytes.find('\n', at), bytes.size());
    f(bytes.substr(at, end - at), at);
    at = end + 1;
  }
}

}  // namespace routecast
