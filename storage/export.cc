#include "storage/export.h"

#include <algorithm>
#include <cstdio>
#include <map>

#include "common/errors.h"
#include "common/safetensors.h"
#include "common/stop.h"
#include "common/temporary_file.h"
#include "storage/export_text.h"
#include "storage/npy.h"

namespace routecast {
namespace {

// One stack's arrays of a part. Planes are kept per layer, so that [L,T] is their
// concatenation. N sequences, T tokens, Th tokens with router inputs, L layers, k experts
// a token, K top-k, D width.
struct StackArrays {
  std::vector<int64_t> offsets = {0}, hidden_index;
  std::vector<uint32_t> token_ids;
  std::vector<std::vector<uint16_t>> expert_ids, active_ids, topk_ids;
  std::vector<std::vector<float>> gate_probs, margins, topk_probs, hidden;
  std::vector<std::vector<uint8_t>> dropped;
  std::vector<float> output;
  std::vector<std::vector<float>> attention_entropy;
  std::vector<std::vector<uint16_t>> attention_keys;

  // `active`: k where all of them are known, else 0.
  StackArrays(int layers, int active)
      : expert_ids(layers),
        active_ids(layers),
        topk_ids(layers),
        gate_probs(layers),
        margins(layers),
        topk_probs(layers),
        hidden(layers),
        dropped(layers),
        attention_entropy(layers),
        attention_keys(layers),
        active_(active) {}
  void Add(const RoutingSpan& span);

 private:
  int active_;
};

template <typename T>
void AddLayer(const std::vector<T>& plane, int layer, size_t per_layer,
              std::vector<T>* to) {
  if (plane.empty()) return;
  const auto from = plane.begin() + static_cast<std::ptrdiff_t>(layer * per_layer);
  to->insert(to->end(), from, from + static_cast<std::ptrdiff_t>(per_layer));
}

void StackArrays::Add(const RoutingSpan& span) {
  const auto tokens = static_cast<size_t>(span.num_tokens);
  const int64_t start = offsets.back();
  offsets.push_back(start + span.num_tokens);
  token_ids.insert(token_ids.end(), span.token_ids.begin(), span.token_ids.end());
  for (int l = 0; l < span.num_layers; ++l) {
    AddLayer(span.expert_ids, l, tokens, &expert_ids[l]);
    AddLayer(span.gate_probs, l, tokens, &gate_probs[l]);
    AddLayer(span.dropped, l, tokens, &dropped[l]);
    AddLayer(span.margins, l, tokens, &margins[l]);
    AddLayer(span.topk_ids, l, tokens * span.top_k, &topk_ids[l]);
    for (size_t i = l * tokens; active_ > 0 && i < (l + 1) * tokens; ++i) {
      const auto first =
          span.topk_ids.begin() + static_cast<std::ptrdiff_t>(i * span.top_k);
      active_ids[l].insert(active_ids[l].end(), first,
                           first + std::min(active_, span.top_k));
    }
    AddLayer(span.topk_probs, l, tokens * span.top_k, &topk_probs[l]);
    const size_t heads = tokens * span.attention_heads;
    AddLayer(span.attention_entropy, l, heads, &attention_entropy[l]);
    AddLayer(span.attention_keys, l, heads * kStrongestKeys, &attention_keys[l]);
    const size_t width = tokens * span.hidden_width;
    for (size_t i = 0; i < width; ++i)
      hidden[l].push_back(Bf16ToFloat(span.hidden[l * width + i]));
  }
  for (const uint16_t bits : span.output) output.push_back(Bf16ToFloat(bits));
  if (span.hidden_width > 0) {
    for (int64_t t = 0; t < span.num_tokens; ++t) hidden_index.push_back(start + t);
  }
}

template <typename T>
struct TypeName;
template <>
struct TypeName<int64_t> {
  static constexpr const char *kNpy = "<i8", *kTensor = "I64";
};
template <>
struct TypeName<uint64_t> {
  static constexpr const char *kNpy = "<u8", *kTensor = "U64";
};
template <>
struct TypeName<uint32_t> {
  static constexpr const char *kNpy = "<u4", *kTensor = "U32";
};
template <>
struct TypeName<uint16_t> {
  static constexpr const char *kNpy = "<u2", *kTensor = "U16";
};
template <>
struct TypeName<uint8_t> {
  static constexpr const char *kNpy = "|u1", *kTensor = "U8";
};
template <>
struct TypeName<float> {
  static constexpr const char *kNpy = "<f4", *kTensor = "F32";
};

// A part of the store in memory, and its arrays under their names.
class Part {
 public:
  explicit Part(const StoreConfig& config)
      : config_(config),
        encoder_(config.geometry.encoder_layers, ActiveExperts(config)),
        decoder_(config.geometry.decoder_layers, ActiveExperts(config)),
        geometry_{config.geometry.encoder_layers, config.geometry.decoder_layers,
                  config.geometry.num_experts, config.geometry.experts_per_token,
                  config.geometry.d_model} {}
  void Add(const RoutingTrace& trace) {
    sequence_ids_.push_back(trace.sequence_id);
    document_ids_.push_back(trace.document_id);
    group_ids_.push_back(trace.group_id);
    splits_.push_back(static_cast<uint8_t>(SplitOf(trace.group_id)));
    tasks_.push_back(static_cast<uint8_t>(trace.task));
    encoder_.Add(trace.encoder);
    decoder_.Add(trace.decoder);
  }
  void WriteTo(const fs::path& path, const std::string& format) {
    List(Stack::kEncoder, encoder_);
    List(Stack::kDecoder, decoder_);
    const auto n = static_cast<int64_t>(sequence_ids_.size());
    Name("sequence_ids", sequence_ids_, {n});
    Name("document_ids", document_ids_, {n});
    Name("group_ids", group_ids_, {n});
    Name("split", splits_, {n});
    Name("tasks", tasks_, {n});
    Name("geometry", geometry_, {static_cast<int64_t>(geometry_.size())});
    if (format == "npz") {
      WriteNpz(path, arrays_);
    } else {
      WriteSafetensors(path, tensors_);
    }
  }

