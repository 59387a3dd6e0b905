// One vector of floats, F, with W lanes, at the instruction level this file is compiled for.
//
// Every kernel is written once in terms of F and compiled once per level. A level is a translation unit of its own with
// its own compiler flags, so nothing here may have external linkage: a function shared between levels would be kept by
// the linker in one version only, perhaps one that the machine cannot run.
//
// ARM has two levels in NEON, with and without the dot product of bytes. F has eight lanes there, two registers side by
// side: as many as with AVX2, whose bits both give, and more chains at a time than one register's lanes would be.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
#include <immintrin.h>
#elif defined(__AVX2__)
#include <immintrin.h>
#elif defined(NAUTILUS_NEON)
#include <arm_neon.h>
#endif

namespace {

#if defined(__AVX512F__)

struct F {
  static constexpr int W = 16;
  __m512 v;
};
inline F load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void store(float* p, F a) { _mm512_storeu_ps(p, a.v); }
inline F set(float x) { return {_mm512_set1_ps(x)}; }
inline F operator+(F a, F b) { return {_mm512_add_ps(a.v, b.v)}; }
inline F operator-(F a, F b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline F operator*(F a, F b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline F operator/(F a, F b) { return {_mm512_div_ps(a.v, b.v)}; }
inline F fma(F a, F b, F c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
// The second operand is given back where either is NaN: NaN in `b` passes through.
inline F larger(F a, F b) { return {_mm512_max_ps(a.v, b.v)}; }
inline F smaller(F a, F b) { return {_mm512_min_ps(a.v, b.v)}; }
inline F round_whole(F a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline F times_power_of_two(F a, F whole) { return {_mm512_scalef_ps(a.v, whole.v)}; }
inline F load(const uint16_t* p) {
  __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
}
inline void store(uint16_t* p, F a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(a.v));
}
inline float sum_lanes(F a) { return _mm512_reduce_add_ps(a.v); }
inline float largest_lane(F a) { return _mm512_reduce_max_ps(a.v); }

#elif defined(__AVX2__)

struct F {
  static constexpr int W = 8;
  __m256 v;
};
inline F load(const float* p) { return {_mm256_loadu_ps(p)}; }
inline void store(float* p, F a) { _mm256_storeu_ps(p, a.v); }
inline F set(float x) { return {_mm256_set1_ps(x)}; }
inline F operator+(F a, F b) { return {_mm256_add_ps(a.v, b.v)}; }
inline F operator-(F a, F b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline F operator*(F a, F b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline F operator/(F a, F b) { return {_mm256_div_ps(a.v, b.v)}; }
inline F fma(F a, F b, F c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline F larger(F a, F b) { return {_mm256_max_ps(a.v, b.v)}; }
inline F smaller(F a, F b) { return {_mm256_min_ps(a.v, b.v)}; }
inline F round_whole(F a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline F times_power_of_two(F a, F whole) {
  __m256i bits = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(whole.v), _mm256_set1_epi32(127)), 23);
  return {_mm256_mul_ps(a.v, _mm256_castsi256_ps(bits))};
}
inline F load(const uint16_t* p) {
  __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16))};
}
inline void store(uint16_t* p, F a) {
  __m256i bits = _mm256_castps_si256(a.v);
  __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i near = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
  __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
  near = _mm256_srli_epi32(_mm256_blendv_epi8(near, _mm256_set1_epi32(0x7FC00000), nan), 16);
  __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(near, near), 0xD8);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}
inline float sum_lanes(F a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}
inline float largest_lane(F a) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_shuffle_ps(s, s, 1)));
}

#elif defined(NAUTILUS_NEON)

