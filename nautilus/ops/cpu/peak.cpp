// The most probable token of each row of logits, and the logarithm of the sum of their exponentials: of all numbers that a
// draw needs at a temperature of zero.
#include "kernels.h"
#include "simd.h"

namespace {

constexpr int64_t PART = 1024;  // logits whose exponentials are added up as floats, in W chains

// A part's last numbers, filled up with what changes nothing.
struct Tail {
  alignas(64) float numbers[W];
  Tail(const float* from, int64_t count) {
    for (float& number : numbers) number = -INFINITY;
    memcpy(numbers, from, static_cast<size_t>(count) * sizeof(float));
  }
};

template <class Each>
void vectors(const float* x, int64_t count, Each each) {
  int64_t i = 0;
  for (; i + W <= count; i += W) each(load(x + i));
  if (i < count) each(load(Tail(x + i, count - i).numbers));
}

void peak(const Peak* p, int64_t row) {
  const float* x = p->logits + row * p->vocab;
  float largest = -INFINITY;
  int64_t where = 0;
  for (int64_t i = 0; i < p->vocab; i += PART) {
    F most = set(-INFINITY);
    vectors(x + i, p->vocab - i < PART ? p->vocab - i : PART, [&](F v) { most = larger(v, most); });
    if (largest_lane(most) > largest) largest = largest_lane(most), where = i;
  }
  double sum = 0.0;
  F odd = set(0.0f);  // no number once a logit is none
  for (int64_t i = 0; i < p->vocab; i += PART) {
    F part = set(0.0f);
    vectors(x + i, p->vocab - i < PART ? p->vocab - i : PART, [&](F v) {
      part = part + exp(v - set(largest));
      odd = odd + (v - v);
    });
    sum += static_cast<double>(sum_lanes(part));
  }
  if (!(sum_lanes(odd) == 0.0f)) {  // -infinity is allowed: a token that may not come
    for (int64_t i = 0; i < p->vocab; i++)
      if (!(x[i] < INFINITY)) sum = NAN;
  }
  while (where < p->vocab && x[where] != largest) where++;
  p->best[row] = where;
  p->total[row] = static_cast<double>(largest) + ::log(sum);
}

}  // namespace

void NAUTILUS_FILL(peak)(Kernels* k) { k->peak = peak; }
