// Hopper's integer GEMMs from CUTLASS 3: what the files gemm_*_cutlass_sm90.cu instantiate, one
// tile each, because one takes half a minute to compile.
//
// The product is transposed: out^T [n, m] = W [n, k] X^T [k, m], because wgmma takes only its
// operand A from registers, and that is where packed weights widen. So CUTLASS' M is our n, the
// output features; its N is our m, the tokens; out and the residual are column-major to it.
//
// A weight's four bits become the upper half of a byte, which makes the number 16 times too large:
// the sums are exactly 16 acc, and the epilogue shifts them back. That takes 5 instructions for 8
// weights, against 13 for widening with the sign, and keeps k in its order.
//
// One kernel serves both output types and every option. They are flags in its arguments, which only
// the epilogue reads.
#pragma once

#include <cutlass/cutlass.h>
// CUTLASS' other headers need the one above first.
#include <cutlass/device_kernel.h>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/epilogue/dispatch_policy.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>

#include <cstring>
#include <initializer_list>

#include "cutlass_sm90.h"
#include "launch.cuh"

namespace fq::cuda::sm90 {

// A packed weight: a signed nibble that widens to 16 times its value.
struct Nibble : cutlass::int4b_t {
  using cutlass::int4b_t::int4b_t;
};

}  // namespace fq::cuda::sm90

namespace cutlass {

template <>
struct sizeof_bits<fq::cuda::sm90::Nibble> : sizeof_bits<int4b_t> {};

template <FloatRoundStyle kRound>
struct NumericArrayConverter<int8_t, fq::cuda::sm90::Nibble, 8, kRound> {
  using source_type = Array<fq::cuda::sm90::Nibble, 8>;
  using result_type = Array<int8_t, 8>;

  CUTLASS_DEVICE static result_type convert(const source_type& source) {
    const uint32_t nibbles = reinterpret_cast<const uint32_t&>(source);
    const uint32_t even = (nibbles << 4) & 0xf0f0f0f0u;
    const uint32_t odd = nibbles & 0xf0f0f0f0u;
    Array<uint32_t, 2> bytes;
    bytes[0] = __byte_perm(even, odd, 0x5140);
    bytes[1] = __byte_perm(even, odd, 0x7362);
    return reinterpret_cast<const result_type&>(bytes);
  }
};

}  // namespace cutlass

namespace fq::cuda::sm90 {

// What the epilogue needs beside the sums.
struct Scales {
  const float* token_scale;
  const float* feature_scale;
  const void* bias;
  Dtype bias_dtype, out_dtype;
  bool residual;
};

// The epilogue, as a node of CUTLASS' visitor tree that is a whole tree: from a fragment of sums,
// and of the residual, to a fragment of 16-bit outputs. Scales and bias of the block's tile are
// staged in shared memory, where every thread finds those of its elements.
template <int kFeatures, int kTokens, int kThreads, int kShift>
struct Dequantize {
  static_assert(kFeatures <= kThreads && kTokens <= kThreads, "one thread stages one of each");

  struct SharedStorage {
    alignas(16) float token_scale[kTokens];
    alignas(16) float feature_scale[kFeatures];
    alignas(16) float bias[kFeatures];
  };
  using Arguments = Scales;
  using Params = Scales;

  template <class Problem>
  static constexpr Params to_underlying_arguments(const Problem&, const Arguments& args, void*) {
    return args;
  }
  template <class Problem>
  static bool can_implement(const Problem&, const Arguments&) {
    return true;
  }
  template <class Problem>
  static size_t get_workspace_size(const Problem&, const Arguments&) {
    return 0;
  }
  template <class Problem>
  static cutlass::Status initialize_workspace(const Problem&, const Arguments&, void*, cudaStream_t,
                                              cutlass::CudaHostAdapter*) {
    return cutlass::Status::kSuccess;
  }

  CUTLASS_HOST_DEVICE Dequantize() {}
  CUTLASS_HOST_DEVICE Dequantize(const Params& params, const SharedStorage& shared)
      : params_(&params), shared_(const_cast<SharedStorage*>(&shared)) {}

  CUTLASS_DEVICE bool is_producer_load_needed() const { return params_->residual; }
  CUTLASS_DEVICE bool is_C_load_needed() const { return params_->residual; }

