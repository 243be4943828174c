// Products as they are defined, weight by weight: for processors without AVX2, and what the others are compared with.

#include <cmath>
#include <cstring>

#include "product.h"

namespace lcq {
namespace {

float float32(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

float from_float16(uint16_t half) {
  const uint32_t sign = (half & 0x8000u) << 16, exponent = half >> 10 & 31u, mantissa = half & 1023u;
  if (exponent == 31) return float32(sign | 0x7F800000u | mantissa << 13);
  if (exponent == 0) return std::copysign(std::ldexp(static_cast<float>(mantissa), -24), sign ? -1.0f : 1.0f);
  return float32(sign | (exponent + 112) << 23 | mantissa << 13);
}

float step_at(const Product& p, int64_t at) {
  if (p.scale == Scale::kFloat32) return static_cast<const float*>(p.step)[at];
  const uint16_t bits = static_cast<const uint16_t*>(p.step)[at];
  return p.scale == Scale::kFloat16 ? from_float16(bits) : float32(static_cast<uint32_t>(bits) << 16);
}

float first_at(const Product& p, int64_t at) {
  if (p.first) return p.first[at];
  float zero = 0;
  if (p.zero) zero = p.zero_is_float ? static_cast<const float*>(p.zero)[at] : static_cast<const uint8_t*>(p.zero)[at];
  return (p.lowest - zero) * step_at(p, at);
}

}  // namespace

void multiply_plain(const Product& p, int64_t begin, int64_t end) {
  const uint32_t mask = (1u << p.width) - 1;
  for (int64_t row = 0; row < p.rows; ++row) {
    for (int64_t column = begin; column < end; ++column) {
      float y = 0;
      for (int64_t block = 0; block < p.blocks; ++block) {
        const float* levels = p.levels + block * p.levels_count * p.across + (p.across == 1 ? 0 : column);
        const float* x = p.x + (row * p.blocks + block) * p.count * p.each();
        float sum = 0;
        for (int64_t word = 0; word < p.count; ++word) {
          const uint32_t codes = p.words[(block * p.count + word) * p.columns + column];
          for (int64_t i = 0; i < p.each(); ++i) {
            const uint32_t code = codes >> p.width * i & mask;
            sum += x[word * p.each() + i] * (p.levels ? levels[code * p.across] : static_cast<float>(code));
          }
        }
        const int64_t at = block * p.across + (p.across == 1 ? 0 : column);
        y += p.levels ? sum : step_at(p, at) * sum + first_at(p, at) * p.total[row * p.blocks + block];
      }
      p.y[row * p.columns + column] = y;
    }
  }
}

}  // namespace lcq
