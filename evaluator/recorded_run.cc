#include "evaluator/recorded_run.h"

#include <torch/version.h>

namespace routecast {

Json Recorded(const fs::path& out, const std::vector<std::string>& files,
              const Json& configuration,
              const std::function<Json(const BeginRun&)>& work) {
  if (out.empty()) return work([] {});
  RecordedRun record(out, "routecast-evaluate", configuration);
  record.Set("ranks", 1);
  record.Set("libraries", {{"torch", TORCH_VERSION}});
  record.Replaces(files);
  return Recorded(&record, [&] { return work([&record] { record.Begin(); }); });
}

}  // namespace routecast
