// Tensor maps for the copy engine, made on the host.
#pragma once

#include "problem.h"

namespace stof::cuda {

struct HopperMaps;

// False where the driver has no such maps or the strides do not fit them: the caller takes another kernel.
bool make_hopper_maps(const Problem& problem, HopperMaps* maps);

}  // namespace stof::cuda
