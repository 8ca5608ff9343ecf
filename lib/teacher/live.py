"""The teacher live, beside the student: run on each micro-batch, where a logits folder would be
read (stage2_kd.py --teacher).

Contract: `LiveTeacher` is a `Teacher` (lib/teacher/__init__.py) at any temperature. The model is
frozen, in eval mode, and its body runs once a micro-batch; its output layer lies on the student's
device, wherever its body is, and makes logits chunk by chunk.
"""

import argparse
import atexit
import logging
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from lib import checkpoints, data, evaluate, files, flags, losses, models, train
from lib.head import topk_and_tails

# a weight of the layers; 4bit: and a float32 scale for each 64 of them
QUANT_BYTES = {"8bit": 1.0, "4bit": 0.5625}
# kept of the teacher at val targets, on the student's device; more is computed each time
VAL_BYTES = 1 << 28
OWN = ("k", "teacher_dtype", "teacher_device", "teacher_quant", "teacher_offload")


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
    group.add_argument(
        "--teacher-device",
        default=None,
        metavar="DEVICE",
        help="where it runs (default: where the student does)",
    )
    group.add_argument(
        "--teacher-quant",
        choices=list(QUANT_BYTES),
        default=None,
        help="its layers in 8 or 4 bits (bitsandbytes; default: off)",
    )
    group.add_argument(
        "--teacher-offload",
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
    if args.verify:
        parser.error("--verify checks logits: it goes with --logits, not with --teacher")
    if args.teacher_quant and args.teacher_offload:
        parser.error("--teacher-quant and --teacher-offload do not go together: wanted one of them")
    if args.teacher.endswith(".gguf") and (args.teacher_quant or args.teacher_offload):
        parser.error(
            "a GGUF file is read as a whole: --teacher-quant and --teacher-offload do not go"
            " with it"
        )


class LiveTeacher:
    """A frozen causal LM that is asked for its distribution at the targets of a batch. `join` loads
    it; before, it is a name and a hash."""

    compares = True

    def __init__(self, args: argparse.Namespace, dataset: data.Dataset) -> None:
        self.args, self.dataset, self.k = args, dataset, args.k
        self.remembered, self.room = (
            {},
            VAL_BYTES,
        )  # the teacher at val batches: the same at every evaluation
        if args.teacher_quant:
            files.need("bitsandbytes", f"--teacher-quant {args.teacher_quant}")
        if args.teacher_quant or args.teacher_offload:
            files.need(
                "accelerate", "--teacher-quant" if args.teacher_quant else "--teacher-offload"
            )
        self.folder = checkpoints.local_folder(args.teacher, args.trust_remote_code)
        self.base = checkpoints.base_of(self.folder)
        if self.base != self.folder and (args.teacher_quant or args.teacher_offload):
            files.fail(
                "--teacher-quant and --teacher-offload do not take an adapter",
                self.folder,
                "whole weights",
                "a run with --merge, its best/",
            )
        self.shapes = checkpoints.shapes(self.base)
        checkpoints.check_apart(args.out, self.folder, "teacher")
        self.device = numbered(models.pick_device(args.teacher_device or args.device))
        self.dtype = models.pick_dtype(args.teacher_dtype, self.device, self.folder)

    def identity(self) -> dict:
        """Return what a run that is continued must find again."""
        return {"teacher": checkpoints.identity(self.folder)}

    def rows(self) -> np.ndarray:
        """Return the numbers of the train rows it can teach: all."""
        return np.arange(len(self.dataset.train.rows))

    def join(
        self, student: models.Model, args: argparse.Namespace, amp: torch.dtype | None
    ) -> models.Model:
        """Load the teacher beside a student: say what both need, check it, and cut both to the
        tokens that both know."""
        training = (
            0
            if args.eval_only
            else train.training_bytes(student, args.tokens_per_microbatch, amp, True)
        )
        more = (training if self.device == student.device else 0) + self.activation_bytes()
        weights = self.weight_bytes()
        have = train.available_bytes(self.device)
        print(
            f"memory: the teacher's weights take about {files.human(weights)}, the rest of it and"
            f" the student at least {files.human(more)} more; {files.human(have)} free on"
            f" {self.device}"
        )
        if weights + more > have and not args.teacher_offload:
            print(
                f"memory: WARNING, {files.human(weights + more)} do not fit into"
                f" {files.human(have)} on {self.device}: --teacher-quant 8bit or 4bit,"
                " --teacher-offload, another --teacher-device, or --logits (dump_logits.py), for"
                " which the teacher runs alone"
            )
        try:
            self.model = models.load(
                str(self.folder),
                self.device,
                self.dtype,
                dataset=self.dataset,
                attn=args.attn,
                compiled=args.compile,
                pack=not args.no_pack,
                trust_remote_code=args.trust_remote_code,
                placing=self.placing(have - more),
            )
        except torch.OutOfMemoryError:
            files.fail(
                f"{self.folder} does not fit on {self.device}",
                f"{files.human(have)} free",
                f"about {files.human(weights)}",
                "--teacher-quant 8bit or 4bit, --teacher-offload, or another --teacher-device",
            )
        self.model.module.requires_grad_(False)
        self.vocab = min(student.vocab, self.model.vocab)
        if self.k > self.vocab:
            files.fail(
                "k does not fit",
                f"--k {self.k}",
                f"at most V = {self.vocab}",
                f"--k {self.vocab}, or 0 for all tokens",
            )
        head = self.model.head(self.vocab)

        def here(tensor):
            return None if tensor is None else tensor.detach()[: self.vocab].to(student.device)

        head = replace(head, weight=here(head.weight), bias=here(head.bias))
        self.head = replace(
            head, weight=head.operand(head.weight.dtype)
        )  # widened once, and not for every chunk
        return replace(student, limit=self.vocab)

    def placing(self, room: int) -> dict | None:
        """Return where from_pretrained is to put the weights, if not all of them, unchanged, on one
        device with `room` bytes for them."""
        if self.args.teacher_quant:
            from transformers import BitsAndBytesConfig

            logging.getLogger("bitsandbytes").setLevel(
                logging.ERROR
            )  # it would say at every product that 8 bits are multiplied in float16
            bits = (
                dict(load_in_8bit=True)
                if self.args.teacher_quant == "8bit"
                else dict(
                    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=self.dtype
                )
            )
            return {
                "quantization_config": BitsAndBytesConfig(**bits),
                "device_map": {"": self.device},
            }
        if not self.args.teacher_offload:
            return None
        rooms = {str(self.device): room} | (
            {} if self.device.type == "cpu" else {"cpu": train.available_bytes(torch.device("cpu"))}
        )
        where = spread(self.base, self.dtype, rooms, self.args.trust_remote_code)
        counts = {
            place: sum(p == place for name, p in where.items() if name.rpartition(".")[2].isdigit())
            for place in where.values()
        }
        print(
            "teacher: layers on " + ", ".join(f"{place} {count}" for place, count in counts.items())
        )
        disk = files.beside(
            Path(self.args.out).resolve(), "offload"
        )  # what the checkpoint does not hold as it is; --fresh empties --out
        shutil.rmtree(disk, ignore_errors=True)
        atexit.register(shutil.rmtree, disk, ignore_errors=True)
        return {"device_map": where, "offload_folder": str(disk)}

    def weight_bytes(self) -> int:
        """Return about how many bytes its weights will take, read from the heads of its files."""
        quant, vocab = (
            self.args.teacher_quant,
            max((max(shape) for shape in self.shapes if len(shape) == 2), default=0),
        )

        def each(shape):
            return (
                QUANT_BYTES[quant]
                if quant and len(shape) == 2 and vocab not in shape
                else self.dtype.itemsize
            )  # tokens stay whole

        return int(sum(math.prod(shape) * each(shape) for shape in self.shapes))

    def activation_bytes(self) -> int:
        """Return about how many bytes one layer's activations take: nothing is kept for a backward
        pass."""
        matrices = [shape for shape in self.shapes if len(shape) == 2]
        vocab = max(map(max, matrices), default=0)
        width = max((min(shape) for shape in matrices if vocab in shape), default=0)
        inner = max((max(shape) for shape in matrices if vocab not in shape), default=0)
        return self.args.tokens_per_microbatch * (6 * width + 3 * inner) * self.dtype.itemsize

    def memory_bytes(self, device: torch.device) -> int:
        """Return what it takes on the student's device while it trains, its weights apart: these
        are there already."""
        return (
            self.activation_bytes() if self.device == numbered(device) else 0
        ) + losses.dense_bytes(device)

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

    def at(self, batch: data.Batch, temperature: float) -> losses.TopK | losses.Whole:
        """Return the teacher at a batch's targets and a temperature, on the device of its labels:
        one pass of its body."""
        # no inference mode: what else is taken from this pass may be saved for a student's backward
        # pass
        with torch.no_grad():
            hidden = self.model.hidden(batch.to(self.device)).to(
                self.head.weight.device, self.head.weight.dtype
            )  # (N, D')
            if not self.k or not len(hidden):
                return losses.Whole(hidden, self.head)
            chunks = [topk_and_tails(z, self.k, [temperature]) for _, z in self.head.chunks(hidden)]
            ids, gap, tails = (torch.cat(parts) for parts in zip(*chunks))
            return losses.TopK(ids, gap, tails[:, 0])

    def val_at(self, batch: data.Batch, temperature: float) -> losses.TopK | losses.Whole:
        """Return the same at a val batch's targets. Checked there, at each evaluation: to look at
        every batch would make the GPU wait."""
        kept = self.remembered.get(key := (temperature, *batch.rows))
        if kept is not None:
            return kept
        kept = self.at(batch, temperature)
        if not torch.isfinite(kept.hidden if isinstance(kept, losses.Whole) else kept.gap).all():
            files.fail(
                "the teacher's hidden states are not finite",
                f"NaN or infinity on val rows {batch.rows[:8]}",
                "numbers",
                "--teacher-dtype float32 (some models overflow float16)",
            )
        held = [kept.hidden] if isinstance(kept, losses.Whole) else [kept.ids, kept.gap, kept.tail]
        self.room -= sum(tensor.nbytes for tensor in held)
        if self.room >= 0:
            self.remembered[key] = kept
        return kept

    def val_measures(self) -> dict:
        """Return its own measures on val: one pass over val."""
        return evaluate.evaluate(
            self.model,
            self.dataset.val,
            self.vocab,
            self.args.tokens_per_microbatch,
            sources=self.dataset.sources,
        )


def numbered(device: torch.device) -> torch.device:
    """Return a device with its number: cuda is cuda:0, and equal to it."""
    return torch.empty(0, device=device).device


def spread(
    folder, dtype: torch.dtype, rooms: dict[str, int], trust_remote_code: bool = False
) -> dict[str, str]:
    """Return which part of a model goes where: its layers, in order, to the places of `rooms`
    (bytes) as long as they last, and then to disk.

    All that is not a layer goes to the first place, which runs every layer, and keeps room for one
    that is there for its turn only.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        module = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code),
            trust_remote_code=trust_remote_code,
        )
    body, prefix = module.base_model, module.base_model_prefix
    if not hasattr(body, "layers"):
        files.fail(
            f"--teacher-offload does not know {type(module).__name__}",
            "no .layers",
            "a body with .layers",
            "--teacher-quant, or --logits",
        )

    def size(part):
        return dtype.itemsize * sum(p.numel() for p in part.parameters())

    first, left = next(iter(rooms)), dict(rooms)
    left[first] -= size(module) - size(body.layers) + max(map(size, body.layers))
    where = {name: first for name, part in module.named_children() if part is not body}
    where |= {
        f"{prefix}.{name}": first for name, part in body.named_children() if part is not body.layers
    }
    for number, layer in enumerate(body.layers):
        place = next((place for place, room in left.items() if room >= size(layer)), "disk")
        if place in left:
            left[place] -= size(layer)
        where[f"{prefix}.layers.{number}"] = place
    return where
