// Which instruction set this processor has.

#include <cstring>

#include "product.h"

namespace lcq {

const char* best() {
#ifdef LCQ_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq"))
    return "avx512";
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) return "avx2";
#endif
  return "plain";
}

Multiply multiply_by(const char* name) {
  if (std::strcmp(name, "plain") == 0) return multiply_plain;
#ifdef LCQ_X86
  const bool wide = std::strcmp(best(), "avx512") == 0;
  if (std::strcmp(name, "avx512") == 0 && wide) return multiply_avx512;
  if (std::strcmp(name, "avx2") == 0 && (wide || std::strcmp(best(), "avx2") == 0)) return multiply_avx2;
#endif
  return nullptr;
}

}  // namespace lcq
