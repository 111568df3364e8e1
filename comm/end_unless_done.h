// A deadline over calls that may never come back.
#pragma once

#include <functional>
#include <string>

namespace routecast {

// Runs `work` on the caller's thread. Where it has not come back after `seconds`, prints
// `error` (as ErrorText makes it) and ends this process with exit code 4, on a thread of
// its own; mpirun then ends the other ranks. For what cannot be stopped in another way:
// destructors are not run. What `work` throws goes on. Thread rule: any thread.
void EndUnlessDone(double seconds, const std::string& error,
                   const std::function<void()>& work);

}  // namespace routecast
