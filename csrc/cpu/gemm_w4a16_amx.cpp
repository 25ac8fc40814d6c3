// gemm_w4a16 for AMX, where x is bfloat16: tdpbf16ps multiplies 16 rows by 16 columns, 32 k of
// each, in exactly the order of gemm_w4a16.h, which was made for it. The loops are in
// gemm_panels.h.
//
// A step is a part. A line of a column is one step per field of its words; shifted down to the
// lowest bits, a field looks up the bfloat16 of its code, which holds it exactly, for 32 words at a
// time. A quad is a pair of those, from an even and an odd word.
//
// The sums of a segment are taken out of the matrix unit and added to the totals, times their
// scale.
//
// Of few rows the products are taken with the weights as rows of the matrix unit: a line then needs
// no transposing, and 16 columns of it no panel.
//
// tdpbf16ps takes subnormal numbers for 0 and rounds to them so. There are none if every number of
// x is 0 or at least 2^-100: all products and sums are then multiples of 2^-107. Rows that hold a
// smaller one, other types, and groups of no whole bytes are left to AVX-512.
#include <type_traits>

#include "gemm_fields.h"
#include "gemm_panels.h"
#include "gemm_w4a16.h"
#include "narrow_bf16.h"
#include "quads.h"
#include "tiles_amx.h"

namespace fq::cpu {
namespace {

constexpr uint16_t kSmallestSafe = 27 << 7;  // 2^-100 in bfloat16
static_assert(kPart * 2 == kRowStep, "a part is a step");

// What the columns of a tile bring to the epilogue. Where there is no bias it is -0, which changes
// nothing when it is added.
struct Bias {
  float bias[kTileColumns];

  Bias() {
    for (float& b : bias) b = -0.0f;
  }
  Bias(const GemmW4A16& args, const Tile& tile) : Bias() {
    if (args.bias)
      for (int c = 0; c < tile.columns; ++c)
        bias[c] = load(args.bias, args.bias_dtype, tile.column + c);
  }
};

template <int kWidth>
struct FloatKernel {
  using Args = GemmW4A16;
  using Epilogue = Bias;
  static constexpr int64_t kFields = 16 / kWidth, kLine = kLineBytes * 8 / kWidth;  // codes
  static constexpr int64_t kUnitSteps = kFields, kUnitBytes = kLineBytes;
  static constexpr int64_t kColumns = 16, kFewRows = 32;
  static constexpr int64_t kSegmentLines = kSegment / kLine, kPanelLines = 32 / kUnitSteps;

  const GemmW4A16& args;
  const int64_t group, group_lines;  // codes and lines of a group
  float* scales = nullptr;           // [groups, rounded up to 4; kTileColumns], of this tile
  float* sums[2] = {};               // [32, kTileColumns], of this and the last segment of a block
  uint8_t* lines = nullptr;  // unpacked, of few rows: two of [2, kFields, 16 columns, 64 bytes]

  explicit FloatKernel(const GemmW4A16& a)
      : args(a), group(group_of(a)), group_lines(ceil_div(group, kLine)) {}

  Dtype out_dtype() const { return Dtype::kBFloat16; }
  int64_t total_lines() const { return args.groups * group_lines; }
  int64_t steps() const { return total_lines() * kUnitSteps; }
  int64_t column_bytes() const { return packed_bytes(args.k, args.bits); }
  const uint8_t* column(int64_t n) const { return args.w + n * column_bytes(); }
  int64_t unit_offset(int64_t line) const {
    return line / group_lines * (group * kWidth / 8) + line % group_lines * kLineBytes;
  }
  bool reads_past_columns() const { return group * kWidth / 8 % kLineBytes != 0; }

  // A panel is as many whole segments as make 32 steps, 64 KB.
  int64_t segment_lines(int64_t first) const {
    const int64_t left = group_lines - first % group_lines;
    return left < kSegmentLines ? left : kSegmentLines;
  }
  int64_t most_panel_steps() const {
    return (total_lines() < kPanelLines ? total_lines() : kPanelLines) * kUnitSteps;
  }
  int64_t panel_steps(int64_t first_step) const {
    const int64_t first = first_step / kUnitSteps;
    int64_t end = first;
    do end += segment_lines(end);
    while (end < total_lines() && end + segment_lines(end) - first <= kPanelLines);
    return (end - first) * kUnitSteps;
  }

