// y = x W^T with W in NVFP4: value(code) * block scale * tensor scale, blocks of 16 inputs.
//
// Activations are rounded to int8 with one scale for 32 neighbours, so that the products within a block are exact
// integers; the block scale is exact in float32. Each output is one chain over its groups:
//
//     y = s2 / 2 * sum_groups a_g sum_{two blocks of g} s_b sum_16 (2 w) q
//
// Repacked weights put sixteen rows beside each other. One block of inputs of these rows is 128 bytes of codes and 16 of
// scales. Byte 64 j + 4 r + i (j = 0, 1; row r; i = 0..3) holds input 8 j + i in its low half and 8 j + 4 + i in its high
// half: a table turns 64 bytes into 16 rows of 4 inputs, what one dot-product instruction takes. The table gives 2 w + 12,
// unsigned as the instruction wants it; the sum starts at -12 times the sum of the block's activations.
#include "kernels.h"
#include "simd.h"

namespace {

constexpr int ROWS = NVFP4_ROWS;  // of W in a panel
constexpr int64_t GROUP = 32;     // activations with a scale in common: two blocks
constexpr int VECTORS = ROWS / W; // float vectors that a panel's outputs fill

int64_t padded(int64_t inputs) { return (inputs + GROUP - 1) / GROUP * GROUP; }

void nvfp4_pack(const Nvfp4Pack* p, int64_t panel) {
  int64_t blocks = padded(p->inputs) / 16, stored = (p->inputs + 15) / 16, bytes = p->inputs / 2;
  uint8_t *codes = p->packed_codes + panel * blocks * 128, *scale = p->packed_scale + panel * blocks * ROWS;
  for (int64_t block = 0; block < blocks; block++)
    for (int64_t r = 0; r < ROWS; r++) {
      int64_t n = panel * ROWS + r;
      bool inside = n < p->outputs && block < stored;
      scale[block * ROWS + r] = inside ? p->scale[n * stored + block] : 0;
      for (int64_t k = 0; k < 16; k++) {
        int64_t at = block * 16 + k;
        uint8_t code = inside && at < p->inputs ? p->codes[n * bytes + at / 2] >> (at % 2 * 4) & 15 : 0;
        uint8_t* to = codes + block * 128 + k / 8 * 64 + r * 4 + k % 4;
        *to = k % 8 < 4 ? code : *to | code << 4;
      }
    }
}

// Rounds one row of activations to int8, group by group.
void nvfp4_quantise(const Nvfp4Forward* f, int64_t row) {
  int64_t inputs = padded(f->inputs);
  const uint16_t* x = static_cast<const uint16_t*>(f->x) + row * f->inputs;
  int8_t* q = f->q + row * inputs;
  for (int64_t g = 0; g < inputs; g += GROUP) {
    float wide[GROUP] = {};
    int64_t count = f->inputs - g < GROUP ? f->inputs - g : GROUP;
    copy(wide, x + g, count);
    float most = 0.0f;
    for (float v : wide) most = fabsf(v) > most ? fabsf(v) : most;
    float scale = most / 127.0f, inverse = most > 0.0f ? 127.0f / most : 0.0f;
    f->q_scale[row * (inputs / GROUP) + g / GROUP] = scale;
    for (int64_t half = 0; half < 2; half++) {
      int32_t sum = 0;
      for (int64_t i = half * 16; i < half * 16 + 16; i++) {
        int32_t whole = static_cast<int32_t>(nearbyintf(wide[i] * inverse));
        q[g + i] = static_cast<int8_t>(whole);
        sum += whole;
      }
      f->q_sum[row * (inputs / 16) + g / 16 + half] = -12 * sum;
    }
  }
}

#if defined(__AVX512VNNI__) && defined(__AVX512VBMI__)

inline __m512i doubled_plus_12() {
  // 2 w + 12 for the sixteen codes, repeated: the lookup uses six bits of an index, the upper two belong to a neighbour.
  const __m128i once = _mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0);
  return _mm512_broadcast_i32x4(once);
}
// E4M3 without sign as float times 2^-8: its bits, moved, are those of a half-precision number.
inline F scales(const uint8_t* p) {
  __m256i half = _mm256_slli_epi16(_mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 7);
  return {_mm512_cvtph_ps(half)};
}

