// The arrays that export writes, read back (import_source.h). A sequence is read as
// slices of the planes [L,T], so that memory holds one sequence.
#include <algorithm>
#include <bit>
#include <cstdio>

#include "common/errors.h"
#include "storage/import_source.h"
#include "storage/npy_reader.h"
#include "storage/store_config.h"
#include "storage/trace_format.h"

namespace routecast {
namespace {

// A router input as it was before export, to the bit; others are rounded.
uint16_t Bf16OfExported(float value) {
  const auto bits = std::bit_cast<uint32_t>(value);
  return (bits & 0xFFFF) == 0 ? static_cast<uint16_t>(bits >> 16) : FloatToBf16(value);
}

std::string ShapeText(const std::vector<int64_t>& shape) {
  std::string text;
  for (const int64_t dim : shape)
    text += (text.empty() ? "" : ", ") + std::to_string(dim);
  return "[" + text + "]";
}

// The arrays of one stack in one part. All shapes are checked at construction.
class StackReader {
 public:
  StackReader(const NpyFile& file, Stack stack, uint64_t sequences)
      : file_(file), prefix_(std::string(StackName(stack)) + "_") {
    if (IsAbsent(stack)) {
      offsets_.assign(sequences + 1, 0);
      return;
    }
    offsets_ = file.Read<int64_t>(Need("offsets", 1), 0, sequences + 1);
    const NpyArray& ids = Need("expert_ids", 2);
    layers_ = ids.shape[0];
    tokens_ = ids.shape[1];
    if (layers_ > static_cast<int64_t>(kMaxLayers)) {
      RefuseImport(file.Where(ids), std::to_string(layers_) + " layers");
    }
    if (layers_ == 0 && tokens_ > 0) {
      RefuseImport(file.Where(ids), std::to_string(tokens_) + " tokens without a layer");
    }
    CheckOffsets();
    Shape("token_ids", {tokens_});
    for (const char* plane : {"gate_probs", "dropped", "margins"}) {
      Shape(plane, {layers_, tokens_});
    }
    active_ = Slots("active_ids");
    top_k_ = Find("topk_ids") != nullptr ? Slots("topk_ids") : active_;
    if (active_ > top_k_) {
      RefuseImport(file.Where(*Find("active_ids")),
                   std::to_string(active_) + " active experts of " +
                       std::to_string(top_k_) + " in topk_ids");
    }
    Shape("active_ids", {layers_, tokens_, active_});
    Shape("topk_ids", {layers_, tokens_, top_k_});
    Shape("topk_probs", {layers_, tokens_, top_k_});
    const NpyArray* hidden = Find("hidden");
    if (hidden == nullptr) return;
    hidden_index_ = &Need("hidden_index", 1);
    hidden_tokens_ = hidden_index_->shape[0];
    width_ = hidden->shape.size() == 3 ? hidden->shape[2] : 0;
    if (width_ > static_cast<int64_t>(kMaxWidth)) {
      RefuseImport(file.Where(*hidden), "router inputs of " + std::to_string(width_));
    }
    Shape("hidden", {layers_, hidden_tokens_, width_});
    Shape("output", {hidden_tokens_, width_});
    const NpyArray* entropy = Find("attention_entropy");
    if (entropy == nullptr) return;
    heads_ = entropy->shape.size() == 3 ? entropy->shape[2] : 0;
    const int64_t kinds = stack == Stack::kDecoder ? 2 : 1;
    if (heads_ < 1 || heads_ > kinds * kMaxAttentionHeads || heads_ % kinds != 0) {
      RefuseImport(file.Where(*entropy),
                   "attention of " + std::to_string(heads_) + " heads");
    }
    Need("attention_keys", 4);
    Shape("attention_entropy", {layers_, hidden_tokens_, heads_});
    Shape("attention_keys", {layers_, hidden_tokens_, heads_, kStrongestKeys});
  }

  int64_t layers() const { return layers_; }
  int64_t top_k() const { return top_k_; }
  int64_t active() const { return active_; }  // k; 0 = not said
  int64_t width() const { return width_; }

