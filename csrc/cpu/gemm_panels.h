// A matrix product by panels: the loops that the integer GEMMs and gemm_w4a16 share. What a code is
// and how it is multiplied is the business of a `Kernel`, one object for each call.
//
// The columns of a tile are unpacked for some steps along k at a time: a panel, which stays in the
// L1 cache while all rows of the tile are multiplied with it, 32 rows at a time: a block. A step is
// 64 bytes of a prepared row, and of a column as the multiplier wants it:
//
//   rows, once per tile row   [row / 32][step][row % 32][64 bytes]
//   panel, per 32 columns     [step][column / 16][quad 0..15][column % 16][4 bytes]
//
// 16 rows, or the 16 quads of 16 columns, are a tile of a matrix unit; a vector of the panel holds
// one quad of 16 columns.
//
// Rows that do not all stay in the L2 cache are used a chunk of steps at a time, for a run of
// several tiles, whose totals stay there meanwhile.
//
// While a block is multiplied, a part of the next panel is made and the rows of the previous block
// are finished: a matrix unit leaves the vector units free for it. Few rows are not worth a panel;
// a kernel may take their products straight from the weights in memory.
//
//   struct Kernel {
//     using Args; using Epilogue;              what finishing needs to know about 32 columns
//     static constexpr int64_t kUnitSteps;     steps that are unpacked together,
//     static constexpr int64_t kUnitBytes;     from 32 or 64 bytes of a column
//     static constexpr int64_t kColumns;       so many are made into a panel at a time
//     static constexpr int64_t kFewRows;
//     const Args& args;
//     Dtype out_dtype() const;
//     int64_t steps() const, panel_steps(int64_t first) const, most_panel_steps() const;
//     int64_t column_bytes() const, unit_offset(int64_t unit) const;
//     bool reads_past_columns() const;         whether a unit may end after its column
//     const uint8_t* column(int64_t n) const;
//     void prepare(const Tile&, const Work&);             rows of a tile, and what else it needs
//     void start_tile(const Tile&);
//     static void make_unit(const uint8_t* const* columns, int64_t offset, uint8_t* panel);
//     void multiply_few(const Tile&, const Columns<kUnitBytes>&, const Work&);
//     void multiply_block(const Block&, Aside& aside);    calls aside.step() after every step
//     void finish(const Tile&, const Epilogue&, int64_t first, int64_t count, const void* totals);
//   };
#pragma once

#include <cstddef>

#include "../ops.h"
#include "gemm_tiles.h"
#include "pick.h"
#include "scratch.h"

namespace fq::cpu {
namespace {

constexpr int64_t kRowStep = 64;                           // bytes
constexpr int64_t kHalf = 16;                              // rows or columns of a matrix tile
constexpr int64_t kQuadBytes = kHalf * 4;                  // of a quad of 16 columns
constexpr int64_t kHalfBytes = kRowStep / 4 * kQuadBytes;  // of a step of 16 columns
constexpr int64_t kPanelStep = kHalfBytes * kTileColumns / kHalf;
constexpr int64_t kBlock = kTileRowUnit;  // rows
constexpr int64_t kBlockTotals = kBlock * kTileColumns;

// The working memory of one thread. What a kernel needs for itself is `extra`.
struct Work {
  int64_t steps;
  int64_t chunk, run;  // steps of a chunk, at most, and tiles of a run
  int64_t group;       // rows that lie together: 32, fewer if there are no more
  int64_t slots;       // blocks that totals has room for: one more than may be unfinished
  uint8_t* rows;       // see above
  uint8_t* panels[2];  // the one that is read, and the one that is made
  uint8_t* totals;     // int32 or float [slots, 32, kTileColumns]
  uint8_t* extra;

