// Kernels that test the emulator itself, and ptx.cuh with it: nvcc compiles this file too. One
// exported function per kernel, called by test_shim.py through ctypes; it returns a cudaError_t, or
// -1 if the emulator found a fault, and shim_failure() has the text.
#include "../../csrc/cuda/launch.cuh"
#include "../../csrc/cuda/ptx.cuh"

#include <exception>
#include <string>

#define FQ_EXPORT extern "C" __attribute__((visibility("default")))

namespace fq::cuda {
namespace {

// ---- ldmatrix ----------------------------------------------------------------------------------

// rows: 32 rows of 8 numbers. out: [32 lanes, 4 registers] of x4, x4_trans, then 2 of x2, x2_trans.
__global__ void ldmatrix_kernel(const uint4* rows, uint32_t* out) {
  __shared__ __align__(16) uint4 tile[kWarp];
  const int lane = threadIdx.x;
  tile[lane] = rows[lane];
  __syncwarp();
  uint32_t plain[4], transposed[4], two[2], two_transposed[2];
  ldmatrix_x4(plain, &tile[lane]);
  ldmatrix_x4_trans(transposed, &tile[lane]);
  ldmatrix_x2(two, &tile[lane % 16]);
  ldmatrix_x2_trans(two_transposed, &tile[lane % 16]);
  for (int i = 0; i < 4; ++i) out[4 * lane + i] = plain[i];
  for (int i = 0; i < 4; ++i) out[128 + 4 * lane + i] = transposed[i];
  for (int i = 0; i < 2; ++i) out[256 + 2 * lane + i] = two[i];
  for (int i = 0; i < 2; ++i) out[320 + 2 * lane + i] = two_transposed[i];
}

// ---- mma ---------------------------------------------------------------------------------------

// c [16, 8] += a [16, 16] b [16, 8], all row-major; a and b go through ldmatrix as kernels do it.
template <Dtype kType>
__global__ void mma_half_kernel(const uint16_t* a, const uint16_t* b, float* c) {
  __shared__ __align__(16) uint16_t a_tile[16 * 16], b_tile[16 * 8];
  const int lane = threadIdx.x;
  for (int i = lane; i < 16 * 16; i += kWarp) a_tile[i] = a[i];
  for (int i = lane; i < 16 * 8; i += kWarp) b_tile[i] = b[i];
  __syncwarp();
  uint32_t fa[4], fb[2];
  ldmatrix_x4(fa, &a_tile[lane % 16 * 16 + lane / 16 * 8]);
  ldmatrix_x2_trans(fb, &b_tile[lane % 16 * 8]);
  float fc[4];
  for (int i = 0; i < 4; ++i) fc[i] = c[(lane / 4 + 8 * (i / 2)) * 8 + lane % 4 * 2 + i % 2];
  mma_16816<kType>(fc, fa, fb[0], fb[1]);
  for (int i = 0; i < 4; ++i) c[(lane / 4 + 8 * (i / 2)) * 8 + lane % 4 * 2 + i % 2] = fc[i];
}

// c [16, 8] += a [16, 32] b^T, b [8, 32]: bytes.
template <bool kUnsigned>
__global__ void mma_byte_kernel(const uint32_t* a, const uint32_t* b, int32_t* c) {
  const int group = threadIdx.x / 4, t = threadIdx.x % 4;
  uint32_t fa[4];
  for (int i = 0; i < 4; ++i) fa[i] = a[(group + 8 * (i % 2)) * 8 + t + 4 * (i / 2)];
  int32_t fc[4];
  for (int i = 0; i < 4; ++i) fc[i] = c[(group + 8 * (i / 2)) * 8 + t * 2 + i % 2];
  if constexpr (kUnsigned)
    mma_16832_u8s8(fc, fa, b[group * 8 + t], b[group * 8 + t + 4]);
  else
    mma_16832_s8(fc, fa, b[group * 8 + t], b[group * 8 + t + 4]);
  for (int i = 0; i < 4; ++i) c[(group + 8 * (i / 2)) * 8 + t * 2 + i % 2] = fc[i];
}

// ---- copies ------------------------------------------------------------------------------------

// Each thread copies three words in three groups and notes what it sees at every step: out
// [threads, 8]: before any wait 0, 1, 2; after wait<1> 0, 1, 2; after wait<0> 2; and a copy of 16
// bytes with 6 valid ones.
__global__ void copy_kernel(const uint32_t* in, uint32_t* out) {
  FQ_DYNAMIC_SHARED(uint32_t, words);
  __shared__ __align__(16) uint32_t part[4];
  uint32_t* const mine = words + 4 * threadIdx.x;
  for (int i = 0; i < 3; ++i) {
    copy_async<4>(mine + i, in + 3 * threadIdx.x + i);
    copy_async_commit();
  }
  volatile uint32_t* const seen = mine;
  uint32_t* const note = out + 8 * threadIdx.x;
  for (int i = 0; i < 3; ++i) note[i] = seen[i];
  copy_async_wait<1>();
  for (int i = 0; i < 3; ++i) note[3 + i] = seen[i];
  if (threadIdx.x == 0) copy_async<16>(part, in, 6);
  copy_async_commit();
  copy_async_wait<0>();
  note[6] = seen[2];
  __syncthreads();
  note[7] = part[threadIdx.x % 4];
}

// ---- warps and blocks --------------------------------------------------------------------------

// out [threads, 12]
__global__ void warp_kernel(const int32_t* in, int32_t* out) {
  const int32_t value = in[threadIdx.x];
  int32_t* const note = out + 12 * threadIdx.x;
  note[0] = __shfl_sync(kAllLanes, value, 3);
  note[1] = __shfl_sync(kAllLanes, value, threadIdx.x * 7 + 1, 8);
  note[2] = __shfl_xor_sync(kAllLanes, value, 5);
  note[3] = __shfl_down_sync(kAllLanes, value, 3, 16);
  note[4] = __shfl_up_sync(kAllLanes, value, 9);
  note[5] = static_cast<int32_t>(__ballot_sync(kAllLanes, value > 0));
  note[6] = __any_sync(kAllLanes, value > 0);
  note[7] = __all_sync(kAllLanes, value > 0);
  note[8] = warp_max(value);
  note[9] = static_cast<int32_t>(warp_max(static_cast<uint32_t>(value)));
  note[10] = static_cast<int32_t>(__reduce_add_sync(kAllLanes, value));
  note[11] = static_cast<int32_t>(warp_sum(static_cast<float>(value % 1000)));
}

template <int kThreads>
__global__ void block_kernel(const int32_t* in, float* out) {
  __shared__ float sums[kThreads / kWarp];
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  out[i] = block_sum<kThreads>(static_cast<float>(in[i] % 1000), sums);
}

// Sums of neighbours through shared memory; without the barrier it is a race.
__global__ void neighbours_kernel(const int32_t* in, int32_t* out, bool barrier) {
  __shared__ int32_t values[128];
  values[threadIdx.x] = in[threadIdx.x];
  if (barrier) __syncthreads();
  out[threadIdx.x] = values[threadIdx.x] + values[(threadIdx.x + 64) % 128];
}

// ---- clusters ----------------------------------------------------------------------------------

// Every block gives its number to the next block of its cluster, by static and by dynamic shared
// memory, and reads the one after that.
__global__ void cluster_kernel(uint32_t* out, bool greet) {
  FQ_DYNAMIC_SHARED(uint32_t, from_left);
  __shared__ float from_right, own;
  const uint32_t rank = cluster_rank(), size = cluster_size();
  if (threadIdx.x == 0) own = 100.0f + static_cast<float>(blockIdx.x);
  if (greet) {  // says that the blocks have begun, and that `own` is there
    cluster_arrive();
    cluster_wait();
  }
  if (threadIdx.x == 0) {
    cluster_store(uint32_t{blockIdx.x}, &from_left[1], (rank + 1) % size);
    cluster_store(static_cast<float>(blockIdx.x), &from_right, (rank + size - 1) % size);
  }
  const float far = cluster_load(&own, (rank + 2) % size);
  cluster_arrive();
  cluster_wait();
  if (threadIdx.x == 33) {
    out[4 * blockIdx.x] = from_left[1];
    out[4 * blockIdx.x + 1] = static_cast<uint32_t>(from_right);
    out[4 * blockIdx.x + 2] = static_cast<uint32_t>(far);
    out[4 * blockIdx.x + 3] = 10 * size + rank;
  }
}

// ---- conversions -------------------------------------------------------------------------------

// out [n, 8] of neighbouring numbers
__global__ void convert_kernel(const float* in, uint32_t* out, int n) {
  const int i = blockIdx.x * kWarp + threadIdx.x;
  if (i >= n) return;
  const float x = in[i], y = in[(i + 1) % n];
  uint32_t* const note = out + 8 * i;
  note[0] = pack2<Dtype::kBFloat16>(x, y);
  note[1] = pack2<Dtype::kFloat16>(x, y);
  note[2] = static_cast<uint32_t>(round_to_int(x));
  note[3] = pack_s4(round_to_int(x), round_to_int(y), 0x12345678u);
  note[4] = pack_s8(round_to_int(x), round_to_int(y), 0x12345678u);
  note[5] = bits_of(reciprocal(x));
  note[6] = load_streaming(reinterpret_cast<const uint32_t*>(in) + i);
  store_streaming(note + 7, __byte_perm(bits_of(x), bits_of(y), 0x8641));
}

// ---- kernels with a fault ----------------------------------------------------------------------

enum class Fault : int {
  kNone,
  kHalfBlockAtBarrier,
  kTwoBarriers,
  kWarpSplit,
  kLaneEnds,
  kMisalignedCopy,
  kMisalignedMatrix,
  kMatrixNotShared,
  kWriteBehindShared,
  kWriteBeforeShared,
  kCopyNotWaitedFor,
  kStaticPoison,
  kDynamicPoison,
  kReadBehindShared,
  kReadBehindStatic,
  kMisalignedVector,
};

__global__ void fault_kernel(const uint4* in, uint32_t* out, Fault fault) {
  FQ_DYNAMIC_SHARED(uint32_t, words);  // 64
  __shared__ uint32_t fixed[32];
  const int i = threadIdx.x;
  uint32_t r[4];
  switch (fault) {
    case Fault::kNone:
      break;
    case Fault::kHalfBlockAtBarrier:
      if (i < 32) __syncthreads();
      break;
    case Fault::kTwoBarriers:
      if (i < 32)
        __syncthreads();
      else
        __syncthreads();
      break;
    case Fault::kWarpSplit:
      if (i % 2)
        __syncwarp();
      else
        __shfl_sync(kAllLanes, i, 0);
      break;
    case Fault::kLaneEnds:
      if (i == 5) return;
      __syncwarp();
      break;
    case Fault::kMisalignedCopy:
      copy_async<16>(words + 1, in);
      break;
    case Fault::kMisalignedMatrix:
      ldmatrix_x4(r, words + i);
      break;
    case Fault::kMatrixNotShared:
      ldmatrix_x4(r, in);
      break;
    case Fault::kWriteBehindShared:
      words[i + 1] = 1;
      break;
    case Fault::kWriteBeforeShared:
      words[i - 1] = 1;
      break;
    case Fault::kCopyNotWaitedFor:
      copy_async<4>(words + i, in);
      copy_async_commit();
      break;
    case Fault::kStaticPoison:
      out[i] = fixed[i % 32];
      break;
    case Fault::kDynamicPoison:
      out[i] = words[i];
      break;
    case Fault::kReadBehindShared:
      out[i] = words[i + 1];
      break;
    case Fault::kReadBehindStatic: {
      const uint32_t* const behind = fixed + i;
      out[i] = behind[1];
      break;
    }
    case Fault::kMisalignedVector:
      out[i] = reinterpret_cast<const uint4*>(words + 1)->x;
      break;
  }
  if (fault != Fault::kStaticPoison) fixed[i % 32] = i;
}

std::string& failure() {
  static std::string text;
  return text;
}

template <class Body>
int guarded(Body body) {
  try {
    body();
    return cudaGetLastError();
  } catch (const std::exception& error) {
    failure() = error.what();
    return -1;
  }
}

}  // namespace

FQ_EXPORT const char* shim_failure() { return failure().c_str(); }

FQ_EXPORT int shim_ldmatrix(const uint4* rows, uint32_t* out) {
  return guarded([&] { FQ_LAUNCH(ldmatrix_kernel, 1, kWarp, 0, nullptr, rows, out); });
}

FQ_EXPORT int shim_mma_half(bool bf16, const uint16_t* a, const uint16_t* b, float* c) {
  return guarded([&] {
    if (bf16)
      FQ_LAUNCH(mma_half_kernel<Dtype::kBFloat16>, 1, kWarp, 0, nullptr, a, b, c);
    else
      FQ_LAUNCH(mma_half_kernel<Dtype::kFloat16>, 1, kWarp, 0, nullptr, a, b, c);
  });
}

FQ_EXPORT int shim_mma_byte(bool is_unsigned, const uint32_t* a, const uint32_t* b, int32_t* c) {
  return guarded([&] {
    if (is_unsigned)
      FQ_LAUNCH(mma_byte_kernel<true>, 1, kWarp, 0, nullptr, a, b, c);
    else
      FQ_LAUNCH(mma_byte_kernel<false>, 1, kWarp, 0, nullptr, a, b, c);
  });
}

FQ_EXPORT int shim_copy(const uint32_t* in, uint32_t* out) {
  return guarded([&] { FQ_LAUNCH(copy_kernel, 1, 64, 64 * 16, nullptr, in, out); });
}

FQ_EXPORT int shim_warp(const int32_t* in, int32_t* out) {
  return guarded([&] { FQ_LAUNCH(warp_kernel, 1, 64, 0, nullptr, in, out); });
}

FQ_EXPORT int shim_block(const int32_t* in, float* out, int blocks) {
  return guarded([&] { FQ_LAUNCH(block_kernel<256>, blocks, 256, 0, nullptr, in, out); });
}

FQ_EXPORT int shim_neighbours(const int32_t* in, int32_t* out, bool barrier) {
  return guarded([&] { FQ_LAUNCH(neighbours_kernel, 1, 128, 0, nullptr, in, out, barrier); });
}

FQ_EXPORT int shim_cluster(uint32_t* out, int blocks, int cluster, bool greet) {
  return guarded(
      [&] { FQ_LAUNCH_CLUSTER(cluster_kernel, blocks, 64, cluster, 16, nullptr, out, greet); });
}

FQ_EXPORT int shim_convert(const float* in, uint32_t* out, int n) {
  return guarded(
      [&] { FQ_LAUNCH(convert_kernel, (n + kWarp - 1) / kWarp, kWarp, 0, nullptr, in, out, n); });
}

FQ_EXPORT int shim_fault(const uint4* in, uint32_t* out, int fault, int threads, int shared_bytes,
                         int allowed) {
  if (const int error = allow_shared(fault_kernel, allowed)) return error;
  return guarded([&] {
    FQ_LAUNCH(fault_kernel, 1, threads, shared_bytes, nullptr, in, out, static_cast<Fault>(fault));
  });
}

}  // namespace fq::cuda
