#include "common/errors.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <numeric>

namespace routecast {

std::string ErrorText(const std::string& what, const std::string& values,
                      const std::string& advice) {
  std::string text = what;
  if (!values.empty()) text += "\n  " + values;
  if (!advice.empty()) text += "\n  " + advice;
  return text;
}

void ThrowErrno(int error, const std::string& operation, const std::string& path) {
  const std::string what = operation + " failed: " + path;
  const std::string reason = std::strerror(error);
  switch (error) {
    case ENOENT:
    case ENOTDIR:
    case EISDIR:
    case ELOOP:
    case ENAMETOOLONG:
      throw UsageError(ErrorText(what, reason, "check the path"));
    case EACCES:
    case EPERM:
    case EROFS:
      throw UsageError(
          ErrorText(what, reason, "check the permissions or choose another path"));
    case ENOSPC:
    case EDQUOT:
      throw EnvironmentError(
          ErrorText(what, reason, "free some space and start the same command again"));
    case EMFILE:
    case ENFILE:
      throw EnvironmentError(ErrorText(
          what, reason, "raise the limit of open files (ulimit -n), start again"));
    default:
      throw EnvironmentError(
          ErrorText(what, reason, "see the system log for this device"));
  }
}

namespace {

// Letters to insert, remove or replace.
size_t EditDistance(const std::string& name, const std::string& candidate) {
  std::vector<size_t> row(candidate.size() + 1);
  std::iota(row.begin(), row.end(), 0);
  for (size_t i = 1; i <= name.size(); ++i) {
    size_t diagonal = row[0];
    row[0] = i;
    for (size_t j = 1; j <= candidate.size(); ++j) {
      const size_t substitute = diagonal + (name[i - 1] != candidate[j - 1]);
      diagonal = row[j];
      row[j] = std::min({row[j] + 1, row[j - 1] + 1, substitute});
    }
  }
  return row.back();
}

}  // namespace

std::string NearestName(const std::string& name, const std::vector<std::string>& valid) {
  std::string best;
  size_t best_distance = SIZE_MAX;
  for (const std::string& candidate : valid) {
    const size_t distance = EditDistance(name, candidate);
    if (distance >= best_distance) continue;
    best_distance = distance;
    best = candidate;
  }
  return best;
}

std::string DidYouMean(const std::string& name, const std::vector<std::string>& valid,
                       const std::string& prefix) {
  const std::string best = NearestName(name, valid);
  if (best.empty() || EditDistance(name, best) * 2 > std::max(name.size(), best.size())) {
    return "";
  }
  return "did you mean " + prefix + best + "?";
}

int ParseChoice(const std::string& flag, const std::string& value,
                const std::vector<std::string>& valid) {
  const auto it = std::find(valid.begin(), valid.end(), value);
  if (it != valid.end()) return static_cast<int>(it - valid.begin());
  std::string all;
  for (const std::string& name : valid) all += (all.empty() ? "" : ", ") + name;
  const std::string meant = DidYouMean(value, valid);
  throw UsageError(ErrorText(flag + "=" + value + " is not known", "valid: " + all,
                             meant.empty() ? "use one of these" : meant));
}

}  // namespace routecast
