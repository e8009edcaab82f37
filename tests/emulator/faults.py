"""The faults that are planted in the CUDA kernels, and the check that has to catch each."""

from __future__ import annotations

from typing import NamedTuple


class Fault(NamedTuple):
    """A change at one position of a source.

    ==========  ====  ==================================================================================
    name        type  meaning
    ==========  ====  ==================================================================================
    file        str   relative to csrc/cuda
    name        str   what is wrong
    old         str   the text in the source
    new         str   the text that replaces it
    check       str   "results"; where they stay: "addresses" (AddressSanitizer), "races" (ThreadSanitizer)
    occurrence  int   which occurrence of `old` is changed, from 1
    count       int   how many occurrences there are
    ==========  ====  ==================================================================================
    """

    file: str
    name: str
    old: str
    new: str
    check: str = "results"
    occurrence: int = 1
    count: int = 1

    @property
    def stage(self) -> str:
        return self.file.partition("/")[0]


WAIT = "__syncthreads();"

_SELECT = "regions/select.cu"
_SHARED = "regions/regions.cuh"
_LABEL = "regions/label.cu"
_RANK = "regions/rank.cu"
_GRID = "contrast/grid.cu"
_PIXELS = "contrast/pixels.cu"
_DIVIDED = "contrast/contrast.cu"
_COMMON = "capture/capture.cuh"
_TILE = "capture/tile.cuh"
_HIDE = "capture/hide.cuh"
_STREAM = "capture/stream.cuh"
_MERGE = "capture/merge.cuh"
_MAPS = "capture/maps.cuh"
_REREAD = "capture/reread.cuh"
_PLAIN = "capture/plain.cu"
_ATTEND = "attention/attend.cuh"
_FINISH = "attention/finish.cuh"
_ATTENTION = "attention/attention.cu"

# fmt: off
SELECT = (
    Fault(_SELECT, "count before all counters are cleared", f"  {WAIT}\n\n  const int shift", "  const int shift"),
    Fault(_SELECT, "add the counts before all are counted",
          f"  {WAIT}\n  for (uint32_t digit", "  for (uint32_t digit"),
    Fault(_SELECT, "count without an atomic", "atomicAdd(&shared.counts[(keys[step] >> shift) & digit_mask], 1u)",
          "shared.counts[(keys[step] >> shift) & digit_mask] += 1u", "races"),
    Fault(_SELECT, "add the counts without an atomic", "atomicAdd(&state->counts[pass][digit], shared.counts[digit])",
          "state->counts[pass][digit] += shared.counts[digit]", "races"),
    Fault(_SELECT, "read past the last pixel", "pixel < job.count ? key_of(load(values + pixel)) : 0",
          "key_of(load(values + pixel))", "addresses"),
    Fault(_SELECT, "count past the last pixel",
          "if (start + step * kBlockThreads + threadIdx.x >= job.count) break;", ""),
    Fault(_SELECT, "count the digits of other prefixes", "leading == prefix", "leading >= prefix"),
    Fault(_SELECT, "the next value is this one", "leading > prefix)", "leading >= prefix)"),
    Fault(_SELECT, "the least of half a warp", "int with = 16", "int with = 8", occurrence=1, count=2),
    Fault(_SELECT, "the greatest of half a warp", "int with = 16", "int with = 8", occurrence=2, count=2),
    Fault(_SELECT, "a pass does not hand on its rank", "store(&state->rank[pass], picked.rank);", ""),
    Fault(_SHARED, "negative values in the wrong order", "(bits & kTop) ? ~BitsOf<T>(0) : kTop", "kTop"),
    Fault(_SHARED, "a lane short in the scan of counts", "lane_of_thread() >= by", "lane_of_thread() > by"),
    Fault(_SHARED, "search the rank before all warps have summed", f"{WAIT}\n  before -= sum;", "before -= sum;"),
    Fault(_SHARED, "search the next digit before there is a digit", f"{WAIT}\n  uint32_t next", "uint32_t next"),
    Fault(_SHARED, "read the next digit before all have searched",
          f"{WAIT}\n  return shared.picked;", "return shared.picked;"),
    Fault(_SHARED, "the next digit without an atomic",
          "atomicMin(&shared.picked.next, next);", "shared.picked.next = next;"),
)

