// y = x W^T in bf16 with float32 sums, one item of work per panel of outputs and block of rows. W is packed as gemm.h
// wants it, from bf16 or float32 masters.
#include "gemm.h"
#include "kernels.h"

namespace {

using bf16 = uint16_t;
constexpr int64_t ROW_BLOCK = 32 * TILE_ROWS;

template <class T>
void pack_panel(const LinearPack* p, int64_t panel) {
  int64_t n = panel * PANEL, columns = p->outputs - n < PANEL ? p->outputs - n : PANEL;
  pack_columns(static_cast<bf16*>(p->packed) + panel * PANEL * even(p->inputs),
               static_cast<const T*>(p->weight) + n * p->inputs, p->inputs, columns);
}
void linear_pack(const LinearPack* p, int64_t panel) {
  p->bf16 ? pack_panel<bf16>(p, panel) : pack_panel<float>(p, panel);
}
int64_t linear_packed_size(int64_t inputs, int64_t outputs) { return packed_size(inputs, outputs) * 2; }
int64_t linear_panels(int64_t outputs) { return panels(outputs); }
int64_t linear_row_blocks(int64_t rows) { return (rows + ROW_BLOCK - 1) / ROW_BLOCK; }

void linear_forward(const LinearForward* f, int64_t item) {
  int64_t panel = item % panels(f->outputs), first = item / panels(f->outputs) * ROW_BLOCK;
  int64_t rows = f->rows - first < ROW_BLOCK ? f->rows - first : ROW_BLOCK;
  int64_t column = panel * PANEL, columns = f->outputs - column < PANEL ? f->outputs - column : PANEL;
  const bf16* x[ROW_BLOCK];
  for (int64_t r = 0; r < rows; r++) x[r] = static_cast<const bf16*>(f->x) + (first + r) * f->inputs;
  Columns b = packed(static_cast<const bf16*>(f->packed) + panel * PANEL * even(f->inputs), f->inputs);
  gemm({x, 2}, rows, b, f->inputs, columns, [&](int64_t m, int64_t count, int64_t, int64_t, const float* c) {
    for (int64_t r = 0; r < count; r++) {
      int64_t at = (first + m + r) * f->outputs + column;
      f->wide ? copy(static_cast<float*>(f->y) + at, c + r * PANEL, columns)
              : copy(static_cast<bf16*>(f->y) + at, c + r * PANEL, columns);
    }
  });
}

}  // namespace

void NAUTILUS_FILL(linear)(Kernels* k) {
  k->linear_pack = linear_pack;
  k->linear_packed_size = linear_packed_size;
  k->linear_panels = linear_panels;
  k->linear_row_blocks = linear_row_blocks;
  k->linear_forward = linear_forward;
}