  Work(int64_t steps_, int64_t most_rows, int64_t panel_steps, int64_t extra_bytes)
      : steps(steps_), run(1), group(most_rows <= kHalf ? most_rows : kBlock) {
    const int64_t padded = ceil_div(most_rows, group) * group, step_bytes = padded * kRowStep;
    const int64_t blocks = ceil_div(padded, kBlock);
    chunk = l2_cache_bytes() / 4 / step_bytes;
    if (chunk < steps) run = l2_cache_bytes() / 4 / (blocks * kBlockTotals * 4);
    if (run < 1) run = 1;
    slots = panel_steps < steps ? run * blocks + 1 : 2;
    const int64_t row_bytes = step_bytes * steps, panel_bytes = panel_steps * kPanelStep;
    rows = static_cast<uint8_t*>(
        scratch(row_bytes + 2 * panel_bytes + slots * kBlockTotals * 4 + extra_bytes));
    panels[0] = rows + row_bytes;
    panels[1] = panels[0] + panel_bytes;
    totals = panels[1] + panel_bytes;
    extra = totals + slots * kBlockTotals * 4;
  }

  int64_t row_step() const { return group * kRowStep; }  // bytes from a row's step to its next one
  uint8_t* row(int64_t r) const {
    return rows + (r / group * steps * group + r % group) * kRowStep;
  }
};

// The columns of a tile in memory, and copies of their ends, for reading past them.
template <int64_t kUnitBytes>
struct Columns {
  const uint8_t* at[kTileColumns];  // past the last column: that one again
  int64_t bytes, ends_from;
  alignas(64) uint8_t ends[kTileColumns][128];  // the last 64 bytes of a column, and zeros

  template <class Kernel>
  void point(const Kernel& kernel, const Tile& tile) {
    bytes = kernel.column_bytes();
    ends_from = bytes < 64 ? 0 : bytes - 64;
    const bool has_ends = kernel.reads_past_columns();
    for (int64_t c = 0; c < kTileColumns; ++c) {
      at[c] = kernel.column(tile.column + (c < tile.columns ? c : tile.columns - 1));
      if (has_ends) {
        __builtin_memset(ends[c], 0, sizeof ends[c]);
        __builtin_memcpy(ends[c], at[c] + ends_from, static_cast<std::size_t>(bytes - ends_from));
      }
    }
  }
  bool in_memory(int64_t offset) const { return offset + kUnitBytes <= bytes; }
};

// Makes a panel, a part at a time: one cache line of each of kColumns columns. So a line is used up
// while it is there, also where all columns fall into one set of the cache.
template <class Kernel>
struct PanelMaker {
  static constexpr int64_t kUnitBytes = Kernel::kUnitBytes, kColumns = Kernel::kColumns;
  static constexpr int64_t kLineUnits = 64 / kUnitBytes, kAcross = kTileColumns / kColumns;
  const Kernel& kernel;
  const Columns<kUnitBytes>* columns = nullptr;
  int64_t first = 0, units = 0;  // along k
  int64_t part = 0, parts = 0;   // part: the next one
  uint8_t* panel = nullptr;

  void start(const Columns<kUnitBytes>& of, int64_t first_step, int64_t steps, uint8_t* out) {
    columns = &of;
    first = first_step / Kernel::kUnitSteps;
    units = steps / Kernel::kUnitSteps;
    part = 0;
    parts = ceil_div(units, kLineUnits) * kAcross;
    panel = out;
  }

