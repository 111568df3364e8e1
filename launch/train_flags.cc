#include "launch/train_flags.h"

#include <gflags/gflags.h>

#include "common/errors.h"
#include "models/speculation_kinds.h"

DECLARE_uint64(seed);
DEFINE_string(
    kind, "hidden",
    "Kind of model: hidden, stale_correction, interlayer, autoregressive, multiscale, "
    "moe, ensemble, contextual, transformer, hierarchical, simple, lstm, attention, "
    "conv1d or legacy_multiscale; docs/speculation.md says what each is");
DEFINE_int32(epochs, 8, "Epochs at most; early stopping may end before");
DEFINE_int64(steps, 0, "Training steps at most, instead of --epochs; 0 = by --epochs");
DEFINE_int32(global_batch, 64, "Windows a step over all ranks");
DEFINE_int32(micro_batch, 16, "Windows a forward pass");
DEFINE_double(learning_rate, 0, "Peak learning rate; 0 = the kind's own");
DEFINE_int32(width, 0, "Width of the model; 0 = the kind's own");
DEFINE_int32(heads, 0, "Attention heads of the model; 0 = the kind's own");
DEFINE_int32(ff, 0,
             "Inner width of the model's blocks; 0 = by --width, or the kind's own");
DEFINE_int32(layers, 0, "Layers or blocks of the model; 0 = the kind's own");
DEFINE_int32(context, 0,
             "Newest layers of a token whose experts the model sees; 0 = the kind's own");
DEFINE_double(dropout, -1,
              "Share of activations set to zero in training; below 0 = the kind's own");
DEFINE_string(
    members, "",
    "Members of an ensemble, e.g. interlayer:width=512,heads=16,lr=5e-5;hidden*2");
DEFINE_string(start_from, "",
              "Folder of a finished run of this kind whose weights training starts from");
DEFINE_bool(
    transfer, false,
    "Of --start_from, take only what does not belong to the traced model: layers, "
    "not embeddings and heads");
DEFINE_int32(freeze_layers, 0,
             "Lowest layers of --start_from that stay as they are at first");
DEFINE_int32(freeze_epochs, 1,
             "Epochs until the top layer of --freeze_layers is trained, and from each to "
             "the next below");
DEFINE_string(combine, "probabilities",
              "How an ensemble mixes: probabilities, logits, vote, or stack (weights a "
              "source layer and lead, learnt on validation documents)");
DEFINE_string(schedule, "cosine",
              "Learning rate: cosine, restarts, plateau, constant, one_cycle");
DEFINE_int32(warmup_steps, 100,
             "Steps of linear warm-up of the rate, at most a tenth of the run");
DEFINE_double(last_rate, 0.02, "Share of the peak rate where a schedule ends");
DEFINE_int64(restart_steps, 0,
             "Steps of the first wave of --schedule=restarts; 0 = a fifth of the run");
DEFINE_int32(restart_epochs, 0,
             "Epochs of the first wave of --schedule=restarts, instead of "
             "--restart_steps; 0 = by --restart_steps");
DEFINE_double(restart_growth, 2,
              "Each wave of --schedule=restarts is so many times as long as the last");
DEFINE_double(plateau_factor, 0.5, "What --schedule=plateau multiplies the rate by");
DEFINE_int32(
    plateau_patience, 2,
    "Validations without a better one after which --schedule=plateau lowers the rate");
DEFINE_double(weight_decay, 0.01, "Decoupled weight decay (AdamW), of matrices");
DEFINE_double(clip_norm, 1, "Largest norm of a member's gradient");
DEFINE_double(beta1, 0.9, "Decay of AdamW's first moment");
DEFINE_bool(
    cycle_beta1, false,
    "With --schedule=one_cycle, instead of --beta1: from .95 to .85 while the rate "
    "rises, and back, as it is published");
DEFINE_double(beta2, 0.99, "Decay of AdamW's second moment");
DEFINE_double(label_smoothing, 0, "Share of a label that all experts get");
DEFINE_double(ema, 0, "Decay of averaged parameters, which are then kept; 0 = none");
DEFINE_string(
    loss, "cross_entropy",
    "Loss of the routing: cross_entropy, or focal, .25 (1 - p)^2 times that (published "
    "with the baseline)");