  // Sequences in their order: router inputs are walked along.
  RoutingSpan Read(uint64_t sequence) {
    RoutingSpan span;
    const int64_t first = offsets_[sequence];
    span.num_tokens = static_cast<int>(offsets_[sequence + 1] - first);
    if (span.num_tokens == 0) return span;
    span.num_layers = static_cast<int>(layers_);
    const auto count = static_cast<uint64_t>(span.num_tokens);
    if (const NpyArray* ids = Find("token_ids")) {
      span.token_ids = file_.ReadIntegers<uint32_t>(*ids, first, count);
    }
    Slice("expert_ids", first, count, 1, tokens_, &span.expert_ids);
    Slice("gate_probs", first, count, 1, tokens_, &span.gate_probs);
    Slice("dropped", first, count, 1, tokens_, &span.dropped);
    for (const uint8_t d : span.dropped) {
      if (d > 1)
        RefuseImport(file_.Where(*Find("dropped")), "something else than 0 and 1");
    }
    Slice("margins", first, count, 1, tokens_, &span.margins);
    if (top_k_ > 0) {
      span.top_k = static_cast<int>(top_k_);
      const bool all = Find("topk_ids") != nullptr;
      Slice(all ? "topk_ids" : "active_ids", first, count, top_k_, tokens_,
            &span.topk_ids);
      if (all) RequireActiveFirst(first, count, span.topk_ids);
      Slice("topk_probs", first, count, top_k_, tokens_, &span.topk_probs);
    }
    ReadHidden(first, count, &span);
    return span;
  }
  // REQUIRES that all sequences were read.
  void RequireAllUsed() const {
    if (hidden_at_ == hidden_tokens_) return;
    RefuseImport(file_.Where(*hidden_index_),
                 std::to_string(hidden_tokens_ - hidden_at_) + " of " +
                     std::to_string(hidden_tokens_) +
                     " router inputs belong to no token");
  }

 private:
  // A model of one stack: the file has nothing of the other.
  bool IsAbsent(Stack stack) const {
    const Stack other = stack == Stack::kEncoder ? Stack::kDecoder : Stack::kEncoder;
    return file_.Find(std::string(StackName(other)) + "_offsets") != nullptr &&
           std::none_of(file_.arrays().begin(), file_.arrays().end(),
                        [&](const NpyArray& a) { return a.name.starts_with(prefix_); });
  }
  const NpyArray* Find(const char* name) const { return file_.Find(prefix_ + name); }
  const NpyArray& Need(const char* name, size_t dims) const {
    const NpyArray* array = Find(name);
    if (array == nullptr) {
      RefuseImport(file_.path().string(), "no array " + prefix_ + name);
    }
    if (array->shape.size() != dims) {
      RefuseImport(file_.Where(*array), "shape " + ShapeText(array->shape) + ", not of " +
                                            std::to_string(dims) + " dimensions");
    }
    return *array;
  }
  void Shape(const char* name, const std::vector<int64_t>& shape) const {
    const NpyArray* array = Find(name);
    if (array == nullptr || array->shape == shape) return;
    RefuseImport(file_.Where(*array),
                 "shape " + ShapeText(array->shape) + ", not " + ShapeText(shape));
  }
  // The last size of an array [L,T,1 to 64]; 0 where it is not there.
  int64_t Slots(const char* name) const {
    const NpyArray* array = Find(name);
    if (array == nullptr) return 0;
    const int64_t slots = array->shape.size() == 3 ? array->shape[2] : 0;
    if (slots >= 1 && slots <= static_cast<int64_t>(kMaxTopK)) return slots;
    RefuseImport(file_.Where(*array),
                 "shape " + ShapeText(array->shape) + ", not [layers, tokens, 1 to 64]");
  }
  // A store keeps the active experts as the first of the top-k.
  void RequireActiveFirst(int64_t first, uint64_t count,
                          const std::vector<uint16_t>& topk) const {
    if (active_ == 0) return;
    std::vector<uint16_t> active;
    Slice("active_ids", first, count, active_, tokens_, &active);
    const auto k = static_cast<size_t>(active_), all = static_cast<size_t>(top_k_);
    for (size_t i = 0; i < active.size(); ++i) {
      if (active[i] == topk[i / k * all + i % k]) continue;
      RefuseImport(file_.Where(*Find("active_ids")),
                   "they are not the first of topk_ids, in the sequence that begins at "
                   "token " +
                       std::to_string(first));
    }
  }
  void CheckOffsets() const {
    bool good = offsets_.front() == 0 && offsets_.back() == tokens_;
    for (size_t i = 1; i < offsets_.size() && good; ++i) {
      // In this order: the difference of ascending numbers from 0 on cannot overflow.
      good = offsets_[i - 1] <= offsets_[i] &&
             offsets_[i] - offsets_[i - 1] <= static_cast<int64_t>(kMaxTokens);
    }
    if (good) return;
    RefuseImport(file_.path().string() + ": array \"" + prefix_ + "offsets\"",
                 "they do not ascend from 0 to the " + std::to_string(tokens_) +
                     " tokens of expert_ids");
  }
  // Elements [l, first .. first + count) of every layer; nothing where it is not there.
  template <typename T>
  void Slice(const char* name, int64_t first, uint64_t count, int64_t each,
             int64_t tokens, std::vector<T>* to) const {
    const NpyArray* array = Find(name);
    if (array == nullptr) return;
    to->reserve(static_cast<uint64_t>(layers_) * count * static_cast<uint64_t>(each));
    for (int64_t l = 0; l < layers_; ++l) {
      const auto part = file_.Read<T>(
          *array, static_cast<uint64_t>((l * tokens + first) * each), count * each);
      to->insert(to->end(), part.begin(), part.end());
    }
  }
  void ReadHidden(int64_t first, uint64_t count, RoutingSpan* span) {
    if (hidden_index_ == nullptr || hidden_at_ == hidden_tokens_) return;
    const auto at = static_cast<uint64_t>(hidden_at_);
    if (file_.Read<int64_t>(*hidden_index_, at, 1)[0] != first) return;
    const uint64_t left = static_cast<uint64_t>(hidden_tokens_) - at;
    const auto index = file_.Read<int64_t>(*hidden_index_, at, std::min(count, left));
    for (size_t i = 0; i < count; ++i) {
      if (i < index.size() && index[i] == first + static_cast<int64_t>(i)) continue;
      RefuseImport(file_.Where(*hidden_index_),
                   "router inputs of a part of the sequence that begins at token " +
                       std::to_string(first));
    }
    if (const NpyArray* output = Find("output")) {
      const auto each = static_cast<uint64_t>(width_);
      const auto states = file_.Read<float>(*output, at * each, count * each);
      span->output.resize(states.size());
      std::transform(states.begin(), states.end(), span->output.begin(), Bf16OfExported);
    }
    std::vector<float> values;
    Slice("hidden", hidden_at_, count, width_, hidden_tokens_, &values);
    span->hidden_width = static_cast<int>(width_);
    span->hidden.resize(values.size());
    std::transform(values.begin(), values.end(), span->hidden.begin(), Bf16OfExported);
    span->attention_heads = static_cast<int>(heads_);
    Slice("attention_entropy", hidden_at_, count, heads_, hidden_tokens_,
          &span->attention_entropy);
    Slice("attention_keys", hidden_at_, count, heads_ * kStrongestKeys, hidden_tokens_,
          &span->attention_keys);
    hidden_at_ += static_cast<int64_t>(count);
  }

