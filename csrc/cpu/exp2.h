// Powers of two of registers of floats. In an unnamed namespace on purpose, see kernels.h.
#pragma once
#include <stdint.h>
#include <string.h>

namespace mxdit {
namespace {

// The larger; NaN where b is.
template <class F>
[[gnu::always_inline]] inline F larger(F a, F b) {
  return a > b ? a : b;
}

// 2^x for x up to 0, and 0 below -126.5; NaN for NaN. The nearest whole number goes into the exponent, and a polynomial takes
// the rest, fitted for the least relative error on [-0.5, 0.5]: of degree 6 2e-9 (and fp32's rounding), of degree 4 3e-6,
// which is little beside bf16's rounding.
template <class V>
[[gnu::always_inline]] inline typename V::F exp2_of(typename V::F x) {
  using F = typename V::F;
  typedef uint32_t I __attribute__((vector_size(sizeof(F))));
  const F shift = V::all(0x1.8p23f + 127.0f);  // its sum with x has x, rounded and biased, in its lowest bits
  x = larger(V::all(-127.0f), x);
  const F rounded = x + shift, rest = x - (rounded - shift);
  F power;
  if constexpr (V::kBits > 16) {
    power = V::multiply_add(V::all(0x1.41d334p-13f), rest, V::all(0x1.5f456ap-10f));
    power = V::multiply_add(power, rest, V::all(0x1.3b2dbcp-7f));
    power = V::multiply_add(power, rest, V::all(0x1.c6aed4p-5f));
    power = V::multiply_add(power, rest, V::all(0x1.ebfbdap-3f));
    power = V::multiply_add(power, rest, V::all(0x1.62e430p-1f));
    power = V::multiply_add(power, rest, V::all(1.0f));
  } else {
    power = V::multiply_add(V::all(0x1.3997d6p-7f), rest, V::all(0x1.ca1440p-5f));
    power = V::multiply_add(power, rest, V::all(0x1.ec06dap-3f));
    power = V::multiply_add(power, rest, V::all(0x1.62e0dcp-1f));
    power = V::multiply_add(power, rest, V::all(0x1.ffffe8p-1f));
  }
  I bits;
  memcpy(&bits, &rounded, sizeof bits);
  bits <<= 23;
  F scale;
  memcpy(&scale, &bits, sizeof scale);
  return power * scale;
}

}  // namespace
}  // namespace mxdit
