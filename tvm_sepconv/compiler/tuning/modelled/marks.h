/* Instructions that do nothing, on every processor: hints that are not assigned. counter.c counts from the
 * one to the other. */
#ifndef TVM_SEPCONV_MARKS_H_
#define TVM_SEPCONV_MARKS_H_

#define MARK_BEGIN_AARCH64 0xd5032a1fu /* hint #80 */
#define MARK_END_AARCH64 0xd5032a3fu   /* hint #81 */
#define MARK_BEGIN_ARM 0xe320f050u     /* hint #80 of the 32-bit instruction set, not of Thumb */
#define MARK_END_ARM 0xe320f051u

#if defined(__aarch64__)
#define MARK_BEGIN() __asm__ volatile(".inst 0xd5032a1f" ::: "memory")
#define MARK_END() __asm__ volatile(".inst 0xd5032a3f" ::: "memory")
#elif defined(__arm__)
#define MARK_BEGIN() __asm__ volatile(".inst 0xe320f050" ::: "memory")
#define MARK_END() __asm__ volatile(".inst 0xe320f051" ::: "memory")
#endif

#endif /* TVM_SEPCONV_MARKS_H_ */
