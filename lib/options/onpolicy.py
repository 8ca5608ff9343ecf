"""Rows that the student answers anew while it learns (stage2_kd.py --teacher DIR --on-policy 0.5):
it is taught where it goes, mistakes and all, and not only where the given answers go.

The share --on-policy of each step's rows keeps its prompt and gets a new answer, written by the
student as it is at that step, at T = 1 from its whole distribution; the teacher reads it and the
divergence is taken at every token of it, as at any row (GKD, arXiv:2306.13649, algorithm 1: lambda
is the share). No gradient flows through the sampling: the text is given once it is written. Its
cross-entropy is left out, since its tokens are no reference: alpha is 1 there. Which rows, and what
is written, follow from (seed, step, row) and the weights: a continued run writes the same.
"""

import argparse
import itertools
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from lib import data, files, flags, generate, models, plan
from lib.options import sampling
from lib.options.drift import Drift

SLOTS = 64  # answers in work at once
LOOKED_THROUGH = 4096  # rows whose prompts are measured for an estimate
SOURCE = "own"  # what --divergence, --alpha and the log call these rows


def add_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("on the student's own text (--teacher)")
    group.add_argument(
        "--on-policy",
        type=float,
        default=0.0,
        metavar="X",
        help=(
            "share of a step's rows that the student answers anew at every step, at T = 1"
            " (default: %(default)s)"
        ),
    )
    group.add_argument(
        "--max-new-tokens",
        type=int,
        default=None,
        metavar="N",
        help="longest answer of those (default: up to the length of the longest row of the data)",
    )


def check_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse (exit code 2) values that cannot work."""
    if not 0 <= args.on_policy <= 1:
        parser.error(f"--on-policy is {args.on_policy}, wanted a share from 0 to 1")
    if args.on_policy and not args.teacher:
        parser.error(
            "--on-policy needs the teacher live: it goes with --teacher, not with --logits (own"
            " text on disk: prepare_data.py --answers student)"
        )
    if args.on_policy and flags.folders_of(args.teacher):
        parser.error("--on-policy needs one teacher, and --teacher names several: wanted one DIR")
    if args.max_new_tokens is not None:
        if not args.on_policy:
            parser.error("--max-new-tokens belongs to --on-policy")
        flags.positive(parser, args, "max_new_tokens")


def before_answer(ids: np.ndarray, answer: np.ndarray) -> list[int]:
    """Return a row's tokens before its last answer: what is answered anew."""
    targets = np.flatnonzero(answer)
    breaks = np.flatnonzero(np.diff(targets) > 1)
    return ids[: targets[breaks[-1] + 1] if len(breaks) else targets[0]].tolist()


