// Resize of one view from its token grid to pixels.
#pragma once

#include "carve.h"
#include "cpu/simd/isa.h"

namespace carve {

// grid [grid_h, grid_w] to out [height, width]: bilinear, with antialiasing where it shrinks.
void resize(Isa isa, const double* grid, const ViewShape& view, float* out);

}  // namespace carve
