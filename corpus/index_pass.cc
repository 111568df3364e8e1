#include "corpus/index_pass.h"

#include <algorithm>
#include <limits>
#include <string>
#include <unordered_map>
#include <unordered_set>

#include "common/errors.h"
#include "common/progress.h"
#include "common/stop.h"
#include "corpus/parallel.h"
#include "corpus/readers.h"

namespace routecast {
namespace {

constexpr uint64_t kBatchBytes = uint64_t{16} << 20;

// What one record becomes; filled by worker threads.
struct Prepared {
  std::string raw;  // own copy: the reader's bytes do not outlive the call
  RawRecord record;
  std::string text, error;  // error: of a line that is no record
  uint64_t hash = 0, foreign_bytes = 0;
  bool has_signature = false;
  MinHash signature{};
};

// Lines of a file that are no records: the first one's error, and where the others are.
class BadLines {
 public:
  // Throws where there are so many that the rest is not worth reading.
  void Add(uint64_t line, const std::string& error) {
    if (++count_ == 1) error_ = error;
    if (count_ > 1 && count_ <= kNamed) {
      names_ += (names_.empty() ? "" : ", ") + std::to_string(line);
    }
    if (count_ == kMost) Throw("at least ");
  }
  void ThrowIfAny() const {
    if (count_ > 0) Throw("");
  }

 private:
  static constexpr uint64_t kNamed = 5, kMost = 100'000;
  [[noreturn]] void Throw(const char* about) const {
    std::string text = error_;
    const size_t second = text.find('\n');
    const size_t end = std::min(text.find('\n', second + 1), text.size());
    if (count_ > 1) {
      const uint64_t more = count_ - std::min(count_, kNamed);
      text.insert(
          end, "; nor do these read: line" + std::string(count_ > 2 ? "s " : " ") +
                   names_ +
                   (more > 0 ? " and " + (about + std::to_string(more)) + " more" : ""));
    }
    throw DataError(text);
  }
  uint64_t count_ = 0;
  std::string error_, names_;
};

class Pass {
 public:
  Pass(int threads, bool quiet, const std::function<void(std::string_view)>& append,
       uint64_t total_bytes)
      : threads_(threads),
        append_(append),
        progress_("index", "bytes", total_bytes, quiet) {}

  void ReadFile(const SourceSpec& spec, const fs::path& path) {
    const SourceFile file(path);
    path_ = path.string();
    spec_ = &spec;
    result_.contents.files.push_back(path_);
    ReadFileRecords(spec, file, path_, [&](const RawRecord& record) {
      Prepared prepared;
      prepared.record = record;
      // One that fills a batch is gone through before this call ends.
      if (record.raw.size() < kBatchBytes) prepared.raw = record.raw;
      batch_.push_back(std::move(prepared));
      batch_bytes_ += record.raw.size() + sizeof prepared;  // records may be tiny
      if (batch_bytes_ >= kBatchBytes) Flush();
    });
    Flush();
    bad_lines_.ThrowIfAny();
    std::error_code ignored;
    done_bytes_ += fs::file_size(path, ignored);
    progress_.Update(done_bytes_);
  }

  IndexPassResult Take() {
    progress_.Finish(std::to_string(result_.contents.entries.size()) + " documents");
    return std::move(result_);
  }

 private:
  void Flush() {
    ParallelFor(batch_.size(), threads_, [&](size_t i) {
      Prepared& one = batch_[i];
      if (!one.raw.empty()) one.record.raw = one.raw;
      one.foreign_bytes = CountForeignBytes(one.record.raw);
      if (IsBinary(one.foreign_bytes, one.record.raw.size())) return;
      try {
        one.text = RecordText(*spec_, one.record, path_);
      } catch (const DataError& error) {
        if (one.record.line == 0) throw;
        one.error = error.what();
        return;
      }
      one.hash = Hash64(one.text);
      const auto shingles = Shingles(one.text);
      one.has_signature = !shingles.empty();
      if (one.has_signature) one.signature = ComputeMinHash(shingles);
    });
    for (const Prepared& one : batch_) Keep(one);
    batch_.clear();
    batch_bytes_ = 0;
    if (StopRequested())
      throw StoppedError("stopped during the index pass; start it again");
  }

  void Keep(const Prepared& one) {
    if (IsBinary(one.foreign_bytes, one.record.raw.size())) {
      ++result_.contents.binary_documents;
      return;
    }
    if (!one.error.empty()) return bad_lines_.Add(one.record.line, one.error);
    if (one.text.empty()) return;
    if (!seen_.insert(one.hash).second) {
      ++result_.contents.exact_duplicates;
      return;
    }
    if (one.text.size() > std::numeric_limits<uint32_t>::max()) {
      throw DataError(ErrorText(path_ + ": a document larger than 4 GiB",
                                "at byte " + std::to_string(one.record.offset),
                                "cut it, or read it as text:PATH#blocks"));
    }
    IndexContents& contents = result_.contents;
    const uint64_t id = contents.entries.size();
    contents.entries.push_back(
        {.content_hash = one.hash,
         .group = one.hash,
         .text_offset = contents.text_bytes,
         .source_offset = one.record.offset,
         .length_bytes = static_cast<uint32_t>(one.text.size()),
         .file = static_cast<uint32_t>(contents.files.size() - 1)});
    contents.text_bytes += one.text.size();
    contents.replaced_bytes += one.foreign_bytes;
    append_(one.text);
    if (one.has_signature) result_.signatures.push_back({id, one.signature});
  }

  int threads_;
  const std::function<void(std::string_view)>& append_;
  Progress progress_;
  IndexPassResult result_;
  std::unordered_set<uint64_t> seen_;
  std::vector<Prepared> batch_;
  BadLines bad_lines_;
  uint64_t batch_bytes_ = 0, done_bytes_ = 0;
  std::string path_;
  const SourceSpec* spec_ = nullptr;
};

}  // namespace

IndexPassResult ReadSources(const std::vector<SourceFiles>& sources, int threads,
                            bool quiet,
                            const std::function<void(std::string_view)>& append) {
  uint64_t total = 0;
  std::error_code ignored;
  for (const auto& source : sources) {
    for (const auto& file : source.files) total += fs::file_size(file, ignored);
  }
  Pass pass(threads, quiet, append, total);
  for (const auto& source : sources) {
    for (const auto& file : source.files) pass.ReadFile(source.spec, file);
  }
  return pass.Take();
}

void AssignGroups(const std::vector<Signature>& signatures,
                  const std::function<std::string_view(uint64_t)>& text, int threads,
                  uint64_t begin, uint64_t end, IndexContents* contents) {
  auto& entries = contents->entries;
  std::vector<uint64_t> earlier(begin);  // the first document of each one's group
  std::unordered_map<uint64_t, uint64_t> first_of;
  for (uint64_t i = 0; i < begin; ++i) {
    earlier[i] = first_of.emplace(entries[i].group, i).first->second;
  }
  std::vector<Signature> known;  // signatures ascend by document
  for (const Signature& s : signatures) {
    if (s.document < end) known.push_back(s);
  }
  const auto roots = NearDuplicateGroups(end, known, text, threads, earlier);
  std::vector<uint64_t> smallest(end, std::numeric_limits<uint64_t>::max());
  for (uint64_t i = begin; i < end; ++i) {
    smallest[roots[i]] = std::min(smallest[roots[i]], entries[i].content_hash);
  }
  for (uint64_t i = begin; i < end; ++i) {
    entries[i].group = roots[i] < begin ? entries[roots[i]].group : smallest[roots[i]];
  }
}

}  // namespace routecast
