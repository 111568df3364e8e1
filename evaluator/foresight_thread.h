// Asks questions on a thread of its own, one after another in the order in which they
// were put, while the model computes: a core that waits for memory, or another one, then
// answers for next to nothing. A question that has not been asked when the next one is
// put is not asked any more: who is slow never falls behind by more than one. Thread
// rule: Ask, Tell and Drain from one thread.
#pragma once

#include <condition_variable>
#include <deque>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>

namespace routecast {

class ForesightThread {
 public:
  // Asks, and does what is to be done with the answer.
  using Question = std::function<void()>;

  ForesightThread();
  // Ends when the question under way is answered; those that wait are dropped.
  ~ForesightThread();
  ForesightThread(const ForesightThread&) = delete;
  ForesightThread& operator=(const ForesightThread&) = delete;

  // The question owns what it looks at. Where another one is put before its turn,
  // `instead` is done in its place (the news without the question; nothing where empty).
  // What an earlier one threw is thrown here; those that waited behind it are gone.
  void Ask(Question question, Question instead);
  // The same of what has to be done, whatever comes behind it.
  void Tell(Question news);
  // Returns when all are answered. Throws what one of them threw.
  void Drain();

 private:
  struct Waiting {
    Question question, instead;
    bool may_lapse = false;
  };
  void Put(Waiting waiting);
  void Work(const std::stop_token& stop);
  Question Next();      // lock held: what is to be done with the first that waits
  void RethrowError();  // lock held

  std::mutex mutex_;
  std::condition_variable_any changed_;
  std::deque<Waiting> waiting_;
  size_t questions_ = 0;  // of those that wait: may lapse
  bool answering_ = false;
  std::exception_ptr error_;
  std::jthread thread_;  // the last member: it uses the others
};

}  // namespace routecast
