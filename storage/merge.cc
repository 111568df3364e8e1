#include "storage/merge.h"

#include <algorithm>
#include <limits>
#include <map>
#include <memory>
#include <set>

#include "common/byte_file.h"
#include "common/errors.h"
#include "storage/store_builder.h"
#include "storage/trace_reader.h"

namespace routecast {
namespace {

constexpr uint64_t kReadAheadBytes = uint64_t{8} << 20;
constexpr int kSegmentBits = 16;  // sequence id = document index * 65536 + segment

const std::set<std::string>& MayDiffer() {
  static const std::set<std::string> keys = {"model",
                                             "data",
                                             "corpus_fingerprint",
                                             "threads",
                                             "device_kind",
                                             "num_shards",
                                             "num_chunks",
                                             "expert_parallel",
                                             "max_sequences",
                                             "batch_size",
                                             "seed",
                                             "compression",
                                             "intakes",
                                             "left_out",
                                             "schema"};
  return keys;
}

// The records of a trace as they would be written: equal strings are equal sequences.
std::string Bytes(const RoutingTrace& t, int num_experts) {
  std::string all =
      std::to_string(t.document_id) + "," + std::to_string(t.group_id) + ";";
  for (const Stack stack : {Stack::kEncoder, Stack::kDecoder}) {
    const RoutingSpan& span = stack == Stack::kEncoder ? t.encoder : t.decoder;
    if (span.num_tokens == 0) continue;
    const std::string key = EncodeKey(KindOf(stack), t.sequence_id);
    all += key + EncodeSpan(key, span, t.task, num_experts);
    if (span.hidden_width > 0) all += EncodeHidden(key, span);
    if (span.attention_heads > 0) all += EncodeAttention(key, span);
  }
  return all;
}

uint64_t AddOrThrow(uint64_t a, uint64_t b, const fs::path& store) {
  if (a <= std::numeric_limits<uint64_t>::max() - b) return a + b;
  throw UsageError(ErrorText(store.string() + " cannot be renumbered",
                             "ids would leave 64 bits", "merge without it"));
}

// One store, its sequences in turn under their ids in the result.
class Input {
 public:
  explicit Input(const fs::path& path)
      : reader_(std::make_unique<TraceReader>(path, NeedTokens::kNo)) {}
  const TraceReader& reader() const { return *reader_; }

  // Documents that ids speak of: one more than the largest index, by either id.
  uint64_t NumDocuments() const {
    uint64_t largest = 0;
    for (const auto* all : {&reader_->sequences(), &reader_->left_out()}) {
      for (const SequenceInfo& s : *all) {
        largest = std::max({largest, s.document_id, s.sequence_id >> kSegmentBits});
      }
    }
    return AddOrThrow(largest, 1, reader_->path());
  }
  void Renumber(uint64_t first_document) {
    if (first_document > std::numeric_limits<uint64_t>::max() >> kSegmentBits) {
      AddOrThrow(std::numeric_limits<uint64_t>::max(), 1, reader_->path());
    }
    documents_ = first_document;
    AddOrThrow(NumDocuments(), documents_, reader_->path());
    for (const auto* all : {&reader_->sequences(), &reader_->left_out()}) {
      if (all->empty()) continue;
      AddOrThrow(all->back().sequence_id, documents_ << kSegmentBits, reader_->path());
    }
  }

  // Under their ids in the result.
  std::vector<SequenceInfo> LeftOut() const {
    std::vector<SequenceInfo> all = reader_->left_out();
    for (SequenceInfo& s : all) {
      s.sequence_id += documents_ << kSegmentBits;
      s.document_id += documents_;
    }
    return all;
  }

