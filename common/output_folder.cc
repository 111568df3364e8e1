#include "common/output_folder.h"

#include <unistd.h>

#include <cerrno>

#include "common/errors.h"
#include "common/run_record.h"

namespace routecast {
namespace {

const char* NameOf(FolderKind kind) {
  return kind == FolderKind::kStore        ? "a trace store"
         : kind == FolderKind::kCheckpoint ? "a checkpoint"
                                           : "a trained predictor";
}

}  // namespace

FolderKind KindOfFolder(const fs::path& folder) {
  std::error_code unreadable;  // then it is nobody's
  if (fs::exists(folder / "store.json", unreadable)) return FolderKind::kStore;
  if (!fs::is_regular_file(folder / "config.json", unreadable)) return FolderKind::kOther;
  const Json config = Json::parse(ReadFile(folder / "config.json"), nullptr,
                                  /*allow_exceptions=*/false);
  if (config.contains("model_type")) return FolderKind::kCheckpoint;
  return config.contains("format") ? FolderKind::kPredictor : FolderKind::kOther;
}

void RequireOutput(const std::string& flag, const fs::path& folder, FolderKind own) {
  if (folder.empty() || !IsThere(folder)) return;
  if (!fs::is_directory(folder)) {
    throw UsageError(ErrorText(flag + "=" + folder.string() + " is a file",
                               "a folder is written", "name a new folder"));
  }
  const FolderKind kind = KindOfFolder(folder);
  if (kind == FolderKind::kOther || kind == own) return;
  throw UsageError(ErrorText(flag + "=" + folder.string() + " is " + NameOf(kind),
                             "its files would be written over", "name a new folder"));
}

bool IsThere(const fs::path& path) {
  std::error_code error;
  const fs::file_status status = fs::status(path, error);
  if (status.type() == fs::file_type::none) ThrowErrno(error.value(), "look at", path);
  return fs::exists(status);
}

void RequireWritable(const fs::path& folder) {
  fs::path existing = fs::absolute(folder);
  std::error_code ignored;  // of what lies below a file: it is not there
  while (!fs::exists(existing, ignored) && existing.has_relative_path()) {
    existing = existing.parent_path();
  }
  if (!fs::is_directory(existing)) ThrowErrno(ENOTDIR, "write below", existing);
  if (::access(existing.c_str(), W_OK | X_OK) != 0) {
    ThrowErrno(errno, "write into", existing);
  }
}

}  // namespace routecast
