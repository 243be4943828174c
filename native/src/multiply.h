// Which way a product takes, by its codes and rows.
#pragma once

#include <cstring>

#include "book.h"
#include "even.h"
#include "nibbles.h"
#include "product.h"
#include "tiles.h"

namespace {

// Rows up to which codes are decoded in registers, once for every four of them; of more, into the cache.
constexpr int64_t kFew = 12;

// Rows in fours, then what is left.
#define LCQ_BY_ROWS(way, width)                                                       \
  do {                                                                                \
    int64_t row = 0;                                                                  \
    for (; row + 4 <= p.rows; row += 4) way<4, width>(p, row, begin, end);            \
    for (; row + 2 <= p.rows; row += 2) way<2, width>(p, row, begin, end);            \
    for (; row < p.rows; ++row) way<1, width>(p, row, begin, end);                    \
  } while (false)

void multiply(const Product& p, int64_t begin, int64_t end) {
  for (int64_t row = 0; row < p.rows; ++row) std::memset(p.y + row * p.columns + begin, 0, (end - begin) * sizeof(float));
  if (p.rows > kFew) {
    tiles(p, begin, end);
    return;
  }
  // Tables of sums pay where blocks are long, and are those of all columns, so that these have the same levels.
  if (p.rows == 1 && p.width <= 2 && p.count >= kNibbleWords && (!p.levels || p.across == 1)) {
    if (p.width == 1) nibble_rows<1, 1>(p, 0, begin, end);
    if (p.width == 2) nibble_rows<1, 2>(p, 0, begin, end);
    return;
  }
  if (p.levels) {
    if (p.width == 2) LCQ_BY_ROWS(book_rows, 2);
    if (p.width == 4) LCQ_BY_ROWS(book_rows, 4);
    return;
  }
  if (p.width == 1) LCQ_BY_ROWS(even_rows, 1);
  if (p.width == 2) LCQ_BY_ROWS(even_rows, 2);
  if (p.width == 4) LCQ_BY_ROWS(even_rows, 4);
  if (p.width == 8) LCQ_BY_ROWS(even_rows, 8);
  if (p.width == 16) LCQ_BY_ROWS(even_rows, 16);
}

#undef LCQ_BY_ROWS

}  // namespace
