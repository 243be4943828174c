// Numbers of blocks with equal steps, in float32, for a vector of columns.
//
//     Delta[k, n] = step[b, n] (code[k, n] + offset[b, n]),   offset = lowest - zero
//
// or step code + first where the first level is given.
#pragma once

#include "columns.h"
#include "product.h"

namespace {

enum class Kind { kFloat32, kFloat16, kBfloat16, kBytes };

inline V::Float load_as(const void* p, Kind kind) {
  switch (kind) {
    case Kind::kFloat16: return V::from_float16(static_cast<const uint16_t*>(p));
    case Kind::kBfloat16: return V::from_bfloat16(static_cast<const uint16_t*>(p));
    case Kind::kBytes: return V::from_bytes(static_cast<const uint8_t*>(p));
    default: return V::load(static_cast<const float*>(p));
  }
}

// data[block, column ..] of an array [blocks, across].
inline V::Float numbers(const Product& p, const void* data, Kind kind, int64_t block, int64_t column) {
  const int64_t size = kind == Kind::kFloat32 ? 4 : kind == Kind::kBytes ? 1 : 2;
  const int64_t left = p.across == 1 ? 1 : p.columns - column;
  const uint8_t* at = static_cast<const uint8_t*>(data) + (block * p.across + (p.across == 1 ? 0 : column)) * size;
  if (left >= kColumns) return load_as(at, kind);
  alignas(64) uint8_t some[kColumns * 4] = {};
  if (p.across == 1)
    for (int64_t i = 0; i < kColumns; ++i) std::memcpy(some + i * size, at, size);
  else
    std::memcpy(some, at, left * size);
  return load_as(some, kind);
}

inline V::Float step_of(const Product& p, int64_t block, int64_t column) {
  const Kind kind = p.scale == lcq::Scale::kFloat32 ? Kind::kFloat32
                    : p.scale == lcq::Scale::kFloat16 ? Kind::kFloat16
                                                      : Kind::kBfloat16;
  return numbers(p, p.step, kind, block, column);
}

// What a block adds to y, of the sums of x code: step sums + first total.
inline V::Float scaled(const Product& p, int64_t block, int64_t column, V::Float step, V::Float sums, float total) {
  if (p.first) {
    const V::Float first = numbers(p, p.first, Kind::kFloat32, block, column);
    return V::fma(first, V::one(total), V::times(step, sums));
  }
  V::Float offset = V::one(p.lowest);
  if (p.zero)
    offset = V::subtract(offset, numbers(p, p.zero, p.zero_is_float ? Kind::kFloat32 : Kind::kBytes, block, column));
  return V::times(step, V::fma(offset, V::one(total), sums));
}

}  // namespace
