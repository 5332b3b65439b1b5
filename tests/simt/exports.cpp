// The functions that module.cpp shows to Python, for ctypes: see build.py.
#include <cstdint>
#include <sstream>
#include <string>

#include "common/plans.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

static thread_local std::string answer;

EXPORT const char* refusal(const char* op, const char* dtype, int64_t group_size, int64_t height, int64_t width,
                           int architecture) {
  answer = nk::refusal(op, dtype, group_size, {height, width}, architecture);
  return answer.c_str();
}

EXPORT void record(int architecture, int processors, int shared_bytes) {
  nk::record({architecture, processors, shared_bytes});
}

// Returns the launches as JSON.
EXPORT const char* recorded() {
  std::ostringstream text;
  for (const auto& plan : nk::recorded()) {
    text << (text.tellp() ? ", " : "") << "{\"kernel\": \"" << plan.kernel << "\", \"grid\": [" << plan.grid[0] << ", "
         << plan.grid[1] << ", " << plan.grid[2] << "], \"threads\": " << plan.threads
         << ", \"shared_bytes\": " << plan.shared_bytes << ", \"read_bytes\": " << plan.read_bytes
         << ", \"written_bytes\": " << plan.written_bytes << "}";
  }
  answer = "[" + text.str() + "]";
  return answer.c_str();
}
