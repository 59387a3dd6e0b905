// Products of matrices, bf16 or float, with float32 sums: C[m][n] = sum_k A[m][k] B[k][n].
//
// Each C[m][n] is one chain of multiply-adds from k = 0 up: over pairs of k for bf16, over single ones for float. Tiles only
// say which chains run side by side, so a row of C has the same bits whatever other rows are computed with it. Float rows
// may meet bf16 columns, which are half to read: the bits are those of the same columns as float, k must be even.
#pragma once

#include "simd.h"

namespace {

// Chains held in registers: at most so many rows by so many vectors of columns.
#if defined(__AVX512F__) || defined(__AVX2__)
constexpr int TILE_ROWS = 6;
#else
constexpr int TILE_ROWS = 4;
#endif
constexpr int TILE_VECTORS = W == 16 ? 4 : 2;
// Where pairs are two vectors, fewer of AVX2's sixteen registers are left for chains.
constexpr int PAIR_ROWS = W == 16 ? TILE_ROWS : 4;
constexpr int PANEL = TILE_VECTORS * W;  // columns of B packed together
constexpr int64_t FAR = 16384;           // bytes of columns that are on their way from memory for a single row

// What one step along k does, for how many rows at once; B: of columns.
template <class T, class B = T>
struct Step;
template <>
struct Step<uint16_t> {
  static constexpr int K = 2, ROWS = PAIR_ROWS;
  using Vector = Pairs;
  static Vector columns(const uint16_t* p) { return load_pairs(p); }
  static Vector row(const uint16_t* p) { return set_pair(p); }
  static F add(F sum, Vector a, Vector b) { return dot(sum, a, b); }
};
template <>
struct Step<float> {
  static constexpr int K = 1, ROWS = TILE_ROWS;
  using Vector = F;
  static Vector columns(const float* p) { return load(p); }
  static Vector row(const float* p) { return set(*p); }
  static F add(F sum, Vector a, Vector b) { return fma(a, b, sum); }
};
template <>
struct Step<float, uint16_t> {
  static constexpr int K = 2, ROWS = PAIR_ROWS;
  using Vector = Split;
  static Vector columns(const uint16_t* p) { return load_split(p); }
  static Vector row(const float* p) { return {set(p[0]), set(p[1])}; }
  static F add(F sum, Vector a, Vector b) { return fma(a.odd, b.odd, fma(a.even, b.even, sum)); }
};

inline int64_t panels(int64_t n) { return (n + PANEL - 1) / PANEL; }
template <class T, class B = T>
inline int64_t steps(int64_t k) {
  return (k + Step<T, B>::K - 1) / Step<T, B>::K;
}
// Numbers in one packed panel of B, and in all of it.
template <class T>
inline int64_t panel_size(int64_t k) {
  return steps<T>(k) * Step<T>::K * PANEL;
}
template <class T>
inline int64_t packed_size(int64_t k, int64_t n) {
  return panels(n) * panel_size<T>(k);
}

// B step by step: step k of column n lies at base + n / PANEL * panel + k * step + n % PANEL * Step::K.
template <class T>
struct Columns {
  const T* base;
  int64_t panel, step;
};
template <class T>
inline Columns<T> packed(const T* base, int64_t k) {
  return {base, panel_size<T>(k), Step<T>::K * PANEL};
}

// Rows of A: step k of row m lies at row[m] + k * step.
template <class T>
struct Rows {
  const T* const* row;
  int64_t step;
};

// Two rows of a matrix as one row of pairs, so that its rows become the k of a product; `odd` may be null: zeros.
inline void zip(uint16_t* to, const uint16_t* even_row, const uint16_t* odd_row, int64_t count) {
  if (odd_row)
    for (int64_t i = 0; i < count; i++) {
      uint32_t both = even_row[i] | static_cast<uint32_t>(odd_row[i]) << 16;
      memcpy(to + 2 * i, &both, 4);
    }
  else
    for (int64_t i = 0; i < count; i++) {
      uint32_t both = even_row[i];
      memcpy(to + 2 * i, &both, 4);
    }
}

// B[k][n] with row k at from + k * n_count.
template <class From>
void pack_rows(uint16_t* to, const From* from, int64_t k_count, int64_t n_count) {
  alignas(64) uint16_t both[2][PANEL];
  for (int64_t n = 0; n < n_count; n += PANEL) {
    int64_t columns = n_count - n < PANEL ? n_count - n : PANEL;
    for (int64_t k = 0; k < k_count; k += 2, to += 2 * PANEL) {
      memset(both, 0, sizeof both);
      for (int64_t r = 0; r < 2 && k + r < k_count; r++) copy(both[r], from + (k + r) * n_count + n, columns);
      zip(to, both[0], both[1], PANEL);
    }
  }
}
template <class From>
void pack_rows(float* to, const From* from, int64_t k_count, int64_t n_count) {
  for (int64_t n = 0; n < n_count; n += PANEL) {
    int64_t columns = n_count - n < PANEL ? n_count - n : PANEL;
    for (int64_t k = 0; k < k_count; k++, to += PANEL) {
      memset(to, 0, PANEL * sizeof(float));
      copy(to, from + k * n_count + n, columns);
    }
  }
}

// B[k][n] with column n at from + n * k_count: the transpose of a matrix as it is stored.
template <class To, class From>
void pack_columns(To* to, const From* from, int64_t k_count, int64_t n_count) {
  constexpr int K = Step<To>::K, PART = 128;
  To part[PART];
  for (int64_t n = 0; n < panels(n_count) * PANEL; n++) {
    To* column = to + n / PANEL * panel_size<To>(k_count) + n % PANEL * K;
    for (int64_t k = 0; k < k_count; k += PART) {
      int64_t count = k_count - k < PART ? k_count - k : PART;
      memset(part, 0, sizeof part);
      if (n < n_count) copy(part, from + n * k_count + k, count);
      for (int64_t step = 0; step < steps<To>(count); step++)
        memcpy(column + (k / K + step) * K * PANEL, part + K * step, K * sizeof(To));
    }
  }
}

// c = a b, or with `more` c += a b: a chain that was left at some k goes on as if it had never stopped.
template <class T, class B, int M, int V>
void gemm_tile(Rows<T> a, const B* b, int64_t step, int64_t k_steps, float* c, bool more) {
  using S = Step<T, B>;
  F sum[M * V];
  UNROLL for (int j = 0; j < M * V; j++) sum[j] = more ? load(c + j / V * PANEL + j % V * W) : set(0.0f);
  for (int64_t k = 0; k < k_steps; k++, b += step) {
    if (M == 1)
      UNROLL for (int at = 0; at < V * W * S::K * static_cast<int>(sizeof(B)); at += 64)
        prefetch_far(reinterpret_cast<const char*>(b) + FAR + at);
    typename S::Vector columns[V];
    UNROLL for (int v = 0; v < V; v++) columns[v] = S::columns(b + v * W * S::K);
    UNROLL for (int m = 0; m < M; m++) {
      typename S::Vector row = S::row(a.row[m] + k * a.step);
      UNROLL for (int v = 0; v < V; v++) sum[m * V + v] = S::add(sum[m * V + v], row, columns[v]);
    }
  }
  UNROLL for (int j = 0; j < M * V; j++) store(c + j / V * PANEL + j % V * W, sum[j]);
}

template <class T, class B, int M>
void gemm_rows(Rows<T> a, const B* b, int64_t step, int64_t k_steps, int64_t columns, float* c, bool more) {
  // The last panel may need fewer vectors.
  switch ((columns + W - 1) / W) {
    case 1: return gemm_tile<T, B, M, 1>(a, b, step, k_steps, c, more);
    case 2: return gemm_tile<T, B, M, 2>(a, b, step, k_steps, c, more);
#if defined(__AVX512F__)
    case 3: return gemm_tile<T, B, M, 3>(a, b, step, k_steps, c, more);
#endif
    default: return gemm_tile<T, B, M, TILE_VECTORS>(a, b, step, k_steps, c, more);
  }
}

// At most Step::ROWS rows by at most PANEL columns: c[rows][PANEL].
template <class T, class B>
void gemm_block(Rows<T> a, int64_t rows, const B* b, int64_t step, int64_t k_steps, int64_t columns, float* c, bool more) {
  switch (rows) {
    case 1: return gemm_rows<T, B, 1>(a, b, step, k_steps, columns, c, more);
    case 2: return gemm_rows<T, B, 2>(a, b, step, k_steps, columns, c, more);
    case 3: return gemm_rows<T, B, 3>(a, b, step, k_steps, columns, c, more);
    case 4: return gemm_rows<T, B, 4>(a, b, step, k_steps, columns, c, more);
  }
  if constexpr (Step<T, B>::ROWS == 6)
    rows == 5 ? gemm_rows<T, B, 5>(a, b, step, k_steps, columns, c, more)
              : gemm_rows<T, B, 6>(a, b, step, k_steps, columns, c, more);
}

// For each tile of C done(row, rows, column, columns, c) is called with c[rows][PANEL].
template <class T, class B, class Done>
void gemm(Rows<T> a, int64_t m_count, Columns<B> b, int64_t k_count, int64_t n_count, Done done) {
  constexpr int ROWS = Step<T, B>::ROWS;
  int64_t k_steps = steps<T, B>(k_count);
  alignas(64) float c[ROWS * PANEL];
  for (int64_t n = 0; n < n_count; n += PANEL) {
    const B* panel = b.base + n / PANEL * b.panel;
    int64_t columns = n_count - n < PANEL ? n_count - n : PANEL;
    for (int64_t m = 0; m < m_count; m += ROWS) {
      int64_t rows = m_count - m < ROWS ? m_count - m : ROWS;
      Rows<T> tile{a.row + m, a.step};
      gemm_block<T>(tile, rows, panel, b.step, k_steps, columns, c, false);
      done(m, rows, n, columns, c);
    }
  }
}

}  // namespace
