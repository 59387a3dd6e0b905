// Rotary positions. An angle is a product in double, so that it is exact far into a text; its sine and cosine are computed
// here, in the same way at every level, to 1e-11 and then rounded to float.
#include "kernels.h"
#include "simd.h"

namespace {

constexpr int64_t PART = 64;  // pairs of channels whose angles are held at a time

// Of position * frequency[i]. With the nearest whole number of quarter turns taken away, an angle lies within pi / 4 of 0,
// where series of six terms suffice: what is left out is below r^13 / 13! = 7e-12.
void turn(double position, const double* frequency, int64_t count, float* cosine, float* sine) {
  constexpr double WHOLE = 0x1.8p52;  // added, it leaves a whole number in the lowest bits
  for (int64_t i = 0; i < count; i++) {
    double quarters = position * frequency[i] * 0.63661977236758134308, near = quarters + WHOLE;
    uint64_t quadrant;
    memcpy(&quadrant, &near, 8);
    double r = (quarters - (near - WHOLE)) * 1.57079632679489661923, q = r * r;
    double s = 1.0 / 120 + q * (-1.0 / 5040 + q * (1.0 / 362880 + q * (-1.0 / 39916800)));
    double c = 1.0 / 24 + q * (-1.0 / 720 + q * (1.0 / 40320 + q * (-1.0 / 3628800 + q * (1.0 / 479001600))));
    s = r + r * q * (-1.0 / 6 + q * s);
    c = 1.0 + q * (-0.5 + q * c);
    double other = quadrant & 1 ? c : s;
    c = quadrant & 1 ? s : c;
    sine[i] = static_cast<float>(quadrant & 2 ? -other : other);
    cosine[i] = static_cast<float>((quadrant + 1) & 2 ? -c : c);
  }
}

template <class T>
void rotate(const Rotary* f, int64_t token) {
  float cosine[PART], sine[PART];
  int64_t half = f->width / 2;
  for (int64_t part = 0; part < half; part += PART) {
    int64_t count = half - part < PART ? half - part : PART;
    turn(static_cast<double>(f->position[token]), f->frequency + part, count, cosine, sine);
    for (int64_t head = 0; head < f->heads; head++) {
      int64_t at = (token * f->heads + head) * f->width + part;
      const T* x = static_cast<const T*>(f->x) + at;
      T* y = static_cast<T*>(f->y) + at;
      for (int64_t i = 0; i < count; i += W) {
        int64_t rest = count - i;
        F c = load(cosine + i, rest), s = load(sine + i, rest), left = load(x + i, rest), right = load(x + half + i, rest);
        store(y + i, left * c - right * s, rest);
        store(y + half + i, right * c + left * s, rest);
      }
    }
  }
}

void rotary(const Rotary* f, int64_t block) {
  int64_t end = (block + 1) * ROTARY_BLOCK < f->tokens ? (block + 1) * ROTARY_BLOCK : f->tokens;
  for (int64_t token = block * ROTARY_BLOCK; token < end; token++) f->bf16 ? rotate<uint16_t>(f, token) : rotate<float>(f, token);
}

}  // namespace

void NAUTILUS_FILL(rotary)(Kernels* k) { k->rotary = rotary; }
