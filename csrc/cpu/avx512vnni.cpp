// AVX-512 with byte dot products: Cascade Lake and newer, Zen 4 and newer.
#include "float_attention.h"
#include "int8_attention_avx512.h"
#include "int_avx512.h"
#include "rowwise.h"

namespace mxdit {
namespace {

Attention attention(const MxAttention& job) {
  return job.method == MX_INT8 ? int8_attention<VnniInt8>(job) : float_attention<Vnni>(job);
}

Product fast(const MxLinear& job) {
  return four_bit(job) ? int_product<Vnni>(job) : float_product<Vnni>(job);
}

}  // namespace

Path avx512vnni_path() { return {"avx512vnni", encode_avx512, decode_any, fast, float_product<Vnni>, attention, rowwise}; }

}  // namespace mxdit
