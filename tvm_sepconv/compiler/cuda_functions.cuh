// The device functions that the tensor-core kernels call: whatever TVM's own CUDA C cannot say.
//
// The text stands in front of the kernels in every library. `Element` is what the arrays hold:
// half, nv_bfloat16, or float, whose products are then TF32. Shared memory is one block of bytes,
// addressed by `shared` and a byte offset, so that every access to it is one of these functions.
// Only those under "The machine" know that they run on a GPU: tests/cuda/cuda_emulator/
// cuda_functions.h defines them for a CPU, with checks, and takes the rest as it stands here.
//
// A warp calls the functions marked "warp" together. In the fragments below lane = 4·group + place.
// Before sm_80 there is no cp.async, so copies are made at once; half is multiplied by two smaller
// instructions, bfloat16 on the ordinary cores. TF32 is not to be had, and ptxas refuses it.
#ifndef TVM_SEPCONV_CUDA_FUNCTIONS
#define TVM_SEPCONV_CUDA_FUNCTIONS

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define SEPCONV_FUNCTION static __device__ __forceinline__

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr bool sepconv_sm_80 = false;
#else
constexpr bool sepconv_sm_80 = true;
#endif

template <class Element>
constexpr bool sepconv_is_half = false;
template <>
constexpr bool sepconv_is_half<half> = true;

// --- The machine ---------------------------------------------------------------------------------
#ifndef SEPCONV_EMULATED

// What lies at an address that is aligned to it.
template <class Type, class Given>
SEPCONV_FUNCTION Type& sepconv_as(Given* address) {
  return *reinterpret_cast<Type*>(address);
}

// The same of shared memory.
template <class Type, class Byte>
SEPCONV_FUNCTION Type& sepconv_at(Byte* shared, int offset) {
  return *reinterpret_cast<Type*>(shared + offset);
}

// Copies `bytes` of the 16 or 4, and zeros for the rest, when `sepconv_wait` comes.
SEPCONV_FUNCTION void sepconv_cp_async_16(unsigned char* shared, int offset, const void* from,
                                          int bytes) {
  unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared + offset));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes)
               : "memory");
}

SEPCONV_FUNCTION void sepconv_cp_async_4(unsigned char* shared, int offset, const void* from,
                                         int bytes) {
  unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared + offset));
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(bytes)
               : "memory");
}

SEPCONV_FUNCTION void sepconv_cp_async_wait() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Rounds to 10 bits of mantissa, to nearest, ties away from zero.
SEPCONV_FUNCTION unsigned sepconv_round_tf32(float x) {
  unsigned bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
}

// Warp: four 8×8 matrices of 16-bit (or 8×4 of 32-bit) elements; lanes 8i to 8i + 7 give the 16-byte
// rows of matrix i. to[i] is row `group`, 32 bits at `place` of matrix i.
SEPCONV_FUNCTION void sepconv_matrices(unsigned* to, int at, const unsigned char* shared,
                                       int offset) {
  to += at;
  unsigned from = static_cast<unsigned>(__cvta_generic_to_shared(shared + offset));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(from)
               : "memory");
}

// Warp: the same of matrices of 16-bit elements, each transposed.
SEPCONV_FUNCTION void sepconv_matrices_transposed(unsigned* to, int at,
                                                  const unsigned char* shared, int offset) {
  to += at;
  unsigned from = static_cast<unsigned>(__cvta_generic_to_shared(shared + offset));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(from)
               : "memory");
}

// Warp: sums (16×8) += a (16×k) · b (k×8), where b is so many registers of a lane and a twice as
// many. sums[2i + j] is row group + 8i, column 2·place + j; a[2h + i] is row group + 8i and b[h]
// column group, both at the 32 bits number 4h + place along k.
template <class Element, int count>
SEPCONV_FUNCTION void sepconv_mma(float* sums, const unsigned* a, const unsigned* b) {
#define SEPCONV_MMA(shape, type)                                                               \
  asm volatile("mma.sync.aligned." shape ".row.col.f32." type "." type                         \
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"          \
               : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])                    \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
  if constexpr (sizeof(Element) == 4)
    SEPCONV_MMA("m16n8k8", "tf32");
  else if constexpr (!sepconv_is_half<Element>)
    SEPCONV_MMA("m16n8k16", "bf16");
  else if constexpr (count == 2)
    SEPCONV_MMA("m16n8k16", "f16");
  else
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, "
                 "{%6}, {%0, %1, %2, %3};"
                 : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
                 : "r"(a[0]), "r"(a[1]), "r"(b[0]));
#undef SEPCONV_MMA
}