  template <class... Args>
  CUTLASS_DEVICE auto get_producer_load_callbacks(
      const cutlass::epilogue::fusion::detail::ProducerLoadArgs<Args...>&) {
    return cutlass::epilogue::fusion::EmptyProducerLoadCallbacks{};
  }

  // Tokens, Features: shared vectors seen as (features, tokens) with a stride of 0, cut to this
  // thread's elements: (copy, copy_m, copy_n, epilogue_m, epilogue_n). Residual: its registers.
  template <class Tokens, class Features, class Residual>
  struct Callbacks : cutlass::epilogue::fusion::EmptyConsumerStoreCallbacks {
    using TokenRegisters =
        decltype(cute::make_tensor_like<float>(cute::take<0, 3>(std::declval<Tokens>())));
    using FeatureRegisters =
        decltype(cute::make_tensor_like<float>(cute::take<0, 3>(std::declval<Features>())));

    const Params& params;
    SharedStorage& shared;
    int thread, token, feature, tokens, features;
    Tokens token_scales;
    Features feature_scales, biases;
    const Residual& residual;
    TokenRegisters token_scale;
    FeatureRegisters feature_scale, bias;

    CUTLASS_DEVICE Callbacks(const Params& params, SharedStorage& shared, int thread, int token,
                             int feature, int tokens, int features, Tokens token_scales,
                             Features feature_scales, Features biases, const Residual& residual)
        : params(params),
          shared(shared),
          thread(thread),
          token(token),
          feature(feature),
          tokens(tokens),
          features(features),
          token_scales(token_scales),
          feature_scales(feature_scales),
          biases(biases),
          residual(residual),
          token_scale(cute::make_tensor_like<float>(cute::take<0, 3>(token_scales))),
          feature_scale(cute::make_tensor_like<float>(cute::take<0, 3>(feature_scales))),
          bias(cute::make_tensor_like<float>(cute::take<0, 3>(biases))) {}

    // Once per tile. Elements past the edge compute with zeros and are not stored. y + -0 is y,
    // also for y = -0: no bias needs no branch.
    CUTLASS_DEVICE void begin() {
      float t = 0.0f, f = 0.0f, b = -0.0f;
      if (thread < kTokens && token + thread < tokens) t = params.token_scale[token + thread];
      if (thread < kFeatures && feature + thread < features) {
        f = params.feature_scale[feature + thread];
        if (params.bias != nullptr) b = load(params.bias, params.bias_dtype, feature + thread);
      }
      // In a block with a single tile this was the main loop's memory: wait for its last warp.
      cutlass::arch::NamedBarrier::sync(kThreads,
                                        cutlass::arch::ReservedNamedBarriers::EpilogueBarrier);
      if (thread < kTokens) shared.token_scale[thread] = t;
      if (thread < kFeatures) {
        shared.feature_scale[thread] = f;
        shared.bias[thread] = b;
      }
    }

    CUTLASS_DEVICE bool begin_sync_needed() const { return true; }

    CUTLASS_DEVICE void begin_loop(int epilogue_m, int epilogue_n) {
      fetch(token_scales(cute::_, cute::_, cute::_, epilogue_m, epilogue_n), token_scale);
      fetch(feature_scales(cute::_, cute::_, cute::_, epilogue_m, epilogue_n), feature_scale);
      fetch(biases(cute::_, cute::_, cute::_, epilogue_m, epilogue_n), bias);
    }

    template <class Shared, class Registers>
    CUTLASS_DEVICE static void fetch(const Shared& source, Registers& registers) {
      auto from = cute::filter_zeros(source);
      auto to = cute::filter_zeros(registers);
      cute::copy_aligned(from, to);
    }

    template <class Accumulator, int kSize>
    CUTLASS_DEVICE cutlass::Array<uint16_t, kSize> visit(
        const cutlass::Array<Accumulator, kSize>& sums, int fragment, int, int) {
      cutlass::Array<float, kSize> y;
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kSize; ++i) {
        const int e = fragment * kSize + i;
        y[i] = scaled(sums[i] >> kShift, token_scale(e), feature_scale(e)) + bias(e);
      }
      return params.out_dtype == Dtype::kBFloat16 ? narrow<cutlass::bfloat16_t>(y, fragment)
                                                  : narrow<cutlass::half_t>(y, fragment);
    }

