#include "launch.cuh"

namespace stof::bolt {
STOF_BOLT_SM75(STOF_BOLT_COMPILE)
}
