#include "models/serving_strategies.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <array>
#include <deque>
#include <numeric>
#include <utility>

#include "common/errors.h"
#include "common/random.h"
#include "models/expert_counts.h"

namespace routecast {
namespace {

constexpr int kHistory = 4;       // newest tokens that a window has to keep
constexpr int kMostExperts = 32;  // of one answer, for each that a token takes
constexpr int kPositions = 64;

// A sequence of a window: plain numbers of the newest kHistory tokens at most.
struct TokenView {
  const int64_t* ids;      // [T]
  const int64_t* experts;  // [T,L]
  int tokens, layers, num_experts;
  int position;                     // of the newest token in its sequence
  int row;                          // of the batch
  const int64_t* others = nullptr;  // [T,L,num_others]: the further choices
  int num_others = 0;

  // In-stack layer `l` of the token `back` before the newest; -1 where not known.
  int At(int back, int l) const {
    if (back >= tokens || l < 0) return -1;
    const int64_t e = experts[int64_t{tokens - 1 - back} * layers + l];
    return e >= 0 && e < num_experts ? static_cast<int>(e) : -1;
  }
  // Calls take(expert) for every choice there.
  template <typename Take>
  void Each(int back, int l, const Take& take) const {
    const int first = At(back, l);
    if (first < 0) return;
    take(first);
    const int64_t at = (int64_t{tokens - 1 - back} * layers + l) * num_others;
    for (int64_t i = at; i < at + num_others; ++i) {
      if (others[i] >= 0 && others[i] < num_experts) take(static_cast<int>(others[i]));
    }
  }
  // The first choice `steps` before (back, layer), down the layers and on through the
  // tokens before; -1 where not known.
  int Before(int back, int layer, int steps) const {
    const int visit = layer - steps;
    if (visit >= 0) return At(back, visit);
    const int tokens_more = (layers - 1 - visit) / layers;
    return At(back + tokens_more, visit + tokens_more * layers);
  }
  // Of the ids of three tokens, the newest `back` before the newest; 0 where there are
  // fewer.
  uint64_t Pattern(int back) const {
    if (tokens < back + 3) return 0;
    const int64_t* newest = ids + tokens - 1 - back;
    return Mix(Mix(static_cast<uint64_t>(newest[0]), static_cast<uint64_t>(newest[-1])),
               static_cast<uint64_t>(newest[-2])) |
           1;
  }
};

// Where a forecast is made from and what it is about; layers in the stack.
struct Question {
  int source = -1, lead = 1, target = 0;
  bool next_token = false;
};

uint64_t KeyOf(uint64_t table, uint64_t a, uint64_t b, uint64_t c = 0) {
  return Mix(Mix(table, a), Mix(b, c));
}

// Experts by falling value, the lower id first of equal ones; those of no value left out.
std::vector<int> Ranked(const std::vector<float>& values, size_t most) {
  std::vector<int> order(values.size());
  std::iota(order.begin(), order.end(), 0);
  std::erase_if(order, [&](int e) { return values[e] <= 0; });
  std::stable_sort(order.begin(), order.end(),
                   [&](int a, int b) { return values[a] > values[b]; });
  if (order.size() > most) order.resize(most);
  return order;
}

class ServingStrategy : public ExpertPredictor {
 public:
  ServingStrategy(std::string name, const MoeGeometry& geometry)
      : name_(std::move(name)), geometry_(geometry) {}
  std::string name() const override { return name_; }
  bool needs_hidden() const override { return false; }
  int history_tokens() const override { return kHistory; }
  std::optional<at::Tensor> Predict(const RoutingWindow&, int) override { return {}; }

