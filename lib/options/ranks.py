"""Several processes that train one student together, as torchrun starts them: data parallel.

    torchrun --nproc-per-node 4 stage2_kd.py --data ...     # the flags are those of one process

Each process (a rank) has the whole student, or with --shard a part of it (shard.py), and makes the
same plan, a pure function of lengths, seed and step (lib/plan.py). Of a step's rows it takes its
part, by tokens, and gradients and losses are summed over all ranks before anything is divided: 1, 2
and 4 ranks have one gradient, to float32's rounding. So it is with the measures on val.

Rank 0 leads: it alone prints, writes the run's folder, and samples. A signal to any rank ends all
of them at one step, which is saved. torchrun --max-restarts N starts all again where one died. The
folders must be the same for all: one machine, or a shared disk.
"""

import argparse
import atexit
import contextlib
import datetime
import itertools
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from lib import data, files, flags, models, plan
from lib.head import is_divided
from lib.run import Interrupt, Run, moments_of, tensors

LONGEST_WAIT = datetime.timedelta(hours=12)  # that one may wait: for rank 0, which writes samples
TORCHRUN = "torchrun --nproc-per-node N, N of 2 or more"
WAITS_S = 60.0  # after which a rank that waits says so


def add_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("several processes (torchrun)")
    flags.option(
        group,
        "--shard",
        choices=("none", "fsdp"),
        default="none",
        help=(
            "none: each process holds the whole student; fsdp: its part of the weights, gradients"
            " and optimizer state (default: %(default)s)"
        ),
        free=True,
    )
    flags.option(
        group,
        "--cpu-offload",
        action="store_true",
        help="with --shard fsdp: these parts lie in the CPU's memory, where AdamW steps",
        free=True,
    )


def check_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if args.cpu_offload and args.shard != "fsdp":
        parser.error("--cpu-offload needs --shard fsdp")


