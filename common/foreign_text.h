// Text from files that others wrote: JSON that must say everything once, and names fit
// for an error message. Thread rule: free functions, safe from any thread.
#pragma once

#include <string>
#include <string_view>

#include "nlohmann/json.hpp"

namespace routecast {

// A JSON object with its keys sorted. Throws DataError with `what` (usually the path)
// where the text is no JSON or no object, an object names a key twice (a common parser
// would keep one of the two), or values are nested deeper than `max_depth`.
nlohmann::json ParseForeignJson(std::string_view text, const std::string& what,
                                int max_depth);

// `text` on one line, printable, without the marks: at most `max_shown` characters of it,
// and ... where it is longer.
std::string OneLine(std::string_view text, size_t max_shown = 240);
// An error's lines (ErrorText) on one line, to stand within another error.
std::string JoinedLines(std::string_view text);
// `text` in quotation marks, on one line, printable, at most `max_shown` characters of
// it.
std::string Quoted(std::string_view text, size_t max_shown = 100);

}  // namespace routecast
