#include "evaluator/quality.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <map>
#include <numeric>
#include <tuple>

#include "common/errors.h"
#include "common/progress.h"
#include "common/stop.h"
#include "evaluator/question_guard.h"
#include "models/routing_window.h"
#include "storage/one_model.h"

namespace routecast {
namespace {

struct Place {
  LeadAccumulator scores;
  Correlation confidence;
  EqualMassCalibration calibration;
  RouterAgreement agreement;
  double variation = 0, confidence_variation = 0;
  int64_t neighbours = 0;
  std::map<uint64_t, int64_t> unanswered;  // labels whose question failed, by document
  bool silent = false;                     // an answer told nothing of it
};

// One predictor's answers so far.
struct Asked {
  std::map<std::tuple<Stack, int, int>, Place> places;
  std::vector<float> right;  // by decoder token: share of the layers, one visit ahead
  std::vector<double> microseconds;
  QuestionGuard guard;
  AnswerLog* log = nullptr;
  int predictor = 0;  // in the log
};

double Quantile(std::vector<double> values, double q) {
  if (values.empty()) return 0;
  const auto at = static_cast<size_t>(q * static_cast<double>(values.size() - 1));
  std::nth_element(values.begin(), values.begin() + static_cast<int64_t>(at),
                   values.end());
  return values[at];
}

// What was said of one lead over a sequence: probs [N,E] of some of its tokens, rising,
// and the tokens whose question failed.
struct Said {
  std::vector<at::Tensor> probs_NE;
  std::vector<int64_t> tokens, failed;
  bool silent = false;  // about some token
};

Place& PlaceOf(Asked* asked, Stack stack, int source, int lead, const MoeGeometry& g) {
  auto [it, made] = asked->places.try_emplace(std::tuple(stack, source, lead));
  const int target = (source + lead) % g.layers(stack);
  if (made) it->second.scores = LeadAccumulator(stack, source, lead, target);
  return it->second;
}

double TotalVariation(const float* p, const float* q, int experts) {
  double sum = 0;
  for (int e = 0; e < experts; ++e) sum += std::abs(p[e] - q[e]);
  return sum / 2;
}

// The K experts of each token at the leads of a source, [T,H,K]; -100: no label.
at::Tensor LabelSets(const RoutingTrace& trace, Stack stack, int source, int leads,
                     int experts_per_token) {
  const WindowTargets targets =
      WindowTargetsOf({&trace}, stack, source, leads, experts_per_token);
  const at::Tensor first = targets.labels_BTH.unsqueeze(3);
  const bool several = targets.others_BTHK.defined();
  return (several ? at::cat({first, targets.others_BTHK}, 3) : first)[0].contiguous();
}

// The share of a token's experts [K] that are among the K likeliest; ties go to the lower
// id.
double RecallOf(const at::Tensor& probs_E, const at::Tensor& chosen_K) {
  const at::Tensor probs = probs_E.to(at::kFloat).contiguous();
  const float* p = probs.const_data_ptr<float>();
  const int64_t K = chosen_K.size(0);
  int found = 0;
  for (int64_t k = 0; k < K; ++k) {
    const auto label = chosen_K[k].item<int64_t>();
    int64_t before = 0;
    for (int64_t e = 0; e < probs.size(0); ++e)
      before += p[e] > p[label] || (p[e] == p[label] && e < label);
    found += before < K;
  }
  return found / static_cast<double>(K);
}

void ScoreAnswers(const RoutingTrace& trace, Stack stack, int source, int lead,
                  const MoeGeometry& g, const at::Tensor& labels_TK, const Said& said,
                  Place* place) {
  const at::Tensor probs = at::cat(said.probs_NE).to(at::kFloat).contiguous();
  const int64_t count = probs.size(0);
  const int K = g.experts_per_token;
  at::Tensor own = at::empty({count, K}, at::kLong);
  for (int64_t i = 0; i < count; ++i)
    own[i] = labels_TK[said.tokens[static_cast<size_t>(i)]];
  place->scores.Add(
      probs, own, at::full({count}, static_cast<int64_t>(trace.document_id), at::kLong));
  const RoutingSpan& span = stack == Stack::kEncoder ? trace.encoder : trace.decoder;
  std::vector<float> router(static_cast<size_t>(g.num_experts));
  const int64_t ahead = source + lead >= g.layers(stack) ? 1 : 0;  // in the next token
  const int target = (source + lead) % g.layers(stack);
  const auto [largest, guess] = probs.max(1);
  const auto sure = [&, p = largest.const_data_ptr<float>()](int64_t i) {
    return UseProbability(p[i], K);
  };
  const int64_t* chosen = own.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < count; ++i) {
    const int64_t t = said.tokens[static_cast<size_t>(i)];
    const float* row = probs.const_data_ptr<float>() + i * g.num_experts;
    if (i > 0 && t == said.tokens[static_cast<size_t>(i - 1)] + 1) {
      place->variation += TotalVariation(row, row - g.num_experts, g.num_experts);
      place->confidence_variation += std::abs(sure(i) - sure(i - 1));
      ++place->neighbours;
    }
    const int64_t* set = chosen + i * K;
    if (set[0] < 0) continue;
    const bool right = std::find(set, set + K, guess[i].item<int64_t>()) != set + K;
    place->confidence.Add(sure(i), right);
    place->calibration.Add(sure(i), right);
    // Of several experts an answer is about the set, not about their weights.
    if (K > 1) continue;
    if (RouterDistribution(span, target, static_cast<int>(t + ahead), &router)) {
      place->agreement.Add(row, router, span.top_k);
    }
  }
}

// What was said and what then happened, into the log.
void Log(const RoutingTrace& trace, Stack stack, int source, int lead,
         const at::Tensor& labels_TK, const Said& said, const Asked& asked) {
  const at::Tensor probs = at::cat(said.probs_NE).to(at::kFloat).contiguous();
  const at::Tensor labels = labels_TK.contiguous();
  const auto experts = static_cast<size_t>(probs.size(1)),
             choices = static_cast<size_t>(labels.size(1));
  for (size_t i = 0; i < said.tokens.size(); ++i) {
    const int64_t token = said.tokens[i];
    asked.log->Add(
        {asked.predictor,
         trace.sequence_id,
         stack,
         token,
         source,
         lead,
         {probs.const_data_ptr<float>() + i * experts, experts},
         {labels.const_data_ptr<int64_t>() + static_cast<size_t>(token) * choices,
          choices}});
  }
}

// labels_THK: LabelSets of the source.
void Score(const RoutingTrace& trace, Stack stack, int source, int lead,
           const MoeGeometry& g, const at::Tensor& labels_THK, const Said& said,
           Asked* asked) {
  Place& place = PlaceOf(asked, stack, source, lead, g);
  place.silent |= said.silent;
  const at::Tensor labels_TK = labels_THK.select(1, lead - 1);
  if (!said.tokens.empty()) {
    ScoreAnswers(trace, stack, source, lead, g, labels_TK, said, &place);
    if (asked->log) Log(trace, stack, source, lead, labels_TK, said, *asked);
  }
  for (const int64_t t : said.failed) {
    if (labels_TK[t][0].item<int64_t>() >= 0) ++place.unanswered[trace.document_id];
  }
}

std::vector<int64_t> TokensUpTo(int64_t count) {
  std::vector<int64_t> tokens(static_cast<size_t>(count));
  std::iota(tokens.begin(), tokens.end(), 0);
  return tokens;
}

// `kept` tokens up to token `newest`.
RoutingWindow UpTo(const RoutingWindow& all, int64_t newest, int64_t kept) {
  RoutingWindow w = all;
  const int64_t first = newest + 1 - kept;
  for (at::Tensor* x : {&w.token_ids_BT, &w.valid_BT, &w.experts_BTL, &w.others_BTLK,
                        &w.hidden_BTD, &w.context_BTD}) {
    if (x->defined()) *x = x->narrow(1, first, kept).contiguous();
  }
  w.first_token = first;
  return w;
}

class Interview {
 public:
  Interview(const MoeGeometry& geometry, const QualityOptions& options)
      : g_(geometry), options_(options) {}