  static constexpr int64_t kLinesBytes = kFields * kHalf * kRowStep;
  int64_t extra_bytes() const {
    return (ceil_div(args.groups, 4) * 4 * kTileColumns + 2 * kBlockTotals) *
               int64_t{sizeof(float)} +
           4 * kLinesBytes;
  }

  // ---- rows
  // --------------------------------------------------------------------------------------

  void prepare(const Tile& tile, const Work& work) {
    sums[0] = reinterpret_cast<float*>(work.extra);
    sums[1] = sums[0] + kBlockTotals;
    lines = reinterpret_cast<uint8_t*>(sums[1] + kBlockTotals);
    scales = reinterpret_cast<float*>(lines + 4 * kLinesBytes);
    if (tile.rows <= kFewRows) __builtin_memset(sums[0], 0, 2 * kBlockTotals * sizeof(float));
    for (int64_t r = 0; r < tile.rows; ++r) {
      const uint16_t* const x = static_cast<const uint16_t*>(args.x) + (tile.row + r) * args.k;
      for (int64_t line = 0; line < total_lines(); ++line) {
        const int64_t first = line / group_lines * group + line % group_lines * kLine;
        const int64_t end = (line / group_lines + 1) * group;
        __m512i parts[kFields];
        for (int64_t j = 0; j < kFields; ++j) parts[j] = load_some(x, first + j * 32, end);
        split_fields(parts);
        for (int64_t j = 0; j < kFields; ++j)
          if (tile.rows <= kFewRows)
            store_pairs(parts[j], few_rows(tile, r / kHalf),
                        few_row(work, tile, r / kHalf, line, j) + r % kHalf * 4);
          else
            _mm512_storeu_si512(work.row(r) + (line * kFields + j) * work.row_step(), parts[j]);
      }
    }
  }

  // ---- columns
  // -----------------------------------------------------------------------------------

  // Transposes the tile's scales.
  void start_tile(const Tile& tile) {
    struct {
      const GemmW4A16& args;
      int64_t column_bytes() const { return args.groups * 4; }
      bool reads_past_columns() const { return args.groups % 4 != 0; }
      const uint8_t* column(int64_t n) const {
        return reinterpret_cast<const uint8_t*>(args.w_scale + n * args.groups);
      }
    } const source{args};
    Columns<16> columns;
    columns.point(source, tile);
    for (int64_t g = 0; g < args.groups; g += 4)
      for (int64_t c = 0; c < kTileColumns; c += kHalf) {
        __m512i quads[4];
        if (columns.in_memory(g * 4)) {
          load_quads(columns.at + c, g * 4, quads);
        } else {
          const uint8_t* ends[kHalf];
          for (int64_t l = 0; l < kHalf; ++l) ends[l] = columns.ends[c + l];
          load_quads(ends, g * 4 - columns.ends_from, quads);
        }
        for (int64_t j = 0; j < 4; ++j)
          _mm512_storeu_si512(scales + (g + j) * kTileColumns + c, quads[j]);
      }
  }

  static void make_unit(const uint8_t* const* columns, int64_t offset, uint8_t* out) {
    for (int64_t b = 0; b < kLineBytes; b += 16) {
      __m512i quads[4];
      load_quads(columns, offset + b, quads);
      for (int64_t q = 0; q < 4; ++q, out += kQuadBytes)
        for (int j = 0; j < kFields; ++j)
          _mm512_storeu_si512(out + j * kPanelStep, codes_of<kWidth>(quads[q], j));
    }
  }

  // ---- products
  // ----------------------------------------------------------------------------------

