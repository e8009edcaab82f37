#include "native/emulated_avx512.h"

#include "cpu/capture/avx512_bf16.cpp"
