#include "corpus/corpus.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <fstream>
#include <optional>
#include <unordered_set>

#include "common/errors.h"
#include "common/foreign_text.h"
#include "common/random.h"
#include "corpus/index_pass.h"
#include "corpus/mapped_file.h"

namespace routecast {

// The texts of all documents: in memory, or a mapped text.bin.
class Corpus::TextStore {
 public:
  explicit TextStore(std::string owned) : owned_(std::move(owned)), bytes_(owned_) {}
  explicit TextStore(const fs::path& file)
      : file_(std::make_unique<MappedFile>(file)), bytes_(file_->bytes()) {}
  std::string_view bytes() const { return bytes_; }

 private:
  std::string owned_;
  std::unique_ptr<MappedFile> file_;
  std::string_view bytes_;
};

namespace {

constexpr const char* kIndexName = "index.bin";
constexpr const char* kTextName = "text.bin";
constexpr uint64_t kMaxIndexBytes = uint64_t{64} << 30;

// Held while the index is made: the other processes of a job wait instead of doing it
// again.
class FileLock {
 public:
  explicit FileLock(const fs::path& path)
      : fd_(::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0644)) {
    if (fd_ < 0) ThrowErrno(errno, "create", path);
    while (::flock(fd_, LOCK_EX) != 0) {
      if (errno != EINTR) ThrowErrno(errno, "lock", path);
    }
  }
  ~FileLock() { ::close(fd_); }
  FileLock(const FileLock&) = delete;
  FileLock& operator=(const FileLock&) = delete;

 private:
  int fd_;
};

// All intakes' sources, and where each intake's files end.
struct SourceList {
  std::vector<SourceFiles> sources;
  std::vector<uint64_t> file_ends;
  SkippedFiles skipped;
};

SourceList ListSources(const std::vector<std::vector<std::string>>& intakes) {
  SourceList list;
  uint64_t files = 0;
  for (const auto& specs : intakes) {
    if (specs.empty()) {
      throw UsageError(ErrorText("--data is missing", "",
                                 "give at least one source, e.g. --data=text:book.txt"));
    }
    for (const std::string& text : specs) {
      SourceSpec spec = ParseSourceSpec(text);
      list.sources.push_back({spec, ListFiles(spec, &list.skipped)});
      files += list.sources.back().files.size();
    }
    list.file_ends.push_back(files);
  }
  return list;
}

void SaySkipped(const SkippedFiles& skipped) {
  if (skipped.count == 0) return;
  std::fprintf(stderr,
               "corpus: %llu files of other names were skipped, the first is %s: a "
               "pattern takes any name\n",
               static_cast<unsigned long long>(skipped.count),
               OneLine(skipped.first).c_str());
}

// Documents lie in the order of the files.
std::vector<uint64_t> DocumentEnds(const std::vector<uint64_t>& file_ends,
                                   const std::vector<IndexEntry>& entries) {
  std::vector<uint64_t> ends;
  for (const uint64_t end : file_ends) {
    const auto behind =
        std::partition_point(entries.begin(), entries.end(),
                             [end](const IndexEntry& e) { return e.file < end; });
    ends.push_back(static_cast<uint64_t>(behind - entries.begin()));
  }
  return ends;
}

// Changes when a source changes, or the format or the rules of the index do.
std::string CacheKey(const SourceList& list) {
  uint64_t key =
      Mix(kIndexVersion, uint64_t{kHashes}, uint64_t{kRows}, uint64_t{kShingleWords});
  // Groups depend on which intake a document came with.
  if (list.file_ends.size() > 1) {
    for (const uint64_t end : list.file_ends) key = Mix(key, end);
  }
  for (const auto& source : list.sources) {
    key = Mix(key, static_cast<uint64_t>(source.spec.kind), Hash64(source.spec.field));
    for (const auto& file : source.files) {
      struct stat info;
      if (::stat(file.c_str(), &info) != 0) ThrowErrno(errno, "stat", file);
      key = Mix(key, Hash64(fs::absolute(file).string()),
                static_cast<uint64_t>(info.st_size),
                static_cast<uint64_t>(info.st_mtim.tv_sec),
                static_cast<uint64_t>(info.st_mtim.tv_nsec));
    }
  }
  return Hex64(key);
}

}  // namespace

