#include "trainer/model_setup.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include <algorithm>

#include "common/errors.h"
#include "trainer/training_checks.h"

namespace routecast {
namespace {

void Apply(const ModelSizes& sizes, SpeculationConfig* c) {
  if (sizes.width > 0) c->width = sizes.width;
  if (sizes.heads > 0) c->heads = sizes.heads;
  // The inner width follows the width where it is not said.
  if (sizes.ff > 0) {
    c->ff = sizes.ff;
  } else if (sizes.width > 0) {
    c->ff = (c->kind == "hidden" ? 2 : 4) * c->width;
  }
  if (sizes.layers > 0) c->layers = sizes.layers;
  if (sizes.context > 0) c->context = sizes.context;
  if (sizes.dropout >= 0) c->dropout = sizes.dropout;
}

// Further inputs that are wanted, where the kind takes them.
void AddInputs(const SpeculationOptions& options, TraceDataset* dataset,
               SpeculationConfig* c) {
  const unsigned uses = KindOf(c->kind).uses;
  c->token_inputs = options.token_inputs && (uses & kTakesTokens);
  c->router_inputs = options.router_inputs && (uses & kTakesRouterInputs);
  c->topk_inputs = options.topk_inputs && (uses & kTakesTopK);
  if (c->router_inputs) c->hidden_width = dataset->geometry().d_model;
}

SpeculationConfig MemberConfig(const std::string& kind, const ModelSizes& sizes,
                               const SpeculationOptions& options, TraceDataset* dataset) {
  const bool reads = KindOf(kind).router_inputs != RouterInputs::kNever;
  if (reads && !dataset->any_hidden()) {
    throw UsageError(
        ErrorText("--kind=" + kind + " needs router inputs; the store has none", "",
                  "collect with --record=ids,hidden, or use --kind=interlayer"));
  }
  if (KindOf(kind).token_ids && dataset->vocab_size() == 0) {
    throw UsageError(ErrorText("--kind=" + kind + " needs token ids; the store has none",
                               "", "use --kind=interlayer"));
  }
  SpeculationConfig config = DefaultSpeculationConfig(
      kind, dataset->geometry(), static_cast<int>(dataset->vocab_size()),
      reads ? dataset->geometry().d_model : 0);
  if (kind != "ensemble") AddInputs(options, dataset, &config);
  Apply(sizes, &config);
  return config;
}

// The sizes of the run to start from, where it fits these traces.
SpeculationConfig ConfigOfRun(const SpeculationOptions& options, TraceDataset* dataset) {
  SpeculationConfig config = LoadSpeculationModel(options.start_from).model->config();
  const auto refuse = [&](const std::string& why) {
    throw UsageError(ErrorText("--start_from=" + options.start_from + " does not fit",
                               why, "name a run of this kind over this model's traces"));
  };
  if (config.kind != options.kind) {
    refuse("it is of kind " + config.kind + ", not " + options.kind);
  }
  if (options.transfer && KindOf(config.kind).embeds_experts) {
    config.geometry = dataset->geometry();
    if (config.token_inputs) config.vocab_size = static_cast<int>(dataset->vocab_size());
    if (config.router_inputs) config.hidden_width = dataset->geometry().d_model;
    config.priors = DefaultSpeculationConfig(config.kind, config.geometry, 0, 0).priors;
  }
  if (!(config.geometry == dataset->geometry())) refuse("it learned another model");
  if (config.vocab_size > 0 && dataset->vocab_size() > config.vocab_size) {
    refuse("it knows " + std::to_string(config.vocab_size) +
           " token ids, the store has " + std::to_string(dataset->vocab_size()));
  }
  if (ReadsTokenIds(config) && dataset->vocab_size() == 0) {
    refuse("it reads token ids; the store has none");
  }
  if (config.hidden_width > 0 && !dataset->any_hidden()) {
    refuse("it reads router inputs; the store has none");
  }
  const int heads = options.attention_inputs ? dataset->attention_heads() : 0;
  if (config.attention_heads != heads) {
    refuse("it reads attention summaries of " + std::to_string(config.attention_heads) +
           " heads, this run of " + std::to_string(heads));
  }
  if (options.encoder_attention && !config.encoder_attention) {
    refuse("it has no attention in the encoder, --encoder_attention asks for it");
  }
  // A head of its own, which may come later than the rest.
  config.later_use |= options.later_use;
  if (config.positions != options.position_inputs) {
    refuse(std::string("it was trained with") + (config.positions ? "" : "out") +
           " --position_inputs");
  }
  const std::pair<const char*, bool> inputs[] = {
      {"--token_inputs", config.token_inputs != options.token_inputs},
      {"--router_inputs", config.router_inputs != options.router_inputs},
      {"--topk_inputs", config.topk_inputs != options.topk_inputs}};
  for (const auto& [flag, differs] : inputs) {
    if (differs && config.members.empty()) {
      refuse(std::string("one of the two has ") + flag + ", the other has not");
    }
  }
  if (config.kind == "ensemble" && config.combine != options.combine) {
    refuse("it combines its members by " + config.combine + ", --combine says " +
           options.combine);
  }
  config.beams = options.beams;  // no weight depends on them
  if (config.backup_experts != options.backup_experts) {
    refuse("it has " + std::to_string(config.backup_experts) +
           " backup experts, --backup_experts says " +
           std::to_string(options.backup_experts));
  }
  return config;
}

bool EmbedsExperts(const SpeculationConfig& config) {
  if (config.members.empty()) return KindOf(config.kind).embeds_experts;
  return std::all_of(config.members.begin(), config.members.end(), EmbedsExperts);
}

// Throws where an option works on embedded experts and the model has none.
void CheckEmbedding(const SpeculationOptions& options, const SpeculationConfig& config) {
  const std::pair<const char*, double> needing[] = {
      {"--contrastive_weight", options.contrastive_weight},
      {"--augment_mixup", options.augment.mixup},
      {"--augment_noise", options.augment.noise},
      {"--augment_context", options.augment.context},
      {"--masked_ids", options.augment.masked_ids},
      {"--transfer", options.transfer ? 1 : 0}};
  std::string kinds;
  for (const std::string& kind : SpeculationKinds()) {
    if (KindOf(kind).embeds_experts) kinds += (kinds.empty() ? "" : ", ") + kind;
  }
  for (const auto& [flag, value] : needing) {
    if (value == 0 || EmbedsExperts(config)) continue;
    throw UsageError(ErrorText(std::string(flag) + " needs a kind that embeds experts",
                               "--kind=" + config.kind + " does not",
                               "use one of " + kinds + ", or an ensemble of them"));
  }
}

}  // namespace

void StartFromRun(const SpeculationOptions& options, SpeculationModel* model) {
  if (options.start_from.empty()) return;
  const c10::NoGradGuard no_grad;
  const SavedSpeculationModel saved = LoadSpeculationModel(options.start_from);
  for (const auto& [name, tensor] : model->parameters().items()) {
    if (options.transfer && OfTracedModel(name)) continue;
    if (!saved.model->parameters().Has(name)) continue;  // what this run adds
    tensor.copy_(saved.model->parameters().Get(name));
  }
}

namespace {

SpeculationConfig ConfigOfSizes(const SpeculationOptions& options,
                                TraceDataset* dataset) {
  SpeculationConfig config = MemberConfig(options.kind, options.sizes, options, dataset);
  config.backup_experts = options.backup_experts;
  config.encoder_attention = options.encoder_attention;
  config.later_use = options.later_use;
  if (options.attention_inputs) config.attention_heads = dataset->attention_heads();
  config.positions = options.position_inputs;
  config.beams = options.beams;
  if (options.kind == "ensemble") {
    config.combine = options.combine;
    const auto members = ParseMembers(options.members, options.training);
    for (SpeculationConfig& own : config.members) AddInputs(options, dataset, &own);
    if (!members.empty()) config.members.clear();
    for (const MemberSpec& member : members) {
      config.members.push_back(MemberConfig(member.kind, member.sizes, options, dataset));
    }
    config.weights.assign(config.members.size(),
                          1.0 / static_cast<double>(config.members.size()));
    config.hidden_width = 0;
    for (const SpeculationConfig& member : config.members) {
      config.hidden_width = std::max(config.hidden_width, member.hidden_width);
    }
  }
  if (const std::string problem = ProblemOf(config); !problem.empty()) {
    throw UsageError(ErrorText("--kind=" + options.kind + " has no such sizes", problem,
                               "change --width, --heads, --ff, --layers or --context"));
  }
  return config;
}

}  // namespace

SpeculationConfig ConfigOf(const SpeculationOptions& options, TraceDataset* dataset) {
  CheckTraces(options, dataset);
  const SpeculationConfig config = options.start_from.empty()
                                       ? ConfigOfSizes(options, dataset)
                                       : ConfigOfRun(options, dataset);
  CheckEmbedding(options, config);
  return config;
}

std::vector<SpeculationConfig> ConfigsOf(const SpeculationOptions& options,
                                         const std::vector<TraceDataset*>& stores) {
  std::vector<SpeculationConfig> configs = {ConfigOf(options, stores.at(0))};
  const auto refuse = [](const std::string& why, const std::string& fix) {
    throw UsageError(ErrorText("--also trains one trunk on several stores", why, fix));
  };
  if (stores.size() > 1 && !KindOf(options.kind).embeds_experts) {
    refuse("--kind=" + options.kind + " does not embed experts",
           "use --kind=interlayer, moe or autoregressive");
  }
  if (stores.size() > 1 && options.has_further_inputs()) {
    refuse("token ids, router inputs and top-k are of one traced model",
           "leave out --also, or --token_inputs, --router_inputs and --topk_inputs");
  }
  if (stores.size() > 1 && options.curriculum_epochs > 0) {
    refuse("--curriculum_epochs orders the targets of one", "leave one of the two out");
  }
  for (size_t i = 1; i < stores.size(); ++i) {
    CheckTraces(options, stores[i]);
    SpeculationConfig config = configs[0];
    config.geometry = stores[i]->geometry();
    config.priors = DefaultSpeculationConfig(config.kind, config.geometry, 0, 0).priors;
    if (const std::string problem = ProblemOf(config); !problem.empty()) {
      refuse("a store's model cannot have these sizes: " + problem,
             "leave that store out");
    }
    configs.push_back(config);
  }
  for (size_t i = 0; i < stores.size(); ++i) {
    RequirePart(*stores[i], SplitPart::kValidation, HiddenOf(configs[i]));
  }
  RequirePart(*stores[0], SplitPart::kTest, HiddenOf(configs[0]));
  return configs;
}

std::vector<MemberOptions> TrainingOf(const SpeculationOptions& options,
                                      const SpeculationConfig& config) {
  std::vector<MemberOptions> training;
  const std::string members = config.members.empty() ? "" : options.members;
  for (const MemberSpec& member : ParseMembers(members, options.training)) {
    training.push_back(member.options);
  }
  if (training.empty()) {
    training.assign(std::max<size_t>(1, config.members.size()), options.training);
  }
  for (size_t m = 0; m < training.size(); ++m) {
    const std::string& kind =
        config.members.empty() ? config.kind : config.members[m].kind;
    if (training[m].learning_rate == 0) {
      training[m].learning_rate = KindOf(kind).learning_rate;
    }
  }
  return training;
}

}  // namespace routecast