  std::vector<uint64_t> Ids() const {
    std::vector<uint64_t> ids;
    for (const SequenceInfo& s : reader_->sequences()) {
      ids.push_back(s.sequence_id + (documents_ << kSegmentBits));
    }
    return ids;
  }
  bool Holds(uint64_t id_of_the_result) const {
    const uint64_t first = documents_ << kSegmentBits;
    return id_of_the_result >= first &&
           reader_->Find(id_of_the_result - first) != nullptr;
  }
  bool AtEnd() const { return next_ == reader_->sequences().size(); }
  uint64_t NextId() const {
    return reader_->sequences()[next_].sequence_id + (documents_ << kSegmentBits);
  }
  RoutingTrace Next() {
    if (at_ == buffer_.size()) Fill();
    RoutingTrace trace = std::move(buffer_[at_++]);
    ++next_;
    trace.sequence_id += documents_ << kSegmentBits;
    trace.document_id += documents_;
    return trace;
  }

 private:
  void Fill() {
    const MoeGeometry& g = reader_->config().geometry;
    const int top_k = reader_->config().top_k;
    std::vector<uint64_t> ids;
    uint64_t bytes = 0;
    const auto& all = reader_->sequences();
    for (size_t i = next_; i < all.size() && bytes < kReadAheadBytes; ++i) {
      const SequenceInfo& s = all[i];
      const uint64_t width = s.has_hidden ? 2u * static_cast<unsigned>(g.d_model) : 0;
      for (const Stack stack : {Stack::kEncoder, Stack::kDecoder}) {
        const uint64_t tokens =
            stack == Stack::kEncoder ? s.encoder_tokens : s.decoder_tokens;
        const uint64_t attended =
            s.has_hidden
                ? static_cast<uint64_t>(reader_->config().AttentionHeads(stack)) *
                      kAttentionBytesPerHead
                : 0;
        bytes +=
            tokens * (4 + width +
                      static_cast<uint64_t>(g.layers(stack)) *
                          (11 + 6u * static_cast<unsigned>(top_k) + width + attended));
      }
      bytes += sizeof(RoutingTrace);
      ids.push_back(s.sequence_id);
    }
    buffer_ = reader_->ReadMany(ids, WithHidden::kAttended);
    at_ = 0;
  }