  const NpyFile& file_;
  const std::string prefix_;
  std::vector<int64_t> offsets_;
  int64_t layers_ = 0, tokens_ = 0, active_ = 0, top_k_ = 0, width_ = 0;
  const NpyArray* hidden_index_ = nullptr;
  int64_t hidden_tokens_ = 0, hidden_at_ = 0, heads_ = 0;
};

std::optional<MoeGeometry> GeometryOf(const NpyFile& file) {
  const NpyArray* array = file.Find("geometry");
  if (array == nullptr) return std::nullopt;
  const auto v = file.Read<int64_t>(*array, 0, array->num_items);
  const auto within = [&](size_t i, int64_t low, uint64_t high) {
    return v[i] >= low && static_cast<uint64_t>(v[i]) <= high;
  };
  if (v.size() != 5 || !within(0, 0, kMaxLayers) || !within(1, 0, kMaxLayers) ||
      !within(2, 1, kMaxExperts) || !within(3, 1, kMaxTopK) || !within(4, 0, kMaxWidth)) {
    RefuseImport(file.Where(*array),
                 "not encoder layers, decoder layers, experts, experts a token, width");
  }
  return MoeGeometry{static_cast<int>(v[0]), static_cast<int>(v[1]),
                     static_cast<int>(v[2]), static_cast<int>(v[3]),
                     static_cast<int>(v[4])};
}

class ExportedArrays : public ImportSource {
 public:
  explicit ExportedArrays(const fs::path& path) {
    if (!fs::is_directory(path)) {
      files_ = {path};
    } else {
      for (const auto& entry : fs::directory_iterator(path)) {
        if (entry.path().extension() == ".npz") files_.push_back(entry.path());
      }
      std::sort(files_.begin(), files_.end());
      RequireAllParts();
    }
    if (files_.empty()) return;
    const NpyFile first(files_[0]);
    geometry_ = GeometryOf(first);
    for (const char* name : {"encoder_active_ids", "decoder_active_ids"}) {
      const NpyArray* active = first.Find(name);
      if (active == nullptr || active->shape.size() != 3) continue;  // refused when read
      active_ = static_cast<int>(std::clamp<int64_t>(active->shape[2], 0, kMaxTopK));
    }
    if (geometry_) active_ = geometry_->experts_per_token;
  }
  void Read(const Use& use) const override {
    for (const fs::path& path : files_) ReadPart(path, use);
  }
  void Verify() const override {
    for (const fs::path& path : files_) NpyFile(path).VerifyChecksums();
  }
  std::optional<MoeGeometry> geometry() const override { return geometry_; }
  int experts_per_token() const override { return active_; }
  std::vector<fs::path> files() const override { return files_; }