struct F {
  static constexpr int W = 8;
  float32x4_t low, high;
};
inline F load(const float* p) { return {vld1q_f32(p), vld1q_f32(p + 4)}; }
inline void store(float* p, F a) {
  vst1q_f32(p, a.low);
  vst1q_f32(p + 4, a.high);
}
inline F set(float x) { return {vdupq_n_f32(x), vdupq_n_f32(x)}; }
inline F operator+(F a, F b) { return {vaddq_f32(a.low, b.low), vaddq_f32(a.high, b.high)}; }
inline F operator-(F a, F b) { return {vsubq_f32(a.low, b.low), vsubq_f32(a.high, b.high)}; }
inline F operator*(F a, F b) { return {vmulq_f32(a.low, b.low), vmulq_f32(a.high, b.high)}; }
inline F operator/(F a, F b) { return {vdivq_f32(a.low, b.low), vdivq_f32(a.high, b.high)}; }
inline F fma(F a, F b, F c) { return {vfmaq_f32(c.low, a.low, b.low), vfmaq_f32(c.high, a.high, b.high)}; }
// Not vmaxq and vminq, which make NaN of NaN in either operand.
inline float32x4_t larger(float32x4_t a, float32x4_t b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
inline float32x4_t smaller(float32x4_t a, float32x4_t b) { return vbslq_f32(vcltq_f32(a, b), a, b); }
inline F larger(F a, F b) { return {larger(a.low, b.low), larger(a.high, b.high)}; }
inline F smaller(F a, F b) { return {smaller(a.low, b.low), smaller(a.high, b.high)}; }
inline F round_whole(F a) { return {vrndnq_f32(a.low), vrndnq_f32(a.high)}; }
inline float32x4_t times_power_of_two(float32x4_t a, float32x4_t whole) {
  int32x4_t bits = vshlq_n_s32(vaddq_s32(vcvtq_s32_f32(whole), vdupq_n_s32(127)), 23);
  return vmulq_f32(a, vreinterpretq_f32_s32(bits));
}
inline F times_power_of_two(F a, F whole) {
  return {times_power_of_two(a.low, whole.low), times_power_of_two(a.high, whole.high)};
}
inline F load(const uint16_t* p) {
  uint16x8_t half = vld1q_u16(p);
  return {vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(half), 16)), vreinterpretq_f32_u32(vshll_high_n_u16(half, 16))};
}
inline uint16x4_t narrow(float32x4_t a) {
  uint32x4_t bits = vreinterpretq_u32_f32(a), odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  uint32x4_t near = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7FFF)));
  return vshrn_n_u32(vbslq_u32(vceqq_f32(a, a), near, vdupq_n_u32(0x7FC00000)), 16);
}
inline void store(uint16_t* p, F a) { vst1q_u16(p, vcombine_u16(narrow(a.low), narrow(a.high))); }
inline float sum_lanes(F a) {
  float32x4_t s = vaddq_f32(a.low, a.high);
  return vpadds_f32(vadd_f32(vget_low_f32(s), vget_high_f32(s)));
}
inline float largest_lane(F a) { return vmaxvq_f32(larger(a.low, a.high)); }

#else

