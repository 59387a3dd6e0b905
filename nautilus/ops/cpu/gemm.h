// Products of bf16 matrices with float32 sums: C[m][n] = sum_k A[m][k] B[k][n].
//
// Each C[m][n] is one chain of multiply-adds over pairs of k, from k = 0 up. Tiles only say which chains run side by side,
// so a row of C has the same bits whatever other rows are computed with it.
#pragma once

#include "simd.h"

namespace {

constexpr int TILE_ROWS = W == 16 ? 6 : 4;  // chains held in registers: so many rows
constexpr int TILE_VECTORS = W == 16 ? 4 : 2;  // by so many vectors of columns
constexpr int PANEL = TILE_VECTORS * W;  // columns of B packed together

inline int64_t panels(int64_t n) { return (n + PANEL - 1) / PANEL; }
inline int64_t even(int64_t k) { return (k + 1) / 2 * 2; }
// Numbers in a packed B.
inline int64_t packed_size(int64_t k, int64_t n) { return panels(n) * PANEL * even(k); }

// B as pairs of k: pair k of column n lies at base + n / PANEL * panel + k * step + n % PANEL * 2.
struct Columns {
  const uint16_t* base;
  int64_t panel, step;
};
inline Columns packed(const uint16_t* base, int64_t k) { return {base, even(k) * PANEL, 2 * PANEL}; }

// Rows of A as pairs of k: pair k of row m lies at row[m] + k * step.
struct Rows {
  const uint16_t* const* row;
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
template <class T>
void pack_rows(uint16_t* to, const T* from, int64_t k_count, int64_t n_count) {
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

// B[k][n] with column n at from + n * k_count: the transpose of a matrix as it is stored.
template <class T>
void pack_columns(uint16_t* to, const T* from, int64_t k_count, int64_t n_count) {
  int64_t pairs = even(k_count) / 2;
  uint16_t part[2 * 64];
  for (int64_t n = 0; n < panels(n_count) * PANEL; n++) {
    uint16_t* column = to + n / PANEL * pairs * 2 * PANEL + n % PANEL * 2;
    for (int64_t k = 0; k < k_count; k += 128) {
      int64_t count = k_count - k < 128 ? k_count - k : 128;
      memset(part, 0, sizeof part);
      if (n < n_count) copy(part, from + n * k_count + k, count);
      for (int64_t pair = 0; pair < (count + 1) / 2; pair++) memcpy(column + (k / 2 + pair) * 2 * PANEL, part + 2 * pair, 4);
    }
  }
}

template <int M, int V>
void gemm_tile(Rows a, const uint16_t* b, int64_t step, int64_t pairs, float* c) {
  F sum[M * V];
  UNROLL for (int j = 0; j < M * V; j++) sum[j] = set(0.0f);
  for (int64_t k = 0; k < pairs; k++, b += step) {
    Pairs columns[V];
    UNROLL for (int v = 0; v < V; v++) columns[v] = load_pairs(b + 2 * v * W);
    UNROLL for (int m = 0; m < M; m++) {
      Pairs row = set_pair(a.row[m] + k * a.step);
      UNROLL for (int v = 0; v < V; v++) sum[m * V + v] = dot(sum[m * V + v], row, columns[v]);
    }
  }
  UNROLL for (int j = 0; j < M * V; j++) store(c + j / V * PANEL + j % V * W, sum[j]);
}

template <int M>
void gemm_rows(Rows a, const uint16_t* b, int64_t step, int64_t pairs, int64_t columns, float* c) {
  // The last panel may need fewer vectors.
  switch ((columns + W - 1) / W) {
    case 1: return gemm_tile<M, 1>(a, b, step, pairs, c);
    case 2: return gemm_tile<M, 2>(a, b, step, pairs, c);
#if defined(__AVX512F__)
    case 3: return gemm_tile<M, 3>(a, b, step, pairs, c);
#endif
    default: return gemm_tile<M, TILE_VECTORS>(a, b, step, pairs, c);
  }
}

// For each tile of C done(row, rows, column, columns, c) is called with c[rows][PANEL].
template <class Done>
void gemm(Rows a, int64_t m_count, Columns b, int64_t k_count, int64_t n_count, Done done) {
  int64_t pairs = even(k_count) / 2;
  alignas(64) float c[TILE_ROWS * PANEL];
  for (int64_t n = 0; n < n_count; n += PANEL) {
    const uint16_t* panel = b.base + n / PANEL * b.panel;
    int64_t columns = n_count - n < PANEL ? n_count - n : PANEL;
    for (int64_t m = 0; m < m_count; m += TILE_ROWS) {
      int64_t rows = m_count - m < TILE_ROWS ? m_count - m : TILE_ROWS;
      Rows tile{a.row + m, a.step};
      switch (rows) {
        case 1: gemm_rows<1>(tile, panel, b.step, pairs, columns, c); break;
        case 2: gemm_rows<2>(tile, panel, b.step, pairs, columns, c); break;
        case 3: gemm_rows<3>(tile, panel, b.step, pairs, columns, c); break;
        case 4: gemm_rows<4>(tile, panel, b.step, pairs, columns, c); break;
#if defined(__AVX512F__)
        case 5: gemm_rows<5>(tile, panel, b.step, pairs, columns, c); break;
        case 6: gemm_rows<6>(tile, panel, b.step, pairs, columns, c); break;
#endif
      }
      done(m, rows, n, columns, c);
    }
  }
}

}  // namespace
