// Numbers as they look after a trip through NVFP4 or MXFP8, and products of such numbers: what low-precision training does.
//
// A value is q s, an element times its block's scale: at most 6 significant bits, so exact in bf16. NVFP4's tensor scale
// stays apart, one for each group of rows, and multiplies the float32 sum. The arithmetic is that of ops/encode.py, rule
// "train", operation by operation; everything happens in tiles that are as wide and as high as a block is long.
#include "gemm.h"
#include "kernels.h"

namespace {

using bf16 = uint16_t;
constexpr float LARGEST = 3.40282347e38f;
constexpr uint32_t INFINITE = 0x7F800000, HALF_LEAST = 0x00400000;  // infinity; 2^-127

inline uint32_t bits_of(float x) {
  uint32_t r;
  memcpy(&r, &x, 4);
  return r;
}
inline float float_of(uint32_t x) {
  float r;
  memcpy(&r, &x, 4);
  return r;
}
inline float size_of(float x) { return float_of(bits_of(x) & 0x7FFFFFFF); }
inline float widen_one(bf16 x) { return float_of(static_cast<uint32_t>(x) << 16); }
inline bf16 narrow_one(float x) {
  uint32_t b = bits_of(x);
  return static_cast<bf16>((b & 0x7FFFFFFF) > INFINITE ? 0x7FC0 : (b + 0x7FFF + ((b >> 16) & 1)) >> 16);
}

// To the nearest E4M3, ties to even; 0 <= x <= 448. Below 2^-6 the distance is 2^-9, which is that of floats at 1.5 2^14.
inline float nearest_e4m3(float x) {
  uint32_t b = bits_of(x);
  float normal = float_of((b + 0x7FFFF + ((b >> 20) & 1)) & 0xFFF00000), small = (x + 24576.0f) - 24576.0f;
  return x < 0.015625f ? small : normal;
}
// To a neighbouring E2M1; 0 <= x <= 6. To the nearest, ties to even, or up with probability `share` of the way.
template <bool STOCHASTIC>
inline float to_e2m1(float x, float share) {
  float unit = x < 2.0f ? 2.0f : x < 4.0f ? 1.0f : 0.5f, step = x < 2.0f ? 0.5f : x < 4.0f ? 1.0f : 2.0f;
  float steps = x * unit;
  steps = STOCHASTIC ? static_cast<float>(static_cast<int32_t>(steps + share)) : (steps + 8388608.0f) - 8388608.0f;
  return steps * step;
}

// 16 random bytes for each of 16 rows: Philox4x32-10 of the counter (column block and group, row, stream, step).
void draw(const LowBit& f, int64_t group, int64_t row, int64_t block, uint8_t to[16][16]) {
  uint32_t c0[16], c1[16], c2[16], c3[16], k0 = static_cast<uint32_t>(f.seed), k1 = static_cast<uint32_t>(f.seed >> 32);
  for (int i = 0; i < 16; i++) {
    c0[i] = static_cast<uint32_t>((f.blocks ? f.blocks[block] : block) | (f.first_group + group) << 20);
    c1[i] = static_cast<uint32_t>(row + i + f.first_row);
    c2[i] = static_cast<uint32_t>(f.stream);
    c3[i] = static_cast<uint32_t>(f.step);
  }
  for (int round = 0; round < 10; round++) {
    for (int i = 0; i < 16; i++) {
      uint64_t p0 = static_cast<uint64_t>(c0[i]) * 0xD2511F53, p1 = static_cast<uint64_t>(c2[i]) * 0xCD9E8D57;
      c0[i] = static_cast<uint32_t>(p1 >> 32) ^ c1[i] ^ k0;
      c1[i] = static_cast<uint32_t>(p1);
      c2[i] = static_cast<uint32_t>(p0 >> 32) ^ c3[i] ^ k1;
      c3[i] = static_cast<uint32_t>(p0);
    }
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  for (int i = 0; i < 16; i++) {
    uint32_t words[4] = {c0[i], c1[i], c2[i], c3[i]};
    memcpy(to[i], words, 16);
  }
}

// A block long and a block high. Rows and columns past the end of the matrix are zeros.
template <int N>
struct Tile {
  float x[N][N];
  int64_t rows, columns;

  template <class T>
  void load(const T* from, int64_t stride, int64_t row_count, int64_t column_count) {
    rows = row_count;
    columns = column_count;
    if (rows < N || columns < N) memset(x, 0, sizeof x);
    for (int64_t r = 0; r < rows; r++, from += stride)
      if (columns == N)
        for (int c = 0; c < N; c++) x[r][c] = number(from[c]);
      else
        for (int64_t c = 0; c < columns; c++) x[r][c] = number(from[c]);
  }
  static float number(bf16 v) { return widen_one(v); }
  // Masters are rounded to bf16 before anything is made of them.
  static float number(float v) { return widen_one(narrow_one(v)); }

  void store(bf16* to, int64_t stride) const {
    for (int64_t r = 0; r < rows; r++, to += stride)
      if (columns == N)
        for (int c = 0; c < N; c++) to[c] = static_cast<bf16>(bits_of(x[r][c]) >> 16);
      else
        for (int64_t c = 0; c < columns; c++) to[c] = static_cast<bf16>(bits_of(x[r][c]) >> 16);
  }
  // Rows in twos, as products over rows want them.
  void store_zipped(bf16* to, int64_t width) const {
    for (int64_t r = 0; r < rows; r += 2, to += 2 * width)
      for (int64_t c = 0; c < columns; c++) {
        uint32_t both = bits_of(x[r][c]) >> 16 | (bits_of(x[r + 1][c]) & 0xFFFF0000);
        memcpy(to + 2 * c, &both, 4);
      }
  }

  // sigma_r x_r, then Sylvester's matrix along the rows by sums and differences, / 4, rounded to bf16.
  void turn() {
    constexpr uint32_t NEGATIVE = 55272;
    for (int c = 0; c < N; c += W) {
      F v[16];
      UNROLL for (int r = 0; r < 16; r++) {
        v[r] = ::load(x[r] + c);
        if (NEGATIVE >> r & 1) v[r] = set(0.0f) - v[r];
      }
      butterflies<1>(v);
      butterflies<2>(v);
      butterflies<4>(v);
      butterflies<8>(v);
      UNROLL for (int r = 0; r < 16; r++) ::store(x[r] + c, v[r] * set(0.25f));
    }
    for (int r = 0; r < 16; r++)
      for (int c = 0; c < N; c++) x[r][c] = widen_one(narrow_one(x[r][c]));
  }
  template <int HALF>
  static void butterflies(F v[16]) {
    UNROLL for (int r = 0; r < 16; r++) {
      if (r & HALF) continue;
      F sum = v[r] + v[r + HALF];
      v[r + HALF] = v[r] - v[r + HALF];
      v[r] = sum;
    }
  }

  // The largest magnitude of each row, column, or of the tile, as bits, under which NaN is the largest of all.
  void largest(int64_t axis, uint32_t top[N]) const {
    uint32_t of_column[N] = {};
    for (int r = 0; r < N; r++) {
      uint32_t of_row = 0;
      for (int c = 0; c < N; c++) {
        uint32_t b = bits_of(x[r][c]) & 0x7FFFFFFF;
        of_row = b > of_row ? b : of_row;
        of_column[c] = b > of_column[c] ? b : of_column[c];
      }
      if (axis == LOWBIT_ROWS) top[r] = of_row;
    }
    if (axis == LOWBIT_ROWS) return;
    uint32_t all = 0;
    for (int c = 0; c < N; c++) all = of_column[c] > all ? of_column[c] : all;
    for (int c = 0; c < N; c++) top[c] = axis == LOWBIT_COLUMNS ? of_column[c] : all;
  }
};

// Elements of one row under the scales of its columns; how many that were not zero become zero.
template <bool STOCHASTIC>
int64_t row_to_nvfp4(float x[16], const float scale[16], const float shrink[16], const float share[16]) {
  int32_t flushed = 0;
  for (int c = 0; c < 16; c++) {
    float y = x[c] * shrink[c], size = size_of(y);
    float value = to_e2m1<STOCHASTIC>(size > 6.0f ? 6.0f : size, share[c]) * scale[c];
    flushed += value == 0.0f && x[c] != 0.0f;
    x[c] = float_of(bits_of(value) | (bits_of(y) & 0x80000000));
  }
  return flushed;
}

template <bool STOCHASTIC>
int64_t to_nvfp4(Tile<16>& t, int64_t axis, float grow, const uint8_t noise[16][16]) {
  uint32_t top[16];
  float scale[16], shrink[16], share[16] = {}, across[2][16];
  t.largest(axis, top);
  float sixth = grow * (1.0f / 6), back = 1.0f / grow;
  for (int i = 0; i < 16; i++) {
    float s = float_of(top[i]) * sixth;
    scale[i] = nearest_e4m3(s > 448.0f ? 448.0f : s);
    float inverse = 1.0f / (scale[i] * back);
    shrink[i] = inverse > LARGEST ? LARGEST : inverse;
  }
  int64_t flushed = 0;
  for (int r = 0; r < 16; r++) {
    if (STOCHASTIC)
      for (int c = 0; c < 16; c++) share[c] = static_cast<float>(noise[r][c]) * (1.0f / 256);
    if (axis == LOWBIT_ROWS)
      for (int c = 0; c < 16; c++) across[0][c] = scale[r], across[1][c] = shrink[r];
    bool own = axis == LOWBIT_ROWS;
    flushed += row_to_nvfp4<STOCHASTIC>(t.x[r], own ? across[0] : scale, own ? across[1] : shrink, share);
  }
  return flushed;
}

int64_t to_mxfp8(Tile<32>& t, int64_t axis) {
  uint32_t top[32];
  float grow[32], shrink[32];
  t.largest(axis, top);
  for (int i = 0; i < 32; i++) {
    int32_t e = static_cast<int32_t>(top[i] >> 23) - 135 + ((top[i] & 0x7FFFFF) > 0x600000);
    e = e < -127 ? -127 : e;
    grow[i] = float_of(e == -127 ? HALF_LEAST : static_cast<uint32_t>(e + 127) << 23);
    shrink[i] = float_of(e == 127 ? HALF_LEAST : static_cast<uint32_t>(127 - e) << 23);
    if (top[i] >= INFINITE) grow[i] = float_of(0x7FC00000);
  }
  int64_t flushed = 0;
  for (int r = 0; r < 32; r++)
    for (int c = 0; c < 32; c++) {
      int i = axis == LOWBIT_ROWS ? r : c;
      float v = t.x[r][c], size = size_of(v) * shrink[i];
      float value = nearest_e4m3(size > 448.0f ? 448.0f : size) * grow[i];
      flushed += value == 0.0f && v != 0.0f;
      t.x[r][c] = float_of(bits_of(value) | (bits_of(v) & 0x80000000));
    }
  return flushed;
}

template <int N, class Each>
void tiles(const LowBit& f, const LowBitSpan& span, Each each) {
  Tile<N> t;
  for (int64_t r = 0; r < span.rows; r += N)
    for (int64_t c = 0; c < f.columns; c += N) {
      int64_t rows = span.rows - r < N ? span.rows - r : N, columns = f.columns - c < N ? f.columns - c : N;
      int64_t at = (span.row + r) * f.columns + c;
      if (f.bf16)
        t.load(static_cast<const bf16*>(f.x) + at, f.columns, rows, columns);
      else
        t.load(static_cast<const float*>(f.x) + at, f.columns, rows, columns);
      if (N == 16 && f.turn) t.turn();
      each(t, span.row + r, c);
    }
}

uint32_t lowbit_largest(const LowBit* f, const LowBitSpan* span) {
  uint32_t most = 0;
  tiles<16>(*f, *span, [&](const Tile<16>& t, int64_t, int64_t) {
    uint32_t top[16];
    t.largest(LOWBIT_TILES, top);
    most = top[0] > most ? top[0] : most;
  });
  return most;
}

template <int N>
void put(const LowBit& f, const Tile<N>& t, int64_t row, int64_t column) {
  if (f.zipped)
    t.store_zipped(f.y + row * f.columns + 2 * column, f.columns);
  else
    t.store(f.y + row * f.columns + column, f.columns);
}

// How many numbers that were not zero become zero.
int64_t lowbit_round(const LowBit* f, const LowBitSpan* span, float amax) {
  int64_t flushed = 0;
  if (f->format == LOWBIT_MXFP8) {
    tiles<32>(*f, *span, [&](Tile<32>& t, int64_t row, int64_t column) {
      flushed += to_mxfp8(t, f->axis);
      put(*f, t, row, column);
    });
    return flushed;
  }
  float grow = LOWBIT_TOP / amax;
  if (grow > LARGEST) grow = LARGEST;
  tiles<16>(*f, *span, [&](Tile<16>& t, int64_t row, int64_t column) {
    uint8_t noise[16][16] = {};
    if (f->bits)
      for (int64_t r = 0; r < t.rows; r++) memcpy(noise[r], f->bits + (row + r) * f->columns + column, t.columns);
    else if (f->stochastic)
      draw(*f, span->group, row - f->first[span->group], column / 16, noise);
    flushed += f->stochastic ? to_nvfp4<true>(t, f->axis, grow, noise) : to_nvfp4<false>(t, f->axis, grow, noise);
    put(*f, t, row, column);
  });
  return flushed;
}

// ----- products -------------------------------------------------------------------------------------------------------

constexpr int64_t TOKENS = 256;  // of a weight's gradient taken at a time

// Panels of one weight matrix, packed along inputs for the forward, along outputs for the gradient of the inputs.
int64_t lowbit_panels(const LowBitProduct* p) { return panels(p->kind == LOWBIT_FORWARD ? p->outputs : p->inputs); }
int64_t lowbit_packed(const LowBitProduct* p) {
  return p->kind == LOWBIT_FORWARD ? packed_size<bf16>(p->inputs, p->outputs) : packed_size<bf16>(p->outputs, p->inputs);
}
void lowbit_pack(const LowBitProduct* p, int64_t group, int64_t panel, uint16_t* to) {
  const bf16* w = p->b + group * p->outputs * p->inputs;
  int64_t n = panel * PANEL;
  if (p->kind == LOWBIT_FORWARD) {
    int64_t columns = p->outputs - n < PANEL ? p->outputs - n : PANEL;
    return pack_columns(to + panel * panel_size<bf16>(p->inputs), w + n * p->inputs, p->inputs, columns);
  }
  alignas(64) bf16 both[2][PANEL];
  int64_t columns = p->inputs - n < PANEL ? p->inputs - n : PANEL;
  bf16* at = to + panel * panel_size<bf16>(p->outputs);
  for (int64_t k = 0; k < p->outputs; k += 2, at += 2 * PANEL) {
    memset(both, 0, sizeof both);
    for (int64_t r = 0; r < 2 && k + r < p->outputs; r++) memcpy(both[r], w + (k + r) * p->inputs + n, columns * 2);
    zip(at, both[0], both[1], PANEL);
  }
}

// Both tensor scales as one number, rounded once.
F both_scales(const LowBitProduct* p, int64_t group) {
  constexpr double TOP = LOWBIT_TOP;
  double a = p->a_top ? p->a_top[group] : TOP, b = p->b_top ? p->b_top[group] : TOP;
  return set(static_cast<float>(a * b / (TOP * TOP)));
}

void finish(void* to, int64_t at, bool wide, const float* c, int64_t columns, F scale) {
  for (int64_t j = 0; j < columns; j += W) {
    F y = load(c + j) * scale;
    wide ? store(static_cast<float*>(to) + at + j, y, columns - j) : store(static_cast<bf16*>(to) + at + j, y, columns - j);
  }
}

void lowbit_rows(const LowBitProduct* p, const LowBitSpan* span, int64_t panel, const uint16_t* packed_weight) {
  bool forward = p->kind == LOWBIT_FORWARD;
  int64_t width = forward ? p->inputs : p->outputs, n_count = forward ? p->outputs : p->inputs;
  int64_t column = panel * PANEL, columns = n_count - column < PANEL ? n_count - column : PANEL;
  const bf16* rows[LOWBIT_BLOCK];
  for (int64_t r = 0; r < span->rows; r++) rows[r] = p->a + (span->row + r) * width;
  F scale = both_scales(p, span->group);
  gemm<bf16>({rows, 2}, span->rows, packed(packed_weight + panel * panel_size<bf16>(width), width), width, columns,
             [&](int64_t m, int64_t count, int64_t, int64_t, const float* c) {
               for (int64_t r = 0; r < count; r++)
                 finish(p->y, (span->row + m + r) * n_count + column, p->wide, c + r * PANEL, columns, scale);
             });
}

int64_t lowbit_scratch(const LowBitProduct* p) { return (p->outputs + PAIR_ROWS) * PANEL * 4 + TOKENS * PANEL * 2; }

// A panel of columns of one weight's gradient: sum over the group's rows of a[row][output] b[row][input], one chain.
void lowbit_outer(const LowBitProduct* p, int64_t group, int64_t panel, void* scratch) {
  int64_t begin = p->first[group], end = p->first[group + 1], column = panel * PANEL;
  int64_t columns = p->inputs - column < PANEL ? p->inputs - column : PANEL;
  auto* sums = static_cast<float*>(scratch);
  auto* part = reinterpret_cast<bf16*>(sums + (p->outputs + PAIR_ROWS) * PANEL);
  memset(sums, 0, (p->outputs + PAIR_ROWS) * PANEL * sizeof(float));
  for (int64_t z = begin; z < end; z += TOKENS) {
    int64_t tokens = end - z < TOKENS ? end - z : TOKENS;
    for (int64_t r = 0; r < tokens; r += 2) {
      memcpy(part + r * PANEL, p->b + (z + r) * p->inputs + 2 * column, columns * 4);
      memset(part + r * PANEL + 2 * columns, 0, (PANEL - columns) * 4);
    }
    for (int64_t m = 0; m < p->outputs; m += PAIR_ROWS) {
      int64_t rows = p->outputs - m < PAIR_ROWS ? p->outputs - m : PAIR_ROWS;
      const bf16* at[PAIR_ROWS];
      for (int64_t r = 0; r < rows; r++) at[r] = p->a + z * p->outputs + 2 * (m + r);
      gemm_block<bf16>({at, 2 * p->outputs}, rows, part, 2 * PANEL, tokens / 2, columns, sums + m * PANEL, true);
    }
  }
  F scale = both_scales(p, group);
  for (int64_t m = 0; m < p->outputs; m++)
    finish(p->y, (group * p->outputs + m) * p->inputs + column, true, sums + m * PANEL, columns, scale);
}

}  // namespace

void NAUTILUS_FILL(lowbit)(Kernels* k) {
  k->lowbit_largest = lowbit_largest;
  k->lowbit_round = lowbit_round;
  k->lowbit_panels = lowbit_panels;
  k->lowbit_packed = lowbit_packed;
  k->lowbit_pack = lowbit_pack;
  k->lowbit_rows = lowbit_rows;
  k->lowbit_scratch = lowbit_scratch;
  k->lowbit_outer = lowbit_outer;
}
