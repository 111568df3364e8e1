// Which part of a corpus is one unit of work. Everything here is a function of the
// corpus, the tokenizer and --max_sequences alone, never of ranks or time; and of an
// intake (corpus.h) and those before it, never of later ones.
#pragma once

#include <cstdint>
#include <functional>
#include <set>
#include <vector>

#include "common/random.h"
#include "common/routing.h"
#include "corpus/corpus.h"
#include "corpus/tokenizer.h"

namespace routecast {

// A document longer than a sequence is cut; segment s of document d is sequence d << 16 |
// s.
inline constexpr int kSegmentBits = 16;
inline constexpr int kMinSequenceTokens = 2;  // less holds nothing to mask or predict

// Tokens of each segment of a document, at most `max_tokens` each; a rest below
// kMinSequenceTokens is left out. A prompt separator ends a segment. At most 2^16 - 1.
std::vector<std::vector<int32_t>> SegmentTokens(const Tokenizer& tokenizer,
                                                std::string_view text, int max_tokens);

struct Chunk {
  uint64_t begin = 0, end = 0;  // positions in the permuted document order
  // A document too long for one chunk is a chunk of its own `num_slices` times: slice i
  // holds the segments s of the n collected with s * num_slices / n == i. Later slices
  // are of a larger num_slices: they taper as chunks do.
  uint32_t slice = 0, num_slices = 1;
  // Of the last document, where --max_sequences ends in it; 0 = all its segments.
  uint64_t last_segments = 0;
  uint64_t text_bytes = 0;  // about; for progress alone
};

// What of an intake is collected.
struct PlannedIntake {
  uint64_t begin = 0, end = 0;  // positions in the permuted document order
  size_t chunk_end = 0;         // in ChunkPlan::chunks, which lie in the intakes' order
  uint64_t last_segments = 0;   // of its last document; 0 = all
};

struct ChunkPlan {
  uint64_t num_documents = 0;  // that are collected
  uint64_t text_bytes = 0;     // of these documents
  std::vector<Chunk> chunks;   // smaller towards an intake's end: ranks end together
  std::vector<PlannedIntake> intakes;
};

// Position in the plan's order -> document: each intake's documents permuted among
// themselves. A prefix of an intake is a fair sample of all its sources.
class DocumentOrder {
 public:
  explicit DocumentOrder(const Corpus& corpus);
  uint64_t operator()(uint64_t position) const;  // REQUIRES below the corpus's size

 private:
  std::vector<uint64_t> ends_;
  std::vector<Permutation> orders_;
};

// How many documents of an intake hold its first `max_sequences` sequences (0 = all).
// Tokenizes documents until then, on `threads` threads; with 0 it reads nothing.
// Where a stop is requested it returns early: the result is then of no use.
struct SequenceLimit {
  uint64_t num_documents = 0, last_segments = 0;
};
SequenceLimit FindSequenceLimit(const Corpus& corpus, size_t intake,
                                const Tokenizer& tokenizer, int max_tokens,
                                uint64_t max_sequences, int threads);
// Throws UsageError where a document that is collected whole has more segments than
// there are ids for: the rest of it would be left out. Tokenizes what may have so many.
void RequireWholeDocuments(const Corpus& corpus, size_t intake,
                           const SequenceLimit& limit, const Tokenizer& tokenizer,
                           int max_tokens);
// `limits`: one an intake. `stored_chunks`: how many chunks each intake has that a store
// was begun with. Where it was before slices tapered, its plan stays.
ChunkPlan MakeChunkPlan(const Corpus& corpus, const std::vector<SequenceLimit>& limits,
                        const std::vector<uint64_t>& stored_chunks = {});

// Document groups whose router inputs are recorded: a share by hash, and where that
// leaves a split part without any in an intake and those before it, the part's first
// group.
std::set<uint64_t> ForcedHiddenGroups(const Corpus& corpus, const ChunkPlan& plan,
                                      double share);

}  // namespace routecast
