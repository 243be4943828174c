// What XLA calls: checks of shapes and dtypes, x in blocks, and the share of each thread.

#include <algorithm>
#include <cstdlib>
#include <string>
#include <string_view>
#include <vector>

#include "product.h"
#include "shared_work.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

using lcq::Product;

ffi::Error refuse(const std::string& text) { return ffi::Error::InvalidArgument("lcq_native: expected " + text); }

// x [m, blocks, count * each], zeros behind the rows of each block, and the sums of blocks.
struct Padded {
  std::vector<float> x, total;

  Padded(const float* from, int64_t rows, int64_t blocks, int64_t block, int64_t padded) {
    x.assign(rows * blocks * padded, 0.0f);
    total.assign(rows * blocks, 0.0f);
    for (int64_t i = 0; i < rows * blocks; ++i) {
      std::copy_n(from + i * block, block, x.data() + i * padded);
      float sum = 0;
      for (int64_t k = 0; k < block; ++k) sum += from[i * block + k];
      total[i] = sum;
    }
  }
};

// The product that shapes of x and words describe; an error if they do not fit.
ffi::Error begin(ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::U32> words, ffi::ResultBuffer<ffi::F32> y, int64_t width, Product& p) {
  const auto xs = x.dimensions(), ws = words.dimensions(), ys = y->dimensions();
  if (width != 1 && width != 2 && width != 4 && width != 8 && width != 16) return refuse("a width of 1, 2, 4, 8 or 16");
  if (xs.size() != 2 || ws.size() != 3 || ys.size() != 2) return refuse("x [m, k], words [b, w, n], y [m, n]");
  p.rows = xs[0], p.blocks = ws[0], p.count = ws[1], p.columns = ws[2], p.width = static_cast<int>(width);
  if (p.blocks < 1 || xs[1] % p.blocks != 0 || p.count != (xs[1] / p.blocks + p.each() - 1) / p.each())
    return refuse("words of as many rows as x has columns");
  if (ys[0] != p.rows || ys[1] != p.columns) return refuse("y [m, n] of x [m, k] and words [b, w, n]");
  p.words = words.typed_data(), p.y = y->typed_data();
  return ffi::Error::Success();
}

ffi::Error finish(ffi::ThreadPool pool, const float* x, int64_t k, Product& p, std::string_view set) {
  const auto multiply = lcq::multiply_by(set.empty() ? lcq::best() : std::string(set).c_str());
  if (!multiply) return refuse("an instruction set that this processor has, got " + std::string(set));
  const Padded padded(x, p.rows, p.blocks, k / p.blocks, p.count * p.each());
  p.x = padded.x.data(), p.total = padded.total.data();
  // Two shares for each thread: one that comes late takes less.
  const int64_t threads = std::max<int64_t>(1, pool.num_threads()), shares = threads > 1 ? 2 * threads : 1;
  const int64_t tiles = (p.columns + lcq::kTile - 1) / lcq::kTile, each = (tiles + shares - 1) / shares * lcq::kTile;
  if (p.columns == 0) return ffi::Error::Success();
  const auto share = [&p, multiply, each](int64_t i) { multiply(p, i * each, std::min((i + 1) * each, p.columns)); };
  lcq::share((p.columns + each - 1) / each, threads, share, [&pool](auto task) { pool.Schedule(std::move(task)); });
  return ffi::Error::Success();
}

ffi::Error book(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::U32> words, ffi::Buffer<ffi::F32> levels,
                ffi::ResultBuffer<ffi::F32> y, int64_t width, std::string_view set) {
  Product p{};
  if (auto error = begin(x, words, y, width, p); error.failure()) return error;
  const auto ls = levels.dimensions();
  if (width != 2 && width != 4) return refuse("codes of 2 or 4 bits");
  if (ls.size() != 3 || ls[0] != p.blocks || ls[1] < 1 || ls[1] > 1 << width || (ls[2] != 1 && ls[2] != p.columns))
    return refuse("levels [b, K, 1 or n], no more than codes can name");
  p.levels = levels.typed_data(), p.levels_count = ls[1], p.across = ls[2];
  return finish(pool, x.typed_data(), x.dimensions()[1], p, set);
}

// Numbers of blocks, or none.
template <typename Array>
bool fits(const Product& p, const Array& a) {
  const auto s = a.dimensions();
  return a.element_count() == 0 || (s.size() == 2 && s[0] == p.blocks && s[1] == p.across);
}

ffi::Error even(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::U32> words, ffi::AnyBuffer step,
                ffi::Buffer<ffi::F32> first, ffi::AnyBuffer zero, ffi::ResultBuffer<ffi::F32> y, int64_t width,
                float lowest, std::string_view set) {
  Product p{};
  if (auto error = begin(x, words, y, width, p); error.failure()) return error;
  const auto ss = step.dimensions();
  if (ss.size() != 2 || ss[0] != p.blocks || (ss[1] != 1 && ss[1] != p.columns)) return refuse("steps [b, 1 or n]");
  p.across = ss[1], p.lowest = lowest;
  if (!fits(p, first) || !fits(p, zero)) return refuse("first levels and zeros of the shape of steps, or none");
  if (step.element_type() == ffi::F32) p.scale = lcq::Scale::kFloat32;
  else if (step.element_type() == ffi::F16) p.scale = lcq::Scale::kFloat16;
  else if (step.element_type() == ffi::BF16) p.scale = lcq::Scale::kBfloat16;
  else return refuse("steps in float32, float16 or bfloat16");
  if (zero.element_type() != ffi::U8 && zero.element_type() != ffi::F32) return refuse("zeros in uint8 or float32");
  p.step = step.untyped_data(), p.first = first.element_count() ? first.typed_data() : nullptr;
  p.zero = zero.element_count() ? zero.untyped_data() : nullptr, p.zero_is_float = zero.element_type() == ffi::F32;
  return finish(pool, x.typed_data(), x.dimensions()[1], p, set);
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(lcq_book, book,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::U32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<int64_t>("width")
                                  .Attr<std::string_view>("set"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(lcq_even, even,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::U32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<int64_t>("width")
                                  .Attr<float>("lowest")
                                  .Attr<std::string_view>("set"));

extern "C" const char* lcq_best() { return lcq::best(); }
