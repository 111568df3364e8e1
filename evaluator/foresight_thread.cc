#include "evaluator/foresight_thread.h"

#include <c10/core/GradMode.h>
#include <dlfcn.h>

#include <utility>

namespace routecast {
namespace {

// Operations called on this thread run on it alone: a pool of its own beside the model's
// would only take its cores. LibTorch's own call sets other threads' as well.
void ComputeAlone() {
  using SetThreads = void (*)(int);
  const auto set_threads =
      reinterpret_cast<SetThreads>(::dlsym(RTLD_DEFAULT, "omp_set_num_threads"));
  if (set_threads) set_threads(1);
}

}  // namespace

ForesightThread::ForesightThread() {
  thread_ = std::jthread([this](std::stop_token stop) { Work(stop); });
}

ForesightThread::~ForesightThread() = default;  // the thread is asked to stop, and joined

void ForesightThread::RethrowError() {
  if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
}

void ForesightThread::Ask(Question question, Question instead) {
  Put({std::move(question), std::move(instead), true});
}

void ForesightThread::Tell(Question news) { Put({std::move(news), {}, false}); }

void ForesightThread::Put(Waiting waiting) {
  {
    std::lock_guard lock(mutex_);
    RethrowError();
    questions_ += waiting.may_lapse;
    waiting_.push_back(std::move(waiting));
  }
  changed_.notify_all();
}

ForesightThread::Question ForesightThread::Next() {
  Waiting first = std::move(waiting_.front());
  waiting_.pop_front();
  questions_ -= first.may_lapse;
  // A later question knows more, and of the same visits.
  const bool lapsed = first.may_lapse && questions_ > 0;
  return std::move(lapsed ? first.instead : first.question);
}

void ForesightThread::Drain() {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [&] { return error_ || (waiting_.empty() && !answering_); });
  RethrowError();
}

void ForesightThread::Work(const std::stop_token& stop) {
  const c10::NoGradGuard no_grad;
  ComputeAlone();
  std::unique_lock lock(mutex_);
  while (changed_.wait(lock, stop, [&] { return !waiting_.empty(); }) &&
         !stop.stop_requested()) {
    const Question question = Next();
    answering_ = true;
    lock.unlock();
    std::exception_ptr error;
    try {
      if (question) question();
    } catch (...) {
      error = std::current_exception();
    }
    lock.lock();
    answering_ = false;
    if (error) {
      error_ = error;
      waiting_.clear();
      questions_ = 0;
    }
    changed_.notify_all();
  }
}

}  // namespace routecast
