/* The process's threads and each thread's scratch memory. */
#ifndef TVM_SEPCONV_POOL_H_
#define TVM_SEPCONV_POOL_H_

#include <stdint.h>

/* Run task(context, 0) … task(context, count - 1) and return when all are done; `count` is at most 256. The
 * calling thread takes part. Runs them one after another when the pool is busy or cannot be had. */
void pool_run(void (*task)(void* context, int index), void* context, int count);

/* The two slots of a compiled library that its scratch memory comes from (TVM's signatures). */
void* pool_alloc_workspace(int device_type, int device_id, uint64_t bytes, int code, int bits);
int pool_free_workspace(int device_type, int device_id, void* pointer);

/* Take back what a failed kernel of this thread left allocated: one that gets no memory frees nothing. */
void pool_drop_workspace(void);

/* Start the workers of `threads` threads and give each as much scratch as this thread has ever used at once. Returns 0
 * if there is no memory. */
int pool_prepare(int threads);

#endif /* TVM_SEPCONV_POOL_H_ */
