// Images that are hard for regions, by number.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

constexpr int kPatterns = 12;

template <class T>
T pattern(int kind, int64_t y, int64_t x) {
  switch (kind) {
    case 0:
      return static_cast<T>((y * 7919 + x * 104729) % 1009) - T(300);  // noise, ties, negative values
    case 1:
      return static_cast<T>((y + x) % 2);  // as many regions as there can be
    case 2:
      return static_cast<T>(y % 4 == 0 || (y % 4 == 2 && x % 9 == 0));  // plateaus
    case 3:
      return std::exp(static_cast<T>(((y * 31 + x * 17) % 97) - 60));  // over many magnitudes
    case 4:
      return (x % 5 == 0 ? T(1) : T(-1)) * std::numeric_limits<T>::max();  // a range that overflows
    case 5:
      return x == 3 ? std::numeric_limits<T>::quiet_NaN() : static_cast<T>(x);
    case 6:
      return std::numeric_limits<T>::denorm_min() * static_cast<T>((x * y) % 5);
    case 7:
      return (x + y) % 23 == 0 ? static_cast<T>(x) : (x * y) % 3 ? T(0) : T(-0.0);  // zeros of both signs
    case 8:  // values that differ only in their last bits
      return T(1000) + static_cast<T>((y * 31 + x * 17) % 1009) * 8 * 512 * std::numeric_limits<T>::epsilon();
    case 9:  // and that follow each other
      return T(1) + static_cast<T>((y * 31 + x * 17) % 1009) * std::numeric_limits<T>::epsilon();
    case 10: {  // noise without an order, whose runs have all lengths
      uint32_t mixed = static_cast<uint32_t>(y) * 2654435761u ^ static_cast<uint32_t>(x) * 2246822519u;
      mixed = (mixed ^ mixed >> 15) * 2246822519u;
      mixed = (mixed ^ mixed >> 13) * 3266489917u;
      return static_cast<T>((mixed ^ mixed >> 16) % 4096);
    }
    default:
      return T(3.3);
  }
}
