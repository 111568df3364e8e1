#include <ATen/ATen.h>
#include <ATen/cuda/CUDAContext.h>
#include <ATen/cuda/CUDAEvent.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <nccl.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstring>
#include <thread>

#include "comm/end_unless_done.h"
#include "comm/nccl_communicator.h"
#include "common/errors.h"

namespace routecast {
namespace {

using Clock = std::chrono::steady_clock;

EnvironmentError FailureOf(const RankInfo& rank, const std::string& call,
                           const std::string& reason) {
  return EnvironmentError(
      ErrorText("rank " + std::to_string(rank.rank) + " of " +
                    std::to_string(rank.world) + ": NCCL " + call + " failed",
                reason, "set NCCL_DEBUG=INFO and start the same command again"));
}

[[noreturn]] void Fail(const RankInfo& rank, const std::string& call,
                       const std::string& reason) {
  throw FailureOf(rank, call, reason);
}

class NcclCommunicator;

class NcclReduce final : public PendingReduce {
 public:
  NcclReduce(NcclCommunicator* owner, at::Tensor tensor, uint64_t call)
      : owner_(owner), tensor_(std::move(tensor)), call_(call) {}
  void Wait() override;
  at::cuda::CUDAEvent done;

 private:
  NcclCommunicator* owner_;
  at::Tensor tensor_;
  uint64_t call_;
};

// Own stream: reductions overlap backward. One communicator a controlling thread.
class NcclCommunicator final : public Communicator {
 public:
  NcclCommunicator(std::unique_ptr<Communicator> host, at::Device device, double deadline,
                   std::shared_ptr<CallWatch> watch)
      : host_(std::move(host)),
        rank_(host_->rank_info()),
        device_(device),
        deadline_(deadline),
        watch_(std::move(watch)),
        guard_(device),
        stream_(c10::cuda::getStreamFromPool(/*isHighPriority=*/true)) {
    RequireOwnDevices(host_->AllGather(DeviceName(device_)));
    ncclUniqueId id = {};
    if (rank_.is_root()) {
      const ncclResult_t made = ncclGetUniqueId(&id);
      if (made != ncclSuccess) Fail(rank_, "ncclGetUniqueId", ncclGetErrorString(made));
    }
    at::Tensor bytes = at::empty({static_cast<int64_t>(sizeof id)}, at::kByte);
    std::memcpy(bytes.data_ptr(), &id, sizeof id);
    host_->Broadcast(bytes, 0);
    std::memcpy(&id, bytes.data_ptr(), sizeof id);
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    config.blocking = 0;
    Check(ncclCommInitRankConfig(&comm_, rank_.world, id, rank_.rank, &config), "init");
  }
  ~NcclCommunicator() override {
    if (!comm_) return;
    // Everything waited for is done; nothing to flush. Where an exception unwinds this,
    // its text comes too late.
    AbortWithin(FailureOf(rank_, "release", "the device does not answer"));
  }
  RankInfo rank_info() const override { return rank_; }

  std::unique_ptr<PendingReduce> StartAllReduceSum(const at::Tensor& tensor) override {
    auto pending = std::make_unique<NcclReduce>(
        this, tensor, watch_->Begin("NCCL all-reduce", tensor.nbytes()));
    at::cuda::CUDAEvent ready;
    ready.record(c10::cuda::getCurrentCUDAStream());
    ready.block(stream_);
    Check(ncclAllReduce(tensor.data_ptr(), tensor.data_ptr(),
                        static_cast<size_t>(tensor.numel()),
                        tensor.scalar_type() == at::kDouble ? ncclDouble : ncclFloat,
                        ncclSum, comm_, stream_),
          "all-reduce");
    pending->done.record(stream_);
    return pending;
  }
  void AllReduceSum(std::span<double> values) override { host_->AllReduceSum(values); }
  void Broadcast(const at::Tensor& tensor, int root) override {
    const uint64_t call = watch_->Begin("NCCL broadcast", tensor.nbytes());
    at::cuda::CUDAEvent ready, done;
    ready.record(c10::cuda::getCurrentCUDAStream());
    ready.block(stream_);
    Check(ncclBroadcast(tensor.data_ptr(), tensor.data_ptr(), tensor.nbytes(), ncclChar,
                        root, comm_, stream_),
          "broadcast");
    done.record(stream_);
    Await(done, call);
  }
  std::vector<at::Tensor> AllToAll(const std::vector<at::Tensor>& send,
                                   std::span<const int64_t> counts) override {
    const uint64_t call = watch_->Begin("NCCL all-to-all", 0);
    at::cuda::CUDAEvent ready, done;
    ready.record(c10::cuda::getCurrentCUDAStream());
    std::vector<at::Tensor> parts;
    for (const int64_t rows : counts) {
      parts.push_back(at::empty({rows, send[0].size(1)}, send[0].options()));
    }
    ready.block(stream_);
    Check(ncclGroupStart(), "group start");
    for (size_t r = 0; r < send.size(); ++r) {
      const auto peer = static_cast<int>(r);
      if (send[r].numel() > 0) {
        ncclSend(send[r].const_data_ptr(), send[r].nbytes(), ncclChar, peer, comm_,
                 stream_);
      }
      if (parts[r].numel() > 0) {
        ncclRecv(parts[r].mutable_data_ptr(), parts[r].nbytes(), ncclChar, peer, comm_,
                 stream_);
      }
    }
    Check(ncclGroupEnd(), "all-to-all");
    done.record(stream_);
    Await(done, call);  // so that nobody frees or overwrites what still travels
    return parts;
  }
  std::vector<std::string> AllGather(const std::string& bytes) override {
    return host_->AllGather(bytes);
  }
  void Barrier() override { host_->Barrier(); }

