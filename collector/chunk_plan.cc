#include "collector/chunk_plan.h"

#include <algorithm>
#include <array>
#include <optional>

#include "common/errors.h"
#include "common/stop.h"
#include "corpus/parallel.h"
#include "corpus/task_prompts.h"

namespace routecast {
namespace {

constexpr uint64_t kMaxChunkBytes = 128 << 10;  // of text: bounds a rank's memory
constexpr uint64_t kMinChunkBytes = 8 << 10;    // below, staging and ingestion would show
constexpr uint64_t kTaper = 48;                 // a chunk takes 1/48 of what is left
constexpr uint64_t kLimitBatch = 512;           // documents tokenized between two looks
constexpr uint64_t kOrderKey = 0x636f6c6c656374ULL;
constexpr size_t kMaxSegments = (size_t{1} << kSegmentBits) - 1;
constexpr uint64_t kMostTokensPerByte = 2;  // normalized text may be longer than it was

// Of a chunk with `left` bytes of text from its beginning to the intake's end.
uint64_t TargetBytes(uint64_t left) {
  return std::clamp(left / kTaper, kMinChunkBytes, kMaxChunkBytes);
}

void CutTokens(const std::vector<int32_t>& ids, int max_tokens,
               std::vector<std::vector<int32_t>>* segments) {
  for (size_t at = 0; at < ids.size() && segments->size() < kMaxSegments;
       at += static_cast<size_t>(max_tokens)) {
    const size_t end = std::min(ids.size(), at + static_cast<size_t>(max_tokens));
    if (end - at < kMinSequenceTokens) break;
    segments->emplace_back(ids.begin() + static_cast<std::ptrdiff_t>(at),
                           ids.begin() + static_cast<std::ptrdiff_t>(end));
  }
}

// Stores of before cut a long document into equal slices.
enum class Slices { kTapered, kEqual };

// Adds the slices of a document of `bytes`, with `left` to come from its beginning on:
// slice i of n, and where a slice would be twice as large as chunks are by then, slices
// 2i and on of 2n.
void AddSlices(uint64_t position, uint64_t bytes, uint64_t left, Slices slices,
               std::vector<Chunk>* chunks) {
  const uint64_t target = TargetBytes(left);
  auto count = static_cast<uint32_t>((bytes + target - 1) / target);
  const uint64_t behind = left - bytes;
  for (uint32_t i = 0; i < count; ++i) {
    const uint64_t to_come = behind + bytes - bytes * i / count;
    while (slices == Slices::kTapered && bytes / count >= 2 * TargetBytes(to_come)) {
      i *= 2;
      count *= 2;
    }
    chunks->push_back({position, position + 1, i, count, 0, bytes / count});
  }
}

// The chunks of one intake.
std::vector<Chunk> ChunksOf(const Corpus& corpus, const DocumentOrder& order,
                            const PlannedIntake& range, uint64_t left, Slices slices) {
  std::vector<Chunk> chunks;
  for (uint64_t p = range.begin; p < range.end;) {
    const uint64_t target = TargetBytes(left);
    const uint64_t first_bytes = corpus.document(order(p)).length_bytes;
    if (first_bytes > 2 * target) {
      AddSlices(p, first_bytes, left, slices, &chunks);
      left -= first_bytes;
      ++p;
      continue;
    }
    Chunk chunk{p, p, 0, 1};
    uint64_t bytes = 0;
    while (chunk.end < range.end && bytes < target) {
      const uint64_t more = corpus.document(order(chunk.end)).length_bytes;
      if (more > 2 * target) break;  // it is sliced on its own
      bytes += more;
      ++chunk.end;
    }
    left -= bytes;
    p = chunk.end;
    chunk.text_bytes = bytes;
    chunks.push_back(chunk);
  }
  for (Chunk& chunk : chunks) {
    if (chunk.end == range.end) chunk.last_segments = range.last_segments;
  }
  return chunks;
}

// Of an intake that a store was begun with as many chunks as `stored`. Tapering only cuts
// equal slices further: where the two plans differ, so do their numbers of chunks.
std::vector<Chunk> ChunksOf(const Corpus& corpus, const DocumentOrder& order,
                            const PlannedIntake& range, uint64_t text_bytes,
                            std::optional<uint64_t> stored) {
  auto chunks = ChunksOf(corpus, order, range, text_bytes, Slices::kTapered);
  if (!stored || chunks.size() == *stored) return chunks;
  auto equal = ChunksOf(corpus, order, range, text_bytes, Slices::kEqual);
  return equal.size() == *stored ? equal : chunks;
}

}  // namespace

std::vector<std::vector<int32_t>> SegmentTokens(const Tokenizer& tokenizer,
                                                std::string_view text, int max_tokens) {
  std::vector<std::vector<int32_t>> segments;
  while (!text.empty()) {
    const size_t end = std::min(text.find(kPromptSeparator), text.size());
    CutTokens(tokenizer.EncodePlain(text.substr(0, end)), max_tokens, &segments);
    text.remove_prefix(std::min(end + 1, text.size()));
  }
  return segments;
}

DocumentOrder::DocumentOrder(const Corpus& corpus) : ends_(corpus.intake_ends()) {
  uint64_t begin = 0;
  for (const uint64_t end : ends_) {
    orders_.emplace_back(end - begin, kOrderKey);
    begin = end;
  }
}

uint64_t DocumentOrder::operator()(uint64_t position) const {
  size_t intake = 0;
  while (position >= ends_[intake]) ++intake;
  const uint64_t begin = intake == 0 ? 0 : ends_[intake - 1];
  return begin + orders_[intake](position - begin);
}

SequenceLimit FindSequenceLimit(const Corpus& corpus, size_t intake,
                                const Tokenizer& tokenizer, int max_tokens,
                                uint64_t max_sequences, int threads) {
  const uint64_t begin = intake == 0 ? 0 : corpus.intake_ends()[intake - 1];
  const uint64_t size = corpus.intake_ends()[intake] - begin;
  if (max_sequences == 0) return {size, 0};
  const DocumentOrder order(corpus);
  uint64_t sequences = 0;
  for (uint64_t first = 0; first < size; first += kLimitBatch) {
    const uint64_t count = std::min(kLimitBatch, size - first);
    if (StopRequested()) return {first, 0};
    std::vector<uint64_t> segments(count);
    ParallelFor(count, threads, [&](size_t i) {
      const std::string_view text = corpus.Text(order(begin + first + i));
      segments[i] = SegmentTokens(tokenizer, text, max_tokens).size();
    });
    for (uint64_t i = 0; i < count; ++i) {
      if (sequences + segments[i] >= max_sequences) {
        return {first + i + 1, max_sequences - sequences};
      }
      sequences += segments[i];
    }
  }
  return {size, 0};
}

void RequireWholeDocuments(const Corpus& corpus, size_t intake,
                           const SequenceLimit& limit, const Tokenizer& tokenizer,
                           int max_tokens) {
  const uint64_t begin = intake == 0 ? 0 : corpus.intake_ends()[intake - 1];
  const DocumentOrder order(corpus);
  // Of the last one as much is taken as was asked for.
  const uint64_t whole = limit.num_documents - (limit.last_segments > 0 ? 1 : 0);
  for (uint64_t p = begin; p < begin + whole; ++p) {
    const Document document = corpus.document(order(p));
    if (document.length_bytes < kMaxSegments) continue;
    const std::string_view text = corpus.Text(document.id);
    const auto prompts =
        static_cast<uint64_t>(std::count(text.begin(), text.end(), kPromptSeparator));
    const auto width = static_cast<uint64_t>(max_tokens);
    if (prompts + kMostTokensPerByte * text.size() / width + 1 < kMaxSegments) continue;
    if (SegmentTokens(tokenizer, text, max_tokens).size() < kMaxSegments) continue;
    throw UsageError(ErrorText(
        std::string(document.source) + ": a document is too long to be collected whole",
        FormatBytes(document.length_bytes) + " from byte " +
            std::to_string(document.source_offset) + " on are more than " +
            std::to_string(kMaxSegments) + " sequences of " +
            std::to_string(max_tokens + 1) + " tokens",
        "cut it (text:PATH#blocks), or use a larger --max_length or fewer "
        "--max_sequences"));
  }
}

ChunkPlan MakeChunkPlan(const Corpus& corpus, const std::vector<SequenceLimit>& limits,
                        const std::vector<uint64_t>& stored_chunks) {
  const DocumentOrder order(corpus);
  ChunkPlan plan;
  uint64_t begin = 0;
  for (size_t intake = 0; intake < limits.size(); ++intake) {
    PlannedIntake range{begin, begin + limits[intake].num_documents, 0,
                        limits[intake].last_segments};
    uint64_t text_bytes = 0;
    for (uint64_t p = range.begin; p < range.end; ++p) {
      text_bytes += corpus.document(order(p)).length_bytes;
    }
    const auto stored = intake < stored_chunks.size()
                            ? std::optional(stored_chunks[intake])
                            : std::nullopt;
    const auto chunks = ChunksOf(corpus, order, range, text_bytes, stored);
    plan.chunks.insert(plan.chunks.end(), chunks.begin(), chunks.end());
    plan.num_documents += range.end - range.begin;
    plan.text_bytes += text_bytes;
    range.chunk_end = plan.chunks.size();
    plan.intakes.push_back(range);
    begin = corpus.intake_ends()[intake];
  }
  return plan;
}

std::set<uint64_t> ForcedHiddenGroups(const Corpus& corpus, const ChunkPlan& plan,
                                      double share) {
  std::set<uint64_t> forced;
  if (share <= 0) return forced;
  const DocumentOrder order(corpus);
  struct Part {
    bool present = false, chosen = false;
    uint64_t first_group = 0;
  };
  std::array<Part, 3> parts;
  for (const PlannedIntake& intake : plan.intakes) {
    for (uint64_t p = intake.begin; p < intake.end; ++p) {
      const Document document = corpus.document(order(p));
      Part& part = parts[static_cast<size_t>(document.part)];
      if (!part.present) part.first_group = document.group;
      part.present = true;
      part.chosen = part.chosen || HiddenShareOf(document.group, share);
    }
    for (Part& part : parts) {
      if (part.present && !part.chosen) forced.insert(part.first_group);
      part.chosen = part.present;
    }
  }
  return forced;
}

}  // namespace routecast
