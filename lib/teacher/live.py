"""The teacher live, beside the student: run on each micro-batch, where a logits folder would be
read (stage2_kd.py --teacher).

Contract: `LiveTeacher` is a `Teacher` (lib/teacher/__init__.py) at any temperature. The model is
frozen, in eval mode, and its body runs once a micro-batch; its output layer lies on the student's
device, wherever its body is, and makes logits chunk by chunk.
"""

import argparse
import atexit
import collections
import math
import shutil
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from lib import checkpoints, data, evaluate, files, flags, losses, models, plan, train
from lib.head import Head, topk_and_tails
from lib.teacher import placed
from lib.teacher.placed import activation_bytes, numbered, output_layer

# kept of the teacher at val targets, on the student's device; more is computed each time
VAL_BYTES = 1 << 28
PLACINGS = ("teacher_quant", "teacher_offload", "device_map", "tp")
OWN = ("k", "teacher_dtype", "teacher_device", *PLACINGS)


def add_flags(group: argparse._ArgumentGroup) -> None:
    """Add what a live teacher needs beside --teacher; all of it is None unless it was given."""
    group.add_argument(
        "--k",
        type=int,
        default=None,
        help="compare the top k and one bucket; 0 = all tokens, each exact (default: 0)",
    )
    group.add_argument(
        "--teacher-dtype",
        choices=flags.SHARED["--dtype"]["choices"],
        default=None,
        help="of the teacher; auto: its own on CUDA, else float32 (default: auto)",
    )
    flags.option(
        group,
        "--teacher-device",
        free=True,
        default=None,
        metavar="DEVICE",
        help="where it runs (default: where the student does)",
    )
    placed.add_flags(group)
    flags.option(
        group,
        "--teacher-offload",
        free=True,
        action="store_true",
        default=None,
        help=(
            "layers that do not fit on its device wait in CPU memory, or on disk (accelerate;"
            " default: off)"
        ),
    )


