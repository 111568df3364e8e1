// run.json: what a run was, in every output folder. Also JSON lines.
#pragma once

#include <chrono>
#include <fstream>
#include <string>

#include "common/files.h"
#include "nlohmann/json.hpp"

namespace routecast {

using Json = nlohmann::ordered_json;

const char* Version();    // "0.1.0"
const char* GitCommit();  // of the build; "unknown" outside a clone

// Parses foreign JSON. Throws DataError with `what` (usually the path), offset and
// reason; refuses nesting deeper than 100.
Json ParseJson(const std::string& text, const std::string& what);
Json ReadJsonFile(const fs::path& path);

// Writes <folder>/run.json twice: at the start (exit_status null) and at the end.
// Thread rule: one thread. Only rank 0 makes one.
class RunRecord {
 public:
  // `configuration`: the full effective configuration. `libraries`: name -> version.
  RunRecord(fs::path folder, std::string program, Json configuration);
  void Set(const std::string& key, Json value);  // devices, hosts, ranks, seeds, ...
  void SetMissing(const std::string& key, Json value);  // where nothing is set yet
  void WriteStart();
  // headline results; adds this process's peak memory (in bytes, resident).
  void Finish(int exit_status, Json headline);
  // The same without results, of a file that a record has written.
  static void FinishOnDisk(const fs::path& file, int exit_status);

 private:
  void Write();
  fs::path folder_;
  Json record_;
};

// Drops the lines of a JSON-lines file whose `key` is above `last` (and a line cut by a
// kill): what a run wrote after the checkpoint that it now goes on from. No file:
// nothing.
void TruncateJsonLines(const fs::path& path, const std::string& key, int64_t last);

// Appends one JSON object a line; flushed per line. EnvironmentError when the disk is
// full.
class JsonLines {
 public:
  explicit JsonLines(const fs::path& path, bool append);
  void Write(const Json& line);

 private:
  fs::path path_;
  std::ofstream out_;
};

}  // namespace routecast