  // Polls the event and NCCL's asynchronous error up to the deadline.
  void Await(at::cuda::CUDAEvent& event, uint64_t call) {
    const auto start = Clock::now();
    while (!IsOver(event, call)) {
      ncclResult_t state = ncclSuccess;
      ncclCommGetAsyncError(comm_, &state);
      const double waited = std::chrono::duration<double>(Clock::now() - start).count();
      if (state != ncclSuccess && state != ncclInProgress) {
        Abort("call " + std::to_string(call), ncclGetErrorString(state));
      }
      if (waited > deadline_) {
        const EnvironmentError error = watch_->Overdue(call, waited);
        AbortWithin(error);
        throw error;
      }
      std::this_thread::yield();
    }
    watch_->End(call);
  }

 private:
  bool IsOver(at::cuda::CUDAEvent& event, uint64_t call) {
    try {
      return event.query();
    } catch (const c10::Error& e) {
      const std::string text = e.what_without_backtrace();
      Abort("call " + std::to_string(call), text.substr(0, text.find('\n')));
    }
  }
  [[noreturn]] void Abort(const std::string& call, const std::string& reason) {
    const EnvironmentError error = FailureOf(rank_, call, reason);
    AbortWithin(error);
    throw error;
  }
  // Behind an error of the device, which every later call to it gives again, NCCL may
  // never come back.
  void AbortWithin(const EnvironmentError& error) {
    EndUnlessDone(deadline_, error.what(), [this] { ncclCommAbort(comm_); });
    comm_ = nullptr;
  }
  // Non-blocking calls answer ncclInProgress: wait until they are through, up to the
  // deadline.
  void Check(ncclResult_t result, const char* call) {
    const auto start = Clock::now();
    while (result == ncclInProgress) {
      if (ncclCommGetAsyncError(comm_, &result) != ncclSuccess) break;
      const double waited = std::chrono::duration<double>(Clock::now() - start).count();
      if (waited > deadline_)
        Abort(call, "waited " + std::to_string(int(waited)) + " s for a peer");
      std::this_thread::yield();
    }
    if (result != ncclSuccess) Fail(rank_, call, ncclGetErrorString(result));
  }

  std::unique_ptr<Communicator> host_;
  RankInfo rank_;
  at::Device device_;
  double deadline_;
  std::shared_ptr<CallWatch> watch_;
  c10::cuda::CUDAGuard guard_;
  c10::cuda::CUDAStream stream_;
  ncclComm_t comm_ = nullptr;
};

void NcclReduce::Wait() {
  owner_->Await(done, call_);
  done.block(c10::cuda::getCurrentCUDAStream());
}

}  // namespace

std::string DeviceName(at::Device device) {
  char host[256] = {};
  ::gethostname(host, sizeof host - 1);
  std::string text = std::string(host) + " GPU-";
  for (const char byte : at::cuda::getDeviceProperties(device.index())->uuid.bytes) {
    char hex[3];
    std::snprintf(hex, sizeof hex, "%02x", static_cast<unsigned char>(byte));
    text += hex;
  }
  return text;
}

std::unique_ptr<Communicator> MakeNcclCommunicator(
    std::unique_ptr<Communicator> bootstrap, at::Device device, double deadline_seconds,
    std::shared_ptr<CallWatch> watch) {
  return std::make_unique<NcclCommunicator>(std::move(bootstrap), device,
                                            deadline_seconds, std::move(watch));
}

}  // namespace routecast
