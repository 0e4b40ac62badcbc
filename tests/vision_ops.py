"""Makes torchvision importable where its compiled part was built for another torch (CUDA or not).

The models that are tested only need its operators to exist. Also for processes that tests start: put this folder on
PYTHONPATH and import it first.
"""

import torch

try:
    import torchvision  # noqa: F401
except ImportError:
    pass
except RuntimeError:
    LIBRARY = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        LIBRARY.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
