"""Two operators that torchvision's wheels for CUDA lack beside a torch for CPUs; `make test-vllm` alone uses this.

Nothing calls them: torchvision only wants them to be there when it is imported.
"""

import importlib.abc
import sys


class Defining(importlib.abc.MetaPathFinder):
    """Defines them just before torchvision is imported, in whatever process."""

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            self.library = torch.library.Library("torchvision", "DEF")
            self.library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            self.library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            Defining.kept = self
        return None


sys.meta_path.insert(0, Defining())
