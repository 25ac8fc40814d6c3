// Rotary position embedding for one instruction set. A body; needs row_body.h before it.

// One row: x, cos, sin and out begin at these elements. Both halves in one loop, which the compiler
// makes vectors of.
template <Dtype kType>
inline void rope_row(const void* x, int64_t from, const void* cos, const void* sin, int64_t angle,
                     int64_t half, float* low, float* high) {
  for (int64_t j = 0; j < half; ++j) {
    const float a = load(x, kType, from + j), b = load(x, kType, from + half + j);
    const float a_cos = round_to(kType, a * load(cos, kType, angle + j));
    const float b_sin = round_to(kType, -b * load(sin, kType, angle + j));
    const float b_cos = round_to(kType, b * load(cos, kType, angle + half + j));
    const float a_sin = round_to(kType, a * load(sin, kType, angle + half + j));
    low[j] = a_cos + b_sin;
    high[j] = b_cos + a_sin;
  }
}

inline void rope_rows(const Rope& args, int64_t begin, int64_t end, float* work) {
  const int64_t d = args.head_dim;
  const auto run = args.dtype == Dtype::kFloat32    ? &rope_row<Dtype::kFloat32>
                   : args.dtype == Dtype::kBFloat16 ? &rope_row<Dtype::kBFloat16>
                                                    : &rope_row<Dtype::kFloat16>;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t i = row % args.t, h = row / args.t % args.heads, b = row / args.t / args.heads;
    const int64_t token = b * args.t + i;
    const int64_t angle = (args.cos_batch > 1 ? token : i) * d;
    run(args.x, (token * args.heads + h) * d, args.cos, args.sin, angle, d / 2, work, work + d / 2);
    narrow_row(work, args.dtype, row * d, d, args.out);
  }
}
