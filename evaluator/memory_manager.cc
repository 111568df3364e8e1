#include "evaluator/memory_manager.h"

#include <algorithm>
#include <cmath>

namespace routecast {
namespace {

constexpr double kUsableShare = 0.8;  // of the memory
constexpr double kLeastConfidence = 0.5;
constexpr int kLoads = 100;
constexpr double kSlowSeconds = 10e-3, kFastSeconds = 5e-3;
constexpr double kLess = 0.9, kMore = 1.1;
constexpr double kLeastAggressiveness = 0.1;
// 0.7 * 10 is a hair below 7, and means 7.
constexpr double kRounding = 1e-9;

int WholeOf(double count) { return static_cast<int>(std::floor(count + kRounding)); }

}  // namespace

const char* MemoryRegimeName(MemoryRegime regime) {
  constexpr const char* kNames[] = {"double_buffer", "single", "streaming", "host"};
  return kNames[static_cast<int>(regime)];
}

MemoryManager::MemoryManager(int num_experts, int most, double aggressiveness)
    : num_experts_(num_experts),
      most_(most),
      aggressiveness_(std::clamp(aggressiveness, kLeastAggressiveness, 1.0)) {}

void MemoryManager::SetSlots(int slots) {
  const int fit = WholeOf(kUsableShare * slots);
  regime_ = fit >= num_experts_        ? MemoryRegime::kDoubleBuffer
            : fit >= most_ && fit >= 2 ? MemoryRegime::kSingle
            : fit >= 2                 ? MemoryRegime::kStreaming
                                       : MemoryRegime::kHost;
}

int MemoryManager::max_lead() const {
  if (regime_ == MemoryRegime::kHost) return 0;
  return regime_ == MemoryRegime::kDoubleBuffer ? 2 : 1;
}

int MemoryManager::PrefetchCount(double confidence) const {
  if (!(confidence >= kLeastConfidence) || regime_ == MemoryRegime::kHost) return 0;
  const int count = WholeOf(most_ * std::min(confidence, 1.0) * aggressiveness_);
  return regime_ == MemoryRegime::kStreaming ? std::min(count, 1) : count;
}

void MemoryManager::Loaded(double seconds) {
  seconds_ += seconds;
  if (++loads_ < kLoads) return;
  const double mean = seconds_ / loads_;
  if (mean > kSlowSeconds) aggressiveness_ *= kLess;
  if (mean < kFastSeconds) aggressiveness_ *= kMore;
  aggressiveness_ = std::clamp(aggressiveness_, kLeastAggressiveness, 1.0);
  loads_ = 0;
  seconds_ = 0;
}

}  // namespace routecast