  // While a segment is multiplied, the sums of the last one are added to the totals.
  template <class Aside>
  void multiply_block(const Block& block, Aside& aside) {
    const uint8_t *a = block.rows, *w = block.panel;
    const bool whole = block.count > kHalf;
    constexpr int64_t kStride = kTileColumns * 4;
    const int64_t end = (block.first + block.steps) / kUnitSteps;
    Finished last{};
    for (int64_t line = block.first / kUnitSteps, turn = 0; line < end; turn = 1 - turn) {
      Finished segment{sums[turn], scales + line / group_lines * kTileColumns,
                       static_cast<float*>(block.totals), block.count, line == 0};
      const int64_t steps = segment_lines(line) * kUnitSteps, rows = ceil_div(kBlock, steps);
      line += steps / kUnitSteps;
      clear_tile<0>();
      clear_tile<1>();
      clear_tile<2>();
      clear_tile<3>();
      for (int64_t s = 0; s < steps; ++s, a += block.row_step, w += kPanelStep) {
        load_tile<4>(a, kRowStep);
        load_tile<6>(w, kQuadBytes);
        load_tile<7>(w + kHalfBytes, kQuadBytes);
        multiply_bf16<0, 4, 6>();
        multiply_bf16<1, 4, 7>();
        if (whole) {
          load_tile<5>(a + kHalf * kRowStep, kRowStep);
          multiply_bf16<2, 5, 6>();
          multiply_bf16<3, 5, 7>();
        }
        last.add(rows);
        aside.step();
      }
      float* const below = segment.sums + kHalf * kTileColumns;
      store_tile<0>(segment.sums, kStride);
      store_tile<1>(segment.sums + kHalf, kStride);
      if (whole) {
        store_tile<2>(below, kStride);
        store_tile<3>(below + kHalf, kStride);
      }
      last = segment;
    }
    last.add(kBlock);
  }

  // Sums of a segment of a block, on their way to the totals.
  struct Finished {
    float* sums;
    const float* scale;
    float* totals;
    int64_t rows;  // left
    bool first;    // of its tile: there are no totals yet

    void add(int64_t most) {
      const __m512 scale0 = rows > 0 ? _mm512_loadu_ps(scale) : _mm512_setzero_ps();
      const __m512 scale1 = rows > 0 ? _mm512_loadu_ps(scale + kHalf) : _mm512_setzero_ps();
      for (; most > 0 && rows > 0; --most, --rows, sums += kTileColumns, totals += kTileColumns) {
        const __m512 total0 = first ? _mm512_setzero_ps() : _mm512_loadu_ps(totals);
        const __m512 total1 = first ? _mm512_setzero_ps() : _mm512_loadu_ps(totals + kHalf);
        _mm512_storeu_ps(totals, _mm512_fmadd_ps(_mm512_loadu_ps(sums), scale0, total0));
        _mm512_storeu_ps(totals + kHalf,
                         _mm512_fmadd_ps(_mm512_loadu_ps(sums + kHalf), scale1, total1));
      }
    }
  };

  // ---- few rows
  // ----------------------------------------------------------------------------------

  // Few rows are taken 16 at a time: so many there are of the group-th 16 of a tile, ..
  static int64_t few_rows(const Tile& tile, int64_t group) {
    const int64_t left = tile.rows - group * kHalf;
    return left < kHalf ? left : kHalf;
  }
  // .. and there is a part of them, as pairs [16][row].
  uint8_t* few_row(const Work& work, const Tile& tile, int64_t group, int64_t line,
                   int64_t part) const {
    const int64_t step = line * kFields + part;
    return work.row(0) + (group * kHalf * steps() + step * few_rows(tile, group)) * kRowStep;
  }

  void multiply_few(const Tile& tile, const Columns<kUnitBytes>& columns, const Work& work) {
    start_tile(tile);
    for (int64_t group = 0; group * kHalf < tile.rows; ++group)
      multiply_sixteen(tile, columns, work, group);
  }