 private:
  template <typename T>
  void Name(const std::string& name, const std::vector<T>& values,
            std::vector<int64_t> shape) {
    uint64_t items = 1;
    for (const int64_t dim : shape) items *= static_cast<uint64_t>(dim);
    if (items != values.size()) {
      throw DataError(ErrorText("the store's records differ in what they hold",
                                name + " would have " + std::to_string(values.size()) +
                                    " values of " + std::to_string(items),
                                "routecast-trace verify names a damaged record; or "
                                "records of two stores were mixed"));
    }
    arrays_.push_back(
        {name, TypeName<T>::kNpy, shape, values.data(), values.size() * sizeof(T)});
    tensors_.push_back({name, TypeName<T>::kTensor, std::move(shape), values.data()});
  }
  // Joins the layers of a plane; absent planes get no name.
  template <typename T>
  void NamePlane(const std::string& name, std::vector<std::vector<T>>& layers,
                 std::vector<int64_t> shape, bool recorded) {
    if (!recorded) return;
    std::vector<T>& joined = Joined<T>()[name];
    for (std::vector<T>& layer : layers) {
      joined.insert(joined.end(), layer.begin(), layer.end());
      std::vector<T>().swap(layer);
    }
    Name(name, joined, std::move(shape));
  }
  template <typename T>
  std::map<std::string, std::vector<T>>& Joined() {
    if constexpr (std::is_same_v<T, uint16_t>)
      return shorts_;
    else if constexpr (std::is_same_v<T, uint8_t>)
      return bytes_;
    else
      return floats_;
  }
  void List(Stack stack, StackArrays& s) {
    const std::string prefix = std::string(StackName(stack)) + "_";
    const int64_t layers = config_.geometry.layers(stack);
    const int64_t tokens = s.offsets.back();
    const auto filled = [&](const auto& plane) {
      return tokens == 0 || layers == 0 || !plane[0].empty();
    };
    Name(prefix + "offsets", s.offsets, {static_cast<int64_t>(s.offsets.size())});
    if (config_.token_ids) Name(prefix + "token_ids", s.token_ids, {tokens});
    NamePlane(prefix + "expert_ids", s.expert_ids, {layers, tokens}, true);
    NamePlane(prefix + "gate_probs", s.gate_probs, {layers, tokens},
              config_.Records("probs") && filled(s.gate_probs));
    NamePlane(prefix + "dropped", s.dropped, {layers, tokens}, filled(s.dropped));
    NamePlane(prefix + "margins", s.margins, {layers, tokens}, filled(s.margins));
    const int active = ActiveExperts(config_);
    NamePlane(prefix + "active_ids", s.active_ids, {layers, tokens, active},
              active > 0 && filled(s.active_ids));
    const bool topk = config_.top_k > 0 && filled(s.topk_ids);
    NamePlane(prefix + "topk_ids", s.topk_ids, {layers, tokens, config_.top_k}, topk);
    NamePlane(prefix + "topk_probs", s.topk_probs, {layers, tokens, config_.top_k},
              topk && filled(s.topk_probs));
    if (!config_.Records("hidden")) return;
    const auto hidden_tokens = static_cast<int64_t>(s.hidden_index.size());
    NamePlane(prefix + "hidden", s.hidden,
              {layers, hidden_tokens, config_.geometry.d_model}, true);
    Name(prefix + "hidden_index", s.hidden_index, {hidden_tokens});
    // Of all tokens with router inputs, or (older stores) of none.
    const int64_t width = config_.geometry.d_model;
    if (!s.output.empty() &&
        static_cast<int64_t>(s.output.size()) == hidden_tokens * width) {
      Name(prefix + "output", s.output, {hidden_tokens, width});
    }
    const int64_t heads = config_.AttentionHeads(stack);
    NamePlane(prefix + "attention_entropy", s.attention_entropy,
              {layers, hidden_tokens, heads}, heads > 0);
    NamePlane(prefix + "attention_keys", s.attention_keys,
              {layers, hidden_tokens, heads, kStrongestKeys}, heads > 0);
  }

