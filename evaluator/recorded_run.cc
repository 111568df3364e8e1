#include "evaluator/recorded_run.h"

#include <torch/version.h>

#include "common/errors.h"
#include "common/exit_code.h"

namespace routecast {

Json Recorded(const fs::path& out, const std::vector<std::string>& files,
              const Json& configuration, const std::function<Json()>& work) {
  MakeFolder(out);
  RunRecord record(out, "routecast-evaluate", configuration);
  record.Set("ranks", 1);
  record.Set("libraries", {{"torch", TORCH_VERSION}});
  record.WriteStart();
  for (const std::string& file : files) fs::remove(out / file);
  try {
    Json headline = work();
    record.Finish(kExitDone, headline);
    return headline;
  } catch (const std::exception& e) {
    record.Finish(ExitCodeOf(e), Json::object());
    throw;
  }
}

}  // namespace routecast
