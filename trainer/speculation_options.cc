#include "trainer/speculation_options.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdio>

#include "common/errors.h"
#include "models/speculation_kinds.h"

namespace routecast {
namespace {

using O = SpeculationOptions;
constexpr int kMostMembers = 64;

// `range`: what is allowed, as "use ...".
void Require(bool good, const char* flag, double value, const char* range) {
  if (good && std::isfinite(value)) return;
  char text[32];
  std::snprintf(text, sizeof text, "it is %g", value);
  throw UsageError(ErrorText(std::string(flag) + " is out of range", text,
                             std::string("use ") + range));
}
void RequirePositive(const char* flag, double value) {
  Require(value > 0, flag, value, "a number above 0");
}
void RequireNotNegative(const char* flag, double value) {
  Require(value >= 0, flag, value, "0 or more");
}
void RequireBelowOne(const char* flag, double value) {
  Require(value >= 0 && value < 1, flag, value, "0 or more and below 1");
}

void ValidateTraining(const MemberOptions& o) {
  RequireNotNegative("--learning_rate", o.learning_rate);
  RequireNotNegative("--weight_decay", o.weight_decay);
  RequirePositive("--clip_norm", o.clip_norm);
  RequireBelowOne("--label_smoothing", o.label_smoothing);
}

void ValidateSizes(const ModelSizes& s) {
  RequireNotNegative("--width", s.width);
  RequireNotNegative("--heads", s.heads);
  RequireNotNegative("--ff", s.ff);
  RequireNotNegative("--layers", s.layers);
  RequireNotNegative("--context", s.context);
  if (s.dropout >= 0) RequireBelowOne("--dropout", s.dropout);
}

std::vector<std::string> Split(const std::string& text, char separator) {
  std::vector<std::string> parts;
  size_t begin = 0;
  for (size_t end; (end = text.find(separator, begin)) != std::string::npos;
       begin = end + 1) {
    parts.push_back(text.substr(begin, end - begin));
  }
  parts.push_back(text.substr(begin));
  return parts;
}

[[noreturn]] void BadMember(const std::string& member, const std::string& why) {
  throw UsageError(ErrorText("--members: " + member.substr(0, 80), why,
                             "e.g. interlayer:width=512,heads=16,lr=5e-5;hidden*2"));
}

double NumberOf(const std::string& member, const std::string& text) {
  double value = 0;
  const auto [end, error] =
      std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size() || !(value >= 0) ||
      value > 1e9) {
    BadMember(member, text.substr(0, 40) + " is not a number of 0 or more");
  }
  return value;
}

int WholeNumber(const std::string& member, const std::string& text) {
  const double value = NumberOf(member, text);
  if (value != std::floor(value)) BadMember(member, text + " is not a whole number");
  return static_cast<int>(value);
}

void SetField(const std::string& member, const std::string& assignment,
              MemberSpec* spec) {
  const size_t equals = assignment.find('=');
  if (equals == std::string::npos) BadMember(member, assignment + " has no value");
  const std::string number = assignment.substr(equals + 1);
  const double value = NumberOf(member, number);
  // A size; only those ask for it.
  const auto whole = [&] { return WholeNumber(member, number); };
  ModelSizes& s = spec->sizes;
  MemberOptions& o = spec->options;
  switch (ParseChoice("--members", assignment.substr(0, equals),
                      {"width", "heads", "ff", "layers", "context", "dropout", "lr",
                       "decay", "clip", "smoothing"})) {
    case 0:
      s.width = whole();
      break;
    case 1:
      s.heads = whole();
      break;
    case 2:
      s.ff = whole();
      break;
    case 3:
      s.layers = whole();
      break;
    case 4:
      s.context = whole();
      break;
    case 5:
      s.dropout = value;
      break;
    case 6:
      o.learning_rate = value;
      break;
    case 7:
      o.weight_decay = value;
      break;
    case 8:
      o.clip_norm = value;
      break;
    default:
      o.label_smoothing = value;
  }
}

}  // namespace