LABEL = (
    Fault(_LABEL, "the threshold from the farther end",
          "job.from_above ? __fsub_rn(above, part)", "!job.from_above ? __fsub_rn(above, part)"),
    Fault(_LABEL, "an infinite threshold has regions",
          "high >= static_cast<double>(threshold) ? Reason::kNone : Reason::kNoPixel", "Reason::kNone"),
    Fault(_LABEL, "runs continue in the next row",
          "bits & (row_starts | ~(bits << 1 | goes_on))", "bits & ~(bits << 1 | goes_on)"),
    Fault(_LABEL, "runs end with a step", "      goes_on = all >> 31;\n", ""),
    Fault(_LABEL, "the head of another lane", "head = __shfl_sync(kAllLanes, runs.head, 31);",
          "head = __shfl_sync(kAllLanes, runs.head, 30);", occurrence=1, count=2),
    Fault(_LABEL, "label past the last pixel",
          "if (pixel < job.count) store(job.labels + pixel", "store(job.labels + pixel", "addresses"),
    Fault(_LABEL, "runs end with a chunk", "if (has_left && pixel % kChunkPixels == 0)", "if (false)"),
    Fault(_LABEL, "rows joined at the first pixels of runs alone",
          "if (!has_left || !is_on(above - 1))", "if (!has_left)"),
    Fault(_LABEL, "joined across the right edge", "if (x + 1 < width && is_on(above + 1)", "if (is_on(above + 1)"),
    Fault(_LABEL, "joined across the left edge", "x > 0 && is_on(pixel - 1)", "pixel > 0 && is_on(pixel - 1)"),
    Fault(_LABEL, "a lost race is not repeated", "if (atomicCAS(labels + high, high, low) == high) return;",
          "atomicCAS(labels + high, high, low);\n    return;"),
    Fault(_LABEL, "join without an atomic", "if (atomicCAS(labels + high, high, low) == high) return;",
          "if (labels[high] == high) {\n      labels[high] = low;\n      return;\n    }", "races"),
    Fault(_LABEL, "the parent of a root follows it", "if (high < low) {", "if (high > low) {"),
    Fault(_LABEL, "shorten the path without an atomic",
          "atomicMin(labels + pixel, grandparent);", "labels[pixel] = grandparent;", "races"),
    Fault(_LABEL, "two roots with one number", "__popc(roots & ((1u << lane) - 1))", "__popc(roots & (1u << lane))"),
    Fault(_LABEL, "numbers without an atomic",
          "number = atomicAdd(&job.state->regions, static_cast<uint32_t>(__popc(roots)));",
          "{\n      number = job.state->regions;\n      job.state->regions = number + __popc(roots);\n    }", "races"),
    Fault(_LABEL, "boxes a row short",
          "static_cast<int32_t>(pixel / job.width) + 1", "static_cast<int32_t>(pixel / job.width)"),
    Fault(_LABEL, "the box of a region without an atomic",
          "atomicMax(job.right + number, right);", "store(job.right + number, right);", "races"),
    Fault(_LABEL, "sum without an atomic",
          "atomicAdd(job.keys[0] + number, amount);", "job.keys[0][number] += amount;", "races"),
    Fault(_LABEL, "sums past the head of the run", "lane >= first_lane + by", "lane >= by"),
    Fault(_LABEL, "the carried amount is lost",
          "if (lane == 0 && goes_on && !(runs.heads & 1)) join_amounts(carried);", ""),
    Fault(_LABEL, "carried from another lane",
          "carried = __shfl_sync(kAllLanes, amount, 31)", "carried = __shfl_sync(kAllLanes, amount, 30)"),
    Fault(_LABEL, "a run continues past the chunk", "bits[kSteps] = 0;", "bits[kSteps] = 1;"),
    Fault(_LABEL, "sums rounded down", "__double2ll_rn(", "static_cast<long long>("),
)