  // Sums, and so totals, are [column][row] here. Tiles 0 and 1 are sums of 16 columns each, 2 and 3
  // those of the next segment, so that the first need not be waited for; 4 is columns, 6 rows.
  void multiply_sixteen(const Tile& tile, const Columns<kUnitBytes>& columns, const Work& work,
                        int64_t group) {
    const int64_t rows = few_rows(tile, group);
    const int64_t width = few_width(args.m), pitch = width == 1 ? 1 : kHalf;
    float totals[2][kHalf * kHalf] = {};
    const float* held[2][2] = {};    // scales of the segments in the tiles
    const float* stored[2][2] = {};  // and of those in sums[turn] [half][column][row]
    // Calls with a tile's number as a constant.
    const auto with = [](int64_t tile, auto call) __attribute__((always_inline)) {
      if (tile == 0) call(std::integral_constant<int, 0>());
      if (tile == 1) call(std::integral_constant<int, 1>());
      if (tile == 2) call(std::integral_constant<int, 2>());
      if (tile == 3) call(std::integral_constant<int, 3>());
    };
    const auto add = [&](int64_t turn, int64_t half) {
      const float* const scale = stored[turn][half];
      if (scale == nullptr) return;
      stored[turn][half] = nullptr;
      const float* const sum = sums[turn] + half * kHalf * kHalf;
      float* const total = totals[half];
      if (width == 1) {
        _mm512_storeu_ps(total, _mm512_fmadd_ps(_mm512_loadu_ps(sum), _mm512_loadu_ps(scale),
                                                _mm512_loadu_ps(total)));
        return;
      }
      for (int64_t i = 0; i < kHalf * kHalf; i += kHalf)
        _mm512_storeu_ps(total + i,
                         _mm512_fmadd_ps(_mm512_loadu_ps(sum + i), _mm512_set1_ps(scale[i / kHalf]),
                                         _mm512_loadu_ps(total + i)));
    };
    // The sums of a tile go to memory when it is wanted again, and to the totals a segment later:
    // neither has to be waited for.
    const auto empty = [&](int64_t turn, int64_t half) {
      add(1 - turn, half);
      if (held[turn][half] == nullptr) return;
      with(turn * 2 + half,
           [&](auto tile) { store_tile<tile>(sums[turn] + half * kHalf * kHalf, pitch * 4); });
      stored[turn][half] = held[turn][half];
    };
    const auto multiply_part = [&](int64_t line, int64_t j, int64_t turn) {
      const uint8_t* const w = lines_of(line) + j * kHalf * kRowStep;
      with(turn, [&](auto of_turn) {
        // turn is 0 or 1; `with` instantiates more, whose tiles must exist too
        constexpr int kSums = decltype(of_turn)::value % 2 * 2;
        load_tile<6>(few_row(work, tile, group, line, j), rows * 4);
        load_tile<4>(w, kRowStep);
        multiply_bf16<kSums, 4, 6>();
        load_tile<5>(w + kLinesBytes, kRowStep);
        multiply_bf16<kSums + 1, 5, 6>();
      });
    };

    // A line is multiplied while the next one is unpacked, a part of both at a time: what was just
    // stored cannot be loaded into a tile for a while, and a product takes its time.
    int64_t turn = 0;
    for (int64_t line = 0; line < total_lines(); turn = 1 - turn) {
      const int64_t first = line, end = line + segment_lines(line);
      const float* const scale = scales + line / group_lines * kTileColumns;
      for (; line < end; ++line) {
        const int64_t before = line > first ? turn : 1 - turn;
        for (int64_t j = 0; j < kFields; ++j) {
          if (line > 0) multiply_part(line - 1, j, before);
          unpack_columns(columns, line, j * kTileColumns / kFields, kTileColumns / kFields);
        }
        for (int64_t half = 0; half < 2 && line == first; ++half) {
          empty(turn, half);
          with(turn * 2 + half, [](auto tile) { clear_tile<tile>(); });
          held[turn][half] = scale + half * kHalf;
        }
      }
    }
    for (int64_t j = 0; j < kFields && total_lines() > 0; ++j)
      multiply_part(total_lines() - 1, j, 1 - turn);
    for (int64_t half = 0; half < 2; ++half) {
      empty(turn, half);
      empty(1 - turn, half);
      add(1 - turn, half);
    }
    float* const out = reinterpret_cast<float*>(work.totals) + group * kHalf * kTileColumns;
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < kTileColumns; ++c)
        out[r * kTileColumns + c] = totals[c / kHalf][c % kHalf * pitch + r];
  }

  uint8_t* lines_of(int64_t line) const { return lines + line % 2 * 2 * kLinesBytes; }