 private:
  // As export names them: a part that is missing before another shows. REQUIRES sorted
  // files_.
  void RequireAllParts() const {
    for (size_t i = 0; i < files_.size(); ++i) {
      if (!files_[i].stem().string().starts_with("traces-")) continue;
      char name[40];
      std::snprintf(name, sizeof name, "traces-%05zu.npz", i);
      if (files_[i].filename() == name) continue;
      RefuseImport(files_[i].string(), "it is number " + std::to_string(i) +
                                           " of the folder, so " + name + " is missing");
    }
  }
  static const NpyArray& List(const NpyFile& file, const char* name, uint64_t count) {
    const NpyArray* array = file.Find(name);
    if (array == nullptr) {
      RefuseImport(file.path().string(),
                   "no array " + std::string(name) +
                       ": it is no export (arrays [tokens, layers, k]: --format=arrays)");
    }
    if (array->shape.size() != 1 || array->num_items != count) {
      RefuseImport(file.Where(*array), "shape " + ShapeText(array->shape) + ", not [" +
                                           std::to_string(count) + "]");
    }
    return *array;
  }
  void ReadPart(const fs::path& path, const Use& use) const {
    const NpyFile file(path);
    if (GeometryOf(file) != geometry_) {
      RefuseImport(path.string(), "another geometry than " + files_[0].string());
    }
    const NpyArray* ids = file.Find("sequence_ids");
    const uint64_t n = ids == nullptr ? 0 : ids->num_items;
    const auto sequences = file.Read<uint64_t>(List(file, "sequence_ids", n), 0, n);
    const auto documents = file.Read<uint64_t>(List(file, "document_ids", n), 0, n);
    std::vector<uint64_t> groups;
    std::vector<uint8_t> tasks;
    if (file.Find("group_ids") != nullptr) {
      groups = file.Read<uint64_t>(List(file, "group_ids", n), 0, n);
    }
    if (file.Find("tasks") != nullptr) {
      tasks = file.Read<uint8_t>(List(file, "tasks", n), 0, n);
    }
    StackReader encoder(file, Stack::kEncoder, n), decoder(file, Stack::kDecoder, n);
    for (const int64_t k : {encoder.active(), decoder.active()}) {
      if (k == 0 || k == active_) continue;
      RefuseImport(path.string(), "active_ids of " + std::to_string(k) +
                                      " experts a token, the geometry or another array "
                                      "says " +
                                      std::to_string(active_));
    }
    for (uint64_t i = 0; i < n; ++i) {
      RoutingTrace trace;
      trace.sequence_id = sequences[i];
      trace.document_id = documents[i];
      trace.group_id = groups.empty() ? ImportedGroup(documents[i]) : groups[i];
      const uint8_t task = tasks.empty() ? static_cast<uint8_t>(trace.task) : tasks[i];
      if (task > static_cast<uint8_t>(Task::kGenerate)) {
        RefuseImport(path.string(), "task " + std::to_string(task) + " of sequence " +
                                        std::to_string(sequences[i]));
      }
      trace.task = static_cast<Task>(task);
      trace.encoder = encoder.Read(i);
      trace.decoder = decoder.Read(i);
      use(std::move(trace));
    }
    encoder.RequireAllUsed();
    decoder.RequireAllUsed();
  }

  std::vector<fs::path> files_;
  std::optional<MoeGeometry> geometry_;
  int active_ = 0;  // experts a token; 0 = not said
};

}  // namespace

std::unique_ptr<ImportSource> OpenExportedArrays(const fs::path& path) {
  return std::make_unique<ExportedArrays>(path);
}

}  // namespace routecast
