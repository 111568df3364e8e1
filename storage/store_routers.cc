#include "storage/store_routers.h"

#include "common/byte_file.h"
#include "common/errors.h"

namespace routecast {
namespace {

fs::path HashPath(const fs::path& store) { return store / "routers.hash"; }

std::string HashLine(const fs::path& file) { return Hex64(HashFile(file)) + "\n"; }

}  // namespace

fs::path RoutersPath(const fs::path& store) { return store / "routers.safetensors"; }

bool KeepRouters(const fs::path& store,
                 const std::function<void(const fs::path&)>& write) {
  const fs::path file = RoutersPath(store);
  const std::string before = fs::exists(file) ? HashLine(file) : "";
  const fs::path made = store / "routers.safetensors.tmp";
  write(made);
  const std::string wanted = HashLine(made);
  std::error_code error;
  if (before == wanted) {
    fs::remove(made, error);
    if (error) ThrowErrno(error.value(), "remove", made);
  } else {
    fs::rename(made, file, error);
    if (error) ThrowErrno(error.value(), "rename", file);
    SyncPath(store);
  }
  // After the file it speaks of: a kill in between leaves a store without a hash.
  if (!fs::exists(HashPath(store)) || ReadFile(HashPath(store)) != wanted) {
    WriteFileAtomic(HashPath(store), wanted);
  }
  return !before.empty() && before != wanted;
}

std::optional<std::string> RoutersProblem(const fs::path& store) {
  const fs::path file = RoutersPath(store), hash = HashPath(store);
  if (!fs::exists(hash)) return std::nullopt;
  if (!fs::exists(file)) return file.string() + " is missing";
  if (ReadFile(hash) == HashLine(file)) return std::nullopt;
  return file.string() + ": its bytes are not those that " + hash.string() + " names";
}

}  // namespace routecast
