// Attributes that decide for which instructions a function is compiled.
#pragma once

// A function is compiled for the instruction set of its caller only if it is inlined there.
#define CARVE_INLINE_LAMBDA __attribute__((always_inline))
#define CARVE_INLINE inline CARVE_INLINE_LAMBDA

// All functions from here to CARVE_END_TARGET, the last line of a file, are compiled for these instructions. No
// function of the standard library may be among them: the linker keeps one copy of an inline function for the whole
// library, and on older processors that copy would use instructions that they lack.
#define CARVE_PRAGMA(text) _Pragma(#text)
#ifdef __clang__
#define CARVE_BEGIN_TARGET(features) \
  CARVE_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define CARVE_END_TARGET CARVE_PRAGMA(clang attribute pop)
#else
#define CARVE_BEGIN_TARGET(features) CARVE_PRAGMA(GCC target(features))
#define CARVE_END_TARGET
#endif

// Compilers repeat a load in each instruction that uses its value; a value that is kept is loaded once.
#define CARVE_KEEP(kind, value) __asm__("" : "+" kind(value))
