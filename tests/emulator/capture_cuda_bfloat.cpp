// For a quick build: what is compiled for bfloat16 is the same source as for the other types.
#define BFLOAT_ALONE
#include "capture_cuda.cpp"
