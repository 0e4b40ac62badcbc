"""To be imported before transformers: tests/vision_ops.py says why it cannot be without."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent / "tests"))
import vision_ops  # noqa: F401