RANK = (
    Fault(_RANK, "sort before the tile is loaded", f"{WAIT}\n    for (uint32_t width", "for (uint32_t width"),
    Fault(_RANK, "sort without waiting", f"        {WAIT}\n", ""),
    Fault(_RANK, "ties by the last pixel", "first < other_first", "first > other_first"),
    Fault(_RANK, "ties of two runs by the last pixel",
          "load(firsts + middle) < first", "load(firsts + middle) > first"),
    Fault(_RANK, "merged with itself", "if (start == own_run) continue;", ""),
    Fault(_RANK, "the last run as long as the others", "end - start < run ? end - start : run", "run"),
    Fault(_RANK, "keep more than there are", "limit < regions ? limit : regions;", "limit;", "addresses"),
    Fault(_RANK, "the share rounded", "job.keep));\n  const int64_t limit = job.top > 0 ? job.top : job.floor > share",
          "job.keep) + 0.5);\n  const int64_t limit = job.top > 0 ? job.top : job.floor > share"),
    Fault(_RANK, "the box of another edge", "edge < 2", "edge < 1"),
    Fault(_RANK, "the union box without an atomic", "atomicMin(address, value)", "*address = value", "races"),
    Fault(_RANK, "the mask has all regions",
          "label != kOff && load(job.left + ~label) == kChosen", "label != kOff"),
)

