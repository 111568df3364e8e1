// What a slot is worth that holds an expert: the expectation of g^(visits until its next
// use), with g = slots / (4 K + slots), K experts a token: a quarter of the time that an
// expert stays, as what is foretold soon is worth more than a habit. Predictions as far
// as they reach, beyond them the layer's turn and what was said of its later visits, or
// else the expert's use rate. In [0, 1]. Thread rule: one thread at a time.
#pragma once

#include <optional>
#include <span>
#include <vector>

#include "evaluator/expert_cache.h"
#include "evaluator/later_shares.h"
#include "evaluator/layer_timeline.h"
#include "evaluator/visit_forecasts.h"

namespace routecast {

class ExpertWorth {
 public:
  // All outlive this.
  ExpertWorth(const ExpertCache* cache, const LayerTimeline* timeline,
              const VisitForecasts* forecasts, const LaterShares* later);
  void SetSlots(int slots);
  // What was said or the visit has changed since the last question.
  void Renew() { stale_ = true; }
  double Of(ExpertKey key);
  // The evictable expert of the least worth that is not in `kept`; equals as the cache's
  // policy has them. Looks at each layer's experts by rising use rate, and no further
  // than where what is not foreseen of them is worth more already.
  struct Key {
    ExpertKey key;
    double worth = 0;
  };
  std::optional<Key> Least(std::span<const ExpertKey> kept);

 private:
  struct Outlook {                // of a layer
    bool returns = false;         // it is known to come
    double after = 0, cycle = 0;  // g^(visits until its first turn not foreseen), g^turn
    double floor = 0;             // Beyond of an expert that is hardly ever used,
    double floor_score = 0;       // which its score in the cache's order is below
    double first = 0;             // Beyond of the first evictable one in that order,
    int first_expert = -1;        // which is this one; -1: there is none
    std::span<const ExpertCache::Rank> rest;    // after it
    const LaterShares::Layer* later = nullptr;  // in place of use rates, and their order
    std::span<const int> later_rest;            // `rest` in that order
    std::vector<std::pair<const VisitForecast*, double>> foreseen;  // and g^distance
  };
  void Look();
  double Power(int visits) const;
  // Worth of the uses that are not foreseen, of an expert with this use rate.
  double Tail(const Outlook& outlook, double rate) const;
  double Beyond(const Outlook& outlook, ExpertKey key) const;
  double Beyond(const Outlook& outlook, int layer, const ExpertCache::Rank& rank) const;
  double Of(const Outlook& outlook, ExpertKey key, double beyond) const;
  struct Search;  // for the least
  void FindFirst(int layer, const Search& search);
  void LookAtRest(int layer, Search* search) const;

  const ExpertCache* cache_;
  const LayerTimeline* timeline_;
  const VisitForecasts* forecasts_;
  const LaterShares* later_;
  double least_rate_, log_least_rate_;  // that counts
  std::vector<double> powers_;          // of g
  std::vector<Outlook> outlooks_;
  std::vector<int> seen_;     // layers that return or are foreseen; each once
  bool heeds_later_ = false;  // some outlook has a `later`
  bool stale_ = true;
};

}  // namespace routecast
