// RoPE, and the order of heads. See heads.h.
//
// Bound by memory: every number is read once and written once. A thread has one pair of numbers
// that RoPE mixes, j and j + head_dim / 2, so neighbours read neighbours:
//
//   blockIdx.y, thread -> (head: those of q, then of k, then of v; pair j),  blockIdx.x -> token
//
// and goes on to further tokens. Tokens, and the numbers of one, have 32 bits: 64-bit divisions
// take their time.
#include "heads.h"

#include "launch.cuh"
#include "ptx.cuh"

namespace fq::cuda {
namespace {

constexpr uint32_t kThreads = 256;
constexpr uint32_t kMostBlocks = 1 << 15;  // further tokens are taken by the same blocks

dim3 grid_for(int64_t tokens, int64_t items) {
  const uint32_t most = static_cast<uint32_t>(tokens);
  return dim3(most < kMostBlocks ? most : kMostBlocks,
              (static_cast<uint32_t>(items) + kThreads - 1) / kThreads);
}

// Heads that change: those of v only if they change places.
FQ_HD int64_t heads_of(const TurnHeads& args) {
  return args.heads + (args.v_out == args.v ? 1 : 2) * args.kv_heads;
}

template <Dtype kType>
__global__ void __launch_bounds__(kThreads) turn_kernel(const TurnHeads args) {
  const uint32_t d = static_cast<uint32_t>(args.head_dim), half = d / 2;
  const uint32_t item = blockIdx.y * kThreads + threadIdx.x, head = item / half;
  const uint32_t queries = static_cast<uint32_t>(args.heads);
  const uint32_t keys = static_cast<uint32_t>(args.kv_heads);
  if (head >= heads_of(args)) return;
  const bool is_query = head < queries, is_value = head >= queries + keys;
  const void* const x = is_query ? args.q : is_value ? args.v : args.k;
  void* const out = is_query ? args.q_out : is_value ? args.v_out : args.k_out;
  const uint32_t heads = is_query ? queries : keys, j = item - head * half;
  const uint32_t h = is_query ? head : is_value ? head - queries - keys : head - queries;
  const int64_t stride = is_query ? args.q_stride : args.kv_stride;
  const uint32_t t = static_cast<uint32_t>(args.t), tokens = static_cast<uint32_t>(args.batch) * t;
  for (uint32_t token = blockIdx.x; token < tokens; token += gridDim.x) {
    const uint32_t b = token / t, position = token - b * t;
    const int64_t from = token * stride + h * d + j;
    const int64_t to = ((int64_t{b} * heads + h) * t + position) * d + j;
    const float low = load(x, kType, from), high = load(x, kType, from + half);
    if (is_value) {
      store(out, kType, to, low);
      store(out, kType, to + half, high);
      continue;
    }
    const int64_t angle = int64_t{args.cos_batch > 1 ? token : position} * d + j;
    const float low_cos = round_to(kType, low * load(args.cos, kType, angle));
    const float low_sin = round_to(kType, -high * load(args.sin, kType, angle));
    const float high_cos = round_to(kType, high * load(args.cos, kType, angle + half));
    const float high_sin = round_to(kType, low * load(args.sin, kType, angle + half));
    store(out, kType, to, low_cos + low_sin);
    store(out, kType, to + half, high_cos + high_sin);
  }
}

// Number: what is copied at a time; d of them make a head.
template <class Number>
__global__ void __launch_bounds__(kThreads)
    gather_kernel(const Number* x, Number* out, uint32_t tokens, uint32_t t, uint32_t heads,
                  uint32_t d) {
  const uint32_t item = blockIdx.y * kThreads + threadIdx.x, h = item / d, j = item - h * d;
  if (h >= heads) return;
  for (uint32_t token = blockIdx.x; token < tokens; token += gridDim.x) {
    const uint32_t b = token / t, position = token - b * t;
    out[int64_t{token} * heads * d + item] = x[((int64_t{b} * heads + h) * t + position) * d + j];
  }
}

template <class Number>
int gather(const GatherHeads& args, int64_t per_number, void* stream) {
  const int64_t d = args.head_dim / per_number, tokens = args.batch * args.t;
  FQ_LAUNCH((gather_kernel<Number>), grid_for(tokens, args.heads * d), kThreads, 0, stream,
            static_cast<const Number*>(args.x), static_cast<Number*>(args.out),
            static_cast<uint32_t>(tokens), static_cast<uint32_t>(args.t),
            static_cast<uint32_t>(args.heads), static_cast<uint32_t>(d));
  return static_cast<int>(cudaGetLastError());
}

bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

}  // namespace

int turn_heads(const TurnHeads& args, void* stream) {
  const dim3 blocks = grid_for(args.batch * args.t, heads_of(args) * (args.head_dim / 2));
  const auto kernel = args.dtype == Dtype::kFloat32    ? turn_kernel<Dtype::kFloat32>
                      : args.dtype == Dtype::kBFloat16 ? turn_kernel<Dtype::kBFloat16>
                                                       : turn_kernel<Dtype::kFloat16>;
  FQ_LAUNCH(kernel, blocks, kThreads, 0, stream, args);
  return static_cast<int>(cudaGetLastError());
}

int gather_heads(const GatherHeads& args, void* stream) {
  const int64_t unit = size_of(args.dtype);
  if (args.head_dim * unit % 16 == 0 && aligned(args.x) && aligned(args.out))
    return gather<uint4>(args, 16 / unit, stream);
  return unit == 4 ? gather<uint32_t>(args, 1, stream) : gather<uint16_t>(args, 1, stream);
}

}  // namespace fq::cuda
