#include "models/dropout_mask.h"

#include <algorithm>
#include <cmath>

#include "common/random.h"
#include "common/wide_loops.h"

namespace routecast {
namespace {

constexpr int kLanes = 4;  // draws of 16 bits a number
constexpr double kRange = 65536;

uint64_t Number(uint64_t key, uint64_t counter) {
  return Mix(key + counter * 0x9e3779b97f4a7c15ULL);
}

}  // namespace

ROUTECAST_WIDE void FillDropoutMask(uint64_t key, double probability, int64_t count,
                                    float* mask) {
  const auto kept = static_cast<uint32_t>(
      std::clamp(std::round((1 - probability) * kRange), 1.0, kRange));
  const auto scale = static_cast<float>(kRange / kept);
  const auto value = [&](uint64_t number, int lane) {
    return static_cast<uint32_t>((number >> (16 * lane)) & 0xffff) < kept ? scale : 0.f;
  };
  const int64_t whole = count / kLanes;
  for (int64_t i = 0; i < whole; ++i) {
    const uint64_t number = Number(key, static_cast<uint64_t>(i));
    for (int lane = 0; lane < kLanes; ++lane) {
      mask[i * kLanes + lane] = value(number, lane);
    }
  }
  const uint64_t last = Number(key, static_cast<uint64_t>(whole));
  for (int64_t i = whole * kLanes; i < count; ++i) {
    mask[i] = value(last, static_cast<int>(i - whole * kLanes));
  }
}

}  // namespace routecast
