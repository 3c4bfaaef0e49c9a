/* How fast one core reads a buffer, with vectors of an instruction set and nothing else.
 *
 * Eight sums are independent of each other, so that a read never waits for an addition; integers, so
 * that any content takes the same time and the sums can be checked to the bit.
 */
#include <stdint.h>

#define EIGHT(DO) DO(0) DO(1) DO(2) DO(3) DO(4) DO(5) DO(6) DO(7)
#define CLEAR(i) v##i = zero;
#define READ(i) v##i += data[at + i];
#define ADD(i) sum += v##i;
/* Nothing is known of memory after a pass: passes can be neither left out nor taken together. */
#define AGAIN __asm__ volatile("" : : : "memory")

/* Reads `vectors`, a multiple of eight, `passes` times; their sum, a lane each, is out[0:lanes]. */
#define BANDWIDTH(name, bytes, attributes)                                            \
  typedef uint32_t ints_##name __attribute__((vector_size(bytes)));                   \
  attributes void name(int64_t passes, ints_##name* data, int64_t vectors, uint32_t* out) { \
    ints_##name zero = {0}, sum = zero, v0, v1, v2, v3, v4, v5, v6, v7;               \
    EIGHT(CLEAR)                                                                      \
    for (; passes > 0; --passes) {                                                    \
      for (int64_t at = 0; at < vectors; at += 8) { EIGHT(READ) }                     \
      AGAIN;                                                                          \
    }                                                                                 \
    EIGHT(ADD)                                                                        \
    __builtin_memcpy(out, &sum, bytes);                                               \
  }

#if defined(__x86_64__)
BANDWIDTH(read_sse42, 16, __attribute__((target("sse4.2"))))
BANDWIDTH(read_avx2, 32, __attribute__((target("avx2"))))
BANDWIDTH(read_avx512, 64, __attribute__((target("avx512f"))))
#elif defined(__aarch64__)
BANDWIDTH(read_neon, 16, )
#endif