  std::vector<std::optional<at::Tensor>> PredictLast(const RoutingWindow& window,
                                                     int num_leads) override {
    std::vector<std::optional<at::Tensor>> answers(static_cast<size_t>(num_leads));
    if (window.stack != Stack::kDecoder) return answers;
    if (window.num_experts != geometry_.num_experts ||
        window.num_layers != geometry_.decoder_layers) {
      throw std::logic_error("a window of another model than the strategy's");
    }
    const at::Tensor ids = window.token_ids_BT.to(at::kCPU, at::kLong).contiguous();
    const at::Tensor experts = window.experts_BTL.to(at::kCPU, at::kLong).contiguous();
    at::Tensor others;
    if (window.others_BTLK.defined())
      others = window.others_BTLK.to(at::kCPU, at::kLong).contiguous();
    const int64_t B = ids.size(0), T = ids.size(1), L = window.num_layers;
    const int64_t K = others.defined() ? others.size(3) : 0;
    const auto view = [&](int64_t b) {
      return TokenView{ids.const_data_ptr<int64_t>() + b * T,
                       experts.const_data_ptr<int64_t>() + b * T * L,
                       static_cast<int>(T),
                       static_cast<int>(L),
                       window.num_experts,
                       position_,
                       static_cast<int>(b),
                       K > 0 ? others.const_data_ptr<int64_t>() + b * T * L * K : nullptr,
                       static_cast<int>(K)};
    };
    Follow(window.source_layer, T, window.first_token + T, B, view);
    for (int lead = 1; lead <= num_leads; ++lead) {
      Question question{window.source_layer, lead, window.source_layer + lead, false};
      if (question.target >= L) {
        question.target -= static_cast<int>(L);
        question.next_token = true;
      }
      if (question.target > window.source_layer && question.next_token) break;
      at::Tensor probs = at::zeros({B, 1, window.num_experts}, at::kFloat);
      for (int64_t b = 0; b < B; ++b) {
        Answer(view(b), question, probs.data_ptr<float>() + b * window.num_experts);
      }
      answers[static_cast<size_t>(lead - 1)] = std::move(probs);
    }
    return answers;
  }

 protected:
  // `token.At(1, .)` is the newest token that is known whole; its position is one less.
  virtual void Learn(const TokenView& token) = 0;
  // A token of every row was learnt.
  virtual void Learnt() {}
  virtual void Answer(const TokenView& token, const Question& question, float* probs) = 0;
  int experts() const { return geometry_.num_experts; }
  int choices() const { return geometry_.experts_per_token; }
  size_t most_experts() const {
    return static_cast<size_t>(kMostExperts) * static_cast<size_t>(choices());
  }
  int layers() const { return geometry_.decoder_layers; }

 private:
  // A question before any layer is about a new token: the one before it is whole. `held`:
  // tokens of the sequence up to the newest.
  template <typename View>
  void Follow(int source_layer, int64_t tokens, int64_t held, int64_t batch,
              const View& view) {
    const bool same = std::exchange(held_, held) == held;
    if (tokens == 1) {
      position_ = 0;
      under_way_ = source_layer >= 0;
      return;
    }
    if (source_layer >= 0) {
      under_way_ = true;
      return;
    }
    if (!under_way_ && same) return;  // asked again under another guess
    under_way_ = false;
    ++position_;
    for (int64_t b = 0; b < batch; ++b) Learn(view(b));
    Learnt();
  }

  std::string name_;
  MoeGeometry geometry_;
  int position_ = 0;
  int64_t held_ = 0;
  bool under_way_ = false;  // the newest token has been routed somewhere
};

class TokenPatterns final : public ServingStrategy {
 public:
  explicit TokenPatterns(const MoeGeometry& geometry)
      : ServingStrategy("token_patterns", geometry),
        table_(geometry.num_experts, geometry.experts_per_token) {}
  bool needs_token_ids() const override { return true; }

 private:
  enum Kind : uint64_t { kIds = 1, kSource, kPosition, kChain2, kChain3 };

  void Learn(const TokenView& token) override {
    for (int l = 0; l < layers(); ++l) {
      token.Each(1, l, [&](int chosen) { LearnChoice(token, l, chosen); });
    }
  }
  void LearnChoice(const TokenView& token, int l, int chosen) {
    if (const uint64_t pattern = token.Pattern(1))
      table_.Add(KeyOf(kIds, l, pattern), chosen);
    table_.Add(KeyOf(kPosition, l, (token.position - 1) % kPositions), chosen);
    for (int lead = 1; lead <= layers(); ++lead) {
      // What was known when this layer was `lead` visits ahead.
      const std::array<int, 3> newest = {token.Before(1, l, lead),
                                         token.Before(1, l, lead + 1),
                                         token.Before(1, l, lead + 2)};
      AddChain(l, lead, newest, chosen);
    }
  }
  void AddChain(int layer, int lead, const std::array<int, 3>& newest, int chosen) {
    const uint64_t place = static_cast<uint64_t>(layer) * 64 + lead;
    if (newest[0] < 0) return;
    table_.Add(KeyOf(kSource, place, newest[0]), chosen);
    if (newest[1] < 0) return;
    table_.Add(KeyOf(kChain2, place, newest[0], newest[1]), chosen);
    if (newest[2] < 0) return;
    table_.Add(KeyOf(kChain3, place, newest[0], newest[1] * 65536 + newest[2]), chosen);
  }

