#include "models/generation.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include <cmath>
#include <limits>
#include <memory>
#include <stdexcept>

#include "common/errors.h"
#include "models/static_decoder.h"

namespace routecast {
namespace {

constexpr double kMinusInfinity = -std::numeric_limits<double>::infinity();

// The incremental decoder of a batch: one token a row and call. On a GPU in fixed memory,
// where that can be.
class Decoder {
 public:
  Decoder(SwitchModel* model, const at::Tensor& ids_BS, const at::Tensor& valid_BS,
          const GenerationOptions& options)
      : model_(model), forward_(options.forward) {
    const int64_t copies = options.beams.num_beams;
    const at::Tensor encoded_BSD = model->Encode(ids_BS, valid_BS, forward_);
    encoded_RSD_ =
        copies == 1 ? encoded_BSD : encoded_BSD.repeat_interleave(copies, /*dim=*/0);
    valid_RS_ = copies == 1 ? valid_BS : valid_BS.repeat_interleave(copies, /*dim=*/0);
    if (options.record_steps) cache_.most = options.max_new_tokens;
    static_ = options.steps_in;
    if (static_) {
      static_->Begin(encoded_RSD_, valid_RS_, forward_);
    } else if (options.record_steps && model->device().is_cuda() &&
               StaticDecoder::Serves(*model, forward_, rows())) {
      own_ = std::make_unique<StaticDecoder>(model, encoded_RSD_, valid_RS_,
                                             options.max_new_tokens, forward_);
      static_ = own_.get();
    }
  }
  int64_t rows() const { return encoded_RSD_.size(0); }
  // ids and live [R,1] on the CPU -> fp32 logits [R,V] on the model's device.
  at::Tensor Step(const at::Tensor& ids_R1, const at::Tensor& live_R1) {
    if (static_) return static_->Step(ids_R1, live_R1).to(at::kFloat);
    const at::Tensor hidden =
        model_->Decode(ids_R1, live_R1, encoded_RSD_, valid_RS_, &cache_, forward_);
    return model_->Logits(hidden.select(1, 0)).to(at::kFloat);
  }
  // Row r goes on from what was row source_R[r], one of the same prompt's: so the keys
  // and values of its source text stay where they are.
  void Reorder(const at::Tensor& source_R) {
    const at::Tensor rows = source_R.to(model_->device());
    if (static_) return static_->Reorder(rows);
    for (auto* part : {&cache_.self_key, &cache_.self_value}) {
      for (at::Tensor& tensor : *part) {
        const at::Tensor known = tensor.narrow(2, 0, cache_.length);
        const at::Tensor moved = known.index_select(0, rows);
        cache_.length == tensor.size(2) ? tensor = moved : known.copy_(moved);
      }
    }
  }