// Makes a corpus from a cache folder or from its sources.
class CorpusBuilder {
 public:
  static Corpus InMemory(const SourceList& list, int threads, bool quiet) {
    Corpus corpus;
    std::string texts;
    auto pass = ReadSources(list.sources, threads, quiet,
                            [&texts](std::string_view text) { texts += text; });
    corpus.contents_ = std::move(pass.contents);
    corpus.texts_ = std::make_unique<Corpus::TextStore>(std::move(texts));
    Group(pass.signatures, list.file_ends, threads, &corpus);
    return corpus;
  }

  // How many documents were dropped as binary.
  static uint64_t Write(const SourceList& list, const fs::path& folder, int threads,
                        bool quiet) {
    SealedFolder sealed(folder);
    const fs::path text_path = sealed.path() / kTextName;
    std::ofstream out(text_path, std::ios::binary);
    auto pass = ReadSources(list.sources, threads, quiet, [&](std::string_view text) {
      out.write(text.data(), static_cast<std::streamsize>(text.size()));
      if (!out) ThrowErrno(errno ? errno : EIO, "write", text_path);
    });
    out.close();
    if (!out) ThrowErrno(errno ? errno : EIO, "write", text_path);
    Corpus corpus;
    corpus.contents_ = std::move(pass.contents);
    corpus.texts_ = std::make_unique<Corpus::TextStore>(text_path);
    Group(pass.signatures, list.file_ends, threads, &corpus);
    const uint64_t binary = corpus.contents_.binary_documents;
    if (corpus.size() == 0) return binary;  // nothing to seal: Open reports it
    WriteFileAtomic(sealed.path() / kIndexName, SerializeIndex(corpus.contents_));
    sealed.Commit();
    return binary;
  }

  // Nothing where the cache is absent or damaged.
  static std::optional<Corpus> Load(const fs::path& folder) {
    if (!fs::exists(folder / kIndexName) || !fs::exists(folder / kTextName)) return {};
    try {
      Corpus corpus;
      const fs::path index = folder / kIndexName;
      corpus.contents_ = ParseIndex(ReadFile(index, kMaxIndexBytes), index.string());
      // Through reads: a sector that has gone bad since is an error, not a signal.
      if (HashFile(folder / kTextName) != corpus.contents_.text_hash) return {};
      corpus.texts_ = std::make_unique<Corpus::TextStore>(folder / kTextName);
      if (corpus.texts_->bytes().size() != corpus.contents_.text_bytes) return {};
      return corpus;
    } catch (const DataError&) {
      return {};
    }
  }

 private:
  static void Group(const std::vector<Signature>& signatures,
                    const std::vector<uint64_t>& file_ends, int threads, Corpus* corpus) {
    IndexContents* contents = &corpus->contents_;
    contents->text_hash = Hash64(corpus->texts_->bytes());
    uint64_t begin = 0;
    for (const uint64_t end : DocumentEnds(file_ends, contents->entries)) {
      AssignGroups(
          signatures, [corpus](uint64_t i) { return corpus->Text(i); }, threads, begin,
          end, contents);
      begin = end;
    }
  }
};

Corpus::Corpus() = default;
Corpus::Corpus(Corpus&&) noexcept = default;
Corpus& Corpus::operator=(Corpus&&) noexcept = default;
Corpus::~Corpus() = default;

Corpus Corpus::Open(const std::vector<std::string>& specs, const fs::path& cache_folder,
                    int threads, bool quiet) {
  return OpenIntakes({specs}, cache_folder, threads, quiet);
}

