#include "collector/chunk_runner.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include <algorithm>

#include "corpus/span_corruption.h"
#include "models/generation.h"

namespace routecast {
namespace {

constexpr double kMostPadding = 0.05;  // of a batch's places for tokens
constexpr double kMeanSpan = 3.0;      // T5's
constexpr int kExtraNewTokens = 8;  // beyond the reference targets, for Task::kGenerate
constexpr uint64_t kCorruptionKey = 0x7370616e73ULL;

struct Padded {
  at::Tensor ids_BT, valid_BT;
};

Padded Pad(const std::vector<const std::vector<int32_t>*>& rows, int32_t pad) {
  size_t longest = 1;
  for (const auto* row : rows) longest = std::max(longest, row->size());
  const std::vector<int64_t> shape = {static_cast<int64_t>(rows.size()),
                                      static_cast<int64_t>(longest)};
  Padded padded{at::full(shape, pad, at::kLong), at::zeros(shape, at::kBool)};
  auto ids = padded.ids_BT.accessor<int64_t, 2>();
  auto valid = padded.valid_BT.accessor<bool, 2>();
  for (size_t b = 0; b < rows.size(); ++b) {
    for (size_t t = 0; t < rows[b]->size(); ++t) {
      ids[static_cast<int64_t>(b)][static_cast<int64_t>(t)] = (*rows[b])[t];
      valid[static_cast<int64_t>(b)][static_cast<int64_t>(t)] = true;
    }
  }
  return padded;
}

struct Abandoned {};  // a pass ends by it

// The recorder, and a look whether the work goes on.
class WatchedRecorder final : public RoutingObserver {
 public:
  WatchedRecorder(RoutingRecorder* recorder, const std::function<bool()>& goes_on)
      : recorder_(recorder), goes_on_(goes_on) {}
  void OnPassBegin(const PassInfo& pass) override { recorder_->OnPassBegin(pass); }
  void OnRouting(const LayerRouting& routing) override {
    if (!goes_on_()) throw Abandoned{};
    recorder_->OnRouting(routing);
  }
  bool WantsAttention() const override { return recorder_->WantsAttention(); }
  void OnAttention(const LayerAttention& attention) override {
    recorder_->OnAttention(attention);
  }
  void OnPassEnd(const PassInfo& pass) override { recorder_->OnPassEnd(pass); }

