#include "evaluator/foresight_thread.h"

#include <future>
#include <stdexcept>
#include <string>
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
      thread.Tell([&, i] {
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
  thread.Tell([] { throw std::runtime_error("no"); });
  EXPECT_THROW(thread.Drain(), std::runtime_error);
  bool asked = false;
  thread.Tell([&] { asked = true; });
  thread.Drain();
  EXPECT_TRUE(asked);
}

// Questions whose answers would come too late for what they ask about.
TEST(ForesightThreadTest, AQuestionThatALaterOneOvertakesIsNotAsked) {
  std::promise<void> begun, go;
  std::vector<std::string> done;
  ForesightThread thread;
  thread.Tell([&] {
    begun.set_value();
    go.get_future().wait();
  });
  begun.get_future().wait();
  for (int i = 0; i < 5; ++i) {
    const std::string number = std::to_string(i);
    thread.Ask([&, number] { done.push_back("asked " + number); },
               [&, number] { done.push_back("told " + number); });
    thread.Tell([&, number] { done.push_back("news " + number); });
  }
  thread.Ask([&] { done.push_back("asked last"); }, {});
  go.set_value();
  thread.Drain();
  EXPECT_EQ(done, (std::vector<std::string>{"told 0", "news 0", "told 1", "news 1",
                                            "told 2", "news 2", "told 3", "news 3",
                                            "told 4", "news 4", "asked last"}));
  thread.Ask([&] { done.push_back("asked alone"); }, {});
  thread.Drain();
  EXPECT_EQ(done.back(), "asked alone");
}

TEST(ForesightThreadTest, TheEndWaitsForOneQuestionAndDropsTheOthers) {
  std::promise<void> begun, go;
  int asked = 0;
  std::thread let_go;
  {
    ForesightThread thread;
    thread.Tell([&] {
      begun.set_value();
      go.get_future().wait();
      ++asked;
    });
    for (int i = 0; i < 10; ++i) thread.Tell([&] { ++asked; });
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