// M rows of activations with V panels of sixteen rows of W.
template <int M, int V>
void tile(const int8_t* const* q, const float* const* q_scale, const int32_t* const* q_sum, const uint8_t* codes,
          const uint8_t* scale, int64_t blocks, float* y) {
  const __m512i table = doubled_plus_12();
  F acc[M * V];
  UNROLL for (int j = 0; j < M * V; j++) acc[j] = set(0.0f);
  for (int64_t b = 0; b < blocks; b += 2)
    UNROLL for (int v = 0; v < V; v++) {
      F group[M];
      UNROLL for (int half = 0; half < 2; half++) {
        const uint8_t* at = codes + (v * blocks + b + half) * 128;
        _mm_prefetch(reinterpret_cast<const char*>(at + 4096), _MM_HINT_T0);
        _mm_prefetch(reinterpret_cast<const char*>(at + 4096 + 64), _MM_HINT_T0);
        __m512i first = _mm512_loadu_si512(at), second = _mm512_loadu_si512(at + 64);
        __m512i w0 = _mm512_permutexvar_epi8(first, table), w2 = _mm512_permutexvar_epi8(second, table);
        __m512i w1 = _mm512_permutexvar_epi8(_mm512_srli_epi16(first, 4), table);
        __m512i w3 = _mm512_permutexvar_epi8(_mm512_srli_epi16(second, 4), table);
        F block_scale = scales(scale + (v * blocks + b + half) * ROWS);
        UNROLL for (int m = 0; m < M; m++) {
          const int8_t* a = q[m] + (b + half) * 16;
          auto four = [&](int i) {
            int32_t both;
            memcpy(&both, a + 4 * i, 4);
            return _mm512_set1_epi32(both);
          };
          __m512i sum = _mm512_set1_epi32(q_sum[m][b + half]);
          sum = _mm512_dpbusd_epi32(sum, w0, four(0));
          sum = _mm512_dpbusd_epi32(sum, w1, four(1));
          sum = _mm512_dpbusd_epi32(sum, w2, four(2));
          sum = _mm512_dpbusd_epi32(sum, w3, four(3));
          F whole{_mm512_cvtepi32_ps(sum)};
          group[m] = half ? fma(whole, block_scale, group[m]) : whole * block_scale;
        }
      }
      UNROLL for (int m = 0; m < M; m++) acc[m * V + v] = fma(group[m], set(q_scale[m][b / 2]), acc[m * V + v]);
    }
  UNROLL for (int j = 0; j < M * V; j++) store(y + j * ROWS, acc[j]);
}
constexpr float UNDO = 128.0f;  // 2^8 of the scales, half of the doubled weights

#else

constexpr float UNDO = 0.5f;

