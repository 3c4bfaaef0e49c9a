/* A plugin for QEMU's user-mode emulation: how often each block of instructions ran.
 *
 * usage: qemu-aarch64 -plugin counter.so,out=FILE PROGRAM
 *
 * A block is instructions that run one after the other, up to a branch, a mark, the end of a page or what
 * QEMU translates at once. The program says what is counted by two instructions that do
 * nothing (see marks.h). At the second a section is appended to FILE: a line "=", then a line a block,
 * its address, how often it ran, how many instructions it has, and their bytes.
 *
 * The declarations are of QEMU's plugin API 1 (QEMU 4.2 to 8.2), whose header Debian does not install.
 */
#include <inttypes.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "marks.h"

#define EXPORT __attribute__((visibility("default")))
#define BUCKETS (1 << 16)
#define LONGEST 16 /* bytes: no instruction of any processor has more */

typedef uint64_t plugin_id;
typedef struct qemu_plugin_tb qemu_tb;
typedef struct qemu_plugin_insn qemu_insn;
enum { NO_REGISTERS = 0 };

size_t qemu_plugin_tb_n_insns(const qemu_tb*);
uint64_t qemu_plugin_tb_vaddr(const qemu_tb*);
qemu_insn* qemu_plugin_tb_get_insn(const qemu_tb*, size_t);
const void* qemu_plugin_insn_data(const qemu_insn*);
size_t qemu_plugin_insn_size(const qemu_insn*);
void qemu_plugin_register_vcpu_tb_trans_cb(plugin_id, void (*)(plugin_id, qemu_tb*));
void qemu_plugin_register_vcpu_insn_exec_cb(qemu_insn*, void (*)(unsigned, void*), int, void*);

EXPORT int qemu_plugin_version = 1;

typedef struct block {
  struct block* next; /* of its bucket */
  uint64_t address, count;
  size_t instructions, bytes;
  uint8_t code[];
} block;

static block* buckets[BUCKETS];
static bool counting;
static const char* path;

static void fail(const char* what) {
  fprintf(stderr, "counter: %s\n", what);
  exit(70);
}

static void executed(unsigned cpu, void* data) {
  (void)cpu;
  if (counting) ((block*)data)->count++;
}

static void begin(unsigned cpu, void* data) {
  (void)cpu, (void)data;
  for (int i = 0; i < BUCKETS; ++i)
    for (block* one = buckets[i]; one; one = one->next) one->count = 0;
  counting = true;
}

static void end(unsigned cpu, void* data) {
  (void)cpu, (void)data;
  counting = false;
  FILE* file = fopen(path, "a");
  if (!file) fail("the output cannot be written");
  fputs("=\n", file);
  for (int i = 0; i < BUCKETS; ++i)
    for (const block* one = buckets[i]; one; one = one->next) {
      if (!one->count) continue;
      fprintf(file, "%" PRIx64 " %" PRIu64 " %zu ", one->address, one->count, one->instructions);
      for (size_t k = 0; k < one->bytes; ++k) fprintf(file, "%02x", one->code[k]);
      fputc('\n', file);
    }
  if (fclose(file)) fail("the output cannot be written");
}

/* QEMU translates a block again whenever it likes; its count goes on. */
static block* known(uint64_t address, const uint8_t* code, size_t bytes, size_t instructions) {
  block** bucket = &buckets[(address >> 1 ^ address >> 17 ^ bytes << 3) % BUCKETS];
  for (block* one = *bucket; one; one = one->next)
    if (one->address == address && one->bytes == bytes && !memcmp(one->code, code, bytes)) return one;
  block* made = calloc(1, sizeof *made + bytes);
  if (!made) fail("out of memory");
  *made = (block){*bucket, address, 0, instructions, bytes};
  memcpy(made->code, code, bytes);
  return *bucket = made;
}

/* The mark that an instruction is: 1 begins, 2 ends, 0 is none. */
static int mark(const qemu_insn* one) {
  uint32_t word = 0;
  const size_t size = qemu_plugin_insn_size(one);
  memcpy(&word, qemu_plugin_insn_data(one), size < sizeof word ? size : sizeof word);
  if (word == MARK_BEGIN_AARCH64 || word == MARK_BEGIN_ARM) return 1;
  return word == MARK_END_AARCH64 || word == MARK_END_ARM ? 2 : 0;
}

/* A translation block with marks in it is several of ours: what stands before a mark is not what stands after. */
static void translated(plugin_id id, qemu_tb* tb) {
  (void)id;
  const size_t count = qemu_plugin_tb_n_insns(tb);
  uint8_t* code = malloc(LONGEST * count);
  if (!code) fail("out of memory");
  uint64_t address = qemu_plugin_tb_vaddr(tb);
  for (size_t i = 0, next; i < count; i = next) {
    qemu_insn* first = qemu_plugin_tb_get_insn(tb, i);
    size_t bytes = 0;
    for (next = i; next < count; ++next) {
      const qemu_insn* one = qemu_plugin_tb_get_insn(tb, next);
      if (mark(one)) break;
      memcpy(code + bytes, qemu_plugin_insn_data(one), qemu_plugin_insn_size(one));
      bytes += qemu_plugin_insn_size(one);
    }
    if (next > i) {
      block* here = known(address, code, bytes, next - i);
      qemu_plugin_register_vcpu_insn_exec_cb(first, executed, NO_REGISTERS, here);
    } else {
      qemu_plugin_register_vcpu_insn_exec_cb(first, mark(first) == 1 ? begin : end, NO_REGISTERS, NULL);
      bytes = qemu_plugin_insn_size(first);
      ++next;
    }
    address += bytes;
  }
  free(code);
}

EXPORT int qemu_plugin_install(plugin_id id, const void* info, int argc, char** argv) {
  (void)info;
  for (int i = 0; i < argc; ++i)
    if (!strncmp(argv[i], "out=", 4)) path = strdup(argv[i] + 4);
  if (!path) {
    fprintf(stderr, "counter: out=FILE is missing\n");
    return -1;
  }
  qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
  return 0;
}
