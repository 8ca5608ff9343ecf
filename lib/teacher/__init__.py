"""Whatever stands for the teacher while a student is trained and measured: its records on disk, or
the model live beside the student.

Contract: `Teacher` below is all that stage2_kd.py and lib/evaluate.py ask of one; neither asks
which it is. `open_teacher` chooses by the flags.

    logits.py   a logits folder, read          writer.py   its chunks, written (dump_logits.py)
    shared.py   a dump by many workers, with leases
    live.py     the model itself               record.py   what a folder and a record hold
    worth.py    can this teacher teach         basis.py    the shape of the tail; fit.py makes it
                                               sample.py   from which targets
    placed.py    where its weights lie, and in how many bits
    parallel.py  a model divided among processes, its output layer by tokens
    quantised.py what it costs that it is run in 8 or 4 bits
    verify.py   records held against their checksums, and against the teacher
    written.py  who wrote the rows             served.py  chunks that a server fills
    several.py  several teachers as one: folders, or live
    across.py   records of a teacher with another tokenizer: translate.py pairs the tokens, and
                reread.py the rows
    truncated.py  top k at T = 1 alone:    imported.py  chunks made of another tool's dump
                  of what is not run here  foreign.py   what such a dump holds
"""

import argparse
import typing

import numpy as np
import torch

from lib import data, flags, losses, models, plan
from lib.teacher import live, logits, parallel, several


class Teacher(typing.Protocol):
    """A teacher over the tokens 0 .. `vocab` - 1 that it and the student both know."""

    @property
    def vocab(self) -> int:
        """V, the tokens that both know; a live teacher's is known from `join` on."""

    @property
    def name(self) -> str:
        """The folder or hub id that it was loaded from, as it was given."""

    @property
    def each(self) -> list[tuple[str, str]]:
        """Of each of its models, name and identity ("" where nobody knows the weights)."""

    @property
    def compares(self) -> bool:
        """Whether `val_at` knows it at T=1, so that KL and agreement can be measured."""

    @property
    def over(self) -> str:
        """In words, what KL to it is summed over."""

    @property
    def model(self) -> models.Model | None:
        """The model itself, where it is live: for what else is taken of it (hidden states, its own
        answers)."""

    def identity(self) -> dict:
        """Return what a run that is continued must find again: names and hashes."""

    def rows(self) -> np.ndarray:
        """Return the numbers of the train rows that it can teach."""

    def join(
        self,
        student: models.Model,
        args: argparse.Namespace,
        amp: torch.dtype | None,
        rows: plan.Rows | None = None,
    ) -> models.Model:
        """Get ready beside a student (a live teacher loads here), refuse one that does not fit, and
        return it cut to the tokens that both know. rows: of a run; None where nothing is trained.
        """

    def say(self) -> None:
        """Print what it is, how much of it is compared, and what is missing."""

    def memory_bytes(self, device: torch.device, targets: int) -> int:
        """Return what training with it takes on the student's device, beside weights that are
        there; targets: of a micro-batch."""

    def at(self, batch: data.Batch, temperature: float) -> losses.Distribution:
        """Return its distribution at a train batch's targets, on the device of their labels."""

    def val_at(self, batch: data.Batch, temperature: float) -> losses.Distribution | None:
        """Return the same at a val batch's targets; None where it is not known there."""

    @property
    def answers(self) -> dict[str, list[int]] | None:
        """What it answered to a few val prompts when it was dumped: tokens, by the row's number;
        None where that is not known."""

    def val_measures(self) -> dict | None:
        """Return its own measures on val, as far as they are known; None where none is."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that choose a teacher, and those of either kind."""
    group = parser.add_argument_group("the teacher")
    either = group.add_mutually_exclusive_group(required=True)
    either.add_argument(
        "--logits",
        nargs="+",
        action=flags.Folders,
        metavar="DIR",
        help="the folder dump_logits.py wrote; of several teachers NAME=DIR NAME=DIR",
    )
    either.add_argument(
        "--teacher",
        nargs="+",
        action=flags.Folders,
        metavar="DIR|ID",
        help=(
            "a model to run beside the student instead: a folder, a hub id or a GGUF file; several"
            " likewise NAME=DIR NAME=DIR"
        ),
    )
    several.add_flags(group)
    beside = parser.add_argument_group("the teacher beside the student (--teacher)")
    live.add_flags(beside)
    parallel.add_tp(beside)


def check_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse (exit code 2) flags that cannot work, and put in the defaults of a live teacher."""
    several.check_flags(parser, args)
    live.check_flags(parser, args)
    parallel.check_live(parser, args)


def open_teacher(
    args: argparse.Namespace, dataset: data.Dataset, peers: typing.Any = None
) -> Teacher:
    """Return the teacher that the flags name. With --eval-only no train rows are asked for. peers:
    the processes that train together (lib/options/ranks.py, class Ranks)."""
    if args.teacher:
        if folders := flags.folders_of(args.teacher):
            return several.SeveralLive(args, dataset, folders)
        return (
            parallel.LiveInParts(args, dataset, peers)
            if args.tp
            else live.LiveTeacher(args, dataset)
        )
    if folders := flags.folders_of(args.logits):
        return several.Several(args, dataset, folders)
    temperature = None if args.eval_only else flags.span(args.temperature)
    return logits.Records(args.logits, dataset, temperature, args.verify)
