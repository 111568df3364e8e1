#include "trainer/training_checks.h"

#include "common/errors.h"
#include "models/speculation_kinds.h"
#include "storage/one_model.h"
#include "trainer/speculation_batch.h"

namespace routecast {
namespace {

// Throws where there are no labels for the heads of backup experts, or no such heads.
void CheckBackups(const SpeculationOptions& options, TraceDataset* dataset) {
  if (options.backup_experts == 0) return;
  const std::string flag = "--backup_experts=" + std::to_string(options.backup_experts);
  const MoeGeometry& g = dataset->geometry();
  if (!KindOf(options.kind).backups) {
    throw UsageError(ErrorText(flag + " needs a kind that has heads for them",
                               "--kind=" + options.kind + " has none",
                               "use --kind=interlayer or --kind=moe"));
  }
  if (g.experts_per_token > 1) {
    throw UsageError(ErrorText(flag + " is of models that route to one expert a token",
                               "this one routes to " +
                                   std::to_string(g.experts_per_token) +
                                   ": all of them are labels already",
                               "leave it out"));
  }
  if (dataset->top_k() <= options.backup_experts) {
    throw UsageError(
        ErrorText(flag + " needs the router's " +
                      std::to_string(options.backup_experts + 1) + " likeliest experts",
                  "the store holds " + std::to_string(dataset->top_k()) + " a token",
                  "collect with --record=ids,topk --top_k=" +
                      std::to_string(options.backup_experts + 1) + " or more"));
  }
}

// Throws where there are no attention summaries, or no model that reads them.
void CheckAttention(const SpeculationOptions& options, TraceDataset* dataset) {
  if (!options.attention_inputs) return;
  if (!KindOf(options.kind).attention) {
    throw UsageError(ErrorText("--attention_inputs needs a kind that reads them",
                               "--kind=" + options.kind + " does not",
                               "use --kind=hidden"));
  }
  if (dataset->attention_heads() == 0) {
    throw UsageError(ErrorText("--attention_inputs needs attention summaries",
                               "the store has none beside its router inputs",
                               "collect with --record=ids,hidden,attention"));
  }
}

// Throws where the store lacks what a kind is to see beside the experts.
void CheckInputs(const SpeculationOptions& options, TraceDataset* dataset) {
  if (options.token_inputs && dataset->vocab_size() == 0) {
    throw UsageError(ErrorText("--token_inputs needs token ids; the store has none",
                               "it was imported without them", "leave it out"));
  }
  if (options.router_inputs && !dataset->any_hidden()) {
    throw UsageError(ErrorText("--router_inputs needs router inputs; the store has none",
                               "--kind=" + options.kind + " would read them",
                               "collect with --record=ids,hidden, or leave it out"));
  }
  if (options.topk_inputs && !dataset->has_teacher()) {
    throw UsageError(ErrorText("--topk_inputs needs the routers' top-k",
                               "the store has none, or no probabilities with it",
                               "collect with --record=ids,topk, or leave it out"));
  }
}

// Throws where there is nothing to distil from.
void CheckTeacher(const SpeculationOptions& options, TraceDataset* dataset) {
  if (options.distill_weight == 0 || dataset->has_teacher()) return;
  throw UsageError(ErrorText("--distill_weight needs the routers' top-k",
                             "the store has none, or no probabilities with it",
                             "collect with --record=ids,topk"));
}

// What a token will use later is read from its first choices.
void CheckLaterUse(const SpeculationOptions& options, const TraceDataset& dataset) {
  const int chosen = dataset.geometry().experts_per_token;
  if (!options.later_use || chosen == 1) return;
  throw UsageError(ErrorText("--later_use is of models that route to one expert a token",
                             "this one routes to " + std::to_string(chosen),
                             "leave it out"));
}

void CheckSets(const SpeculationOptions& options, const TraceDataset& dataset) {
  if (options.set_weight == 0 || dataset.geometry().encoder_layers > 0) return;
  throw UsageError(ErrorText("--set_weight is of an encoder's sets",
                             "the traced model has a decoder alone", "leave it out"));
}

}  // namespace

void CheckTraces(const SpeculationOptions& options, TraceDataset* dataset) {
  CheckBackups(options, dataset);
  CheckAttention(options, dataset);
  CheckInputs(options, dataset);
  CheckTeacher(options, dataset);
  CheckSets(options, *dataset);
  CheckLaterUse(options, *dataset);
}

void RequirePart(const TraceDataset& dataset, SplitPart part, WithHidden hidden) {
  if (!GroupsOf(dataset, part, hidden).empty()) return;
  throw UsageError(
      ErrorText("the traces have no sequence of two tokens or more in a " +
                    std::string(SplitPartName(part)) + " document",
                std::to_string(dataset.sequences().size()) + " sequences in all",
                "collect more documents"));
}

void RequireShift(TraceDataset* shift, const TraceDataset& dataset, WithHidden hidden,
                  bool top_k) {
  if (shift == nullptr) return;
  RequireOneModel({"--store", dataset.geometry()}, {"--shift_store", shift->geometry()});
  if (hidden != WithHidden::kNo && !shift->any_hidden()) {
    throw UsageError(ErrorText("--shift_store has no router inputs",
                               "the model reads them",
                               "collect it with --record=ids,hidden"));
  }
  if (top_k && !shift->has_teacher()) {
    throw UsageError(ErrorText("--shift_store has no top-k of the routers",
                               "the model reads it",
                               "collect it with --record=ids,topk"));
  }
  if (!GroupsOf(*shift, SplitPart::kTest, hidden).empty()) return;
  throw UsageError(
      ErrorText("--shift_store has no sequence of two tokens or more in a test document",
                std::to_string(shift->sequences().size()) + " sequences in all",
                "collect more documents"));
}

void RequireWork(const SpeculationOptions& options, int world) {
  const int batches = options.global_batch / options.micro_batch;
  if (world <= batches) return;
  throw UsageError(ErrorText(std::to_string(world) + " ranks for " +
                                 std::to_string(batches) + " micro-batches a step",
                             "--global_batch=" + std::to_string(options.global_batch) +
                                 ", --micro_batch=" + std::to_string(options.micro_batch),
                             "use fewer ranks, or larger steps of smaller batches"));
}

}  // namespace routecast
