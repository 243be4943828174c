// Few rows by codebooks: sixteen levels are looked up by one shuffle of bytes for each of the four bytes of a float.
//
// Words of four rows and as many columns as a vector holds are turned so that each lane of 128 bits has the four words
// of one column, and with them 32 codes of 4 bits, or 64 of 2. The bytes of their levels are looked up in the table of that
// column and zipped together to floats: in order, those of the four bytes of a word, which meet four numbers of x.
#pragma once

#include <cstring>

#include "columns.h"
#include "product.h"

namespace {

// Words of a column that are summed up before y is touched. Rows that are a power of two apart share a set of the first
// cache, which keeps eight lines.
constexpr int kWords = 8;

// Tables of a vector's columns: four vectors of columns lie in it, [which, byte of a float, lane, code].
constexpr int kTable = 4 * 4 * V::kLanes * 16;

// The bytes of sixteen levels of a vector's columns as they are looked up: of each lane a transpose of 16 x 16 bytes, by
// zipping the first half of its rows with the second four times.
//
//   levels: [count, ..], `stride` from one to the next; 0 for levels that all columns share
inline void make_table(const float* levels, int64_t count, int64_t stride, uint8_t* table) {
  V::Int rows[16], zipped[16];
  for (int code = 0; code < 16; ++code)
    rows[code] = code >= count ? V::one(0u)
                 : stride      ? V::load(static_cast<const void*>(levels + code * stride))
                               : V::as_int(V::one(levels[code]));
  for (int time = 0; time < 4; ++time) {
    for (int i = 0; i < 8; ++i) {
      zipped[2 * i] = V::low8(rows[i], rows[i + 8]);
      zipped[2 * i + 1] = V::high8(rows[i], rows[i + 8]);
    }
    for (int i = 0; i < 16; ++i) rows[i] = zipped[i];
  }
  for (int i = 0; i < 16; ++i) V::store(table + i * V::kLanes * 16, rows[i]);
}

// The table of a block and of the vector of columns at `column`; `spare` holds sixteen rows of it.
inline void table_of(const Product& p, int64_t block, int64_t column, uint32_t* spare, uint8_t* table) {
  const float* levels = p.levels + block * p.levels_count * p.across;
  if (p.across == 1) return make_table(levels, p.levels_count, 0, table);
  const uint32_t* first = reinterpret_cast<const uint32_t*>(levels) + column;
  const Rows its = rows_of(first, p.levels_count, p.across, p.columns - column, spare);
  make_table(reinterpret_cast<const float*>(its.words), p.levels_count, its.stride, table);
}

// Sums of four vectors' quarters: in lane l those of columns 4 l .. 4 l + 3.
inline V::Float quarters(V::Float a, V::Float b, V::Float c, V::Float d) {
  const auto zip = [](V::Float low, V::Float high) {
    return V::add(V::as_float(V::low32(V::as_int(low), V::as_int(high))),
                  V::as_float(V::high32(V::as_int(low), V::as_int(high))));
  };
  const V::Int ab = V::as_int(zip(a, b)), cd = V::as_int(zip(c, d));
  return V::add(V::as_float(V::low64(ab, cd)), V::as_float(V::high64(ab, cd)));
}

// Words of a vector of columns, at most kWords: four vectors of columns, by the four words of each.
struct Turned {
  V::Int words[4][kWords / 4];
};

inline void turn(const uint32_t* words, int64_t stride, int64_t count, Turned& out) {
  for (int64_t four = 0; 4 * four < count; ++four) {
    V::Int rows[4];
    for (int i = 0; i < 4; ++i) rows[i] = V::load(words + least(4 * four + i, count - 1) * stride);
    const V::Int a = V::low32(rows[0], rows[1]), b = V::high32(rows[0], rows[1]);
    const V::Int c = V::low32(rows[2], rows[3]), d = V::high32(rows[2], rows[3]);
    out.words[0][four] = V::low64(a, c), out.words[1][four] = V::high64(a, c);
    out.words[2][four] = V::low64(b, d), out.words[3][four] = V::high64(b, d);
  }
}

// y of kRows rows and a vector of columns.
//
//   x: [rows, words, 8 / kWidth, 4], zeros behind the last; `apart` floats from row to row
template <int kRows, int kWidth>
inline void book_tile(const float* x, int64_t apart, const Turned& turned, int64_t count, const uint8_t* table,
                      V::Float* y) {
  constexpr int kPlaces = 8 / kWidth, kChains = kRows == 1 ? 2 : 1;  // sums that do not wait for each other
  const V::Int mask = V::one(0x01010101u * ((1u << kWidth) - 1));
  const int64_t fours = (count + 3) / 4;
  V::Float sums[kRows][4];
#pragma GCC unroll 1
  for (int which = 0; which < 4; ++which) {
    V::Int its[4];
    for (int byte = 0; byte < 4; ++byte) its[byte] = V::load(table + (which * 4 + byte) * V::kLanes * 16);
    V::Float own[kRows][kChains];
    for (auto& row : own)
      for (auto& sum : row) sum = V::zero();
#pragma GCC unroll 1
    for (int64_t four = 0; four < fours; ++four) {
      V::Int codes = turned.words[which][four];
#pragma GCC unroll 4
      for (int place = 0; place < kPlaces; ++place) {
        const V::Int at = V::both(place ? V::right(codes, kWidth * place) : codes, mask);
        V::Int bytes[4];
        for (int byte = 0; byte < 4; ++byte) bytes[byte] = V::look_up(its[byte], at);
        V::Int values[4];
        zip_bytes(bytes, values);
        const float* next = x + (four * 4 * kPlaces + place) * 4;
#pragma GCC unroll 4
        for (int row = 0; row < kRows; ++row)
#pragma GCC unroll 4
          for (int i = 0; i < 4; ++i)
            own[row][i % kChains] =
                V::fma(V::four(next + row * apart + i * kPlaces * 4), V::as_float(values[i]), own[row][i % kChains]);
      }
    }
    for (int row = 0; row < kRows; ++row)
      sums[row][which] = kChains == 2 ? V::add(own[row][0], own[row][kChains - 1]) : own[row][0];
  }
  for (int row = 0; row < kRows; ++row) y[row] = quarters(sums[row][0], sums[row][1], sums[row][2], sums[row][3]);
}

// x of a chunk of words, as `book_tile` reads it.
template <int kWidth>
inline void arrange(const float* x, int64_t count, float* out) {
  constexpr int kPlaces = 8 / kWidth;
  for (int64_t word = 0; word < count; ++word)
    for (int place = 0; place < kPlaces; ++place)
      for (int byte = 0; byte < 4; ++byte) *out++ = x[word * 4 * kPlaces + byte * kPlaces + place];
}

// y += x Delta, of kRows rows from `row` on, in columns begin .. end.
template <int kRows, int kWidth>
void book_rows(const Product& p, int64_t row, int64_t begin, int64_t end) {
  constexpr int64_t kEach = 32 / kWidth;
  const int64_t vectors = (end - begin + kColumns - 1) / kColumns, tables = p.across == 1 ? 1 : vectors;
  Scratch scratch(tables * kTable);
  uint8_t* table = scratch.bytes();
  float x[kRows * kWords * kEach];
  uint32_t spare[kWords * kColumns];
  for (int64_t block = 0; block < p.blocks; ++block) {
    for (int64_t i = 0; i < tables; ++i) {
      uint32_t filled[16 * kColumns];
      table_of(p, block, begin + i * kColumns, filled, table + i * kTable);
    }
    for (int64_t word = 0; word < p.count; word += kWords) {
      const int64_t count = least(kWords, p.count - word), apart = kWords * kEach;
      std::memset(x, 0, sizeof x);
      for (int i = 0; i < kRows; ++i)
        arrange<kWidth>(p.x + (row + i) * p.padded() + (block * p.count + word) * kEach, count, x + i * apart);
      for (int64_t i = 0; i < vectors; ++i) {
        const int64_t column = begin + i * kColumns, left = p.columns - column;
        const Rows its = rows_of(p.words + (block * p.count + word) * p.columns + column, count, p.columns, left, spare);
        Turned turned;
        turn(its.words, its.stride, count, turned);
        V::Float sums[kRows];
        book_tile<kRows, kWidth>(x, apart, turned, count, table + (p.across == 1 ? 0 : i * kTable), sums);
        for (int j = 0; j < kRows; ++j) add_to(p.y + (row + j) * p.columns + column, sums[j], left);
      }
    }
  }
}

}  // namespace
