#include "corpus/task_prompts.h"

#include <algorithm>
#include <cctype>
#include <filesystem>
#include <map>

#include "common/errors.h"
#include "common/foreign_text.h"
#include "corpus/record_lines.h"

namespace routecast {
namespace {

using Json = nlohmann::json;

constexpr uint64_t kMaxJsonBytes = uint64_t{1} << 30;
// A context is repeated for each of its questions: prompts may be so many times larger
// than their file (real files: 4), and this much beyond.
constexpr uint64_t kMaxRatio = 64, kFreeBytes = uint64_t{16} << 20;

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

// A part of a prompt: its key in the prompt, the columns that may hold it.
struct Part {
  const char* key;
  std::vector<std::string_view> columns;
};

struct GlueTask {
  std::string name;
  std::vector<Part> parts;  // keys ascend, as T5's preprocessing sorts them
};

const std::vector<GlueTask>& Tasks() {
  static const std::vector<GlueTask> tasks = {
      {"cola", {{"sentence", {"sentence"}}}},
      {"sst2", {{"sentence", {"sentence"}}}},
      {"mrpc", {{"sentence1", {"#1 String"}}, {"sentence2", {"#2 String"}}}},
      {"stsb", {{"sentence1", {"sentence1"}}, {"sentence2", {"sentence2"}}}},
      {"qqp", {{"question1", {"question1"}}, {"question2", {"question2"}}}},
      {"mnli",
       {{"hypothesis", {"hypothesis", "sentence2"}},
        {"premise", {"premise", "sentence1"}}}},
      {"qnli", {{"question", {"question"}}, {"sentence", {"sentence"}}}},
      {"rte", {{"sentence1", {"sentence1"}}, {"sentence2", {"sentence2"}}}},
      {"wnli", {{"sentence1", {"sentence1"}}, {"sentence2", {"sentence2"}}}}};
  return tasks;
}

const GlueTask& TaskNamed(std::string_view name) {
  return *std::find_if(Tasks().begin(), Tasks().end(),
                       [&](const GlueTask& task) { return task.name == name; });
}

using Columns = std::vector<std::string_view>;

Columns SplitTabs(std::string_view line) {
  if (line.ends_with('\r')) line.remove_suffix(1);
  Columns columns;
  for (size_t at = 0;;) {
    const size_t tab = line.find('\t', at);
    columns.push_back(line.substr(at, tab == line.npos ? tab : tab - at));
    if (tab == line.npos) return columns;
    at = tab + 1;
  }
}

bool Has(const Columns& header, std::string_view name) {
  return std::find(header.begin(), header.end(), name) != header.end();
}

// The task whose files alone have such a header; empty where several do.
std::string TaskOfHeader(const Columns& header) {
  if (Has(header, "#1 String")) return "mrpc";
  if (Has(header, "question1")) return "qqp";
  if (Has(header, "question") && Has(header, "sentence")) return "qnli";
  if (Has(header, "sentence1_parse") || Has(header, "hypothesis")) return "mnli";
  if (Has(header, "old_index")) return "stsb";
  if (Has(header, "sentence") && !Has(header, "index")) return "sst2";
  return "";
}

// "SST-2/dev.tsv" and "QNLI_dev.tsv" name tasks: letters and digits up to a '_' or '.'.
std::string TaskOfPath(const std::filesystem::path& path) {
  for (const auto& part : {path.filename(), path.parent_path().filename()}) {
    std::string name;
    for (const char c : part.string()) {
      if (c == '_' || c == '.') break;
      if (std::isalnum(static_cast<unsigned char>(c))) {
        name += static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
      }
    }
    const auto& names = GlueTasks();
    if (std::find(names.begin(), names.end(), name) != names.end()) return name;
  }
  return "";
}

// Rows of one file -> prompts.
class GlueReader {
 public:
  GlueReader(std::string task, const std::string& what)
      : task_(std::move(task)), what_(what) {}

