#include "tests/support/host_reads.h"

#include <ATen/record_function.h>

#include <string_view>

namespace routecast {
namespace {

thread_local int reads = 0, inside_adamw = 0;

bool IsAdamW(const at::RecordFunction& call) {
  return std::string_view(call.name()) == "aten::_fused_adamw_";
}

std::unique_ptr<at::ObserverContext> Begin(const at::RecordFunction& call) {
  if (IsAdamW(call)) ++inside_adamw;
  if (inside_adamw == 0 && std::string_view(call.name()) == "aten::_local_scalar_dense") {
    ++reads;
  }
  return nullptr;
}

void End(const at::RecordFunction& call, at::ObserverContext*) {
  if (IsAdamW(call)) --inside_adamw;
}

}  // namespace

int HostReads(const std::function<void()>& work) {
  struct Counting {
    at::CallbackHandle handle = at::addThreadLocalCallback(
        at::RecordFunctionCallback(Begin, End).scopes({at::RecordScope::FUNCTION}));
    Counting() { reads = inside_adamw = 0; }
    ~Counting() { at::removeCallback(handle); }
  } counting;
  work();
  return reads;
}

}  // namespace routecast
