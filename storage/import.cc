#include "storage/import.h"

#include <algorithm>
#include <memory>
#include <optional>
#include <tuple>

#include "common/byte_file.h"
#include "common/errors.h"
#include "common/stop.h"
#include "storage/import_source.h"
#include "storage/store_builder.h"
#include "storage/trace_format.h"

namespace routecast {
namespace {

constexpr int kShards = 4;

// Sizes that are given and not heeded would pass unseen.
void RequireNoSizes(const ImportOptions& options) {
  for (const auto& [flag, value] : {std::pair("--layers", options.layers),
                                    {"--experts_per_token", options.experts_per_token}}) {
    if (value == 0 || options.format != "npz") continue;
    throw UsageError(ErrorText(std::string(flag) + "=" + std::to_string(value),
                               "--format=npz says its own sizes", "leave the flag out"));
  }
}

// Of requests that say their own shape, the flags are a check: axes in the wrong order
// make a shape like any other.
void RequireSizes(const ImportOptions& options, const MoeGeometry& found) {
  for (const auto& [flag, given, is] :
       {std::tuple("--layers", options.layers, found.decoder_layers),
        {"--experts_per_token", options.experts_per_token, found.experts_per_token}}) {
    if (given == 0 || given == is) continue;
    throw UsageError(ErrorText(
        std::string(flag) + "=" + std::to_string(given) + " is not the input's",
        std::to_string(found.decoder_layers) + " layers, " +
            std::to_string(found.experts_per_token) + " experts a token are there",
        "are the axes [tokens, layers, experts a token]?"));
  }
}

std::unique_ptr<ImportSource> OpenSource(const fs::path& path,
                                         const ImportOptions& options) {
  const int format =
      ParseChoice("--format", options.format, {"npz", "arrays", "jsonl", "packed"});
  RequireNoSizes(options);
  if (!fs::exists(path)) {
    throw UsageError(
        ErrorText(path.string() + " does not exist", "", "name the input with --in"));
  }
  switch (format) {
    case 0:
      return OpenExportedArrays(path);
    case 1:
      return OpenRequestArrays(path, options.task);
    case 2:
      return OpenRequestLines(path, options.task);
    default:
      if (options.layers < 1 || options.experts_per_token < 1) {
        throw UsageError(ErrorText(
            "packed bytes do not say their shape",
            "--layers=" + std::to_string(options.layers) +
                " --experts_per_token=" + std::to_string(options.experts_per_token),
            "give both"));
      }
      return OpenPacked(path, options.task, options.layers, options.experts_per_token);
  }
}

// A file's name need not be UTF-8, store.json is.
std::string Utf8Of(const std::string& name) {
  return Json::parse(Json(name).dump(-1, ' ', false, Json::error_handler_t::replace));
}

// What all sequences of a store have in common, and how much there is.
struct Planes {
  bool token_ids = false, probs = false, dropped = false, margins = false,
       topk_probs = false;
  int top_k = 0;
  bool operator==(const Planes&) const = default;
};

class Survey {
 public:
  void Add(const RoutingTrace& trace) {
    if (sequences_ > 0 && trace.sequence_id <= last_id_) {
      Refuse(trace, "its id is not above " + std::to_string(last_id_) + " before it");
    }
    last_id_ = trace.sequence_id;
    ++sequences_;
    if (sequences_ == 1) task_ = trace.task;
    if (trace.encoder.num_tokens + trace.decoder.num_tokens == 0) {
      Refuse(trace, "it has no token");
    }
    bool hidden = false;
    for (const Stack stack : {Stack::kEncoder, Stack::kDecoder}) {
      const RoutingSpan& span = stack == Stack::kEncoder ? trace.encoder : trace.decoder;
      if (span.num_tokens == 0) continue;
      AddSpan(trace, stack, span);
      hidden = hidden || span.hidden_width > 0;
    }
    const bool both = trace.encoder.num_tokens > 0 && trace.decoder.num_tokens > 0;
    if (both && (trace.encoder.hidden_width > 0) != (trace.decoder.hidden_width > 0)) {
      Refuse(trace, "router inputs in one stack only");
    }
    hidden_ += hidden;
    output_ = output_ || !trace.decoder.output.empty();
  }

  StoreConfig Config(const ImportSource& source, const ImportOptions& options) const {
    StoreConfig c;
    const std::optional<MoeGeometry> stated = source.geometry();
    const int experts = source.experts_per_token() > 0 ? source.experts_per_token()
                        : planes_                      ? std::max(1, planes_->top_k)
                                                       : 1;
    c.geometry = stated.value_or(MoeGeometry{layers_[0], layers_[1], 0, experts, width_});
    CheckGeometry(c.geometry, stated.has_value());
    if (options.num_experts < 0 || options.num_experts > static_cast<int>(kMaxExperts)) {
      throw UsageError(ErrorText("--num_experts=" + std::to_string(options.num_experts),
                                 "not in [0, 65536]", "0 takes the input's"));
    }
    if (options.num_experts > 0) c.geometry.num_experts = options.num_experts;
    if (c.geometry.num_experts == 0) c.geometry.num_experts = largest_id_ + 1;
    if (largest_id_ >= c.geometry.num_experts) {
      throw UsageError(ErrorText(
          "expert id " + std::to_string(largest_id_) + " is in the input",
          "the model has " + std::to_string(c.geometry.num_experts) + " experts",
          "give the model's own --num_experts"));
    }
    c.model = options.model;
    c.model_fingerprint =
        Hex64(Hash64("import\n" + options.model + "\n" + c.ToJson()["geometry"].dump()));
    std::string hashes;
    for (const fs::path& file : source.files()) {
      hashes += Hex64(HashFile(file)) + "\n";
      c.data.push_back(options.format + ":" + Utf8Of(file.filename()));
    }
    c.corpus_fingerprint = Hex64(Hash64(hashes));
    c.token_ids = planes_ && planes_->token_ids;
    c.record = {"ids"};
    if (hidden_ > 0) c.record.insert(c.record.begin(), "hidden");
    if (output_) c.record.push_back("output");
    if (heads_ > 0) c.record.insert(c.record.begin(), "attention");
    c.attention_heads = std::max(0, heads_);
    if (planes_ && planes_->probs) c.record.push_back("probs");
    if (planes_ && planes_->top_k > 0) c.record.push_back("topk");
    c.top_k = planes_ ? planes_->top_k : 0;
    c.task = task_;
    c.dtype = "unknown";
    c.device_kind = "unknown";
    c.num_shards = kShards;
    // What the input does not say; the same in every import, so that they merge.
    c.hidden_share = hidden_ > 0 ? 1 : 0;
    c.max_length = static_cast<int>(kMaxTokens);
    return c;
  }
  uint64_t sequences() const { return sequences_; }
  uint64_t tokens() const { return tokens_; }
  uint64_t flat_sequences() const { return flat_; }

