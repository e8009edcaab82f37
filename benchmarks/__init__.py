"""What the kernels cost beside their opponents; every answer is checked before anything is timed."""

import sys

# No benchmark needs torchvision, and one that does not fit this torch breaks the import of transformers.
sys.modules.setdefault("torchvision", None)  # type: ignore[arg-type]