CONTRAST = (
    Fault(_GRID, "maps before they are written", "  wait_for_launch();\n", ""),
    Fault(_GRID, "the layer stays at its last step", "layer += is_last, step", "step"),
    Fault(_GRID, "a mean of half the lanes",
          "  values[0] += __shfl_xor_sync(kAllLanes, values[0], 2);\n", ""),
    Fault(_GRID, "the sums of other maps", "const float own = is_upper ? values[i + kept] : values[i];",
          "const float own = is_upper ? values[i] : values[i + kept];"),
    Fault(_GRID, "means before all warps have summed", f"  {WAIT}\n  float total", "  float total"),
    Fault(_GRID, "sums are replaced while they are read", f"if (first > begin) {WAIT}", "", "races"),
    Fault(_GRID, "maps past the chunk in the means", "if (i < count && token < launch.tokens)",
          "if (token < launch.tokens)", "addresses"),
    Fault(_GRID, "tokens past the last", "if (first + i < end && token < launch.tokens)", "if (first + i < end)",
          "addresses"),
    Fault(_GRID, "values past the last map", "values.task[i] = values.general[i] = 0.0f;",
          "values.task[i] = values.general[i] = 1.0f;"),
    Fault(_GRID, "weights before they are there", f"  {WAIT}\n\n  float* to", "  float* to"),
    Fault(_GRID, "a divisor of 0", "divisor > 0.0f ? values.task[i] / divisor : 0.0f", "values.task[i] / divisor"),
    Fault(_GRID, "the weight of another step",
          "load_double(launch.step_weights + at.step)", "load_double(launch.step_weights)"),
    Fault(_GRID, "the later tokens of a block are lost", "has_next = token <= last_token;", "has_next = false;"),
    Fault(_GRID, "the maps of the first tokens again",
          "if (has_next) values = load_values(launch, begin, end, token);", ""),
    Fault(_GRID, "later maps of a chunk are the first ones",
          "first + kMapsAtOnce, end, token);", "begin, end, token);"),
    Fault(_DIVIDED, "a general map of every step", "p.general_steps == 1 ? 0 : device.general_strides[1]",
          "device.general_strides[1]", "addresses"),
    Fault(_DIVIDED, "vectors that are not aligned",
          " && reinterpret_cast<uintptr_t>(out) % 16 == 0", ""),
    Fault(_DIVIDED, "fewer cells of a row than it has", " + 1 + taps)", ")"),
    Fault(_PIXELS, "the grid before it is written", "  wait_for_launch();\n", ""),
    Fault(_PIXELS, "NaN is no maximum", "b > a || b != b ? b : a", "b > a ? b : a"),
    Fault(_PIXELS, "the range before all warps have theirs",
          f"  {WAIT}\n  low = shared.low[0]", "  low = shared.low[0]"),
    Fault(_PIXELS, "the range of half a warp", "int distance = 16", "int distance = 8"),
    Fault(_PIXELS, "the range of one warp", "for (int warp = 1;", "for (int warp = kContrastWarps;"),
    Fault(_PIXELS, "the minimum is subtracted from what the maximum divides", "Range{0.0f, high}", "Range{low, high}"),
    Fault(_PIXELS, "flat maps are divided", "span > 0.0f ? value / span : 0.0f", "value / span"),
    Fault(_PIXELS, "chunks past the last", "if (weights[t] > 0.0f && chunk + i < launch.chunks)",
          "if (weights[t] > 0.0f)", "addresses"),
    Fault(_PIXELS, "rows of cells past the last", "if (weights[t] > 0.0f && chunk + i < launch.chunks)",
          "if (chunk + i < launch.chunks)", "addresses"),
    Fault(_PIXELS, "the tokens of the first view", "launch.partials + view.first_token + row", "launch.partials + row"),
    Fault(_PIXELS, "the same chunk again", "int64_t{chunk + i} * launch.tokens", "int64_t{chunk} * launch.tokens"),
    Fault(_PIXELS, "weights that do not add up to one", "  return sum / total;\n}\n\n// The two cells",
          "  return sum / static_cast<float>(2 * axis.longer());\n}\n\n// The two cells"),
    Fault(_PIXELS, "a cell without weight is read", "far_weight > 0.0f ? near + 1 : near", "near + 1"),
    Fault(_PIXELS, "the first cell is that of the row", "near = first - first_cell;", "near = first;"),
    Fault(_PIXELS, "the first cell of a shrinking row is that of the row", "cells[cell - first_cell]", "cells[cell]"),
    Fault(_PIXELS, "the first tile of a view is the last of the one before",
          ">= launch.view[index + 1].first_block", "> launch.view[index + 1].first_block"),
    Fault(_PIXELS, "rows of pixels past the last", "min(top + view.rows, view.height)", "top + view.rows", "addresses"),
    Fault(_PIXELS, "columns of pixels past the last", "if (start + i * by < right) store", "store", "addresses"),
    Fault(_PIXELS, "vectors past the last column", "      if (start < right) {\n", "      {\n"),
    Fault(_PIXELS, "pixels before all rows are there", f"  {WAIT}\n  if (own_row >= at_once) return;",
          "  if (own_row >= at_once) return;"),
)

