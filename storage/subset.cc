#include "storage/subset.h"

#include <algorithm>
#include <sstream>

#include "common/errors.h"
#include "common/random.h"
#include "storage/store_builder.h"

namespace routecast {
namespace {

// Keeps the draw apart from the split and from the share with router inputs, which hash
// the same groups.
constexpr uint64_t kSalt = 0x7375627365740001;
constexpr size_t kBatch = 16;  // sequences read together

}  // namespace

bool InSubset(uint64_t group_id, const SubsetOptions& options) {
  return ToUnit(Mix(kSalt, options.seed, group_id)) < options.share;
}

void RequireShare(double share) {
  if (share > 0 && share <= 1) return;
  std::ostringstream text;
  text << share;
  throw UsageError(ErrorText("--share=" + text.str(), "a share is above 0, up to 1",
                             "--share=0.1 takes a tenth of the documents"));
}

std::vector<uint64_t> DrawSubset(const TraceReader& reader, const fs::path& out,
                                 const SubsetOptions& options) {
  RequireShare(options.share);
  RequireNewStore(out);
  RequireApart(out, reader.path());
  RequireComplete(reader);
  std::vector<uint64_t> ids;
  for (const SequenceInfo& s : reader.sequences()) {
    if (InSubset(s.group_id, options)) ids.push_back(s.sequence_id);
  }
  if (!ids.empty()) return ids;
  throw UsageError(ErrorText("no document of " + reader.path().string() + " is drawn",
                             std::to_string(reader.sequences().size()) +
                                 " sequences are in it, the subset would have 0",
                             "take a larger --share, or another --seed"));
}

uint64_t SubsetStore(const fs::path& store, const fs::path& out,
                     const SubsetOptions& options, StepObserver on_step) {
  const TraceReader reader(store, NeedTokens::kNo);
  const std::vector<uint64_t> ids = DrawSubset(reader, out, options);
  StoreConfig config = reader.config();
  if (!options.compression.empty()) config.compression = options.compression;
  StoreBuilder builder(out, config, std::move(on_step));
  for (size_t at = 0; at < ids.size(); at += kBatch) {
    const std::span<const uint64_t> batch(ids.data() + at,
                                          std::min(kBatch, ids.size() - at));
    for (const RoutingTrace& trace : reader.ReadMany(batch, WithHidden::kAttended)) {
      builder.Add(trace);
    }
  }
  for (const SequenceInfo& s : reader.left_out()) {
    if (InSubset(s.group_id, options)) builder.LeaveOut(s);
  }
  if (fs::exists(reader.routers_path())) builder.CopyRouters(reader.routers_path());
  builder.Finish();
  return builder.num_sequences();
}

}  // namespace routecast
