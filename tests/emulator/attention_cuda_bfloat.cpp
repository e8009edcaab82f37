// For a quick build: all types compile the same source.
#define BFLOAT_ALONE
#include "attention_cuda.cpp"
