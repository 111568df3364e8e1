// Speculation models as ONNX: one graph a stack and source layer, because a
// RoutingWindow's tensors and the number of leads depend on both. Kinds: `interlayer`,
// `hidden`, `multiscale`.
//
// Inputs are the window's tensors by their names (routing_window.h), those alone that the
// kind reads; batch B, tokens T and encoder tokens S are free, and none is 0. Outputs are
// logits_BTHE and confidence_BTH, as Forward gives them without dropout; rows of padding
// are arbitrary. Of several experts a token `interlayer` reads others_BTLK, the others
// the first choices alone, as in Forward. A model of router inputs is exported as if they
// were recorded: its graphs need hidden_BTD (from layer 0 on), context_BTD and
// source_BSD.
#pragma once

#include <string>
#include <vector>

#include "models/onnx_layers.h"

namespace routecast {

// Throws UsageError naming the kinds that can, where `kind` cannot be exported, or where
// it has heads of backup experts, reads attention summaries or has further inputs
// (token_inputs.h), which no file carries.
void RequireOnnxKind(const std::string& kind, int backup_experts = 0,
                     bool attention_inputs = false, bool further_inputs = false);

// "decoder-1.onnx": what predicts from in-stack layer 1; "decoder-before.onnx" from
// before the first one.
std::string OnnxFileName(Stack stack, int source_layer);

// The bytes of one file. REQUIRES leads ahead of the source, and a model of one member.
// Throws UsageError (another kind, more than 2 GiB).
std::string SpeculationOnnx(const SpeculationModel& model, Stack stack, int source_layer);

// Every stack and source layer that has leads, into `folder`, which is made. Each file
// holds all weights that it reads.
void WriteSpeculationOnnx(const fs::path& folder, const SpeculationModel& model);

// Of each kind, in <kind>_onnx.cc.
std::string InterlayerOnnx(OnnxLayers* layers);
std::string HiddenOnnx(OnnxLayers* layers);
std::string MultiscaleOnnx(OnnxLayers* layers);

}  // namespace routecast