    // round_T(y), and round_T(residual + that).
    template <class T, int kSize>
    CUTLASS_DEVICE cutlass::Array<uint16_t, kSize> narrow(const cutlass::Array<float, kSize>& y,
                                                          int fragment) {
      using Narrow = cutlass::NumericArrayConverter<T, float, kSize>;
      using Widen = cutlass::NumericArrayConverter<float, T, kSize>;
      cutlass::Array<T, kSize> out = Narrow::convert(y);
      if (params.residual) {
        cutlass::Array<T, kSize> old;
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < kSize; ++i) old[i] = T::bitcast(residual(fragment * kSize + i));
        cutlass::Array<float, kSize> sum = Widen::convert(out);
        const cutlass::Array<float, kSize> wide = Widen::convert(old);
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < kSize; ++i) sum[i] = wide[i] + sum[i];
        out = Narrow::convert(sum);
      }
      return reinterpret_cast<const cutlass::Array<uint16_t, kSize>&>(out);
    }
  };

  template <bool kReferenceSource, class... Args>
  CUTLASS_DEVICE auto get_consumer_store_callbacks(
      const cutlass::epilogue::fusion::detail::ConsumerStoreArgs<Args...>& args) {
    using namespace cute;
    const auto tile = make_shape(Int<kFeatures>{}, Int<kTokens>{});
    const auto across_tokens = make_layout(tile, make_stride(_1{}, _0{}));
    const auto across_features = make_layout(tile, make_stride(_0{}, _1{}));
    auto of_thread = [&](const float* vector, auto layout) {
      return cutlass::epilogue::fusion::sm90_partition_for_epilogue<kReferenceSource>(
          make_tensor(make_smem_ptr(vector), layout), args.epi_tile, args.tiled_copy,
          args.thread_idx);
    };
    auto token_scales = of_thread(shared_->token_scale, across_features);
    auto feature_scales = of_thread(shared_->feature_scale, across_tokens);
    auto biases = of_thread(shared_->bias, across_tokens);
    const int feature = get<0>(args.tile_coord_mnkl) * kFeatures;
    const int token = get<1>(args.tile_coord_mnkl) * kTokens;
    const int features = get<0>(args.problem_shape_mnkl);
    const int tokens = get<1>(args.problem_shape_mnkl);
    using Residual = remove_cvref_t<decltype(args.tCrC)>;
    return Callbacks<decltype(token_scales), decltype(feature_scales), Residual>(
        *params_, *shared_, args.thread_idx, token, feature, tokens, features, token_scales,
        feature_scales, biases, args.tCrC);
  }

 private:
  const Params* params_ = nullptr;
  SharedStorage* shared_ = nullptr;
};

// CUTLASS' two builders ask for the number of slices of k in flight in different words.
template <int kStages>
struct Stages : cutlass::gemm::collective::StageCount<kStages> {
  static constexpr int bytes = kStages;
};

// Weight: Nibble or int8_t. A tile with 128 features is shared by two warpgroups of a persistent
// block; one with 64 has a block of its own with one warpgroup, and several blocks live on a
// multiprocessor. kCluster blocks with neighbouring features read their tokens' codes once.
template <class Weight, int kTokens, int kFeatures, int kDepth, int kStages, int kCluster>
struct Gemm {
  static constexpr bool kPersistent = kFeatures == 128;
  static constexpr int kThreads = kPersistent ? 256 : 128;  // those that multiply
  static constexpr bool kMixed = cutlass::sizeof_bits<Weight>::value == 4;
  static constexpr int kShift = kMixed ? 4 : 0;

  using Tile = cute::Shape<cute::Int<kFeatures>, cute::Int<kTokens>, cute::Int<kDepth>>;
  using Cluster = cute::Shape<cute::Int<kCluster>, cute::_1, cute::_1>;
  using Schedule =
      cute::conditional_t<kPersistent, cutlass::gemm::KernelTmaWarpSpecializedCooperative,
                          cutlass::gemm::KernelTmaWarpSpecialized>;
  using EpilogueSchedule =
      cute::conditional_t<kPersistent, cutlass::epilogue::TmaWarpSpecializedCooperative,
                          cutlass::epilogue::TmaWarpSpecialized>;

