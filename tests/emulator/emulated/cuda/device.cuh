// Replaces csrc/cuda/device.cuh: the include path of the tests' build finds it first.
#pragma once

#include "../../cuda_on_cpu.h"
