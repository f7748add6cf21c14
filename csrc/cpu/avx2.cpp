// AVX2 with FMA: Haswell and newer, Zen and newer.
#include "float_attention.h"
#include "int_avx2.h"

namespace mxdit {
namespace {

Product fast(const MxLinear& job) {
  return four_bit(job) ? int_product<Avx2>(job) : float_product<Avx2>(job);
}

}  // namespace

Path avx2_path() { return {"avx2", encode_any, decode_any, fast, float_product<Avx2>, float_attention<Avx2>}; }

}  // namespace mxdit
