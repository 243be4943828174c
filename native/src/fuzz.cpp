// Random shapes, forms and rows: every instruction set that this processor has, against the plain way and doubles.
//
//     fuzz [count] [seed]

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

#include "product.h"
#include "shared_work.h"

namespace {

using lcq::Product;

std::mt19937 random_bits;

int64_t within(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(random_bits); }
bool coin() { return within(0, 1) == 1; }
float normal() { return std::normal_distribution<float>()(random_bits); }

// Memory of exactly so many elements, so that a sanitizer sees one read too much.
template <typename T>
std::unique_ptr<T[]> exactly(int64_t count) { return std::unique_ptr<T[]>(new T[count]()); }

struct Case {
  Product p{};
  int64_t block;
  std::unique_ptr<float[]> x, total, levels, first, y;
  std::unique_ptr<uint32_t[]> words;
  std::unique_ptr<uint8_t[]> step, zero;
  std::vector<double> steps, firsts;  // what the bytes of step and zero stand for, [blocks, across]

  Case() {
    const int widths[] = {1, 2, 4, 8, 16};
    const bool book = coin();
    p.width = book ? widths[within(1, 2)] : widths[within(0, 4)];
    p.rows = coin() ? within(1, 5) : within(6, 20), p.columns = within(1, 150);
    block = within(1, coin() ? 40 : 400), p.blocks = coin() ? 1 : within(2, 5);
    p.count = (block + p.each() - 1) / p.each(), p.across = coin() ? 1 : p.columns;
    words = exactly<uint32_t>(p.blocks * p.count * p.columns), y = exactly<float>(p.rows * p.columns);
    x = exactly<float>(p.rows * p.padded()), total = exactly<float>(p.rows * p.blocks);
    for (int64_t i = 0; i < p.blocks * p.count * p.columns; ++i) words[i] = random_bits();
    for (int64_t i = 0; i < p.rows * p.blocks; ++i)
      for (int64_t k = 0; k < block; ++k) total[i] += x[i * p.count * p.each() + k] = normal();
    p.words = words.get(), p.x = x.get(), p.total = total.get(), p.y = y.get();
    book ? with_levels() : with_steps();
  }

  void with_levels() {
    p.levels_count = 1 << p.width;
    levels = exactly<float>(p.blocks * p.levels_count * p.across);
    for (int64_t i = 0; i < p.blocks * p.levels_count * p.across; ++i) levels[i] = normal();
    p.levels = levels.get();
  }

  void with_steps() {
    const int64_t count = p.blocks * p.across;
    step = exactly<uint8_t>(count * 4), zero = exactly<uint8_t>(count * 4), first = exactly<float>(count);
    p.scale = static_cast<lcq::Scale>(within(0, 2)), p.step = step.get(), p.lowest = -static_cast<float>(within(0, 8));
    const int zeros = static_cast<int>(within(0, 3));  // none, bytes, floats, or first levels
    for (int64_t i = 0; i < count; ++i) {
      // Of a sign, an exponent and few bits: exact in all of the three formats.
      const double value = (coin() ? 1 : -1) * (1 + within(0, 7) / 8.0) / (within(0, 3) ? 1 : 4), at = within(0, 15);
      const int exponent = std::abs(value) < 1 ? -2 : 0;
      const uint32_t mantissa = static_cast<uint32_t>((std::abs(value) * std::ldexp(1.0, -exponent) - 1) * 8), sign = value < 0;
      if (p.scale == lcq::Scale::kFloat32) reinterpret_cast<float*>(step.get())[i] = static_cast<float>(value);
      else if (p.scale == lcq::Scale::kFloat16)
        reinterpret_cast<uint16_t*>(step.get())[i] = static_cast<uint16_t>(sign << 15 | (15 + exponent) << 10 | mantissa << 7);
      else
        reinterpret_cast<uint16_t*>(step.get())[i] = static_cast<uint16_t>(sign << 15 | (127 + exponent) << 7 | mantissa << 4);
      if (zeros == 1) zero[i] = static_cast<uint8_t>(at);
      if (zeros == 2) reinterpret_cast<float*>(zero.get())[i] = static_cast<float>(at);
      first[i] = normal();
      steps.push_back(value);
      firsts.push_back(zeros == 3 ? first[i] : (p.lowest - (zeros ? at : 0)) * value);
    }
    p.zero = zeros == 1 || zeros == 2 ? zero.get() : nullptr, p.zero_is_float = zeros == 2;
    p.first = zeros == 3 ? first.get() : nullptr;
  }

  double weight(int64_t k, int64_t column) const {
    const int64_t b = k / block, at = k % block, number = b * p.across + (p.across == 1 ? 0 : column);
    const uint32_t word = words[(b * p.count + at / p.each()) * p.columns + column];
    const uint32_t code = word >> at % p.each() * p.width & ((1u << p.width) - 1);
    if (p.levels) return levels[(b * p.levels_count + code) * p.across + (p.across == 1 ? 0 : column)];
    return firsts[number] + steps[number] * code;
  }

  // The largest error, relative to sum |x| times the largest of what is added up.
  double error() const {
    double worst = 0;
    for (int64_t row = 0; row < p.rows; ++row)
      for (int64_t column = 0; column < p.columns; ++column) {
        double sum = 0, size = 0, most = 1e-30;
        for (int64_t k = 0; k < block * p.blocks; ++k) {
          const double a = x[(row * p.blocks + k / block) * p.count * p.each() + k % block], w = weight(k, column);
          const int64_t number = k / block * p.across + (p.across == 1 ? 0 : column);
          sum += a * w, size += std::abs(a), most = std::fmax(most, std::abs(w));
          if (!p.levels) most = std::fmax(most, std::fmax(std::abs(firsts[number]), std::abs(steps[number]) * ((1 << p.width) - 1)));
        }
        worst = std::fmax(worst, std::abs(y[row * p.columns + column] - sum) / (size * most));
      }
    return worst;
  }
};

}  // namespace

int main(int count, char** arguments) {
  const int64_t cases = count > 1 ? std::atoll(arguments[1]) : 300;
  random_bits.seed(count > 2 ? std::atoi(arguments[2]) : 0);
  double worst = 0;
  for (int64_t i = 0; i < cases; ++i) {
    Case made;
    for (const char* name : {"plain", "avx2", "avx512"}) {
      const auto multiply = lcq::multiply_by(name);
      if (!multiply) continue;
      for (int64_t at = 0; at < made.p.rows * made.p.columns; ++at) made.y[at] = NAN;
      const int64_t each = lcq::kTile * within(1, 3), shares = (made.p.columns + each - 1) / each;
      lcq::share(shares, 1, [&](int64_t s) { multiply(made.p, s * each, std::min((s + 1) * each, made.p.columns)); }, [](auto) {});
      const double error = made.error();
      worst = std::fmax(worst, error);
      if (!(error < 16 * std::ldexp(1.0, -24))) {
        const Product& p = made.p;
        std::printf("case %ld, %s: error %g; rows %ld, blocks %ld of %ld, columns %ld, across %ld, width %d, levels %ld\n",
                    static_cast<long>(i), name, error, static_cast<long>(p.rows), static_cast<long>(p.blocks),
                    static_cast<long>(made.block), static_cast<long>(p.columns), static_cast<long>(p.across), p.width,
                    static_cast<long>(p.levels_count));
        return 1;
      }
    }
  }
  std::printf("%ld cases on %s: largest error %.2g units of rounding\n", static_cast<long>(cases), lcq::best(), worst * (1 << 24));
  return 0;
}
