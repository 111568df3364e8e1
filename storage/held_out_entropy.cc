#include "storage/held_out_entropy.h"

#include <algorithm>
#include <utility>

#include "common/errors.h"
#include "common/random.h"
#include "common/stop.h"

namespace routecast {
namespace {

constexpr uint64_t kSalt = 0x666f6c6473000001;
constexpr const char* kDoing = "while estimating the entropy";
constexpr double kModelShare = 0.8;  // of a fold's time, roughly: the rest counts bits

RoutingSpan IdsOf(const RoutingSpan& span) {
  RoutingSpan ids;
  ids.num_tokens = span.num_tokens;
  ids.num_layers = span.num_layers;
  ids.token_ids = span.token_ids;
  ids.expert_ids = span.expert_ids;
  return ids;
}

}  // namespace

int HeldOutEntropy::FoldOf(const RoutingTrace& trace) {
  return static_cast<int>(ToRange(Mix(kSalt, trace.group_id), kFolds));
}

void HeldOutEntropy::Add(const RoutingTrace& trace) {
  RoutingTrace& kept = traces_.emplace_back();
  kept.group_id = trace.group_id;
  kept.encoder = IdsOf(trace.encoder);
  kept.decoder = IdsOf(trace.decoder);
}

bool HeldOutEntropy::HasOthers(int fold, Stack s) const {
  return std::any_of(traces_.begin(), traces_.end(), [&](const RoutingTrace& t) {
    return FoldOf(t) != fold &&
           (s == Stack::kEncoder ? t.encoder : t.decoder).num_tokens > 0;
  });
}

ContextModel HeldOutEntropy::ModelWithout(int fold, const WorkObserver& on_work) const {
  // The model's size does not count here, so every difference gets its entry; few
  // observations are distrusted instead.
  const TrainerOptions options{
      .kind = ContextKind::kPair, .entry_bits = 0, .context_bits = 0, .prior = 0.5};
  ContextTrainer trainer(geometry_, options);
  for (const RoutingTrace& t : traces_) {
    ThrowIfStopped(kDoing);
    if (FoldOf(t) == fold) continue;
    trainer.Add(Stack::kEncoder, t.encoder);
    trainer.Add(Stack::kDecoder, t.decoder);
  }
  return trainer.Train("held-out entropy", on_work);
}

std::vector<double> HeldOutEntropy::Bits(const WorkObserver& on_work) const {
  try {
    return Estimate(on_work);
  } catch (const DataError&) {  // more contexts than a model may have
    return std::vector<double>(static_cast<size_t>(geometry_.num_layers()), -1.0);
  }
}

std::vector<double> HeldOutEntropy::Estimate(const WorkObserver& on_work) const {
  const auto layers = static_cast<size_t>(geometry_.num_layers());
  std::vector<double> bits(layers, 0.0), ids(layers, 0.0);
  for (int fold = 0; fold < kFolds; ++fold) {
    const auto tell = [&](double of_fold) {
      if (on_work) on_work((fold + of_fold) / kFolds);
    };
    tell(0);
    const ContextModel model =
        ModelWithout(fold, [&](double share) { tell(kModelShare * share); });
    const bool others[2] = {HasOthers(fold, Stack::kEncoder),
                            HasOthers(fold, Stack::kDecoder)};
    uint64_t seen = 0;
    for (const RoutingTrace& t : traces_) {
      ThrowIfStopped(kDoing);
      ++seen;
      if (FoldOf(t) != fold) continue;
      for (const Stack s : {Stack::kEncoder, Stack::kDecoder}) {
        const RoutingSpan& span = s == Stack::kEncoder ? t.encoder : t.decoder;
        if (span.num_tokens == 0 || !others[static_cast<size_t>(s)]) continue;
        std::vector<double> of_span(static_cast<size_t>(span.num_layers), 0.0);
        model.CountBits(s, span, &of_span);
        for (int l = 0; l < span.num_layers; ++l) {
          const auto global = static_cast<size_t>(geometry_.GlobalLayer(s, l));
          bits[global] += of_span[static_cast<size_t>(l)];
          ids[global] += span.num_tokens;
        }
      }
      tell(kModelShare + (1 - kModelShare) * static_cast<double>(seen) /
                             static_cast<double>(traces_.size()));
    }
  }
  if (on_work) on_work(1);
  for (size_t l = 0; l < layers; ++l) bits[l] = ids[l] > 0 ? bits[l] / ids[l] : -1;
  return bits;
}

}  // namespace routecast
