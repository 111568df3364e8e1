#include "comm/call_watch.h"

#include <chrono>
#include <sstream>
#include <thread>
#include <vector>

#include "common/run_record.h"

namespace routecast {
namespace {

constexpr double kLowestRankFirst = 1;  // seconds that others wait for its message
constexpr auto kLook = std::chrono::milliseconds(50);
constexpr uint64_t kMaxBytes = 1 << 20;

double Now() {
  return std::chrono::duration<double>(
             std::chrono::system_clock::now().time_since_epoch())
      .count();
}

fs::path FileOf(const fs::path& folder, int rank) {
  return folder / ("rank-" + std::to_string(rank) + ".jsonl");
}

// Number of the last call in a file that was written since `since`; 0 = there is none.
uint64_t LastCall(const fs::path& file, double since) {
  std::error_code error;
  const auto written = fs::last_write_time(file, error);
  if (error) return 0;
  const auto age = fs::file_time_type::clock::now() - written;
  if (Now() - std::chrono::duration<double>(age).count() < since) return 0;
  std::istringstream lines(ReadFile(file, kMaxBytes));
  uint64_t last = 0;
  for (std::string line; std::getline(lines, line);) {
    const Json json = ParseJson(line, file.string());
    if (json.is_object() && json.contains("number") && json["number"].is_number()) {
      last = json["number"].get<uint64_t>();
    }
  }
  return last;
}

}  // namespace

CallWatch::CallWatch(RankInfo rank, fs::path folder)
    : rank_(std::move(rank)), folder_(std::move(folder)) {}

uint64_t CallWatch::Begin(const char* name, uint64_t bytes) {
  const std::lock_guard lock(mutex_);
  ++last_;
  calls_[last_ % kKept] = {last_, bytes, name, Now(), -1};
  return last_;
}

void CallWatch::End(uint64_t number) {
  const std::lock_guard lock(mutex_);
  Call& call = calls_[number % kKept];
  if (call.number == number) call.seconds = Now() - call.started;
}

std::string CallWatch::Lines() const {
  const std::lock_guard lock(mutex_);
  std::string lines;
  const uint64_t first = last_ > kKept ? last_ - kKept + 1 : 1;
  for (uint64_t n = first; n <= last_; ++n) {
    const Call& call = calls_[n % kKept];
    Json line = {{"number", n},
                 {"name", call.name},
                 {"bytes", call.bytes},
                 {"started", call.started},
                 {"seconds", nullptr}};
    if (call.seconds >= 0) line["seconds"] = call.seconds;
    lines += line.dump() + "\n";
  }
  return lines;
}

// Looks at the others' files until all are there or patience ends.
std::string CallWatch::Missing(uint64_t number, double patience) const {
  const double start = Now(), since = start - 60;
  std::vector<uint64_t> last(static_cast<size_t>(rank_.world), 0);
  for (bool all = false; !all && Now() - start < patience;) {
    all = true;
    for (int r = 0; r < rank_.world; ++r) {
      uint64_t& seen = last[static_cast<size_t>(r)];
      if (seen == 0) seen = LastCall(FileOf(folder_, r), since);
      all = all && seen > 0;
    }
    if (!all) std::this_thread::sleep_for(kLook);
  }
  std::string silent, behind;
  const auto add = [](int r, std::string* list) {
    *list += (list->empty() ? "rank " : ", rank ") + std::to_string(r);
  };
  int lowest = rank_.rank;
  for (int r = 0; r < rank_.world; ++r) {
    const uint64_t seen = last[static_cast<size_t>(r)];
    if (seen == 0) add(r, &silent);
    if (seen > 0 && seen < number) add(r, &behind);
    if (seen > 0) lowest = std::min(lowest, r);
  }
  if (lowest < rank_.rank) {
    std::this_thread::sleep_for(std::chrono::duration<double>(kLowestRankFirst));
  }
  if (!silent.empty()) return silent + " did not come to it and does not answer";
  if (!behind.empty()) return behind + " did not come to it";
  return "all ranks came to it: the network hangs";
}

EnvironmentError CallWatch::Overdue(uint64_t number, double waited, double patience) {
  Call call;
  {
    const std::lock_guard lock(mutex_);
    call = calls_[number % kKept];
  }
  std::string who = "a peer did not come to it";
  std::string where;
  if (!folder_.empty()) {
    try {
      MakeFolder(folder_);
      WriteFileAtomic(FileOf(folder_, rank_.rank), Lines());
      who = Missing(number, patience);
      where = "; the last calls of each rank: " + folder_.string();
    } catch (const std::exception& e) {
      where = std::string("; its calls could not be written: ") + e.what();
    }
  }
  return EnvironmentError(ErrorText(
      "collective call " + std::to_string(number) + " (" + call.name + ", " +
          std::to_string(call.bytes) + " bytes) did not end: " + who,
      "rank " + std::to_string(rank_.rank) + " of " + std::to_string(rank_.world) +
          " waited " + std::to_string(static_cast<int>(waited)) + " s" + where,
      "a rank hangs or died; start the same command again, it goes on"));
}

}  // namespace routecast