class Ranks:
    """The processes of a run. rank: which of the `world` this one is. divided: the student, where
    each holds a part of it (--shard)."""

    def __init__(self, args: argparse.Namespace, rank: int = 0, world: int = 1) -> None:
        self.args, self.rank, self.world = args, rank, world
        self.divided: Any = None  # shard.Divided
        self.interrupt: Agreed | None = None

    @property
    def shards(self) -> bool:
        return self.world > 1 and getattr(self.args, "shard", "none") == "fsdp"

    @property
    def in_step(self) -> bool:
        """Whether all ranks run everything at once: what lies divided among them, the student
        (--shard) or its teacher (--tp), runs by all together."""
        return self.shards or self.world > 1 and bool(getattr(self.args, "tp", None))

    def open(self, args: argparse.Namespace, stage: str, *words: Any) -> Run:
        """Return the run of args.out (lib/run.py, class Run), which rank 0 has opened before any
        other goes on (`meet`)."""
        if self.world == 1:
            return Run(args, stage, *words)
        if self.rank:
            return Following(self, args, stage, *words)
        with self.first():
            opened = Leading(self, args, stage, *words)
        self.told(args.out)
        return opened

    def told(self, value: Any = None) -> Any:
        """Return what rank 0 has of a small value."""
        held = [value]
        with self.waiting():
            dist.broadcast_object_list(held)
        return held[0]

    def of_each(self, value: Any) -> list[Any]:
        """Return what each rank has of a small value, in their order."""
        held = [value] * self.world
        if self.world > 1:
            with self.waiting():
                dist.all_gather_object(held, value)
        return held

    @contextlib.contextmanager
    def first(self) -> Iterator[None]:
        """Let rank 0 do what is inside before any other goes on; where it ends the program there,
        the others end without a word."""
        end: SystemExit | None = None
        try:
            yield
        except SystemExit as ended:
            end = ended
        if self.told(end is not None):
            raise end or SystemExit(0)

    def waiting(self) -> contextlib.AbstractContextManager:
        """While others are waited for, say so."""
        return files.telling(f"rank {self.rank} waits for the other ranks", WAITS_S)

    def total(self, *tensors: Tensor) -> None:
        """Sum tensors over all ranks, in place."""
        if self.world > 1:
            with self.waiting():
                for work in [dist.all_reduce(tensor, async_op=True) for tensor in tensors]:
                    work.wait()

    def mine(self, batches: Iterable[data.Batch]) -> Iterable[data.Batch]:
        """Yield this rank's part of batches that are measured: as many as any other, the last one
        empty if need be."""
        left = iter(batches)
        while several := list(itertools.islice(left, self.world)):
            yield several[self.rank] if self.rank < len(several) else data.Batch.empty()

    def even(self, count: int) -> int:
        """Return how many micro-batches each rank takes, where this one has rows for `count`: one
        at least, and where all are in step, as many as any other."""
        most = torch.tensor(max(1, count))
        if self.in_step:
            with self.waiting():
                dist.all_reduce(most, dist.ReduceOp.MAX)
        return int(most)

    def loading(self, device: torch.device, options: dict[str, Any]) -> dict[str, Any]:
        """Return `options` of models.load, and the device. With --shard that is the CPU, in
        float32: a part of the student alone need fit where it computes."""
        flash = self.args.attn == "flash_attention_2"  # runs on CUDA alone
        if not self.shards or flash or device.type == "cpu":
            return options | {"device": device}
        return options | {"device": torch.device("cpu"), "amp": None}

    def share(
        self, student: models.Model, rows: plan.Rows, amp: torch.dtype | None, device: torch.device
    ) -> models.Model:
        """Let `rows` give this rank's part of each step, and return the student, with --shard this
        rank's part of it."""
        if self.world > 1:
            rows.deal(self)
        if not self.shards:
            return student
        if self.args.cpu_offload and device.type == "cuda" and amp == torch.float16:
            # its scaler copies without waiting what the CPU reads at once
            files.fail("--cpu-offload does not go with fp16's scaler", "--amp fp16", "--amp bf16")
        from lib.options import shard  # seconds of import

        with self.waiting():
            self.divided = shard.Divided(student, device, self.world, self.args.cpu_offload)
        print(f"student: divided among {self.world} processes")
        return self.divided.student

    def divide(self, trained: nn.Module) -> None:
        """With --shard: divide what is trained beside the student."""
        if self.divided:
            self.divided.rest(trained)

    def add(self, trained: nn.Module, sums: Tensor) -> None:
        """Sum the gradients of what is trained over all ranks (those of what is divided are sums),
        and `sums`, in place; agree whether a signal came to one of them. What no rank has a
        gradient of keeps none."""
        if self.world == 1:
            return
        assert self.interrupt is not None
        parameters = [p for p in trained.parameters() if p.requires_grad]
        there = sums.new_tensor([p.grad is not None for p in parameters])
        if self.divided:  # what no rank used has a gradient all the same: 0
            there *= self.divided.used(parameters).to(there)
        noticed = sums.new_zeros(signal.NSIG)
        noticed[self.interrupt.noticed] = 1
        self.total(there, noticed, sums)
        with self.waiting():  # what NCCL sums is there when it is read
            for p, ranks in zip(parameters, there.tolist()):
                zero = torch.zeros_like(p) if p.grad is None else p.grad
                p.grad = zero if ranks else None
        taken = [p.grad for p in parameters if p.grad is not None]
        self.total(*(gradient for gradient in taken if not is_divided(gradient)))
        self.interrupt.number = max(noticed[1:].nonzero().flatten().tolist(), default=-1) + 1


class Agreed(Interrupt):
    """A signal that the loop sees once all ranks know of it (`Ranks.add`)."""

    noticed = 0

    def _note(self, number: int, frame) -> None:
        agreed, self.number = self.number, self.noticed
        super()._note(number, frame)
        self.noticed, self.number = self.number, agreed


class Leading(Run):
    """The run of rank 0: the others wait for what it writes."""

    def __init__(self, ranks: Ranks, *words: Any) -> None:
        self.ranks = ranks
        super().__init__(*words)

    def _listen(self) -> Interrupt:
        self.ranks.interrupt = Agreed(self.say)
        return self.ranks.interrupt

    def _lead(self, do: Callable[..., Any], *words: Any) -> None:
        """Do what rank 0 alone does, before any other goes on."""
        with self.ranks.first():
            do(*words)

    def begin(self, *words: Any) -> None:
        self._lead(super().begin, *words)

    def restore(self, module: nn.Module, *words: Any) -> None:
        super().restore(module, *words)
        with self.ranks.waiting(), torch.no_grad():  # what each made anew from the seed is one
            for tensor in itertools.chain(module.parameters(), module.buffers()):
                if not is_divided(tensor):
                    dist.broadcast(tensor, 0)

    def save(
        self, step: int, module: nn.Module, optimizer: torch.optim.Optimizer, *words: Any
    ) -> None:
        if self.ranks.divided:
            self._lead(files.partial_folder, self.out / "last")
            with self.ranks.waiting():
                self.ranks.divided.write(self._partial, tensors(module) | moments_of(optimizer))
        self._lead(super().save, step, module, optimizer, *words)

    @property
    def _partial(self) -> Path:
        return files.beside(self.out / "last", "part")

    def _write_tensors(self, *words: Any) -> Path:
        if not self.ranks.divided:
            return super()._write_tensors(*words)
        self.ranks.divided.check_written(self._partial, tensors(words[0]) | moments_of(words[1]))
        return self._partial

    def export(self, name: str, model: models.Model, *words: Any) -> None:
        if self.ranks.divided:
            with self.ranks.waiting():
                whole = self.ranks.divided.whole(keep=self.ranks.rank == 0)
            model = replace(model, module=whole, on=None)
        self._lead(super().export, name, model, *words)


