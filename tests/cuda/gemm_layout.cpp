// The layout functions of the hand-written GEMM (csrc/cuda/gemm_mma_slice.cuh) behind plain ones,
// for test_gemm_layout.py: what each thread of a block would compute. Tiles and codes by number.
#include "../../csrc/cuda/gemm_mma_slice.cuh"
#include "../../csrc/cuda/gemm_mma_store.cuh"

#define EXPORT extern "C" __attribute__((visibility("default")))

using namespace fq::cuda;

namespace {

template <class Visit>
void with_codes(int codes, Visit visit) {
  if (codes == 0) visit(MmaCodes<4, 4>{});
  if (codes == 1) visit(MmaCodes<8, 4>{});
  if (codes == 2) visit(MmaCodes<8, 8>{});
}

template <class Visit>
void with_tile(int tile, Visit visit) {
  if (tile == 0) visit(LargeTile{});
  if (tile == 1) visit(MediumTile{});
  if (tile == 2) visit(SmallTile{});
}

template <class Visit>
void with_both(int tile, int codes, Visit visit) {
  with_tile(tile, [&](auto t) { with_codes(codes, [&](auto c) { visit(t, c); }); });
}

template <int kRows, int kRowBytes, int kThreads>
int copies(int thread, int* places) {
  static uint8_t matrix[1];
  const Loader<kRows, kRowBytes, kThreads> loader(matrix, kRows, kRowBytes, 16, 0, thread);
  for (int i = 0; i < loader.kCopies; ++i) {
    const int in_matrix =
        static_cast<int>(loader.from - matrix) + i * loader.kRowsAtOnce * kRowBytes;
    places[2 * i] = in_matrix;
    places[2 * i + 1] = loader.to + i * loader.kStep;
  }
  return loader.kCopies;
}

}  // namespace

// [block_m, block_n, warps_m, warps_n, warps_k, products down, across, steps, shift, offset, bytes
// of a row of w in a slice, codes in a slice]
EXPORT void gemm_sizes(int tile, int codes, int* out) {
  with_both(tile, codes, [&](auto t, auto c) {
    const int sizes[] = {t.kBlockM,  t.kBlockN, t.kWarpsM, t.kWarpsN, t.kWarpsK, t.kRows,
                         t.kColumns, c.kSteps,  c.kShift,  c.kOffset, c.kWBytes, c.kCodes};
    for (int size : sizes) *out++ = size;
  });
}

// Where lane (g, t) reads its words of a and w in a slice, and the row and first column of its
// sums.
EXPORT void gemm_lane(int tile, int codes, int warp_m, int warp_n, int g, int t, int* a, int* w,
                      int* rows, int* columns) {
  with_both(tile, codes, [&](auto tile_type, auto codes_type) {
    const Lane<decltype(tile_type), decltype(codes_type)> lane{warp_m, warp_n, g, t};
    for (int part = 0; part < tile_type.kParts; ++part) {
      a[part] = lane.a_words(part);
      rows[part] = lane.row(part);
    }
    for (int n = 0; n < tile_type.kColumns; ++n) w[n] = lane.w_words(n);
    for (int i = 0; i < tile_type.kColumns / 4; ++i) columns[i] = lane.column(i);
  });
}

// The chunks that a thread copies: pairs of an offset in the rows of the matrix, as if a row had as
// many bytes as in a slice, and one in the slice. Returns how many.
EXPORT int gemm_copies(int tile, int codes, int of_w, int thread, int* places) {
  int count = 0;
  with_both(tile, codes, [&](auto t, auto c) {
    count = of_w ? copies<t.kBlockN, c.kWBytes, t.kGroupThreads>(thread, places)
                 : copies<t.kBlockM, kSliceBytes, t.kGroupThreads>(thread, places);
  });
  return count;
}

// The operands that a lane makes of its words for one step: [first, second half of k].
EXPORT void gemm_halves(int codes, int of_w, int step, uint32_t flip, const uint32_t* words,
                        uint32_t* out) {
  with_codes(codes, [&](auto c) {
    using Codes = decltype(c);
    uint32_t w_words[Codes::kWWords], a_words[4];
    for (int i = 0; i < Codes::kWWords; ++i) w_words[i] = words[i];
    for (int i = 0; i < 4 && !of_w; ++i) a_words[i] = words[i];
    if (of_w)
      w_halves<Codes>(&out[0], &out[1], w_words, step);
    else
      a_halves<Codes>(&out[0], &out[1], a_words, step, flip);
  });
}

// In units of 16 bytes.
EXPORT int gemm_scratch(int tile, int group, int part, int half, int thread) {
  int index = 0;
  with_tile(tile, [&](auto t) { index = scratch_index<decltype(t)>(group, part, half, thread); });
  return index;
}