// E4M3 without sign: 2^(e - 7) (1 + m / 8), below 2^-6 m 2^-9.
inline float e4m3(uint8_t code) {
  int e = code >> 3, m = code & 7;
  return e ? ldexpf(static_cast<float>(8 + m), e - 10) : ldexpf(static_cast<float>(m), -9);
}
inline int32_t doubled(uint8_t code) {
  static const int8_t value[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
  return value[code & 15];
}

template <int M, int V>
void tile(const int8_t* const* q, const float* const* q_scale, const int32_t* const*, const uint8_t* codes,
          const uint8_t* scale, int64_t blocks, float* y) {
  F acc[M * V * VECTORS];
  for (F& a : acc) a = set(0.0f);
  for (int64_t b = 0; b < blocks; b += 2)
    for (int v = 0; v < V; v++) {
      float s[2][ROWS];
      int8_t w[2][ROWS][16];
      for (int half = 0; half < 2; half++) {
        const uint8_t* at = codes + (v * blocks + b + half) * 128;
        for (int r = 0; r < ROWS; r++) {
          s[half][r] = e4m3(scale[(v * blocks + b + half) * ROWS + r]);
          for (int k = 0; k < 16; k++)
            w[half][r][k] = static_cast<int8_t>(doubled(at[k / 8 * 64 + r * 4 + k % 4] >> (k % 8 < 4 ? 0 : 4)));
        }
      }
      for (int m = 0; m < M; m++) {
        float sum[2][ROWS];
        for (int half = 0; half < 2; half++)
          for (int r = 0; r < ROWS; r++) {
            int32_t whole = 0;
            for (int k = 0; k < 16; k++) whole += w[half][r][k] * q[m][(b + half) * 16 + k];
            sum[half][r] = static_cast<float>(whole);
          }
        for (int i = 0; i < VECTORS; i++) {
          F group = load(sum[0] + i * W) * load(s[0] + i * W);
          group = fma(load(sum[1] + i * W), load(s[1] + i * W), group);
          F& a = acc[(m * V + v) * VECTORS + i];
          a = fma(group, set(q_scale[m][b / 2]), a);
        }
      }
    }
  for (int j = 0; j < M * V * VECTORS; j++) store(y + j * W, acc[j]);
}

#endif

constexpr int PANELS = 4;  // of sixteen outputs in an item of work

template <int M>
void rows(const Nvfp4Forward* f, int64_t row, int64_t panel, int64_t some) {
  int64_t inputs = padded(f->inputs), blocks = inputs / 16;
  const int8_t* q[M];
  const float* q_scale[M];
  const int32_t* q_sum[M];
  for (int m = 0; m < M; m++) {
    q[m] = f->q + (row + m) * inputs;
    q_scale[m] = f->q_scale + (row + m) * (inputs / GROUP);
    q_sum[m] = f->q_sum + (row + m) * blocks;
  }
  const uint8_t *codes = f->packed_codes + panel * blocks * 128, *scale = f->packed_scale + panel * blocks * ROWS;
  alignas(64) float y[M * PANELS * ROWS];
  // Many rows: one panel at a time leaves registers for them. One row: several panels hide each other's latency.
  bool together = M == 1 && some == PANELS;
  if (together) tile<M, M == 1 ? PANELS : 1>(q, q_scale, q_sum, codes, scale, blocks, y);
  for (int64_t v = 0; v < some && !together; v++) {
    alignas(64) float one[M * ROWS];
    tile<M, 1>(q, q_scale, q_sum, codes + v * blocks * 128, scale + v * blocks * ROWS, blocks, one);
    for (int m = 0; m < M; m++) memcpy(y + (m * PANELS + v) * ROWS, one + m * ROWS, sizeof(float) * ROWS);
  }
  int64_t columns = f->outputs - panel * ROWS < some * ROWS ? f->outputs - panel * ROWS : some * ROWS;
  F factor = set(f->tensor_scale * UNDO);
  for (int m = 0; m < M; m++) {
    int64_t at = (row + m) * f->outputs + panel * ROWS;
    for (int64_t j = 0; j < columns; j += W) {
      F value = load(y + m * PANELS * ROWS + j) * factor;
      f->wide ? store(static_cast<float*>(f->y) + at + j, value, columns - j)
              : store(static_cast<uint16_t*>(f->y) + at + j, value, columns - j);
    }
  }
}

// An item is PANELS panels of outputs and NVFP4_BLOCK rows of activations.
void nvfp4_forward(const Nvfp4Forward* f, int64_t item) {
  int64_t panels = (f->outputs + ROWS - 1) / ROWS, items = (panels + PANELS - 1) / PANELS;
  int64_t panel = item % items * PANELS, some = panels - panel < PANELS ? panels - panel : PANELS;
  int64_t row = item / items * NVFP4_BLOCK, end = row + NVFP4_BLOCK < f->rows ? row + NVFP4_BLOCK : f->rows;
  for (; row + 8 <= end; row += 8) rows<8>(f, row, panel, some);
  if (row + 4 <= end) rows<4>(f, row, panel, some), row += 4;
  if (row + 2 <= end) rows<2>(f, row, panel, some), row += 2;
  if (row < end) rows<1>(f, row, panel, some);
}

}  // namespace

void NAUTILUS_FILL(nvfp4)(Kernels* k) {
  k->nvfp4_pack = nvfp4_pack;
  k->nvfp4_quantise = nvfp4_quantise;
  k->nvfp4_forward = nvfp4_forward;
}
