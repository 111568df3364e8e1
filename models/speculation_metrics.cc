#include "models/speculation_metrics.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "common/errors.h"
#include "common/random.h"
#include "models/expert_predictor.h"

namespace routecast {
namespace {

constexpr double kSmallest = 1e-12;
constexpr int64_t kIgnore = -100;

// Experts that come before `label` in the ranking; ties go to the lower id.
int RankOf(const float* probs, int64_t experts, int64_t label) {
  int rank = 0;
  for (int64_t e = 0; e < experts; ++e) {
    rank += probs[e] > probs[label] || (probs[e] == probs[label] && e < label);
  }
  return rank;
}

template <typename T>
void Append(std::string* bytes, const T& value) {
  bytes->append(reinterpret_cast<const char*>(&value), sizeof(T));
}

template <typename T>
T Take(const std::string& bytes, size_t* at) {
  T value;
  std::memcpy(&value, bytes.data() + *at, sizeof(T));
  *at += sizeof(T);
  return value;
}

}  // namespace

Json LeadScores::ToJson() const {
  Json json{
      {"phase", StackName(phase)}, {"layer", layer}, {"lead", lead}, {"target", target}};
  for (size_t i = 0; i < kScoredTopK.size(); ++i) {
    json["top" + std::to_string(kScoredTopK[i])] = top[i];
  }
  json["cross_entropy"] = cross_entropy;
  json["ece"] = ece;
  if (ece_equal_mass) json["ece_equal_mass"] = *ece_equal_mass;
  json["ci95"] = {ci95_low, ci95_high};
  json["samples"] = samples;
  json["documents"] = documents;
  if (!by_choice.empty()) {
    json["recall"] = recall;
    json["recall_at_2k"] = recall_twice;
    json["recall_by_choice"] = by_choice;
  }
  return json;
}

void LeadAccumulator::Add(const at::Tensor& probs_NE, const at::Tensor& labels,
                          const at::Tensor& documents_N) {
  const auto probs = probs_NE.detach().to(at::kCPU, at::kFloat).contiguous();
  const int64_t rows = probs.size(0), experts = probs.size(1);
  const int64_t K = labels.dim() == 2 ? labels.size(1) : 1;
  const auto truth = labels.to(at::kCPU, at::kLong).contiguous();
  const auto documents = documents_N.to(at::kCPU, at::kLong).contiguous();
  if (truth.numel() != rows * K || documents.numel() != rows || K > kMostChoices) {
    throw std::logic_error("scores need labels and a document for each row");
  }
  for (int64_t n = 0; n < rows; ++n) {
    const int64_t* chosen = truth.data_ptr<int64_t>() + n * K;
    if (chosen[0] == kIgnore) continue;
    const float* p = probs.data_ptr<float>() + n * experts;
    Sums& sums = documents_[static_cast<uint64_t>(documents.data_ptr<int64_t>()[n])];
    sums.choices = K;
    bool right = false;  // the likeliest is one of them
    for (int64_t k = 0; k < K; ++k) {
      if (chosen[k] < 0 || chosen[k] >= experts) {
        throw std::logic_error("a label out of range");
      }
      const int rank = RankOf(p, experts, chosen[k]);
      right = right || rank == 0;
      sums.choice_hits[static_cast<size_t>(k)] += rank < K;
      sums.twice_hits += rank < 2 * K;
      sums.cross_entropy -=
          std::log(std::max<double>(p[chosen[k]], kSmallest)) / static_cast<double>(K);
      for (size_t i = 0; k == 0 && i < kScoredTopK.size(); ++i) {
        sums.hits[i] += rank < kScoredTopK[i];
      }
    }
    const double confidence =
        UseProbability(*std::max_element(p, p + experts), static_cast<int>(K));
    const auto bin = static_cast<size_t>(std::clamp(int(confidence * 10), 0, 9));
    ++sums.bin_count[bin];
    sums.bin_hits[bin] += right;
    sums.bin_confidence[bin] += confidence;
    ++sums.samples;
    if (answers_) answers_->Add(confidence, right);
  }
}

void LeadAccumulator::AddUnanswered(uint64_t document, int64_t rows, int64_t choices) {
  if (rows == 0) return;
  Sums& sums = documents_[document];
  sums.choices = choices;
  sums.samples += rows;
  sums.cross_entropy -= std::log(kSmallest) * static_cast<double>(rows);
}

std::string LeadAccumulator::Bytes() const {
  std::string bytes;
  Append(&bytes, static_cast<uint64_t>(answers_ ? answers_->answers().size() : 0));
  for (size_t i = 0; answers_ && i < answers_->answers().size(); ++i) {
    Append(&bytes, answers_->answers()[i]);
  }
  for (const auto& [document, sums] : documents_) {
    Append(&bytes, document);
    Append(&bytes, sums);
  }
  return bytes;
}

void LeadAccumulator::Merge(const std::string& bytes) {
  constexpr size_t kEntry = sizeof(uint64_t) + sizeof(Sums);
  static_assert(std::is_trivially_copyable_v<Sums>);
  size_t at = 0;
  const size_t fits = bytes.size() / sizeof(uint64_t);
  const size_t answers = fits > 0 ? Take<uint64_t>(bytes, &at) : 0;
  if (answers >= fits || (bytes.size() - at - answers * sizeof(double)) % kEntry != 0) {
    throw DataError(ErrorText(
        "the scores of another rank are damaged",
        std::to_string(bytes.size()) + " bytes, entries of " + std::to_string(kEntry),
        "run the same build on all ranks"));
  }
  if (answers > 0 && !answers_) answers_.emplace();
  std::vector<double> others(answers);
  for (double& answer : others) answer = Take<double>(bytes, &at);
  if (answers_) answers_->Merge(others);
  while (at < bytes.size()) {
    Sums& sums = documents_[Take<uint64_t>(bytes, &at)];
    const Sums other = Take<Sums>(bytes, &at);
    sums.samples += other.samples;
    sums.cross_entropy += other.cross_entropy;
    for (size_t i = 0; i < sums.hits.size(); ++i) sums.hits[i] += other.hits[i];
    for (size_t i = 0; i < sums.bin_count.size(); ++i) {
      sums.bin_count[i] += other.bin_count[i];
      sums.bin_hits[i] += other.bin_hits[i];
      sums.bin_confidence[i] += other.bin_confidence[i];
    }
    sums.choices = other.choices;
    sums.twice_hits += other.twice_hits;
    for (size_t i = 0; i < sums.choice_hits.size(); ++i) {
      sums.choice_hits[i] += other.choice_hits[i];
    }
  }
}

int64_t LeadAccumulator::samples() const {
  int64_t n = 0;
  for (const auto& [document, sums] : documents_) n += sums.samples;
  return n;
}

LeadScores LeadAccumulator::Scores(uint64_t seed, int resamples) const {
  LeadScores scores;
  scores.phase = phase_;
  scores.layer = layer_;
  scores.lead = lead_;
  scores.target = target_;
  scores.samples = samples();
  scores.documents = static_cast<int64_t>(documents_.size());
  if (scores.samples == 0) return scores;
  const double n = static_cast<double>(scores.samples);
  std::array<double, 10> hits{}, confidence{};
  const int64_t K = documents_.begin()->second.choices;
  if (K > 1) scores.by_choice.assign(static_cast<size_t>(K), 0.0);
  for (const auto& [document, sums] : documents_) {
    for (size_t i = 0; i < sums.hits.size(); ++i) scores.top[i] += sums.hits[i] / n;
    scores.cross_entropy += sums.cross_entropy / n;
    for (size_t i = 0; i < hits.size(); ++i) {
      hits[i] += sums.bin_hits[i];
      confidence[i] += sums.bin_confidence[i];
    }
    int64_t found = K == 1 ? sums.hits[0] : 0;
    for (size_t k = 0; k < scores.by_choice.size(); ++k) {
      scores.by_choice[k] += static_cast<double>(sums.choice_hits[k]) / n;
      found += sums.choice_hits[k];
    }
    scores.recall += static_cast<double>(found) / (n * static_cast<double>(K));
    scores.recall_twice +=
        static_cast<double>(sums.twice_hits) / (n * static_cast<double>(K));
    scores.by_document.push_back({document, found, sums.samples * K});
  }
  for (size_t i = 0; i < hits.size(); ++i) {
    scores.ece += std::abs(hits[i] - confidence[i]) / n;
  }
  if (answers_) scores.ece_equal_mass = answers_->Value();
  std::vector<double> means;
  for (int r = 0; r < resamples; ++r) {
    double drawn_hits = 0, drawn = 0;
    const auto& all = scores.by_document;
    for (size_t i = 0; i < all.size(); ++i) {
      const DocumentScore& d = all[ToRange(Mix(seed, r, i), all.size())];
      drawn_hits += static_cast<double>(d.right);
      drawn += static_cast<double>(d.of);
    }
    means.push_back(drawn_hits / drawn);
  }
  std::sort(means.begin(), means.end());
  const auto quantile = [&](double q) {
    return means[std::min(means.size() - 1, static_cast<size_t>(q * means.size()))];
  };
  if (resamples > 0) {
    scores.ci95_low = quantile(0.025);
    scores.ci95_high = quantile(0.975);
  }
  return scores;
}

}  // namespace routecast