  std::unique_ptr<TraceReader> reader_;
  uint64_t documents_ = 0;  // added to document ids
  size_t next_ = 0, at_ = 0;
  std::vector<RoutingTrace> buffer_;
};

[[noreturn]] void RefusePair(const TraceReader& a, const TraceReader& b,
                             const std::string& values, const std::string& advice) {
  throw UsageError(ErrorText(
      b.path().string() + " cannot be merged with " + a.path().string(), values, advice));
}

// Router weights are the model's: the same in every store that has them.
fs::path CommonRouters(const std::vector<Input>& inputs) {
  fs::path first;
  for (const Input& input : inputs) {
    const fs::path path = input.reader().routers_path();
    if (!fs::exists(path)) continue;
    if (first.empty()) first = path;
    if (HashFile(path) == HashFile(first)) continue;
    throw DataError(
        ErrorText(path.string() + " and " + first.string() + " differ",
                  Hex64(HashFile(path)) + ", not " + Hex64(HashFile(first)),
                  "one of them is not the model's: run routecast-trace verify"));
  }
  return first;
}

// A corpus before and after sources were added to it: ids of the first intakes mean the
// same in both. The store that knows most intakes speaks for all.
const StoreConfig& CorpusOf(const StoreConfig& config, const std::vector<Input>& inputs) {
  const StoreConfig* longest = &config;
  for (const Input& input : inputs) {
    const StoreConfig& other = input.reader().config();
    const std::vector<StoreIntake> all = other.AllIntakes();
    const bool holds =
        std::any_of(all.begin(), all.end(), [&config](const StoreIntake& intake) {
          return intake.corpus_fingerprint == config.corpus_fingerprint;
        });
    if (holds && all.size() > longest->AllIntakes().size()) longest = &other;
  }
  return *longest;
}

// Planes beside the ids that a store's records have, as its first one does: those of a
// collection or an import all have the same.
std::set<std::string> PlanesOf(const TraceReader& reader) {
  std::set<std::string> planes;
  if (reader.sequences().empty()) return planes;
  const RoutingTrace trace =
      reader.Read(reader.sequences()[0].sequence_id, WithHidden::kNo);
  const RoutingSpan& span = trace.encoder.num_tokens > 0 ? trace.encoder : trace.decoder;
  if (!span.gate_probs.empty()) planes.insert("probabilities");
  if (!span.dropped.empty()) planes.insert("drops");
  if (!span.margins.empty()) planes.insert("margins");
  if (!span.topk_ids.empty()) planes.insert("top-k experts");
  if (!span.topk_probs.empty()) planes.insert("top-k probabilities");
  return planes;
}

std::string Named(const std::set<std::string>& planes) {
  std::string names;
  for (const std::string& plane : planes) names += (names.empty() ? "" : ", ") + plane;
  return names.empty() ? "none" : names;
}

// store.json does not say all that an import may lack; a store of both kinds of records
// could not be exported as arrays.
void RequireSamePlanes(const TraceReader& first, const TraceReader& other) {
  if (first.sequences().empty() || other.sequences().empty()) return;
  const std::set<std::string> planes = PlanesOf(first), others = PlanesOf(other);
  if (planes == others) return;
  RefusePair(first, other,
             "recorded beside the ids: " + Named(planes) + ", not " + Named(others),
             "import both with the same arrays");
}

// Checks that the stores go together, gives new ids where wanted, and returns the
// result's configuration.
StoreConfig Prepare(const MergeOptions& options, std::vector<Input>* inputs) {
  const TraceReader& first = inputs->front().reader();
  StoreConfig config = first.config();
  config.corpus_fingerprint = CorpusOf(config, *inputs).corpus_fingerprint;
  config.intakes = CorpusOf(config, *inputs).intakes;
  std::vector<std::string> corpora;           // by first appearance
  std::map<std::string, uint64_t> documents;  // a corpus
  for (Input& input : *inputs) {
    const TraceReader& reader = input.reader();
    RequireComplete(reader);
    const auto differences = MergeDifferences(first.config(), reader.config());
    if (!differences.empty()) {
      std::string values;
      for (const auto& d : differences) values += (values.empty() ? "" : "; ") + d;
      RefusePair(first, reader, values, "merge stores of one model and one recording");
    }
    RequireSamePlanes(first, reader);
    const std::string corpus = CorpusOf(reader.config(), *inputs).corpus_fingerprint;
    if (!options.renumber && corpus != config.corpus_fingerprint) {
      RefusePair(first, reader,
                 "other corpus, so equal ids are other documents: corpus_fingerprint " +
                     config.corpus_fingerprint + ", not " + corpus,
                 "--renumber gives the documents of further corpora new ids");
    }
    if (!documents.contains(corpus)) corpora.push_back(corpus);
    documents[corpus] = std::max(documents[corpus], input.NumDocuments());
    for (const std::string& data : reader.config().data) {
      if (std::find(config.data.begin(), config.data.end(), data) == config.data.end()) {
        config.data.push_back(data);
      }
    }
  }
  if (corpora.size() == 1) return config;
  std::map<std::string, uint64_t> start;
  uint64_t at = 0;
  std::string names;
  for (const std::string& corpus : corpora) {
    start[corpus] = at;
    at = AddOrThrow(at, documents[corpus], first.path());
    names += corpus + "\n";
  }
  for (Input& input : *inputs) {
    input.Renumber(start[CorpusOf(input.reader().config(), *inputs).corpus_fingerprint]);
  }
  config.intakes.clear();
  config.corpus_fingerprint = Hex64(Hash64(names));
  return config;
}

// Takes the sequence out of every store that holds it; all must hold the same.
RoutingTrace TakeNext(uint64_t id, int num_experts, std::vector<Input>* inputs,
                      MergeReport* report) {
  RoutingTrace trace;
  const Input* from = nullptr;
  std::string bytes;
  for (Input& input : *inputs) {
    if (input.AtEnd() || input.NextId() != id) continue;
    if (from == nullptr) {
      trace = input.Next();
      from = &input;
      continue;
    }
    if (bytes.empty()) bytes = Bytes(trace, num_experts);
    const std::string others = Bytes(input.Next(), num_experts);
    if (others != bytes) {
      throw DataError(ErrorText(
          "sequence " + std::to_string(id) + " differs between " +
              from->reader().path().string() + " and " + input.reader().path().string(),
          "records hash to " + Hex64(Hash64(bytes)) + " and " + Hex64(Hash64(others)),
          "the stores were made by runs that computed differently: keep one of them"));
    }
    ++report->repeated;
  }
  return trace;
}

// What no store has and one of them left out.
std::vector<SequenceInfo> LeftOutOfAll(const std::vector<Input>& inputs) {
  std::map<uint64_t, SequenceInfo> left_out;
  for (const Input& input : inputs) {
    for (const SequenceInfo& info : input.LeftOut()) {
      const auto holds = [&info](const Input& other) {
        return other.Holds(info.sequence_id);
      };
      if (std::none_of(inputs.begin(), inputs.end(), holds)) {
        left_out.emplace(info.sequence_id, info);
      }
    }
  }
  std::vector<SequenceInfo> all;
  for (const auto& [id, info] : left_out) all.push_back(info);
  return all;
}

// Stores that go together, and what becomes of them.
struct Merging {
  std::vector<Input> inputs;
  StoreConfig config;
  fs::path routers;  // empty: none has them
};

Merging Open(const std::vector<fs::path>& stores, const fs::path& out,
             const MergeOptions& options) {
  RequireNewStore(out);
  if (stores.empty()) {
    throw UsageError(ErrorText("nothing to merge", "", "give --store more than once"));
  }
  for (const fs::path& store : stores) RequireApart(out, store);
  Merging merging;
  for (const fs::path& store : stores) merging.inputs.emplace_back(store);
  merging.config = Prepare(options, &merging.inputs);
  if (!options.compression.empty()) merging.config.compression = options.compression;
  RequireCompression(merging.config.compression, merging.config.geometry);
  merging.routers = CommonRouters(merging.inputs);
  return merging;
}

}  // namespace

std::vector<std::string> MergeDifferences(const StoreConfig& a, const StoreConfig& b) {
  Json left = a.ToJson(), right = b.ToJson();
  std::set<std::string> keys;
  for (const auto& [key, value] : left.items()) keys.insert(key);
  for (const auto& [key, value] : right.items()) keys.insert(key);
  std::vector<std::string> differences;
  for (const std::string& key : keys) {
    if (MayDiffer().contains(key) || left[key] == right[key]) continue;
    differences.push_back(key + ": " + left[key].dump() + ", not " + right[key].dump());
  }
  return differences;
}

MergeReport CheckMerge(const std::vector<fs::path>& stores, const fs::path& out,
                       const MergeOptions& options) {
  const Merging merging = Open(stores, out, options);
  std::set<uint64_t> ids;
  uint64_t all = 0;
  for (const Input& input : merging.inputs) {
    const std::vector<uint64_t> own = input.Ids();
    ids.insert(own.begin(), own.end());
    all += own.size();
  }
  return {ids.size(), all - ids.size()};
}

MergeReport MergeStores(const std::vector<fs::path>& stores, const fs::path& out,
                        const MergeOptions& options, StepObserver on_step) {
  auto [inputs, config, routers] = Open(stores, out, options);
  MergeReport report;
  StoreBuilder builder(out, config, std::move(on_step));
  for (;;) {
    const Input* lowest = nullptr;
    for (const Input& input : inputs) {
      if (input.AtEnd()) continue;
      if (lowest == nullptr || input.NextId() < lowest->NextId()) lowest = &input;
    }
    if (lowest == nullptr) break;
    builder.Add(
        TakeNext(lowest->NextId(), config.geometry.num_experts, &inputs, &report));
  }
  for (const SequenceInfo& info : LeftOutOfAll(inputs)) builder.LeaveOut(info);
  if (!routers.empty()) builder.CopyRouters(routers);
  builder.Finish();
  report.sequences = builder.num_sequences();
  return report;
}

}  // namespace routecast
