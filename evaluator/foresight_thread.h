// Asks questions on a thread of its own, one after another in the order in which they
// were put, while the model computes: a core that waits for memory, or another one, then
// answers for next to nothing. Thread rule: Ask and Drain from one thread.
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

  // The question owns what it looks at. What an earlier one threw is thrown here; those
  // that waited behind it are gone.
  void Ask(Question question);
  // Returns when all are answered. Throws what one of them threw.
  void Drain();

 private:
  void Work(const std::stop_token& stop);
  void RethrowError();  // lock held

  std::mutex mutex_;
  std::condition_variable_any changed_;
  std::deque<Question> waiting_;
  bool answering_ = false;
  std::exception_ptr error_;
  std::jthread thread_;  // the last member: it uses the others
};

}  // namespace routecast