// Four lanes in plain C++: what any compiler for any machine understands.
struct F {
  static constexpr int W = 4;
  float v[4];
};
template <class Each>
inline F lanes(Each each) {
  F r;
  for (int i = 0; i < 4; i++) r.v[i] = each(i);
  return r;
}
inline F load(const float* p) { return lanes([&](int i) { return p[i]; }); }
inline void store(float* p, F a) { memcpy(p, a.v, sizeof a.v); }
inline F set(float x) { return lanes([&](int) { return x; }); }
inline F operator+(F a, F b) { return lanes([&](int i) { return a.v[i] + b.v[i]; }); }
inline F operator-(F a, F b) { return lanes([&](int i) { return a.v[i] - b.v[i]; }); }
inline F operator*(F a, F b) { return lanes([&](int i) { return a.v[i] * b.v[i]; }); }
inline F operator/(F a, F b) { return lanes([&](int i) { return a.v[i] / b.v[i]; }); }
inline F fma(F a, F b, F c) { return lanes([&](int i) { return a.v[i] * b.v[i] + c.v[i]; }); }
inline F larger(F a, F b) { return lanes([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; }); }
inline F smaller(F a, F b) { return lanes([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; }); }
inline F round_whole(F a) { return lanes([&](int i) { return nearbyintf(a.v[i]); }); }
inline F times_power_of_two(F a, F whole) {
  return lanes([&](int i) { return ldexpf(a.v[i], whole.v[i] == whole.v[i] ? static_cast<int>(whole.v[i]) : 0); });
}
inline float widen(uint16_t x) {
  uint32_t bits = static_cast<uint32_t>(x) << 16;
  float r;
  memcpy(&r, &bits, 4);
  return r;
}
inline F load(const uint16_t* p) { return lanes([&](int i) { return widen(p[i]); }); }
inline void store(uint16_t* p, F a) {
  for (int i = 0; i < 4; i++) {
    uint32_t bits;
    memcpy(&bits, &a.v[i], 4);
    p[i] = a.v[i] != a.v[i] ? 0x7FC0 : static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
  }
}
inline float sum_lanes(F a) { return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]); }
inline float largest_lane(F a) { return fmaxf(fmaxf(a.v[0], a.v[2]), fmaxf(a.v[1], a.v[3])); }

#endif

constexpr int W = F::W;

// Before loops over values that live in registers: an array of vectors stays in memory unless every index is known.
#define UNROLL _Pragma("GCC unroll 32")

// Pairs of bf16 numbers, one pair in each lane, and acc + a_0 b_0 + a_1 b_1 in float32. BF16 instructions treat
// subnormal inputs as zero; the other levels compute them.
#if defined(__AVX512BF16__)
struct Pairs {
  __m512bh v;
};
inline Pairs load_pairs(const uint16_t* p) { return {(__m512bh)_mm512_loadu_si512(p)}; }
inline Pairs set_pair(const uint16_t* p) {
  int both;
  memcpy(&both, p, 4);
  return {(__m512bh)_mm512_set1_epi32(both)};
}
inline F dot(F acc, Pairs a, Pairs b) { return {_mm512_dpbf16_ps(acc.v, a.v, b.v)}; }

// The same numbers as float.
struct Split {
  F even, odd;
};
inline Split load_split(const uint16_t* p) {
  __m512i pairs = _mm512_loadu_si512(p), high = _mm512_set1_epi32(static_cast<int>(0xFFFF0000));
  return {{_mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16))}, {_mm512_castsi512_ps(_mm512_and_si512(pairs, high))}};
}
#else
struct Pairs {
  F even, odd;
};
using Split = Pairs;
#if defined(NAUTILUS_NEON)
inline float32x4_t even_halves(uint32x4_t pairs) { return vreinterpretq_f32_u32(vshlq_n_u32(pairs, 16)); }
inline float32x4_t odd_halves(uint32x4_t pairs) {
  return vreinterpretq_f32_u32(vandq_u32(pairs, vdupq_n_u32(0xFFFF0000)));
}
inline Pairs load_pairs(const uint16_t* p) {
  uint32x4_t low = vreinterpretq_u32_u16(vld1q_u16(p)), high = vreinterpretq_u32_u16(vld1q_u16(p + 8));
  return {{even_halves(low), even_halves(high)}, {odd_halves(low), odd_halves(high)}};
}
inline Pairs set_pair(const uint16_t* p) {
  uint32_t pair;
  memcpy(&pair, p, 4);
  float32x4_t even = even_halves(vdupq_n_u32(pair)), odd = odd_halves(vdupq_n_u32(pair));
  return {{even, even}, {odd, odd}};
}
#elif defined(__AVX2__) && !defined(__AVX512F__)
inline Pairs load_pairs(const uint16_t* p) {
  __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  __m256i odd = _mm256_and_si256(pairs, _mm256_set1_epi32(static_cast<int>(0xFFFF0000)));
  return {{_mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16))}, {_mm256_castsi256_ps(odd)}};
}
inline Pairs set_pair(const uint16_t* p) {
  int both;
  memcpy(&both, p, 4);
  __m256i pair = _mm256_set1_epi32(both), odd = _mm256_and_si256(pair, _mm256_set1_epi32(static_cast<int>(0xFFFF0000)));
  return {{_mm256_castsi256_ps(_mm256_slli_epi32(pair, 16))}, {_mm256_castsi256_ps(odd)}};
}
#else
inline Pairs load_pairs(const uint16_t* p) {
  float even[W], odd[W];
  for (int i = 0; i < W; i++) {
    uint32_t low = static_cast<uint32_t>(p[2 * i]) << 16, high = static_cast<uint32_t>(p[2 * i + 1]) << 16;
    memcpy(even + i, &low, 4);
    memcpy(odd + i, &high, 4);
  }
  return {load(even), load(odd)};
}
inline Pairs set_pair(const uint16_t* p) {
  uint32_t low = static_cast<uint32_t>(p[0]) << 16, high = static_cast<uint32_t>(p[1]) << 16;
  float even, odd;
  memcpy(&even, &low, 4);
  memcpy(&odd, &high, 4);
  return {set(even), set(odd)};
}
#endif
inline F dot(F acc, Pairs a, Pairs b) { return fma(a.odd, b.odd, fma(a.even, b.even, acc)); }
inline Split load_split(const uint16_t* p) { return load_pairs(p); }
#endif