def check_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse (exit code 2) flags that cannot work, and put in the defaults where there is a live
    teacher."""
    if not args.teacher:
        given = next((name for name in OWN if getattr(args, name) is not None), None)
        if given:
            parser.error(
                f"--{given.replace('_', '-')} is of a live teacher: it goes with --teacher, not"
                " with --logits"
            )
        return
    args.k, args.teacher_dtype = args.k or 0, args.teacher_dtype or "auto"
    if args.k < 0:
        parser.error(f"--k is {args.k}, wanted 0 or more")
    if len(placing := given_of(args)) > 1:
        parser.error(f"{' and '.join(placing)} do not go together: wanted one of them")
    if args.device_map and args.teacher_device:  # it would fill the student's card first
        parser.error("--device-map and --teacher-device do not go together: wanted one of them")
    folders = [*flags.folders_of(args.teacher).values()] or [args.teacher]
    is_gguf = any(folder.endswith(".gguf") for folder in folders)
    if is_gguf and placing:
        parser.error(f"a GGUF file is read as a whole: {placing[0]} does not go with it")


def given_of(args: argparse.Namespace, *names: str) -> list[str]:
    """Return the flags that say where the teacher's weights lie, or those of `names`, as far as
    they are given."""
    return [flags.spelled(name) for name in names or PLACINGS if getattr(args, name)]


class LiveTeacher:
    """A frozen causal LM that is asked for its distribution at the targets of a batch. `join` loads
    it; before, it is a name and a hash. number: of several beside one another (several.py)."""

    compares = True
    answers = None  # it can be asked itself
    vocab: int  # from `join` on, with `model` and its `head` on the student's device
    model: models.Model
    head: Head

    def __init__(self, args: argparse.Namespace, dataset: data.Dataset, number: int = 0) -> None:
        self.args, self.dataset, self.k, self.name = args, dataset, args.k, args.teacher
        self.number = number
        # what it said at val batches: the same at every evaluation; and the bytes left for it
        self.remembered: dict[tuple, losses.TopK | losses.Whole] = {}
        self.room = VAL_BYTES
        placed.check_packages(args)
        if args.teacher_offload:
            files.need("accelerate", "--teacher-offload")
        self.folder = checkpoints.local_folder(args.teacher, args.trust_remote_code)
        self.base = checkpoints.base_of(self.folder)
        placed.check_placing(args, self.folder)
        if self.base != self.folder and args.teacher_offload:
            wanted = "whole weights", "a run with --merge, its best/"
            files.fail("--teacher-offload does not take an adapter", self.folder, *wanted)
        self.shapes = checkpoints.shapes(self.base)
        checkpoints.check_apart(args.out, self.folder, "teacher")
        if self.base == self.folder:  # an adapter may bring more
            self._check_k(output_layer(self.shapes)[0])
        self.apart = models.check_fits(self.folder, dataset, args.trust_remote_code, teacher=True)
        self.device = numbered(models.pick_device(args.teacher_device or args.device))
        self.dtype = models.pick_dtype(args.teacher_dtype, self.device, self.folder)

    @property
    def over(self) -> str:
        """What KL is summed over."""
        if self.k:
            return f"the top {self.k} and one bucket of all others (a lower bound)"
        return f"all {self.vocab:,} tokens"

    @property
    def each(self) -> list[tuple[str, str]]:
        """Its name and identity."""
        return [(self.name, checkpoints.identity(self.folder))]

    def identity(self) -> dict:
        """Return what a run that is continued must find again."""
        return {"teacher": checkpoints.identity(self.folder)}

    def rows(self) -> np.ndarray:
        """Return the numbers of the train rows it can teach: all."""
        return np.arange(len(self.dataset.train.rows))

    def join(
        self,
        student: models.Model,
        args: argparse.Namespace,
        amp: torch.dtype | None,
        rows: plan.Rows | None = None,
    ) -> models.Model:
        """Load the teacher beside a student: say what both need, check it, and cut both to the
        tokens that both know."""
        (room,) = rooms_of([self], self.memory_bytes, student, amp, rows)
        return self.load_beside(student, room)

    def load_beside(self, student: models.Model, room: int) -> models.Model:
        """Load the teacher with `room` bytes for its weights, check it, cut both to the tokens that
        both know, and return the student."""
        self._load(room)
        self.vocab = min(student.vocab, self.model.vocab)
        self._check_k(self.vocab)
        apart = tuple(sorted({*student.apart, *self.model.apart}))
        self.model = replace(self.model, limit=self.vocab, apart=apart)
        head = self.model.head().whole(self.device)

        def here(tensor):
            return None if tensor is None else tensor.detach()[: self.vocab].to(student.device)

        ids = None if head.apart is None else head.apart.to(student.device)
        head = replace(head, weight=here(head.weight), bias=here(head.bias), apart=ids)
        # widened once, and not for every chunk
        self.head = replace(head, weight=head.operand(head.weight.dtype))
        packs = student.packs and self.model.packs
        return replace(student, limit=self.vocab, apart=apart, packs=packs)

    def leave_out(self, more: Iterable[int]) -> None:
        """Leave out of every distribution `more` ids, beside those that are left out already."""
        self.model = replace(self.model, apart=tuple(sorted({*self.model.apart, *more})))
        ids = self.model.head().apart
        ids = None if ids is None else ids.to(self.head.weight.device)
        self.head = replace(self.head, apart=ids)

    def _check_k(self, vocab: int) -> None:
        """Refuse a k beyond the tokens that there are: the teacher's own, before anything is
        loaded, and then those that both know."""
        if self.k > vocab:
            files.fail(
                "k does not fit",
                f"--k {self.k}",
                f"at most V = {vocab}",
                f"--k {vocab}, or 0 for all tokens",
            )

    def _load(self, room: int) -> None:
        """Load the model, frozen, with `room` bytes for its weights on its device."""
        try:
            self.model = models.load(
                str(self.folder),
                self.device,
                self.dtype,
                dataset=self.dataset,
                attn=self.args.attn,
                compiled=self.args.compile,
                pack=not self.args.no_pack,
                trust_remote_code=self.args.trust_remote_code,
                placing=self._placing(room),
                apart=self.apart,
            )
        except torch.OutOfMemoryError:
            files.fail(
                f"{self.folder} does not fit on {self.device}",
                f"{files.human(max(0, room))} free for its weights",
                f"about {files.human(self.weight_bytes())}",
                "--teacher-quant 8bit or 4bit, --teacher-offload, or another --teacher-device",
            )
        self.model.module.requires_grad_(False)

    def _placing(self, room: int) -> dict | None:
        """Return where from_pretrained is to put the weights, if not all of them, unchanged, on one
        device with `room` bytes for them."""
        if self.args.teacher_quant:
            return placed.in_bits(self.args.teacher_quant, self.device, self.dtype)
        about = self.base, self.dtype, self.device, room
        if self.args.device_map:
            beside = activation_bytes(self.shapes, self.args.tokens_per_microbatch, self.dtype)
            return placed.over_cards(*about, beside, self.args.trust_remote_code)
        if not self.args.teacher_offload:
            return None
        where = placed.spread(*about, self.args.trust_remote_code)
        counts = collections.Counter(where[name] for name in where if ".layers." in name)
        print(f"teacher: layers on {placed.said_of(counts)}")
        # what the checkpoint does not hold as it is; --fresh empties --out
        own = f"offload{self.number or ''}"
        disk = files.beside(Path(self.args.out).resolve(), own)
        shutil.rmtree(disk, ignore_errors=True)
        atexit.register(shutil.rmtree, disk, ignore_errors=True)
        return {"device_map": where, "offload_folder": str(disk)}

    def weight_bytes(self) -> int:
        """Return about how many bytes its weights will take, read from the heads of its files."""
        quant = self.args.teacher_quant
        vocab = max((max(shape) for shape in self.shapes if len(shape) == 2), default=0)

        def each(shape):  # what holds tokens stays whole
            quantised = quant and len(shape) == 2 and vocab not in shape
            return placed.QUANT_BYTES[quant] if quantised else self.dtype.itemsize

        return int(sum(math.prod(shape) * each(shape) for shape in self.shapes))

    def memory_bytes(self, device: torch.device, targets: int) -> int:
        """Return what it takes on the student's device while it trains, its weights apart: one
        layer's activations, what it keeps there, and the buffers of the loss."""
        tokens, vocab = self.args.tokens_per_microbatch, output_layer(self.shapes)[0]
        here = self.device == numbered(device)
        own = activation_bytes(self.shapes, tokens, self.dtype) if here else 0
        return own + self.kept_bytes(device) + losses.dense_bytes(device, 4 * targets * vocab)

    def kept_bytes(self, device: torch.device) -> int:
        """Return what it keeps on the student's device: the output layer where it is copied
        (`load_beside`), and what is remembered of val."""
        vocab, width = output_layer(self.shapes)
        here, half, own = self.device == numbered(device), self.dtype.itemsize < 4, 0
        if not here or self.args.tp or half and device.type != "cuda":
            own = vocab * width * (4 if device.type != "cuda" else self.dtype.itemsize)
        kept = 12 * self.k or width * self.dtype.itemsize  # a target: ids and gaps, or hidden
        return own + min(VAL_BYTES, self.dataset.val.targets * kept)

    def say(self) -> None:
        """Print what the teacher is and how much of it is compared."""
        what = (
            f"its top {self.k} of {self.vocab:,} tokens and the exact mass of the others"
            if self.k
            else f"all of its {self.vocab:,} tokens"
        )
        quant = f" in {self.args.teacher_quant}" if self.args.teacher_quant else ""
        print(
            f"teacher: {self.folder}, live on {self.device}, {self.dtype}{quant}; {what}, at any T"
        )

    def hidden(self, batch: data.Batch) -> torch.Tensor:
        """Return its hidden states (N, D') at a batch's targets."""
        return self.model.hidden(batch.to(self.device))

    def at(self, batch: data.Batch, temperature: float) -> losses.TopK | losses.Whole:
        """Return the teacher at a batch's targets and a temperature, on the device of its labels:
        one pass of its body."""
        # no inference mode: what else is taken from this pass may be saved for a student's backward
        # pass
        with torch.no_grad():
            hidden = self.hidden(batch)  # (N, D')
            hidden = hidden.to(self.head.weight.device, self.head.weight.dtype)
            if not self.k or not len(hidden):
                return losses.Whole(hidden, self.head)
            chunks = [topk_and_tails(z, self.k, [temperature]) for _, z in self.head.chunks(hidden)]
            ids, gap, tails = (torch.cat(parts) for parts in zip(*chunks))
            return losses.TopK(ids, gap, tails[:, 0])

    def val_at(self, batch: data.Batch, temperature: float) -> losses.TopK | losses.Whole:
        """Return the same at a val batch's targets. Checked there, at each evaluation: to look at
        every batch would make the GPU wait."""
        key = (temperature, *batch.rows)
        if key in self.remembered:
            return self.remembered[key]
        known = self.at(batch, temperature)
        if isinstance(known, losses.Whole):
            tensors = [known.hidden]
        else:
            tensors = [known.gap, known.ids, known.tail]
        if not torch.isfinite(tensors[0]).all():
            files.fail(
                "the teacher's hidden states are not finite",
                f"NaN or infinity on val rows {batch.rows[:8]}",
                "numbers",
                "--teacher-dtype float32 (some models overflow float16)",
            )
        self.room -= sum(tensor.nbytes for tensor in tensors)
        if self.room >= 0:
            self.remembered[key] = known
        return known

    def val_measures(self) -> dict:
        """Return its own measures on val: one pass over val."""
        return self.measures(self.dataset.val)

    def measures(self, split: data.Split) -> dict:
        """Return its own measures on some rows."""
        return evaluate.evaluate(
            self.model,
            split,
            self.vocab,
            self.args.tokens_per_microbatch,
            sources=self.dataset.sources,
        )


