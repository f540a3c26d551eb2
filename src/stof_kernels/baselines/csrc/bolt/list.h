// The candidates of Bolt's profiler and the instances of its persistent kernels, as one list for host, device and tests.
#pragma once

// X(m, n, k, stages, warps along m, n and k, k of the tensor-core instruction); a candidate's number is its place in the list.
#define STOF_BOLT_SM75(X)         \
  X(256, 128, 32, 2, 4, 2, 1, 8)  \
  X(128, 256, 32, 2, 2, 4, 1, 8)  \
  X(128, 128, 32, 2, 2, 2, 1, 8)  \
  X(64, 128, 32, 2, 2, 2, 1, 8)   \
  X(128, 64, 32, 2, 2, 2, 1, 8)   \
  X(64, 64, 32, 2, 2, 2, 1, 8)    \
  X(64, 128, 64, 2, 1, 2, 2, 8)
#define STOF_BOLT_SM80_WIDE(X)    \
  X(256, 128, 32, 3, 4, 2, 1, 16) \
  X(128, 256, 32, 3, 2, 4, 1, 16) \
  X(256, 64, 32, 4, 4, 1, 1, 16)  \
  X(64, 256, 32, 4, 1, 4, 1, 16)
#define STOF_BOLT_SM80_SQUARE(X)  \
  X(128, 128, 32, 3, 2, 2, 1, 16) \
  X(128, 128, 32, 4, 2, 2, 1, 16) \
  X(128, 128, 32, 5, 2, 2, 1, 16) \
  X(128, 64, 32, 6, 2, 2, 1, 16)  \
  X(64, 128, 32, 6, 2, 2, 1, 16)  \
  X(64, 64, 32, 10, 2, 2, 1, 16)
#define STOF_BOLT_SM80_DEEP_WIDE(X) \
  X(256, 128, 64, 3, 4, 2, 1, 16)   \
  X(128, 256, 64, 3, 2, 4, 1, 16)   \
  X(256, 64, 64, 4, 4, 1, 1, 16)    \
  X(64, 256, 64, 4, 1, 4, 1, 16)
#define STOF_BOLT_SM80_DEEP_SQUARE(X) \
  X(128, 128, 64, 4, 2, 2, 1, 16)     \
  X(128, 64, 64, 3, 2, 2, 1, 16)      \
  X(64, 128, 64, 3, 2, 2, 1, 16)      \
  X(64, 64, 64, 5, 2, 2, 1, 16)
#define STOF_BOLT_ALL(X)      \
  STOF_BOLT_SM75(X)           \
  STOF_BOLT_SM80_WIDE(X)      \
  STOF_BOLT_SM80_SQUARE(X)    \
  STOF_BOLT_SM80_DEEP_WIDE(X) \
  STOF_BOLT_SM80_DEEP_SQUARE(X)

// X(n of the first product, n of the second): one block of 64 rows holds both. First operand of the second product in registers
// or in shared memory.
#define STOF_BOLT_REGISTERS(X) X(64, 64) X(64, 128) X(128, 64) X(128, 128)
#define STOF_BOLT_SHARED(X) X(64, 256) X(128, 256) X(256, 64) X(256, 128) X(256, 256)
