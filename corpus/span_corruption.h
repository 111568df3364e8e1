// T5's span corruption (Raffel et al. 2020, section 3.1.4; t5/data/preprocessors.py
// random_spans_noise_mask): a share of the tokens is replaced by sentinels, one a span,
// and the targets spell out what each stood for. Thread rule: a pure function of its
// arguments.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace routecast {

struct SpanCorruptionOptions {
  double noise_density = 0.15;  // share of the tokens that are masked, in (0, 1)
  double mean_span = 3.0;       // mean tokens of a masked span, >= 1
};

// The sentinels of a tokenizer: sentinel k has id `first - k`.
struct Sentinels {
  int32_t first = 0;  // Tokenizer::Sentinel(0)
  int count = 0;      // Tokenizer::num_sentinels()
};

struct CorruptedSpans {
  std::vector<int32_t> inputs;   // kept tokens, a sentinel a span; ends with eos
  std::vector<int32_t> targets;  // sentinel, span, sentinel, span, ...; ends with eos
  int num_spans = 0;
};

// Draws round(density * n) noise tokens (at least 1, at most n - 1) in round(noise /
// mean_span) spans (at least 1, at most sentinels.count), by random partitions of noise
// and of kept tokens into equally many non-empty segments; the first segment is kept
// tokens, as in T5. Fewer than two ids: nothing is masked. Where the sentinels run short,
// spans get longer. Throws UsageError for options out of range or no sentinels.
CorruptedSpans CorruptSpans(std::span<const int32_t> ids, uint64_t seed,
                            const SpanCorruptionOptions& options,
                            const Sentinels& sentinels);

// The ids that inputs and targets came from: the inverse, for tests and for showing
// examples.
std::vector<int32_t> RestoreSpans(std::span<const int32_t> inputs,
                                  std::span<const int32_t> targets,
                                  const Sentinels& sentinels);

}  // namespace routecast