 private:
  RoutingRecorder* recorder_;
  const std::function<bool()>& goes_on_;
};

// Teacher forcing: the start token, then the targets without their last.
std::vector<int32_t> ShiftedRight(const std::vector<int32_t>& targets, int32_t start) {
  std::vector<int32_t> inputs = {start};
  inputs.insert(inputs.end(), targets.begin(), targets.end() - 1);
  return inputs;
}

}  // namespace

ChunkRunner::ChunkRunner(SwitchModel* model, const Corpus* corpus,
                         const Tokenizer* tokenizer, const ChunkPlan* plan,
                         const StoreConfig& config, bool skip_nonfinite)
    : model_(model),
      corpus_(corpus),
      tokenizer_(tokenizer),
      plan_(plan),
      config_(config),
      skip_nonfinite_(skip_nonfinite),
      order_(*corpus),
      forced_groups_(config.Records("hidden")
                         ? ForcedHiddenGroups(*corpus, *plan, config.hidden_share)
                         : std::set<uint64_t>()) {}

bool ChunkRunner::RecordsHidden(uint64_t group) const {
  return config_.Records("hidden") &&
         (HiddenShareOf(group, config_.hidden_share) || forced_groups_.contains(group));
}

ChunkRunner::Sequence ChunkRunner::MakeSequence(uint64_t id,
                                                std::vector<int32_t> ids) const {
  Sequence sequence;
  sequence.id = id;
  if (config_.task == Task::kEncode) {
    sequence.inputs = std::move(ids);
    sequence.inputs.push_back(Tokenizer::kEos);
    return sequence;
  }
  const Sentinels sentinels{tokenizer_->Sentinel(0), tokenizer_->num_sentinels()};
  CorruptedSpans spans = CorruptSpans(ids, Mix(config_.seed, kCorruptionKey, id),
                                      {config_.noise_density, kMeanSpan}, sentinels);
  sequence.inputs = std::move(spans.inputs);
  sequence.targets = std::move(spans.targets);
  return sequence;
}

const std::vector<std::vector<int32_t>>& ChunkRunner::SegmentsOf(uint64_t document) {
  if (document != segmented_document_) {
    // One place is left for the end-of-sequence token.
    segments_ =
        SegmentTokens(*tokenizer_, corpus_->Text(document), config_.max_length - 1);
    segmented_document_ = document;
  }
  return segments_;
}

std::vector<ChunkRunner::Sequence> ChunkRunner::SequencesOf(const Chunk& chunk) {
  std::vector<Sequence> sequences;
  for (uint64_t position = chunk.begin; position < chunk.end; ++position) {
    const uint64_t d = order_(position);
    const Document document = corpus_->document(d);
    const auto& segments = SegmentsOf(d);
    const bool cut = position + 1 == chunk.end && chunk.last_segments > 0;
    const size_t count =
        cut ? std::min<size_t>(segments.size(), chunk.last_segments) : segments.size();
    for (size_t s = 0; s < count; ++s) {
      if (s * chunk.num_slices / count != chunk.slice) continue;
      Sequence sequence = MakeSequence(d << kSegmentBits | s, segments[s]);
      sequence.document = d;
      sequence.group = document.group;
      sequences.push_back(std::move(sequence));
    }
  }
  std::sort(sequences.begin(), sequences.end(), [](const Sequence& a, const Sequence& b) {
    return a.inputs.size() != b.inputs.size() ? a.inputs.size() > b.inputs.size()
                                              : a.id < b.id;
  });
  return sequences;
}

size_t ChunkRunner::BatchEnd(const std::vector<Sequence>& sequences, size_t first) const {
  size_t longest = 0, longest_target = 0, tokens = 0, end = first;
  while (end < sequences.size() && end - first < size_t(config_.batch_size)) {
    const Sequence& s = sequences[end];
    longest = std::max(longest, s.inputs.size());
    longest_target = std::max(longest_target, s.targets.size());
    tokens += s.inputs.size() + s.targets.size();
    const size_t places = (end - first + 1) * (longest + longest_target);
    if (end > first && double(tokens) < (1 - kMostPadding) * double(places)) break;
    ++end;
  }
  return end;
}

bool ChunkRunner::Run(uint32_t chunk, const std::function<bool()>& goes_on,
                      const std::function<void(const RoutingTrace&)>& sink) {
  const std::vector<Sequence> sequences = SequencesOf(plan_->chunks.at(chunk));
  try {
    for (size_t first = 0; first < sequences.size();) {
      if (!goes_on()) return false;
      const size_t end = BatchEnd(sequences, first);
      std::vector<const Sequence*> batch;
      for (; first < end; ++first) batch.push_back(&sequences[first]);
      RunBatch(batch, goes_on, sink);
    }
  } catch (const Abandoned&) {
    return false;
  }
  return goes_on();
}

void ChunkRunner::RunBatch(const std::vector<const Sequence*>& batch,
                           const std::function<bool()>& goes_on,
                           const std::function<void(const RoutingTrace&)>& sink) {
  const c10::NoGradGuard no_grad;
  const SwitchConfig& model_config = model_->config();
  std::vector<bool> hidden_rows;
  std::vector<const std::vector<int32_t>*> inputs;
  for (const Sequence* s : batch) {
    hidden_rows.push_back(RecordsHidden(s->group));
    inputs.push_back(&s->inputs);
  }
  RoutingRecorder recorder(
      model_->geometry(),
      {config_.Records("probs"), config_.top_k, config_.Records("output"),
       config_.Records("attention"), skip_nonfinite_},
      hidden_rows);
  ForwardOptions forward;
  WatchedRecorder watched(&recorder, goes_on);
  forward.observer = &watched;
  const Padded source = Pad(inputs, model_config.pad_token_id);
  computed_tokens_ += source.ids_BT.numel();
  std::vector<GeneratedSequence> generated;
  if (config_.task == Task::kGenerate) {
    GenerationOptions options;
    options.forward = forward;
    for (const Sequence* s : batch) {
      options.row_max_new_tokens.push_back(static_cast<int>(s->targets.size()) +
                                           kExtraNewTokens);
    }
    options.max_new_tokens = *std::max_element(options.row_max_new_tokens.begin(),
                                               options.row_max_new_tokens.end());
    options.record_steps = true;
    options.logits_on_step = false;
    options.end_without_numbers = skip_nonfinite_;
    options.on_step = [&](int, const at::Tensor&, const at::Tensor& ids_B) {
      computed_tokens_ += ids_B.numel();
      return true;
    };
    const StoreSampling& sampling = config_.sampling;
    options.sampling = {sampling.temperature, sampling.top_k, sampling.top_p,
                        sampling.seed};
    // By sequence: the same draws whatever the batch, the chunk and the rank.
    for (const Sequence* s : batch) options.sampling.row_keys.push_back(s->id);
    generated = Generate(model_, source.ids_BT, source.valid_BT, options);
  } else {
    const at::Tensor encoded = model_->Encode(source.ids_BT, source.valid_BT, forward);
    if (config_.task == Task::kDenoise) {
      std::vector<std::vector<int32_t>> shifted;
      for (const Sequence* s : batch) {
        shifted.push_back(ShiftedRight(s->targets, model_config.decoder_start_token_id));
      }
      std::vector<const std::vector<int32_t>*> rows;
      for (const auto& row : shifted) rows.push_back(&row);
      const Padded target = Pad(rows, model_config.pad_token_id);
      computed_tokens_ += target.ids_BT.numel();
      model_->Decode(target.ids_BT, target.valid_BT, encoded, source.valid_BT, nullptr,
                     forward);
    }
  }
  for (size_t b = 0; b < batch.size(); ++b) {
    RoutingTrace trace;
    trace.sequence_id = batch[b]->id;
    trace.document_id = batch[b]->document;
    trace.group_id = batch[b]->group;
    trace.task = config_.task;
    const bool left_out = recorder.NoNumbers(static_cast<int>(b)) ||
                          (b < generated.size() && generated[b].no_numbers);
    if (!left_out) {
      trace.encoder = recorder.Take(Stack::kEncoder, static_cast<int>(b));
      trace.decoder = recorder.Take(Stack::kDecoder, static_cast<int>(b));
    }
    sink(trace);
  }
}

}  // namespace routecast
