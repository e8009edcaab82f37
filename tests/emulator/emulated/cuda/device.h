// Stands in for csrc/cuda/device.h: found first on the include path of the tests' build.
#pragma once

#include "../../cuda_on_cpu.h"
