// routers.safetensors of a store, and routers.hash beside it: what verify holds the file
// against while no seal knows it. Stores of before have no hash, and are sound without.
// Thread rule: free functions. KeepRouters REQUIRES StoreLock where others may write.
#pragma once

#include <functional>
#include <optional>
#include <string>

#include "common/files.h"

namespace routecast {

fs::path RoutersPath(const fs::path& store);
// Leaves the file with the bytes that `write` makes (to the path it is given, the same
// ones whenever it is called for this store). True where there was one with others.
bool KeepRouters(const fs::path& store,
                 const std::function<void(const fs::path&)>& write);
// What is wrong with the file by its hash, if anything.
std::optional<std::string> RoutersProblem(const fs::path& store);

}  // namespace routecast
