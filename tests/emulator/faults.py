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
_STATS = "capture/stats.cuh"
_MAPS = "capture/maps.cuh"
_TILE = "capture/tile.cuh"

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

CAPTURE = (
    Fault(_STATS, "multiply before the queries are staged",
          f"stage_queries<S>(p, layer, batch, part, tile);\n      {WAIT}",
          "stage_queries<S>(p, layer, batch, part, tile);"),
    Fault(_STATS, "sum before the scores are stored", f"{WAIT}\n      for (int index = threadIdx.x / 32",
          "for (int index = threadIdx.x / 32"),
    Fault(_STATS, "hidden keys count", "key < last && visible.at(key) ?", "key < last ?"),
    Fault(_STATS, "keys past the last", "first + slot + u < last ?", "true ?"),
    Fault(_STATS, "passes merged without their maxima", "before.y * exponential(before.x, offset)", "before.y"),
    Fault(_STATS, "every pass is the first", "    is_first = false;\n", ""),
    Fault(_STATS, "tickets are not reset",
          "store(launch.tickets + blockIdx.z * p.batch + batch, 0u);", "{}"),
    Fault(_TILE, "the sum of half a warp", "for (int lane = 16; lane > 0; lane /= 2) value += ",
          "for (int lane = 8; lane > 0; lane /= 2) value += "),
    Fault(_TILE, "a lane sends what it should keep", "upper ? values[i] : values[i + kHalf]",
          "upper ? values[i + kHalf] : values[i]"),
    Fault(_TILE, "the last visible key is lost",
          "last < p.keys ? last + 1 : p.keys", "last < p.keys ? last : p.keys"),
    Fault(_TILE, "a window one key longer", "last - p.window + 1", "last - p.window"),
    Fault(_MAPS, "splits merged without their maxima",
          "sum * exponential(top, offset) + other_sum * exponential(other_top, offset)", "sum + other_sum"),
    Fault(_MAPS, "two merging lanes are skipped", "distance > 0; distance /= 2", "distance > 1; distance /= 2"),
    Fault(_MAPS, "the sink in every lane", "if (member == 0 && layer.sink != nullptr)", "if (layer.sink != nullptr)"),
    Fault(_MAPS, "the query head of another group", "head * (p.heads / p.key_heads) + query / rows : 0",
          "head + query / rows : 0"),
    Fault(_MAPS, "read tokens before they are stored", f"{WAIT}\n\n  for (int head = 0", "for (int head = 0"),
    Fault(_MAPS, "multiply before all is merged", f"{WAIT}\n      fill_values", "fill_values", "races"),
    Fault(_MAPS, "add heads before they are stored", f"{WAIT}\n      add_heads", "add_heads"),
    Fault(_MAPS, "hidden tokens have a share", "key >= 0 && visible_to(p, batch, query_head, row).at(key)", "key >= 0"),
    Fault(_MAPS, "sums of heads are not initialized", "part.head == 0 && part.begin == 0 ? 0.0f : shared.mean[item]",
          "shared.mean[item]"),
    Fault(_MAPS, "store past the last token", "if (token >= p.token_count) continue;", ""),
    Fault(_MAPS, "store heads past the last token", "head < p.key_heads && first + token < p.token_count",
          "head < p.key_heads"),
    Fault(_MAPS, "total before all warps have stored", f"{WAIT}\n  float total", "float total"),
    Fault(_MAPS, "padding is used", "used += key >= 0 && key < p.keys ? 1.0f : 0.0f;", "used += 1.0f;"),
    Fault(_MAPS, "a ticket before all have stored", f"{WAIT}\n  if (threadIdx.x == 0) {{\n    __threadfence",
          "if (threadIdx.x == 0) {\n    __threadfence", "races"),
    Fault(_MAPS, "a ticket without a fence", "__threadfence();\n    const unsigned", "const unsigned", "races"),
    Fault(_MAPS, "tickets without an atomic", "atomicAdd(launch.tickets + blockIdx.z * p.batch + batch, 1u);",
          "load_coherent(launch.tickets + blockIdx.z * p.batch + batch);\n"
          "    store(launch.tickets + blockIdx.z * p.batch + batch, ticket + 1);"),
    Fault(_MAPS, "the block before the last summarizes", "ticket + 1 ==", "ticket + 2 =="),
)
# fmt: on

FAULTS = (*SELECT, *LABEL, *RANK, *CAPTURE)
