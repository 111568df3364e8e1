// The index pass: sources -> cleaned texts, documents, groups.
#pragma once

#include <functional>
#include <string_view>
#include <vector>

#include "corpus/index_file.h"
#include "corpus/near_duplicates.h"
#include "corpus/source.h"

namespace routecast {

struct SourceFiles {
  SourceSpec spec;
  std::vector<fs::path> files;
};

// Reads all sources batch by batch: texts go to `append` in order, documents and
// signatures stay. Thread rule: one thread calls; it runs `threads` of its own. `append`
// is called on the caller.
struct IndexPassResult {
  IndexContents contents;  // text_hash and groups not yet set
  std::vector<Signature> signatures;
};
IndexPassResult ReadSources(const std::vector<SourceFiles>& sources, int threads,
                            bool quiet,
                            const std::function<void(std::string_view)>& append);

// Sets `group` of the entries [begin, end); those before have theirs, and keep it. `text`
// gives the text of document i.
void AssignGroups(const std::vector<Signature>& signatures,
                  const std::function<std::string_view(uint64_t)>& text, int threads,
                  uint64_t begin, uint64_t end, IndexContents* contents);

}  // namespace routecast
