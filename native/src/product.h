// Products y = x Delta of float32 rows with codes packed down columns: what every instruction set computes.
//
//     even:   Delta[k, n] = first[b, n] + step[b, n] code[k, n]
//     book:   Delta[k, n] = levels[b, code[k, n], n]
//
// The rows of Delta are cut into `blocks`; `count` words of a column hold the codes of one, the first in the lowest
// bits, zeros behind the last. Numbers of blocks are the same for all columns if `across` is 1.
#pragma once

#include <cstdint>

namespace lcq {

enum class Scale { kFloat32, kFloat16, kBfloat16 };

// What is multiplied. Pointers are to dense arrays in row-major order.
struct Product {
  const float* x;         // [rows, blocks, count * 32 / width], with zeros behind the rows of a block
  const float* total;     // [rows, blocks], the sums of x; for even steps
  const uint32_t* words;  // [blocks, count, columns]
  const float* levels;    // [blocks, levels_count, across]; at most 16; null for even steps
  const void* step;       // [blocks, across]
  const float* first;     // [blocks, across], or null: first = (lowest - zero) step
  const void* zero;       // [blocks, across] uint8, or float32 if `zero_is_float`; null for 0
  float* y;               // [rows, columns]
  int64_t rows, blocks, count, columns, across, levels_count;
  int width;  // bits of a code: 1, 2, 4, 8 or 16; with levels 2 or 4
  Scale scale;
  bool zero_is_float;
  float lowest;

  int64_t each() const { return 32 / width; }
  int64_t padded() const { return blocks * count * each(); }
};

// Columns begin .. end of y. `begin` is a multiple of kTile.
using Multiply = void (*)(const Product&, int64_t begin, int64_t end);

inline constexpr int64_t kTile = 64;

void multiply_plain(const Product&, int64_t begin, int64_t end);
void multiply_avx2(const Product&, int64_t begin, int64_t end);
void multiply_avx512(const Product&, int64_t begin, int64_t end);

// The best that this processor has, or the one named "plain", "avx2" or "avx512"; null if it has not.
Multiply multiply_by(const char* name);

// The name of the best.
const char* best();

}  // namespace lcq
