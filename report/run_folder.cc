#include "report/run_folder.h"

#include <sstream>

#include "common/errors.h"
#include "report/result_values.h"

namespace routecast {

bool IsEvaluation(const RunFolder& f) {
  return !EntriesWith(f.results, "policy").empty();
}
bool IsSimulation(const RunFolder& f) {
  return !EntriesWith(f.simulation, "policy").empty();
}
bool IsTraining(const RunFolder& f) {
  return f.results.is_object() && f.results.contains("scores");
}

RunFolder LoadRunFolder(const fs::path& path) {
  if (!fs::is_directory(path)) {
    throw UsageError(ErrorText(path.string() + " is not a folder", "", "check the path"));
  }
  const fs::path whole = fs::absolute(path).lexically_normal();
  RunFolder folder;
  folder.name = (whole.has_filename() ? whole : whole.parent_path()).filename().string();
  if (fs::exists(path / "results.json"))
    folder.results = ReadJsonFile(path / "results.json");
  if (fs::exists(path / "simulation.json"))
    folder.simulation = ReadJsonFile(path / "simulation.json");
  if (fs::exists(path / "stats.json")) folder.stats = ReadJsonFile(path / "stats.json");
  if (fs::exists(path / "pretrain.json"))
    folder.pretrain = ReadJsonFile(path / "pretrain.json");
  try {  // for a subtitle: a damaged one takes nothing else away
    if (fs::exists(path / "run.json")) folder.run = ReadJsonFile(path / "run.json");
  } catch (const DataError&) {
  }
  if (!fs::exists(path / "metrics.jsonl")) return folder;
  std::istringstream lines(ReadFile(path / "metrics.jsonl"));
  std::string line;
  for (size_t number = 1; std::getline(lines, line); ++number) {
    if (line.empty() || lines.eof())
      continue;  // no newline yet: the line is being written
    folder.metrics.push_back(ParseJson(
        line, (path / "metrics.jsonl").string() + ", line " + std::to_string(number)));
  }
  return folder;
}

}  // namespace routecast
