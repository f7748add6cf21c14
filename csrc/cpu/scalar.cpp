// Plain C++ for any CPU: GCC and Clang lower the four-lane registers to what there is.
#include "float_attention.h"
#include "float_product.h"

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

}  // namespace

Path scalar_path() { return {"scalar", encode_any, decode_any, float_product<Plain>, float_product<Plain>, float_attention<Plain>}; }

}  // namespace mxdit