CAPTURE = (
    Fault(_COMMON, "the last visible key is lost", "last < 0 ? -1 : static_cast<int>(last)",
          "last < 0 ? -1 : static_cast<int>(last) - 1"),
    Fault(_COMMON, "a window one key longer", "last - p.window + 1", "last - p.window"),
    Fault(_COMMON, "a token past the last key", "key >= 0 && key < p.keys ? static_cast<int>(key) : -1",
          "static_cast<int>(key)", "addresses"),
    Fault(_TILE, "columns in the order of the keys",
          "return 16 * (tile / 2) + 4 * (g / 2) + 2 * (tile % 2) + g % 2;", "return 8 * tile + g;"),
    Fault(_TILE, "the words of the other step", "keys[i][j].z, keys[i][j].w", "keys[i][j].x, keys[i][j].y"),
    Fault(_TILE, "the lower queries are the upper", "tile * 16 + 8 + lane.g", "tile * 16 + lane.g"),
    Fault(_TILE, "elements past the end of a head", "if (kWhole || 32 * j + 8 * lane.t < size) ", "", "addresses"),
    Fault(_TILE, "odd steps are lost", " + odd[tile][n / 2][2 * h + n % 2]", ""),
    Fault(_TILE, "pieces past the last are staged", "if (piece >= pieces) break;", ""),
    Fault(_STREAM, "multiply before the queries are staged", f"{WAIT}\n\n  while (base < end)",
          "\n  while (base < end)"),
    Fault(_HIDE, "hidden keys count",
          "if (!query.visible.has(base + key_of_score(n, lane.t))) scores[n] = -INFINITY;", ""),
    Fault(_HIDE, "masked keys count", "!mask_has(p, problem.batch, head, row, key)", "false"),
    Fault(_HIDE, "no softcap", "if (kGeneral && launch.logit.changes())", "if (false)"),
    Fault(_STREAM, "clipped a block too far", "(first - base) / S::kBlockKeys * S::kBlockKeys",
          "(first - base + S::kBlockKeys - 1) / S::kBlockKeys * S::kBlockKeys"),
    Fault(_STREAM, "tiles at the ends of the tokens are not stored",
          "base <= high && base + S::kTileKeys - 1 >= low", "base + S::kTileKeys <= high && base >= low"),
    Fault(_STREAM, "sums keep an old maximum", "sum = sum * exp2_fast(top - larger) + ", "sum = sum + "),
    Fault(_STREAM, "half of the lanes of a query", "distance = 1; distance < 4", "distance = 1; distance < 2"),
    Fault(_STREAM, "queries are overwritten while they are used",
          f"  {WAIT}\n#pragma unroll 1\n  for (int tile = 0; tile < tiles; ++tile) {{\n    float4 state",
          "#pragma unroll 1\n  for (int tile = 0; tile < tiles; ++tile) {\n    float4 state"),
    Fault(_STREAM, "merged before all warps have stored",
          f"  {WAIT}\n#pragma unroll 1\n  for (int number = threadIdx.x; number < min(",
          "#pragma unroll 1\n  for (int number = threadIdx.x; number < min("),
    Fault(_STREAM, "the next keys before the last product", "if (tile + Q::kTiles >= tiles && next < end)",
          "if (next < end)"),
    Fault(_STREAM, "the queries of another group",
          "head += key_head * group;", "head += key_head;"),
    Fault(_STREAM, "keys past the last", "min(start + column, last_key)", "(start + column)", "addresses"),
    Fault(_MERGE, "splits merged without their maxima", "others[i].y * exp2_fast(others[i].x - larger)", "others[i].y"),
    Fault(_MERGE, "the sink of another scale", "exp2_fast(above(launch.logit, load(layer.sink + head), top))",
          "exp2_fast(load(layer.sink + head) * kLog2E)"),
    Fault(_MERGE, "entropies without weights", "fmaf(share, parts[number].entropy, entropy_term(share))",
          "parts[number].entropy + entropy_term(share)"),
    Fault(_MERGE, "the last block alone has a fence",
          "fence();\n  const bool is_last = atomicAdd(ticket, 1u) + 1 == static_cast<unsigned>(blocks);\n  fence();",
          "const bool is_last = atomicAdd(ticket, 1u) + 1 == static_cast<unsigned>(blocks);\n  if (is_last) fence();",
          "races"),
    Fault(_MERGE, "a ticket without an atomic", "const bool is_last = atomicAdd(ticket, 1u) + 1 ==",
          "const unsigned taken = load_coherent(ticket);\n  store(ticket, taken + 1);\n"
          "  const bool is_last = taken + 1 =="),
    Fault(_MERGE, "a ticket is left", "if (is_last) atomicExch(ticket, 0u);", ""),
    Fault(_MERGE, "the block before the last summarizes",
          "atomicAdd(ticket, 1u) + 1 ==", "atomicAdd(ticket, 1u) + 2 =="),
    Fault(_MAPS, "scores before they are written", "if (chunk == 0) wait_for_launch();", ""),
    Fault(_MAPS, "two merging lanes are skipped", "distance = 1; distance < 4", "distance = 1; distance < 2"),
    Fault(_MAPS, "hidden tokens have a share", "key >= 0 && visible.has(key)", "key >= 0"),
    Fault(_MAPS, "probabilities before the splits are merged", f"        {WAIT}\n      }}", "      }"),
    Fault(_MAPS, "store past the last token", "if (!kEach && token < p.token_count)", "if (!kEach)", "addresses"),
    Fault(_MAPS, "padding is used", "lanes_sum<32>(key >= 0 ? 1.0f : 0.0f)", "lanes_sum<32>(1.0f)"),
    Fault(_MAPS, "a part before all warps have theirs", f"  {WAIT}\n  if (threadIdx.x >= 32) return;",
          "  if (threadIdx.x >= 32) return;"),
    Fault(_MAPS, "the parts of the other warps are lost",
          "int count = launch.token_chunks * kWarps;", "int count = 1;"),
    Fault(_REREAD, "statistics before they are written", "if (waits) wait_for_launch(), waits = false;", ""),
    Fault(_REREAD, "queries are replaced while they are used",
          f"      {WAIT}\n      stage_queries", "      stage_queries"),
    Fault(_REREAD, "multiply keys again before the queries are staged",
          f"      {WAIT}\n#pragma unroll 1\n      for (int tile",
          "#pragma unroll 1\n      for (int tile"),
    Fault(_REREAD, "the rows of other lanes are lost",
          "if (rows.shift <= 2) sums[0][n] +=", "if (false) sums[0][n] +="),
    Fault(_REREAD, "the rows of another block", "row = rows.begin + local", "row = local"),
    Fault(_REREAD, "the keys of the same head again", "load_tile(key_head + 1)", "load_tile(key_head)"),
    Fault(_REREAD, "masked tokens have a share", "!mask_has(p, problem.batch, head, row, key)", "false"),
    Fault(_REREAD, "the part of a row before all warps have theirs", f"  {WAIT}\n  // Eight lanes a row",
          "  // Eight lanes a row"),
    Fault(_REREAD, "sums replace queries that are still used", f"  {WAIT}\n  float* own", "  float* own"),
    Fault(_REREAD, "padded rows are stored", "own_row < rows.count;", "true;", "addresses"),
    Fault(_PLAIN, "multiply before all is staged", f"      {WAIT}\n      float scores", "      float scores"),
    Fault(_PLAIN, "keys are replaced while they are used", f"    {WAIT}\n#pragma unroll 4\n    for (int item",
          "#pragma unroll 4\n    for (int item"),
    Fault(_PLAIN, "every tile has the first queries", "if (!is_staged || count > kTileQueries)", "if (!is_staged)"),
    Fault(_PLAIN, "plain sums keep an old maximum", "state.y * exp2_fast(state.x - top) + sum", "state.y + sum"),
    Fault(_PLAIN, "keys seen by the last row alone", "visible.first < base + kTileKeys && visible.last >= base",
          "visible.first < base + kTileKeys && visible.last >= base && row == rows - 1"),
    Fault(_PLAIN, "the query of another row",
          "query % rows * layer.query_strides[2]", "query / rows * layer.query_strides[2]"),
    Fault(_PLAIN, "elements of another key", "load(from + (base + key) * layer.key_strides[2] + element)",
          "load(from + base * layer.key_strides[2] + element)"),
    Fault(_PLAIN, "the highest token of half a warp", "for (int distance = 16; distance > 0; distance /= 2) {\n    low",
          "for (int distance = 8; distance > 0; distance /= 2) {\n    low"),
)