  // The first line: true where it is a header, false where it is a row already.
  bool Begin(const Columns& first, uint64_t offset) {
    num_columns_ = first.size();
    const bool known = Has(first, "sentence") || Has(first, "sentence1") ||
                       Has(first, "#1 String") || Has(first, "question1") ||
                       Has(first, "hypothesis");
    if (!known) {
      // CoLA's train and dev files have none: source, label, author's mark, sentence.
      const bool cola = num_columns_ == 4 && (first[1] == "0" || first[1] == "1");
      if (!cola) ThrowRecord(what_, offset, "no header of a GLUE task");
      task_ = "cola";
      sources_ = {3};
      return false;
    }
    const std::string by_header = TaskOfHeader(first);
    if (task_.empty()) task_ = by_header.empty() ? TaskOfPath(what_) : by_header;
    if (task_.empty()) {
      ThrowRecord(what_, offset,
                  "several tasks have this header: write glue:PATH#rte or the like");
    }
    for (const Part& part : TaskNamed(task_).parts) sources_.push_back(Find(part, first));
    return true;
  }
  std::string Prompt(const Columns& row, uint64_t offset) const {
    if (row.size() != num_columns_) {
      ThrowRecord(what_, offset,
                  std::to_string(row.size()) + " columns, the first line has " +
                      std::to_string(num_columns_));
    }
    std::string text = task_;
    const std::vector<Part>& parts = TaskNamed(task_).parts;
    for (size_t p = 0; p < parts.size(); ++p) {
      text += std::string(" ") + parts[p].key + ": ";
      text += row[sources_[p]];
    }
    return text;
  }
  bool begun() const { return num_columns_ > 0; }

 private:
  size_t Find(const Part& part, const Columns& header) const {
    for (const std::string_view column : part.columns) {
      const auto at = std::find(header.begin(), header.end(), column);
      if (at != header.end()) return static_cast<size_t>(at - header.begin());
    }
    ThrowRecord(what_, 0,
                "no column \"" + std::string(part.columns.back()) + "\", which " + task_ +
                    " has");
  }

  std::string task_;
  const std::string& what_;
  size_t num_columns_ = 0;
  std::vector<size_t> sources_;  // columns of the task's parts
};

}  // namespace

const std::vector<std::string>& GlueTasks() {
  static const std::vector<std::string> names = [] {
    std::vector<std::string> all;
    for (const GlueTask& task : Tasks()) all.push_back(task.name);
    return all;
  }();
  return names;
}

void ReadSquad(std::string_view bytes, const std::string& what, const RecordSink& sink) {
  if (bytes.size() > kMaxJsonBytes) ThrowRecord(what, 0, "larger than 1 GiB");
  const Json root = ParseForeignJson(CleanText(bytes), what, kMaxJsonDepth);
  uint64_t room = bytes.size() * kMaxRatio + kFreeBytes;
  for (const Json& article : Array(root, "data", what)) {
    for (const Json& paragraph : Array(article, "paragraphs", what)) {
      const std::string context = Text(paragraph, "context", what);
      std::string text;
      for (const Json& qa : Array(paragraph, "qas", what)) {
        std::string prompt =
            "question: " + Text(qa, "question", what) + " context: " + context;
        if (prompt.size() > room) {
          ThrowRecord(what, 0, "its prompts are more than 64 times the file");
        }
        room -= prompt.size();
        if (!text.empty()) text += std::string("\n") + kPromptSeparator;
        text += prompt;
      }
      sink({text.empty() ? context : text, 0});
    }
  }
}

void ReadGlue(const std::string& task, std::string_view bytes, const std::string& what,
              const RecordSink& sink) {
  GlueReader reader(task, what);
  if (bytes.starts_with("\xEF\xBB\xBF")) bytes.remove_prefix(3);
  ForEachLine(bytes, [&](std::string_view line, size_t at) {
    if (IsBlank(line)) return;
    if (line.size() > kMaxLineBytes) ThrowRecord(what, at, "a line above 256 MiB");
    const Columns columns = SplitTabs(line);
    if (!reader.begun() && reader.Begin(columns, at)) return;
    sink({reader.Prompt(columns, at), at});
  });
}

}  // namespace routecast