  void Ask(const RoutingTrace& trace, ExpertPredictor* predictor, Asked* asked) const {
    if (trace.encoder.num_tokens > 0) AskEncoder(trace, predictor, asked);
    if (trace.decoder.num_tokens > 0) AskDecoder(trace, predictor, asked);
  }

 private:
  using Answers = std::vector<std::optional<at::Tensor>>;

  // `leads` answers about the window's newest `tokens`; nullopt where the question
  // failed.
  template <typename Question>
  static std::optional<Answers> Answer(const RoutingWindow& window, int leads,
                                       int64_t tokens, Asked* asked,
                                       const Question& question) {
    Answers answers;
    const auto start = std::chrono::steady_clock::now();
    const bool sound = asked->guard.Run([&] {
      answers = question();
      RequireAnswers(answers, window, tokens);
    });
    const std::chrono::duration<double, std::micro> us =
        std::chrono::steady_clock::now() - start;
    asked->microseconds.push_back(us.count());
    if (!sound) return std::nullopt;
    answers.resize(static_cast<size_t>(leads));
    return answers;
  }

  void AskEncoder(const RoutingTrace& trace, ExpertPredictor* predictor,
                  Asked* asked) const {
    for (int source = -1; source < g_.encoder_layers - 1; ++source) {
      const RoutingWindow window =
          WindowOf(trace, Stack::kEncoder, source, g_.num_experts, g_.experts_per_token);
      const int leads = g_.encoder_layers - 1 - source;
      const at::Tensor labels =
          LabelSets(trace, Stack::kEncoder, source, leads, g_.experts_per_token);
      const int64_t tokens = trace.encoder.num_tokens;
      const auto answers = Answer(window, leads, tokens, asked,
                                  [&] { return predictor->PredictLeads(window, leads); });
      for (int lead = 1; lead <= leads; ++lead) {
        Said said;
        if (!answers) {
          said.failed = TokensUpTo(tokens);
        } else if (const auto& probs = (*answers)[static_cast<size_t>(lead - 1)]) {
          said.probs_NE = {probs->squeeze(0).cpu()};
          said.tokens = TokensUpTo(tokens);
        } else {
          said.silent = true;
        }
        Score(trace, Stack::kEncoder, source, lead, g_, labels, said, asked);
      }
    }
  }