ATTENTION = (
    Fault(_ATTEND, "values of the next keys",
          "key_at(16 * step + 4 * lane.t + i)", "key_at(16 * step + 4 * lane.t + 3 - i)"),
    Fault(_ATTEND, "elements past the end of a value",
          "if (kWhole || 64 * piece + 8 * lane.g < size) ", "", "addresses"),
    Fault(_ATTEND, "the halves of two words in another order",
          "low_halves(third, fourth),\n", "low_halves(fourth, third),\n"),
    Fault(_ATTEND, "the second half of the keys is lost", "multiply_add(outputs[piece][m], a, low, high, T());",
          "multiply_add(outputs[piece][m], a, low, 0u, T());"),
    Fault(_ATTEND, "multiply before the query is staged", f"{WAIT}\n\n  while (base < end)", "\n  while (base < end)"),
    Fault(_ATTEND, "values that a window hides",
          "max(min(key, visible.last), visible.first)", "min(key, capture.keys - 1)"),
    Fault(_ATTEND, "values that a mask hides",
          "if (kGeneral && p.mask != nullptr) hide_values", "if (false) hide_values"),
    Fault(_ATTEND, "queries that do not exist see keys", "exists && scores[n] != -INFINITY", "scores[n] != -INFINITY"),
    Fault(_ATTEND, "values that another head sees are hidden",
          "distance = 4; distance < 32", "distance = 4; distance < 4"),
    Fault(_ATTEND, "started a block too late", "(visible.first - base) / S::kBlockKeys * S::kBlockKeys",
          "(visible.first - base + S::kBlockKeys - 1) / S::kBlockKeys * S::kBlockKeys"),
    Fault(_ATTEND, "ends before the last visible key", "visible.last + 1);", "visible.last);"),
    Fault(_ATTEND, "the query of another head", "first_head = key_head * capture.group + first_query;",
          "first_head = key_head * capture.group;"),
    Fault(_ATTEND, "scores around the tokens alone inside", "base <= high && base + S::kTileKeys - 1 >= low",
          "base >= low && base + S::kTileKeys - 1 <= high"),
    Fault(_ATTEND, "lanes of a query with maxima of their own",
          "    larger = fmaxf(larger, __shfl_xor_sync(kAllLanes, larger, 2));\n", ""),
    Fault(_ATTEND, "outputs keep an old maximum", "outputs[piece][m][i] *= i % 2 == 0 ? first_shrink : second_shrink;",
          "outputs[piece][m][i] *= 1.0f;"),
    Fault(_ATTEND, "outputs shrink by another query", "i % 2 == 0 ? first_shrink", "i / 2 == 0 ? first_shrink"),
    Fault(_ATTEND, "the sum keeps an old maximum", "sum = sum * shrink + ", "sum = sum + "),
    Fault(_ATTEND, "a lane's keys alone are summed", "  sum += __shfl_xor_sync(kAllLanes, sum, 2);\n", ""),
    Fault(_ATTEND, "warps are merged before all have stored",
          f"  {WAIT}\n  // The warps as one", "  // The warps as one"),
    Fault(_ATTEND, "warps are merged without their maxima",
          "exp2_fast(shared.stats[warp][number].x - total.x)", "1.0f"),
    Fault(_ATTEND, "outputs of queries that do not exist", "item < count * quarters", "item < kQueries * quarters",
          "addresses"),
    Fault(_FINISH, "outputs before they are written", "  wait_for_launch();\n", ""),
    Fault(_FINISH, "splits in turns of one warp", "split = warp; split < splits", "split = 0; split < splits"),
    Fault(_FINISH, "outputs of the splits without their maxima", "exp2_fast(stats[i].x - larger)", "1.0f"),
    Fault(_FINISH, "outputs are added before all warps have theirs", f"  {WAIT}\n  float2 total", "  float2 total"),
    Fault(_FINISH, "one warp has the sum of all", "exp2_fast(shared.stats[other].x - normal.x) * normal.y",
          "normal.y"),
    Fault(_FINISH, "the elements past 128 are lost",
          "start < size; start += 128", "start < min(size, 128); start += 128"),
    Fault(_FINISH, "the output of another head", "head * value.output_strides[1];", "head * value.size;"),
    Fault(_FINISH, "the other type", "is_half ? pack(even, odd, __half())", "!is_half ? pack(even, odd, __half())"),
    Fault(_ATTENTION, "the span is not sought", "launch_span(capture, span);", ""),
)
# fmt: on

FAULTS = (*SELECT, *LABEL, *RANK, *CONTRAST, *CAPTURE, *ATTENTION)