  void Answer(const TokenView& token, const Question& q, float* probs) override {
    const uint64_t place = static_cast<uint64_t>(q.target) * 64 + q.lead;
    std::vector<float> mean(experts());
    int speaking = 0;
    const auto hear = [&](const float* row) {
      if (!row) return;
      ++speaking;
      for (int e = 0; e < experts(); ++e) mean[e] += row[e] / row[experts()];
    };
    if (const uint64_t pattern = token.Pattern(0); pattern && !q.next_token)
      hear(table_.Row(KeyOf(kIds, q.target, pattern)));
    hear(table_.Row(
        KeyOf(kPosition, q.target, (token.position + q.next_token) % kPositions)));
    const std::array<int, 3> newest = {token.Before(0, q.source, 0),
                                       token.Before(0, q.source, 1),
                                       token.Before(0, q.source, 2)};
    if (newest[0] >= 0) hear(table_.Row(KeyOf(kSource, place, newest[0])));
    if (newest[0] >= 0 && newest[1] >= 0) {
      hear(table_.Row(KeyOf(kChain2, place, newest[0], newest[1])));
      if (newest[2] >= 0)
        hear(table_.Row(KeyOf(kChain3, place, newest[0], newest[1] * 65536 + newest[2])));
    }
    for (int e : Ranked(mean, most_experts()))
      probs[e] = mean[e] / static_cast<float>(speaking);
  }

  CountTable table_;
};

class RecentFrequency final : public ServingStrategy {
 public:
  explicit RecentFrequency(const MoeGeometry& geometry)
      : ServingStrategy("recent_frequency", geometry),
        counts_(geometry.decoder_layers, geometry.num_experts, kKeep),
        listed_(static_cast<size_t>(geometry.decoder_layers) * geometry.num_experts) {}

 private:
  static constexpr float kKeep = 0.999f;
  static constexpr int kRenewal = 100;  // tokens

  void Learn(const TokenView& token) override {
    for (int l = 0; l < layers(); ++l) {
      token.Each(1, l, [&](int chosen) { counts_.Add(l, chosen); });
    }
  }
  void Learnt() override {
    counts_.Fade();
    if (tokens_++ % kRenewal != 0) return;
    std::fill(listed_.begin(), listed_.end(), 0);
    for (int key : Ranked(counts_.all(), most_experts())) listed_[key] = 1;
  }
  void Answer(const TokenView&, const Question& q, float* probs) override {
    const float sum = counts_.Sum(q.target);
    if (sum <= 0) return;
    for (int e = 0; e < experts(); ++e) {
      if (listed_[static_cast<size_t>(q.target) * experts() + e])
        probs[e] = counts_.At(q.target)[e] / sum;
    }
  }

  FadingCounts counts_;
  std::vector<uint8_t> listed_;  // by layer and expert
  long tokens_ = 0;
};

class MixedScores final : public ServingStrategy {
 public:
  explicit MixedScores(const MoeGeometry& geometry)
      : ServingStrategy("mixed_scores", geometry),
        counts_(geometry.decoder_layers, geometry.num_experts, kKeep),
        transitions_(
            geometry.decoder_layers * geometry.decoder_layers * geometry.num_experts,
            geometry.num_experts, kKeep),
        patterns_(geometry.num_experts, geometry.experts_per_token),
        recent_(static_cast<size_t>(geometry.decoder_layers)),
        said_(static_cast<size_t>(geometry.decoder_layers)) {}
  bool needs_token_ids() const override { return true; }

 private:
  static constexpr float kKeep = 0.99f;
  static constexpr size_t kRecent = 6;  // for each that a token takes, as all numbers
  static constexpr int kParts = 4;      // transitions, frequency, recency, patterns
  using Part = std::vector<float>;  // [E], at most 1 in sum; 0 = not among its experts

  int TransitionRow(int target, int lead, int expert) const {
    return (target * layers() + lead - 1) * experts() + expert;
  }

