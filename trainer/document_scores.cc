#include "trainer/document_scores.h"

#include <ATen/ATen.h>

#include <algorithm>

#include "common/errors.h"
#include "common/random.h"
#include "models/parameters.h"
#include "trainer/leaderboard_rows.h"

namespace routecast {
namespace {

constexpr char kFile[] = "documents.safetensors";

DocumentScores Of(const std::vector<LeadScores>& scores, Stack stack) {
  DocumentScores own;
  for (const LeadScores& s : scores) {
    if (s.phase == stack) own[{s.layer, s.lead}] = s.by_document;
  }
  return own;
}

void Add(const std::string& name, const DocumentScores& scores, Parameters* to) {
  std::map<uint64_t, int64_t> column;
  for (const auto& [place, documents] : scores) {
    for (const DocumentScore& d : documents) column[d.document] = 0;
  }
  const auto n = static_cast<int64_t>(scores.size()),
             width = static_cast<int64_t>(column.size());
  const at::Tensor places = at::empty({n, 2}, at::kLong),
                   ids = at::empty({width}, at::kLong),
                   counts = at::zeros({n, width, 2}, at::kInt);
  int64_t next = 0;
  for (auto& [document, at] : column) {
    ids.data_ptr<int64_t>()[next] = static_cast<int64_t>(document);
    at = next++;
  }
  int64_t row = 0;
  for (const auto& [place, documents] : scores) {
    places.data_ptr<int64_t>()[2 * row] = place.first;
    places.data_ptr<int64_t>()[2 * row + 1] = place.second;
    int32_t* own = counts.data_ptr<int32_t>() + row++ * width * 2;
    for (const DocumentScore& d : documents) {
      const int64_t at = 2 * column.at(d.document);
      own[at] = static_cast<int32_t>(d.right);
      own[at + 1] = static_cast<int32_t>(d.of);
    }
  }
  to->Add(name + ".places", places);
  to->Add(name + ".documents", ids);
  to->Add(name + ".counts", counts);
}

DocumentScores Read(const fs::path& file, const std::string& name) {
  const Parameters all = ReadParameters(
      file, at::ScalarType::Undefined,
      [&](const std::string& tensor) { return tensor.starts_with(name + "."); });
  if (all.items().empty()) return {};
  const at::Tensor places = all.Get(name + ".places"), ids = all.Get(name + ".documents"),
                   counts = all.Get(name + ".counts");
  const int64_t n = places.dim() == 2 ? places.size(0) : -1, width = ids.numel();
  if (n < 0 || places.scalar_type() != at::kLong || ids.scalar_type() != at::kLong ||
      counts.scalar_type() != at::kInt || places.sizes() != at::IntArrayRef({n, 2}) ||
      counts.sizes() != at::IntArrayRef({n, width, 2})) {
    throw DataError(ErrorText(file.string() + " does not hold scores by document",
                              "the tensors of " + name + " have other shapes or types",
                              "remove it, or train this run again"));
  }
  DocumentScores scores;
  for (int64_t row = 0; row < n; ++row) {
    const int64_t* place = places.data_ptr<int64_t>() + 2 * row;
    auto& documents = scores[{static_cast<int>(place[0]), static_cast<int>(place[1])}];
    const int32_t* own = counts.data_ptr<int32_t>() + row * width * 2;
    for (int64_t i = 0; i < width; ++i) {
      if (own[2 * i + 1] <= 0) continue;
      documents.push_back({static_cast<uint64_t>(ids.data_ptr<int64_t>()[i]), own[2 * i],
                           own[2 * i + 1]});
    }
  }
  return scores;
}

// A place that both answer, in a seed that both have.
struct SharedPlace {
  struct Document {
    size_t number;  // among those of all places
    double a, a_of, b, b_of;
  };
  std::vector<Document> documents;
};

class Paired {
 public:
  void Add(const DocumentScores& a, const DocumentScores& b) {
    std::vector<SharedPlace> places;
    for (const auto& [place, ours] : a) {
      const auto theirs = b.find(place);
      if (theirs == b.end()) continue;
      std::map<uint64_t, const DocumentScore*> by_id;
      for (const DocumentScore& d : theirs->second) by_id[d.document] = &d;
      SharedPlace shared;
      for (const DocumentScore& d : ours) {
        const auto other = by_id.find(d.document);
        if (other == by_id.end()) continue;
        const size_t number =
            numbers_.try_emplace(d.document, numbers_.size()).first->second;
        shared.documents.push_back({number, double(d.right), double(d.of),
                                    double(other->second->right),
                                    double(other->second->of)});
      }
      if (!shared.documents.empty()) places.push_back(std::move(shared));
    }
    if (!places.empty()) seeds_.push_back(std::move(places));
  }
  size_t documents() const { return numbers_.size(); }
  bool empty() const { return seeds_.empty(); }

