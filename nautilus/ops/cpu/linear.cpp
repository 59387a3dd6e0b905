// y = x W^T with float32 sums, one item of work per panel of outputs and block of rows. W is packed as gemm.h wants it: for
// bf16 activations as bf16, rounded from float32 masters, for float activations as what it is.
#include "gemm.h"
#include "kernels.h"

namespace {

using bf16 = uint16_t;
constexpr int64_t ROW_BLOCK = 32 * TILE_ROWS;

template <class To, class From>
void pack_panel(const LinearPack* p, int64_t panel) {
  int64_t n = panel * PANEL, columns = p->outputs - n < PANEL ? p->outputs - n : PANEL;
  pack_columns(static_cast<To*>(p->packed) + panel * panel_size<To>(p->inputs),
               static_cast<const From*>(p->weight) + n * p->inputs, p->inputs, columns);
}
void linear_pack(const LinearPack* p, int64_t panel) {
  if (p->bf16)
    p->weight_bf16 ? pack_panel<bf16, bf16>(p, panel) : pack_panel<bf16, float>(p, panel);
  else
    p->weight_bf16 ? pack_panel<float, bf16>(p, panel) : pack_panel<float, float>(p, panel);
}
int64_t linear_packed_size(const LinearPack* p) {
  return p->bf16 ? packed_size<bf16>(p->inputs, p->outputs) * 2 : packed_size<float>(p->inputs, p->outputs) * 4;
}
int64_t linear_panels(int64_t outputs) { return panels(outputs); }
int64_t linear_row_blocks(int64_t rows) { return (rows + ROW_BLOCK - 1) / ROW_BLOCK; }

// One row of a tile of sums as the call wants it.
template <class Y>
void put(const LinearForward* f, Y* y, const float* c, int64_t columns) {
  if (!f->squared_relu) return copy(y, c, columns);
  for (int64_t j = 0; j < columns; j += W) {
    // Rounded before it is squared, as if the product were a call of its own.
    Y rounded[W];
    store(rounded, load(c + j));
    F h = larger(load(rounded), set(0.0f));
    store(y + j, h * h, columns - j);
  }
}

template <class T, class B>
void forward(const LinearForward* f, int64_t item) {
  int64_t panel = item % panels(f->outputs), first = item / panels(f->outputs) * ROW_BLOCK;
  int64_t rows = f->rows - first < ROW_BLOCK ? f->rows - first : ROW_BLOCK;
  int64_t column = panel * PANEL, columns = f->outputs - column < PANEL ? f->outputs - column : PANEL;
  const T* x[ROW_BLOCK];
  for (int64_t r = 0; r < rows; r++) x[r] = static_cast<const T*>(f->x) + (first + r) * f->inputs;
  Columns<B> b = packed(static_cast<const B*>(f->packed) + panel * panel_size<B>(f->inputs), f->inputs);
  gemm<T>({x, Step<T, B>::K}, rows, b, f->inputs, columns,
          [&](int64_t m, int64_t count, int64_t, int64_t, const float* c) {
            for (int64_t r = 0; r < count; r++) {
              int64_t at = (first + m + r) * f->outputs + column;
              f->y_bf16 ? put(f, static_cast<bf16*>(f->y) + at, c + r * PANEL, columns)
                        : put(f, static_cast<float*>(f->y) + at, c + r * PANEL, columns);
            }
          });
}
void linear_forward(const LinearForward* f, int64_t item) {
  if (f->bf16) return forward<bf16, bf16>(f, item);
  f->packed_bf16 ? forward<float, bf16>(f, item) : forward<float, float>(f, item);
}

}  // namespace

void NAUTILUS_FILL(linear)(Kernels* k) {
  k->linear_pack = linear_pack;
  k->linear_packed_size = linear_packed_size;
  k->linear_panels = linear_panels;
  k->linear_row_blocks = linear_row_blocks;
  k->linear_forward = linear_forward;
}