  void make(int64_t count) {
    for (; count > 0 && part < parts; --count, ++part) {
      const int64_t c = part % kAcross * kColumns, begin = part / kAcross * kLineUnits;
      const int64_t end = units - begin < kLineUnits ? units : begin + kLineUnits;
      const uint8_t* const* const at = columns->at + c;
      const int64_t next = kTileColumns * columns->bytes + kernel.unit_offset(first + begin);
      for (int64_t l = 0; l < kColumns; ++l) __builtin_prefetch(at[l] + next, 0, 2);
      uint8_t* out = panel + c / kHalf * kHalfBytes + c % kHalf * 4;
      for (int64_t u = begin; u < end; ++u) {
        const int64_t offset = kernel.unit_offset(first + u);
        uint8_t* const unit = out + u * Kernel::kUnitSteps * kPanelStep;
        if (columns->in_memory(offset)) {
          Kernel::make_unit(at, offset, unit);
        } else {
          const uint8_t* ends[kColumns];
          for (int64_t l = 0; l < kColumns; ++l) ends[l] = columns->ends[c + l];
          Kernel::make_unit(ends, offset - columns->ends_from, unit);
        }
      }
    }
  }
};

// What is multiplied at a time.
struct Block {
  const uint8_t* rows;  // its first row's first step
  int64_t row_step;     // bytes from a row's step to its next one
  int64_t count;        // of rows, at most 32
  const uint8_t* panel;
  int64_t first, steps;  // along k
  void* totals;          // [32, kTileColumns], to be set if first is 0, else added to
};

// What goes on while a block is multiplied. All of it is done when `finish_block` returns.
template <class Kernel>
struct Aside {
  Kernel& kernel;
  PanelMaker<Kernel> maker;
  Tile tile{};  // whose rows are being finished
  const typename Kernel::Epilogue* epilogue = nullptr;
  const uint8_t* totals = nullptr;       // of row `row`
  int64_t row = 0, rows = 0;             // the next row of that tile, and where to stop
  int64_t parts = 0, rows_per_step = 0;  // to do during this block, and at every step of it
  const char* out = nullptr;             // of this block, to be fetched before it is written
  int64_t out_rows = 0;

  void start_block(int64_t blocks_left, int64_t steps) {
    parts = ceil_div(maker.parts - maker.part, blocks_left);
    rows_per_step = ceil_div(kBlock, steps);
    if (rows_per_step < 4) rows_per_step = 4;  // a call has its price
  }
  void step() {
    if (parts > 0) maker.make(1);
    --parts;
    fetch(rows_per_step);
    finish(rows_per_step);
  }
  void finish_block() {
    if (parts > 0) maker.make(parts);
    parts = 0;
    finish(rows - row);
  }

  // The rows of `of` from `first` on will be finished next: their cache lines are wanted then.
  void expect_rows(const Tile& of, int64_t first, int64_t count) {
    const int64_t at = (of.row + first) * kernel.args.n + of.column;
    out = static_cast<const char*>(kernel.args.out) + at * size_of(kernel.out_dtype());
    out_rows = count;
  }
  void fetch(int64_t most) {
    const int64_t size = size_of(kernel.out_dtype());
    const bool two_lines = reinterpret_cast<std::uintptr_t>(out) % 64 + kTileColumns * size > 64;
    for (; most > 0 && out_rows > 0; --most, --out_rows, out += kernel.args.n * size) {
      __builtin_prefetch(out, 1);
      if (two_lines) __builtin_prefetch(out + kTileColumns * size - 1, 1);
    }
  }

  // From now on these rows are to be finished.
  void take_rows(const Tile& of, const typename Kernel::Epilogue& of_tile, int64_t first,
                 int64_t count, const void* sums) {
    tile = of;
    epilogue = &of_tile;
    row = first;
    rows = first + count;
    totals = static_cast<const uint8_t*>(sums);
  }
  void finish(int64_t most) {
    const int64_t count = rows - row < most ? rows - row : most;
    if (count <= 0) return;
    kernel.finish(tile, *epilogue, row, count, totals);
    row += count;
    totals += count * kTileColumns * 4;
  }
};

// The order of the work: the panels of a chunk, for every tile of a run, for every chunk. Few rows
// take no panels: a tile of them is gone through at once.
template <class Kernel>
struct Walk {
  const Kernel* kernel;
  const Tiling* tiles;
  const Work* work;
  int64_t end;                             // of the tiles
  int64_t run = 0, run_end = 0;            // tiles of the run
  int64_t chunk = 0, chunk_end = 0;        // steps of the chunk
  int64_t tile = 0, first = 0, steps = 0;  // where it is: a tile, and a panel of it
  bool few = false;

  Walk(const Kernel& k, const Tiling& t, const Work& w, int64_t begin, int64_t end_)
      : kernel(&k), tiles(&t), work(&w), end(end_) {
    start_run(begin);
  }

  bool more() const { return run < end; }
  bool starts_chunk() const { return first == chunk; }
  bool ends_tile() const { return first + steps == work->steps; }

