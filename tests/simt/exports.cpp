// What the extension's module.cpp shows to Python, for ctypes.
#include <cstdint>
#include <string>

#include "plans.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT const char* refusal(const char* op, const char* dtype, int64_t group_size, int64_t height, int64_t width) {
  static thread_local std::string reason;
  reason = nk::refusal(op, dtype, group_size, {height, width}, nk::device_of(0).architecture);
  return reason.c_str();
}
