#include "models/speculation_onnx.h"

#include "common/errors.h"

namespace routecast {
namespace {

struct OnnxKind {
  const char* name;
  std::string (*write)(OnnxLayers* layers);
};
constexpr OnnxKind kKinds[] = {{"interlayer", InterlayerOnnx},
                               {"hidden", HiddenOnnx},
                               {"multiscale", MultiscaleOnnx}};

const OnnxKind& OnnxKindOf(const std::string& name) {
  std::string names;
  for (const OnnxKind& kind : kKinds) {
    if (name == kind.name) return kind;
    names += (names.empty() ? "" : ", ") + std::string(kind.name);
  }
  throw UsageError(ErrorText("the kind " + name + " cannot be written as ONNX",
                             "kinds that can: " + names, "train it without --onnx"));
}

}  // namespace

void RequireOnnxKind(const std::string& kind, int backup_experts, bool attention_inputs,
                     bool further_inputs) {
  OnnxKindOf(kind);
  if (further_inputs) {
    throw UsageError(ErrorText("a model of further inputs cannot be written as ONNX",
                               "its kind's file asks for the usual ones alone",
                               "leave out --onnx, or --token_inputs, --router_inputs and "
                               "--topk_inputs"));
  }
  if (attention_inputs) {
    throw UsageError(ErrorText("a model of attention summaries cannot be written as ONNX",
                               "no file has them among its inputs",
                               "leave out --onnx or --attention_inputs"));
  }
  if (backup_experts == 0) return;
  throw UsageError(ErrorText("heads of backup experts cannot be written as ONNX",
                             "--backup_experts=" + std::to_string(backup_experts),
                             "leave out --onnx or --backup_experts"));
}

namespace {

void RequireOnnxModel(const SpeculationModel& model) {
  const SpeculationConfig& c = model.config();
  RequireOnnxKind(c.kind, c.backup_experts, c.attention_heads > 0,
                  c.token_inputs || c.router_inputs || c.topk_inputs);
}

}  // namespace

std::string OnnxFileName(Stack stack, int source_layer) {
  return std::string(StackName(stack)) + "-" +
         (source_layer < 0 ? "before" : std::to_string(source_layer)) + ".onnx";
}

std::string SpeculationOnnx(const SpeculationModel& model, Stack stack,
                            int source_layer) {
  RequireOnnxModel(model);
  const OnnxKind& kind = OnnxKindOf(model.config().kind);
  OnnxLayers layers(model, stack, source_layer);
  return kind.write(&layers);
}

void WriteSpeculationOnnx(const fs::path& folder, const SpeculationModel& model) {
  RequireOnnxModel(model);
  MakeFolder(folder);
  for (const Stack stack : {Stack::kEncoder, Stack::kDecoder}) {
    for (int s = -1; s < model.config().geometry.layers(stack); ++s) {
      if (model.NumLeads(stack, s) == 0) continue;
      WriteFileAtomic(folder / OnnxFileName(stack, s), SpeculationOnnx(model, stack, s));
    }
  }
}

}  // namespace routecast
