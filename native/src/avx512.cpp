#include "vector_avx512.h"
// The vectors come first: what follows is written for any width of them.
#include "multiply.h"

namespace lcq {

void multiply_avx512(const Product& p, int64_t begin, int64_t end) { multiply(p, begin, end); }

}  // namespace lcq
