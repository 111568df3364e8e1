// Which device a rank computes on. Pure functions: any thread.
#pragma once

#include <c10/core/Device.h>

#include <string>

namespace routecast {

// --device (auto, cpu, cuda, cuda:N) for a rank of a machine with `num_cuda` devices.
// auto and cuda give the ranks of a machine its devices in turn; auto is the CPU where
// there is none. Throws EnvironmentError (no such device), UsageError (not a name).
c10::Device ChooseDevice(const std::string& name, int local_rank, int num_cuda);

// Returns when `device` has done all work given to it; at once for the CPU.
void Synchronize(c10::Device device);

// The major compute capability of a CUDA device. REQUIRES that it is there.
int CudaComputeMajor(int index);

// The CUDA devices of this machine; 0 in a build without CUDA.
int NumCudaDevices();

}  // namespace routecast