DEFINE_double(confidence_weight, 0.1, "Weight of the loss of 'my top-1 is right'");
DEFINE_string(confidence_loss, "cross_entropy",
              "What a confidence c costs: cross_entropy or squared, against 'my top-1 is "
              "right'; or half, (c - .5)^2, as it is published with two models");
DEFINE_double(pattern_entropy, 0,
              "What the entropy of the pattern memory's weights takes off the loss "
              "(published: .01); interlayer and moe");
DEFINE_double(set_weight, 0, "Weight of the encoder's set prediction in the loss");
DEFINE_double(distill_weight, 0,
              "Share of the loss towards the routers' own top-k (--record=topk)");
DEFINE_double(distill_temperature, 1,
              "Temperature of the distillation of --distill_weight");
DEFINE_double(
    consistency_weight, 0,
    "Weight of 'neighbouring tokens are as alike as their experts' in the loss");
DEFINE_double(diversity_weight, 0, "Weight of 'all experts are named' in the loss");
DEFINE_double(contrastive_weight, 0,
              "Weight of InfoNCE between a lead and the experts' embeddings in the loss");
DEFINE_bool(encoder_attention, false,
            "The encoder's tokens see each other in `hidden`: more right, and slower");
DEFINE_bool(later_use, false,
            "`hidden` also says how much each expert of the decoder will be used later: "
            "who is to stay in a cache");
DEFINE_bool(
    attention_inputs, false,
    "`hidden` reads attention summaries, too (--record=ids,hidden,attention); the "
    "model is offline only");
DEFINE_int32(beams, 1,
             "Of --kind=autoregressive: joint continuations that an answer follows "
             "(published: 4); 1 = the likeliest alone");
DEFINE_bool(position_inputs, false, "`hidden` sees a token's place in its sequence");
DEFINE_bool(token_inputs, false,
            "A token's id is an input of kinds of expert ids: interlayer, moe, "
            "autoregressive, multiscale, ensembles of them");
DEFINE_bool(router_inputs, false,
            "The router's input at the source layer is an input of kinds of expert ids: "
            "interlayer, moe, autoregressive, multiscale, ensembles of them "
            "(--record=ids,hidden)");
DEFINE_bool(topk_inputs, false,
            "The probabilities of the router's likeliest experts at the source layer are "
            "an input of any kind (--record=ids,topk); the model is offline only");
DEFINE_int32(backup_experts, 0,
             "Heads for the router's second, third .. choice (published: 3); needs "
             "--record=topk, kinds interlayer and moe");
DEFINE_double(backup_weight, 0.3,
              "Weight of the mean cross-entropy of --backup_experts' heads in the loss");
DEFINE_double(augment_layers, 0, "Chance that a known layer is hidden in training");
DEFINE_double(augment_parts, 0, "Chance that a part of a sequence is taken");
DEFINE_double(augment_permutation, 0, "Chance that experts are relabelled (ablation)");
DEFINE_double(
    augment_mixup, 0,
    "Chance that a sequence's embedded experts are mixed with another's, labels "
    "alike");
DEFINE_double(augment_noise, 0, "Deviation of noise on embedded experts in training");
DEFINE_double(augment_context, 0,
              "Chance that a micro-batch looks at fewer layers than --context");
DEFINE_double(masked_ids, 0,
              "Share of known experts that are hidden and predicted, too (pre-training: "
              ".15)");
DEFINE_double(augment_mask, 0, "Share of tokens whose routing is hidden in training");
DEFINE_string(augment_mask_mode, "tokens",
              "What --augment_mask hides: tokens, each by itself; block, as many in one "
              "run; or layer, one whole context layer of that share of the sequences");
DEFINE_double(
    augment_unmasked, 1,
    "With --augment_mask, weight of the labels of tokens that it does not hide");
DEFINE_int32(
    curriculum_epochs, 0,
    "Epochs until all targets count, those that a Markov table finds easy first; "
    "0 = all from the start");
DEFINE_string(monitor, "loss",
              "What validation must better: loss or top1 (models of several experts a "
              "token: recall of them)");
