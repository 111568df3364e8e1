// Decoding, step by step, for a batch of right-padded prompts of different lengths.
#pragma once

#include <functional>
#include <vector>

#include "models/beam_search.h"
#include "models/sampling.h"
#include "models/switch_model.h"

namespace routecast {

class StaticDecoder;  // static_decoder.h

// Greedy unless a temperature or more than one beam is asked for.
struct GenerationOptions {
  int max_new_tokens = 32;
  int min_new_tokens = 0;  // end-of-sequence is forbidden before
  // Of each row, below max_new_tokens: a row's length is then no matter of its batch.
  // Empty: max_new_tokens for all. Not with beams.
  std::vector<int> row_max_new_tokens{};
  SamplingOptions sampling{};
  BeamOptions beams{};
  // A row whose logits are no numbers ends there, and its result says so; else all end
  // with DataError. Not with beams.
  bool end_without_numbers = false;
  int num_return_sequences = 1;  // of each row, best first; at most beams.num_beams
  // Observers see beams as rows of the decoder's passes, a prompt's beams side by side.
  ForwardOptions forward{};
  // Called after each step with the step's fp32 logits [R,V] and chosen ids [R] (both
  // CPU; R rows, or rows * beams). Returns false to stop early (a requested stop): rows
  // end as they are. May be empty. With beams it cannot stop: throw instead.
  std::function<bool(int step, const at::Tensor& logits_RV, const at::Tensor& ids_R)>
      on_step{};
  // Off: on_step gets an undefined tensor for logits, which else travel from a GPU a
  // step.
  bool logits_on_step = true;
  // On a GPU, where StaticDecoder serves: steps in fixed memory, recorded anew for each
  // call (static_decoder.h). Other sums than without, and where all experts are there
  // observers hear of a step's layers at its end. Elsewhere keys and values have room for
  // steps to come, up to twice what is used, and are not copied at each step.
  bool record_steps = false;
  // On any device: steps in this memory, made for as many rows, for the longest prompt
  // and max_new_tokens; what it has recorded is replayed. Borrowed.
  StaticDecoder* steps_in = nullptr;
  // Throws UsageError naming the option that is out of range, or two that exclude each
  // other (sampling and beams).
  void Validate() const;
};

// num_return_sequences a row, row by row. Rows that ended go on as padding, marked
// invalid to observers, until all have ended. A row's result is that of the row alone,
// but for ties nearer than the rounding of matrix products of other shapes. Throws
// DataError where the logits of a row that has not ended are no numbers, unless
// end_without_numbers.
std::vector<GeneratedSequence> Generate(SwitchModel* model, const at::Tensor& ids_BS,
                                        const at::Tensor& valid_BS,
                                        const GenerationOptions& options);

}  // namespace routecast