  // Some columns of a line: [half][field][column][32 codes].
  void unpack_columns(const Columns<kUnitBytes>& columns, int64_t line, int64_t first,
                      int64_t count) {
    const int64_t offset = unit_offset(line), next = kTileColumns * columns.bytes + offset;
    const bool in_memory = columns.in_memory(offset);
    uint8_t* out = lines_of(line) + first / kHalf * kLinesBytes + first % kHalf * kRowStep;
    for (int64_t c = first; c < first + count; ++c, out += kRowStep) {
      __builtin_prefetch(columns.at[c] + next, 0, 2);
      const __m512i words = _mm512_loadu_si512(
          in_memory ? columns.at[c] + offset : columns.ends[c] + offset - columns.ends_from);
      for (int j = 0; j < kFields; ++j)
        _mm512_store_si512(out + j * kHalf * kRowStep, codes_of<kWidth>(words, j));
    }
  }

  // Columns of a tile of rows, if there are few.
  static int64_t few_width(int64_t m) { return m < kHalf ? m : kHalf; }

  void finish(const Tile& tile, const Bias& epilogue, int64_t first, int64_t count,
              const void* totals) {
    const float* total = static_cast<const float*>(totals);
    const __m512 bias0 = _mm512_loadu_ps(epilogue.bias);
    const __m512 bias1 = _mm512_loadu_ps(epilogue.bias + kHalf);
    for (int64_t r = first; r < first + count; ++r, total += kTileColumns) {
      uint16_t* const out =
          static_cast<uint16_t*>(args.out) + (tile.row + r) * args.n + tile.column;
      const __m512 sum0 = _mm512_add_ps(_mm512_loadu_ps(total), bias0);
      const __m512 sum1 = _mm512_add_ps(_mm512_loadu_ps(total + kHalf), bias1);
      __m512i both;
      if (tile.columns == kTileColumns && round_to_bf16(sum0, sum1, both)) {
        _mm512_storeu_si512(out, both);
        continue;
      }
      float sum[kTileColumns];
      _mm512_storeu_ps(sum, sum0);
      _mm512_storeu_ps(sum + kHalf, sum1);
      for (int c = 0; c < tile.columns; ++c) out[c] = float_to_bf16(sum[c]);
    }
  }
};

// Whether no number is so small that AMX would take it, or a product, for 0.
bool all_safe(const uint16_t* x, int64_t count) {
  __mmask32 unsafe = 0;
  for (int64_t i = 0; i < count; i += 32) {
    const __mmask32 there = count - i < 32 ? (1u << (count - i)) - 1 : ~0u;
    const __m512i size =
        _mm512_and_si512(_mm512_maskz_loadu_epi16(there, x + i), _mm512_set1_epi16(0x7fff));
    // 0 < size < kSmallestSafe in one comparison, as 0 - 1 is the largest number.
    unsafe |= _mm512_cmplt_epu16_mask(_mm512_sub_epi16(size, _mm512_set1_epi16(1)),
                                      _mm512_set1_epi16(kSmallestSafe - 1));
  }
  return unsafe == 0;
}

template <int kWidth>
void gemm(const GemmW4A16& args, int64_t begin, int64_t end) {
  using Kernel = FloatKernel<kWidth>;
  const Tiling tiles = tiling(args);
  Kernel kernel(args);
  const int64_t most_rows = args.m < tiles.block_rows ? args.m : tiles.block_rows;
  const Work work(kernel.steps(), most_rows, kernel.most_panel_steps(), kernel.extra_bytes());
  const TileShape rows{kHalf, Kernel::few_width(args.m) * 4};
  const TileSession session(rows, {kHalf, kRowStep}, rows);
  gemm_panels(kernel, tiles, work, begin, end);
}

}  // namespace

void gemm_w4a16_amx(const GemmW4A16& args, int64_t begin, int64_t end) {
  if (begin >= end) return;
  const bool suits =
      args.dtype == Dtype::kBFloat16 && args.k > 0 && group_of(args) * width_of(args) % 8 == 0;
  const Tile first = tiling(args).at(begin), last = tiling(args).at(end - 1);
  const uint16_t* const x = static_cast<const uint16_t*>(args.x);
  const int64_t count = (last.row + last.rows - first.row) * args.k;
  if (!suits || !all_safe(x + first.row * args.k, count))
    gemm_w4a16_avx512(args, begin, end);
  else if (width_of(args) == 4)
    gemm<4>(args, begin, end);
  else
    gemm<2>(args, begin, end);
}

}  // namespace fq::cpu
