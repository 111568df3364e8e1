#include "trainer/pretrain_options.h"

#include <cmath>

#include "common/errors.h"

namespace routecast {
namespace {

SwitchConfig Geometry(int blocks, int d_model, int d_ff, int heads, int experts) {
  SwitchConfig c;
  c.d_model = d_model;
  c.d_ff = d_ff;
  c.num_heads = heads;
  c.d_kv = d_model / heads;
  c.num_layers = c.num_decoder_layers = blocks;
  c.num_sparse_encoder_layers = c.num_sparse_decoder_layers = blocks / 2;
  c.num_experts = experts;
  c.tie_word_embeddings = false;
  c.router_jitter_noise = 0.01;
  c.router_aux_loss_coef = 0.01;
  c.router_z_loss_coef = 0.0;
  return c;
}

}  // namespace

const std::vector<std::string>& PretrainPresetNames() {
  static const std::vector<std::string> kNames = {"demo", "small", "small128", "base128"};
  return kNames;
}

PretrainOptions PretrainPreset(const std::string& name) {
  PretrainOptions o;
  switch (ParseChoice("--preset", name, PretrainPresetNames())) {
    case 0:
      o.model = Geometry(4, 96, 256, 4, 16);
      o.router_deviation = 5.5;
      break;
    case 1:
      o.model = Geometry(4, 96, 256, 4, 16);
      o.steps = 3200;
      o.warmup_steps = 200;
      break;
    case 2:
      o.model = Geometry(6, 96, 128, 4, 128);
      o.steps = 5000;
      o.warmup_steps = 200;
      o.capacity_factor = 2.0;
      break;
    case 3:
      // Switch-base's depth. At its width (768 x 3072) training takes 180 GB of one card.
      o.model = Geometry(12, 512, 1024, 8, 128);
      o.steps = 4000;  // some ten times the default corpus
      o.warmup_steps = 400;
      o.learning_rate = 3e-4;
      o.pieces = 8000;
      o.extra_ids = 100;
      o.sequence_tokens = 512;
      o.global_batch = 64;
      o.noise_density = 0.15;
      o.capacity_factor = 1.25;
      break;
  }
  return o;
}

void PretrainOptions::Validate() const {
  const auto check = [](bool ok, const std::string& flag, const std::string& rule) {
    if (!ok) throw UsageError(ErrorText(flag + " is out of range", rule, "see --help"));
  };
  check(steps > 0, "--steps", "at least 1");
  check(micro_batch > 0 && global_batch > 0 && global_batch % micro_batch == 0,
        "--global_batch", "a multiple of --micro_batch=" + std::to_string(micro_batch));
  check(sequence_tokens >= 16 && sequence_tokens <= 4096, "--sequence_tokens",
        "16..4096");
  for (const auto& [flag, blocks] : {std::pair{"--encoder_blocks", model.num_layers},
                                     {"--decoder_blocks", model.num_decoder_layers}}) {
    check(blocks >= 2 && blocks <= 64 && blocks % 2 == 0, flag, "an even number, 2..64");
  }
  check(learning_rate > 0 && learning_rate < 1, "--learning_rate", "above 0, below 1");
}

Json PretrainOptions::ToJson() const {
  return Json{{"model", model.ToJson()},
              {"pieces", pieces},
              {"extra_ids", extra_ids},
              {"steps", steps},
              {"warmup_steps", warmup_steps},
              {"learning_rate", learning_rate},
              {"weight_decay", weight_decay},
              {"clip_norm", clip_norm},
              {"sequence_tokens", sequence_tokens},
              {"global_batch", global_batch},
              {"micro_batch", micro_batch},
              {"noise_density", noise_density},
              {"mean_span", mean_span},
              {"mask_share", mask_share},
              {"mask_weight", mask_weight},
              {"router_deviation", router_deviation},
              {"capacity_factor", capacity_factor},
              {"seed", seed}};
}

}  // namespace routecast