Corpus Corpus::OpenIntakes(const std::vector<std::vector<std::string>>& intakes,
                           const fs::path& cache_folder, int threads, bool quiet) {
  const auto start = std::chrono::steady_clock::now();
  const SourceList sources = ListSources(intakes);
  if (!quiet) SaySkipped(sources.skipped);
  std::optional<Corpus> corpus;
  bool from_cache = false;
  uint64_t binary = 0;
  if (cache_folder.empty()) {
    corpus = CorpusBuilder::InMemory(sources, threads, quiet);
    binary = corpus->contents_.binary_documents;
  } else {
    MakeFolder(cache_folder);
    const fs::path folder = cache_folder / ("corpus-" + CacheKey(sources));
    corpus = CorpusBuilder::Load(folder);
    from_cache = corpus.has_value();
    if (!corpus) {
      const FileLock lock(folder.string() + ".lock");
      corpus = CorpusBuilder::Load(folder);  // another process may have made it meanwhile
      from_cache = corpus.has_value();
      if (!corpus) {
        binary = CorpusBuilder::Write(sources, folder, threads, quiet);
        corpus = CorpusBuilder::Load(folder);
      }
    }
  }
  if (!corpus || corpus->size() == 0) {
    throw UsageError(ErrorText(
        "the corpus is empty",
        intakes.front().front() + " holds no document" +
            (binary == 0 ? ""
                         : "; " + std::to_string(binary) + " binary ones were dropped"),
        "give a file with text, or another kind"));
  }
  corpus->intake_ends_ = DocumentEnds(sources.file_ends, corpus->contents_.entries);
  corpus->Finish();
  corpus->stats_.skipped = sources.skipped;
  corpus->stats_.from_cache = from_cache;
  corpus->stats_.seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return std::move(*corpus);
}

Document Corpus::document(uint64_t i) const {
  const IndexEntry& entry = contents_.entries[i];
  return {.id = i,
          .group = entry.group,
          .part = SplitOf(entry.group),
          .content_hash = entry.content_hash,
          .length_bytes = entry.length_bytes,
          .source = contents_.files[entry.file],
          .source_offset = entry.source_offset};
}

std::string_view Corpus::Text(uint64_t i) const {
  const IndexEntry& entry = contents_.entries[i];
  return texts_->bytes().substr(entry.text_offset, entry.length_bytes);
}

std::vector<uint64_t> Corpus::DocumentsOf(SplitPart part) const {
  std::vector<uint64_t> ids;
  for (uint64_t i = 0; i < size(); ++i) {
    if (this->part(i) == part) ids.push_back(i);
  }
  return ids;
}

void Corpus::Finish() {
  std::unordered_set<uint64_t> groups;
  for (const IndexEntry& entry : contents_.entries) {
    groups.insert(entry.group);
    const auto part = static_cast<size_t>(SplitOf(entry.group));
    ++stats_.part_documents[part];
    stats_.part_bytes[part] += entry.length_bytes;
  }
  stats_.documents = size();
  stats_.groups = groups.size();
  stats_.text_bytes = contents_.text_bytes;
  stats_.exact_duplicates = contents_.exact_duplicates;
  stats_.binary_documents = contents_.binary_documents;
  stats_.replaced_bytes = contents_.replaced_bytes;
  fingerprint_ = FingerprintAfter(intake_ends_.size() - 1);
}

std::string Corpus::FingerprintAfter(size_t intake) const {
  const uint64_t end = intake_ends_.at(intake);
  uint64_t hash = end;
  for (uint64_t i = 0; i < end; ++i) {
    hash = Mix(hash, contents_.entries[i].content_hash, contents_.entries[i].group);
  }
  return Hex64(hash);
}

std::string Corpus::Summary() const {
  const auto parts = stats_.part_documents;
  const std::string damage = Damage();
  return std::to_string(stats_.documents) + " documents (" +
         FormatBytes(stats_.text_bytes) + ") in " + std::to_string(stats_.groups) +
         " groups: " + std::to_string(parts[0]) + " train, " + std::to_string(parts[1]) +
         " validation, " + std::to_string(parts[2]) + " test; " +
         std::to_string(stats_.exact_duplicates) + " exact duplicates dropped" +
         (damage.empty() ? "" : ", ") + damage;
}

std::string Corpus::Damage() const {
  std::string damage;
  if (stats_.binary_documents > 0) {
    damage = std::to_string(stats_.binary_documents) + " binary ones dropped";
  }
  if (stats_.replaced_bytes > 0) {
    damage += (damage.empty() ? "" : ", ") + std::to_string(stats_.replaced_bytes) +
              " bytes were not UTF-8";
  }
  return damage;
}

}  // namespace routecast
