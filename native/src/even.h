// Few rows by equal steps: a code becomes a float where it lies in its word, and x is made smaller instead.
//
//     sum_k x_k code_k = sum_j (2^(-width j) x_j) float(word and mask_j),   mask_j = (2^width - 1) 2^(width j)
//
// The last code of a word is moved down first, as it would reach the sign.
#pragma once

#include "columns.h"
#include "numbers.h"
#include "product.h"

namespace {

// Words of a column that are summed up before y is touched, see kWords.
constexpr int kEvenWords = 8;

// sums += x code, of kRows rows and kVectors vectors of columns.
//
//   x: [rows, words, 32 / kWidth], made smaller; `apart` floats from row to row
//   sums: [rows, chain, vector], of chains that do not wait for each other
template <int kRows, int kWidth, int kVectors, int kChains>
inline void even_word(const float* x, int64_t apart, const V::Int* word, V::Float (*sums)[kChains][kVectors]) {
  constexpr int kEach = 32 / kWidth;
#pragma GCC unroll 32
  for (int i = 0; i < kEach; ++i) {
    V::Float code[kVectors];
    for (int j = 0; j < kVectors; ++j)
      code[j] = V::number(i == kEach - 1 ? V::right(word[j], 32 - kWidth)
                                         : V::both(word[j], V::one(((1u << kWidth) - 1) << kWidth * i)));
    for (int row = 0; row < kRows; ++row) {
      const V::Float by = V::one(x[row * apart + i]);
      for (int j = 0; j < kVectors; ++j) sums[row][i % kChains][j] = V::fma(by, code[j], sums[row][i % kChains][j]);
    }
  }
}

// y += x Delta, of kRows rows from `row` on, in columns begin .. end.
template <int kRows, int kWidth>
void even_rows(const Product& p, int64_t row, int64_t begin, int64_t end) {
  constexpr int64_t kEach = 32 / kWidth, kApart = kEvenWords * kEach;
  constexpr int kVectors = kRows <= 2 ? 4 : 2, kChains = kRows == 1 ? 2 : 1;
  float x[kRows * kApart];
  uint32_t spare[kVectors][kEvenWords * kColumns];
  for (int64_t block = 0; block < p.blocks; ++block) {
    for (int64_t word = 0; word < p.count; word += kEvenWords) {
      const int64_t count = least(kEvenWords, p.count - word);
      for (int i = 0; i < kRows; ++i) {
        const float* from = p.x + (row + i) * p.padded() + (block * p.count + word) * kEach;
        for (int64_t j = 0; j < count * kEach; ++j) {
          const int place = static_cast<int>(j % kEach);
          x[i * kApart + j] = place == kEach - 1 ? from[j] : from[j] / static_cast<float>(1u << kWidth * place);
        }
      }
      for (int64_t column = begin; column < end; column += kVectors * kColumns) {
        const uint32_t* words = p.words + (block * p.count + word) * p.columns + column;
        Rows its[kVectors];
        for (int j = 0; j < kVectors; ++j) {
          // Vectors behind the last column stand for it, and are not added.
          const int64_t left = end - column - j * kColumns;
          its[j] = left > 0 ? rows_of(words + j * kColumns, count, p.columns, left, spare[j]) : its[0];
        }
        V::Float sums[kRows][kChains][kVectors];
        for (auto& of_row : sums)
          for (auto& chain : of_row)
            for (auto& sum : chain) sum = V::zero();
        for (int64_t i = 0; i < count; ++i) {
          V::Int next[kVectors];
          for (int j = 0; j < kVectors; ++j) next[j] = V::load(static_cast<const void*>(its[j].words + i * its[j].stride));
          even_word<kRows, kWidth, kVectors, kChains>(x + i * kEach, kApart, next, sums);
        }
        for (int j = 0; j < kVectors; ++j) {
          const int64_t at = column + j * kColumns, left = end - at;
          if (left <= 0) break;
          const V::Float step = step_of(p, block, at);
          for (int i = 0; i < kRows; ++i) {
            const float total = word == 0 ? p.total[(row + i) * p.blocks + block] : 0.0f;
            const V::Float sum = kChains == 2 ? V::add(sums[i][0][j], sums[i][kChains - 1][j]) : sums[i][0][j];
            add_to(p.y + (row + i) * p.columns + at, scaled(p, block, at, step, sum, total), left);
          }
        }
      }
    }
  }
}

}  // namespace
