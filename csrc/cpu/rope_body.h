// Rotary position embedding for one instruction set. A body; needs row_body.h before it.

inline void rope_rows(const Rope& args, int64_t begin, int64_t end, float* work) {
  const int64_t d = args.head_dim, half = d / 2;
  float *const x = work, *const cos = x + d, *const sin = cos + d, *const out = sin + d;
  float* const turned = out + d;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t i = row % args.t, h = row / args.t % args.heads, b = row / args.t / args.heads;
    const int64_t token = b * args.t + i;
    const int64_t angle = (args.cos_batch > 1 ? token : i) * d;
    widen_row(args.x, args.dtype, (token * args.heads + h) * d, d, x);
    widen_row(args.cos, args.dtype, angle, d, cos);
    widen_row(args.sin, args.dtype, angle, d, sin);
    for (int64_t j = 0; j < half; ++j) turned[j] = -x[j + half];
    for (int64_t j = 0; j < half; ++j) turned[j + half] = x[j];
    for (int64_t j = 0; j < d; ++j) out[j] = x[j] * cos[j];
    for (int64_t j = 0; j < d; ++j) turned[j] = turned[j] * sin[j];
    round_row(out, args.dtype, d);
    round_row(turned, args.dtype, d);
    for (int64_t j = 0; j < d; ++j) out[j] = out[j] + turned[j];
    narrow_row(out, args.dtype, row * d, d, args.out);
  }
}
