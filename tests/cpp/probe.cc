// Compiled once for each instruction set, with the flags of its kernels.
#include "probe.h"

#include "kernels/pack.h"
#include "kernels/parallel.h"
#include "kernels/random.h"
#include "kernels/tile.h"
#include "simd/math.h"

#define LONGSPAN_QUOTE_(x) #x
#define LONGSPAN_QUOTE(x) LONGSPAN_QUOTE_(x)

namespace longspan::LONGSPAN_ISA {
namespace {

template <class T, class Function>
LS_INLINE void map(const T* in, T* out, int64_t count, const Function& function) {
  for (int64_t i = 0; i < count; i += kLanes<T>) store<T>(out + i, function(load(in + i)));
}

template <class T>
constexpr test::VectorProbe<T> vector_probe() {
  test::VectorProbe<T> p{};
  p.lanes = kLanes<T>;
  p.load_first = [](const T* in, int64_t n, T* out) {
    store<T>(out, longspan::LONGSPAN_ISA::load_first(in, n));
  };
  p.store_first = [](const T* in, T* out, int64_t n) {
    longspan::LONGSPAN_ISA::store_first<T>(out, load(in), n);
  };
  p.interleave = [](const T* a, const T* b, T* low, T* high) {
    store<T>(low, interleave_low<T>(load(a), load(b)));
    store<T>(high, interleave_high<T>(load(a), load(b)));
  };
  p.transpose = [](T* square) {
    Vec<T> rows[kLanes<T>];
    for (int i = 0; i < kLanes<T>; ++i) rows[i] = load(square + i * kLanes<T>);
    longspan::LONGSPAN_ISA::transpose<T>(rows);
    for (int i = 0; i < kLanes<T>; ++i) store<T>(square + i * kLanes<T>, rows[i]);
  };
  p.maximum = [](const T* a, const T* b, T* out) {
    store<T>(out, longspan::LONGSPAN_ISA::maximum<T>(load(a), load(b)));
  };
  p.sum_of_lanes = [](const T* in) { return longspan::LONGSPAN_ISA::sum_of_lanes<T>(load(in)); };
  p.exp2 = [](const T* in, T* out, int64_t n) {
    map(in, out, n, [](Vec<T> x) { return longspan::LONGSPAN_ISA::exp2<T>(x); });
  };
  p.exp2_nonpositive = [](const T* in, T* out, int64_t n) {
    map(in, out, n, [](Vec<T> x) { return longspan::LONGSPAN_ISA::exp2_nonpositive<T>(x); });
  };
  p.exp = [](const T* in, T* out, int64_t n) {
    map(in, out, n, [](Vec<T> x) { return longspan::LONGSPAN_ISA::exp<T>(x); });
  };
  p.tanh = [](const T* in, T* out, int64_t n) {
    map(in, out, n, [](Vec<T> x) { return longspan::LONGSPAN_ISA::tanh<T>(x); });
  };
  p.load_as = [](const void* in, Dtype dtype, int64_t at, int64_t n, T* out) {
    store<T>(out, longspan::LONGSPAN_ISA::load_as<T>(in, dtype, at, n));
  };
  p.store_as = [](const T* in, void* out, Dtype dtype, int64_t at, int64_t n) {
    longspan::LONGSPAN_ISA::store_as<T>(out, dtype, at, load(in), n);
  };
  return p;
}

template <class Dot>
void product(const test::ProductCall<typename Dot::Element, typename Dot::Sum>& p) {
  [[maybe_unused]] const TileUnit unit;
  const Product<Dot> product{p.a, p.a_row, p.a_depth, p.b, p.ldb, p.c, p.ldc, p.rescale, p.a_group};
  const auto start = [&]<Start kStart>() {
    p.guarded ? product.template run<kStart, true>(p.rows, p.columns, p.depth)
              : product.template run<kStart, false>(p.rows, p.columns, p.depth);
  };
  switch (Start(p.start)) {
    case Start::kZero:
      return start.template operator()<Start::kZero>();
    case Start::kAccumulate:
      return start.template operator()<Start::kAccumulate>();
    case Start::kRescale:
      return start.template operator()<Start::kRescale>();
    case Start::kRescaleRows:
      return start.template operator()<Start::kRescaleRows>();
  }
}

LS_INLINE TokenRows token_rows(const test::Rows& x) { return {x.data, x.dtype, x.stride}; }

template <class Dot>
constexpr test::DotProbe<typename Dot::Element, typename Dot::Sum> dot_probe() {
  using E = typename Dot::Element;
  using T = typename Dot::Sum;
  test::DotProbe<E, T> p{};
  p.depth = Dot::kDepth;
  p.product = product<Dot>;
  p.by_channel = [](const test::Rows& x, E* scratch, const E** data) {
    const Operand<Dot> o = by_channel<Dot>(token_rows(x), x.n, x.channels, scratch);
    *data = o.data;
    return o.stride;
  };
  p.by_token = [](const test::Rows& x, bool padded, E* scratch, const E** data) {
    const Operand<Dot> o = by_token<Dot>(token_rows(x), x.n, x.channels, padded, scratch);
    *data = o.data;
    return o.stride;
  };
  p.transposed = [](const test::Rows& x, E* out, int64_t ld) {
    transposed<Dot>(token_rows(x), x.n, x.channels, out, ld);
  };
  p.all_finite = [](const E* data, int64_t stride, int64_t rows, int64_t columns) {
    return all_finite<Dot>(Operand<Dot>{data, stride}, rows, columns);
  };
  p.store_transposed = [](const T* in, int64_t ld, const test::Rows& out, const T* scale) {
    store_transposed<T>(in, ld, out.n, out.channels, scale, const_cast<void*>(out.data), out.dtype,
                        out.stride);
  };
  return p;
}

void threefry_scalar(uint32_t a, uint32_t b, uint32_t* x, uint32_t* y) {
  threefry(RandomKey{a, b}, *x, *y);
}

void threefry_vector(uint32_t a, uint32_t b, uint32_t* x, uint32_t* y) {
  Vec<uint32_t> vx = load(x), vy = load(y);
  threefry(RandomKey{a, b}, vx, vy);
  store<uint32_t>(x, vx);
  store<uint32_t>(y, vy);
}

int count_threads(int64_t tasks, int threads) { return threads_for(tasks, threads); }

void run_parallel(int64_t tasks, int threads, void (*body)(void*, int64_t, int), void* context) {
  parallel_for(tasks, threads, [&](int64_t task, int thread) { body(context, task, thread); });
}

void lay_out_arena(char* base, int64_t* offsets) {
  Arena arena(base);
  offsets[0] = reinterpret_cast<char*>(arena.take<double>(1)) - base;
  offsets[1] = reinterpret_cast<char*>(arena.take<double>(3)) - base;
  offsets[2] = reinterpret_cast<char*>(arena.take<double>(100)) - base;
  offsets[3] = arena.used();
}

#if defined(LONGSPAN_BF16_DOT)
constexpr test::DotProbe<uint32_t, float> bf16_probe = dot_probe<DotBf16>();
constexpr const test::DotProbe<uint32_t, float>* kBf16 = &bf16_probe;
#else
constexpr const test::DotProbe<uint32_t, float>* kBf16 = nullptr;
#endif

}  // namespace

extern const test::Probe probe;
constinit const test::Probe probe = {
    LONGSPAN_QUOTE(LONGSPAN_ISA),
    vector_probe<float>(),
    vector_probe<double>(),
    dot_probe<DotFloat>(),
    dot_probe<DotDouble>(),
    kBf16,
    threefry_scalar,
    threefry_vector,
    count_threads,
    run_parallel,
    lay_out_arena,
};

}  // namespace longspan::LONGSPAN_ISA
