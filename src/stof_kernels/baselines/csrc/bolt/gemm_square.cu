#include "launch.cuh"

namespace stof::bolt {
STOF_BOLT_SM80_SQUARE(STOF_BOLT_COMPILE)
}
