// One view of the contrast spread over its pixels.
#pragma once

#include "carve.h"
#include "cpu/simd/isa.h"

namespace carve {

// grid [grid_h, grid_w] to out [height, width]: bilinear, with antialias where it shrinks.
void resize(Isa isa, const double* grid, const ViewShape& view, float* out);

}  // namespace carve
