"""Linear layers on a CPU, for few rows at a time: a second copy of their weights in the layout that oneDNN multiplies fastest.

What it is for: writing many answers at once is products of 2 to 64 rows with every weight, where torch's float32 product takes some three times as
long as for one row though it reads the same bytes (MKL on an AMD EPYC; bench/packed.py measures yours). Products of one row and of many go
on as before. The operators are those that torch.compile itself puts in (`torch.ops.mkldnn`): where a build has none, nothing is packed.
"""
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lib import preflight

FEWEST, MOST = 2, 64  # rows of a product for which the copy is used
LEAST = 1 << 20       # bytes of a weight: to call the operator costs more than a smaller one gains


def pack(module: nn.Module) -> int:
    """Give each large float32 linear layer of a CPU model its copy, once, if there is twice the room for all; return the bytes taken."""
    if module.device.type != "cpu" or not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return 0
    gains = lambda weight: weight.dtype == torch.float32 and weight.nbytes >= LEAST
    layers = [layer for layer in module.modules() if type(layer) is nn.Linear and gains(layer.weight) and "forward" not in vars(layer)]
    size = sum(layer.weight.nbytes for layer in layers)
    if 2 * size > preflight.available_bytes(module.device):
        return 0
    with torch.inference_mode():
        for layer in layers:
            layer.forward = forward(layer, torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), 8))
    return size


def forward(layer: nn.Linear, copy: Tensor):
    """Return what computes the layer, by its copy where the rows are few and nothing is learnt."""
    def product(x: Tensor) -> Tensor:
        if FEWEST <= x.numel() // x.shape[-1] <= MOST and torch.is_inference_mode_enabled():
            return torch.ops.mkldnn._linear_pointwise(x, copy, layer.bias, "none", [], "")
        return F.linear(x, layer.weight, layer.bias)

    return product
