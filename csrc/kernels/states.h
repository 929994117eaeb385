// Where recurrences over tokens find a head's rows, and how states go between the caller's memory and
// working memory: there dense, here with rows up to a whole number of vectors.
#pragma once

#include "kernels/pack.h"
#include "kernels/runs.h"

namespace longspan::LONGSPAN_ISA {

/// What states are kept in.
template <class T>
inline constexpr Dtype kDtypeOf = sizeof(T) == 8 ? Dtype::kDouble : Dtype::kFloat;

/// A head's rows from a token on.
LS_INLINE TokenRows rows_of(const SequenceTensor& x, Dtype dtype, int64_t batch, int64_t head,
                            int64_t token) {
  const int64_t at = batch * x.batch + token * x.token + head * x.head;
  return {static_cast<char*>(x.data) + at * size_of(dtype), dtype, x.token};
}

/// One number of a token.
template <class T>
LS_INLINE T number_of(const GateTensor& x, int64_t batch, int64_t head, int64_t token) {
  return load_as<T>(x.data, x.dtype, batch * x.batch + head * x.head + token * x.token, 1)[0];
}
template <class T>
LS_INLINE void set_number(const GateTensor& x, int64_t batch, int64_t head, int64_t token, T value) {
  const int64_t at = batch * x.batch + head * x.head + token * x.token;
  store_as<T>(x.data, x.dtype, at, broadcast(value), 1);
}

/// A state's rows, `stride` apart, into rows of `width`, with zeros up to it; null is zeros.
template <class T>
void load_state(const T* from, int64_t stride, int64_t rows, int64_t columns, int64_t width, T* to) {
  if (from == nullptr) {
    __builtin_memset(to, 0, size_t(rows * width) * sizeof(T));
  } else {
    copy_rows<T>({from, kDtypeOf<T>, stride}, rows, columns, width, nullptr, to);
  }
}
template <class T>
void store_state(const T* from, int64_t width, int64_t rows, int64_t columns, T* to, int64_t stride) {
  store_rows<T>(from, width, rows, columns, nullptr, {to, kDtypeOf<T>, stride});
}

}  // namespace longspan::LONGSPAN_ISA
