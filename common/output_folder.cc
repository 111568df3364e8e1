#include "common/output_folder.h"

#include <unistd.h>

#include <cerrno>

#include "common/errors.h"

namespace routecast {

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