  void Learn(const TokenView& token) override {
    for (int l = 0; l < layers(); ++l) {
      if (token.At(1, l) < 0) continue;
      Judge(l, token);
      token.Each(1, l, [&](int chosen) { LearnChoice(token, l, chosen); });
    }
  }
  void LearnChoice(const TokenView& token, int l, int chosen) {
    counts_.Add(l, chosen);
    for (int lead = 1; lead <= layers(); ++lead) {
      if (const int before = token.Before(1, l, lead); before >= 0)
        transitions_.Add(TransitionRow(l, lead, before), chosen);
    }
    if (const uint64_t pattern = token.Pattern(1))
      patterns_.Add(KeyOf(1, l, pattern), chosen);
    std::erase(recent_[l], chosen);
    recent_[l].push_front(chosen);
    if (recent_[l].size() > kRecent * size_t(choices())) recent_[l].pop_back();
  }
  void Learnt() override {
    counts_.Fade();
    transitions_.Fade();
    for (auto& said : said_) said.clear();
  }

  // Each part's F1 for what was last said of the layer.
  void Judge(int layer, const TokenView& token) {
    for (const auto& [row, parts] : said_[layer]) {
      if (row != token.row) continue;
      for (int i = 0; i < kParts; ++i) {
        const auto named = std::count_if(parts[i].begin(), parts[i].end(),
                                         [](float p) { return p > 0; });
        int right = 0, taken = 0;
        token.Each(1, layer, [&](int chosen) {
          right += parts[i][chosen] > 0;
          ++taken;
        });
        const double f1 = 2.0 * right / static_cast<double>(named + taken);
        weights_[i] = std::max(0.0, weights_[i] + 0.01 * (f1 - 0.5));
      }
      const double sum = std::accumulate(weights_.begin(), weights_.end(), 0.0);
      if (sum <= 0) weights_ = kStart;
      for (double& weight : weights_) weight /= sum > 0 ? sum : 1;
    }
  }

  // The `most` largest of counts / sum that are above `least`, both for each expert that
  // a token takes.
  Part Largest(const float* row, float sum, float least, size_t most) const {
    Part part(experts());
    least /= static_cast<float>(choices());
    most *= static_cast<size_t>(choices());
    if (!row || sum <= 0) return part;
    Part shares(experts());
    for (int e = 0; e < experts(); ++e) {
      const float share = row[e] / sum;
      shares[e] = share > least ? share : 0;
    }
    for (int e : Ranked(shares, most)) part[e] = shares[e];
    return part;
  }

  void Answer(const TokenView& token, const Question& q, float* probs) override {
    std::array<Part, kParts> parts;
    parts[0].resize(experts());
    if (const int newest = token.Before(0, q.source, 0); newest >= 0) {
      const int row = TransitionRow(q.target, q.lead, newest);
      parts[0] = Largest(transitions_.At(row), transitions_.Sum(row), 0.05f, 12);
    }
    parts[1] = Largest(counts_.At(q.target), counts_.Sum(q.target), 0, 8);
    parts[2].resize(experts());
    for (int e : recent_[q.target])
      parts[2][e] = 1.f / static_cast<float>(recent_[q.target].size());
    const uint64_t pattern = q.next_token ? 0 : token.Pattern(0);
    const float* row = pattern ? patterns_.Row(KeyOf(1, q.target, pattern)) : nullptr;
    parts[3] = Largest(row, row ? row[experts()] : 0, 0.1f, 8);
    Part score(experts());
    for (int i = 0; i < kParts; ++i) {
      for (int e = 0; e < experts(); ++e)
        score[e] += static_cast<float>(weights_[i]) * parts[i][e];
    }
    for (int e : Ranked(score, most_experts())) probs[e] = std::min(1.f, score[e]);
    if (!q.next_token) said_[q.target].push_back({token.row, std::move(parts)});
  }

  static constexpr std::array<double, kParts> kStart = {0.4, 0.3, 0.2, 0.1};
  std::array<double, kParts> weights_ = kStart;
  FadingCounts counts_, transitions_;
  CountTable patterns_;
  std::vector<std::deque<int>> recent_;  // by layer, the newest first
  struct Said {
    int row;
    std::array<Part, kParts> parts;
  };
  std::vector<std::vector<Said>> said_;  // by layer, of the token under way
};

}  // namespace

std::vector<std::string> ServingStrategyNames() {
  return {"token_patterns", "recent_frequency", "mixed_scores"};
}

std::unique_ptr<ExpertPredictor> MakeServingStrategy(const std::string& name,
                                                     const MoeGeometry& geometry) {
  switch (ParseChoice("--predictor", name, ServingStrategyNames())) {
    case 0:
      return std::make_unique<TokenPatterns>(geometry);
    case 1:
      return std::make_unique<RecentFrequency>(geometry);
    default:
      return std::make_unique<MixedScores>(geometry);
  }
}

}  // namespace routecast
