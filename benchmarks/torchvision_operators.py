"""Imported before anomalib: lets it be imported where torch is made for the CPU and torchvision for CUDA.

anomalib imports torchvision, of which its FastFlow uses nothing. The compiled operators of a torchvision made for CUDA
do not load beside a torch made for the CPU, and then its import fails for want of these two.
"""

import torch

try:
    import torchvision  # noqa: F401
except RuntimeError:
    LIBRARY = torch.library.Library("torchvision", "FRAGMENT")  # declarations last as long as this object
    for name in ("nms", "qnms"):
        LIBRARY.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
