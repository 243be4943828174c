// One row by codes of 1 or 2 bits: four bits of a word name one of sixteen sums of x, which are looked up at once.
//
//     sum_k x_k value(code_k) = sum_q table_q[nibble_q],   table_q[nibble] = sum_j x_j value(code_j of the nibble)
//
// The tables depend on x and are the same for all columns. They are looked up as in book.h, byte by byte; here a lane has one
// byte of the words of sixteen columns.
//
// Source: Wei et al., arXiv 2407.00088 (T-MAC), with tables in float32.
#pragma once

#include "columns.h"
#include "numbers.h"
#include "product.h"

namespace {

constexpr int kNibbles = 8;        // of a word
constexpr int kNibbleWords = 8;    // words of a column that are summed up before y is touched, see kWords
constexpr int kBytes = 4 * 16;     // of a table

// Four vectors of words, byte by byte: byte 4 i + e in lane l of out[j] is byte j of element e in lane l of in[i].
inline void by_bytes(const V::Int* in, V::Int* out) {
  alignas(16) static constexpr uint8_t kOrder[16] = {0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15};
  const V::Int order = V::sixteen(kOrder);
  V::Int turned[4];
  for (int i = 0; i < 4; ++i) turned[i] = V::look_up(in[i], order);
  const V::Int a = V::low32(turned[0], turned[1]), b = V::high32(turned[0], turned[1]);
  const V::Int c = V::low32(turned[2], turned[3]), d = V::high32(turned[2], turned[3]);
  out[0] = V::low64(a, c), out[1] = V::high64(a, c), out[2] = V::low64(b, d), out[3] = V::high64(b, d);
}

// The tables of a word's nibbles, of its numbers of x: [nibbles / kLanes, byte of a float, lane, 16].
template <int kWidth>
inline void make_sums(const float* x, const float* value, uint8_t* tables) {
  for (int first = 0; first < kNibbles; first += V::kLanes) {
    float low[V::kLanes * 4], high[4][V::kLanes * 4];
    for (int lane = 0; lane < V::kLanes; ++lane) {
      const float* its = x + (first + lane) * (4 / kWidth);
      for (int i = 0; i < 4; ++i) {
        if (kWidth == 1) {
          low[4 * lane + i] = (i & 1 ? its[0] * value[1] : its[0] * value[0]) + (i & 2 ? its[1] * value[1] : its[1] * value[0]);
          for (int j = 0; j < 4; ++j)
            high[i][4 * lane + j] =
                (i & 1 ? its[2] * value[1] : its[2] * value[0]) + (i & 2 ? its[3] * value[1] : its[3] * value[0]);
        } else {
          low[4 * lane + i] = its[0] * value[i];
          for (int j = 0; j < 4; ++j) high[i][4 * lane + j] = its[1] * value[i];
        }
      }
    }
    V::Int sums[4], bytes[4];
    for (int i = 0; i < 4; ++i) sums[i] = V::as_int(V::add(V::load(low), V::load(high[i])));
    by_bytes(sums, bytes);
    for (int i = 0; i < 4; ++i) V::store(tables + first * kBytes + i * V::kLanes * 16, bytes[i]);
  }
}

// y += x Delta, of one row, in columns begin .. end.
template <int kRows, int kWidth>
void nibble_rows(const Product& p, int64_t row, int64_t begin, int64_t end) {
  static_assert(kRows == 1, "tables are of one row");
  constexpr int64_t kEach = 32 / kWidth;
  static constexpr float kCodes[4] = {0, 1, 2, 3};
  alignas(64) uint8_t tables[kNibbleWords * kNibbles * kBytes];
  uint32_t spare[4][kNibbleWords * kColumns];
  const V::Int mask = V::one(0x0F0F0F0Fu);
  for (int64_t block = 0; block < p.blocks; ++block) {
    float value[4] = {};
    for (int64_t i = 0; i < 1 << kWidth; ++i)
      value[i] = !p.levels ? kCodes[i] : i < p.levels_count ? p.levels[block * p.levels_count + i] : 0.0f;
    for (int64_t word = 0; word < p.count; word += kNibbleWords) {
      const int64_t count = least(kNibbleWords, p.count - word);
      const float* x = p.x + row * p.padded() + (block * p.count + word) * kEach;
      for (int64_t i = 0; i < count; ++i) make_sums<kWidth>(x + i * kEach, value, tables + i * kNibbles * kBytes);
      for (int64_t column = begin; column < end; column += 4 * kColumns) {
        const uint32_t* words = p.words + (block * p.count + word) * p.columns + column;
        Rows its[4];
        for (int j = 0; j < 4; ++j) {
          // Vectors behind the last column stand for the first, and are not added.
          const int64_t left = end - column - j * kColumns;
          its[j] = left > 0 ? rows_of(words + j * kColumns, count, p.columns, left, spare[j]) : its[0];
        }
        V::Float sums[4] = {V::zero(), V::zero(), V::zero(), V::zero()};
        for (int64_t i = 0; i < count; ++i) {
          V::Int next[4], bytes[4];
          for (int j = 0; j < 4; ++j) next[j] = V::load(static_cast<const void*>(its[j].words + i * its[j].stride));
          by_bytes(next, bytes);
#pragma GCC unroll 1
          for (int nibble = 0; nibble < kNibbles; ++nibble) {
            const V::Int codes = bytes[nibble / 2];
            const V::Int at = V::both(nibble % 2 ? V::right(codes, 4) : codes, mask);
            const uint8_t* table = tables + (i * kNibbles + nibble / V::kLanes * V::kLanes) * kBytes + nibble % V::kLanes * 16;
            V::Int found[4];
            for (int byte = 0; byte < 4; ++byte) found[byte] = V::look_up(V::sixteen(table + byte * V::kLanes * 16), at);
            V::Int values[4];
            zip_bytes(found, values);
            for (int j = 0; j < 4; ++j) sums[j] = V::add(sums[j], V::as_float(values[j]));
          }
        }
        for (int j = 0; j < 4 && column + j * kColumns < end; ++j) {
          const int64_t at = column + j * kColumns;
          const float total = word == 0 && !p.levels ? p.total[row * p.blocks + block] : 0.0f;
          const V::Float sum = p.levels ? sums[j] : scaled(p, block, at, step_of(p, block, at), sums[j], total);
          add_to(p.y + row * p.columns + at, sum, end - at);
        }
      }
    }
  }
}

}  // namespace
