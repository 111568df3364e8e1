// The corpus: documents from files, de-duplicated, grouped and split once for everything.
// What a document is depends on the source kind (docs/corpus.md). An index pass reads all
// sources, drops exact duplicates, groups near-duplicates (near_duplicates.h) and caches
// the cleaned texts, so that texts are read from one mapped file afterwards. Thread rule:
// immutable after Open; all const methods from any thread.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "common/routing.h"
#include "corpus/index_file.h"
#include "corpus/source.h"

namespace routecast {

struct Document {
  uint64_t id = 0;     // position in the corpus, 0..size()-1
  uint64_t group = 0;  // near-duplicate group: the smallest content hash in it
  SplitPart part = SplitPart::kTrain;  // SplitOf(group)
  uint64_t content_hash = 0;
  uint64_t length_bytes = 0;   // of Text(id)
  std::string_view source;     // path of the file it came from
  uint64_t source_offset = 0;  // where in that file, unpacked (0 for squad)
};

struct CorpusStats {
  uint64_t documents = 0, groups = 0, text_bytes = 0;
  uint64_t exact_duplicates = 0;             // dropped
  uint64_t binary_documents = 0;             // dropped: IsBinary of readers.h
  uint64_t replaced_bytes = 0;               // not UTF-8, or NUL
  SkippedFiles skipped;                      // of folders, by their names
  std::array<uint64_t, 3> part_documents{};  // by SplitPart
  std::array<uint64_t, 3> part_bytes{};
  double seconds = 0;  // of Open
  bool from_cache = false;
};

class Corpus {
 public:
  // `specs`: kind:path, see source.h. The index is cached below `cache_folder` in a
  // folder named by specs, file sizes and times; an empty `cache_folder` keeps it in
  // memory. Several processes may open the same corpus at once: one indexes, the others
  // wait and share it. A damaged cache is made again. Throws UsageError (unknown kind,
  // missing path, no document), DataError (damaged source, with path and offset),
  // EnvironmentError (disk full), StoppedError. Unless `quiet`, says on stderr which
  // files of folders were skipped by their names.
  static Corpus Open(const std::vector<std::string>& specs, const fs::path& cache_folder,
                     int threads, bool quiet);
  // The same for sources that came in one list after the other, the intakes. Documents of
  // a later intake follow those of the earlier ones; their exact duplicates are dropped,
  // and a component of near-duplicates takes the group of its earliest document that was
  // there before. So a later intake changes nothing about an earlier one.
  static Corpus OpenIntakes(const std::vector<std::vector<std::string>>& intakes,
                            const fs::path& cache_folder, int threads, bool quiet);
  Corpus(Corpus&&) noexcept;
  Corpus& operator=(Corpus&&) noexcept;
  ~Corpus();

  uint64_t size() const { return contents_.entries.size(); }
  Document document(uint64_t i) const;      // REQUIRES i < size()
  std::string_view Text(uint64_t i) const;  // valid UTF-8, as long as the corpus lives
  SplitPart part(uint64_t i) const { return SplitOf(contents_.entries[i].group); }
  // Ids of the documents of a part, ascending.
  std::vector<uint64_t> DocumentsOf(SplitPart part) const;
  const CorpusStats& stats() const { return stats_; }
  // "240650 documents (38.2 MiB) in 231024 groups: 126402 train, ...", for people.
  std::string Summary() const;
  // Of it what was dropped as binary and replaced as foreign bytes; empty where nothing.
  std::string Damage() const;
  // 16 hex digits over content, groups and order: equal exactly where all of these are.
  const std::string& fingerprint() const { return fingerprint_; }
  // Intake k holds the documents [k == 0 ? 0 : ends[k - 1], ends[k]).
  const std::vector<uint64_t>& intake_ends() const { return intake_ends_; }
  // Of the intakes up to this one: what fingerprint() was before later ones came.
  std::string FingerprintAfter(size_t intake) const;

 private:
  class TextStore;
  Corpus();
  void Finish();  // stats and fingerprint from contents_
  IndexContents contents_;
  std::unique_ptr<TextStore> texts_;
  CorpusStats stats_;
  std::string fingerprint_;
  std::vector<uint64_t> intake_ends_;
  friend class CorpusBuilder;
};

}  // namespace routecast
