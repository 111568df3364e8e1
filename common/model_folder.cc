#include "common/model_folder.h"

#include <cctype>
#include <cstdlib>

#include "common/errors.h"
#include "common/foreign_text.h"

namespace routecast {
namespace {

fs::path Home() {
  const char* home = std::getenv("HOME");
  return home ? home : ".";
}

// The folder that a variable names, with ~ for the home folder; empty where it is unset.
fs::path FolderOf(const char* variable) {
  const char* value = std::getenv(variable);
  if (value == nullptr || *value == '\0') return {};
  const std::string text = value;
  if (text == "~") return Home();
  return text.rfind("~/", 0) == 0 ? Home() / text.substr(2) : fs::path(text);
}

// Letters, digits, '-', '_', '.', and `more`; no "..": safe as a part of a path.
bool IsPlain(const std::string& text, const std::string& more) {
  if (text.empty() || text.front() == '.' || text.front() == '/' || text.back() == '/' ||
      text.find("..") != std::string::npos) {
    return false;
  }
  for (const char c : text) {
    if (!std::isalnum(static_cast<unsigned char>(c)) &&
        (std::string("-_.") + more).find(c) == std::string::npos) {
      return false;
    }
  }
  return true;
}

struct ModelName {
  std::string owner, name, revision;  // owner may be empty
  std::string folder() const {
    return "models--" + (owner.empty() ? "" : owner + "--") + name;
  }
  std::string repository() const { return (owner.empty() ? "" : owner + "/") + name; }
};

// False where the text cannot be a model's name.
bool Parse(const std::string& text, ModelName* model) {
  const size_t at = text.find('@'), slash = text.find('/');
  model->revision = at == std::string::npos ? "main" : text.substr(at + 1);
  const std::string whole = text.substr(0, at);
  model->owner = slash < whole.size() ? whole.substr(0, slash) : "";
  model->name = slash < whole.size() ? whole.substr(slash + 1) : whole;
  return (slash >= whole.size() || IsPlain(model->owner, "")) &&
         IsPlain(model->name, "") && IsPlain(model->revision, "/");
}

// The commit that a branch or tag points to; a revision that is none is a commit itself.
std::string CommitOf(const fs::path& repository, const std::string& revision) {
  const fs::path ref = repository / "refs" / revision;
  if (!fs::is_regular_file(ref)) return revision;
  std::string commit = ReadFile(ref, 4096);
  while (!commit.empty() && std::isspace(static_cast<unsigned char>(commit.back()))) {
    commit.pop_back();
  }
  if (!IsPlain(commit, "")) {
    throw DataError(ErrorText(ref.string() + " names no commit", Quoted(commit),
                              "fetch the model again"));
  }
  return commit;
}

}  // namespace

fs::path HuggingFaceCache() {
  for (const char* variable : {"HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"}) {
    if (const fs::path folder = FolderOf(variable); !folder.empty()) return folder;
  }
  if (const fs::path folder = FolderOf("HF_HOME"); !folder.empty()) return folder / "hub";
  if (const fs::path folder = FolderOf("XDG_CACHE_HOME"); !folder.empty()) {
    return folder / "huggingface/hub";
  }
  return Home() / ".cache/huggingface/hub";
}

fs::path FindModelFolder(const std::string& name) {
  if (name.empty() || fs::is_directory(name)) return name;
  ModelName model;
  if (!Parse(name, &model)) {
    throw UsageError(ErrorText("--model=" + name + " is not a folder",
                               "nor can it be a model's name (OWNER/NAME[@REVISION])",
                               "check the path"));
  }
  const fs::path repository = HuggingFaceCache() / model.folder();
  const std::string commit = CommitOf(repository, model.revision);
  const fs::path snapshot = repository / "snapshots" / commit;
  if (fs::is_directory(snapshot)) return snapshot;
  const std::string revision =
      model.revision == "main" ? "" : " --revision " + model.revision;
  throw UsageError(
      ErrorText("--model=" + name + " is neither a folder nor in the Hugging Face cache",
                "looked at " + fs::absolute(name).string() + " and " + snapshot.string(),
                "fetch it: hf download " + model.repository() + revision));
}

}  // namespace routecast
