// What Python calls. Chooses the instruction level once, refuses one that this machine lacks, and shares work out.
#include <stdlib.h>
#include <string.h>

#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

#include "kernels.h"
#include "pool.h"
#include "scratch.h"

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
  void fill_quant_##name(Kernels*);     \
  void fill_route_##name(Kernels*);     \
  void fill_attention_##name(Kernels*); \
  void fill_attention_backward_##name(Kernels*); \
  void fill_activation_##name(Kernels*);\
  void fill_rotary_##name(Kernels*);    \
  void fill_lowbit_##name(Kernels*);    \
  void fill_peak_##name(Kernels*);      \
  void fill_draw_##name(Kernels*);      \
  static void fill_##name(Kernels* k) { \
    fill_mamba_##name(k);               \
    fill_experts_##name(k);             \
    fill_linear_##name(k);              \
    fill_norm_##name(k);                \
    fill_quant_##name(k);               \
    fill_route_##name(k);               \
    fill_attention_##name(k);           \
    fill_attention_backward_##name(k);  \
    fill_activation_##name(k);          \
    fill_rotary_##name(k);              \
    fill_lowbit_##name(k);              \
    fill_peak_##name(k);                \
    fill_draw_##name(k);                \
  }

LEVEL(baseline)
#if defined(__x86_64__)
LEVEL(avx2)
LEVEL(avx512)
#elif defined(__aarch64__)
LEVEL(neon)
LEVEL(neon_dot)
#endif

namespace {

struct Level {
  const char* name;
  void (*fill)(Kernels*);
  bool here;  // this machine can run it
};

#if defined(__aarch64__)
// Whether the processor has the dot product of bytes.
bool has_dot() {
#if defined(__linux__)
  return getauxval(AT_HWCAP) & HWCAP_ASIMDDP;
#elif defined(__APPLE__)
  int found = 0;
  size_t size = sizeof found;
  return sysctlbyname("hw.optional.arm.FEAT_DotProd", &found, &size, nullptr, 0) == 0 && found;
#else
  return false;
#endif
}
#endif

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
#elif defined(__aarch64__)
  static const Level all[] = {
      {"neon_dot", fill_neon_dot, has_dot()}, {"neon", fill_neon, true}, {"baseline", fill_baseline, true}};
#else
  static const Level all[] = {{"baseline", fill_baseline, true}};
#endif
  *count = static_cast<int>(sizeof all / sizeof all[0]);
  return all;
}

Kernels kernels;

// Memory of one caller, kept between calls: mapping and clearing pages costs more than many a kernel.
struct Arena {
  char* base = nullptr;
  int64_t size = 0;
  ~Arena() { free(base); }

  // Lay out the pieces once to count and once to take them; false when there is no memory.
  template <class Pieces>
  bool lay(Pieces pieces) {
    Scratch counted{nullptr};
    pieces(counted);
    if (counted.bytes > size) {
      free(base);
      base = static_cast<char*>(aligned_alloc(64, static_cast<size_t>(counted.bytes + 4095) / 4096 * 4096));
      size = base ? counted.bytes : 0;
    }
    if (!base) return false;
    without_pieces(base, counted.bytes);
    Scratch taken{base};
    pieces(taken);
    return true;
  }
};
thread_local Arena pieces_arena;

struct Call {
  const void* arguments;
  char* scratch;
  int64_t bytes;  // per thread
};

int share_out(Piece piece, const void* arguments, int64_t bytes, int64_t items, int threads) {
  bytes = (bytes + 63) / 64 * 64;
  char* scratch;
  if (!pieces_arena.lay([&](Scratch& pieces) { scratch = pieces.take<char>(bytes * threads); })) return 1;
  Call call{arguments, scratch, bytes};
  run_pieces(threads, items, piece, &call);
  return 0;
}

}  // namespace

// Changes with every change of the interface; Python refuses a library that answers another number.
EXPORT int nautilus_interface() { return 23; }

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

