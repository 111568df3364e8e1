// In a build without CUDA: the device bodies of this room's operations. No tensor can be
// on a GPU there, so a call is a defect.
#include <stdexcept>

#include "models/device_choice.h"
#include "models/expert_gemv_body.h"
#include "models/rms_norm_body.h"
#include "models/token_groups_body.h"
#include "models/top1_body.h"

namespace routecast {
namespace {

[[noreturn]] void None() { throw std::logic_error("this build has no CUDA"); }

}  // namespace

void Top1Cuda(const Top1Args&, int, int) { None(); }
void DropCuda(const DropArgs&) { None(); }
void GemvCuda(const GemvArgs&, int) { None(); }
void NormRowsCuda(const NormArgs&, int) { None(); }
void SortCuda(const SortArgs&) { None(); }
void GatherCuda(const GatherArgs&, int) { None(); }
void ScatterCuda(const ScatterArgs&, int) { None(); }
int CudaComputeMajor(int) { None(); }

}  // namespace routecast