  void next() {
    first += steps;
    if (first < chunk_end) {
      steps = kernel->panel_steps(first);
    } else if (tile + 1 < run_end) {
      ++tile;
      first = chunk;
      steps = few ? work->steps : kernel->panel_steps(first);
    } else if (chunk_end < work->steps) {
      start_chunk(chunk_end);
    } else {
      start_run(run_end);
    }
  }

 private:
  void start_run(int64_t begin) {
    run = begin;
    if (!more()) return;
    const auto least = [](int64_t a, int64_t b) { return a < b ? a : b; };
    run_end = least(run + work->run, least(end, (run / tiles->across + 1) * tiles->across));
    few = tiles->at(run).rows <= Kernel::kFewRows;
    start_chunk(0);
  }
  void start_chunk(int64_t begin) {
    tile = run;
    chunk = first = begin;
    steps = few ? work->steps : kernel->panel_steps(first);
    chunk_end = first + steps;
    while (chunk_end < work->steps) {
      const int64_t longer = chunk_end + kernel->panel_steps(chunk_end);
      if (longer - chunk > work->chunk) break;
      chunk_end = longer;
    }
  }
};

template <class Kernel>
void gemm_panels(Kernel& kernel, const Tiling& tiles, const Work& work, int64_t begin,
                 int64_t end) {
  Aside<Kernel> aside{kernel, {kernel}};
  Columns<Kernel::kUnitBytes> columns;
  typename Kernel::Epilogue epilogue[2];  // of this tile and of the last one
  int reading = 0;                        // which panel
  int64_t slot = 0;                       // of the run's first block

  const auto start_panel = [&](const Walk<Kernel>& at, int into) {
    if (at.starts_chunk()) columns.point(kernel, tiles.at(at.tile));
    aside.maker.start(columns, at.first, at.steps, work.panels[into]);
  };

  int64_t prepared_row = -1;
  bool is_made = false;  // the panel to be read
  for (Walk<Kernel> at(kernel, tiles, work, begin, end); at.more();) {
    const Tile tile = tiles.at(at.tile);
    if (tile.row != prepared_row) {
      aside.finish_block();
      kernel.prepare(tile, work);
      prepared_row = tile.row;
    }
    typename Kernel::Epilogue& of_tile = epilogue[at.tile % 2];
    if (at.ends_tile()) of_tile = typename Kernel::Epilogue(kernel.args, tile);
    if (at.few) {
      columns.point(kernel, tile);
      kernel.multiply_few(tile, columns, work);
      kernel.finish(tile, of_tile, 0, tile.rows, work.totals);
      at.next();
      continue;
    }
    if (at.starts_chunk()) kernel.start_tile(tile);
    if (!is_made) {
      start_panel(at, reading);
      aside.maker.make(aside.maker.parts);
    }
    Walk<Kernel> next = at;
    next.next();
    is_made = next.more() && !next.few;
    if (is_made) start_panel(next, 1 - reading);
    const int64_t blocks = ceil_div(tile.rows, kBlock);
    const int64_t first_slot = slot + (at.tile - at.run) * blocks;
    for (int64_t r = 0; r < tile.rows; r += kBlock) {
      const int64_t count = tile.rows - r < kBlock ? tile.rows - r : kBlock;
      const Block block{work.row(r) + at.first * work.row_step(),
                        work.row_step(),
                        count,
                        work.panels[reading],
                        at.first,
                        at.steps,
                        work.totals + (first_slot + r / kBlock) % work.slots * kBlockTotals * 4};
      aside.start_block(blocks - r / kBlock, at.steps);
      if (at.ends_tile()) aside.expect_rows(tile, r, count);
      kernel.multiply_block(block, aside);
      aside.finish_block();
      if (at.ends_tile()) aside.take_rows(tile, of_tile, r, count, block.totals);
    }
    reading = 1 - reading;
    if (next.run != at.run) slot = (slot + (at.run_end - at.run) * blocks) % work.slots;
    at = next;
  }
  aside.finish_block();
}

}  // namespace
}  // namespace fq::cpu
