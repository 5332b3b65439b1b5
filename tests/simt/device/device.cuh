// Takes the place of csrc/device/device.cuh: kernels run on a CPU.
#pragma once

#include "simt.h"