def rooms_of(
    teachers: list[LiveTeacher],
    memory_bytes: Callable[[torch.device, int], int],
    student: models.Model,
    amp: torch.dtype | None,
    rows: plan.Rows | None,
) -> list[int]:
    """Return the bytes that the teachers' device has for the weights of each, in proportion to
    them, beside activations and the student; say them, and warn where they are too few.
    memory_bytes: what the teachers take beside their weights (`Teacher.memory_bytes`)."""
    args, device = teachers[0].args, teachers[0].device
    tokens = args.tokens_per_microbatch
    more = max(activation_bytes(one.shapes, tokens, one.dtype) for one in teachers)
    if device == numbered(student.device) and rows is not None:
        most = train.largest(args, rows)
        each, on = train.kept_bytes(student, rows.split, amp), args.checkpointing
        more = memory_bytes(student.device, most.targets)
        more += train.training_bytes(student, most, each, amp, on)
    weights, have = [one.weight_bytes() for one in teachers], train.available_bytes(device)
    alone = len(teachers) == 1
    whose = "the teacher's weights" if alone else f"the weights of {len(teachers)} teachers"
    print(
        f"memory: {whose} take about {files.human(sum(weights))}, the rest of"
        f" {'it' if alone else 'them'} and the student about {files.human(more)} more;"
        f" {files.human(have)} free on {device}"
    )
    if sum(weights) + more > have and not given_of(args, "teacher_offload", "device_map"):
        print(
            f"memory: WARNING, {files.human(sum(weights) + more)} do not fit into"
            f" {files.human(have)} on {device}: --teacher-quant 8bit or 4bit,"
            " --teacher-offload, another --teacher-device, or --logits (dump_logits.py), for"
            f" which {'the' if alone else 'each'} teacher runs alone"
        )
    room = have - more
    return [room * own // max(1, sum(weights)) for own in weights]