// 0, 1 when there is no memory for scratch, 2 for a slot that does not exist or that keeps more than it can or where rows
// do not share out the tokens, 3 where tokens wait for a verdict, or 4 for more tentative ones than a slot can keep.
EXPORT int nautilus_mamba_forward(const MambaForward* f, int threads) {
  if (f->begin && (f->begin[0] != 0 || f->begin[f->sizes.rows] != f->sizes.time)) return 2;
  for (int64_t row = 0; f->slot && row < f->sizes.rows; row++) {
    if (f->slot[row] < 0 || f->slot[row] >= f->slots || f->tokens(row) < 0) return 2;
    if (f->pending && f->pending[f->slot[row]] < 0) return 3;
    if (f->pending && f->pending[f->slot[row]] > f->sizes.window) return 2;
    if (f->tentative && f->tokens(row) > f->sizes.window) return 4;
  }
  int failed = share_out(
      [](void* context, int64_t item, int thread) {
        auto* call = static_cast<Call*>(context);
        kernels.mamba_forward(static_cast<const MambaForward*>(call->arguments), item,
                              call->scratch + call->bytes * thread);
      },
      f, kernels.mamba_scratch(&f->sizes, 0), f->sizes.rows * f->sizes.groups, threads);
  for (int64_t row = 0; f->pending && !failed && row < f->sizes.rows; row++)
    f->pending[f->slot[row]] = f->tentative ? static_cast<int32_t>(-f->tokens(row)) : 0;
  return failed;
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

int64_t blocks(int64_t count, int64_t size) { return (count + size - 1) / size; }

void combine(const ExpertsForward* f, const void* pairs, void* output, int weighted, int threads) {
  struct Sum {
    const ExpertsForward* f;
    const void* pairs;
    void* output;
    int weighted;
  } sum{f, pairs, output, weighted};
  run_pieces(
      threads, blocks(f->sizes.tokens, EXPERTS_TOKENS) * blocks(f->sizes.width, EXPERTS_COLUMNS),
      [](void* context, int64_t item, int) {
        auto* s = static_cast<Sum*>(context);
        kernels.experts_combine(s->f, s->pairs, s->output, s->weighted, item);
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

}  // namespace

EXPORT int nautilus_norm_forward(const NormForward* f, int threads) {
  return share_out_plainly(kernels.norm_forward, f, blocks(f->rows, NORM_ROWS), threads);
}

EXPORT int nautilus_norm_backward(const NormBackward* g, int threads) {
  return share_out_plainly(kernels.norm_backward, g, blocks(g->forward.rows, NORM_BLOCK), threads);
}

EXPORT int nautilus_add(const Add* a, int threads) {
  return share_out_plainly(kernels.add, a, blocks(a->count, ADD_BLOCK), threads);
}

EXPORT int nautilus_embed(const Embed* e, int threads) {
  for (int64_t row = 0; row < e->rows; row++)
    if (e->index[row] < 0 || e->index[row] >= e->vocab) return 2;
  return share_out_plainly(kernels.embed, e, e->rows, threads);
}

EXPORT int nautilus_swiglu(const Swiglu* f, int threads) {
  return share_out_plainly(kernels.swiglu, f, blocks(f->count, ADD_BLOCK), threads);
}

EXPORT int nautilus_swiglu_backward(const SwigluBackward* g, int threads) {
  return share_out_plainly(kernels.swiglu_backward, g, blocks(g->forward.count, ADD_BLOCK), threads);
}

EXPORT int nautilus_rotary(const Rotary* f, int threads) {
  return share_out_plainly(kernels.rotary, f, blocks(f->tokens, ROTARY_BLOCK), threads);
}

EXPORT int nautilus_peak(const Peak* p, int threads) { return share_out_plainly(kernels.peak, p, p->rows, threads); }

EXPORT int nautilus_draw(const Draw* d, int threads) { return share_out_plainly(kernels.draw, d, d->rows, threads); }

EXPORT int nautilus_route(const Route* r, int threads) {
  return share_out(
      [](void* context, int64_t block, int thread) {
        auto* call = static_cast<Call*>(context);
        kernels.route(static_cast<const Route*>(call->arguments), block, call->scratch + call->bytes * thread);
      },
      r, kernels.route_scratch(r), blocks(r->tokens, ROUTE_BLOCK), threads);
}

EXPORT int64_t nautilus_linear_packed_size(const LinearPack* p) { return kernels.linear_packed_size(p); }

EXPORT int nautilus_linear_pack(const LinearPack* p, int threads) {
  return share_out_plainly(kernels.linear_pack, p, kernels.linear_panels(p->outputs), threads);
}

EXPORT int64_t nautilus_quant_sizes(const QuantMatrix* w, int64_t* scales) {
  *scales = kernels.quant_scales(w);
  return kernels.quant_codes(w);
}

EXPORT int nautilus_quant_pack(const QuantPack* p, int threads) {
  return share_out_plainly(kernels.quant_pack, p, p->to.count * blocks(p->to.outputs, QUANT_COLUMNS), threads);
}

namespace {

thread_local Arena arena;

int64_t groups(int64_t inputs) { return blocks(inputs, QUANT_GROUP); }

// The buffers of rows as int8.
void take_rows(Scratch& pieces, QuantRows* r) {
  r->q = pieces.take<int8_t>(r->rows * groups(r->inputs) * QUANT_GROUP);
  r->scale = pieces.take<float>(r->rows * groups(r->inputs));
  r->sum = pieces.take<int32_t>(r->rows * groups(r->inputs) * 2);
}

// y = x W^T with the rows of `x` as the format of W wants them.
void quant_multiply(QuantForward f, const QuantRows& x, int threads) {
  f.x = x.x;
  f.q = x.q;
  f.q_scale = x.scale;
  f.q_sum = x.sum;
  share_out_plainly(kernels.quant_forward, &f, f.span_count * blocks(f.w.outputs, QUANT_COLUMNS), threads);
}
void quantise(const QuantRows& x, int threads) {
  if (x.format != QUANT_FP8) share_out_plainly(kernels.quant_rows, &x, x.rows, threads);
}

int64_t cut_in_spans(QuantSpan* spans, int matrix, int64_t begin, int64_t end) {
  int64_t count = 0;
  for (int64_t row = begin; row < end; row += QUANT_BLOCK, count++)
    spans[count] = {matrix, static_cast<int32_t>(row), static_cast<int32_t>(end - row < QUANT_BLOCK ? end - row : QUANT_BLOCK)};
  return count;
}

}  // namespace

EXPORT int nautilus_linear_forward(const LinearForward* f, int threads) {
  LinearForward wide = *f;
  if (f->x_bf16 && !f->bf16) {
    float* x;
    if (!arena.lay([&](Scratch& pieces) { x = pieces.take<float>(f->rows * f->inputs); })) return 1;
    // As an embedding whose table is x.
    int64_t row = 0;
    Embed each{1, f->inputs, f->rows, 1, 0, &row, f->x, x};
    for (; row < f->rows; row++, each.y = x + row * f->inputs) kernels.embed(&each, 0);
    wide.x = x;
  }
  int64_t items = kernels.linear_panels(f->outputs) * kernels.linear_row_blocks(f->rows);
  return share_out_plainly(kernels.linear_forward, &wide, items, threads);
}

EXPORT int nautilus_quant_linear(const QuantLinear* l, int threads) {
  QuantRows x{l->rows, l->w.inputs, l->w.format, 1, l->x, nullptr, nullptr, nullptr};
  QuantSpan* spans;
  if (!arena.lay([&](Scratch& pieces) {
        take_rows(pieces, &x);
        spans = pieces.take<QuantSpan>(blocks(l->rows, QUANT_BLOCK));
      }))
    return 1;
  quantise(x, threads);
  QuantForward f{};
  f.w = l->w;
  f.spans = spans;
  f.span_count = cut_in_spans(spans, 0, 0, l->rows);
  f.squared_relu = l->squared_relu;
  f.wide = l->wide;
  f.y = l->y;
  quant_multiply(f, x, threads);
  return 0;
}

EXPORT int nautilus_quant_experts(const QuantExperts* e, int threads) {
  ExpertsForward sorted = e->pairs;
  const ExpertsSizes& s = sorted.sizes;
  int64_t pairs = s.tokens * s.active;
  // Integer products take the hidden numbers in float32 and round them once; FP8 takes them in bf16.
  bool wide = e->down.format != QUANT_FP8;
  QuantRows x{s.tokens, s.width, e->up.format, 1, sorted.x, nullptr, nullptr, nullptr};
  QuantRows act{pairs, s.hidden, e->down.format, !wide, nullptr, nullptr, nullptr, nullptr};
  void *hidden, *y, *up_x, *gate_x = nullptr;
  QuantSpan* spans;
  if (!arena.lay([&](Scratch& pieces) {
        take_rows(pieces, &x);
        take_rows(pieces, &act);
        hidden = up_x = pieces.take<char>(pairs * s.hidden * (wide ? 4 : 2));
        if (s.gated) gate_x = pieces.take<float>(pairs * s.hidden);
        if (s.gated && !wide) up_x = pieces.take<float>(pairs * s.hidden);
        y = pieces.take<uint16_t>(pairs * s.width);
        spans = pieces.take<QuantSpan>(s.experts + pairs / QUANT_BLOCK + 1);
        sorted.first = pieces.take<int32_t>(s.experts + 1);
        sorted.pair = pieces.take<int32_t>(pairs);
        sorted.place = pieces.take<int32_t>(pairs);
      }))
    return 1;
  if (int failed = kernels.experts_sort(&sorted)) return failed;
  int64_t count = 0;
  for (int64_t expert = 0; expert < s.experts; expert++)
    count += cut_in_spans(spans + count, static_cast<int>(expert), sorted.first[expert], sorted.first[expert + 1]);
  quantise(x, threads);
  QuantForward up{e->up, count, wide || s.gated, !s.gated, spans, sorted.pair, s.active, nullptr, nullptr, nullptr, nullptr, up_x};
  quant_multiply(up, x, threads);
  if (s.gated) {
    up.w = e->gate;
    up.y = gate_x;
    quant_multiply(up, x, threads);
    Swiglu gated{pairs * s.hidden, 0, !wide, gate_x, up_x, hidden};
    nautilus_swiglu(&gated, threads);
  }
  act.x = hidden;
  quantise(act, threads);
  QuantForward down{e->down, count, 0, 0, spans, nullptr, 1, nullptr, nullptr, nullptr, nullptr, y};
  quant_multiply(down, act, threads);
  combine(&sorted, y, sorted.output, 1, threads);
  return 0;
}

namespace {

// Every group's rows in pieces of at most LOWBIT_BLOCK.
struct LowBitWork {
  LowBitSpan* spans;
  int64_t count = 0;
  uint32_t* largest;  // of each span, then amax as a float
  int64_t* flushed;
  uint16_t* packed;

  bool lay(const int64_t* first, int64_t groups, int64_t numbers) {
    int64_t most = groups + first[groups] / LOWBIT_BLOCK;
    if (!arena.lay([&](Scratch& pieces) {
          spans = pieces.take<LowBitSpan>(most);
          largest = pieces.take<uint32_t>(most);
          flushed = pieces.take<int64_t>(most);
          packed = pieces.take<uint16_t>(numbers);
        }))
      return false;
    for (int64_t g = 0; g < groups; g++)
      for (int64_t row = first[g]; row < first[g + 1]; row += LOWBIT_BLOCK, count++)
        spans[count] = {g, row, first[g + 1] - row < LOWBIT_BLOCK ? first[g + 1] - row : LOWBIT_BLOCK};
    return true;
  }
};

template <class Each>
void each_item(int threads, int64_t items, Each each) {
  run_pieces(
      threads, items, [](void* context, int64_t item, int) { (*static_cast<Each*>(context))(item); }, &each);
}

// amax of each group to its spans.
void share_largest(const LowBit* f, LowBitWork& work) {
  for (int64_t i = 0, g = 0; g < f->groups; g++) {
    uint32_t most = 0;
    int64_t begin = i;
    for (; i < work.count && work.spans[i].group == g; i++) most = work.largest[i] > most ? work.largest[i] : most;
    for (int64_t j = begin; j < i; j++) work.largest[j] = most;
    float amax;
    memcpy(&amax, &most, 4);
    f->top[g] = most >= 0x7F800000 ? amax - amax : amax;
  }
}

}  // namespace

EXPORT int nautilus_lowbit(LowBit* f, int threads) {
  LowBitWork work;
  if (!work.lay(f->first, f->groups, 0)) return 1;
  if (f->known) {
    for (int64_t i = 0; i < work.count; i++) memcpy(work.largest + i, f->top + work.spans[i].group, 4);
  } else if (f->format == LOWBIT_NVFP4) {
    each_item(threads, work.count, [&](int64_t i) { work.largest[i] = kernels.lowbit_largest(f, work.spans + i); });
    share_largest(f, work);
  } else {
    for (int64_t g = 0; g < f->groups; g++) f->top[g] = LOWBIT_TOP;
  }
  f->flushed = 0;
  if (!f->y) return 0;
  each_item(threads, work.count, [&](int64_t i) {
    float amax;
    memcpy(&amax, work.largest + i, 4);
    work.flushed[i] = kernels.lowbit_round(f, work.spans + i, amax);
  });
  for (int64_t i = 0; i < work.count; i++) f->flushed += work.flushed[i];
  return 0;
}

EXPORT int nautilus_lowbit_product(const LowBitProduct* p, int threads) {
  int64_t across = kernels.lowbit_panels(p);
  if (p->kind == LOWBIT_WEIGHTS)
    return share_out(
        [](void* context, int64_t item, int thread) {
          auto* call = static_cast<Call*>(context);
          auto* p = static_cast<const LowBitProduct*>(call->arguments);
          int64_t across = kernels.lowbit_panels(p);
          kernels.lowbit_outer(p, item / across, item % across, call->scratch + call->bytes * thread);
        },
        p, kernels.lowbit_scratch(p), across * p->groups, threads);
  LowBitWork work;
  int64_t size = kernels.lowbit_packed(p);
  if (!work.lay(p->first, p->groups, size * p->groups)) return 1;
  each_item(threads, across * p->groups, [&](int64_t item) {
    kernels.lowbit_pack(p, item / across, item % across, work.packed + size * (item / across));
  });
  each_item(threads, across * work.count, [&](int64_t item) {
    const LowBitSpan* span = work.spans + item / across;
    kernels.lowbit_rows(p, span, item % across, work.packed + size * span->group);
  });
  return 0;
}

EXPORT int nautilus_read_all(ReadAll* r, int threads) {
  run_pieces(
      threads < READ_THREADS ? threads : READ_THREADS, blocks(r->count, READ_BLOCK),
      [](void* context, int64_t block, int thread) {
        auto* read = static_cast<ReadAll*>(context);
        int64_t end = (block + 1) * READ_BLOCK < read->count ? (block + 1) * READ_BLOCK : read->count, sum = 0;
        // A number of each line: all of the line comes, and adding the others up would take longer than that.
        for (int64_t i = block * READ_BLOCK; i < end; i += 8) {
          if (read->ahead) __builtin_prefetch(reinterpret_cast<const char*>(read->memory + i) + read->ahead, 0, 2);
          sum += read->memory[i];
        }
        read->sum[thread] += sum;
      },
      r);
  return 0;
}

// Calls that were recorded, one after the other. `failed` is the first that did not return 0.
EXPORT int nautilus_replay(Replay* r, int threads) {
  struct Run {
    Replay* r;
    int threads, failure;
  } run{r, threads, 0};
  stay_together(
      threads,
      [](void* context) {
        auto* run = static_cast<Run*>(context);
        Replay* r = run->r;
        for (r->failed = 0; r->failed < r->count; r->failed++) {
          const ReplayEntry& entry = r->entries[r->failed];
          if ((run->failure = entry.function(entry.arguments, run->threads))) return;
        }
      },
      &run);
  return run.failure;
}

// 2 where the tokens of the rows are not those of the call.
EXPORT int nautilus_positions(const Positions* p, int) {
  int64_t token = 0;
  for (int64_t row = 0; row < p->rows; row++) {
    if (p->begin[row] != token || p->begin[row + 1] < token || p->begin[row + 1] > p->tokens) return 2;
    for (; token < p->begin[row + 1]; token++) p->position[token] = p->length[row] - (p->begin[row + 1] - token);
  }
  return token == p->tokens ? 0 : 2;
}

// 2 where the call would touch pages outside the pool.
EXPORT int nautilus_kv_write(const KvWrite* f, int threads) {
  if (int failed = kernels.kv_check(f)) return failed;
  return share_out(
      [](void* context, int64_t item, int thread) {
        auto* call = static_cast<Call*>(context);
        kernels.kv_write(static_cast<const KvWrite*>(call->arguments), item, call->scratch + call->bytes * thread);
      },
      f, kernels.kv_scratch(f), f->at.rows * f->at.groups, threads);
}

EXPORT int nautilus_attention_forward(const AttentionForward* f, int threads) {
  if (int failed = kernels.attention_check(f)) return failed;
  return share_out(
      [](void* context, int64_t item, int thread) {
        auto* call = static_cast<Call*>(context);
        kernels.attention_forward(static_cast<const AttentionForward*>(call->arguments), item,
                                  call->scratch + call->bytes * thread);
      },
      f, kernels.attention_scratch(f), kernels.attention_items(f), threads);
}

// Slab after slab: keys of all strips at once, then what they found for the slab's queries.
EXPORT int nautilus_attention_backward(const AttentionBackward* b, int threads) {
  struct Slab {
    const AttentionBackward* b;
    int64_t from;
  };
  int64_t pairs = b->rows * b->groups, rows = b->time * (b->heads / b->groups), strips = blocks(b->positions, b->strip);
  for (Slab slab{b, 0}; slab.from < rows; slab.from += b->slab) {
    int failed = share_out(
        [](void* context, int64_t item, int thread) {
          auto* call = static_cast<Call*>(context);
          auto* slab = static_cast<const Slab*>(call->arguments);
          kernels.attention_backward_piece(slab->b, item, slab->from, call->scratch + call->bytes * thread);
        },
        &slab, kernels.attention_backward_scratch(b), pairs * strips, threads);
    if (failed) return failed;
    each_item(threads, pairs * (b->slab / ATTENTION_BLOCK),
              [&](int64_t item) { kernels.attention_backward_queries(b, item, slab.from); });
  }
  return share_out_plainly(kernels.attention_backward_keys, b, pairs * strips, threads);
}
