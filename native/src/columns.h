// A vector of columns of an array, filled up with zeros where there are fewer left.
#pragma once

#include <cstdlib>
#include <cstring>
#include <new>

#include "product.h"

namespace {

constexpr int64_t kColumns = Vector::kFloats;

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
inline void add_to(float* y, Vector::Float sums, int64_t left) {
  if (left >= kColumns) {
    Vector::store(y, Vector::add(Vector::load(y), sums));
    return;
  }
  float found[kColumns];
  Vector::store(found, sums);
  for (int64_t i = 0; i < left; ++i) y[i] += found[i];
}

}  // namespace
