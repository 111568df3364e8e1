// What there is below a folder, and what this build and machine can do. Reads, changes
// nothing. Thread rule: one thread.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "common/files.h"
#include "common/run_record.h"
#include "evaluator/device_copy.h"

namespace routecast {

// `kind`: model, predictor, store, run (a folder with a run.json alone), partial (what an
// interrupted write left) or locked (a store that a job holds).
struct Artefact {
  std::string kind;
  fs::path path;
  std::string detail;   // geometry, kind of predictor, program and how it ended, ...
  std::string changed;  // local time
  uint64_t bytes = 0;   // of all files below
};
// At most `most` folders are looked at, in the order of their names; links are not
// followed. UsageError where `folder` is none.
std::vector<Artefact> FindArtefacts(const fs::path& folder, size_t most = 20'000);

// Version, build, devices, memory, cores, and what is missing for which use.
Json MachineStatus();
// Of it, `devices`: name and free bytes of devices 0..count-1, as `open` (OpenCudaDevice)
// has them; of one that refuses its error, and null.
Json DeviceStatus(int count, const std::function<std::unique_ptr<DeviceCopy>(int)>& open);

std::string StatusText(const Json& machine, const std::vector<Artefact>& artefacts);
Json StatusJson(const Json& machine, const std::vector<Artefact>& artefacts);

}  // namespace routecast
