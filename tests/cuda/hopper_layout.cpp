// The Hopper GEMMs of csrc/cuda/cutlass_sm90.cuh without a GPU, for test_hopper_layout.py: for
// every thread of every tile, the real code between shared memory and wgmma, and the real epilogue;
// both are plain C++ to a host compiler. In between stands wgmma as the PTX ISA defines its
// fragments; around it, loops for the copy engine. What this cannot see: the copy engine, operands
// that wgmma takes from shared memory, barriers.
#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

// What nvcc declares and these headers name; most of it is never called here.
static uint3 threadIdx, blockIdx;
static dim3 blockDim, gridDim;
static void __syncthreads() {}
static void __syncwarp(unsigned = 0) {}
static void __threadfence() {}
static int __syncthreads_and(int x) { return x; }
static int __dp4a(int, int, int) { return 0; }
template <class T>
static T __reduce_max_sync(unsigned, T x) {
  return x;
}
template <class T>
static T __shfl_xor_sync(unsigned, T x, int) {
  return x;
}
static unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const uint64_t bytes = uint64_t{b} << 32 | a;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i)
    result |= static_cast<unsigned>(bytes >> (8 * (selector >> 4 * i & 7)) & 255) << 8 * i;
  return result;
}
extern "C" cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
namespace cutlass::arch {
inline int SmId() { return 0; }
inline int LaneId() { return 0; }
}  // namespace cutlass::arch

#include "../../csrc/cuda/cutlass_sm90.cuh"

namespace fq::cuda {

const Gpu& current_gpu() { return kGpus[6]; }  // H100

namespace sm90 {
namespace {

int failures = 0;

void expect(bool ok, const char* what, int64_t a, int64_t b) {
  if (!ok && ++failures < 20) std::printf("%s: %lld %lld\n", what, (long long)a, (long long)b);
}

struct Case {
  int m, n, k;
  Dtype out_dtype, bias_dtype;
  bool bias, residual;
};

struct Data {
  std::vector<uint8_t> a, w;
  std::vector<int> weights;  // [n, k], not packed
  std::vector<float> a_scale, w_scale, bias;
  std::vector<uint16_t> residual, out;
  GemmInteger args;