  const StoreConfig& config_;
  StackArrays encoder_, decoder_;
  std::vector<uint64_t> sequence_ids_, document_ids_, group_ids_;
  std::vector<uint8_t> splits_, tasks_;
  const std::vector<int64_t> geometry_;
  std::map<std::string, std::vector<uint16_t>> shorts_;
  std::map<std::string, std::vector<uint8_t>> bytes_;
  std::map<std::string, std::vector<float>> floats_;
  std::vector<NamedArray> arrays_;
  std::vector<TensorToWrite> tensors_;
};

uint64_t PartBytes(const SequenceInfo& info, const StoreConfig& c) {
  uint64_t bytes = 0;
  for (const Stack stack : {Stack::kEncoder, Stack::kDecoder}) {
    const uint64_t tokens =
        stack == Stack::kEncoder ? info.encoder_tokens : info.decoder_tokens;
    const uint64_t width =
        info.has_hidden ? 4u * static_cast<unsigned>(c.geometry.d_model) : 0;
    const uint64_t heads =
        info.has_hidden ? static_cast<uint64_t>(c.AttentionHeads(stack)) : 0;
    bytes += tokens * (4 + width +
                       static_cast<uint64_t>(c.geometry.layers(stack)) *
                           (11 + 2u * static_cast<unsigned>(ActiveExperts(c)) +
                            6u * static_cast<unsigned>(c.top_k) + width +
                            heads * (4 + 2 * kStrongestKeys)));
  }
  return bytes * 2;  // planes are joined from their layers
}

std::vector<fs::path> ExportArrays(const TraceReader& reader, const fs::path& folder,
                                   const ExportOptions& options) {
  uint64_t total = 0;
  for (const SequenceInfo& s : reader.sequences()) total += PartBytes(s, reader.config());
  const bool split = total > options.max_part_bytes;
  std::vector<fs::path> files;
  auto part = std::make_unique<Part>(reader.config());
  uint64_t bytes = 0;
  const auto flush = [&] {
    char name[32] = "traces";
    if (split) std::snprintf(name, sizeof name, "traces-%05zu", files.size());
    files.push_back(folder / (std::string(name) + "." + options.format));
    part->WriteTo(files.back(), options.format);
    part = std::make_unique<Part>(reader.config());
    bytes = 0;
  };
  reader.Scan(
      [&](RoutingTrace&& trace) {
        ThrowIfStopped("while exporting");
        const uint64_t more = PartBytes(*reader.Find(trace.sequence_id), reader.config());
        if (bytes > 0 && bytes + more > options.max_part_bytes) flush();
        bytes += more;
        part->Add(trace);
      },
      WithHidden::kAttended);
  flush();
  return files;
}

// Parts of an earlier export into the same folder, of which this one has no like, written
// wholly or not: readers of the folder would take them for its own.
void RemoveEarlierParts(const fs::path& folder, const std::string& format,
                        const std::vector<fs::path>& files) {
  const auto is_part = [&](const fs::path& path) {
    const std::string stem = path.stem();
    return path.extension() == "." + format &&
           (stem == "traces" || (stem.starts_with("traces-") && stem.size() >= 12 &&
                                 stem.find_first_not_of("0123456789", 7) == stem.npos));
  };
  std::vector<fs::path> earlier, unfinished;
  for (const auto& entry : fs::directory_iterator(folder)) {
    const fs::path of = PathOfTemporary(entry.path());
    if (is_part(of)) unfinished.push_back(of);
    if (is_part(entry.path()) &&
        std::find(files.begin(), files.end(), entry.path()) == files.end()) {
      earlier.push_back(entry.path());
    }
  }
  for (const fs::path& path : earlier) fs::remove(path);
  for (const fs::path& path : unfinished) RemoveLeftovers(path);
}

}  // namespace

uint64_t ExportedBytes(const TraceReader& reader, const std::string& format) {
  const StoreConfig& c = reader.config();
  const bool text = format == "jsonl" || format == "csv";
  const uint64_t probs = c.Records("probs") ? 1 : 0;
  const uint64_t row = (format == "csv" ? 30 : 6) + 22 * probs +
                       static_cast<unsigned>(c.top_k) * (3 + 13 * probs);
  uint64_t bytes = 0;
  for (const SequenceInfo& s : reader.sequences()) {
    const uint64_t cells =
        uint64_t{s.encoder_tokens} * static_cast<unsigned>(c.geometry.encoder_layers) +
        uint64_t{s.decoder_tokens} * static_cast<unsigned>(c.geometry.decoder_layers);
    bytes += text ? cells * row : PartBytes(s, c) / 2 + 41;
  }
  return bytes;
}

std::vector<fs::path> ExportTraces(const TraceReader& reader, const fs::path& folder,
                                   const ExportOptions& options) {
  ParseChoice("--format", options.format, {"npz", "jsonl", "csv", "safetensors"});
  MakeFolder(folder);
  const bool text = options.format == "jsonl" || options.format == "csv";
  const std::vector<fs::path> files = text ? ExportText(reader, folder, options.format)
                                           : ExportArrays(reader, folder, options);
  RemoveEarlierParts(folder, options.format, files);
  return files;
}

}  // namespace routecast