  // How often each document counts -> a - b.
  double Mean(const std::vector<double>& drawn) const {
    double sum = 0;
    int seeds = 0;
    for (const auto& places : seeds_) {
      double differences = 0;
      int counted = 0;
      for (const SharedPlace& place : places) {
        double a = 0, a_of = 0, b = 0, b_of = 0;
        for (const auto& d : place.documents) {
          const double times = drawn[d.number];
          a += times * d.a;
          a_of += times * d.a_of;
          b += times * d.b;
          b_of += times * d.b_of;
        }
        if (a_of == 0 || b_of == 0) continue;  // a resample without its documents
        differences += a / a_of - b / b_of;
        ++counted;
      }
      if (counted == 0) continue;
      sum += differences / counted;
      ++seeds;
    }
    return seeds > 0 ? sum / seeds : 0;
  }

 private:
  std::map<uint64_t, size_t> numbers_;
  std::vector<std::vector<SharedPlace>> seeds_;
};

}  // namespace

void WriteDocumentScores(const fs::path& folder, const MoeGeometry& geometry,
                         const TestScores& scores) {
  const Stack stack = RankingStack(geometry);
  Parameters tensors;
  Add(kModelScores, Of(scores.model, stack), &tensors);
  for (const auto& [name, leads] : scores.baselines) {
    const DocumentScores own = Of(leads, stack);
    if (!own.empty()) Add(name, own, &tensors);
  }
  WriteParameters(folder / kFile, tensors, at::ScalarType::Undefined,
                  {{"format", "routecast-documents"}, {"version", "1"}});
}

ScoresBySeed ReadDocumentScores(const std::vector<fs::path>& folders,
                                const std::vector<Json>& results,
                                const std::string& predictor) {
  ScoresBySeed by_seed;
  for (size_t i = 0; i < folders.size(); ++i) {
    const fs::path file = folders[i] / kFile;
    if (!fs::exists(file)) continue;
    DocumentScores scores = Read(file, predictor);
    if (!scores.empty()) by_seed[results.at(i).at("seed")] = std::move(scores);
  }
  return by_seed;
}

std::optional<PairedDifference> DifferenceOf(const ScoresBySeed& a, const ScoresBySeed& b,
                                             uint64_t seed, int resamples) {
  Paired paired;
  PairedDifference difference;
  for (const auto& [number, scores] : a) {
    const auto other = b.find(number);
    if (other == b.end()) continue;
    difference.seeds.push_back(number);
    paired.Add(scores, other->second);
  }
  if (paired.empty()) return std::nullopt;
  const size_t documents = paired.documents();
  difference.documents = static_cast<int64_t>(documents);
  difference.mean = paired.Mean(std::vector<double>(documents, 1.0));
  std::vector<double> means;
  for (int r = 0; r < resamples; ++r) {
    std::vector<double> drawn(documents, 0.0);
    for (size_t i = 0; i < documents; ++i) ++drawn[ToRange(Mix(seed, r, i), documents)];
    means.push_back(paired.Mean(drawn));
  }
  std::sort(means.begin(), means.end());
  const auto quantile = [&](double q) {
    return means[std::min(means.size() - 1,
                          static_cast<size_t>(q * static_cast<double>(means.size())))];
  };
  if (resamples > 0) {
    difference.ci95_low = quantile(0.025);
    difference.ci95_high = quantile(0.975);
  }
  return difference;
}

void AddDifferences(const std::vector<ScoresBySeed>& by_seed, const std::string& key,
                    uint64_t seed, Json* board) {
  std::vector<Json> rows = board->at("rows");
  size_t best = rows.size();
  for (size_t i = 0; i < rows.size(); ++i) {
    rows[i]["to_best"] = nullptr;
    if (rows[i].contains("estimate") || !rows[i].at(key).is_number()) continue;
    if (by_seed.at(i).empty()) {
      (*board)["without_document_scores"].push_back(rows[i].at("kind"));
    }
    if (rows[i].value("fewer_places", false)) continue;  // its mean is over other places
    if (best == rows.size() || rows[i].at(key) > rows[best].at(key)) best = i;
  }
  if (best < rows.size()) (*board)["best"] = rows[best].at("kind");
  for (size_t i = 0; i < rows.size(); ++i) {
    if (best == rows.size() || i == best || rows[i].contains("estimate")) continue;
    const auto difference = DifferenceOf(by_seed[i], by_seed[best], seed);
    if (!difference) continue;
    rows[i]["to_best"] = {{"mean", difference->mean},
                          {"ci95", {difference->ci95_low, difference->ci95_high}},
                          {"seeds", difference->seeds},
                          {"documents", difference->documents}};
  }
  (*board)["rows"] = rows;
}

}  // namespace routecast
