"""A student that lies divided among the ranks: each holds a part of every weight, of its gradient
and of the optimizer's state (--shard fsdp; PyTorch's FSDP2, arXiv:2304.11277).

A decoder layer's weights are gathered just before it runs, forward and backward, and let go behind
it; their gradients are summed over the ranks and divided among them again. The output layer is no
part of the body (lib/models.py), and is gathered by itself (lib/head.py, `Head.whole`). What is
gathered, all ranks gather together: each takes as many micro-batches as any other (lib/plan.py).
"""

import copy
import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import Shard, distribute_tensor

from lib import files, models
from lib.head import is_divided, local, undivided
from lib.options.capture import decoder_layers

FILE_BYTES = 1 << 28  # of a file of last/, about


class Divided:
    """A student, divided in place; `student` is it as a Model. Rank 0 keeps a module without
    weights beside it, as which checkpoints are written."""

    def __init__(
        self, student: models.Model, device: torch.device, world: int, offload: bool
    ) -> None:
        module, body = student.module, student.body
        if isinstance(body, models.UpToHead):
            name = type(module).__name__
            files.fail(f"{name} cannot be divided", "no body apart from its head", "--shard none")
        self.module, self.mesh = module, init_device_mesh(device.type, (world,))
        empty = {
            id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad)
            for p in module.parameters()
        }
        self.empty = copy.deepcopy(module, empty)
        if module.config._attn_implementation == "flash_attention_2":  # runs on CUDA alone
            self.empty.set_attn_implementation("sdpa")
        self.frozen = not all(p.requires_grad for p in module.parameters())
        pinned = CPUOffloadPolicy(pin_memory=device.type == "cuda")
        self.how = {"mesh": self.mesh, "offload_policy": pinned if offload else OffloadPolicy()}
        # gathered in float32 and cast by autocast, as in one process: so the losses are its
        self.how["mp_policy"] = MixedPrecisionPolicy(reduce_dtype=torch.float32)
        inner, outer = module.get_input_embeddings(), module.get_output_embeddings()
        tied = outer is not None and outer.weight is inner.weight
        for part in (inner, *decoder_layers(student)):
            fully_shard(part, **self.how)
        inner.set_unshard_in_backward(False)  # what goes into it is no function of its weight
        fully_shard(body, reshard_after_forward=True, **self.how)
        summed(body)
        if outer is not None:
            self._divide_output(outer, inner.weight if tied else None, offload)
        for buffer in module.buffers():
            buffer.data = buffer.to(device)
        if offload:  # transformers goes by where the first weight lies
            kind = type(module)
            module.__class__ = type(kind.__name__, (kind,), {"device": device})
        self.student = replace(student, on=device)

    def _divide_output(self, layer: nn.Module, tied: nn.Parameter | None, offload: bool) -> None:
        """Divide an output layer, which the body does not call: as what it is tied to, or alone."""

        def part(whole: nn.Parameter) -> nn.Parameter:
            mine = distribute_tensor(whole.detach(), self.mesh, [Shard(0)])
            return nn.Parameter(mine.cpu() if offload else mine, whole.requires_grad)

        layer.weight = part(layer.weight) if tied is None else tied
        if getattr(layer, "bias", None) is not None:
            layer.bias = part(layer.bias)
        layer.forward = partial(gathered_linear, layer)

    def rest(self, trained: nn.Module) -> None:
        """Divide what is trained beside the student."""
        for module in trained.modules():
            if any(not is_divided(p) for p in module.parameters(recurse=False)):
                summed(fully_shard(module, **self.how))

    def used(self, parameters: list[nn.Parameter]) -> Tensor:
        """Return of each whether its gradient, a sum over the ranks, has a number here that is not
        0: that of a weight which no rank used has none. (Of an adapter all are used, and half of
        them begin with a gradient of 0.)"""
        given = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        found = torch.stack([local(gradient).any() for gradient in given])
        return torch.ones_like(found) if self.frozen else found

    @torch.no_grad()
    def whole(self, keep: bool) -> nn.Module | None:
        """Return the module with all its weights, on the CPU, to one that is to `keep` it. All
        ranks call this together, and hold one tensor whole at a time."""
        full = {}
        for mine, empty in zip(self.module.parameters(), self.empty.parameters(), strict=True):
            there = undivided(mine.detach().to(self.student.device))
            if keep:
                full[id(empty)] = nn.Parameter(there.cpu(), mine.requires_grad)
        return copy.deepcopy(self.empty, full) if keep else None

    def write(self, folder: Path, tensors: dict[str, Tensor]) -> None:
        """Write tensors, each rank its part, as safetensors; all ranks call this together. A file
        is made in memory before it is written, so there are many."""
        number, size = {}, 0
        for name, tensor in tensors.items():
            number[name] = 1 + size // (FILE_BYTES * dist.get_world_size())
            size += tensor.nbytes
        writer = dcp.HuggingFaceStorageWriter(str(folder), number, save_distributed=True)
        try:
            dcp.save(dict(tensors), storage_writer=writer)
        except dcp.CheckpointException as failed:
            why = next(iter(failed.failures.values()))[0]
            files.fail(f"{folder} cannot be written", why, "room on a disk that all processes see")

    def check_written(self, folder: Path, tensors: dict[str, Tensor]) -> None:
        """Refuse a folder that lacks parts of tensors."""
        there = dcp.HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
        for name, tensor in tensors.items():
            parts = getattr(there.get(name), "chunks", ())
            if sum(math.prod(part.sizes) for part in parts) != tensor.numel():
                mend = "an --out on a disk that all processes see"
                files.fail(f"{folder} lacks parts that other ranks have written", name, mend=mend)


def summed(module: nn.Module) -> nn.Module:
    """Let the gradients of what was divided be sums over the ranks, and not means."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)
            part.set_reduce_scatter_unused_params(True)  # other ranks may have used them
    return module


def gathered_linear(layer: nn.Module, hidden: Tensor) -> Tensor:
    """Return what a divided output layer makes of hidden states: where a model writes."""
    weight = undivided(layer.weight.to(hidden.device))
    bias = getattr(layer, "bias", None)
    return nn.functional.linear(
        hidden, weight, None if bias is None else undivided(bias.to(hidden.device))
    )
