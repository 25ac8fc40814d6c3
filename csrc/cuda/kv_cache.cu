// kv_dequantize: rows of a KV cache as floats, round((q - z) * s).
//
// Bound by memory: (bits / 8 + size of T) head_dim + 5 bytes a row. A thread has eight codes of
// each of kInFlight rows under way; warps read and write whole lines.
#include <type_traits>

#include "kv_cache.cuh"

namespace fq::cuda {
namespace {

constexpr int kDequantizeThreads = 256;
constexpr int kInFlight = 4;  // vectors of a thread

// Row of the cache that row `position` of a head's answer comes from; -1: a block that does not
// exist, -2: past the sequence's length.
template <class Int>
__device__ __forceinline__ int64_t source(const KvDequantize& args, Int head, int64_t position) {
  if (!args.lengths && !args.block_table) return head * args.capacity + position;
  const Int heads = static_cast<Int>(args.kv_heads), b = head / heads, h = head - b * heads;
  if (args.lengths && position >= args.lengths[b]) return -2;
  if (!args.block_table) return head * args.capacity + position;
  const uint32_t size = static_cast<uint32_t>(args.capacity);
  const uint32_t index = static_cast<uint32_t>(position) / size;
  const int32_t block = args.block_table[b * args.max_blocks + index];
  if (block < 0 || block >= args.blocks) return -1;
  return (block * args.kv_heads + h) * args.capacity + (position - int64_t{index} * size);
}

// A thread has one vector of eight codes in each of kInFlight rows.
template <int kField>
__device__ __forceinline__ void dequantize_rows(const KvDequantize& args) {
  using Word = std::conditional_t<kField == 8, uint2, uint32_t>;
  const int vectors = static_cast<int>(args.head_dim) / 8, rows = kDequantizeThreads / vectors;
  const int vector = threadIdx.x % vectors, row = threadIdx.x / vectors;
  if (row >= rows) return;
  const int64_t tile = int64_t{rows} * kInFlight, tiles = (args.length + tile - 1) / tile;
  const int64_t bytes = args.head_dim * kField / 8;
  for (uint32_t block = blockIdx.x; block < args.batch_heads * tiles; block += gridDim.x) {
    const uint32_t head = block / static_cast<uint32_t>(tiles);
    const int64_t first = (block - head * tiles) * tile + row;
    Word words[kInFlight];
    float scale[kInFlight];
    int32_t zero[kInFlight];
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) {
      const int64_t position = first + int64_t{j} * rows;
      const int64_t from = position < args.length ? source(args, head, position) : -2;
      words[j] = Word{};
      scale[j] = from == -1 ? quiet_nan() : 0.0f;
      zero[j] = 0;
      if (from < 0) continue;
      const uint8_t* const codes = args.codes + from * bytes + vector * kField;
      if constexpr (kField == 2)
        words[j] = *reinterpret_cast<const uint16_t*>(codes);
      else
        words[j] = load_streaming(reinterpret_cast<const Word*>(codes));
      scale[j] = args.scale[from];
      zero[j] = args.zero[from];
    }
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) {
      const int64_t position = first + int64_t{j} * rows;
      if (position >= args.length) continue;
      float v[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        uint32_t word;
        if constexpr (kField == 8)
          word = (i < 4 ? words[j].x : words[j].y) >> (8 * (i % 4));
        else
          word = words[j] >> (kField * i);
        v[i] = value(static_cast<int32_t>(word & ((1u << kField) - 1)), zero[j], scale[j]);
      }
      const int64_t to = (int64_t{head} * args.length + position) * args.head_dim + 8 * vector;
      if (args.out_dtype == Dtype::kFloat32) {
        float4* const out = reinterpret_cast<float4*>(static_cast<float*>(args.out) + to);
        out[0] = make_float4(v[0], v[1], v[2], v[3]);
        out[1] = make_float4(v[4], v[5], v[6], v[7]);
      } else {
        const bool bf16 = args.out_dtype == Dtype::kBFloat16;
        uint32_t pairs[4];
#pragma unroll
        for (int i = 0; i < 4; ++i)
          pairs[i] = bf16 ? pack2<Dtype::kBFloat16>(v[2 * i], v[2 * i + 1])
                          : pack2<Dtype::kFloat16>(v[2 * i], v[2 * i + 1]);
        *reinterpret_cast<uint4*>(static_cast<uint16_t*>(args.out) + to) =
            make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
      }
    }
  }
}

__global__ void __launch_bounds__(kDequantizeThreads, 3)
    dequantize_kernel(const KvDequantize args) {
  if (args.bits == 2)
    dequantize_rows<2>(args);
  else if (args.bits <= 4)
    dequantize_rows<4>(args);
  else
    dequantize_rows<8>(args);
}

__global__ void __launch_bounds__(kPlainThreads) dequantize_plain_kernel(const KvDequantize args) {
  const int64_t d = args.head_dim, bytes = packed_bytes(d, args.bits);
  for (int64_t r = blockIdx.x; r < args.batch_heads * args.length; r += gridDim.x) {
    const int64_t head = r / args.length;
    const int64_t from = source(args, head, r % args.length);
    const uint8_t* const codes = args.codes + from * bytes;
    const float scale = from >= 0 ? args.scale[from] : from == -1 ? quiet_nan() : 0.0f;
    const int32_t zero = from >= 0 ? args.zero[from] : 0;
    for (int64_t i = threadIdx.x; i < d; i += kPlainThreads) {
      const int32_t code = from < 0         ? 0
                           : args.bits == 2 ? crumb(codes[i / 4], i)
                           : args.bits <= 4 ? nibble(codes[i / 2], i)
                                            : codes[i];
      store(args.out, args.out_dtype, r * d + i, value(code, zero, scale));
    }
  }
}

}  // namespace

int kv_dequantize(const KvDequantize& args, void* /*workspace*/, void* stream) {
  const int64_t vectors = args.head_dim / 8;
  const int64_t rows = args.batch_heads * args.length;
  const bool fast = args.head_dim % 8 == 0 && vectors <= kDequantizeThreads && rows < kMost32 &&
                    is_aligned(args.codes, 8) && is_aligned(args.out, 16);
  if (fast) {
    const int64_t tile = kDequantizeThreads / vectors * kInFlight;
    const int64_t blocks = args.batch_heads * ((args.length + tile - 1) / tile);
    FQ_LAUNCH(dequantize_kernel, blocks_for(blocks, 1), unsigned{kDequantizeThreads}, 0, stream,
              args);
  } else {
    FQ_LAUNCH(dequantize_plain_kernel, blocks_for(rows, 1), unsigned{kPlainThreads}, 0, stream,
              args);
  }
  return static_cast<int>(cudaGetLastError());
}

}  // namespace fq::cuda