std::vector<MemberSpec> ParseMembers(const std::string& text,
                                     const MemberOptions& defaults) {
  std::vector<MemberSpec> members;
  if (text.empty()) return members;
  std::vector<std::string> kinds = SpeculationKinds();
  std::erase(kinds, "ensemble");
  for (const std::string& member : Split(text, ';')) {
    const size_t colon = member.find(':');
    std::string kind = member.substr(0, colon);
    int count = 1;
    if (const size_t star = kind.find('*'); star != std::string::npos) {
      const int number = WholeNumber(member, kind.substr(star + 1));
      if (number < 1 || number > kMostMembers) {
        BadMember(member, "1 to " + std::to_string(kMostMembers) + " of a kind");
      }
      count = number;
      kind.resize(star);
    }
    MemberSpec spec;
    spec.kind = kinds[static_cast<size_t>(ParseChoice("--members", kind, kinds))];
    spec.options = defaults;
    if (colon != std::string::npos) {
      for (const std::string& field : Split(member.substr(colon + 1), ',')) {
        SetField(member, field, &spec);
      }
    }
    ValidateSizes(spec.sizes);
    ValidateTraining(spec.options);
    members.insert(members.end(), static_cast<size_t>(count), spec);
  }
  if (members.size() > static_cast<size_t>(kMostMembers)) {
    BadMember(text, "more than " + std::to_string(kMostMembers) + " members");
  }
  return members;
}

Json ModelSizes::ToJson() const {
  return {{"width", width},   {"heads", heads},     {"ff", ff},
          {"layers", layers}, {"context", context}, {"dropout", dropout}};
}

Json MemberOptions::ToJson() const {
  return {{"learning_rate", learning_rate},
          {"weight_decay", weight_decay},
          {"clip_norm", clip_norm},
          {"label_smoothing", label_smoothing}};
}

Json SpeculationOptions::ToJson() const {
  Json json{{"kind", kind},
            {"sizes", sizes.ToJson()},
            {"members", members},
            {"combine", combine},
            {"epochs", epochs},
            {"steps", steps},
            {"global_batch", global_batch},
            {"micro_batch", micro_batch},
            {"dtype", dtype},
            {"training", training.ToJson()},
            {"schedule", schedule.ToJson()},
            {"betas", {beta1, beta2}},
            {"ema", ema},
            {"confidence_weight", confidence_weight},
            {"next_token_weight", next_token_weight},
            {"set_weight", set_weight},
            {"start_from", start_from},
            {"transfer", transfer},
            {"freeze", freeze.ToJson()},
            {"distill_weight", distill_weight},
            {"distill_temperature", distill_temperature},
            {"contrastive_weight", contrastive_weight},
            {"consistency_weight", consistency_weight},
            {"diversity_weight", diversity_weight},
            {"attention_inputs", attention_inputs},
            {"backup_experts", backup_experts},
            {"backup_weight", backup_weight},
            {"augment", augment.ToJson()},
            {"curriculum_epochs", curriculum_epochs},
            {"monitor", monitor},
            {"patience", patience},
            {"validate_every", validate_every},
            {"log_every", log_every},
            {"validation_sequences", validation_sequences},
            {"test_sequences", test_sequences},
            {"seed", seed}};
  // Runs of versions that had none are the same as before.
  if (position_inputs) json["position_inputs"] = true;
  if (token_inputs) json["token_inputs"] = true;
  if (router_inputs) json["router_inputs"] = true;
  if (topk_inputs) json["topk_inputs"] = true;
  if (beams != 1) json["beams"] = beams;
  if (loss != O().loss) json["loss"] = loss;
  if (confidence_loss != O().confidence_loss) json["confidence_loss"] = confidence_loss;
  if (pattern_entropy > 0) json["pattern_entropy"] = pattern_entropy;
  if (encoder_attention) json["encoder_attention"] = true;
  if (later_use) json["later_use"] = true;
  return json;
}

