// silu(x) = x sigmoid(x), and its derivative.
#pragma once

#include "simd.h"

namespace {

inline F silu(F x) { return x * sigmoid(x); }
inline F silu_slope(F x) {
  F s = sigmoid(x);
  return s + x * s * (set(1.0f) - s);
}

}  // namespace