  void AskDecoder(const RoutingTrace& trace, ExpertPredictor* predictor,
                  Asked* asked) const {
    const int leads = g_.decoder_layers;
    const int64_t tokens = std::min(trace.decoder.num_tokens, options_.tokens);
    struct Source {
      RoutingWindow all;
      at::Tensor labels_THK;
      std::vector<Said> said;  // by lead
    };
    std::vector<Source> sources;
    for (int source = -1; source < g_.decoder_layers; ++source) {
      const int K = g_.experts_per_token;
      sources.push_back({WindowOf(trace, Stack::kDecoder, source, g_.num_experts, K),
                         LabelSets(trace, Stack::kDecoder, source, leads, K),
                         std::vector<Said>(static_cast<size_t>(leads))});
    }
    // In the order of the pass: some predictors learn from what came.
    int64_t held = 0;  // by the window, as by the runtime's
    for (int64_t t = 0; t < tokens; ++t) {
      held = KeptTokens(*predictor, held, 1) + 1;
      double right = 0;
      int counted = 0;
      for (Source& source : sources) {
        const RoutingWindow window = UpTo(source.all, t, held);
        const auto answers = Answer(window, leads, 1, asked, [&] {
          return predictor->PredictLast(window, leads);
        });
        for (size_t lead = 0; lead < source.said.size(); ++lead) {
          Said& said = source.said[lead];
          if (!answers) {
            said.failed.push_back(t);
          } else if ((*answers)[lead]) {
            // A copy: a view would keep the answers about the whole window.
            said.probs_NE.push_back((*answers)[lead]->flatten(0, 1).cpu().clone());
            said.tokens.push_back(t);
          } else {
            said.silent = true;
          }
        }
        const at::Tensor next = source.labels_THK[t][0];  // one visit ahead
        if (next[0].item<int64_t>() < 0 || (answers && !(*answers)[0])) continue;
        if (answers) right += RecallOf(source.said[0].probs_NE.back()[0], next);
        ++counted;
      }
      if (counted > 0)
        asked->right.push_back(static_cast<float>(right) / static_cast<float>(counted));
    }
    for (size_t s = 0; s < sources.size(); ++s) {
      for (int lead = 1; lead <= leads; ++lead) {
        Score(trace, Stack::kDecoder, static_cast<int>(s) - 1, lead, g_,
              sources[s].labels_THK, sources[s].said[static_cast<size_t>(lead - 1)],
              asked);
      }
    }
  }

  MoeGeometry g_;
  QualityOptions options_;
};

PredictorQuality Summary(const std::string& name, const Asked& asked, int choices,
                         uint64_t seed) {
  PredictorQuality quality;
  quality.predictor = name;
  for (const auto& [key, place] : asked.places) {
    // A failed question would have told nothing of a place of which others never do.
    if (place.silent && place.scores.samples() == 0) continue;
    LeadAccumulator all = place.scores;
    QualityScores scores;
    for (const auto& [document, rows] : place.unanswered) {
      all.AddUnanswered(document, rows, choices);
      scores.unanswered += rows;
    }
    if (all.samples() == 0) continue;
    scores.scores = all.Scores(seed);
    scores.confidence_correlation = place.confidence.Value();
    scores.agreement = place.agreement;
    const auto neighbours = static_cast<double>(std::max<int64_t>(1, place.neighbours));
    scores.variation = place.variation / neighbours;
    scores.confidence_variation = place.confidence_variation / neighbours;
    scores.ece_equal_mass = place.calibration.Value();
    quality.places.push_back(scores);
  }
  quality.p50_us = Quantile(asked.microseconds, 0.5);
  quality.p95_us = Quantile(asked.microseconds, 0.95);
  quality.questions = static_cast<int64_t>(asked.microseconds.size());
  quality.failed_questions = asked.guard.failed();
  quality.first_failure = asked.guard.first_failure();
  return quality;
}

}  // namespace

