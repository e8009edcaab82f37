"""The faults that are planted in the CUDA kernels, and which check has to catch each."""

from __future__ import annotations

from typing import NamedTuple


class Fault(NamedTuple):
    """A change of one place of a source.

    =====  ====  =======================================================================================
    name   type  meaning
    =====  ====  =======================================================================================
    name   str   what is wrong
    file   str   in csrc/cuda
    old    str   what stands there
    new    str   what is put in its place
    check  str   "results"; "addresses" (AddressSanitizer) or "races" (ThreadSanitizer) where results stay
    place  int   which of the occurrences of `old` is changed, from 1
    count  int   how many there are
    =====  ====  =======================================================================================
    """

    name: str
    file: str
    old: str
    new: str
    check: str = "results"
    place: int = 1
    count: int = 1

    @property
    def stage(self) -> str:
        return self.file.partition(".")[0].partition("_")[0]


_SELECT, _LABEL, _RANK, _SHARED = "regions_select.cu", "regions_label.cu", "regions_rank.cu", "regions.h"
_BARRIER = "__syncthreads();"

FAULTS = (
    Fault("count before all counters are cleared", _SELECT, f"  {_BARRIER}\n\n  const int shift", "  const int shift"),
    Fault("add the counts before all are counted", _SELECT, f"  {_BARRIER}\n  for (uint32_t digit", "  for (uint32_t digit"),
    Fault(
        "count without an atomic",
        _SELECT,
        "atomicAdd(&shared.counts[(keys[step] >> shift) & digit_mask], 1u)",
        "shared.counts[(keys[step] >> shift) & digit_mask] += 1u",
        "races",
    ),
    Fault(
        "add the counts without an atomic",
        _SELECT,
        "atomicAdd(&state->counts[pass][digit], shared.counts[digit])",
        "state->counts[pass][digit] += shared.counts[digit]",
        "races",
    ),
    Fault("read past the last pixel", _SELECT, "pixel < job.count ? key_of(load(values + pixel)) : 0",
          "key_of(load(values + pixel))", "addresses"),
    Fault("count past the last pixel", _SELECT,
          "if (start + step * kBlockThreads + threadIdx.x >= job.count) break;", ""),
    Fault("count the digits of other prefixes", _SELECT, "leading == prefix", "leading >= prefix"),
    Fault("the next value is this one", _SELECT, "leading > prefix)", "leading >= prefix)"),
    Fault("the least of half a warp", _SELECT, "int with = 16", "int with = 8", place=1, count=2),
    Fault("the greatest of half a warp", _SELECT, "int with = 16", "int with = 8", place=2, count=2),
    Fault("a pass leaves its rank to the next", _SELECT, "store(&state->rank[pass], picked.rank);", ""),
    Fault("negative values in the wrong order", _SHARED, "(bits & kTop) ? ~BitsOf<T>(0) : kTop", "kTop"),
    Fault("a lane short in the scan of counts", _SHARED, "lane_of_thread() >= by", "lane_of_thread() > by"),
    Fault("look for the rank before all warps have summed", _SHARED, f"{_BARRIER}\n  before -= sum;", "before -= sum;"),
    Fault("look for the next digit before there is one", _SHARED, f"{_BARRIER}\n  uint32_t next", "uint32_t next"),
    Fault("read the next digit before all have looked", _SHARED, f"{_BARRIER}\n  return shared.picked;",
          "return shared.picked;"),
    Fault("the next digit without an atomic", _SHARED, "atomicMin(&shared.picked.next, next);",
          "shared.picked.next = next;"),
    Fault("the threshold from the farther end", _LABEL, "job.from_above ? __fsub_rn(above, part) : __fadd_rn(below, part)",
          "job.from_above ? __fadd_rn(below, part) : __fsub_rn(above, part)"),
    Fault("an infinite threshold has regions", _LABEL, "high >= static_cast<double>(threshold) ? Reason::kNone : Reason::kNoPixel",
          "Reason::kNone"),
    Fault("runs go on in the next row", _LABEL, "bits & (row_starts | ~(bits << 1 | goes_on))", "bits & ~(bits << 1 | goes_on)"),
    Fault("runs end with a step", _LABEL, "      goes_on = all >> 31;\n", ""),
    Fault("the head of another lane", _LABEL, "head = __shfl_sync(kAllLanes, runs.head, 31);",
          "head = __shfl_sync(kAllLanes, runs.head, 30);", place=1, count=2),
    Fault("label past the last pixel", _LABEL, "if (pixel < job.count) store(job.labels + pixel",
          "store(job.labels + pixel", "addresses"),
    Fault("runs end with a chunk", _LABEL, "if (has_left && pixel % kChunkPixels == 0)", "if (false)"),
    Fault("runs joined at their first pixel alone", _LABEL, "if (!has_left || !is_on(above - 1))", "if (!has_left)"),
    Fault("joined over the edge", _LABEL, "if (x + 1 < width && is_on(above + 1)", "if (is_on(above + 1)"),
    Fault("joined to the row before on the left", _LABEL, "x > 0 && is_on(pixel - 1)", "pixel > 0 && is_on(pixel - 1)"),
    Fault("a lost race is no race", _LABEL, "if (atomicCAS(labels + high, high, low) == high) return;",
          "atomicCAS(labels + high, high, low);\n    return;"),
    Fault("join without an atomic", _LABEL, "if (atomicCAS(labels + high, high, low) == high) return;",
          "if (labels[high] == high) {\n      labels[high] = low;\n      return;\n    }", "races"),
    Fault("hang the first pixel on a later one", _LABEL, "if (high < low) {", "if (high > low) {"),
    Fault("shorten the way without an atomic", _LABEL, "if (grandparent != parent) atomicMin(labels + pixel, grandparent);",
          "if (grandparent != parent) labels[pixel] = grandparent;", "races"),
    Fault("two roots with one number", _LABEL, "__popc(roots & ((1u << lane) - 1))", "__popc(roots & (1u << lane))"),
    Fault("numbers without an atomic", _LABEL,
          "number = atomicAdd(&job.state->regions, static_cast<uint32_t>(__popc(roots)));",
          "{\n      number = job.state->regions;\n      job.state->regions = number + __popc(roots);\n    }", "races"),
    Fault("boxes one row short", _LABEL, "static_cast<int32_t>(pixel / job.width) + 1", "static_cast<int32_t>(pixel / job.width)"),
    Fault("sum without an atomic", _LABEL, "atomicAdd(job.keys[0] + number, amount);", "job.keys[0][number] += amount;",
          "races"),
    Fault("sums over the head of the run", _LABEL, "lane >= first_lane + by", "lane >= by"),
    Fault("what was carried is lost", _LABEL, "if (lane == 0 && goes_on && !(runs.heads & 1)) join_amounts(carried);", ""),
    Fault("carried by another lane", _LABEL, "carried = __shfl_sync(kAllLanes, amount, 31)",
          "carried = __shfl_sync(kAllLanes, amount, 30)"),
    Fault("a run goes on past the chunk", _LABEL, "bits[kSteps] = 0;", "bits[kSteps] = 1;"),
    Fault("sums rounded down", _LABEL, "__double2ll_rn(", "static_cast<long long>("),
    Fault("sort before the tile is there", _RANK, f"{_BARRIER}\n    for (uint32_t width", "for (uint32_t width"),
    Fault("sort without waiting", _RANK, f"        {_BARRIER}\n", ""),
    Fault("the next tile over the last one", _RANK, f"    }}\n    {_BARRIER}\n  }}\n}}", "    }\n  }\n}"),
    Fault("ties by the last pixel", _RANK, "first < other_first", "first > other_first"),
    Fault("ties of two runs by the last pixel", _RANK, "load(firsts + middle) < first", "load(firsts + middle) > first"),
    Fault("merged with itself", _RANK, "if (start == own) continue;", ""),
    Fault("the last run as long as the others", _RANK, "end - start < run ? end - start : run", "run"),
    Fault("keep more than there are", _RANK, "limit < regions ? limit : regions;", "limit;", "addresses"),
    Fault("the share rounded up", _RANK, "__dmul_rn(static_cast<double>(regions), job.keep))",
          "__dmul_rn(static_cast<double>(regions), job.keep) + 0.5)"),
    Fault("the box of another edge", _RANK, "edge < 2", "edge < 1"),
    Fault("the box without an atomic", _RANK, "atomicMin(address, value)", "*address = value", "races"),
    Fault("the mask has all regions", _RANK, "label != kOff && load(job.left + ~label) == kChosen", "label != kOff"),
)  # fmt: skip
