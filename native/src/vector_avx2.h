// Vectors of 256 bits: two lanes of 128, as AVX2 shuffles them.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace {

struct Vector {
  using Float = __m256;
  using Int = __m256i;
  static constexpr int kLanes = 2;
  static constexpr int kFloats = 8;

  static Int load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  static void store(void* p, Int v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }
  static Float load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, Float v) { _mm256_storeu_ps(p, v); }
  static Float four(const float* p) { return _mm256_broadcast_ps(reinterpret_cast<const __m128*>(p)); }
  static Int sixteen(const void* p) { return _mm256_broadcastsi128_si256(_mm_loadu_si128(static_cast<const __m128i*>(p))); }
  static Float one(float f) { return _mm256_set1_ps(f); }
  static Int one(uint32_t i) { return _mm256_set1_epi32(static_cast<int>(i)); }
  static Float zero() { return _mm256_setzero_ps(); }
  static Float fma(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }
  static Float add(Float a, Float b) { return _mm256_add_ps(a, b); }
  static Float subtract(Float a, Float b) { return _mm256_sub_ps(a, b); }
  static Float times(Float a, Float b) { return _mm256_mul_ps(a, b); }
  static Int both(Int a, Int b) { return _mm256_and_si256(a, b); }
  static Int right(Int a, int by) { return _mm256_srli_epi32(a, by); }
  static Float number(Int a) { return _mm256_cvtepi32_ps(a); }
  static Int look_up(Int table, Int at) { return _mm256_shuffle_epi8(table, at); }
  static Float as_float(Int a) { return _mm256_castsi256_ps(a); }
  static Int as_int(Float a) { return _mm256_castps_si256(a); }
  static Int low8(Int a, Int b) { return _mm256_unpacklo_epi8(a, b); }
  static Int high8(Int a, Int b) { return _mm256_unpackhi_epi8(a, b); }
  static Int low16(Int a, Int b) { return _mm256_unpacklo_epi16(a, b); }
  static Int high16(Int a, Int b) { return _mm256_unpackhi_epi16(a, b); }
  static Int low32(Int a, Int b) { return _mm256_unpacklo_epi32(a, b); }
  static Int high32(Int a, Int b) { return _mm256_unpackhi_epi32(a, b); }
  static Int low64(Int a, Int b) { return _mm256_unpacklo_epi64(a, b); }
  static Int high64(Int a, Int b) { return _mm256_unpackhi_epi64(a, b); }
  static Float from_float16(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  static Float from_bfloat16(const uint16_t* p) {
    return as_float(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16));
  }
  static Float from_bytes(const uint8_t* p) {
    return number(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  }
};

}  // namespace
