// Takes the place of csrc/device/half.h.
#pragma once

#include <torch/headeronly/util/Half.h>

#include <cstdint>

namespace nk {

inline float half_to_float(uint16_t bits) {
  return torch::headeronly::Half(bits, torch::headeronly::Half::from_bits());
}

inline uint16_t float_to_half(float value) {
  return torch::headeronly::Half(value).x;
}

}  // namespace nk
