// One instruction set's kernels. The build compiles this file once per set with -DSTOF_ISA=<namespace> and
// its flags.
#include "variant.h"

#include "block_wise.h"
#include "pack.h"
#include "row_wise.h"

#define STOF_NAME_(x) #x
#define STOF_NAME(x) STOF_NAME_(x)

namespace stof::cpu::STOF_ISA {

const Variant& variant() {
  static constexpr Variant table = {STOF_NAME(STOF_ISA), pack_panel, pack_rows, block_wise, row_wise};
  return table;
}

}  // namespace stof::cpu::STOF_ISA