#endif  // SEPCONV_EMULATED

// --- Types ---------------------------------------------------------------------------------------
SEPCONV_FUNCTION float sepconv_widen(float x) { return x; }
SEPCONV_FUNCTION float sepconv_widen(half x) { return __half2float(x); }
SEPCONV_FUNCTION float sepconv_widen(nv_bfloat16 x) { return __bfloat162float(x); }

SEPCONV_FUNCTION void sepconv_narrow(float* to, float x) { *to = x; }
SEPCONV_FUNCTION void sepconv_narrow(half* to, float x) { *to = __float2half_rn(x); }
SEPCONV_FUNCTION void sepconv_narrow(nv_bfloat16* to, float x) { *to = __float2bfloat16_rn(x); }

SEPCONV_FUNCTION void sepconv_narrow(float2* to, float x, float y) { *to = make_float2(x, y); }
SEPCONV_FUNCTION void sepconv_narrow(half2* to, float x, float y) {
  *to = __floats2half2_rn(x, y);
}
SEPCONV_FUNCTION void sepconv_narrow(nv_bfloat162* to, float x, float y) {
  *to = __floats2bfloat162_rn(x, y);
}

template <class Element>
struct sepconv_pair;
template <>
struct sepconv_pair<float> {
  using type = float2;
};
template <>
struct sepconv_pair<half> {
  using type = half2;
};
template <>
struct sepconv_pair<nv_bfloat16> {
  using type = nv_bfloat162;
};

// --- From global to shared memory ----------------------------------------------------------------
// Copies 16 bytes, or zeros where not `inside`, before `sepconv_wait` returns.
template <class Element>
SEPCONV_FUNCTION void sepconv_copy_async_16(unsigned char* shared, int offset, const Element* from,
                                            bool inside) {
  if constexpr (sepconv_sm_80)
    sepconv_cp_async_16(shared, offset, from, inside ? 16 : 0);
  else
    sepconv_at<uint4>(shared, offset) =
        inside ? sepconv_as<const uint4>(from) : make_uint4(0, 0, 0, 0);
}

// Copies `bytes` of the 4, whole elements, and makes the rest zeros.
template <class Element>
SEPCONV_FUNCTION void sepconv_copy_async_4(unsigned char* shared, int offset, const Element* from,
                                           int bytes) {
  if constexpr (sepconv_sm_80) {
    sepconv_cp_async_4(shared, offset, from, bytes);
  } else {
    unsigned word = 0;
    if (bytes == 4) word = sepconv_as<const unsigned>(from);
    if (bytes == 2) word = sepconv_as<const unsigned short>(from);
    sepconv_at<unsigned>(shared, offset) = word;
  }
}

// Copies one element at once, for arrays that cp.async cannot take; zero where not `inside`.
template <class Element>
SEPCONV_FUNCTION void sepconv_copy(unsigned char* shared, int offset, const Element* from,
                                   bool inside) {
  Element value;
  sepconv_narrow(&value, 0.0f);
  if (inside) value = *from;
  sepconv_at<Element>(shared, offset) = value;
}

// Waits for this thread's copies; a barrier makes them everyone's.
SEPCONV_FUNCTION void sepconv_wait() {
  if constexpr (sepconv_sm_80) sepconv_cp_async_wait();
}

// --- Depthwise stage -----------------------------------------------------------------------------
template <class Element, int count>
SEPCONV_FUNCTION void sepconv_read(float* to, int at, const unsigned char* shared,
                                   int offset) {
  to += at;
  if constexpr (count == 2) {
    using Pair = typename sepconv_pair<Element>::type;
    Pair pair = sepconv_at<const Pair>(shared, offset);
    to[0] = sepconv_widen(pair.x);
    to[1] = sepconv_widen(pair.y);
  } else {
    to[0] = sepconv_widen(sepconv_at<const Element>(shared, offset));
  }
}

