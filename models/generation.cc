#include "models/generation.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

namespace routecast {

std::vector<std::vector<int64_t>> GreedyDecode(SwitchModel* model,
                                               const at::Tensor& ids_BS,
                                               const at::Tensor& valid_BS,
                                               const GenerationOptions& options) {
  const c10::NoGradGuard no_grad;
  const SwitchConfig& config = model->config();
  const int64_t batch = ids_BS.size(0);
  const at::Tensor encoded = model->Encode(ids_BS, valid_BS, options.forward);
  std::vector<std::vector<int64_t>> generated(static_cast<size_t>(batch));
  at::Tensor current = at::full({batch, 1}, config.decoder_start_token_id, at::kLong);
  at::Tensor live = at::ones({batch, 1}, at::kBool);
  DecoderCache cache;
  for (int step = 0; step < options.max_new_tokens; ++step) {
    const at::Tensor hidden =
        model->Decode(current, live, encoded, valid_BS, &cache, options.forward);
    const at::Tensor logits = model->Logits(hidden.select(1, 0)).to(at::kCPU, at::kFloat);
    at::Tensor next = logits.argmax(-1);
    next = at::where(live.squeeze(1), next, at::full_like(next, config.pad_token_id));
    for (int64_t b = 0; b < batch; ++b) {
      if (!live[b][0].item<bool>()) continue;
      generated[static_cast<size_t>(b)].push_back(next[b].item<int64_t>());
    }
    live = live.logical_and((next != config.eos_token_id).unsqueeze(1));
    if (options.on_step && !options.on_step(step, logits, next)) break;
    if (!live.any().item<bool>()) break;
    current = next.unsqueeze(1);
  }
  return generated;
}

}  // namespace routecast
