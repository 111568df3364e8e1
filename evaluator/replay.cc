#include "evaluator/replay.h"

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "common/errors.h"
#include "common/random.h"
#include "common/stop.h"
#include "evaluator/clock.h"
#include "models/device_choice.h"

namespace routecast {
namespace {

// Uniform weights that keep activations near one; the seed and the name decide them.
Parameters DenseParameters(const SwitchConfig& config, const ReplayOptions& options) {
  Parameters parameters;
  for (const auto& [name, shape] : ParameterShapes(config)) {
    if (IsExpertTensor(name)) continue;
    if (shape.size() == 1) {
      parameters.Add(name, at::ones(shape, at::kFloat).to(options.device, options.dtype));
      continue;
    }
    at::Generator generator =
        at::detail::createCPUGenerator(Mix(options.seed, Hash64(name)));
    const double limit = std::sqrt(3.0 / static_cast<double>(shape[1]));
    // Drawn on the CPU: the same weights on every device.
    const at::Tensor drawn =
        at::empty(shape, at::kFloat).uniform_(-limit, limit, generator);
    parameters.Add(name, drawn.to(options.device, options.dtype));
  }
  return parameters;
}

at::Tensor TokenIds(const std::vector<const RoutingSpan*>& spans, int64_t tokens,
                    int64_t vocab_size, at::Tensor* valid_BT) {
  const auto batch = static_cast<int64_t>(spans.size());
  at::Tensor ids = at::zeros({batch, tokens}, at::kLong);
  *valid_BT = at::zeros({batch, tokens}, at::kBool);
  for (int64_t b = 0; b < batch; ++b) {
    const RoutingSpan& span = *spans[static_cast<size_t>(b)];
    for (int64_t t = 0; t < std::min<int64_t>(tokens, span.num_tokens); ++t) {
      ids[b][t] =
          static_cast<int64_t>(span.token_ids[static_cast<size_t>(t)]) % vocab_size;
      (*valid_BT)[b][t] = true;
    }
  }
  return ids;
}

void Widen(const uint16_t* bits, int64_t count, float* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = Bf16ToFloat(bits[i]);
}

}  // namespace

void ReplayTape::Load(Stack stack, const std::vector<const RoutingSpan*>& spans,
                      int64_t tokens) {
  const auto batch = static_cast<int64_t>(spans.size());
  const int64_t layers = geometry_.layers(stack);
  bool has_gates = true, has_hidden = true, has_output = true;
  int64_t width = 0;
  for (const RoutingSpan* span : spans) {
    has_gates = has_gates && !span->gate_probs.empty();
    has_hidden = has_hidden && span->hidden_width > 0 && !span->hidden.empty();
    has_output = has_output && has_hidden && !span->output.empty();
    width = std::max<int64_t>(width, span->hidden_width);
  }
  Stream stream;
  stream.experts_LBT = at::zeros({layers, batch, tokens}, at::kLong);
  stream.gates_LBT = at::ones({layers, batch, tokens}, at::kFloat);
  if (has_hidden)
    stream.hidden_LBTD = at::zeros({layers, batch, tokens, width}, at::kFloat);
  if (has_output) stream.output_BTD = at::zeros({batch, tokens, width}, at::kFloat);
  for (int64_t b = 0; b < batch; ++b) {
    const RoutingSpan& span = *spans[static_cast<size_t>(b)];
    if (span.num_layers != layers || span.num_tokens < 1) {
      throw DataError(ErrorText(
          "a trace does not fit its store's geometry",
          std::to_string(span.num_layers) + " layers, not " + std::to_string(layers),
          "run routecast-trace verify"));
    }
    for (int64_t l = 0; l < layers; ++l) {
      for (int64_t t = 0; t < tokens; ++t) {
        const auto from = static_cast<size_t>(l * span.num_tokens +
                                              std::min<int64_t>(t, span.num_tokens - 1));
        stream.experts_LBT.data_ptr<int64_t>()[(l * batch + b) * tokens + t] =
            span.expert_ids[from];
        if (has_gates) {
          stream.gates_LBT.data_ptr<float>()[(l * batch + b) * tokens + t] =
              span.gate_probs[from];
        }
        if (!has_hidden) continue;
        Widen(span.hidden.data() + from * static_cast<size_t>(width), width,
              stream.hidden_LBTD.data_ptr<float>() +
                  ((l * batch + b) * tokens + t) * width);
      }
    }
    for (int64_t t = 0; has_output && t < std::min<int64_t>(tokens, span.num_tokens);
         ++t) {
      Widen(span.output.data() + t * width, width,
            stream.output_BTD.data_ptr<float>() + (b * tokens + t) * width);
    }
  }
  streams_[static_cast<int>(stack)] = std::move(stream);
}

void ReplayTape::LoadSource(const std::vector<const RoutingSpan*>& spans,
                            int64_t tokens) {
  source_BSD_ = source_valid_BS_ = at::Tensor();
  const int64_t layers = geometry_.encoder_layers;
  if (layers == 0) return;
  Load(Stack::kEncoder, spans, tokens);
  const at::Tensor& hidden = streams_[static_cast<int>(Stack::kEncoder)].hidden_LBTD;
  if (!hidden.defined()) return;
  source_BSD_ = hidden[layers - 1].contiguous();
  source_valid_BS_ = at::zeros({hidden.size(1), tokens}, at::kBool);
  for (size_t b = 0; b < spans.size(); ++b) {
    const int64_t real = std::min<int64_t>(tokens, spans[b]->num_tokens);
    source_valid_BS_[static_cast<int64_t>(b)].narrow(0, 0, real).fill_(true);
  }
}

void ReplayTape::OnPassBegin(const PassInfo& pass) {
  from_ = pass.stack == Stack::kDecoder ? pass.first_position : 0;
  tokens_ = pass.token_ids_BT.size(1);
  if (!inner_) return;
  PassInfo shown = pass;
  if (pass.stack == Stack::kDecoder) {
    shown.source_BSD = source_BSD_;
    shown.source_valid_BS = source_valid_BS_;
  }
  inner_->OnPassBegin(shown);
}

void ReplayTape::OnPassEnd(const PassInfo& pass) {
  if (!inner_) return;
  PassInfo shown = pass;
  // What this model computes is synthetic; what the recorded one computed is shown.
  const at::Tensor& output = streams_[static_cast<int>(pass.stack)].output_BTD;
  shown.output_BTD = output.defined() && pass.stack == Stack::kDecoder
                         ? output.narrow(1, from_, tokens_)
                         : at::Tensor();
  inner_->OnPassEnd(shown);
}

void ReplayTape::Replace(int layer, at::Tensor* expert_ids_BT,
                         at::Tensor* gate_probs_BT) {
  const Stream& stream = streams_[static_cast<int>(geometry_.StackOf(layer))];
  const int64_t l = geometry_.LayerInStack(layer);
  const at::Device device = expert_ids_BT->device();
  *expert_ids_BT =
      stream.experts_LBT[l].narrow(1, from_, tokens_).contiguous().to(device);
  *gate_probs_BT = stream.gates_LBT[l]
                       .narrow(1, from_, tokens_)
                       .to(device, gate_probs_BT->scalar_type());
}

void ReplayTape::OnRouting(const LayerRouting& routing) {
  if (!inner_) return;
  const Stream& stream = streams_[static_cast<int>(geometry_.StackOf(routing.layer))];
  LayerRouting recorded = routing;
  recorded.input_BTD = at::Tensor();
  if (stream.hidden_LBTD.defined()) {
    recorded.input_BTD = stream.hidden_LBTD[geometry_.LayerInStack(routing.layer)]
                             .narrow(1, from_, tokens_)
                             .contiguous();
  }
  inner_->OnRouting(recorded);
}

SwitchConfig ReplayConfig(const MoeGeometry& recorded, const ReplayOptions& options) {
  SwitchConfig config;
  config.d_model = options.d_model;
  config.d_ff = options.d_ff;
  config.d_kv = options.d_kv;
  config.num_heads = options.num_heads;
  config.vocab_size = options.vocab_size;
  // Every second block is sparse, as in switch-base.
  config.num_layers = 2 * recorded.encoder_layers;
  config.num_decoder_layers = 2 * recorded.decoder_layers;
  config.num_sparse_encoder_layers = recorded.encoder_layers;
  config.num_sparse_decoder_layers = recorded.decoder_layers;
  config.num_experts = recorded.num_experts;
  config.expert_capacity =
      std::numeric_limits<int>::max();  // the choice is what is replayed
  return config;
}

ReplayWorkload::ReplayWorkload(const MoeGeometry& recorded,
                               std::vector<RoutingTrace> traces,
                               const ReplayOptions& options)
    : options_(options),
      traces_(std::move(traces)),
      config_(ReplayConfig(recorded, options)),
      geometry_(config_.geometry()),
      executor_(&source_),
      tape_(geometry_) {
  if (recorded.encoder_layers < 1 || recorded.decoder_layers < 1) {
    throw UsageError(ErrorText("replay needs a store of an encoder-decoder model",
                               std::to_string(recorded.encoder_layers) + " encoder and " +
                                   std::to_string(recorded.decoder_layers) +
                                   " decoder MoE layers",
                               "collect with a Switch Transformer"));
  }
  model_ = std::make_unique<SwitchModel>(config_, DenseParameters(config_, options),
                                         &executor_);
  int64_t longest = 1;
  for (int segment = 0; segment < num_segments(); ++segment)
    longest = std::max(longest, SourceLength(segment));
  if (!options.decoder) return;
  steps_ = FixedSteps(options.steps, model_.get(), options.batch, longest, options.tokens,
                      {&tape_, &tape_});
}

int ReplayWorkload::num_segments() const {
  return static_cast<int>(traces_.size()) / options_.batch;
}

int64_t ReplayWorkload::SourceLength(int segment) const {
  int64_t length = 1;
  for (int b = 0; b < options_.batch; ++b) {
    const auto i = static_cast<size_t>(segment * options_.batch + b);
    length = std::max<int64_t>(length, traces_[i].encoder.num_tokens);
  }
  return std::min<int64_t>(length, options_.max_source);
}

uint64_t ReplayWorkload::KeyValueBytes(const PassInfo& pass) const {
  if (steps_) return steps_->memory_bytes();
  if (pass.stack == Stack::kEncoder) return 0;
  const at::Tensor& ids = pass.token_ids_BT;
  return routecast::KeyValueBytes(config_, model_->dtype(), ids.size(0),
                                  SourceLength(running_),
                                  pass.first_position + ids.size(1));
}

uint64_t ReplayWorkload::MaxKeyValueBytes() const {
  if (!options_.decoder) return 0;
  if (steps_) return steps_->memory_bytes();
  uint64_t most = 0;
  for (int segment = 0; segment < num_segments(); ++segment) {
    most =
        std::max(most, routecast::KeyValueBytes(config_, model_->dtype(), options_.batch,
                                                SourceLength(segment), options_.tokens));
  }
  return most;
}

at::Tensor ReplayWorkload::Source(const std::vector<const RoutingSpan*>& spans,
                                  OutputHash* hash, SegmentTimes* times,
                                  at::Tensor* valid_BS) {
  const int64_t length = SourceLength(running_);
  const at::Tensor ids = TokenIds(spans, length, config_.vocab_size, valid_BS);
  tape_.LoadSource(spans, length);
  if (!options_.encoder) {
    at::Generator generator = at::detail::createCPUGenerator(Mix(options_.seed, 7));
    return at::empty({ids.size(0), length, config_.d_model}, at::kFloat)
        .normal_(0, 1, generator)
        .to(options_.device, options_.dtype);
  }
  const SteadyClock clock;
  const double from = clock.Now();
  const at::Tensor encoded = model_->Encode(ids, *valid_BS, {&tape_, &tape_});
  Synchronize(options_.device);
  times->step_seconds[0].push_back(clock.Now() - from);
  times->tokens[0] += valid_BS->sum().item<int64_t>();
  hash->Add(encoded);
  return encoded;
}

void ReplayWorkload::Steps(const std::vector<const RoutingSpan*>& spans,
                           const at::Tensor& encoded_BSD, const at::Tensor& valid_BS,
                           OutputHash* hash, SegmentTimes* times) {
  int64_t length = options_.tokens;
  for (const RoutingSpan* span : spans)
    length = std::min<int64_t>(length, span->num_tokens);
  at::Tensor valid_BT;
  const at::Tensor ids = TokenIds(spans, length, config_.vocab_size, &valid_BT);
  tape_.Load(Stack::kDecoder, spans, length);
  const ForwardOptions forward{&tape_, &tape_};
  if (steps_) steps_->Begin(encoded_BSD, valid_BS, forward);
  DecoderCache cache;
  const auto step = [&](const at::Tensor& id_B1, const at::Tensor& valid_B1) {
    if (steps_) return steps_->Step(id_B1, valid_B1);
    const at::Tensor hidden =
        model_->Decode(id_B1, valid_B1, encoded_BSD, valid_BS, &cache, forward);
    return model_->Logits(hidden.select(1, 0));
  };
  const SteadyClock clock;
  for (int64_t t = 0; t < length; ++t) {
    const double from = clock.Now();
    const at::Tensor logits = step(ids.narrow(1, t, 1), valid_BT.narrow(1, t, 1));
    // Forced tokens go on; these are a part of the output.
    const at::Tensor chosen = logits.argmax(-1).to(at::kCPU);
    times->step_seconds[1].push_back(clock.Now() - from);
    times->tokens[1] += ids.size(0);
    hash->Add(logits);
    hash->Add(chosen);
    ThrowIfStopped("while replaying");
  }
}

SegmentTimes ReplayWorkload::Run(int segment, ExpertSource* source,
                                 RoutingObserver* observer, OutputHash* hash) {
  const c10::NoGradGuard no_grad;
  source_.Set(source);
  running_ = segment;
  tape_.SetInner(observer);
  std::vector<const RoutingSpan*> encoder, decoder;
  for (int b = 0; b < options_.batch; ++b) {
    const RoutingTrace& trace =
        traces_[static_cast<size_t>(segment * options_.batch + b)];
    encoder.push_back(&trace.encoder);
    decoder.push_back(&trace.decoder);
  }
  SegmentTimes times;
  at::Tensor valid_BS;
  const at::Tensor encoded = Source(encoder, hash, &times, &valid_BS);
  if (options_.decoder) Steps(decoder, encoded, valid_BS, hash, &times);
  return times;
}

}  // namespace routecast