template <class Element>
SEPCONV_FUNCTION float sepconv_fetch(const Element* from, bool inside) {
  return inside ? sepconv_widen(*from) : 0.0f;
}

// `apart` is a constant: added to the address, and not to an index in 32 bits, it costs nothing.
template <int count>
SEPCONV_FUNCTION void sepconv_weights(float* to, const float* from, int apart) {
  from += apart;
  if constexpr (count == 2) {
    float2 pair = __ldg(&sepconv_as<const float2>(from));
    to[0] = pair.x;
    to[1] = pair.y;
  } else {
    to[0] = __ldg(from);
  }
}

// Leaves sums as operands of the tensor cores: the one place where they are rounded.
template <class Element, int count>
SEPCONV_FUNCTION void sepconv_leave(unsigned char* shared, int offset, const float* sums,
                                    int at) {
  sums += at;
  if constexpr (sizeof(Element) == 4) {
    for (int i = 0; i < count; i++)
      sepconv_at<unsigned>(shared, offset + 4 * i) = sepconv_round_tf32(sums[i]);
  } else if constexpr (count == 2) {
    using Pair = typename sepconv_pair<Element>::type;
    sepconv_narrow(&sepconv_at<Pair>(shared, offset), sums[0], sums[1]);
  } else {
    sepconv_narrow(&sepconv_at<Element>(shared, offset), sums[0]);
  }
}

// --- Pointwise stage -----------------------------------------------------------------------------
// One element of a float32 matrix as a TF32 operand; there is no transposing ldmatrix of 32 bits.
SEPCONV_FUNCTION void sepconv_element_tf32(unsigned* to, int at, const unsigned char* shared,
                                           int offset) {
  to[at] = sepconv_round_tf32(sepconv_at<const float>(shared, offset));
}

// Warp: what an mma.sync of bfloat16 does, on the ordinary cores: each lane gathers its two rows of a
// and its two columns of b from the lanes that have them.
SEPCONV_FUNCTION void sepconv_multiply_bfloat16(float* sums, const unsigned* a, const unsigned* b) {
  const int lane = threadIdx.x % 32, row = lane / 4 * 4, column = lane % 4 * 8;
  for (int h = 0; h < 2; h++)
#pragma unroll 1  // or nvcc gathers for many products at once, and spills
    for (int place = 0; place < 4; place++) {
      unsigned x[2], y[2];
      for (int i = 0; i < 2; i++) {
        x[i] = __shfl_sync(~0u, a[2 * h + i], row + place);
        y[i] = __shfl_sync(~0u, b[h], column + 4 * i + place);
      }
      for (int i = 0; i < 2; i++)
        for (int j = 0; j < 2; j++) {
          sums[2 * i + j] += __uint_as_float(x[i] << 16) * __uint_as_float(y[j] << 16);
          sums[2 * i + j] +=
              __uint_as_float(x[i] & 0xffff0000) * __uint_as_float(y[j] & 0xffff0000);
        }
    }
}

// Warp: sums (16×8) += a (16×k) · b (k×8), k = 16 of 16-bit elements, 8 of TF32; see `sepconv_mma`.
template <class Element>
SEPCONV_FUNCTION void sepconv_multiply(float* sums, int first, const unsigned* a, int first_a,
                                       const unsigned* b, int first_b) {
  sums += first, a += first_a, b += first_b;
  if constexpr (sepconv_sm_80 || sizeof(Element) == 4) {
    sepconv_mma<Element, 2>(sums, a, b);
  } else if constexpr (sepconv_is_half<Element>) {
    for (int h = 0; h < 2; h++) sepconv_mma<Element, 1>(sums, a + 2 * h, b + h);
  } else {
    sepconv_multiply_bfloat16(sums, a, b);
  }
}

// --- Output --------------------------------------------------------------------------------------
template <class Element>
SEPCONV_FUNCTION void sepconv_put(Element* to, float value) {
  sepconv_narrow(to, value);
}

// Two neighbours in one move, aligned to both.
template <class Element>
SEPCONV_FUNCTION void sepconv_put_pair(Element* to, float first, float second) {
  sepconv_narrow(&sepconv_as<typename sepconv_pair<Element>::type>(to), first, second);
}

#endif  // TVM_SEPCONV_CUDA_FUNCTIONS
