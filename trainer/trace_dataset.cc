#include "trainer/trace_dataset.h"

#include <algorithm>
#include <climits>
#include <set>

#include "common/errors.h"
#include "common/random.h"
#include "common/stop.h"

namespace routecast {
namespace {

constexpr uint32_t kFewestTokens = 2;
constexpr size_t kScanSequences = 256;
constexpr size_t kSampled = 32;  // for an estimate

uint64_t BytesOf(const RoutingSpan& s) {
  return s.token_ids.size() * 4 + s.expert_ids.size() * 2 + s.gate_probs.size() * 4 +
         s.dropped.size() + s.margins.size() * 4 + s.topk_ids.size() * 2 +
         s.topk_probs.size() * 4 + (s.hidden.size() + s.output.size()) * 2 +
         s.attention_entropy.size() * 4 + s.attention_keys.size() * 2;
}

// Training looks at ids, drops, and what was asked for; the rest would only fill memory.
void DropUnused(RoutingSpan* span, int experts_per_token, bool keep_top_k) {
  span->gate_probs = {};
  span->margins = {};
  if (keep_top_k) return;
  span->topk_probs = {};
  if (experts_per_token > 1) return;  // the ids are labels
  span->topk_ids = {};
  span->top_k = 0;
}

}  // namespace

TraceDataset::TraceDataset(std::shared_ptr<const TraceReader> reader,
                           TraceDatasetOptions options)
    : reader_(std::move(reader)),
      options_(options),
      geometry_(reader_->config().geometry),
      sequences_(reader_->sequences()) {
  if (sequences_.empty()) {
    throw UsageError(ErrorText(reader_->path().string() + " holds no sequence", "",
                               "collect first: routecast-collect --store=..."));
  }
  for (const SequenceInfo& s : sequences_) parts_.push_back(SplitOf(s.group_id));
  kept_.resize(sequences_.size());
}

TraceDataset::TraceDataset(std::vector<RoutingTrace> traces, MoeGeometry geometry,
                           TraceDatasetOptions options)
    : options_(options), geometry_(geometry) {
  for (RoutingTrace& t : traces) {
    SequenceInfo info;
    info.sequence_id = t.sequence_id;
    info.document_id = t.document_id;
    info.group_id = t.group_id;
    info.encoder_tokens = static_cast<uint32_t>(t.encoder.num_tokens);
    info.decoder_tokens = static_cast<uint32_t>(t.decoder.num_tokens);
    info.has_hidden = !t.encoder.hidden.empty() || !t.decoder.hidden.empty();
    sequences_.push_back(info);
    parts_.push_back(SplitOf(t.group_id));
    kept_.push_back(
        {std::make_shared<const RoutingTrace>(std::move(t)), WithHidden::kAttended});
  }
}

uint32_t TraceDataset::length(uint32_t sequence, Stack stack) const {
  const SequenceInfo& s = sequences_[sequence];
  return stack == Stack::kEncoder ? s.encoder_tokens : s.decoder_tokens;
}

bool TraceDataset::any_hidden() const {
  return std::any_of(sequences_.begin(), sequences_.end(),
                     [](const SequenceInfo& s) { return s.has_hidden; });
}

int TraceDataset::top_k() const {
  if (reader_) return reader_->config().top_k;
  int least = kept_.empty() ? 0 : INT_MAX;
  for (const Kept& kept : kept_) {
    for (const RoutingSpan* span : {&kept.trace->encoder, &kept.trace->decoder}) {
      if (span->num_tokens == 0) continue;
      least = std::min(least, span->topk_ids.empty() ? 0 : span->top_k);
    }
  }
  return least;
}

bool TraceDataset::has_teacher() {
  if (!options_.keep_top_k || top_k() == 0) return false;
  const uint32_t first = 0;  // all sequences of a store hold the same
  const auto trace = Read({&first, 1}, WithHidden::kNo)[0];
  return !trace->encoder.topk_probs.empty() || !trace->decoder.topk_probs.empty();
}

int TraceDataset::attention_heads() const {
  if (reader_) return reader_->config().attention_heads;
  int least = INT_MAX;
  for (const Kept& kept : kept_) {
    for (const Stack stack : {Stack::kEncoder, Stack::kDecoder}) {
      const bool decoder = stack == Stack::kDecoder;
      const RoutingSpan& span = decoder ? kept.trace->decoder : kept.trace->encoder;
      if (span.num_tokens == 0 || span.hidden.empty()) continue;
      least = std::min(least, span.attention_heads / (decoder ? 2 : 1));
    }
  }
  return least == INT_MAX ? 0 : least;
}

int64_t TraceDataset::vocab_size() {
  if (reader_ && !reader_->config().token_ids) return 0;
  if (vocab_size_) return *vocab_size_;
  int64_t size = 0;
  std::vector<uint32_t> batch;
  for (uint32_t i = 0; i < sequences_.size(); ++i) {
    batch.push_back(i);
    if (batch.size() < kScanSequences && i + 1 < sequences_.size()) continue;
    for (const auto& trace : Read(batch, WithHidden::kNo)) {
      for (const RoutingSpan* span : {&trace->encoder, &trace->decoder}) {
        for (const uint32_t id : span->token_ids) {
          size = std::max(size, int64_t{id} + 1);
        }
      }
    }
    batch.clear();
    if (StopRequested()) break;  // whoever asks stops before it matters
  }
  vocab_size_ = size;
  return size;
}

void TraceDataset::Keep(uint32_t sequence, WithHidden with,
                        std::shared_ptr<const RoutingTrace> trace) {
  Kept& kept = kept_[sequence];
  if (kept.trace && kept.with >= with) return;  // by another thread, meanwhile
  const uint64_t before =
      kept.trace ? BytesOf(kept.trace->encoder) + BytesOf(kept.trace->decoder) : 0;
  const uint64_t bytes = BytesOf(trace->encoder) + BytesOf(trace->decoder);
  if (kept_bytes_ - before + bytes > options_.cache_bytes) return;
  kept_bytes_ += bytes - before;
  kept = {std::move(trace), with};
}

std::vector<std::shared_ptr<const RoutingTrace>> TraceDataset::Read(
    std::span<const uint32_t> sequences, WithHidden with_hidden) {
  std::vector<std::shared_ptr<const RoutingTrace>> found(sequences.size());
  std::vector<size_t> missing;
  std::vector<uint64_t> ids;
  std::unique_lock lock(*mutex_);
  for (size_t i = 0; i < sequences.size(); ++i) {
    const Kept& kept = kept_[sequences[i]];
    const bool enough = kept.with >= with_hidden || !sequences_[sequences[i]].has_hidden;
    if (kept.trace && enough) {
      found[i] = kept.trace;
    } else {
      missing.push_back(i);
      ids.push_back(sequences_[sequences[i]].sequence_id);
    }
  }
  lock.unlock();
  if (missing.empty()) return found;
  std::vector<RoutingTrace> read = reader_->ReadMany(ids, with_hidden);
  for (size_t m = 0; m < missing.size(); ++m) {
    for (RoutingSpan* span : {&read[m].encoder, &read[m].decoder}) {
      DropUnused(span, geometry_.experts_per_token, options_.keep_top_k);
    }
    found[missing[m]] = std::make_shared<const RoutingTrace>(std::move(read[m]));
  }
  lock.lock();
  for (const size_t m : missing) Keep(sequences[m], with_hidden, found[m]);
  return found;
}

uint64_t TraceDataset::EstimateBytes(SplitPart part, WithHidden with_hidden) {
  if (!reader_) return 0;
  double bytes = 0;
  for (const bool hidden : {false, true}) {
    std::vector<uint32_t> all, some;
    double tokens = 0, sampled = 0, sample_bytes = 0;
    const auto tokens_of = [&](uint32_t i) {
      return 1.0 + sequences_[i].encoder_tokens + sequences_[i].decoder_tokens;
    };
    for (uint32_t i = 0; i < sequences_.size(); ++i) {
      if (parts_[i] != part || sequences_[i].has_hidden != hidden) continue;
      all.push_back(i);
      tokens += tokens_of(i);
    }
    for (size_t i = 0; i < std::min(all.size(), kSampled); ++i) {
      some.push_back(all[i * all.size() / std::min(all.size(), kSampled)]);
      sampled += tokens_of(some.back());
    }
    for (const auto& trace : Read(some, with_hidden)) {
      sample_bytes +=
          static_cast<double>(BytesOf(trace->encoder) + BytesOf(trace->decoder));
    }
    if (!some.empty()) bytes += sample_bytes * tokens / sampled;
  }
  return static_cast<uint64_t>(bytes);
}

bool TraceDataset::FitsInCache(SplitPart part, WithHidden with_hidden) {
  return EstimateBytes(part, with_hidden) <= options_.cache_bytes;
}

bool TraceDataset::KeepAll(SplitPart part, WithHidden with_hidden) {
  if (!reader_) return true;
  if (!FitsInCache(part, with_hidden)) return false;
  std::vector<uint32_t> batch;
  for (uint32_t i = 0; i < sequences_.size() && !StopRequested(); ++i) {
    if (parts_[i] == part) batch.push_back(i);
    if (batch.size() < kScanSequences && i + 1 < sequences_.size()) continue;
    Read(batch, with_hidden);
    batch.clear();
  }
  return true;
}

std::vector<uint32_t> TraceDataset::Select(SplitPart part, Stack stack,
                                           WithHidden with_hidden) const {
  std::vector<uint32_t> chosen;
  for (uint32_t i = 0; i < sequences_.size(); ++i) {
    if (parts_[i] != part || length(i, stack) < kFewestTokens) continue;
    if (with_hidden != WithHidden::kNo && !sequences_[i].has_hidden) continue;
    chosen.push_back(i);
  }
  return chosen;
}

std::string TraceDataset::fingerprint() const {
  uint64_t hash = 0;
  if (reader_) {  // two models may have sequences of equal ids and lengths
    const StoreConfig& c = reader_->config();
    const Json what = {c.model_fingerprint, c.corpus_fingerprint,
                       static_cast<int>(c.task), c.noise_density, c.seed};
    hash = Hash64(what.dump());
  } else {
    for (const Kept& kept : kept_) {
      for (const RoutingSpan* span : {&kept.trace->encoder, &kept.trace->decoder}) {
        for (const uint16_t expert : span->expert_ids) hash = Mix(hash, expert);
      }
    }
  }
  for (const SequenceInfo& s : sequences_) {
    hash = Mix(hash, s.sequence_id, s.group_id,
               (uint64_t{s.encoder_tokens} << 32) | s.decoder_tokens, s.has_hidden);
  }
  return Hex64(hash);
}

Json TraceDataset::SplitJson() const {
  Json json = Json::object();
  for (const SplitPart part :
       {SplitPart::kTrain, SplitPart::kValidation, SplitPart::kTest}) {
    std::set<uint64_t> documents;
    uint64_t samples = 0, with_hidden = 0;
    for (uint32_t i = 0; i < sequences_.size(); ++i) {
      if (parts_[i] != part) continue;
      documents.insert(sequences_[i].document_id);
      ++samples;
      with_hidden += sequences_[i].has_hidden;
    }
    json[SplitPartName(part)] = {{"documents", documents.size()},
                                 {"samples", samples},
                                 {"samples_with_router_inputs", with_hidden}};
  }
  return json;
}

}  // namespace routecast
