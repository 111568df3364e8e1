#include "evaluator/foresight_thread.h"

#include <future>
#include <stdexcept>
#include <vector>

#include "gtest/gtest.h"

namespace routecast {
namespace {

TEST(ForesightThreadTest, QuestionsAreAskedInOrderOnAnotherThread) {
  std::vector<int> order;
  std::thread::id other;
  {
    ForesightThread thread;
    for (int i = 0; i < 100; ++i) {
      thread.Ask([&, i] {
        order.push_back(i);
        other = std::this_thread::get_id();
      });
    }
    thread.Drain();
    ASSERT_EQ(order.size(), 100u);
    thread.Drain();  // at once
  }
  for (int i = 0; i < 100; ++i) EXPECT_EQ(order[static_cast<size_t>(i)], i);
  EXPECT_NE(other, std::this_thread::get_id());
}

TEST(ForesightThreadTest, WhatAQuestionThrowsIsThrownByTheNextCall) {
  ForesightThread thread;
  thread.Ask([] { throw std::runtime_error("no"); });
  EXPECT_THROW(thread.Drain(), std::runtime_error);
  bool asked = false;
  thread.Ask([&] { asked = true; });
  thread.Drain();
  EXPECT_TRUE(asked);
}

TEST(ForesightThreadTest, TheEndWaitsForOneQuestionAndDropsTheOthers) {
  std::promise<void> begun, go;
  int asked = 0;
  std::thread let_go;
  {
    ForesightThread thread;
    thread.Ask([&] {
      begun.set_value();
      go.get_future().wait();
      ++asked;
    });
    for (int i = 0; i < 10; ++i) thread.Ask([&] { ++asked; });
    begun.get_future().wait();
    let_go = std::thread([&] {
      std::this_thread::sleep_for(std::chrono::milliseconds(50));
      go.set_value();
    });
  }
  let_go.join();
  EXPECT_EQ(asked, 1);
}

}  // namespace
}  // namespace routecast
