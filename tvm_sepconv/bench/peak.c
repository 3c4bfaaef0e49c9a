/* The most that one core can do with float32: chains of multiply-adds in registers and nothing else.
 *
 * Twelve chains are independent of each other, so that each unit has work while the others' results
 * are under way (two units of latency four need eight; SSE4.2's separate multiply and add, six steps
 * long together, need all twelve), and with their two constants they fit sixteen registers. armv7 is
 * not here: the compiler, which the benchmark needs as well, does not run there.
 */
#include <stdint.h>

#define CHAINS(DO) DO(0) DO(1) DO(2) DO(3) DO(4) DO(5) DO(6) DO(7) DO(8) DO(9) DO(10) DO(11)
#define START(i) v##i = zero + (float)i;
#define STEP(i) v##i = v##i * a + b;
#define ADD(i) sum += v##i;

/* Chain i starts at i, does v = v * factor + term `rounds` times, and is added to out[0:lanes]. */
#define PEAK(name, bytes, attributes)                                              \
  typedef float vec_##name __attribute__((vector_size(bytes)));                    \
  attributes void name(int64_t rounds, float factor, float term, float* out) {     \
    vec_##name zero = {0}, sum = zero, a = zero + factor, b = zero + term;         \
    vec_##name v0, v1, v2, v3, v4, v5, v6, v7, v8, v9, v10, v11;                   \
    CHAINS(START)                                                                  \
    for (; rounds > 0; --rounds) { CHAINS(STEP) }                                  \
    CHAINS(ADD)                                                                    \
    __builtin_memcpy(out, &sum, bytes);                                            \
  }

#if defined(__x86_64__)
PEAK(peak_sse42, 16, __attribute__((target("sse4.2"))))
PEAK(peak_avx2, 32, __attribute__((target("avx2,fma"))))
PEAK(peak_avx512, 64, __attribute__((target("avx512f"))))
#elif defined(__aarch64__)
PEAK(peak_neon, 16, )
#endif