// Two vectors as bf16, lane by lane in pairs.
#if defined(__AVX512BF16__)
inline void store_pairs(uint16_t* p, F even, F odd) {
  alignas(64) static constexpr uint16_t order[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                     8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  __m512i both = (__m512i)_mm512_cvtne2ps_pbh(odd.v, even.v);
  _mm512_storeu_si512(p, _mm512_permutexvar_epi16(_mm512_load_si512(order), both));
}
#else
inline void store_pairs(uint16_t* p, F even, F odd) {
  uint16_t first[W], second[W];
  store(first, even);
  store(second, odd);
  for (int i = 0; i < W; i++) {
    uint32_t both = first[i] | static_cast<uint32_t>(second[i]) << 16;
    memcpy(p + 2 * i, &both, 4);
  }
}
#endif

// Whole numbers, one in each lane; four bytes of a lane at a time meet four bytes of another vector in `dot`. The bytes of
// the first operand are unsigned and at most 127, or signed in `dot_signed`, whose sum comes out larger by SIGNED_BIAS
// times the sum of the second operand. A table of sixteen bytes is looked up by the low or the high half of each byte.
#if defined(__AVX512VNNI__) && defined(__AVX512VBMI__)
struct Ints {
  __m512i v;
};
struct Bytes {
  __m512i v;
};
using Table = Bytes;
constexpr int SIGNED_BIAS = 128;
inline Ints set_int(int32_t x) { return {_mm512_set1_epi32(x)}; }
inline Ints load_ints(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
inline Ints operator+(Ints a, Ints b) { return {_mm512_add_epi32(a.v, b.v)}; }
inline Ints operator*(Ints a, Ints b) { return {_mm512_mullo_epi32(a.v, b.v)}; }
inline F to_float(Ints a) { return {_mm512_cvtepi32_ps(a.v)}; }
inline Bytes load_bytes(const void* p) {
  __m512i v = _mm512_loadu_si512(p);
  asm("" : "+v"(v));  // one load, not one in each instruction that uses it: products are 2 to 5 % faster
  return {v};
}
inline Bytes four_bytes(const int8_t* p) {
  int32_t four;
  memcpy(&four, p, 4);
  return {_mm512_set1_epi32(four)};
}
inline Table table(const int8_t* sixteen) {
  // Repeated: the lookup uses six bits of an index, of which the upper two belong to the other half of the byte.
  return {_mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(sixteen)))};
}
inline Bytes low_halves(Table t, Bytes b) { return {_mm512_permutexvar_epi8(b.v, t.v)}; }
inline Bytes high_halves(Table t, Bytes b) { return {_mm512_permutexvar_epi8(_mm512_srli_epi16(b.v, 4), t.v)}; }
inline Ints dot(Ints sum, Bytes a, Bytes b) { return {_mm512_dpbusd_epi32(sum.v, a.v, b.v)}; }
inline Ints dot_signed(Ints sum, Bytes a, Bytes b) {
  return {_mm512_dpbusd_epi32(sum.v, _mm512_xor_si512(a.v, _mm512_set1_epi8(-128)), b.v)};
}
inline void store_bytes(int8_t* p, F whole) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(whole.v)));
}
#elif defined(__AVX2__) && !defined(__AVX512F__)
struct Ints {
  __m256i v;
};
struct Bytes {
  __m256i v;
};
using Table = Bytes;
constexpr int SIGNED_BIAS = 0;
inline Ints set_int(int32_t x) { return {_mm256_set1_epi32(x)}; }
inline Ints load_ints(const int32_t* p) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))}; }
inline Ints operator+(Ints a, Ints b) { return {_mm256_add_epi32(a.v, b.v)}; }
inline Ints operator*(Ints a, Ints b) { return {_mm256_mullo_epi32(a.v, b.v)}; }
inline F to_float(Ints a) { return {_mm256_cvtepi32_ps(a.v)}; }
inline Bytes load_bytes(const void* p) { return {_mm256_loadu_si256(static_cast<const __m256i*>(p))}; }
inline Bytes four_bytes(const int8_t* p) {
  int32_t four;
  memcpy(&four, p, 4);
  return {_mm256_set1_epi32(four)};
}
inline Table table(const int8_t* sixteen) {
  return {_mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(sixteen)))};
}
inline Bytes low_halves(Table t, Bytes b) {
  return {_mm256_shuffle_epi8(t.v, _mm256_and_si256(b.v, _mm256_set1_epi8(15)))};
}
inline Bytes high_halves(Table t, Bytes b) { return low_halves(t, {_mm256_srli_epi16(b.v, 4)}); }
inline Ints dot(Ints sum, Bytes a, Bytes b) {
  return {_mm256_add_epi32(sum.v, _mm256_madd_epi16(_mm256_maddubs_epi16(a.v, b.v), _mm256_set1_epi16(1)))};
}
inline Ints dot_signed(Ints sum, Bytes a, Bytes b) {
  return dot(sum, {_mm256_abs_epi8(a.v)}, {_mm256_sign_epi8(b.v, a.v)});
}
inline void store_bytes(int8_t* p, F whole) {
  __m256i ints = _mm256_cvtps_epi32(whole.v);
  __m128i halves = _mm_packs_epi32(_mm256_castsi256_si128(ints), _mm256_extracti128_si256(ints, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(halves, halves));
}
#elif defined(NAUTILUS_NEON)
struct Ints {
  int32x4_t low, high;
};
struct Bytes {
  int8x16_t low, high;
};
using Table = int8x16_t;
constexpr int SIGNED_BIAS = 0;
inline Ints set_int(int32_t x) { return {vdupq_n_s32(x), vdupq_n_s32(x)}; }
inline Ints load_ints(const int32_t* p) { return {vld1q_s32(p), vld1q_s32(p + 4)}; }
inline Ints operator+(Ints a, Ints b) { return {vaddq_s32(a.low, b.low), vaddq_s32(a.high, b.high)}; }
inline Ints operator*(Ints a, Ints b) { return {vmulq_s32(a.low, b.low), vmulq_s32(a.high, b.high)}; }
inline F to_float(Ints a) { return {vcvtq_f32_s32(a.low), vcvtq_f32_s32(a.high)}; }
inline Bytes load_bytes(const void* p) {
  return {vld1q_s8(static_cast<const int8_t*>(p)), vld1q_s8(static_cast<const int8_t*>(p) + 16)};
}
inline Bytes four_bytes(const int8_t* p) {
  int32_t four;
  memcpy(&four, p, 4);
  int8x16_t repeated = vreinterpretq_s8_s32(vdupq_n_s32(four));
  return {repeated, repeated};
}
inline Table table(const int8_t* sixteen) { return vld1q_s8(sixteen); }
inline int8x16_t low_halves(Table t, int8x16_t b) {
  return vqtbl1q_s8(t, vandq_u8(vreinterpretq_u8_s8(b), vdupq_n_u8(15)));
}
inline int8x16_t high_halves(Table t, int8x16_t b) { return vqtbl1q_s8(t, vshrq_n_u8(vreinterpretq_u8_s8(b), 4)); }
inline Bytes low_halves(Table t, Bytes b) { return {low_halves(t, b.low), low_halves(t, b.high)}; }
inline Bytes high_halves(Table t, Bytes b) { return {high_halves(t, b.low), high_halves(t, b.high)}; }
inline int32x4_t dot(int32x4_t sum, int8x16_t a, int8x16_t b) {
#if defined(__ARM_FEATURE_DOTPROD)
  return vdotq_s32(sum, a, b);
#else
  // Two products are at most 2 * 128 * 127, which 16 bits hold.
  return vpadalq_s16(sum, vpaddq_s16(vmull_s8(vget_low_s8(a), vget_low_s8(b)), vmull_high_s8(a, b)));
#endif
}
inline Ints dot(Ints sum, Bytes a, Bytes b) { return {dot(sum.low, a.low, b.low), dot(sum.high, a.high, b.high)}; }
inline Ints dot_signed(Ints sum, Bytes a, Bytes b) { return dot(sum, a, b); }
inline void store_bytes(int8_t* p, F whole) {
  int16x4_t low = vqmovn_s32(vcvtq_s32_f32(whole.low)), high = vqmovn_s32(vcvtq_s32_f32(whole.high));
  vst1_s8(p, vqmovn_s16(vcombine_s16(low, high)));
}
#else
struct Ints {
  int32_t v[W];
};
struct Bytes {
  int8_t v[4 * W];
};
using Table = Bytes;
constexpr int SIGNED_BIAS = 0;
template <class Each>
inline Ints ints(Each each) {
  Ints r;
  for (int i = 0; i < W; i++) r.v[i] = each(i);
  return r;
}
template <class Each>
inline Bytes bytes(Each each) {
  Bytes r;
  for (int i = 0; i < 4 * W; i++) r.v[i] = each(i);
  return r;
}
inline Ints set_int(int32_t x) { return ints([&](int) { return x; }); }
inline Ints load_ints(const int32_t* p) { return ints([&](int i) { return p[i]; }); }
inline Ints operator+(Ints a, Ints b) { return ints([&](int i) { return a.v[i] + b.v[i]; }); }
inline Ints operator*(Ints a, Ints b) { return ints([&](int i) { return a.v[i] * b.v[i]; }); }
inline F to_float(Ints a) {
  float r[W];
  for (int i = 0; i < W; i++) r[i] = static_cast<float>(a.v[i]);
  return load(r);
}
inline Bytes load_bytes(const void* p) {
  Bytes r;
  memcpy(r.v, p, sizeof r.v);
  return r;
}
inline Bytes four_bytes(const int8_t* p) { return bytes([&](int i) { return p[i % 4]; }); }
inline Table table(const int8_t* sixteen) { return bytes([&](int i) { return sixteen[i % 16]; }); }
inline Bytes low_halves(const Table& t, Bytes b) { return bytes([&](int i) { return t.v[b.v[i] & 15]; }); }
inline Bytes high_halves(const Table& t, Bytes b) { return bytes([&](int i) { return t.v[b.v[i] >> 4 & 15]; }); }
inline Ints dot(Ints sum, Bytes a, Bytes b) {
  return ints([&](int i) {
    int32_t four = 0;
    for (int j = 4 * i; j < 4 * i + 4; j++) four += a.v[j] * b.v[j];
    return sum.v[i] + four;
  });
}
inline Ints dot_signed(Ints sum, Bytes a, Bytes b) { return dot(sum, a, b); }
inline void store_bytes(int8_t* p, F whole) {
  float r[W];
  store(r, whole);
  for (int i = 0; i < W; i++) p[i] = static_cast<int8_t>(r[i]);
}
#endif

// W bytes, moved left by SHIFT, as the bits of floats; at least LEAST.
#if defined(__AVX512F__)
template <int SHIFT, int32_t LEAST>
inline F bytes_as_floats(const uint8_t* p) {
  __m512i bits = _mm512_slli_epi32(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), SHIFT);
  return {_mm512_castsi512_ps(LEAST ? _mm512_max_epi32(bits, _mm512_set1_epi32(LEAST)) : bits)};
}
#elif defined(__AVX2__)
template <int SHIFT, int32_t LEAST>
inline F bytes_as_floats(const uint8_t* p) {
  __m256i bits = _mm256_slli_epi32(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))), SHIFT);
  return {_mm256_castsi256_ps(LEAST ? _mm256_max_epi32(bits, _mm256_set1_epi32(LEAST)) : bits)};
}
#elif defined(NAUTILUS_NEON)
template <int SHIFT, int32_t LEAST>
inline F bytes_as_floats(const uint8_t* p) {
  uint16x8_t wide = vmovl_u8(vld1_u8(p));
  auto bits = [](uint16x4_t part) {
    int32x4_t moved = vreinterpretq_s32_u32(vshlq_n_u32(vmovl_u16(part), SHIFT));
    return vreinterpretq_f32_s32(LEAST ? vmaxq_s32(moved, vdupq_n_s32(LEAST)) : moved);
  };
  return {bits(vget_low_u16(wide)), bits(vget_high_u16(wide))};
}
#else
template <int SHIFT, int32_t LEAST>
inline F bytes_as_floats(const uint8_t* p) {
  float r[W];
  for (int i = 0; i < W; i++) {
    int32_t bits = static_cast<int32_t>(p[i]) << SHIFT;
    if (bits < LEAST) bits = LEAST;
    memcpy(r + i, &bits, 4);
  }
  return load(r);
}
#endif
// E4M3 without sign, times E4M3_UNIT: a float with another bias. Numbers below 2^-6 become subnormal floats, which count as
// what they are.
constexpr float E4M3_UNIT = 0x1p-120f;
inline F load_e4m3(const uint8_t* p) { return bytes_as_floats<20, 0>(p); }
// Powers of two in E8M0: the byte is the exponent of a float, 0 a subnormal one.
inline F load_e8m0(const uint8_t* p) { return bytes_as_floats<23, 1 << 22>(p); }

