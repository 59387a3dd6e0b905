// What Python calls. Chooses the instruction level once, refuses one that this machine lacks, and shares work out.
#include <stdlib.h>
#include <string.h>

#include "kernels.h"
#include "pool.h"

#if defined(_WIN32)
#define EXPORT extern "C" __declspec(dllexport)
#else
#define EXPORT extern "C" __attribute__((visibility("default")))
#endif

#define LEVEL(name)                     \
  void fill_mamba_##name(Kernels*);     \
  void fill_experts_##name(Kernels*);   \
  void fill_linear_##name(Kernels*);    \
  void fill_norm_##name(Kernels*);      \
  void fill_nvfp4_##name(Kernels*);     \
  static void fill_##name(Kernels* k) { \
    fill_mamba_##name(k);               \
    fill_experts_##name(k);             \
    fill_linear_##name(k);              \
    fill_norm_##name(k);                \
    fill_nvfp4_##name(k);               \
  }

LEVEL(baseline)
#if defined(__x86_64__)
LEVEL(avx2)
LEVEL(avx512)
#endif

namespace {

struct Level {
  const char* name;
  void (*fill)(Kernels*);
  bool here;  // this machine can run it
};

// Best first.
const Level* levels(int* count) {
#if defined(__x86_64__)
  static const Level all[] = {
      {"avx512", fill_avx512,
       __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni") &&
           __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("fma")},
      {"avx2", fill_avx2,
       __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")},
      {"baseline", fill_baseline, true},
  };
#else
  static const Level all[] = {{"baseline", fill_baseline, true}};
#endif
  *count = static_cast<int>(sizeof all / sizeof all[0]);
  return all;
}

Kernels kernels;

struct Call {
  const void* arguments;
  char* scratch;
  int64_t bytes;  // per thread
};

int share_out(Piece piece, const void* arguments, int64_t bytes, int64_t items, int threads) {
  bytes = (bytes + 63) / 64 * 64;
  void* scratch = aligned_alloc(64, static_cast<size_t>(bytes) * threads);
  if (!scratch) return 1;
  Call call{arguments, static_cast<char*>(scratch), bytes};
  run_pieces(threads, items, piece, &call);
  free(scratch);
  return 0;
}

}  // namespace

// Changes with every change of the interface; Python refuses a library that answers another number.
EXPORT int nautilus_interface() { return 8; }

// The name of level `index`, best first, or null past the last one.
EXPORT const char* nautilus_level_name(int index) {
  int count;
  const Level* all = levels(&count);
  return index < count ? all[index].name : nullptr;
}

EXPORT int nautilus_level_is_here(int index) {
  int count;
  const Level* all = levels(&count);
  return index >= 0 && index < count && all[index].here;
}

// 0, or 1 when there is no such level or the machine cannot run it.
EXPORT int nautilus_choose(int index) {
  if (!nautilus_level_is_here(index)) return 1;
  int count;
  levels(&count)[index].fill(&kernels);
  return 0;
}

EXPORT void nautilus_borrow_team(void* parallel, void* thread_number) { borrow_team(parallel, thread_number); }

// 0, or 1 when there is no memory for scratch.
EXPORT int nautilus_mamba_forward(const MambaForward* f, int threads) {
  return share_out(
      [](void* context, int64_t item, int thread) {
        auto* call = static_cast<Call*>(context);
        kernels.mamba_forward(static_cast<const MambaForward*>(call->arguments), item,
                              call->scratch + call->bytes * thread);
      },
      f, kernels.mamba_scratch(&f->sizes, 0), f->sizes.rows * f->sizes.groups, threads);
}

EXPORT int nautilus_mamba_backward(const MambaBackward* b, int threads) {
  const MambaSizes& sizes = b->forward.sizes;
  return share_out(
      [](void* context, int64_t item, int thread) {
        auto* call = static_cast<Call*>(context);
        kernels.mamba_backward(static_cast<const MambaBackward*>(call->arguments), item,
                               call->scratch + call->bytes * thread);
      },
      b, kernels.mamba_scratch(&sizes, 1), sizes.rows * sizes.groups, threads);
}

namespace {

void combine(const ExpertsForward* f, const void* pairs, void* output, int weighted, int threads) {
  struct Sum {
    const ExpertsForward* f;
    const void* pairs;
    void* output;
    int weighted;
  } sum{f, pairs, output, weighted};
  run_pieces(
      threads, (f->sizes.tokens + EXPERTS_BLOCK - 1) / EXPERTS_BLOCK,
      [](void* context, int64_t block, int) {
        auto* s = static_cast<Sum*>(context);
        kernels.experts_combine(s->f, s->pairs, s->output, s->weighted, block);
      },
      &sum);
}

}  // namespace

EXPORT int nautilus_experts_forward(const ExpertsForward* f, int threads) {
  int failed = kernels.experts_sort(f);
  if (failed) return failed;
  failed = share_out(
      [](void* context, int64_t expert, int thread) {
        auto* call = static_cast<Call*>(context);
        kernels.experts_forward(static_cast<const ExpertsForward*>(call->arguments), expert,
                                call->scratch + call->bytes * thread);
      },
      f, kernels.experts_scratch(&f->sizes, 0), f->sizes.experts, threads);
  if (!failed) combine(f, f->y, f->output, 1, threads);
  return failed;
}

EXPORT int nautilus_experts_backward(const ExpertsBackward* b, int threads) {
  int failed = share_out(
      [](void* context, int64_t expert, int thread) {
        auto* call = static_cast<Call*>(context);
        kernels.experts_backward(static_cast<const ExpertsBackward*>(call->arguments), expert,
                                 call->scratch + call->bytes * thread);
      },
      b, kernels.experts_scratch(&b->forward.sizes, 1), b->forward.sizes.experts, threads);
  if (!failed) combine(&b->forward, b->forward.y, b->dx, 0, threads);
  return failed;
}

namespace {

// Kernels without scratch: kernel(arguments, item) for every item.
template <class Arguments>
int share_out_plainly(void (*kernel)(const Arguments*, int64_t), const Arguments* arguments, int64_t items, int threads) {
  struct Plain {
    void (*kernel)(const Arguments*, int64_t);
    const Arguments* arguments;
  } plain{kernel, arguments};
  run_pieces(
      threads, items,
      [](void* context, int64_t item, int) {
        auto* p = static_cast<Plain*>(context);
        p->kernel(p->arguments, item);
      },
      &plain);
  return 0;
}

int64_t blocks(int64_t count, int64_t size) { return (count + size - 1) / size; }

}  // namespace

EXPORT int nautilus_norm_forward(const NormForward* f, int threads) {
  return share_out_plainly(kernels.norm_forward, f, blocks(f->rows, NORM_BLOCK), threads);
}

EXPORT int nautilus_norm_backward(const NormBackward* g, int threads) {
  return share_out_plainly(kernels.norm_backward, g, blocks(g->forward.rows, NORM_BLOCK), threads);
}

EXPORT int nautilus_sigmoid(const Sigmoid* s, int threads) {
  return share_out_plainly(kernels.sigmoid, s, blocks(s->count, SIGMOID_BLOCK), threads);
}

EXPORT int64_t nautilus_linear_packed_size(const LinearPack* p) { return kernels.linear_packed_size(p); }

EXPORT int nautilus_linear_pack(const LinearPack* p, int threads) {
  return share_out_plainly(kernels.linear_pack, p, kernels.linear_panels(p->outputs), threads);
}

EXPORT int nautilus_linear_forward(const LinearForward* f, int threads) {
  int64_t items = kernels.linear_panels(f->outputs) * kernels.linear_row_blocks(f->rows);
  return share_out_plainly(kernels.linear_forward, f, items, threads);
}

EXPORT int nautilus_nvfp4_pack(const Nvfp4Pack* p, int threads) {
  return share_out_plainly(kernels.nvfp4_pack, p, blocks(p->outputs, NVFP4_ROWS), threads);
}

EXPORT int nautilus_nvfp4_forward(const Nvfp4Forward* f, int threads) {
  share_out_plainly(kernels.nvfp4_quantise, f, f->rows, threads);
  int64_t items = blocks(f->outputs, 4 * NVFP4_ROWS) * blocks(f->rows, NVFP4_BLOCK);
  return share_out_plainly(kernels.nvfp4_forward, f, items, threads);
}
