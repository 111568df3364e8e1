#include "corpus/span_corruption.h"

#include <algorithm>
#include <cmath>
#include <string>

#include "common/errors.h"
#include "common/random.h"

namespace routecast {
namespace {

constexpr int32_t kEos = 1;

// A uniformly random composition of `items` into `segments` positive parts: choose the
// segments - 1 cuts among items - 1 places (selection sampling, Knuth 3.4.2 S).
std::vector<int> RandomSegments(int items, int segments, uint64_t seed) {
  std::vector<int> lengths;
  lengths.reserve(segments);
  int cuts_left = segments - 1, last_cut = 0;
  for (int place = 1; place < items && cuts_left > 0; ++place) {
    const uint64_t bits = Mix(seed, static_cast<uint64_t>(place));
    if (ToRange(bits, static_cast<uint64_t>(items - place)) <
        static_cast<uint64_t>(cuts_left)) {
      lengths.push_back(place - last_cut);
      last_cut = place;
      --cuts_left;
    }
  }
  lengths.push_back(items - last_cut);
  return lengths;
}

void Validate(const SpanCorruptionOptions& options, const Sentinels& sentinels) {
  if (!(options.noise_density > 0 && options.noise_density < 1) ||
      !(options.mean_span >= 1)) {
    throw UsageError(ErrorText(
        "span corruption: noise density or mean span out of range",
        std::to_string(options.noise_density) + ", " + std::to_string(options.mean_span),
        "density between 0 and 1, mean span at least 1"));
  }
  if (sentinels.count < 1) {
    throw UsageError(ErrorText("span corruption needs a tokenizer with sentinels",
                               "extra_ids is 0 in tokenizer_config.json",
                               "use --task=encode or generate, or a T5 tokenizer"));
  }
}

}  // namespace

CorruptedSpans CorruptSpans(std::span<const int32_t> ids, uint64_t seed,
                            const SpanCorruptionOptions& options,
                            const Sentinels& sentinels) {
  Validate(options, sentinels);
  CorruptedSpans out;
  const int n = static_cast<int>(ids.size());
  if (n >= 2) {
    const int noise =
        std::clamp(static_cast<int>(std::lround(n * options.noise_density)), 1, n - 1);
    const int kept = n - noise;
    const int spans = std::clamp(static_cast<int>(std::lround(noise / options.mean_span)),
                                 1, std::min({noise, kept, sentinels.count}));
    const auto noise_lengths = RandomSegments(noise, spans, Mix(seed, uint64_t{1}));
    const auto kept_lengths = RandomSegments(kept, spans, Mix(seed, uint64_t{2}));
    out.num_spans = spans;
    out.inputs.reserve(kept + spans + 1);
    out.targets.reserve(noise + spans + 1);
    auto at = ids.begin();
    for (int s = 0; s < spans; ++s) {
      out.inputs.insert(out.inputs.end(), at, at + kept_lengths[s]);
      at += kept_lengths[s];
      out.inputs.push_back(sentinels.first - s);
      out.targets.push_back(sentinels.first - s);
      out.targets.insert(out.targets.end(), at, at + noise_lengths[s]);
      at += noise_lengths[s];
    }
  } else {
    out.inputs.assign(ids.begin(), ids.end());
  }
  out.inputs.push_back(kEos);
  out.targets.push_back(kEos);
  return out;
}

std::vector<int32_t> RestoreSpans(std::span<const int32_t> inputs,
                                  std::span<const int32_t> targets,
                                  const Sentinels& sentinels) {
  const auto is_sentinel = [&](int32_t id) {
    return id <= sentinels.first && id > sentinels.first - sentinels.count;
  };
  const auto body = [](std::span<const int32_t> ids) {  // without the closing eos
    return !ids.empty() && ids.back() == kEos ? ids.first(ids.size() - 1) : ids;
  };
  std::vector<int32_t> ids;
  for (const int32_t id : body(inputs)) {
    if (!is_sentinel(id)) {
      ids.push_back(id);
      continue;
    }
    const auto span = body(targets);
    auto at = std::find(span.begin(), span.end(), id);
    if (at == span.end()) continue;
    for (++at; at != span.end() && !is_sentinel(*at); ++at) ids.push_back(*at);
  }
  return ids;
}

}  // namespace routecast