void SpeculationOptions::Validate() const {
  if (steps == 0) RequirePositive("--epochs", epochs);
  RequireNotNegative("--steps", static_cast<double>(steps));
  RequirePositive("--micro_batch", micro_batch);
  RequirePositive("--global_batch", global_batch);
  if (global_batch % micro_batch != 0) {
    const int fitting = std::max(1, global_batch / micro_batch) * micro_batch;
    throw UsageError(ErrorText("--global_batch must be a multiple of --micro_batch",
                               "they are " + std::to_string(global_batch) + " and " +
                                   std::to_string(micro_batch) +
                                   ": a step is whole micro-batches",
                               "e.g. --global_batch=" + std::to_string(fitting)));
  }
  if (dtype == "fp16") {
    throw UsageError(ErrorText("--dtype=fp16 does not train speculation models",
                               "small gradients would be lost: nothing scales the loss",
                               "use --dtype=bf16"));
  }
  ParseChoice("--dtype", dtype, {"fp32", "bf16"});
  ValidateSizes(sizes);
  ValidateTraining(training);
  schedule.Validate();
  augment.Validate();
  if (!members.empty() && kind != "ensemble") {
    throw UsageError(ErrorText("--members are those of --kind=ensemble", "--kind=" + kind,
                               "leave one of the two out"));
  }
  if (combine != SpeculationOptions().combine && kind != "ensemble") {
    throw UsageError(ErrorText("--combine is of --kind=ensemble", "--kind=" + kind,
                               "leave one of the two out"));
  }
  if (encoder_attention && kind != "hidden") {
    throw UsageError(ErrorText("--encoder_attention is of --kind=hidden",
                               "--kind=" + kind, "leave one of the two out"));
  }
  if (later_use && kind != "hidden") {
    throw UsageError(ErrorText("--later_use is of --kind=hidden", "--kind=" + kind,
                               "leave one of the two out"));
  }
  const ModelSizes& s = sizes;
  const bool sized = s.width > 0 || s.heads > 0 || s.ff > 0 || s.layers > 0 ||
                     s.context > 0 || s.dropout >= 0 || !members.empty();
  if (!start_from.empty() && sized) {
    throw UsageError(ErrorText("--start_from goes with no sizes and no --members",
                               "the run's own are kept", "leave one of the two out"));
  }
  RequireNotNegative("--freeze_layers", freeze.layers);
  RequirePositive("--freeze_epochs", freeze.epochs);
  if (start_from.empty() && (transfer || freeze.layers > 0)) {
    throw UsageError(ErrorText("--transfer and --freeze_layers need --start_from",
                               "a new model's layers have learned nothing",
                               "name the folder of a finished run"));
  }
  ParseMembers(members, training);
  ParseChoice("--combine", combine, {"probabilities", "logits", "vote", "stack"});
  ParseChoice("--monitor", monitor, {"loss", "top1"});
  ParseChoice("--loss", loss, {"cross_entropy", "focal"});
  ParseChoice("--confidence_loss", confidence_loss, {"cross_entropy", "squared", "half"});
  RequireNotNegative("--confidence_weight", confidence_weight);
  RequireNotNegative("--pattern_entropy", pattern_entropy);
  RequireBelowOne("--beta1", beta1);
  if (schedule.cycle_beta1 && beta1 != O().beta1) {
    throw UsageError(ErrorText("--beta1 and --cycle_beta1 exclude each other",
                               "a cycle goes from .95 to .85 and back",
                               "leave one of the two out"));
  }
  RequireBelowOne("--beta2", beta2);
  RequireBelowOne("--ema", ema);
  RequireNotNegative("--set_weight", set_weight);
  Require(distill_weight >= 0 && distill_weight <= 1, "--distill_weight", distill_weight,
          "0 to 1");
  RequirePositive("--distill_temperature", distill_temperature);
  RequireNotNegative("--curriculum_epochs", curriculum_epochs);
  RequireNotNegative("--contrastive_weight", contrastive_weight);
  RequireNotNegative("--consistency_weight", consistency_weight);
  RequireNotNegative("--diversity_weight", diversity_weight);
  RequireNotNegative("--backup_experts", backup_experts);
  Require(beams >= 1 && beams <= 64, "--beams", beams, "1 to 64");
  if (beams > 1 && kind != "autoregressive") {
    throw UsageError(ErrorText("--beams are of --kind=autoregressive",
                               "--kind=" + kind + " answers all leads at once",
                               "leave one of the two out"));
  }
  if (position_inputs && kind != "hidden") {
    throw UsageError(ErrorText("--position_inputs needs a kind that reads them",
                               "--kind=" + kind + " does not", "use --kind=hidden"));
  }
  RequireNotNegative("--backup_weight", backup_weight);
  const bool top_k = distill_weight > 0 || backup_experts > 0;
  if (augment.mixup > 0 && top_k) {
    throw UsageError(ErrorText(
        "--augment_mixup and " +
            std::string(distill_weight > 0 ? "--distill_weight" : "--backup_experts") +
            " exclude each other",
        "the router's top-k of a mixture is not known", "leave one of the two out"));
  }
  RequireNotNegative("--patience", patience);
  RequireNotNegative("--validate_every", validate_every);
  RequirePositive("--log_every", log_every);
}

