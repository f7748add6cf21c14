// Plain C++ for any CPU: GCC and Clang lower the four-lane registers to what there is.
#include "float_attention.h"
#include "float_product.h"
#include "int8_attention.h"
#include "rowwise.h"

namespace mxdit {
namespace {

struct Plain {
  static constexpr int kLanes = 4, kVectors = 2, kFloatRows = 4;
  typedef float F __attribute__((vector_size(16)));

  static constexpr auto encode = encode_any;
  static F all(float x) { return F{x, x, x, x}; }
  static F load(const float* p) {
    F x;
    memcpy(&x, p, sizeof x);
    return x;
  }
  static void store(float* p, F x) { memcpy(p, &x, sizeof x); }
  static F multiply_add(F a, F b, F c) { return a * b + c; }
  static F fma(F a, F b, F c) {
    for (int i = 0; i < kLanes; i++) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return c;
  }
};

struct PlainInt8 : Plain {
  static constexpr int kRows = 4, kSide = 2, kTogether = 1, kQueryOffset = 0, kValueOffset = 0;
  typedef int16_t Code;
  typedef int32_t I __attribute__((vector_size(16)));

  static F max(F a, F b) { return a > b ? a : b; }
  static I dot_keys(I sum, const I* x, const Code* two) { return sum + (x[0] << 16 >> 16) * two[0] + (x[0] >> 16) * two[1]; }
  static I dot_values(I sum, const I* x, const Code* two) { return dot_keys(sum, x, two); }
  static I add_codes(I sum, I x) { return sum + (x & 0xFFFF) + (x >> 16); }
};

Attention attention(const MxAttention& job) {
  return job.method == MX_INT8 ? int8_attention<PlainInt8>(job) : float_attention<Plain>(job);
}

}  // namespace

Path scalar_path() { return {"scalar", encode_any, decode_any, float_product<Plain>, float_product<Plain>, attention, rowwise}; }

}  // namespace mxdit
