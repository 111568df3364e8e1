// The link of a comparison: opened, measured alone, and paced where the rows ask for it.
#include <algorithm>
#include <cstdio>

#include "common/errors.h"
#include "evaluator/comparison.h"

namespace routecast {
namespace {

constexpr double kLeastBound = 1.5;  // below it the demo's link is paced (--link=auto)

}  // namespace

double Comparison::PeakOfLink() {
  std::vector<ExpertKey> keys = file_->keys();
  // Never all of them: each has to be brought again.
  const int slots = std::clamp(static_cast<int>(keys.size()) - 1, 1, slots_);
  size_t least = 0;
  if (tiers_.host_slots > 0) {
    // The last hop alone: from what the tier in the middle holds, once it holds it.
    keys.resize(std::min(keys.size(), static_cast<size_t>(tiers_.host_slots)));
    least = keys.size();
    MeasurePeak(tiers_.engine.get(), keys, slots, 0, least);
  }
  return MeasurePeak(tiers_.engine.get(), keys, slots, options_.peak_seconds, least);
}

void Comparison::OpenLinks() {
  tiers_ = OpenTiers(file_, slots_, options_.tiers);
  const uint64_t whole =
      static_cast<uint64_t>(file_->count()) * file_->spec().stride_bytes();
  uint64_t room = FreeFastBytes(options_.tiers);
  if (options_.profile && options_.profile->memory_bytes > 0)
    room = std::min(room, options_.profile->memory_bytes);
  resident_fits_ = whole < room / 10 * 8;
  if (!resident_fits_) {
    notes_.push_back("no row with all experts resident: they take " + FormatBytes(whole) +
                     ", " + FormatBytes(room) + " are free");
  }
  if (tiers_.host_slots > 0 && tiers_.host_slots < file_->count()) {
    ExpertTierOptions disk_only = options_.tiers;
    disk_only.chain.gpu = false;
    const ExpertTiers disk = OpenTiers(file_, std::min(slots_, 8), disk_only);
    disk_peak_ = MeasurePeak(disk.engine.get(), file_->keys(), std::min(slots_, 8),
                             options_.peak_seconds);
    if (!options_.tiers.chain.passes_host)
      notes_.push_back(
          "the host tier holds " + std::to_string(tiers_.host_slots) + " of " +
          std::to_string(file_->count()) +
          " experts, for all rows as they come: what one leaves there the next finds");
  }
  peak_ = PeakOfLink();
  if (resident_fits_) resident_tiers_ = OpenResidentTiers(file_, options_.tiers);
}

double Comparison::LinkSeconds(double moved, double read) const {
  const double last = moved / (pace_ > 0 ? pace_ : peak_);
  return disk_peak_ > 0 ? std::max(last, read / disk_peak_) : last;
}

// This disk is slower than the link to emulate.
void Comparison::UsePageCache() {
  options_.tiers.direct = false;
  tiers_ = {};  // before the next: never two budgets of locked memory
  tiers_ = OpenTiers(file_, slots_, options_.tiers);
  const std::vector<ExpertKey> keys = file_->keys();
  MeasurePeak(tiers_.engine.get(), keys, slots_, 0, 2 * keys.size());  // fills it
  peak_ = PeakOfLink();
  notes_.push_back("the emulated link reads through the page cache");
}

void Comparison::EmulateLink() {
  const DeviceProfile& profile = *options_.profile;
  const bool slower = peak_ <= profile.link_bytes_per_second;
  if (!slower) pace_ = profile.link_bytes_per_second;
  notes_.push_back(
      "emulates " + profile.name +
      ": its memory, compute paced to its own (this machine "
      "is slower itself in " +
      std::to_string(static_cast<int>(100 * paced_compute_->slower_share() + 0.5)) +
      " % of the parts of passes), " +
      (slower ? "and this machine's own link, which is slower" : "and its link"));
}

void Comparison::ChooseLink() {
  if (options_.profile) return EmulateLink();
  size_t from = 0;
  const auto visits = AllVisits(&from);
  const MissCount lru =
      CountMisses(workload_->geometry(), slots_, Eviction::kLru, visits, from);
  const int stack = workload_->runs(Stack::kDecoder) ? 1 : 0;
  const double bytes_a_round = static_cast<double>(lru.misses[stack]) / options_.rounds *
                               static_cast<double>(file_->spec().blob_bytes());
  const double tc = compute_[stack];
  const auto bound = [&](double rate) {
    const double tx = bytes_a_round / rate;
    return (tc + tx) / std::max(tc, tx);
  };
  const double native = bound(peak_);
  const bool pace = options_.link == "emulated" ||
                    (options_.link == "auto" && !options_.tiers.chain.gpu &&
                     (native < kLeastBound || !tiers_.direct));
  if (!options_.quiet) {
    std::fprintf(stderr,
                 "calibration (%s, a round): Tc %.1f ms, Tx %.1f ms at the link's %s/s, "
                 "bound %.2f\n",
                 StackName(static_cast<Stack>(stack)), 1e3 * tc,
                 1e3 * bytes_a_round / peak_,
                 FormatBytes(static_cast<uint64_t>(peak_)).c_str(), native);
  }
  if (!pace || bytes_a_round <= 0) return;
  pace_ = bytes_a_round / ((options_.emulated_bound - 1) * tc);
  if (!options_.tiers.chain.gpu && pace_ > 0.8 * peak_) UsePageCache();
  pace_ = std::min(pace_, 0.9 * peak_);
  notes_.push_back("link paced to " + FormatBytes(static_cast<uint64_t>(pace_)) +
                   "/s for a bound near " + std::to_string(bound(pace_)).substr(0, 4) +
                   " (this machine's own: " + std::to_string(native).substr(0, 4) + ")");
  if (!options_.quiet) std::fprintf(stderr, "%s\n", notes_.back().c_str());
}

}  // namespace routecast
