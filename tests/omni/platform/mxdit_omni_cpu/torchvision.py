"""Lets PyPI's torchvision, a CUDA build, be imported beside a CPU build of torch. A .pth file imports this at start.

Its compiled operators do not load there, and `torchvision._meta_registrations` (0.28.0) fails where the schemas of two of
them are missing. They are declared when torchvision is first imported; vLLM-Omni's Wan pipelines call neither.
"""

import sys
from importlib.abc import MetaPathFinder

SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


class Finder(MetaPathFinder):
    """Finds nothing: it waits for torchvision's turn, and torch is not imported before."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            self.library = torch.library.Library("torchvision", "FRAGMENT")
            for operator in ("nms", "qnms"):
                self.library.define(operator + SCHEMA)
            keep.append(self)  # the schemas go with their library


keep: list[Finder] = []
sys.meta_path.insert(0, Finder())