DEFINE_int32(patience, 5, "Validations without a better one before it stops; 0 = never");
DEFINE_int32(validate_every, 0, "Steps between validations; 0 = eight a run or more");
DEFINE_uint64(validation_sequences, 256, "Validation sequences a source layer; 0 = all");
DEFINE_uint64(test_sequences, 0, "Test sequences a source layer; 0 = all");
DEFINE_string(dtype, "fp32",
              "Number type of a training pass' products: fp32, or bf16 (autocast); "
              "parameters, losses and scores are fp32");

namespace routecast {

SpeculationOptions OptionsOfFlags() {
  SpeculationOptions o;
  o.kind = SpeculationKinds().at(
      static_cast<size_t>(ParseChoice("--kind", FLAGS_kind, SpeculationKinds())));
  o.dtype = FLAGS_dtype;
  o.epochs = FLAGS_epochs;
  o.steps = FLAGS_steps;
  o.global_batch = FLAGS_global_batch;
  o.micro_batch = FLAGS_micro_batch;
  o.sizes = {FLAGS_width,  FLAGS_heads,   FLAGS_ff,
             FLAGS_layers, FLAGS_context, FLAGS_dropout};
  o.members = FLAGS_members;
  o.combine = FLAGS_combine;
  o.training = {FLAGS_learning_rate, FLAGS_weight_decay, FLAGS_clip_norm,
                FLAGS_label_smoothing};
  o.schedule = {FLAGS_schedule,         FLAGS_warmup_steps,   FLAGS_last_rate,
                FLAGS_restart_steps,    FLAGS_restart_growth, FLAGS_plateau_factor,
                FLAGS_plateau_patience, FLAGS_restart_epochs, FLAGS_cycle_beta1};
  o.beta1 = FLAGS_beta1;
  o.beta2 = FLAGS_beta2;
  o.ema = FLAGS_ema;
  o.loss = FLAGS_loss;
  o.confidence_weight = FLAGS_confidence_weight;
  o.confidence_loss = FLAGS_confidence_loss;
  o.pattern_entropy = FLAGS_pattern_entropy;
  o.set_weight = FLAGS_set_weight;
  o.start_from = FLAGS_start_from;
  o.transfer = FLAGS_transfer;
  o.freeze = {FLAGS_freeze_layers, FLAGS_freeze_epochs};
  o.distill_weight = FLAGS_distill_weight;
  o.distill_temperature = FLAGS_distill_temperature;
  o.contrastive_weight = FLAGS_contrastive_weight;
  o.consistency_weight = FLAGS_consistency_weight;
  o.diversity_weight = FLAGS_diversity_weight;
  o.attention_inputs = FLAGS_attention_inputs;
  o.encoder_attention = FLAGS_encoder_attention;
  o.later_use = FLAGS_later_use;
  o.beams = FLAGS_beams;
  o.position_inputs = FLAGS_position_inputs;
  o.token_inputs = FLAGS_token_inputs;
  o.router_inputs = FLAGS_router_inputs;
  o.topk_inputs = FLAGS_topk_inputs;
  o.backup_experts = FLAGS_backup_experts;
  o.backup_weight = FLAGS_backup_weight;
  o.augment = {FLAGS_augment_layers,   FLAGS_augment_parts,    FLAGS_augment_permutation,
               FLAGS_augment_mask,     FLAGS_augment_unmasked, FLAGS_augment_mixup,
               FLAGS_augment_noise,    FLAGS_augment_context,  FLAGS_masked_ids,
               FLAGS_augment_mask_mode};
  o.curriculum_epochs = FLAGS_curriculum_epochs;
  o.monitor = FLAGS_monitor;
  o.patience = FLAGS_patience;
  o.validate_every = FLAGS_validate_every;
  o.validation_sequences = FLAGS_validation_sequences;
  o.test_sequences = FLAGS_test_sequences;
  o.seed = FLAGS_seed;
  o.Validate();
  return o;
}

std::map<std::string, std::string> GivenOptions() {
  std::vector<gflags::CommandLineFlagInfo> all;
  gflags::GetAllFlags(&all);
  const auto here = gflags::GetCommandLineFlagInfoOrDie("kind").filename;
  std::map<std::string, std::string> given;
  for (const auto& flag : all) {
    const bool ours = flag.filename == here || flag.name == "seed";
    const bool said = flag.name == "kind" || flag.name == "steps";
    if (ours && !said && flag.current_value != flag.default_value) {
      given[flag.name] = flag.current_value;
    }
  }
  return given;
}

}  // namespace routecast
