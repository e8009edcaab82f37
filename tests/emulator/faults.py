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
_DIGITS = "regions/digits.cuh"
_LABEL = "regions/label.cu"
_RANK = "regions/rank.cu"
_JOIN = "regions/join.cu"
_UNION = "regions/union.cuh"
_COMMON = "capture/capture.cuh"
_TILE = "capture/tile.cuh"
_STREAM = "capture/stream.cuh"
_MERGE = "capture/merge.cuh"
_MAPS = "capture/maps.cuh"
_REREAD = "capture/reread.cuh"
_PLAIN = "capture/plain.cu"

# fmt: off
SELECT = (
    Fault(_SELECT, "count before all counters are cleared",
          f"      }}\n      {WAIT}\n    }}", "      }\n    }"),
    Fault(_SELECT, "add the counts before all are counted",
          f"  {WAIT}\n  for (uint32_t digit", "  for (uint32_t digit"),
    Fault(_SELECT, "add the counts before those of all blocks are cleared",
          "if constexpr (kPass == 0) wait_for_launch();", ""),
    Fault(_SELECT, "find the digit before all blocks have counted",
          "wait_for_launch();\n        prefix", "prefix"),
    Fault(_SELECT, "count without an atomic",
          "atomicAdd(&shared.counts[(key >> shift_after<T>(kPass)) % kCounts], 1u)",
          "shared.counts[(key >> shift_after<T>(kPass)) % kCounts] += 1u", "races"),
    Fault(_SELECT, "add the counts without an atomic",
          "atomicAdd(&state->counts[counts_before<T>(kPass) + digit], shared.counts[digit])",
          "state->counts[counts_before<T>(kPass) + digit] += shared.counts[digit]", "races"),
    Fault(_SELECT, "count past the last pixel", "step < steps; ++step) count", "step <= steps; ++step) count",
          "addresses"),
    Fault(_SELECT, "a thread at the end of the image counts one pixel", "step < steps; ++step) count",
          "step < 1; ++step) count"),
    Fault(_SELECT, "the first pixels of a block again", "static_cast<const T*>(job.saliency) + start + threadIdx.x;",
          "static_cast<const T*>(job.saliency) + blockIdx.x * kPixels<T> + threadIdx.x;"),
    Fault(_SHARED, "a step short at the end of the image", "(job.count - first + stride - 1) / stride",
          "(job.count - first) / stride"),
    Fault(_SELECT, "count the digits of other prefixes", "leading == prefix", "leading >= prefix"),
    Fault(_SELECT, "the next value is this one", "leading > prefix)", "leading >= prefix)"),
    Fault(_SELECT, "the least of half a warp", "int with = 16", "int with = 8"),
    Fault(_SELECT, "the least of one warp", "lane_of_thread() < kThreads / 32 ?", "lane_of_thread() < 1 ?"),
    Fault(_SELECT, "the least of a block before all warps have theirs",
          f"= least;\n  {WAIT}\n  least", "= least;\n  least"),
    Fault(_SELECT, "the greatest before the least is read",
          f"    {WAIT}\n    greatest = ~", "    greatest = ~", "races"),
    Fault(_SELECT, "a pass does not hand on its rank", "store(&state->rank[kPass], picked.rank);", ""),
    Fault(_SELECT, "counters are left", "kMostCounts / kClearedCounts, kBlockThreads", "1, kBlockThreads"),
    Fault(_DIGITS, "negative values in the wrong order", "(bits & kTop) ? ~BitsOf<T>(0) : kTop", "kTop"),
    Fault(_DIGITS, "a lane short in the scan of counts", "lane_of_thread() >= by", "lane_of_thread() > by"),
    Fault(_DIGITS, "search the rank before all warps have summed", f"{WAIT}\n  before -= sum;", "before -= sum;"),
    Fault(_DIGITS, "the next digit of another thread alone", "range[index] != 0 && next == kCounts", "false"),
    Fault(_DIGITS, "the next digit of the same thread alone", "const bool is_after = before > rank && sum != 0;",
          "const bool is_after = false;"),
    Fault(_DIGITS, "read the next digit before all have searched",
          f"{WAIT}\n  return shared.picked;", "return shared.picked;"),
    Fault(_DIGITS, "the next digit without an atomic",
          "atomicMin(&shared.picked.next, next);", "shared.picked.next = next;", "races"),
)