#if defined(NAUTILUS_NEON)
// Sixteen E4M3 numbers as bf16, eight to each place. `low` and `high` hold the bytes of the numbers with codes below 16:
// among them are the subnormal ones, all others only move and get another bias. The code of NaN becomes one, 0x7FF0.
inline void unpack_e4m3(uint16_t* first, uint16_t* second, const uint8_t* codes, const uint8_t* low, const uint8_t* high) {
  uint8x16_t code = vld1q_u8(codes), size = vandq_u8(code, vdupq_n_u8(127)), nan = vceqq_u8(size, vdupq_n_u8(127));
  uint8x16_t lows = vqtbx1q_u8(vshlq_n_u8(size, 4), vld1q_u8(low), size);
  uint8x16_t highs = vqtbx1q_u8(vaddq_u8(vshrq_n_u8(size, 4), vdupq_n_u8(120 >> 1)), vld1q_u8(high), size);
  highs = vorrq_u8(vbslq_u8(nan, size, highs), vandq_u8(code, vdupq_n_u8(128)));
  vst1q_u16(first, vreinterpretq_u16_u8(vzip1q_u8(lows, highs)));
  vst1q_u16(second, vreinterpretq_u16_u8(vzip2q_u8(lows, highs)));
}
// Sixteen whole numbers as bf16, likewise.
inline void unpack_int8(uint16_t* first, uint16_t* second, const uint8_t* codes) {
  auto numbers = [](int16x8_t wide) {
    F a = to_float(Ints{vmovl_s16(vget_low_s16(wide)), vmovl_high_s16(wide)});
    uint16x4_t low = vshrn_n_u32(vreinterpretq_u32_f32(a.low), 16);
    return vshrn_high_n_u32(low, vreinterpretq_u32_f32(a.high), 16);
  };
  int8x16_t code = vreinterpretq_s8_u8(vld1q_u8(codes));
  vst1q_u16(first, numbers(vmovl_s8(vget_low_s8(code))));
  vst1q_u16(second, numbers(vmovl_high_s8(code)));
}
#endif

