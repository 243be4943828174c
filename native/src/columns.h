// A vector of columns of an array, filled up with zeros where there are fewer left.
#pragma once

#include <cstdlib>
#include <cstring>
#include <new>

#include "product.h"

namespace {

using lcq::Product;
using V = Vector;

constexpr int64_t kColumns = V::kFloats;

// Memory for a product, with nothing in it. No template of the standard library is used here, nor in what includes it:
// the linker keeps one copy of each, which may be that compiled for a larger instruction set.
class Scratch {
 public:
  explicit Scratch(int64_t bytes) : data_(std::aligned_alloc(64, (bytes + 63) / 64 * 64)) {
    if (!data_) throw std::bad_alloc();
  }
  ~Scratch() { std::free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  uint8_t* bytes() { return static_cast<uint8_t*>(data_); }
  float* floats() { return static_cast<float*>(data_); }

 private:
  void* data_;
};

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Rows of `count` words, from a column on, as [count, kColumns]; in place where a whole vector is left.
struct Rows {
  const uint32_t* words;
  int64_t stride;
};

inline Rows rows_of(const uint32_t* words, int64_t count, int64_t stride, int64_t left, uint32_t* spare) {
  if (left >= kColumns) return {words, stride};
  for (int64_t i = 0; i < count; ++i) {
    std::memset(spare + i * kColumns, 0, kColumns * 4);
    std::memcpy(spare + i * kColumns, words + i * stride, left * 4);
  }
  return {spare, kColumns};
}

// y += sums, of as many columns as are left.
inline void add_to(float* y, V::Float sums, int64_t left) {
  if (left >= kColumns) {
    V::store(y, V::add(V::load(y), sums));
    return;
  }
  float found[kColumns];
  V::store(found, sums);
  for (int64_t i = 0; i < left; ++i) y[i] += found[i];
}

// Floats from their four bytes: byte 4 i + e in lane l of the bytes becomes element e in lane l of out[i].
inline void zip_bytes(const V::Int* bytes, V::Int* out) {
  const V::Int low01 = V::low8(bytes[0], bytes[1]), high01 = V::high8(bytes[0], bytes[1]);
  const V::Int low23 = V::low8(bytes[2], bytes[3]), high23 = V::high8(bytes[2], bytes[3]);
  out[0] = V::low16(low01, low23), out[1] = V::high16(low01, low23);
  out[2] = V::low16(high01, high23), out[3] = V::high16(high01, high23);
}

}  // namespace