LABEL = (
    Fault(_LABEL, "the threshold from the farther end",
          "job.from_above ? __fsub_rn(above, part)", "!job.from_above ? __fsub_rn(above, part)"),
    Fault(_LABEL, "an infinite threshold has regions",
          "high >= static_cast<double>(found.value) ? Reason::kNone : Reason::kNoPixel", "Reason::kNone"),
    Fault(_LABEL, "read past the edge of the image",
          "tile.has(job, row, lane) ? load(from + tile.pixel(job, row, lane)) : T(0)",
          "load(from + tile.pixel(job, row, lane))", "addresses"),
    Fault(_LABEL, "pixels past the edge of the image",
          "tile.has(job, row, lane) && values[step] >= threshold.value", "values[step] >= threshold.value"),
    Fault(_LABEL, "label past the edge of the image", "if (tile.has(job, row, lane)) {", "{", "addresses"),
    Fault(_LABEL, "find the threshold before the selection has ended",
          "wait_for_launch();\n      threshold", "threshold"),
    Fault(_LABEL, "join before all rows have labels",
          f"head_of(above, row - 1, first);\n  }}\n  {WAIT}\n", "head_of(above, row - 1, first);\n  }\n"),
    Fault(_LABEL, "an empty tile before all rows are known",
          f"shared.bits[row] = bits;\n  }}\n  {WAIT}\n", "shared.bits[row] = bits;\n  }\n"),
    Fault(_LABEL, "a tile with nothing in half of its rows is empty", "(shared.bits[lane] | shared.bits[32 + lane])",
          "shared.bits[lane]"),
    Fault(_LABEL, "roots before all rows are joined",
          f"head_of(above, row - 1, other));\n    }}\n  }}\n  {WAIT}\n",
          "head_of(above, row - 1, other));\n    }\n  }\n"),
    Fault(_LABEL, "count parts before all rows have theirs",
          f"  {WAIT}\n  const uint32_t first_part", "  const uint32_t first_part"),
    Fault(_LABEL, "number parts before they are counted",
          f"? number_parts(job, shared) : 0;\n  {WAIT}", "? number_parts(job, shared) : 0;"),
    Fault(_LABEL, "sum before all parts have numbers",
          f"first_part;\n  {WAIT}\n", "first_part;\n"),
    Fault(_LABEL, "store parts before all warps have summed",
          f"above = bits;\n  }}\n  {WAIT}\n", "above = bits;\n  }\n"),
    Fault(_LABEL, "rows of other warps are not joined", "row > 0 ? shared.bits", "false ? shared.bits"),
    Fault(_LABEL, "the first run above of a warp's first row is lost", "if (row > begin) touched", "touched"),
    Fault(_LABEL, "joined to the first run above alone",
          "touched &= touched - 1;\n    for (", "touched = 0;\n    for ("),
    Fault(_LABEL, "runs end at their first pixel", "from_here & ((gaps & (0u - gaps)) - 1)",
          "from_here & (0u - from_here)"),
    Fault(_LABEL, "runs of the rest of the row", "gaps == 0 ? from_here :", "true ? from_here :"),
    Fault(_LABEL, "no corner on the right", "run | run << 1 | run >> 1", "run | run >> 1"),
    Fault(_LABEL, "no corner on the left", "run | run << 1 | run >> 1", "run | run << 1"),
    Fault(_LABEL, "one run above of several", "for (; touched != 0; touched &= touched - 1)",
          "for (; touched != 0; touched = 0)"),
    Fault(_LABEL, "corners with four neighbours", "is_eight ? run | run << 1", "true ? run | run << 1"),
    Fault(_LABEL, "two parts with one number",
          "__popc(firsts & (lanes_up_to(lane) >> 1))", "__popc(firsts & lanes_up_to(lane) >> 2)"),
    Fault(_LABEL, "the parts of the rows above are lost",
          "shared.before[2 * lane + 1] = before + counts[0];", "shared.before[2 * lane + 1] = before;"),
    Fault(_LABEL, "a lane short in the scan of rows",
          "if (lane >= by) before += other;", "if (lane > by) before += other;"),
    Fault(_LABEL, "numbers of tiles without an atomic", "parts == 0 ? 0 : atomicAdd(&job.state->parts, parts)",
          "parts == 0 ? 0 : (job.state->parts += parts) - parts", "races"),
    Fault(_LABEL, "sums without an atomic", "atomicAdd(&shared.amounts[number], sums.amount);",
          "shared.amounts[number] += sums.amount;", "races"),
    Fault(_LABEL, "columns without an atomic", "atomicOr(&shared.columns[number], ",
          "shared.columns[number] |= (", "races"),
    Fault(_LABEL, "the last row of a part without an atomic",
          "atomicMax(&shared.bottoms[number], static_cast<int32_t>(row));",
          "shared.bottoms[number] = static_cast<int32_t>(row);"),
    Fault(_LABEL, "sums past the first lane", "lane >= first + by", "lane >= by"),
    Fault(_LABEL, "half of the lanes side by side", "longer &= longer << by;", "longer &= longer << by + 1;"),
    Fault(_LABEL, "the pixels above are lost", "sums.amount += amount;", "sums.amount = amount;"),
    Fault(_LABEL, "the pixels above are counted twice", "sums.ends = bits & ~below;", "sums.ends = bits;"),
    Fault(_LABEL, "the columns of the last lane alone",
          "lanes_up_to(lane) & ~(lanes_up_to(first) >> 1)", "1u << lane"),
    Fault(_LABEL, "sums rounded down", "__double2ll_rn(", "static_cast<long long>("),
    Fault(_LABEL, "boxes a row short", "shared.bottoms[index] + 1", "shared.bottoms[index]"),
    Fault(_LABEL, "the number of a part above", "if (!has_bit(above, lane)) {", "if (row == begin) {"),
)

