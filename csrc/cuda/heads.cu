// RoPE, and the order of heads. See heads.h.
//
// Bound by memory: every number is read once and written once. A thread has one pair of numbers
// that RoPE mixes, j and j + head_dim / 2, so neighbours read neighbours:
//
//   thread -> (token, head: those of q, then of k, then of v; pair j)
#include "heads.h"

#include "launch.cuh"
#include "ptx.cuh"

namespace fq::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMostBlocks = 1 << 16;

unsigned blocks_for(int64_t work) {
  const int64_t blocks = (work + kThreads - 1) / kThreads;
  return static_cast<unsigned>(blocks < kMostBlocks ? blocks : kMostBlocks);
}

template <Dtype kType>
__global__ void __launch_bounds__(kThreads) turn_kernel(TurnHeads args) {
  const int64_t d = args.head_dim, half = d / 2, all = args.heads + 2 * args.kv_heads;
  const int64_t work = args.batch * args.t * all * half;
  const int64_t step = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < work; i += step) {
    const int64_t j = i % half, head = i / half % all, token = i / half / all;
    const int64_t b = token / args.t, position = token % args.t;
    const bool is_query = head < args.heads, is_value = head >= args.heads + args.kv_heads;
    const void* const x = is_query ? args.q : is_value ? args.v : args.k;
    void* const out = is_query ? args.q_out : is_value ? args.v_out : args.k_out;
    const int64_t heads = is_query ? args.heads : args.kv_heads;
    const int64_t h = is_query   ? head
                      : is_value ? head - args.heads - args.kv_heads
                                 : head - args.heads;
    const int64_t from = (token * heads + h) * d + j;
    const int64_t to = ((b * heads + h) * args.t + position) * d + j;
    const float low = load(x, kType, from), high = load(x, kType, from + half);
    if (is_value) {
      store(out, kType, to, low);
      store(out, kType, to + half, high);
      continue;
    }
    const int64_t angle = (args.cos_batch > 1 ? token : position) * d + j;
    const float low_cos = round_to(kType, low * load(args.cos, kType, angle));
    const float low_sin = round_to(kType, -high * load(args.sin, kType, angle));
    const float high_cos = round_to(kType, high * load(args.cos, kType, angle + half));
    const float high_sin = round_to(kType, low * load(args.sin, kType, angle + half));
    store(out, kType, to, low_cos + low_sin);
    store(out, kType, to + half, high_cos + high_sin);
  }
}

// kNumber: what is copied at a time.
template <class Number>
__global__ void __launch_bounds__(kThreads)
    gather_kernel(const Number* x, Number* out, int64_t t, int64_t heads, int64_t d, int64_t work) {
  const int64_t step = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < work; i += step) {
    const int64_t j = i % d, h = i / d % heads, position = i / d / heads % t;
    const int64_t b = i / d / heads / t;
    out[i] = x[((b * heads + h) * t + position) * d + j];
  }
}

template <class Number>
int gather(const GatherHeads& args, int64_t per_number, void* stream) {
  const int64_t d = args.head_dim / per_number, work = args.batch * args.t * args.heads * d;
  if (work == 0) return 0;
  FQ_LAUNCH((gather_kernel<Number>), blocks_for(work), kThreads, 0, stream,
            static_cast<const Number*>(args.x), static_cast<Number*>(args.out), args.t, args.heads,
            d, work);
  return static_cast<int>(cudaGetLastError());
}

bool aligned(const void* p, std::size_t bytes) {
  return reinterpret_cast<uintptr_t>(p) % bytes == 0;
}

}  // namespace

int turn_heads(const TurnHeads& args, void* stream) {
  const int64_t work = args.batch * args.t * (args.heads + 2 * args.kv_heads) * (args.head_dim / 2);
  if (work == 0) return 0;
  const unsigned blocks = blocks_for(work);
  if (args.dtype == Dtype::kFloat32)
    FQ_LAUNCH((turn_kernel<Dtype::kFloat32>), blocks, kThreads, 0, stream, args);
  else if (args.dtype == Dtype::kBFloat16)
    FQ_LAUNCH((turn_kernel<Dtype::kBFloat16>), blocks, kThreads, 0, stream, args);
  else
    FQ_LAUNCH((turn_kernel<Dtype::kFloat16>), blocks, kThreads, 0, stream, args);
  return static_cast<int>(cudaGetLastError());
}

int gather_heads(const GatherHeads& args, void* stream) {
  const int64_t unit = size_of(args.dtype), row_bytes = args.head_dim * unit;
  if (row_bytes % 16 == 0 && aligned(args.x, 16) && aligned(args.out, 16))
    return gather<uint4>(args, 16 / unit, stream);
  return unit == 4 ? gather<uint32_t>(args, 1, stream) : gather<uint16_t>(args, 1, stream);
}

}  // namespace fq::cuda
