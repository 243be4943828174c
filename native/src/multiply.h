// Which way a product takes, by its codes and rows.
#pragma once

#include <cstring>

#include "book.h"
#include "product.h"

namespace {

template <int kWidth>
void book(const Product& p, int64_t begin, int64_t end) {
  int64_t row = 0;
  for (; row + 4 <= p.rows; row += 4) book_rows<4, kWidth>(p, row, begin, end);
  for (; row + 2 <= p.rows; row += 2) book_rows<2, kWidth>(p, row, begin, end);
  for (; row < p.rows; ++row) book_rows<1, kWidth>(p, row, begin, end);
}

void multiply(const Product& p, int64_t begin, int64_t end) {
  for (int64_t row = 0; row < p.rows; ++row) std::memset(p.y + row * p.columns + begin, 0, (end - begin) * sizeof(float));
  if (p.width == 2) book<2>(p, begin, end);
  else book<4>(p, begin, end);
}

}  // namespace
