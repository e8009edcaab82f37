// The keys that a query does not see, in the scores of a warp's tile.
#pragma once

#include "cuda/capture/tile.cuh"

namespace carve {
namespace {

// A query of a block.
struct StreamQuery {
  int line;  // of `stats` and `scores`; -1: there is none
  Visible visible;
};

// Scores of hidden keys become -inf; products become scores first, where those differ. kGeneral: see is_general.
template <typename S, bool kGeneral>
__device__ __forceinline__ void hide(const CaptureLaunch& launch, const Problem& problem, const StreamQuery& query,
                                     int base, float (&scores)[S::kScores]) {
  const Lane lane;
  if (kGeneral && launch.logit.changes()) {
#pragma unroll
    for (int n = 0; n < S::kScores; ++n) scores[n] = launch.logit.score(scores[n]);
  }
  if (base < query.visible.first || base + S::kTileKeys - 1 > query.visible.last) {
#pragma unroll
    for (int n = 0; n < S::kScores; ++n) {
      if (!query.visible.has(base + key_of_score(n, lane.t))) scores[n] = -INFINITY;
    }
  }
  const CaptureParams& p = launch.params;
  if (kGeneral && p.mask != nullptr && query.line >= 0) {
    const int row = query.line % launch.rows, head = query.line / launch.rows % launch.heads;
#pragma unroll
    for (int n = 0; n < S::kScores; ++n) {
      const int key = base + key_of_score(n, lane.t);
      if (key < p.keys && !mask_has(p, problem.batch, head, row, key)) scores[n] = -INFINITY;
    }
  }
}

}  // namespace
}  // namespace carve