JOIN = (
    Fault(_UNION, "a lost race is not repeated", "if (atomicCAS(of.parents + high, high, low) == high) return;",
          "atomicCAS(of.parents + high, high, low);\n    return;"),
    Fault(_UNION, "join without an atomic", "if (atomicCAS(of.parents + high, high, low) == high) return;",
          "if (of.parents[high] == high) {\n      of.parents[high] = low;\n      return;\n    }", "races"),
    Fault(_UNION, "the parent of a root follows it", "if (high < low) {", "if (high > low) {"),
    Fault(_UNION, "shorten the path without an atomic",
          "atomicMin(of.parents + node, grandparent);", "of.parents[node] = grandparent;", "races"),
    Fault(_JOIN, "join before there are parts",
          "  wait_for_launch();\n  if (has_reason(job.state)) return;\n  const DeviceParents",
          "  if (has_reason(job.state)) return;\n  const DeviceParents"),
    Fault(_JOIN, "upright edges alone", "upright + (job.height - 1) / kTileHeight * width;", "upright;"),
    Fault(_JOIN, "level edges alone", "(width - 1) / kTileWidth * job.height;", "0;"),
    Fault(_JOIN, "joined where one of the parts goes on",
          "parts[0] != before[0] || parts[1] != before[1]", "parts[0] != before[0] && parts[1] != before[1]"),
    Fault(_JOIN, "no corner down", "if (parts[0] != kOff && before[0] == kOff && before[1] != kOff)", "if (false)"),
    Fault(_JOIN, "no corner up", "if (parts[1] != kOff && before[1] == kOff && before[0] != kOff)", "if (false)"),
    Fault(_JOIN, "edges before the first pixel", "const bool is_first = at == 0;", "const bool is_first = false;"),
    Fault(_JOIN, "add before all are joined",
          "  wait_for_launch();\n  if (has_reason(job.state)) return;\n  const uint32_t lane",
          "  if (has_reason(job.state)) return;\n  const uint32_t lane"),
    Fault(_JOIN, "the number of regions without an atomic",
          "number = atomicAdd(&job.state->regions, static_cast<uint32_t>(__popc(roots)));",
          "{\n      number = job.state->regions;\n      job.state->regions = number + __popc(roots);\n    }", "races"),
    Fault(_JOIN, "two regions with one number", "__popc(roots & ((1u << lane) - 1))", "__popc(roots & (1u << lane))"),
    Fault(_JOIN, "the root of a part is not handed on",
          "atomicMin(job.parents + part, static_cast<int32_t>(root));", ""),
    Fault(_JOIN, "add without an atomic", "atomicAdd(job.amounts + root, amount);",
          "job.amounts[root] += amount;", "races"),
    Fault(_JOIN, "the first pixel of another part",
          "atomicMin(job.firsts + root, load_coherent(job.firsts + part));", ""),
    Fault(_JOIN, "the pixels of a part are lost",
          "if (job.score == Score::kMean) atomicAdd(job.pixels + root, load_coherent(job.pixels + part));", ""),
    Fault(_JOIN, "the left edge of the root alone", "atomicMin(job.left + root, load_coherent(job.left + part));", ""),
    Fault(_JOIN, "the right edge without an atomic", "atomicMax(job.right + root, load_coherent(job.right + part));",
          "store(job.right + root, load_coherent(job.right + part));", "races"),
    Fault(_JOIN, "the lower edge of the root alone",
          "atomicMax(job.bottom + root, load_coherent(job.bottom + part));", ""),
)

