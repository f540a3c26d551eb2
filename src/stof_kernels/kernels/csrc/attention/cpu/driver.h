// Entry point of the CPU attention kernels.
#pragma once

#include <functional>
#include <string>

#include "problem.h"

namespace stof::cpu {

// Calls body(worker) for every worker in [0, workers), on as many threads as the host offers.
struct Workers {
  int count = 1;
  std::function<void(int, const std::function<void(int)>&)> run;
};

// Reads every list once. Returns an empty string, or what is wrong with them: a corrupt list must not be
// followed.
std::string check_lists(const Mask& mask);

// The plan that is used when the caller has none: the cheaper kernel by a measured cost model.
Plan default_plan(const Problem& p, int64_t listed_cells, int64_t kept_pairs);

// Writes out and lse. Results do not depend on the number of workers.
void attention(const Problem& p, const Plan& plan, const Workers& workers);

// out = lse = NaN: the mask did not fit its buffers.
void poison(const Problem& p);

// The instruction set in use: "avx512", "avx2" or "baseline".
const char* instruction_set();

// Makes later calls use another one (tests compare them); false if this machine does not have it.
bool use_instruction_set(const char* name);

}  // namespace stof::cpu
