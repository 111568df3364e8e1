#include "models/device_choice.h"

#include <ATen/Context.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include "common/errors.h"

namespace routecast {
namespace {

std::string Found(int num_cuda) {
  return std::to_string(num_cuda) +
         (num_cuda == 1 ? " CUDA device was found" : " CUDA devices were found");
}

// N of cuda:N, or -1.
int IndexOf(const std::string& name) {
  const bool number = name.rfind("cuda:", 0) == 0 && name.size() > 5 && name.size() < 9 &&
                      name.find_first_not_of("0123456789", 5) == std::string::npos;
  return number ? std::stoi(name.substr(5)) : -1;
}

}  // namespace

int NumCudaDevices() {
  return at::hasCUDA() ? static_cast<int>(at::detail::getCUDAHooks().deviceCount()) : 0;
}

c10::Device ChooseDevice(const std::string& name, int local_rank, int num_cuda) {
  if (name == "cpu" || (name == "auto" && num_cuda == 0)) return c10::Device(c10::kCPU);
  int index = IndexOf(name);
  if (index < 0) ParseChoice("--device", name, {"auto", "cpu", "cuda", "cuda:0"});
  if (index < 0 && num_cuda > 0) index = local_rank % num_cuda;
  if (index >= 0 && index < num_cuda) {
    return {c10::kCUDA, static_cast<c10::DeviceIndex>(index)};
  }
  throw EnvironmentError(ErrorText(
      "--device=" + name + ": no such CUDA device", Found(num_cuda),
      num_cuda == 0 ? "use --device=cpu, or a build and a driver with CUDA"
                    : "use --device=cuda:0 to cuda:" + std::to_string(num_cuda - 1)));
}

void Synchronize(c10::Device device) {
  if (device.is_cpu()) return;
  c10::impl::VirtualGuardImpl(device.type()).synchronizeDevice(device.index());
}

}  // namespace routecast
