// Vectors of 512 bits: four lanes of 128, as AVX-512 shuffles them.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace {

struct Vector {
  using Float = __m512;
  using Int = __m512i;
  static constexpr int kLanes = 4;
  static constexpr int kFloats = 16;

  static Int load(const void* p) { return _mm512_loadu_si512(p); }
  static void store(void* p, Int v) { _mm512_storeu_si512(p, v); }
  static Float load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, Float v) { _mm512_storeu_ps(p, v); }
  static Float four(const float* p) { return _mm512_broadcast_f32x4(_mm_loadu_ps(p)); }
  static Int sixteen(const void* p) { return _mm512_broadcast_i32x4(_mm_loadu_si128(static_cast<const __m128i*>(p))); }
  static Float one(float f) { return _mm512_set1_ps(f); }
  static Int one(uint32_t i) { return _mm512_set1_epi32(static_cast<int>(i)); }
  static Float zero() { return _mm512_setzero_ps(); }
  static Float fma(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
  static Float add(Float a, Float b) { return _mm512_add_ps(a, b); }
  static Float subtract(Float a, Float b) { return _mm512_sub_ps(a, b); }
  static Float times(Float a, Float b) { return _mm512_mul_ps(a, b); }
  static Int both(Int a, Int b) { return _mm512_and_si512(a, b); }
  static Int right(Int a, int by) { return _mm512_srli_epi32(a, by); }
  static Float number(Int a) { return _mm512_cvtepi32_ps(a); }
  static Int look_up(Int table, Int at) { return _mm512_shuffle_epi8(table, at); }
  static Float as_float(Int a) { return _mm512_castsi512_ps(a); }
  static Int as_int(Float a) { return _mm512_castps_si512(a); }
  static Int low8(Int a, Int b) { return _mm512_unpacklo_epi8(a, b); }
  static Int high8(Int a, Int b) { return _mm512_unpackhi_epi8(a, b); }
  static Int low16(Int a, Int b) { return _mm512_unpacklo_epi16(a, b); }
  static Int high16(Int a, Int b) { return _mm512_unpackhi_epi16(a, b); }
  static Int low32(Int a, Int b) { return _mm512_unpacklo_epi32(a, b); }
  static Int high32(Int a, Int b) { return _mm512_unpackhi_epi32(a, b); }
  static Int low64(Int a, Int b) { return _mm512_unpacklo_epi64(a, b); }
  static Int high64(Int a, Int b) { return _mm512_unpackhi_epi64(a, b); }
  static Float from_float16(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  static Float from_bfloat16(const uint16_t* p) {
    return as_float(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16));
  }
  static Float from_bytes(const uint8_t* p) {
    return number(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }
};

}  // namespace
