// --mode=transfer by whole experts: what moving so many of a published shape takes, and
// what the memory for them takes. Torch-free. Thread rule: one thread.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "evaluator/device_copy.h"
#include "evaluator/device_profile.h"

namespace routecast {

struct ExpertTransferOptions {
  std::vector<std::pair<int64_t, int64_t>> shapes = {
      {512, 2048}, {768, 3072}, {1024, 4096}, {1536, 6144}};  // d_model, d_ff
  std::vector<int> experts = {1, 3, 5, 10, 20};
  uint64_t weight_bytes = 2;  // bf16; an expert has 2 * d_model * d_ff weights
  int warm_ups = 10, trials = 100;
  // Past it a row's warm-ups end, and its trials, of which there are three at least.
  double seconds_a_row = 0.1;
  uint64_t most_bytes = uint64_t{1} << 30;  // rows of more are left out
  double deadline_seconds = 30;             // a copy that takes longer never completes
  bool quiet = false;
};

// One copy an expert, one after another, from pinned and from pageable host memory to the
// device and from one place of it to another; allocations of device memory, of pinned and
// of pageable host memory (with every page there). `device` null: within host memory, and
// pageable allocations alone. EnvironmentError: no memory, or a copy that does not
// complete. Throws StoppedError.
std::vector<ExpertTransfer> MeasureExpertTransfers(DeviceCopy* device,
                                                   const ExpertTransferOptions& options);

}  // namespace routecast
