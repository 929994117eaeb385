// Between the element types in memory and the types that kernels compute in.
//
// bfloat16 and half come and go as uint16_t; conversion to them rounds to nearest even and keeps
// NaN a NaN.
#pragma once

#include "kernels/dtype.h"
#include "simd/simd.h"

namespace longspan::LONGSPAN_ISA {

/// As many 16-bit integers as a Vec<float> has lanes.
typedef uint16_t Half16 __attribute__((vector_size(LONGSPAN_VECTOR_BYTES / 2)));

LS_INLINE Half16 load_half16(const void* p, int64_t n = kLanes<float>) {
  Half16 v = {};
  if (n >= kLanes<float>) {
    __builtin_memcpy(&v, p, sizeof v);
  } else {
    __builtin_memcpy(&v, p, size_t(n) * 2);
  }
  return v;
}

LS_INLINE Vec<float> float_of_bfloat16(Half16 h) {
  return bit_cast<float, uint32_t>(__builtin_convertvector(h, Vec<uint32_t>) << 16);
}

LS_INLINE Half16 bfloat16_of_float(Vec<float> x) {
  const Vec<uint32_t> bits = bit_cast<uint32_t, float>(x);
  const Vec<uint32_t> rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Vec<uint32_t> quiet = (bits >> 16) | 0x40u;
  return __builtin_convertvector(x == x ? rounded : quiet, Half16);
}

#if defined(__F16C__) || defined(__AVX512F__) || defined(__aarch64__)

LS_INLINE Vec<float> float_of_half(Half16 h) {
#if defined(__AVX512F__)
  return Vec<float>(_mm512_cvtph_ps(__m256i(h)));
#elif defined(__F16C__)
  return Vec<float>(_mm256_cvtph_ps(__m128i(h)));
#else
  return Vec<float>(vcvt_f32_f16(vreinterpret_f16_u16(uint16x4_t(h))));
#endif
}

LS_INLINE Half16 half_of_float(Vec<float> x) {
#if defined(__AVX512F__)
  return Half16(_mm512_cvtps_ph(__m512(x), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  return Half16(_mm256_cvtps_ph(__m256(x), _MM_FROUND_TO_NEAREST_INT));
#else
  return Half16(vreinterpret_u16_f16(vcvt_f16_f32(float32x4_t(x))));
#endif
}

#else  // no instruction for it: with integers

LS_INLINE Vec<float> float_of_half(Half16 h) {
  const Vec<uint32_t> bits = __builtin_convertvector(h, Vec<uint32_t>);
  const Vec<uint32_t> sign = (bits & 0x8000u) << 16;
  const Vec<uint32_t> rest = (bits & 0x7fffu) << 13;
  // Exponent and mantissa in place are the value times 2^-112; denormals come out right too.
  const Vec<float> scaled = bit_cast<float, uint32_t>(rest) * 5.192296858534828e33f;
  const Vec<uint32_t> special = rest | 0x7f800000u;  // infinity and NaN
  return bit_cast<float, uint32_t>(
      sign | ((rest >= 0x0f800000u) ? special : bit_cast<uint32_t, float>(scaled)));
}

LS_INLINE Half16 half_of_float(Vec<float> x) {
  const Vec<uint32_t> bits = bit_cast<uint32_t, float>(x);
  const Vec<uint32_t> sign = (bits >> 16) & 0x8000u;
  const Vec<uint32_t> magnitude = bits & 0x7fffffffu;
  // Normal: rebias the exponent, round to nearest even. Denormal: let the float adder round.
  const Vec<uint32_t> normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const Vec<float> shifted = bit_cast<float, uint32_t>(magnitude) + 0.5f;
  const Vec<uint32_t> denormal = bit_cast<uint32_t, float>(shifted) - 0x3f000000u;
  Vec<uint32_t> result = magnitude < 0x38800000u ? denormal : normal;
  result = magnitude >= 0x477ff000u ? Vec<uint32_t>{} + 0x7c00u : result;
  result = magnitude > 0x7f800000u ? Vec<uint32_t>{} + 0x7e00u : result;
  return __builtin_convertvector(sign | result, Half16);
}

#endif

/// Lanes [0, n) of T from an array of dtype, beginning at element `at`; the other lanes are zero.
template <class T>
LS_INLINE Vec<T> load_as(const void* data, Dtype dtype, int64_t at, int64_t n = kLanes<T>) {
  if constexpr (sizeof(T) == 8) {
    const T* p = static_cast<const T*>(data) + at;
    return n >= kLanes<T> ? load(p) : load_first(p, n);
  } else {
    if (dtype == Dtype::kFloat) {
      const float* p = static_cast<const float*>(data) + at;
      return n >= kLanes<T> ? load(p) : load_first(p, n);
    }
    const Half16 h = load_half16(static_cast<const uint16_t*>(data) + at, n);
    return dtype == Dtype::kBfloat16 ? float_of_bfloat16(h) : float_of_half(h);
  }
}

template <class T>
LS_INLINE void store_as(void* data, Dtype dtype, int64_t at, Vec<T> v, int64_t n = kLanes<T>) {
  const bool whole = n >= kLanes<T>;
  if (sizeof(T) == 8 || dtype == Dtype::kFloat) {
    T* p = static_cast<T*>(data) + at;
    whole ? store(p, v) : store_first(p, v, n);
  } else if constexpr (sizeof(T) == 4) {
    uint16_t* p = static_cast<uint16_t*>(data) + at;
    const Half16 h = dtype == Dtype::kBfloat16 ? bfloat16_of_float(v) : half_of_float(v);
    whole ? (void)__builtin_memcpy(p, &h, sizeof h) : (void)__builtin_memcpy(p, &h, size_t(n) * 2);
  }
}

/// n elements, `stride` apart, into lanes; the others are zero. And the way back.
template <class T>
LS_INLINE Vec<T> load_lanes(const void* data, Dtype dtype, int64_t at, int64_t stride, int64_t n) {
  n = min_of<int64_t>(n, kLanes<T>);
  if (stride == 1) return load_as<T>(data, dtype, at, n);
  Vec<T> v = {};
  for (int64_t i = 0; i < n; ++i) v[i] = load_as<T>(data, dtype, at + i * stride, 1)[0];
  return v;
}
template <class T>
LS_INLINE void store_lanes(void* data, Dtype dtype, int64_t at, int64_t stride, Vec<T> v, int64_t n) {
  n = min_of<int64_t>(n, kLanes<T>);
  if (stride == 1) return store_as<T>(data, dtype, at, v, n);
  for (int64_t i = 0; i < n; ++i) store_as<T>(data, dtype, at + i * stride, broadcast(v[i]), 1);
}

/// body.operator()<dtype>(): chosen once a block, not once a vector.
template <class T, class Body>
LS_INLINE void with_dtype(Dtype dtype, const Body& body) {
  if constexpr (sizeof(T) == 8) {
    body.template operator()<Dtype::kDouble>();
  } else if (dtype == Dtype::kFloat) {
    body.template operator()<Dtype::kFloat>();
  } else if (dtype == Dtype::kBfloat16) {
    body.template operator()<Dtype::kBfloat16>();
  } else {
    body.template operator()<Dtype::kHalf>();
  }
}

}  // namespace longspan::LONGSPAN_ISA
