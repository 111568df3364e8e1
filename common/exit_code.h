// What an exception means for who started the program: the one place that says so.
#pragma once

#include <exception>

namespace routecast {

// The exit code (common/errors.h) of a program that ends with `error`. Memory that is not
// to be had, on the host or on a device, is the environment's, whichever library says so.
int ExitCodeOf(const std::exception& error);
// True where a library says that memory is not to be had; our own errors name what was
// too large.
bool IsOutOfMemory(const std::exception& error);
// True where a library's words say that a CUDA device, its driver or its set-up is at
// fault, and no program could mend it.
bool IsDeviceTrouble(const std::exception& error);

}  // namespace routecast
