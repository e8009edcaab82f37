"""The cost of the kernels against opponents; every answer is checked before anything is timed."""

import sys

# No benchmark needs torchvision, and a version that does not fit torch breaks the import of transformers.
sys.modules.setdefault("torchvision", None)  # type: ignore[arg-type]