namespace {

struct Use {
  unsigned use;  // of KindUse
  const char* flag;
  void (*take_back)(O*);
};
constexpr Use kUses[] = {
    {kUsesWidth, "--width", [](O* o) { o->sizes.width = 0; }},
    {kUsesHeads, "--heads", [](O* o) { o->sizes.heads = 0; }},
    {kUsesFf, "--ff", [](O* o) { o->sizes.ff = 0; }},
    {kUsesLayers, "--layers", [](O* o) { o->sizes.layers = 0; }},
    {kUsesContext, "--context", [](O* o) { o->sizes.context = 0; }},
    {kUsesDropout, "--dropout", [](O* o) { o->sizes.dropout = ModelSizes().dropout; }},
    {kLearnsConfidence, "--confidence_weight",
     [](O* o) { o->confidence_weight = O().confidence_weight; }},
    {kLearnsConfidence, "--confidence_loss",
     [](O* o) { o->confidence_loss = O().confidence_loss; }},
    {kHasPatterns, "--pattern_entropy", [](O* o) { o->pattern_entropy = 0; }},
    {kTakesTokens, "--token_inputs", [](O* o) { o->token_inputs = false; }},
    {kTakesRouterInputs, "--router_inputs", [](O* o) { o->router_inputs = false; }},
    {kTakesTopK, "--topk_inputs", [](O* o) { o->topk_inputs = false; }},
    {kUsesOlderLayers, "--augment_layers", [](O* o) { o->augment.layer_dropout = 0; }}};

// Sizes are a kind's own; the rest is of use where one member has a use for it.
unsigned UsesOf(const O& options) {
  const unsigned own = KindOf(options.kind).uses;
  const auto members = ParseMembers(options.members, options.training);
  if (options.kind != "ensemble" || members.empty()) return own;
  unsigned any = 0;
  for (const MemberSpec& member : members) any |= KindOf(member.kind).uses;
  return own & any;
}

void RequireUse(const O& o, unsigned uses, const std::string& who) {
  for (const Use& use : kUses) {
    if (uses & use.use) continue;
    O without = o;
    use.take_back(&without);
    if (without.ToJson() == o.ToJson()) continue;
    std::string kinds;
    for (const std::string& kind : SpeculationKinds()) {
      if (KindOf(kind).uses & use.use) kinds += (kinds.empty() ? "" : ", ") + kind;
    }
    const bool members = o.kind == "ensemble" && use.use < kLearnsConfidence;
    throw UsageError(
        ErrorText(std::string(use.flag) + " does nothing for " + who, "it is of " + kinds,
                  members ? "say it in --members, e.g. interlayer:width=512,heads=16"
                          : "leave it out, or use one of them"));
  }
}

}  // namespace

void RequireUse(const SpeculationOptions& options) {
  RequireUse(options, UsesOf(options), "--kind=" + options.kind);
  for (const MemberSpec& member : ParseMembers(options.members, options.training)) {
    O own;
    own.kind = member.kind;
    own.sizes = member.sizes;
    RequireUse(own, KindOf(member.kind).uses, "the member " + member.kind);
  }
}

void RequirePartners(const SpeculationOptions& o) {
  const O usual;
  struct Said {
    const char* flag;
    bool alone;
    const char* partner;
  };
  const Said all[] = {
      {"--distill_temperature",
       o.distill_temperature != usual.distill_temperature && o.distill_weight == 0,
       "--distill_weight"},
      {"--backup_weight", o.backup_weight != usual.backup_weight && o.backup_experts == 0,
       "--backup_experts"},
      {"--augment_unmasked",
       o.augment.unmasked_weight != usual.augment.unmasked_weight && o.augment.mask == 0,
       "--augment_mask"},
      {"--freeze_epochs", o.freeze.epochs != usual.freeze.epochs && o.freeze.layers == 0,
       "--freeze_layers"}};
  for (const auto& [flag, alone, partner] : all) {
    if (!alone) continue;
    throw UsageError(ErrorText(std::string(flag) + " does nothing without " + partner,
                               std::string(partner) + " is not given",
                               "leave it out, or give both"));
  }
}

void DropUnused(SpeculationOptions* options) {
  const unsigned uses = UsesOf(*options);
  for (const Use& use : kUses) {
    if (!(uses & use.use)) use.take_back(options);
  }
}

}  // namespace routecast