namespace {

using Predictors = std::vector<std::unique_ptr<ExpertPredictor>>;

bool AnyNeedsHidden(const Predictors& predictors) {
  return std::any_of(predictors.begin(), predictors.end(),
                     [](const auto& p) { return p->needs_hidden(); });
}

// Of the test part, `most` at most.
std::vector<uint64_t> SequencesOf(const TraceReader& reader, const Predictors& predictors,
                                  int most) {
  if (predictors.empty()) {
    throw UsageError(ErrorText("there is nobody to ask",
                               "no predictor is named, or the store serves none",
                               "give --predictor=NAME,RUN or --baselines=simple"));
  }
  const bool hidden = AnyNeedsHidden(predictors);
  std::vector<uint64_t> ids;
  for (const SequenceInfo& info : reader.sequences()) {
    if (SplitOf(info.group_id) != SplitPart::kTest || (hidden && !info.has_hidden)) {
      continue;
    }
    ids.push_back(info.sequence_id);
    if (ids.size() == static_cast<size_t>(most)) break;
  }
  if (ids.empty()) {
    throw UsageError(ErrorText("the store has no test sequence" +
                                   std::string(hidden ? " with router inputs" : "") +
                                   ": " + reader.path().string(),
                               "", "collect more, with --record=ids,probs,hidden"));
  }
  return ids;
}

// Asks all predictors about the test sequences of `reader`.
std::vector<Asked> AskAll(const TraceReader& reader, const Predictors& predictors,
                          const QualityOptions& options) {
  const std::vector<uint64_t> ids = SequencesOf(reader, predictors, options.sequences);
  const bool hidden = AnyNeedsHidden(predictors);
  std::vector<Asked> asked(predictors.size());
  for (size_t p = 0; p < predictors.size(); ++p) {
    asked[p].log = options.answers;
    asked[p].predictor = static_cast<int>(p);
  }
  const Interview interview(reader.config().geometry, options);
  Progress progress("asking " + std::to_string(predictors.size()) + " predictors",
                    "sequences", ids.size(), options.quiet);
  for (size_t i = 0; i < ids.size(); ++i) {
    const RoutingTrace trace =
        reader.Read(ids[i], hidden ? WithHidden::kYes : WithHidden::kNo);
    for (size_t p = 0; p < predictors.size(); ++p) {
      ThrowIfStopped("while asking predictors");
      interview.Ask(trace, predictors[p].get(), &asked[p]);
    }
    progress.Update(i + 1);
  }
  progress.Finish();
  return asked;
}

}  // namespace

void CheckQuality(const TraceReader& reader, const Predictors& predictors) {
  SequencesOf(reader, predictors, 1);
}

std::vector<PredictorQuality> MeasureQuality(const TraceReader& reader,
                                             const Predictors& predictors,
                                             const QualityOptions& options) {
  const c10::NoGradGuard no_grad;
  const std::vector<Asked> asked = AskAll(reader, predictors, options);
  std::vector<PredictorQuality> all;
  const int choices = reader.config().geometry.experts_per_token;
  for (size_t p = 0; p < predictors.size(); ++p) {
    all.push_back(Summary(predictors[p]->label(), asked[p], choices, options.seed));
  }
  return all;
}

void CheckShift(const TraceReader& from, const TraceReader& to,
                const Predictors& predictors) {
  RequireOneModel({from.path().string(), from.config().geometry},
                  {to.path().string(), to.config().geometry});
  CheckQuality(to, predictors);
}

ShiftedQuality MeasureShift(const TraceReader& from, const TraceReader& to,
                            const Predictors& predictors, const QualityOptions& options) {
  CheckShift(from, to, predictors);  // before an hour is spent on the first
  const c10::NoGradGuard no_grad;
  const std::vector<Asked> before = AskAll(from, predictors, options),
                           after = AskAll(to, predictors, options);
  ShiftedQuality shifted;
  const int choices = from.config().geometry.experts_per_token;
  for (size_t p = 0; p < predictors.size(); ++p) {
    const std::string name = predictors[p]->label();
    shifted.before.push_back(Summary(name, before[p], choices, options.seed));
    shifted.after.push_back(Summary(name, after[p], choices, options.seed));
    shifted.after.back().adaptation = AdaptationOf(before[p].right, after[p].right);
  }
  return shifted;
}

}  // namespace routecast
