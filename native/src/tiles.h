// Many rows: a tile of Delta is decoded into the cache and multiplied as float32.
#pragma once

#include "book.h"
#include "columns.h"
#include "numbers.h"
#include "product.h"

namespace {

constexpr int kPanel = 2 * V::kFloats;  // columns of a tile
constexpr int64_t kDeep = 256;          // rows of a tile, at most; no less than those of a word
constexpr int kHigh = 6;                // rows of x whose sums stay in registers

// Rows of the numbers in a lane: sixteen floats turned. In: of column 4 l + which, four rows; out: of a row, four columns.
inline void turn_floats(const V::Float* in, V::Float* out) {
  const V::Int a = V::low32(V::as_int(in[0]), V::as_int(in[1])), b = V::high32(V::as_int(in[0]), V::as_int(in[1]));
  const V::Int c = V::low32(V::as_int(in[2]), V::as_int(in[3])), d = V::high32(V::as_int(in[2]), V::as_int(in[3]));
  out[0] = V::as_float(V::low64(a, c)), out[1] = V::as_float(V::high64(a, c));
  out[2] = V::as_float(V::low64(b, d)), out[3] = V::as_float(V::high64(b, d));
}

// Words of one block and of a vector of columns: to rows of `tile`, kPanel floats apart.
template <int kWidth>
inline void decode_even(const Product& p, int64_t block, int64_t column, const Rows& words, int64_t count, float* tile) {
  constexpr int kEach = 32 / kWidth;
  const V::Int mask = V::one((1u << kWidth) - 1);
  const V::Float step = step_of(p, block, column), first = scaled(p, block, column, step, V::zero(), 1.0f);
  for (int64_t i = 0; i < count; ++i) {
    V::Int word = V::load(static_cast<const void*>(words.words + i * words.stride));
    for (int place = 0; place < kEach; ++place) {
      V::store(tile + (i * kEach + place) * kPanel, V::fma(step, V::number(V::both(word, mask)), first));
      word = V::right(word, kWidth);
    }
  }
}

template <int kWidth>
inline void decode_book(const Rows& words, int64_t count, const uint8_t* table, float* tile) {
  constexpr int kPlaces = 8 / kWidth, kEach = 32 / kWidth;
  const V::Int mask = V::one(0x01010101u * ((1u << kWidth) - 1));
  Turned turned;
  turn(words.words, words.stride, count, turned);
  for (int64_t four = 0; 4 * four < count; ++four) {
    for (int place = 0; place < kPlaces; ++place) {
      V::Float values[4][4];  // word, which columns
      for (int which = 0; which < 4; ++which) {
        const V::Int at = V::both(V::right(turned.words[which][four], kWidth * place), mask);
        V::Int bytes[4], floats[4];
        for (int byte = 0; byte < 4; ++byte) bytes[byte] = V::look_up(V::load(table + (which * 4 + byte) * V::kLanes * 16), at);
        zip_bytes(bytes, floats);
        for (int i = 0; i < 4; ++i) values[i][which] = V::as_float(floats[i]);
      }
      for (int i = 0; i < 4 && 4 * four + i < count; ++i) {
        V::Float rows[4];
        turn_floats(values[i], rows);
        for (int byte = 0; byte < 4; ++byte)
          V::store(tile + ((4 * four + i) * kEach + byte * kPlaces + place) * kPanel, rows[byte]);
      }
    }
  }
}

// A tile: words first .. first + count, which may be of several blocks, by as many columns as are left. Both vectors of
// a line of the cache are decoded before it is pushed out.
inline void decode(const Product& p, int64_t first, int64_t count, int64_t column, int64_t end, float* tile) {
  uint32_t spare[kWords * kColumns], filled[16 * kColumns];
  alignas(64) uint8_t tables[2][kTable] = {};
  int64_t known = -1;
  for (int64_t word = first, some; word < first + count; word += some) {
    const int64_t block = word / p.count;
    some = least(kWords, least((block + 1) * p.count, first + count) - word);
    for (int i = 0; i < 2 && column + i * kColumns < end; ++i) {
      const int64_t at = column + i * kColumns, left = p.columns - at;
      const Rows its = rows_of(p.words + word * p.columns + at, some, p.columns, left, spare);
      float* to = tile + (word - first) * p.each() * kPanel + i * kColumns;
      if (p.levels) {
        if (block != known) table_of(p, block, at, filled, tables[i]);
        p.width == 2 ? decode_book<2>(its, some, tables[i], to) : decode_book<4>(its, some, tables[i], to);
      } else if (p.width == 1) decode_even<1>(p, block, at, its, some, to);
      else if (p.width == 2) decode_even<2>(p, block, at, its, some, to);
      else if (p.width == 4) decode_even<4>(p, block, at, its, some, to);
      else if (p.width == 8) decode_even<8>(p, block, at, its, some, to);
      else decode_even<16>(p, block, at, its, some, to);
    }
    known = block;
  }
}

// y += x tile, of kRows rows.
//
//   x: [deep, kRows]; tile: [deep, kPanel]; y: [kRows, kPanel]
template <int kRows>
inline void times_tile(const float* x, const float* tile, int64_t deep, float* y) {
  V::Float sums[kRows][2];
  for (auto& row : sums) row[0] = row[1] = V::zero();
  for (int64_t k = 0; k < deep; ++k) {
    const V::Float a = V::load(tile + k * kPanel), b = V::load(tile + k * kPanel + V::kFloats);
#pragma GCC unroll 8
    for (int row = 0; row < kRows; ++row) {
      const V::Float by = V::one(x[k * kRows + row]);
      sums[row][0] = V::fma(by, a, sums[row][0]);
      sums[row][1] = V::fma(by, b, sums[row][1]);
    }
  }
  for (int row = 0; row < kRows; ++row)
    for (int i = 0; i < 2; ++i) add_to(y + row * kPanel + i * kColumns, sums[row][i], kColumns);
}

// How many rows are multiplied together, of so many that are left.
inline int64_t together(int64_t left) { return left >= kHigh ? kHigh : left >= 4 ? 4 : left >= 2 ? 2 : 1; }

// y = x Delta in columns begin .. end.
//
// Rows that are a power of two apart push each other out of the caches. So those of x that are multiplied together lie
// together here, and those of y, panel by panel.
void tiles(const Product& p, int64_t begin, int64_t end) {
  const int64_t panels = (end - begin + kPanel - 1) / kPanel;
  const int64_t words = p.blocks * p.count, most = kDeep / p.each();
  Scratch of_tile(kDeep * kPanel * 4), of_x(p.rows * kDeep * 4), of_y(panels * p.rows * kPanel * 4);
  float *tile = of_tile.floats(), *x = of_x.floats(), *y = of_y.floats();
  std::memset(y, 0, panels * p.rows * kPanel * 4);
  std::memset(tile, 0, kDeep * kPanel * 4);  // behind the last column it stays so
  for (int64_t word = 0; word < words; word += most) {
    const int64_t count = least(most, words - word), deep = count * p.each();
    for (int64_t row = 0, rows; row < p.rows; row += rows) {
      rows = together(p.rows - row);
      for (int64_t i = 0; i < rows; ++i) {
        const float* from = p.x + (row + i) * p.padded() + word * p.each();
        for (int64_t k = 0; k < deep; ++k) x[row * deep + k * rows + i] = from[k];
      }
    }
    for (int64_t panel = 0; panel < panels; ++panel) {
      decode(p, word, count, begin + panel * kPanel, end, tile);
      for (int64_t row = 0, rows; row < p.rows; row += rows) {
        rows = together(p.rows - row);
        const float* its = x + row * deep;
        float* sums = y + (panel * p.rows + row) * kPanel;
        if (rows == kHigh) times_tile<kHigh>(its, tile, deep, sums);
        else if (rows == 4) times_tile<4>(its, tile, deep, sums);
        else if (rows == 2) times_tile<2>(its, tile, deep, sums);
        else times_tile<1>(its, tile, deep, sums);
      }
    }
  }
  for (int64_t row = 0; row < p.rows; ++row)
    for (int64_t panel = 0; panel < panels; ++panel) {
      const int64_t column = begin + panel * kPanel;
      std::memcpy(p.y + row * p.columns + column, y + (panel * p.rows + row) * kPanel, 4 * least(kPanel, end - column));
    }
}

}  // namespace