// Into the second cache: what is read once, far behind, would only push other things out of the first.
__attribute__((always_inline)) inline void prefetch_far(const void* p) { __builtin_prefetch(p, 0, 2); }
// A hint not to keep it in the cache that cores share: gigabytes that go by would push out what the next call needs.
__attribute__((always_inline)) inline void prefetch_once(const void* p) { __builtin_prefetch(p, 0, 0); }

// At most the first `count` numbers, zeros after them; stores touch no more than that. Masks were no faster, and this form
// serves every level.
template <class T>
inline F load(const T* p, int64_t count) {
  if (count >= W) return load(p);
  T part[W] = {};
  for (int i = 0; i < count; i++) part[i] = p[i];
  return load(part);
}
template <class T>
inline void store(T* p, F a, int64_t count) {
  if (count >= W) return store(p, a);
  T part[W];
  store(part, a);
  for (int i = 0; i < count; i++) p[i] = part[i];
}

// `count` numbers as another type.
template <class To, class From>
inline void copy(To* to, const From* from, int64_t count) {
  int64_t i = 0;
  for (; i + W <= count; i += W) store(to + i, load(from + i));
  if (i < count) store(to + i, load(from + i, count - i), count - i);
}

// e^x to about 2 ulp: x = n ln 2 + r, |r| <= ln 2 / 2, and a polynomial of degree 6 in r (Taylor, remainder 1.2e-7).
// Below -87 the result is at most 1.7e-38, above 88 it is 1.7e38. NaN stays NaN.
inline F exp(F x) {
  x = smaller(set(88.0f), larger(set(-87.0f), x));
  F n = round_whole(x * set(1.44269504088896341f));
  F r = fma(n, set(-0.693359375f), x);
  r = fma(n, set(2.12194440e-4f), r);
  F p = set(1.0f / 720);
  p = fma(p, r, set(1.0f / 120));
  p = fma(p, r, set(1.0f / 24));
  p = fma(p, r, set(1.0f / 6));
  p = fma(p, r, set(0.5f));
  p = fma(p, r, set(1.0f));
  p = fma(p, r, set(1.0f));
  return times_power_of_two(p, n);
}
inline F sigmoid(F x) { return set(1.0f) / (set(1.0f) + exp(set(0.0f) - x)); }

// log(1 + e^x) = max(x, 0) + log(1 + e), e = e^-|x|, with log(1 + e) = 2 artanh(s), s = e / (2 + e) <= 1/3, as a series
// (first term left out: 3^-17 / 17 = 5e-10 of the sum).
inline F softplus(F x) {
  F zero = set(0.0f), e = exp(smaller(x, zero) - larger(zero, x)), s = e / (set(2.0f) + e), q = s * s;
  F sum = set(1.0f / 15);
  sum = fma(sum, q, set(1.0f / 13));
  sum = fma(sum, q, set(1.0f / 11));
  sum = fma(sum, q, set(1.0f / 9));
  sum = fma(sum, q, set(1.0f / 7));
  sum = fma(sum, q, set(1.0f / 5));
  sum = fma(sum, q, set(1.0f / 3));
  sum = fma(sum, q, set(1.0f));
  return larger(zero, x) + set(2.0f) * s * sum;
}

}  // namespace