class Following(Leading):
    """The run of another rank: it reads the resume state and writes nothing."""

    def _hold(self) -> None:
        pass

    def _lead(self, *_: Any) -> None:
        with self.ranks.first():
            pass

    def _pass(self, *_: Any, **__: Any) -> None:
        pass

    log = say = progress = _pass

    def page(self, name: str) -> Path:
        return Path(os.devnull)

    def export(self, name: str, *words: Any) -> None:
        super().export(name, *words)
        if name == "final":  # what is left is rank 0's
            raise SystemExit(0)


def meet(args: argparse.Namespace) -> Ranks:
    """Return the processes that torchrun has started, or this one alone, before anything is read.
    All but rank 0 are silent, and wait here until it has opened the run."""
    if are_several():
        check_alone(args)
    ranks = assemble(args)
    if ranks.world == 1 and args.cpu_offload:
        files.fail("--cpu-offload is for several processes", "one", mend=TORCHRUN)
    if ranks.rank:
        args.track, args.tag = "", ""  # the folder is told
        args.samples *= ranks.in_step  # all of them write what none can alone
        with ranks.first():
            pass
        args.out = ranks.told()
    return ranks


def are_several() -> bool:
    """Return whether torchrun has started this process, as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "LOCAL_RANK" in os.environ


def refuse_several() -> None:
    """Refuse torchrun where each process is to be alone."""
    if are_several():
        files.fail(
            "torchrun has started several processes, which would write one folder",
            os.environ["WORLD_SIZE"],
            mend="--tp; or without torchrun, --shared, once for each GPU",
        )


def assemble(args: argparse.Namespace) -> Ranks:
    """Return the processes that torchrun has started, each on its GPU, or this one alone. All but
    rank 0 are silent."""
    if not are_several():
        return Ranks(args)
    names = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE")  # torchrun's
    world, rank, local, here = (int(os.environ.get(name, "-1")) for name in names)
    if args.device in ("auto", "cuda") and torch.cuda.is_available():
        if here > (cards := torch.cuda.device_count()):
            files.fail("more processes than GPUs", here, cards, f"--nproc-per-node {cards}")
        torch.cuda.set_device(local)
    ranks = Ranks(args, rank, world)
    if not args.threads and (ranks.in_step or not torch.cuda.is_available()):
        args.threads = max(1, len(os.sched_getaffinity(0)) // here)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    with ranks.waiting():
        store = dist.PrefixStore(f"start {starts_before()}", next(rendezvous("env://"))[0])
        words = dict(store=store, rank=rank, world_size=world, timeout=LONGEST_WAIT)
        dist.init_process_group(backend, **words)
    atexit.register(dist.destroy_process_group)
    if rank:
        sys.stdout = open(os.devnull, "w")
        files.TOLD_EVERY_S = threading.TIMEOUT_MAX
    return ranks


def starts_before() -> str:
    """Return how often torchrun has started these processes before. Its store outlives a restart,
    and so do the addresses in it, where nobody listens (pytorch/pytorch#135712). On several
    machines each counts for itself: there it is for torchrun to make a new one (docs/scale.md)."""
    alone = os.environ.get("GROUP_WORLD_SIZE", "1") == "1"
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if alone else "0"


def check_alone(args: argparse.Namespace) -> None:
    """Refuse what one process alone does."""
    divided, gradnorm = args.shard == "fsdp", getattr(args, "balance", "none") == "gradnorm"
    alone = {
        "--eval-only": args.eval_only,
        "--teacher-offload": getattr(args, "teacher_offload", False),
        "--teacher-device": getattr(args, "teacher_device", ""),
        "--device-map": getattr(args, "device_map", ""),
        "--compile, with --shard,": args.compile and divided,
        "--on-policy, with --shard,": getattr(args, "on_policy", 0) and divided,
        "--balance gradnorm, with --shard,": divided and gradnorm,
        f"--device {args.device}": args.device not in ("auto", "cpu", "cuda"),
    }
    if given := [flag for flag, value in alone.items() if value]:
        several = f"{os.environ['WORLD_SIZE']} of torchrun's"
        files.fail(f"{given[0]} is for one process", several, mend="the script without torchrun")
