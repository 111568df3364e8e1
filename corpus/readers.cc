#include "corpus/readers.h"

#include <algorithm>
#include <vector>

#include "common/errors.h"
#include "common/foreign_text.h"
#include "corpus/record_lines.h"
#include "corpus/task_prompts.h"

namespace routecast {
namespace {

constexpr uint64_t kMaxWholeBytes = uint64_t{8} << 30, kMaxDocument = uint64_t{4} << 30;

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
  uint64_t number = 0;
  ForEachLine(bytes, [&](std::string_view line, size_t at) {
    ++number;
    if (line.size() > kMaxLineBytes)
      ThrowRecord(what, at, "a line above 256 MiB", number);
    if (!IsBlank(line)) sink({line, at, number});
  });
}

// Where the last whole record of a window ends, as the readers above cut them; 0 where
// that cannot be known yet.
size_t LastRecordEnd(SourceKind kind, std::string_view window) {
  size_t last = 0;
  if (kind == SourceKind::kJsonl) {
    last = window.rfind('\n') + 1;  // npos + 1 is 0
  } else if (kind == SourceKind::kTextBlocks) {
    for (size_t end = window.rfind('\n'); end != window.npos && last == 0;) {
      const size_t before = end == 0 ? window.npos : window.rfind('\n', end - 1);
      const size_t start = before + 1;
      if (IsBlank(window.substr(start, end - start))) last = end + 1;
      end = before;
    }
  } else {
    bool after_blank = true;
    ForEachLine(window, [&](std::string_view line, size_t at) {
      if (after_blank && at > 0 && IsArticleTitle(line)) {
        const size_t next = std::min(at + line.size() + 1, window.size());
        const size_t next_end = window.find('\n', next);
        const bool known = next_end != window.npos;
        if (known && IsBlank(window.substr(next, next_end - next))) last = at;
      }
      after_blank = IsBlank(line);
    });
  }
  return last;
}

bool HasWindows(SourceKind kind) {
  return kind == SourceKind::kJsonl || kind == SourceKind::kTextBlocks ||
         kind == SourceKind::kWikitext;
}

[[noreturn]] void ThrowTooLong(SourceKind kind, const std::string& what, uint64_t at,
                               uint64_t line) {
  if (kind == SourceKind::kJsonl) ThrowRecord(what, at, "a line above 256 MiB", line);
  throw DataError(ErrorText(what + ": a document larger than 4 GiB",
                            "at byte " + std::to_string(at), "cut it"));
}

std::string JsonlText(const SourceSpec& spec, const RawRecord& record,
                      const std::string& what) {
  const nlohmann::json json = ParseForeignJson(
      CleanText(record.raw), what + ", " + PlaceText(record.line, record.offset),
      kMaxJsonDepth);
  if (!json.contains(spec.field)) {
    std::vector<std::string> names;
    for (const auto& [key, value] : json.items()) {
      if (value.is_string()) names.push_back(key);
    }
    std::string near = NearestName(spec.field, names);
    const auto control = [](unsigned char c) { return c < 0x20 || c == 0x7f; };
    if (std::any_of(near.begin(), near.end(), control)) near.clear();
    throw DataError(
        ErrorText(what + ": a record without the field \"" + spec.field + "\"",
                  PlaceText(record.line, record.offset) +
                      (near.empty() ? "" : "; did you mean \"" + near + "\"?"),
                  near.empty() ? "repair or leave out the file"
                               : "name it: --data=jsonl:" + what + "#" + near));
  }
  const nlohmann::json& value = json[spec.field];
  if (!value.is_string()) {
    ThrowRecord(what, record.offset, "field \"" + spec.field + "\" is not a string",
                record.line);
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
      return ReadGlue(spec.field, bytes, what, sink);
  }
}

void ReadFileRecords(const SourceSpec& spec, const SourceFile& file,
                     const std::string& what, const RecordSink& sink,
                     size_t window_bytes) {
  if (!HasWindows(spec.kind)) {
    if (file.size() > kMaxWholeBytes) {
      throw DataError(
          ErrorText(what + " is too large to be read as a whole",
                    FormatBytes(file.size()) + ", limit " + FormatBytes(kMaxWholeBytes),
                    "cut it, or read a text as text:PATH#blocks"));
    }
    return ReadRecords(spec, file.Read(0, file.size()), what, sink);
  }
  const uint64_t limit = spec.kind == SourceKind::kJsonl ? kMaxLineBytes : kMaxDocument;
  uint64_t lines = 0;  // before `at`
  for (uint64_t at = 0; at < file.size();) {
    const uint64_t left = file.size() - at;
    std::string window;
    size_t end = 0;
    for (uint64_t size = window_bytes; end == 0; size = std::min(2 * size, limit + 1)) {
      if (window.size() > limit) ThrowTooLong(spec.kind, what, at, lines + 1);
      window += file.Read(at + window.size(), std::min(size, left) - window.size());
      end = window.size() == left ? left : LastRecordEnd(spec.kind, window);
    }
    const std::string_view whole = std::string_view(window).substr(0, end);
    ReadRecords(spec, whole, what, [&](const RawRecord& record) {
      sink({record.raw, at + record.offset, record.line == 0 ? 0 : lines + record.line});
    });
    lines += static_cast<uint64_t>(std::count(whole.begin(), whole.end(), '\n'));
    at += end;
  }
}

std::string RecordText(const SourceSpec& spec, const RawRecord& record,
                       const std::string& what) {
  if (spec.kind == SourceKind::kJsonl) return CleanText(JsonlText(spec, record, what));
  return CleanText(record.raw);
}

uint64_t CountForeignBytes(std::string_view text) {
  uint64_t foreign = 0;
  for (size_t at = 0; at < text.size();) {
    const size_t length = Utf8Length(text, at);
    foreign += length == 0 || text[at] == '\0' ? 1 : 0;
    at += std::max<size_t>(length, 1);
  }
  return foreign;
}

bool IsBinary(uint64_t foreign_bytes, uint64_t bytes) {
  return foreign_bytes >= kBinaryBytes && foreign_bytes * kBinaryShare > bytes;
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
