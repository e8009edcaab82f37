"""The cost of the kernels against opponents; every answer is checked before anything is timed."""

import os
import sys

# Opponents get no more instructions than CARVE_KERNELS_CPU leaves the kernels. torch reads these when it is loaded.
_LIMITS = {
    "plain": ("default", "SSE41"),
    "avx2": ("avx2", "AVX2"),
    "avx512": ("avx512", "AVX512_CORE"),
    "avx512_bf16": ("avx512", "AVX512_CORE_BF16"),
}
if (limits := _LIMITS.get(os.environ.get("CARVE_KERNELS_CPU", ""))) is not None:
    os.environ.setdefault("ATEN_CPU_CAPABILITY", limits[0])
    os.environ.setdefault("ONEDNN_MAX_CPU_ISA", limits[1])

# No benchmark needs torchvision, and a version that does not fit torch breaks the import of transformers.
sys.modules.setdefault("torchvision", None)  # type: ignore[arg-type]
