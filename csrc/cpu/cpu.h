// What this CPU, and its operating system, let a program run.
#pragma once

namespace mxdit {

bool cpu_runs_avx2();        // with FMA
bool cpu_runs_avx512vnni();  // with BW, VL, DQ, VNNI
bool cpu_runs_avx512bf16();  // the above, with BF16 dot products
bool cpu_runs_amx();         // the above, with BF16 tiles, which the process then has permission to use
bool cpu_runs_neon();        // with byte dot products

}  // namespace mxdit
