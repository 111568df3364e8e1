#include "common/routing.h"

#include <bit>
#include <cmath>

#include "common/errors.h"
#include "common/random.h"

namespace routecast {
namespace {
constexpr uint64_t kSplitSalt = 0x726f757465636173ULL;   // "routecas"
constexpr uint64_t kHiddenSalt = 0x68696464656e7331ULL;  // "hiddens1"
}  // namespace

const char* TaskName(Task task) {
  switch (task) {
    case Task::kEncode:
      return "encode";
    case Task::kDenoise:
      return "denoise";
    case Task::kGenerate:
      return "generate";
  }
  return "?";
}

Task ParseTask(const std::string& name) {
  return static_cast<Task>(
      ParseChoice("--task", name, {"encode", "denoise", "generate"}));
}

const char* SplitPartName(SplitPart part) {
  switch (part) {
    case SplitPart::kTrain:
      return "train";
    case SplitPart::kValidation:
      return "validation";
    case SplitPart::kTest:
      return "test";
  }
  return "?";
}

SplitPart SplitOf(uint64_t group_id) {
  const double u = ToUnit(Mix(kSplitSalt, group_id));
  if (u < 0.30) return SplitPart::kTest;
  return u < 0.475 ? SplitPart::kValidation : SplitPart::kTrain;
}

bool HiddenShareOf(uint64_t group_id, double share) {
  return ToUnit(Mix(kHiddenSalt, group_id)) < share;
}

uint16_t FloatToBf16(float value) {
  uint32_t bits = std::bit_cast<uint32_t>(value);
  if (std::isnan(value)) return static_cast<uint16_t>((bits >> 16) | 0x40);
  bits += 0x7fffu + ((bits >> 16) & 1u);
  return static_cast<uint16_t>(bits >> 16);
}

float Bf16ToFloat(uint16_t bits) {
  return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
}

}  // namespace routecast
