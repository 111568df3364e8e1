// A device on the CPU whose copies end late, in their order, when it likes: what is read
// before its copy has ended is garbage.
#pragma once

#include <ATen/ATen.h>

#include <cstring>
#include <deque>
#include <memory>
#include <vector>

#include "common/errors.h"
#include "common/random.h"
#include "models/host_copy.h"

namespace routecast {

// Every tensor counts as one of the device.
class LateCopier final : public HostCopier {
 public:
  // Whenever it is called, up to three copies end; with seed 0 none does before somebody
  // waits, or End.
  explicit LateCopier(uint64_t seed) : seed_(seed) {}
  void FailAt(int64_t number) { fails_at_ = number; }  // of its copies, from 0
  void RefuseMemory() { refuses_ = true; }
  int64_t waits() const { return waits_; }  // for a copy that had not ended
  int64_t held() const { return held_; }    // the copy that the stream waits for, or -1
  const std::vector<int64_t>& pinned() const { return pinned_; }
  int64_t started() const { return started_; }

  void End(int64_t count) {
    for (; count > 0 && !under_way_.empty(); --count) {
      for (const Copy& copy : under_way_.front()) copy.to.copy_(copy.from);
      under_way_.pop_front();
      ++ended_;
    }
  }

  bool Copies(const at::Tensor&) const override { return true; }
  at::Tensor Pinned(int64_t bytes) override {
    if (refuses_) throw EnvironmentError("no memory");
    pinned_.push_back(bytes);
    return at::full({bytes}, 0xAA, at::kByte);
  }
  std::unique_ptr<CopyFlight> Start(const std::vector<at::Tensor>& from,
                                    const std::vector<at::Tensor>& to) override {
    std::vector<Copy> copies;
    for (size_t i = 0; i < from.size(); ++i) {
      copies.push_back({from[i], to[i]});
      std::memset(to[i].mutable_data_ptr(), 0xAA, to[i].nbytes());
    }
    under_way_.push_back(std::move(copies));
    SomeEnd();
    return std::make_unique<Flight>(this, started_++);
  }

 private:
  struct Copy {
    at::Tensor from, to;
  };
  class Flight final : public CopyFlight {
   public:
    Flight(LateCopier* copier, int64_t number) : copier_(copier), number_(number) {}
    bool Arrived() override {
      copier_->SomeEnd();
      if (number_ >= copier_->ended_) return false;
      copier_->Check(number_);
      return true;
    }
    void Wait() override {
      copier_->waits_ += number_ >= copier_->ended_;
      copier_->End(number_ + 1 - copier_->ended_);
      copier_->Check(number_);
    }
    void HoldStream() override {
      copier_->held_ = number_;
      copier_->KeepSources();
    }

   private:
    LateCopier* copier_;
    int64_t number_;
  };
  // The stream's later work may write over the sources: what is under way has them as
  // they are now.
  void KeepSources() {
    for (std::vector<Copy>& set : under_way_) {
      for (Copy& copy : set) copy.from = copy.from.clone();
    }
  }
  void SomeEnd() {
    if (seed_ != 0) End(static_cast<int64_t>(Mix(seed_, 0, calls_++) % 4));
  }
  void Check(int64_t number) const {
    if (number == fails_at_) throw EnvironmentError("the device lost a copy");
  }

  uint64_t seed_, calls_ = 0;
  int64_t fails_at_ = -1, waits_ = 0, held_ = -1, started_ = 0, ended_ = 0;
  bool refuses_ = false;
  std::vector<int64_t> pinned_;
  std::deque<std::vector<Copy>> under_way_;
};

}  // namespace routecast