 private:
  [[noreturn]] static void Refuse(const RoutingTrace& trace, const std::string& why) {
    RefuseImport("sequence " + std::to_string(trace.sequence_id), why);
  }

  void AddSpan(const RoutingTrace& trace, Stack stack, const RoutingSpan& s) {
    const Planes planes{.token_ids = !s.token_ids.empty(),
                        .probs = !s.gate_probs.empty(),
                        .dropped = !s.dropped.empty(),
                        .margins = !s.margins.empty(),
                        .topk_probs = !s.topk_probs.empty(),
                        .top_k = s.top_k};
    if (!planes_) planes_ = planes;
    if (planes != *planes_) {
      Refuse(trace,
             "its planes (token ids, probabilities, experts a token) are not those "
             "of the sequences before it");
    }
    int& layers = layers_[static_cast<size_t>(stack)];
    if (layers == 0) layers = s.num_layers;
    if (s.num_layers != layers) {
      Refuse(trace, std::to_string(s.num_layers) + " layers, sequences before it have " +
                        std::to_string(layers) +
                        ": are the axes [tokens, layers, experts a token]?");
    }
    if (s.hidden_width > 0) {
      if (width_ == 0) width_ = s.hidden_width;
      if (s.hidden_width != width_) Refuse(trace, "router inputs of another width");
      const int heads = s.attention_heads / (stack == Stack::kDecoder ? 2 : 1);
      if (heads_ < 0) heads_ = heads;
      if (heads != heads_) Refuse(trace, "attention of another number of heads");
      if (!AttentionFits(s, stack)) {
        Refuse(trace, "an attended position beyond its tokens");
      }
    }
    for (const auto* ids : {&s.expert_ids, &s.topk_ids}) {
      for (const uint16_t id : *ids) largest_id_ = std::max<int>(largest_id_, id);
    }
    tokens_ += static_cast<uint64_t>(s.num_tokens);
    flat_ += s.num_layers > s.num_tokens;
  }

  // What the input states must be what it holds.
  void CheckGeometry(const MoeGeometry& g, bool stated) const {
    if (!stated) return;
    const bool fits = (layers_[0] == 0 || layers_[0] == g.encoder_layers) &&
                      (layers_[1] == 0 || layers_[1] == g.decoder_layers) &&
                      (width_ == 0 || width_ == g.d_model);
    if (fits) return;
    RefuseImport("the array \"geometry\"",
                 "it says " + std::to_string(g.encoder_layers) + " + " +
                     std::to_string(g.decoder_layers) + " layers of width " +
                     std::to_string(g.d_model) + ", the sequences have " +
                     std::to_string(layers_[0]) + " + " + std::to_string(layers_[1]) +
                     " of " + std::to_string(width_));
  }

  std::optional<Planes> planes_;
  bool output_ = false;
  int heads_ = -1;  // of the attention; -1 = no router inputs so far
  int layers_[2] = {0, 0};
  int largest_id_ = 0, width_ = 0;
  uint64_t sequences_ = 0, last_id_ = 0, tokens_ = 0, hidden_ = 0, flat_ = 0;
  Task task_ = Task::kGenerate;
};

// Reads all of the input, once.
ImportReport Look(ImportSource& source, const ImportOptions& options) {
  source.Verify();
  Survey survey;
  source.Read([&](RoutingTrace&& trace) {
    ThrowIfStopped("while reading the input");
    survey.Add(trace);
  });
  if (survey.sequences() == 0) {
    throw UsageError(ErrorText("the new store would be empty",
                               "the input has no sequence", "give another --in"));
  }
  ImportReport report;
  report.sequences = survey.sequences();
  report.tokens = survey.tokens();
  report.config = survey.Config(source, options);
  report.config.compression = options.compression;
  RequireCompression(options.compression, report.config.geometry);
  if (options.format != "npz") RequireSizes(options, report.config.geometry);
  report.flat_sequences = survey.flat_sequences();
  return report;
}

}  // namespace

ImportReport CheckImport(const fs::path& path, const fs::path& out,
                         const ImportOptions& options) {
  RequireNewStore(out);
  return Look(*OpenSource(path, options), options);
}

ImportReport ImportTraces(const fs::path& path, const fs::path& out,
                          const ImportOptions& options, StepObserver on_step) {
  RequireNewStore(out);
  const std::unique_ptr<ImportSource> source = OpenSource(path, options);
  ImportReport report = Look(*source, options);
  StoreBuilder builder(out, report.config, std::move(on_step));
  source->Read([&](RoutingTrace&& trace) { builder.Add(trace); });
  builder.Finish();
  return report;
}

}  // namespace routecast