RANK = (
    Fault(_RANK, "sort before the tile is loaded", f"{WAIT}\n    for (uint32_t width", "for (uint32_t width"),
    Fault(_RANK, "sort without waiting for the warp", "is_near ? __syncwarp() : __syncthreads();",
          "if (!is_near) __syncthreads();", "races"),
    Fault(_RANK, "sort without waiting for other warps", "is_near ? __syncwarp() : __syncthreads();", "__syncwarp();"),
    Fault(_RANK, "pairs of other warps are near", "distance <= 32 :", "distance <= 64 :"),
    Fault(_RANK, "the last of a warp's pairs are near",
          "width <= 32 && width < padded", "width <= 64 && width < padded"),
    Fault(_RANK, "ties by the last pixel", "first < other_first", "first > other_first"),
    Fault(_RANK, "the score of a root is not handed on", "store(job.amounts + root, key);", ""),
    Fault(_RANK, "ties of two runs by the last pixel",
          "load_settled(sorted.firsts + at[i] + by - 1) < than[i].first",
          "load_settled(sorted.firsts + at[i] + by - 1) > than[i].first"),
    Fault(_RANK, "merged with itself", " && group + threadIdx.x * run != own_begin", ""),
    Fault(_RANK, "search the last run past its end", "return regions - begin < length ? regions : begin + length;",
          "return begin + length;", "addresses"),
    Fault(_RANK, "search before the block knows where",
          f"before;\n    {WAIT}\n    uint32_t place", "before;\n    uint32_t place"),
    Fault(_RANK, "the next elements before all have their places", f"    }}\n    {WAIT}\n  }}\n}}", "    }\n  }\n}"),
    Fault(_RANK, "the runs of one warp alone", "warp < kBlockThreads / 32; ++warp) place", "warp < 1; ++warp) place"),
    Fault(_RANK, "fewer searches than runs",
          "other < runs; other += kSearches", "other + 1 < runs; other += kSearches"),
    Fault(_RANK, "the longest search alone", "ends[i] - at[i] > longest ?", "i == 0 ?"),
    Fault(_RANK, "stop at the place of a block's last element", "block_end - 1)});", "start)});"),
    Fault(_RANK, "leave out kept elements", "if (place < kept && start", "if (place + 1 < kept && start"),
    Fault(_RANK, "keep more than there are", "return limit < regions ? static_cast<uint32_t>(limit) : regions;",
          "return static_cast<uint32_t>(limit);", "addresses"),
    Fault(_RANK, "the share rounded", "__dmul_rn(static_cast<double>(regions), job.keep))",
          "__dmul_rn(static_cast<double>(regions), job.keep) + 0.5)"),
    Fault(_RANK, "one row too many after the outcome", "index < job.outcome_rows", "index <= job.outcome_rows"),
    Fault(_RANK, "the scores of other rows", "6 + 4 * job.outcome_rows + index", "6 + 4 * job.outcome_rows"),
    Fault(_RANK, "the box of a part", "load_settled(job.parents + load_settled(job.labels + region.first))",
          "load_settled(job.labels + region.first)"),
    Fault(_RANK, "the box of another edge", "edge < 2", "edge < 1"),
    Fault(_RANK, "the union box without an atomic", "atomicMin(address, value)", "*address = value", "races"),
    Fault(_RANK, "the mask has all regions", "is_whole || keys[step] < last.key", "is_whole || labels[step] != kOff"),
    Fault(_RANK, "the mask has all ties", "load_settled(job.firsts + labels[step]) <= last.first", "true"),
    Fault(_RANK, "the mask lacks the last region", "load_settled(job.firsts + labels[step]) <= last.first",
          "load_settled(job.firsts + labels[step]) < last.first"),
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
    Fault(_STREAM, "hidden keys count",
          "if (!query.visible.has(base + key_of_score(n, lane.t))) scores[n] = -INFINITY;", ""),
    Fault(_STREAM, "masked keys count", "!mask_has(p, problem.batch, head, row, key)", "false"),
    Fault(_STREAM, "no softcap", "if (kGeneral && launch.logit.changes())", "if (false)"),
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
# fmt: on

FAULTS = (*SELECT, *LABEL, *JOIN, *RANK, *CAPTURE)
