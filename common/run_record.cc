#include "common/run_record.h"

#include <sys/resource.h>
#include <unistd.h>

#include <cerrno>
#include <ctime>
#include <sstream>

#include "common/errors.h"
#include "common/foreign_text.h"
#include "common/version.h"

namespace routecast {
namespace {

std::string Now() {
  const std::time_t t = std::time(nullptr);
  std::tm utc;
  gmtime_r(&t, &utc);
  char text[32];
  std::strftime(text, sizeof text, "%Y-%m-%dT%H:%M:%SZ", &utc);
  return text;
}

int64_t PeakMemoryBytes() {
  rusage usage{};
  ::getrusage(RUSAGE_SELF, &usage);
  return int64_t{usage.ru_maxrss} * 1024;
}

constexpr int kMaxJsonDepth = 100;

}  // namespace

const char* Version() { return ROUTECAST_VERSION; }
const char* GitCommit() { return ROUTECAST_GIT_COMMIT; }

Json ParseJson(const std::string& text, const std::string& what) {
  bool too_deep = false;
  const auto guard = [&too_deep](int depth, Json::parse_event_t, Json&) {
    if (depth > kMaxJsonDepth) too_deep = true;
    return depth <= kMaxJsonDepth;
  };
  try {
    Json value = Json::parse(text, guard);
    if (!too_deep) return value;
  } catch (const nlohmann::json::exception& e) {
    throw DataError(ErrorText(what + " is not valid JSON", OneLine(e.what()),
                              "write the file again"));
  }
  throw DataError(ErrorText(what + " is not usable JSON", "nested deeper than 100", ""));
}

Json ReadJsonFile(const fs::path& path) {
  return ParseJson(ReadFile(path, uint64_t{256} << 20), path.string());
}

RunRecord::RunRecord(fs::path folder, std::string program, Json configuration)
    : folder_(std::move(folder)) {
  char host[256] = "unknown";
  ::gethostname(host, sizeof host - 1);
  record_["program"] = std::move(program);
  record_["version"] = Version();
  record_["git_commit"] = GitCommit();
  record_["host"] = host;
  record_["configuration"] = std::move(configuration);
  record_["start"] = Now();
  record_["end"] = nullptr;
  record_["exit_status"] = nullptr;
}

void RunRecord::Set(const std::string& key, Json value) {
  record_[key] = std::move(value);
}

void RunRecord::SetMissing(const std::string& key, Json value) {
  if (!record_.contains(key)) record_[key] = std::move(value);
}

void RunRecord::WriteStart() { Write(); }

void RunRecord::Finish(int exit_status, Json headline) {
  record_["end"] = Now();
  record_["exit_status"] = exit_status;
  record_["peak_memory_bytes"] = PeakMemoryBytes();
  record_["results"] = std::move(headline);
  Write();
}

void RunRecord::FinishOnDisk(const fs::path& file, int exit_status) {
  Json record = ReadJsonFile(file);
  record["end"] = Now();
  record["exit_status"] = exit_status;
  record["peak_memory_bytes"] = PeakMemoryBytes();
  WriteFileAtomic(file, record.dump(2) + "\n");
}

void RunRecord::Write() {
  MakeFolder(folder_);
  // Names of files may be no UTF-8.
  const std::string text = record_.dump(2, ' ', false, Json::error_handler_t::replace);
  WriteFileAtomic(folder_ / "run.json", text + "\n");
}

void TruncateJsonLines(const fs::path& path, const std::string& key, int64_t last) {
  if (!fs::exists(path)) return;
  std::istringstream in(ReadFile(path));
  std::string kept;
  for (std::string line; std::getline(in, line);) {
    const Json json = Json::parse(line, nullptr, /*allow_exceptions=*/false);
    if (json.is_discarded() || !json.contains(key) || json[key] > last) continue;
    kept += line + "\n";
  }
  WriteFileAtomic(path, kept);
}

JsonLines::JsonLines(const fs::path& path, bool append)
    : path_(path), out_(path, append ? std::ios::app : std::ios::trunc) {
  if (!out_) ThrowErrno(errno, "open", path);
}

void JsonLines::Write(const Json& line) {
  out_ << line.dump() << '\n';
  out_.flush();
  if (!out_) ThrowErrno(errno ? errno : EIO, "write", path_);
}

}  // namespace routecast