  // uint16_t stands for either output type: the epilogue returns bits.
  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, Cluster,
      cutlass::epilogue::collective::EpilogueTileAuto, int32_t, float, uint16_t,
      cutlass::layout::ColumnMajor, 8, uint16_t, cutlass::layout::ColumnMajor, 8, EpilogueSchedule,
      Dequantize<kFeatures, kTokens, kThreads, kShift>>::CollectiveOp;
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Weight, cutlass::layout::RowMajor,
      kMixed ? 32 : 16, int8_t, cutlass::layout::ColumnMajor, 16, int32_t, Tile, Cluster,
      Stages<kStages>, Schedule>::CollectiveOp;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, Mainloop,
                                                      Epilogue, void>;

  static constexpr int kSharedBytes = Kernel::SharedStorageSize;
  static_assert(in_table(kMixed ? GemmKernel::kMixedSm90 : GemmKernel::kBytesSm90,
                         {kTokens, kFeatures, kDepth, kStages}, kSharedBytes),
                "plan_gemm.h has another idea of this tile");

  static typename Kernel::Arguments arguments(const GemmInteger& args) {
    const auto by_row = cute::make_stride(args.k, cute::_1{}, int64_t{0});
    const auto transposed = cute::make_stride(cute::_1{}, args.n, int64_t{0});
    typename Kernel::Arguments a{};
    a.mode = cutlass::gemm::GemmUniversalMode::kGemm;
    a.problem_shape = cute::make_shape(static_cast<int>(args.n), static_cast<int>(args.m),
                                       static_cast<int>(args.k), 1);
    a.mainloop.ptr_A = reinterpret_cast<const typename Mainloop::ElementA*>(args.w);
    a.mainloop.dA = by_row;
    a.mainloop.ptr_B = reinterpret_cast<const int8_t*>(args.a);
    a.mainloop.dB = by_row;
    a.epilogue.thread = {args.a_scale,    args.w_scale,   args.bias,
                         args.bias_dtype, args.out_dtype, args.residual != nullptr};
    // The descriptor of a residual that is never read still has to be a valid one.
    const void* residual = args.residual != nullptr ? args.residual : args.out;
    a.epilogue.ptr_C = static_cast<const uint16_t*>(residual);
    a.epilogue.dC = transposed;
    a.epilogue.ptr_D = static_cast<uint16_t*>(args.out);
    a.epilogue.dD = transposed;
    cudaGetDevice(&a.hw_info.device_id);
    a.hw_info.sm_count = current_gpu().sms;
    return a;
  }

  // Whether the driver made the descriptors: where it refuses, CUTLASS goes on with zeros.
  static bool encoded(const typename Kernel::Params& params) {
    const cute::TmaDescriptor zeros{};
    for (const cute::TmaDescriptor* one : {params.mainloop.tma_load_a.get_tma_descriptor(),
                                           params.mainloop.tma_load_b.get_tma_descriptor(),
                                           params.epilogue.tma_load_c.get_tma_descriptor(),
                                           params.epilogue.tma_store_d.get_tma_descriptor()})
      if (std::memcmp(one, &zeros, sizeof zeros) == 0) return false;
    return true;
  }

  static int run(const GemmInteger& args, void* stream) {
    if (const int error = refuse(args, kShift)) return error;
    const typename Kernel::Arguments a = arguments(args);
    if (!Kernel::can_implement(a) || Kernel::get_workspace_size(a) != 0)
      return cudaErrorNotSupported;
    const auto kernel = cutlass::device_kernel<Kernel>;
    if (const int error = allow_shared(kernel, kSharedBytes)) return error;
    const typename Kernel::Params params = Kernel::to_underlying_arguments(a, nullptr);
    if (!encoded(params)) return cudaErrorUnknown;
    FQ_LAUNCH_CLUSTER(kernel, Kernel::get_grid_shape(params), Kernel::get_block_shape(), kCluster,
                      kSharedBytes, stream, params);
    return cudaGetLastError();
  }
};

// The tiles that are compiled: tokens x features.
using Mixed256x128 = Gemm<Nibble, 256, 128, 128, 4, 2>;  // prefill
using Mixed128x128 = Gemm<Nibble, 128, 128, 128, 6, 2>;  // too few tiles of 256 to fill the GPU
using Mixed64x64 = Gemm<Nibble, 64, 64, 256, 4, 1>;      // two blocks on a multiprocessor
using Mixed16x64 = Gemm<Nibble, 16, 64, 256, 6, 1>;      // decode; three blocks
using Bytes256x128 = Gemm<int8_t, 256, 128, 128, 4, 2>;
using Bytes128x128 = Gemm<int8_t, 128, 128, 128, 6, 2>;

}  // namespace fq::cuda::sm90