class OwnRows:
    """A plan of rows (lib/plan.py) some of which are answered anew, each step's before it begins:
    they are of one source more, `SOURCE`, whose micro-batches hold nothing else.

    It is the plan `rows` in all else. targets and tokens of a step are those of what it trains on,
    given and own; so they are known once the step's answers are written.
    """

    def __init__(self, args, dataset: data.Dataset, rows: plan.Rows) -> None:
        self.args, self.dataset, self.rows = args, dataset, rows
        if SOURCE in rows.sources and SOURCE not in rows.own:
            files.fail(
                f"--on-policy calls what the student writes {SOURCE}",
                f"a source {SOURCE} of {dataset.folder} that has references",
                "another name: these would lose their cross-entropy",
                "prepare_data.py --source NAME=WHERE",
            )
        self.sources, self.own = [*rows.sources, SOURCE], {*rows.own, SOURCE}
        self.step, self.fresh, self.figures = -1, False, {}
        self.begun, self.writing_s = 0.0, 0.0  # of the step

    def __getattr__(self, name: str) -> Any:
        return getattr(self.rows, name)

    def trained(self) -> list[int]:
        return [*self.rows.trained(), len(self.sources) - 1]

    def keep_apart(self, group: np.ndarray) -> None:
        self.group = group

    def resume(self, more: dict[str, Any]) -> None:
        self.drift = Drift(more)
        self.rows.resume(more)

    def lay(self, student: models.Model, more: dict[str, Any]) -> None:
        context, wanted = generate.context_of(student.module), self.args.max_new_tokens
        if context and wanted and wanted >= context:
            files.fail(
                "--max-new-tokens is beyond the student's context",
                f"{wanted} tokens, the student sees {context}",
                "fewer, for the prompt has to fit too",
                "a smaller --max-new-tokens",
            )
        self.student = student
        self.rows.lay(student, more)

    def say(self, eval_every: int) -> None:
        self.rows.say(eval_every)
        print(
            f"on-policy: {self.args.on_policy:.0%} of each step's rows are answered anew, in at"
            f" most {self.longest():,} tokens with their prompts"
        )

    def longest(self) -> int:
        """Return the most tokens of a row: those of the longest one given, so that whatever fits
        there fits here."""
        return int(self.lengths[self.there].max())

    def kinds(self) -> list[tuple[float, int, float]]:
        """Return the rows given, and those written, as if all of these went to their limit: the
        share of targets is that of the shortest prompt."""
        count = min(LOOKED_THROUGH, len(self.there))
        some = self.there[np.linspace(0, len(self.there) - 1, count).astype(int)].tolist()
        row = self.dataset.train.row
        prompts = np.array([len(before_answer(*row(number))) for number in some])
        limits = np.minimum(self.longest() - prompts, self.args.max_new_tokens or self.longest())
        lengths, share = prompts + limits, self.args.on_policy
        tokens = share * float(lengths.mean()) * len(self.lengths)
        given = [((1 - share) * there, *more) for there, *more in self.rows.kinds()]
        own = (tokens, int(lengths.max()), float((limits / lengths).max()))
        return [*(given if share < 1 else []), own]

    def targets(self, step: int, without: Iterable[int] = ()) -> int:
        return plan.targets_of(self.of_step(step).rows, without)

    def tokens(self, step: int) -> int:
        return int(self.of_step(step).rows["length"].sum())

    def batches(self, step: int, device: torch.device) -> Iterator[data.Batch]:
        split = self.of_step(step)
        rows, groups = np.arange(len(split.rows)), self.group[split.rows["source"]]
        return self.rows.dealt(step, rows, split, groups, device)

    def hear(self, step: int, measures: dict[str, Any]) -> dict[str, float]:
        self.fresh = False  # what is left to say is of a step before it
        return self.rows.hear(step, measures)

    def shares(self, first: int, end: int) -> dict[str, float]:
        """Return for the log what the rows say, and of the newest step's own answers, once, the
        mean of their tokens, the share that was ended, their entropy, and the share of the step's
        time until now in which they were written."""
        own, self.fresh = self.figures if self.fresh else {}, False
        if own:
            own = own | {"own_time": self.writing_s / (time.perf_counter() - self.begun)}
        return self.rows.shares(first, end) | own

    def of_step(self, step: int) -> data.Split:
        """Return the rows that a step trains on, the given ones first; the others are written by
        the student as it is now, once."""
        if step != self.step:
            self.begun = time.perf_counter()
            numbers = self.rows.of(step)
            rng = np.random.default_rng([self.args.seed, step, 1])
            # of 2.5 rows 2 or 3, by chance: the share holds over the run
            count = int(self.args.on_policy * len(numbers) + rng.random())
            chosen = rng.permutation(len(numbers)) < count
            train, rows = self.dataset.train, []
            for number in numbers[~chosen].tolist():
                rows.append((*train.row(number), int(train.rows["source"][number])))
            for ids, answer in self.write(step, numbers[chosen].tolist()):
                rows.append((ids, answer, len(self.sources) - 1))
            self.writing_s = time.perf_counter() - self.begun
            self.step, self.split, self.fresh = step, data.Split.of(rows), True
        return self.split

    @torch.no_grad()
    def write(self, step: int, numbers: list[int]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return rows, (L,) token ids and (L,) answer mask, in the order of `numbers`: their
        prompts, with new answers. Several processes write a part of them each."""
        module, device = self.student.module, self.student.device
        amp, longest, requests = models.pick_amp(self.args.amp, device), self.longest(), []
        for number in numbers[self.peers.rank :: self.peers.world]:
            ids = before_answer(*self.dataset.train.row(number))
            limit = min(longest - len(ids), self.args.max_new_tokens or longest)
            seed = (self.args.seed << 64) + (step << 32) + number
            requests.append(generate.Request(number, ids, limit, seed, top=0))
        how = generate.Sampling(1.0, stops=tuple(generate.end_tokens(module.generation_config)))
        logp: list[float] = []  # of every token, as it is drawn

        def drawn(request: generate.Request, token: int, likely: generate.Likely | None) -> None:
            logp.append(likely.logp)

        training, written = module.training, []
        module.eval()
        with (
            torch.autocast(device.type, amp, enabled=amp is not None),
            files.telling(f"step {step}: writing {len(requests)} answers"),
        ):
            written.extend(generate.generate(module, requests, how, SLOTS, drawn))
        module.train(training)
        each = self.peers.of_each((written, logp))
        of_row = {answer.request.key: answer for answers, _ in each for answer in answers}
        self.hear_written([*of_row.values()], [known for _, drawn in each for known in drawn])
        return [self.row_of(of_row[number]) for number in numbers]

    def hear_written(self, answers: list[generate.Answer], logp: list[float]) -> None:
        """Take what the log says of a step's answers, and say what has gone wrong with them since
        the first steps. logp: of their tokens, nats, without those that ended one."""
        ends = [answer.likely.logp for answer in answers if answer.end is not None]
        self.figures = {}
        if answers:
            count, logp = len(answers), logp + ends
            tokens = [len(answer.ids) for answer in answers]
            for line in self.drift.add(tokens, len(ends), logp):
                tqdm.write(f"on-policy: WARNING: {line}")  # above the progress bar, if there is one
                sys.stdout.flush()
            self.figures = {
                "own_tokens": sum(tokens) / count,
                "own_ended": len(ends) / count,
                "own_entropy": -sum(logp) / len(logp),
            }

    def row_of(self, answer: generate.Answer) -> tuple[np.ndarray, np.ndarray]:
        """Return a row: the prompt, the answer and the token that ended it, up to the first one
        that the teacher does not know."""
        told = answer.ids if answer.end is None else [*answer.ids, answer.end]
        most, apart = self.student.head().vocab, self.student.apart
        known = itertools.takewhile(lambda token: token < most and token not in apart, told)
        ids = np.array([*answer.request.ids, *known], np.uint32)
        return ids, np.arange(len(ids)) >= len(answer.request.ids)


def open_rows(args, dataset: data.Dataset, there: np.ndarray | None = None) -> plan.Rows | OwnRows:
    """Return the plan of a run over the rows that are `there`, some of them answered anew where
    that is wanted, else as lib/options/sampling.py says."""
    rows = sampling.open_rows(args, dataset, there)
    if not args.on_policy:
        return rows
    if dataset.labels:
        files.fail(
            "--on-policy has no text to write",
            f"{dataset.folder} holds classes",
            "rows with answers",
            "the same without --on-policy",
        )
    return OwnRows(args, dataset, rows)
