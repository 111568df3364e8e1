#include "storage/drop_shares.h"

#include <algorithm>
#include <cstdio>
#include <vector>

namespace routecast {
namespace {

struct Count {
  uint64_t choices = 0, dropped = 0;
  void Add(const RoutingSpan& span) {
    choices += span.dropped.size();
    dropped += static_cast<uint64_t>(
        std::count(span.dropped.begin(), span.dropped.end(), uint8_t{1}));
  }
  std::optional<double> share() const {
    if (choices == 0) return std::nullopt;
    return static_cast<double>(dropped) / static_cast<double>(choices);
  }
};

}  // namespace

bool DropShares::many() const {
  return std::max(encoder.value_or(0), decoder.value_or(0)) > kManyDrops;
}

DropShares SampleDrops(const TraceReader& reader, size_t most) {
  const size_t all = reader.sequences().size(), count = std::min(all, most);
  Count encoder, decoder;
  for (size_t i = 0; i < count; ++i) {
    const uint64_t id = reader.sequences()[i * all / count].sequence_id;
    const RoutingTrace trace = reader.Read(id, WithHidden::kNo);
    encoder.Add(trace.encoder);
    decoder.Add(trace.decoder);
  }
  return {count, encoder.share(), decoder.share()};
}

std::string DropsText(const DropShares& shares, size_t of_sequences) {
  std::string text;
  const auto add = [&](std::optional<double> share, const char* stack) {
    if (!share) return;
    char part[64];
    std::snprintf(part, sizeof part, "%s%.1f %% %sin the %s", text.empty() ? "" : ", ",
                  100 * *share, text.empty() ? "of choices " : "", stack);
    text += part;
  };
  add(shares.encoder, "encoder");
  add(shares.decoder, "decoder");
  if (!text.empty() && shares.sequences < of_sequences) {
    text = "about " + text + " (of " + std::to_string(shares.sequences) + " sequences)";
  }
  return text;
}

std::string DropsHint() {
  return "such tokens pass no expert; shorter sequences (--max_length of "
         "routecast-collect), or a larger expert_capacity in the checkpoint's "
         "config.json, drop fewer";
}

}  // namespace routecast
