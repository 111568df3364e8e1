#include "corpus/readers.h"

#include <algorithm>
#include <vector>

#include "common/errors.h"
#include "common/run_record.h"

namespace routecast {
namespace {

constexpr uint64_t kMaxJsonBytes = uint64_t{1} << 30;
constexpr uint64_t kMaxLineBytes = uint64_t{256} << 20;

[[noreturn]] void ThrowRecord(const std::string& what, uint64_t offset,
                              const std::string& why) {
  throw DataError(ErrorText(what + ": damaged record",
                            "at byte " + std::to_string(offset) + ": " + why,
                            "repair or leave out the file"));
}

bool IsBlank(std::string_view line) {
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

// Records that are runs of whole lines: starts_record tells where the next one begins and
// whether the line itself is kept.
void ReadBlocks(std::string_view bytes, const RecordSink& sink) {
  size_t start = 0, end = 0;  // of the block so far
  ForEachLine(bytes, [&](std::string_view line, size_t at) {
    if (!IsBlank(line)) {
      if (end == start) start = at;
      end = at + line.size();
      return;
    }
    if (end > start) sink({bytes.substr(start, end - start), start});
    start = end = 0;
  });
  if (end > start) sink({bytes.substr(start, end - start), start});
}

// " = Title = ": one equals sign on either side.
bool IsArticleTitle(std::string_view line) {
  while (!line.empty() && (line.back() == ' ' || line.back() == '\r'))
    line.remove_suffix(1);
  if (!line.empty() && line.front() == ' ') line.remove_prefix(1);
  return line.size() > 4 && line.starts_with("= ") && line.ends_with(" =") &&
         !line.starts_with("= =") && !line.ends_with("= =");
}

void ReadWikitext(std::string_view bytes, const RecordSink& sink) {
  size_t start = 0;
  bool after_blank = true;  // titles stand alone: a line of an article may look like one
  const auto emit = [&](size_t end) {
    const std::string_view article = bytes.substr(start, end - start);
    if (!IsBlank(article)) sink({article, start});
    start = end;
  };
  ForEachLine(bytes, [&](std::string_view line, size_t at) {
    if (after_blank && at > start && IsArticleTitle(line)) {
      const size_t next = at + line.size() + 1;
      const size_t next_end = next < bytes.size() ? bytes.find('\n', next) : next;
      if (next >= bytes.size() || IsBlank(bytes.substr(next, next_end - next))) emit(at);
    }
    after_blank = IsBlank(line);
  });
  if (start < bytes.size()) emit(bytes.size());
}

void ReadJsonl(std::string_view bytes, const std::string& what, const RecordSink& sink) {
  ForEachLine(bytes, [&](std::string_view line, size_t at) {
    if (line.size() > kMaxLineBytes) ThrowRecord(what, at, "a line above 256 MiB");
    if (!IsBlank(line)) sink({line, at});
  });
}

const Json& Member(const Json& object, const char* key, const std::string& what) {
  if (!object.is_object() || !object.contains(key)) {
    ThrowRecord(what, 0, std::string("no \"") + key + "\" where SQuAD has one");
  }
  return object[key];
}

const Json& Array(const Json& object, const char* key, const std::string& what) {
  const Json& value = Member(object, key, what);
  if (!value.is_array()) ThrowRecord(what, 0, std::string("\"") + key + "\" is no list");
  return value;
}

std::string Text(const Json& object, const char* key, const std::string& what) {
  const Json& value = Member(object, key, what);
  if (!value.is_string()) ThrowRecord(what, 0, std::string("\"") + key + "\" is no text");
  return value.get<std::string>();
}

void ReadSquad(std::string_view bytes, const std::string& what, const RecordSink& sink) {
  if (bytes.size() > kMaxJsonBytes) ThrowRecord(what, 0, "larger than 1 GiB");
  const Json root = ParseJson(CleanText(bytes), what);
  for (const Json& article : Array(root, "data", what)) {
    for (const Json& paragraph : Array(article, "paragraphs", what)) {
      std::string text = Text(paragraph, "context", what);
      for (const Json& qa : Array(paragraph, "qas", what)) {
        text += "\n" + Text(qa, "question", what);
      }
      sink({text, 0});
    }
  }
}

std::vector<std::string_view> SplitTabs(std::string_view line) {
  if (line.ends_with('\r')) line.remove_suffix(1);
  std::vector<std::string_view> columns;
  for (size_t at = 0;;) {
    const size_t tab = line.find('\t', at);
    columns.push_back(line.substr(at, tab == line.npos ? tab : tab - at));
    if (tab == line.npos) return columns;
    at = tab + 1;
  }
}

// The columns of a GLUE task's header that are text.
std::vector<size_t> TextColumns(const std::vector<std::string_view>& header) {
  constexpr std::string_view kText[] = {
      "sentence",  "sentence1", "sentence2", "question", "question1",
      "question2", "#1 String", "#2 String", "premise",  "hypothesis"};
  std::vector<size_t> columns;
  for (size_t i = 0; i < header.size(); ++i) {
    if (std::find(std::begin(kText), std::end(kText), header[i]) != std::end(kText)) {
      columns.push_back(i);
    }
  }
  return columns;
}

void ReadGlue(std::string_view bytes, const std::string& what, const RecordSink& sink) {
  std::vector<size_t> text_columns;
  size_t num_columns = 0;
  if (bytes.starts_with("\xEF\xBB\xBF")) bytes.remove_prefix(3);
  ForEachLine(bytes, [&](std::string_view line, size_t at) {
    if (IsBlank(line)) return;
    const auto columns = SplitTabs(line);
    if (num_columns == 0) {
      num_columns = columns.size();
      text_columns = TextColumns(columns);
      if (!text_columns.empty()) return;
      // CoLA has no header: source, label, author's mark, sentence.
      if (num_columns != 4 || (columns[1] != "0" && columns[1] != "1")) {
        ThrowRecord(what, at, "no GLUE header with a sentence or question column");
      }
      text_columns = {3};
    }
    if (columns.size() != num_columns) {
      ThrowRecord(what, at,
                  std::to_string(columns.size()) + " columns, the first line has " +
                      std::to_string(num_columns));
    }
    std::string text;
    for (const size_t c : text_columns) {
      if (!text.empty()) text += '\n';
      text += columns[c];
    }
    sink({text, at});
  });
}

std::string JsonlText(const SourceSpec& spec, const RawRecord& record,
                      const std::string& what) {
  const Json json = ParseJson(CleanText(record.raw),
                              what + " at byte " + std::to_string(record.offset));
  if (!json.is_object()) ThrowRecord(what, record.offset, "not a JSON object");
  if (!json.contains(spec.field)) {
    std::vector<std::string> names;
    for (const auto& [key, value] : json.items()) names.push_back(key);
    ThrowRecord(what, record.offset,
                "no field \"" + spec.field + "\"; did you mean \"" +
                    NearestName(spec.field, names) + "\"?");
  }
  const Json& value = json[spec.field];
  if (!value.is_string()) {
    ThrowRecord(what, record.offset, "field \"" + spec.field + "\" is not a string");
  }
  return value.get<std::string>();
}

// Length of the valid UTF-8 sequence at `at`, 0 where there is none (Unicode 15, table
// 3-7).
size_t Utf8Length(std::string_view s, size_t at) {
  const auto byte = [&](size_t i) {
    return at + i < s.size() ? static_cast<unsigned char>(s[at + i]) : 0u;
  };
  const auto tail = [&](size_t i) { return (byte(i) & 0xc0) == 0x80; };
  const unsigned b0 = byte(0), b1 = byte(1);
  if (b0 < 0x80) return 1;
  if (b0 >= 0xc2 && b0 <= 0xdf) return tail(1) ? 2 : 0;
  if (b0 >= 0xe0 && b0 <= 0xef) {
    const bool overlong = b0 == 0xe0 && b1 < 0xa0, surrogate = b0 == 0xed && b1 > 0x9f;
    return tail(1) && tail(2) && !overlong && !surrogate ? 3 : 0;
  }
  if (b0 >= 0xf0 && b0 <= 0xf4) {
    const bool overlong = b0 == 0xf0 && b1 < 0x90, beyond = b0 == 0xf4 && b1 > 0x8f;
    return tail(1) && tail(2) && tail(3) && !overlong && !beyond ? 4 : 0;
  }
  return 0;
}

}  // namespace

void ReadRecords(const SourceSpec& spec, std::string_view bytes, const std::string& what,
                 const RecordSink& sink) {
  switch (spec.kind) {
    case SourceKind::kText:
      if (!bytes.empty()) sink({bytes, 0});
      return;
    case SourceKind::kTextBlocks:
      return ReadBlocks(bytes, sink);
    case SourceKind::kJsonl:
      return ReadJsonl(bytes, what, sink);
    case SourceKind::kWikitext:
      return ReadWikitext(bytes, sink);
    case SourceKind::kSquad:
      return ReadSquad(bytes, what, sink);
    case SourceKind::kGlue:
      return ReadGlue(bytes, what, sink);
  }
}

std::string RecordText(const SourceSpec& spec, const RawRecord& record,
                       const std::string& what) {
  if (spec.kind == SourceKind::kJsonl) return CleanText(JsonlText(spec, record, what));
  return CleanText(record.raw);
}

std::string CleanText(std::string_view text) {
  if (text.starts_with("\xEF\xBB\xBF")) text.remove_prefix(3);
  constexpr std::string_view kBlank(" \t\r\n\v\f\0", 7);
  const size_t first = text.find_first_not_of(kBlank);
  if (first == text.npos) return "";
  text = text.substr(first, text.find_last_not_of(kBlank) - first + 1);
  std::string clean;
  clean.reserve(text.size());
  for (size_t at = 0; at < text.size();) {
    const size_t length = Utf8Length(text, at);
    const char c = text[at];
    if (length == 0) {
      clean += "\xEF\xBF\xBD";
      ++at;
    } else if (c == '\0' || c == '\r') {
      const bool line_end = c == '\r' && at + 1 < text.size() && text[at + 1] == '\n';
      if (!line_end) clean += c == '\r' ? '\n' : ' ';
      ++at;
    } else {
      clean.append(text, at, length);
      at += length;
    }
  }
  return clean;
}

}  // namespace routecast
