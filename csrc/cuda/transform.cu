// kronecker and kronecker_quantize: which kernel, with what plan (plan_transform.h).
#include "transform.h"

#include "launch.cuh"

namespace fq::cuda {
namespace {

bool aligned(const void* data, uintptr_t bytes) {
  return reinterpret_cast<uintptr_t>(data) % bytes == 0;
}

int run(const TransformArgs& args, void* stream) {
  const Gpu& gpu = current_gpu();
  if (gpu.arch == 0) return static_cast<int>(cudaErrorNoDevice);
  const TransformPlan plan = plan_transform(gpu, query_of(args));
  if (plan.path == TransformPath::kGeneral) return transform_general(args, stream);
  return args.quantize.dtype == Dtype::kBFloat16 ? transform_bf16(args, plan, stream)
                                                 : transform_fp16(args, plan, stream);
}

}  // namespace

TransformQuery query_of(const TransformArgs& args) {
  const KroneckerQuantize& q = args.quantize;
  const Transform& t = q.transform;
  TransformQuery query{};
  query.rows = q.rows;
  query.n1 = t.n1;
  query.n2 = t.n2;
  query.dtype = q.dtype;
  query.left = t.left != nullptr;
  query.right = t.right != nullptr;
  query.vectors = aligned(q.x, 16) && aligned(q.gate, 16) && aligned(q.codes, 16) &&
                  aligned(t.channel_scale, 16) && aligned(args.out, 16) &&
                  (q.stride == q.k || q.stride % 8 == 0) &&
                  (args.out_dtype == Dtype::kFloat32 || args.out_dtype == q.dtype);
  query.left_vectors = t.left_dtype == Dtype::kFloat32 && t.n1 % 2 == 0 && aligned(t.left, 8);
  query.right_vectors = t.right_dtype == Dtype::kFloat32 && t.n2 % 2 == 0 && aligned(t.right, 8);
  const bool floats = (!t.left || t.left_dtype == Dtype::kFloat32) &&
                      (!t.right || t.right_dtype == Dtype::kFloat32);
  query.factors_are_floats = floats && q.dtype == Dtype::kFloat32;
  return query;
}

int kronecker_quantize(const KroneckerQuantize& args, void* /*workspace*/, void* stream) {
  TransformArgs a{args, nullptr, args.dtype};
  if (args.stride == 0) a.quantize.stride = args.k;
  return run(a, stream);
}

int kronecker(const Kronecker& args, void* /*workspace*/, void* stream) {
  TransformArgs a{};
  a.quantize.x = args.x;
  a.quantize.transform = args.transform;
  a.quantize.rows = args.rows;
  a.quantize.k = a.quantize.stride = args.k;
  a.quantize.dtype = args.dtype;
  a.out = args.out;
  a.out_dtype = args.out_dtype;
  const Transform& t = args.transform;
  if (t.left || !t.right || t.channel_scale) return run(a, stream);

  // Only a right factor: every row of every X is on its own, so X may be cut anywhere. 64 rows are
  // a good size for the kernels.
  const int64_t total = args.rows * t.n1, height = total < 64 ? total : 64;
  const int64_t row_out = t.n2 * size_of(args.out_dtype), row_in = t.n2 * size_of(args.dtype);
  for (int64_t first = 0; first < total;) {
    const int64_t left = total - first;
    const int64_t n1 = left < height ? left : height, rows = left / n1;
    a.quantize.x = static_cast<const uint8_t*>(args.x) + first * row_in;
    a.out = static_cast<uint8_t*>(args.out) + first * row_out;
    a.quantize.transform.n1 = n1;
    a.quantize.rows = rows;
    a.quantize.k = a.quantize.stride = n1 * t.n2;
    const int error = run(a, stream);
    if (error != 0) return error;
    first += rows * n1;
  }
  return 0;
}

}  // namespace fq::cuda