  Data(const Case& c, bool mixed) : args{} {
    std::mt19937 random(c.m * 31 + c.n);
    const auto draw = [&](int low, int high) {
      return std::uniform_int_distribution<int>(low, high)(random);
    };
    a.resize(c.m * c.k);
    for (uint8_t& x : a) x = static_cast<uint8_t>(draw(-128, 127));
    weights.resize(c.n * c.k);
    for (int& x : weights) x = mixed ? draw(-8, 7) : draw(-128, 127);
    for (size_t i = 0; i < weights.size(); i += mixed ? 2 : 1)
      w.push_back(mixed ? pack_nibbles(weights[i], weights[i + 1]) : weights[i]);
    for (int i = 0; i < c.m; ++i) a_scale.push_back(draw(1, 1000) * 1e-5f);
    for (int i = 0; i < c.n; ++i) w_scale.push_back(draw(1, 1000) * 1e-5f);
    bias.resize(c.n);
    for (int i = 0; i < c.n; ++i) store(bias.data(), c.bias_dtype, i, draw(-999, 999) * 1e-3f);
    residual.resize(c.m * c.n);
    for (int i = 0; i < c.m * c.n; ++i)
      store(residual.data(), c.out_dtype, i, draw(-999, 999) * 1e-3f);
    out.resize(c.m * c.n);
    args.a = a.data(), args.a_scale = a_scale.data();
    args.w = w.data(), args.w_scale = w_scale.data();
    args.bias = c.bias ? bias.data() : nullptr;
    args.residual = c.residual ? residual.data() : nullptr;
    args.out = out.data();
    args.m = c.m, args.n = c.n, args.k = c.k;
    args.bias_dtype = c.bias_dtype, args.out_dtype = c.out_dtype;
  }
};

// A tile of weights as wgmma gets it, 16 times too large: [features, depth], from k on.
template <class G>
void fragments(const Data& d, int feature, int k, std::vector<int>& tile) {
  using namespace cute;
  using Mainloop = typename G::Mainloop;
  using Utils = cutlass::gemm::collective::detail::MixedInputUtils<Mainloop>;
  constexpr int kFeatures = size<0>(typename G::Tile{}), kDepth = size<2>(typename G::Tile{});
  alignas(1024) static ArrayEngine<Nibble, cosize_v<typename Mainloop::SmemLayoutA>> memory;
  Tensor slice = make_tensor(make_smem_ptr(memory.begin()), typename Mainloop::SmemLayoutA{});

  const int row_bytes = static_cast<int>(d.args.k / 2);
  Tensor bytes = recast<uint8_t>(slice);  // what the copy engine sees; zeros past the edges
  for (int i = 0; i < kFeatures; ++i)
    for (int j = 0; j < kDepth / 2; ++j) {
      const bool inside = feature + i < d.args.n && k / 2 + j < row_bytes;
      bytes(i, j, 0) = inside ? d.w[(feature + i) * row_bytes + k / 2 + j] : 0;
    }

  typename Mainloop::TiledMma mma;
  std::fill(tile.begin(), tile.end(), 1 << 20);
  for (int thread = 0; thread < G::kThreads; ++thread) {
    auto of_thread = mma.get_thread_slice(thread);
    Tensor source = of_thread.partition_A(slice);
    Tensor operand = of_thread.partition_fragment_A(slice(_, _, Int<0>{}));
    Tensor packed = make_fragment_like<Nibble>(operand);
    auto copier = make_tiled_copy_A(typename Mainloop::SmemCopyAtomA{}, mma);
    Tensor target = copier.get_thread_slice(thread % 128).retile_D(packed);
    auto none = make_tuple();
    const int lane = thread % 32, top = thread / 32 * 16 + lane / 4;
    for (int step = 0; step < kDepth / 32; ++step) {
      Utils::copy_tensors_MK(copier, source, target, none, none, step, 0);
      Utils::dequantize_A_kblock(packed, operand, none, step);
      for (int v = 0; v < 16; ++v) {  // PTX ISA, wgmma.m64nNk32, matrix A in registers
        const int row = top + v / 4 % 2 * 8, column = lane % 4 * 4 + v % 4 + v / 8 * 16;
        tile[row * kDepth + step * 32 + column] = operand(_, _, step)(v);
      }
    }
  }
}

// The sums of a tile, 2^kShift times too large: [features, tokens].
template <class G>
std::vector<int32_t> multiply(const Data& d, int feature, int token) {
  using namespace cute;
  constexpr int kFeatures = size<0>(typename G::Tile{}), kTokens = size<1>(typename G::Tile{});
  constexpr int kDepth = size<2>(typename G::Tile{});
  const int m = static_cast<int>(d.args.m), n = static_cast<int>(d.args.n);
  const int k = static_cast<int>(d.args.k);
  std::vector<int32_t> sums(kFeatures * kTokens);
  std::vector<int> tile(kFeatures * kDepth);
  for (int first = 0; first < k; first += kDepth) {
    if constexpr (G::kMixed) {
      fragments<G>(d, feature, first, tile);
    } else {
      for (int i = 0; i < kFeatures * kDepth; ++i) {
        const int row = feature + i / kDepth, column = first + i % kDepth;
        tile[i] = row < n && column < k ? d.weights[row * k + column] : 0;
      }
    }
    for (int i = 0; i < kFeatures; ++i)
      for (int j = 0; j < kDepth; ++j) {
        const bool inside = feature + i < n && first + j < k;
        const int weight = inside ? d.weights[(feature + i) * k + first + j] << G::kShift : 0;
        expect(tile[i * kDepth + j] == weight, "weight", i, j);
      }
    for (int t = 0; t < kTokens && token + t < m; ++t)
      for (int j = 0; j < kDepth && first + j < k; ++j) {
        const int8_t code = static_cast<int8_t>(d.a[(token + t) * k + first + j]);
        for (int i = 0; i < kFeatures; ++i) sums[i * kTokens + t] += tile[i * kDepth + j] * code;
      }
  }
  return sums;
}

// One thread's part of the epilogue of a tile; twice, because its first half stages the scales.
template <class G, class Node>
void epilogue(Data& d, Node& node, const std::vector<int32_t>& sums, int tile_m, int tile_n,
              int thread, bool stage, std::vector<int>& written) {
  using namespace cute;
  using Epilogue = typename G::Epilogue;
  using EpilogueTile = typename Epilogue::EpilogueTile;
  constexpr int kTokens = size<1>(typename G::Tile{});
  const int m = static_cast<int>(d.args.m), n = static_cast<int>(d.args.n);
  typename G::Mainloop::TiledMma mma;

  // PTX ISA, wgmma.m64nN, matrix D.
  Tensor accumulators = partition_fragment_C(mma, take<0, 2>(typename G::Tile{}));
  const int lane = thread % 32, top = thread / 32 * 16 + lane / 4;
  for (int v = 0; v < size(accumulators); ++v)
    accumulators(v) = sums[(top + v / 2 % 2 * 8) * kTokens + lane % 4 * 2 + v % 2 + v / 4 * 8];

  // From here on as CollectiveEpilogue::store.
  auto atom = make_tiled_copy_C_atom(typename Epilogue::CopyAtomC{}, mma);
  auto to_shared = make_tiled_copy_S(Copy_Atom<typename Epilogue::CopyOpR2S, uint16_t>{}, atom);
  auto of_thread = to_shared.get_slice(thread);
  Tensor retiled = of_thread.retile_S(accumulators);
  Tensor everywhere = make_identity_tensor(make_shape(n, m));
  Tensor tile = local_tile(everywhere, take<0, 2>(typename G::Tile{}), make_coord(tile_n, tile_m));
  Tensor places = of_thread.partition_S(flat_divide(tile, EpilogueTile{}));
  Tensor relative_tile = make_coord_tensor(tile.layout());
  Tensor relative = make_coord_tensor(places.layout());
  const auto shape = make_layout(take<0, 3>(places.shape()));
  Tensor residual = make_tensor<uint16_t>(shape);
  constexpr int kFragment = Epilogue::DispatchPolicy::FragmentSize;
  Tensor fragments = recast<cutlass::Array<int32_t, kFragment>>(retiled);

  auto callbacks = node.template get_consumer_store_callbacks<true>(
      cutlass::epilogue::fusion::detail::ConsumerStoreArgs(
          make_shape(n, m, static_cast<int>(d.args.k), 1), typename G::Tile{},
          make_coord(tile_n, tile_m, _, 0), mma, EpilogueTile{}, to_shared, relative_tile,
          make_coord(n, m) - tile(_0{}), relative, make_coord(n, m) - places(_0{}), residual,
          thread));
  if (stage) return callbacks.begin();

  const auto args = G::arguments(d.args);
  const auto out_layout = make_layout(make_shape(n, m, 1), args.epilogue.dD);
  uint16_t* const out = const_cast<uint16_t*>(args.epilogue.ptr_D);
  for (int epilogue_n = 0; epilogue_n < size<4>(places); ++epilogue_n) {
    static_assert(size<3>(decltype(places){}) == 1, "one epilogue tile spans all features");
    callbacks.begin_loop(0, epilogue_n);
    for (int e = 0; e < size(residual); ++e) {
      const auto place = places(_, _, _, 0, epilogue_n)(e);
      const int feature = get<0>(place), token = get<1>(place);
      residual(e) =
          feature < n && token < m ? args.epilogue.ptr_C[out_layout(feature, token, 0)] : 0x7fff;
    }
    for (int v = 0; v < size(residual) / kFragment; ++v) {
      const int in_mma = epilogue_n * static_cast<int>(size(residual)) / kFragment + v;
      const auto made = callbacks.visit(fragments(_, 0, 0)(in_mma), v, 0, epilogue_n);
      for (int i = 0; i < kFragment; ++i) {
        const auto place = places(_, _, _, 0, epilogue_n)(v * kFragment + i);
        const int feature = get<0>(place), token = get<1>(place);
        if (feature >= n || token >= m) continue;
        out[out_layout(feature, token, 0)] = made[i];
        ++written[token * n + feature];
      }
    }
  }
}

template <class G>
void check(const Case& c) {
  using namespace cute;
  Data d(c, G::kMixed);
  constexpr int kFeatures = size<0>(typename G::Tile{}), kTokens = size<1>(typename G::Tile{});
  expect(refuse(d.args, G::kShift) == 0, "refused", c.m, c.n);
  const auto args = G::arguments(d.args);
  expect(G::Kernel::can_implement(args), "cannot implement", c.m, c.n);
  expect(G::Kernel::get_workspace_size(args) == 0, "workspace", c.m, c.n);
  const auto w_layout = make_layout(make_shape(c.n, c.k, 1), args.mainloop.dA);
  const auto a_layout = make_layout(make_shape(c.m, c.k, 1), args.mainloop.dB);
  expect(w_layout(c.n - 1, 5, 0) == int64_t{c.n - 1} * c.k + 5, "layout of w", c.n, c.k);
  expect(a_layout(c.m - 1, 5, 0) == int64_t{c.m - 1} * c.k + 5, "layout of a", c.m, c.k);

  using Node = typename G::Epilogue::FusionCallbacks;
  typename Node::SharedStorage shared;
  std::memset(&shared, 0xff, sizeof shared);
  const Scales scales = args.epilogue.thread;
  std::vector<int> written(c.m * c.n);
  for (int tile_m = 0; tile_m * kTokens < c.m; ++tile_m)
    for (int tile_n = 0; tile_n * kFeatures < c.n; ++tile_n) {
      const auto sums = multiply<G>(d, tile_n * kFeatures, tile_m * kTokens);
      for (const bool stage : {true, false})
        for (int thread = 0; thread < G::kThreads; ++thread) {
          Node node(scales, shared);
          epilogue<G>(d, node, sums, tile_m, tile_n, thread, stage, written);
        }
    }

  for (int i = 0; i < c.m; ++i)
    for (int j = 0; j < c.n; ++j) {
      int32_t sum = 0;
      for (int k = 0; k < c.k; ++k)
        sum += static_cast<int8_t>(d.a[i * c.k + k]) * d.weights[j * c.k + k];
      float y = scaled(sum, d.a_scale[i], d.w_scale[j]);
      if (c.bias) y = y + load(d.bias.data(), c.bias_dtype, j);
      y = round_to(c.out_dtype, y);
      if (c.residual)
        y = round_to(c.out_dtype, load(d.residual.data(), c.out_dtype, i * c.n + j) + y);
      uint16_t bits = 0;
      store(&bits, c.out_dtype, 0, y);
      expect(written[i * c.n + j] == 1, "written", i, j);
      expect(d.out[i * c.n + j] == bits, "output", i, j);
    }
}

template <class G>
void check_tile(const char* name) {
  using namespace cute;
  constexpr int kFeatures = size<0>(typename G::Tile{}), kTokens = size<1>(typename G::Tile{});
  constexpr int kDepth = size<2>(typename G::Tile{});
  const int before = failures;
  using D = Dtype;
  check<G>({1, 8, 32, D::kBFloat16, D::kFloat32, false, false});
  check<G>({kTokens + 3, kFeatures + 8, kDepth + 32, D::kFloat16, D::kBFloat16, true, true});
  check<G>({5, kFeatures - 8, kDepth, D::kBFloat16, D::kFloat16, true, true});
  check<G>({kTokens, 16, 64, D::kFloat16, D::kFloat32, true, false});
  std::printf("%s %s %d bytes\n", failures == before ? "ok" : "FAILED", name, G::kSharedBytes);
}

void check_refusals() {
  Data d({4, 8, 32, Dtype::kBFloat16, Dtype::kFloat32, false, false}, true);
  const auto refused = [&](auto change, int64_t which) {
    GemmInteger args = d.args;
    change(args);
    expect(refuse(args, 4) != 0, "not refused", which, 0);
  };
  const int32_t zero = 0;
  refused([&](GemmInteger& g) { g.a_zero = &zero; }, 0);
  refused([&](GemmInteger& g) { g.a += 8; }, 1);
  refused([&](GemmInteger& g) { g.residual = d.residual.data() + 1; }, 2);
  refused([&](GemmInteger& g) { g.k = 48; }, 3);
  refused([&](GemmInteger& g) { g.n = 12; }, 4);
  refused([&](GemmInteger& g) { g.m = 0; }, 5);
  refused([&](GemmInteger& g) { g.k = 131072; }, 6);
  refused([&](GemmInteger& g) { g.out_dtype = Dtype::kFloat32; }, 7);
  refused([&](GemmInteger& g) { g.m = int64_t{1} << 31; }, 8);
}

}  // namespace
}  // namespace sm90
}  // namespace fq::cuda

int main() {
  using namespace fq::cuda::sm90;
  check_refusals();
  check_tile<Mixed256x128>("Mixed256x128");
  check_tile<Mixed128x128>("Mixed128x128");
  check_tile<Mixed64x64>("Mixed64x64");
  check_tile<Mixed16x64>("Mixed16x64");
  check_tile<Bytes256x128>("Bytes256x128");
  check_tile<Bytes128x128>("Bytes128x128");
  return failures != 0;
}
