// How much is fetched ahead, as the published memory manager has it: by how many experts
// fit, how sure a prediction is, and how long loads take. The budget stays as it is: the
// original's resizing of its cache is left out, and slow loads make it less eager where
// the original becomes more so. Thread rule: one thread at a time.
#pragma once

#include <string>

namespace routecast {

// By n = four fifths of the slots, E experts a layer, and the most that are fetched.
enum class MemoryRegime {
  kDoubleBuffer,  // n >= E: the next two visits, up to the most of each
  kSingle,        // n >= the most: the next visit, up to the most
  kStreaming,     // n >= 2: one expert of the next visit
  kHost           // else: nothing; one slot's expert runs while the other's arrives
};
const char* MemoryRegimeName(MemoryRegime regime);

// What a manager does at the moment, for results.
struct MemoryManagerState {
  std::string regime;
  int most_experts = 0;
  double aggressiveness = 0;
};

class MemoryManager {
 public:
  // `most`: experts of a visit that are fetched ahead, at most; `aggressiveness` in
  // [0.1, 1]: both of the device (device_presets.h).
  MemoryManager(int num_experts, int most, double aggressiveness);
  void SetSlots(int slots);

  MemoryRegime regime() const { return regime_; }
  int max_lead() const;  // visits ahead that are looked at
  // Experts to fetch for a visit whose likeliest expert has this probability:
  // floor(most * confidence * aggressiveness), none below a confidence of a half.
  int PrefetchCount(double confidence) const;
  // A transfer took so long. Every hundredth looks at the mean of the hundred: above
  // 10 ms aggressiveness falls by a tenth, below 5 ms it rises by one.
  void Loaded(double seconds);
  double aggressiveness() const { return aggressiveness_; }
  MemoryManagerState state() const {
    return {MemoryRegimeName(regime_), most_, aggressiveness_};
  }

 private:
  int num_experts_, most_;
  double aggressiveness_;
  MemoryRegime regime_ = MemoryRegime::kHost;
  int loads_ = 0;
  double seconds_ = 0;  // of those
};

}  // namespace routecast