 private:
  SwitchModel* model_;
  ForwardOptions forward_;
  at::Tensor encoded_RSD_, valid_RS_;
  DecoderCache cache_;
  StaticDecoder* static_ = nullptr;  // where steps are in fixed memory
  std::unique_ptr<StaticDecoder> own_;
};

at::Tensor ForCallback(const at::Tensor& logits, const GenerationOptions& options) {
  return options.logits_on_step ? logits.to(at::kCPU) : at::Tensor();
}

// The most probable token of each row, or kNoToken; int64 [R] on the CPU.
at::Tensor BestIds(const at::Tensor& logits_RV) {
  const at::Tensor ids = logits_RV.argmax(-1, /*keepdim=*/true);  // a NaN's, where one is
  // One copy off the device. Nor is an overflow an order of tokens.
  const at::Tensor right = logits_RV.gather(1, ids).isfinite();
  return ids.masked_fill(right.logical_not(), kNoToken).squeeze(1).to(at::kCPU);
}

// Ends the live rows that have no next token, or refuses them.
void EndWithoutToken(const at::Tensor& next_R, int step, const GenerationOptions& options,
                     at::Tensor* live_R1, std::vector<GeneratedSequence>* generated) {
  const auto* next = next_R.const_data_ptr<int64_t>();
  auto* live = live_R1->mutable_data_ptr<bool>();
  for (int64_t r = 0; r < next_R.size(0); ++r) {
    if (next[r] != kNoToken || !live[r]) continue;
    if (!options.end_without_numbers) RefuseLogits(r, step);
    (*generated)[static_cast<size_t>(r)].no_numbers = true;
    live[r] = false;
  }
}

int LimitOf(const GenerationOptions& options, size_t row) {
  const std::vector<int>& limits = options.row_max_new_tokens;
  return limits.empty() ? options.max_new_tokens : limits[row];
}

std::vector<GeneratedSequence> ChooseTokenByToken(Decoder* decoder,
                                                  const SwitchConfig& config,
                                                  const GenerationOptions& options) {
  const int64_t batch = decoder->rows();
  std::vector<GeneratedSequence> generated(static_cast<size_t>(batch));
  at::Tensor current = at::full({batch, 1}, config.decoder_start_token_id, at::kLong);
  at::Tensor live = at::ones({batch, 1}, at::kBool);
  for (int step = 0; step < options.max_new_tokens; ++step) {
    const at::Tensor logits = decoder->Step(current, live);
    at::Tensor allowed = logits;
    if (step < options.min_new_tokens) {
      allowed = logits.clone();
      allowed.select(1, config.eos_token_id).fill_(kMinusInfinity);
    }
    at::Tensor next = options.sampling.enabled()
                          ? SampleIds(WarpLogits(allowed.to(at::kCPU), options.sampling),
                                      options.sampling, step)
                          : BestIds(allowed);
    live = live.clone();  // the step's observers keep theirs
    EndWithoutToken(next, step, options, &live, &generated);
    next = at::where(live.squeeze(1), next, at::full_like(next, config.pad_token_id));
    const auto* chosen = next.const_data_ptr<int64_t>();
    auto* goes_on = live.mutable_data_ptr<bool>();
    bool any = false;
    for (int64_t b = 0; b < batch; ++b) {
      if (!goes_on[b]) continue;
      const auto row = static_cast<size_t>(b);
      generated[row].ids.push_back(chosen[b]);
      goes_on[b] = chosen[b] != config.eos_token_id && step + 1 < LimitOf(options, row);
      any = any || goes_on[b];
    }
    if (options.on_step && !options.on_step(step, ForCallback(logits, options), next)) {
      break;
    }
    if (!any) break;
    current = next.unsqueeze(1);
  }
  return generated;
}

// What the decoder runs next: the beams of every search, padding where one is done.
struct NextBeams {
  at::Tensor ids_R1, live_R1, source_R;
};

NextBeams NextOf(const std::vector<BeamSearch>& searches, int64_t num_beams,
                 int64_t pad_token_id) {
  const int64_t rows = static_cast<int64_t>(searches.size()) * num_beams;
  NextBeams next{at::full({rows, 1}, pad_token_id, at::kLong),
                 at::zeros({rows, 1}, at::kBool), at::arange(rows, at::kLong)};
  auto* id = next.ids_R1.mutable_data_ptr<int64_t>();
  auto* live = next.live_R1.mutable_data_ptr<bool>();
  auto* source = next.source_R.mutable_data_ptr<int64_t>();
  for (int64_t r = 0; r < rows; ++r) {
    const BeamSearch& search = searches[static_cast<size_t>(r / num_beams)];
    if (search.done()) continue;
    const BeamSearch::Beam& beam = search.running()[static_cast<size_t>(r % num_beams)];
    id[r] = beam.ids.back();
    live[r] = true;
    source[r] = r / num_beams * num_beams + beam.source;
  }
  return next;
}

std::vector<GeneratedSequence> SearchBeams(Decoder* decoder, const SwitchConfig& config,
                                           const GenerationOptions& options) {
  const int64_t beams = options.beams.num_beams, rows = decoder->rows();
  std::vector<BeamSearch> searches(
      static_cast<size_t>(rows / beams),
      BeamSearch(options.beams, config.eos_token_id, options.max_new_tokens));
  at::Tensor current = at::full({rows, 1}, config.decoder_start_token_id, at::kLong);
  at::Tensor live = at::ones({rows, 1}, at::kBool);
  for (int step = 0; step < options.max_new_tokens; ++step) {
    const at::Tensor logits = decoder->Step(current, live);
    at::Tensor log_probs = at::log_softmax(logits, -1).to(at::kCPU).contiguous();
    if (step < options.min_new_tokens) {
      log_probs.select(1, config.eos_token_id).fill_(kMinusInfinity);
    }
    const auto values = static_cast<size_t>(beams * log_probs.size(1));
    bool all_done = true;
    for (int64_t r = 0; r < rows; ++r) {  // one that is no number makes all of them so
      if (std::isnan(log_probs.const_data_ptr<float>()[r * log_probs.size(1)]) &&
          live.const_data_ptr<bool>()[r]) {
        RefuseLogits(r / beams, step);
      }
    }
    for (size_t b = 0; b < searches.size(); ++b) {
      searches[b].Step({log_probs.data_ptr<float>() + b * values, values});
      all_done = all_done && searches[b].done();
    }
    const NextBeams next = NextOf(searches, beams, config.pad_token_id);
    if (options.on_step) {
      options.on_step(step, ForCallback(logits, options), next.ids_R1.squeeze(1));
    }
    if (all_done) break;
    decoder->Reorder(next.source_R);
    current = next.ids_R1;
    live = next.live_R1;
  }
  std::vector<GeneratedSequence> generated;
  for (const BeamSearch& search : searches) {
    for (GeneratedSequence& best : search.Best(options.num_return_sequences)) {
      generated.push_back(std::move(best));
    }
  }
  return generated;
}

}  // namespace

void GenerationOptions::Validate() const {
  const auto refuse = [](const std::string& what, int value, const std::string& advice) {
    throw UsageError(ErrorText(what, std::to_string(value), "use " + advice));
  };
  sampling.Validate();
  if (max_new_tokens < 1) refuse("max_new_tokens", max_new_tokens, "1 or more");
  if (min_new_tokens < 0 || min_new_tokens > max_new_tokens) {
    refuse("min_new_tokens", min_new_tokens,
           "0 to max_new_tokens, " + std::to_string(max_new_tokens));
  }
  if (beams.num_beams < 1) refuse("num_beams", beams.num_beams, "1 or more");
  if (num_return_sequences < 1 || num_return_sequences > beams.num_beams) {
    refuse("num_return_sequences", num_return_sequences,
           "1 to num_beams, " + std::to_string(beams.num_beams));
  }
  if (beams.num_beams > 1 && sampling.enabled()) {
    refuse("sampling and beams exclude each other; num_beams", beams.num_beams,
           "num_beams=1 or temperature=0");
  }
}

std::vector<GeneratedSequence> Generate(SwitchModel* model, const at::Tensor& ids_BS,
                                        const at::Tensor& valid_BS,
                                        const GenerationOptions& options) {
  options.Validate();
  const std::vector<uint64_t>& keys = options.sampling.row_keys;
  if (!keys.empty() && static_cast<int64_t>(keys.size()) != ids_BS.size(0)) {
    throw std::logic_error("Generate: one row key a prompt is needed");
  }
  const std::vector<int>& limits = options.row_max_new_tokens;
  if (!limits.empty() && (static_cast<int64_t>(limits.size()) != ids_BS.size(0) ||
                          options.beams.num_beams > 1)) {
    throw std::logic_error("Generate: one limit a prompt is needed, and no beams");
  }
  const c10::NoGradGuard no_grad;
  const SwitchConfig& config = model->config();
  if (options.beams.num_beams > 1 &&
      config.vocab_size < 2 * int64_t{options.beams.num_beams}) {
    throw UsageError(ErrorText("num_beams is more than half of the vocabulary",
                               std::to_string(options.beams.num_beams) + " of " +
                                   std::to_string(config.vocab_size),
                               "use fewer beams"));
  }
  Decoder decoder(model, ids_BS, valid_BS, options);
  return options.beams.num_beams > 1 ? SearchBeams(&decoder, config, options)
                                     : ChooseTokenByToken(&decoder, config, options);
}

}  // namespace routecast
