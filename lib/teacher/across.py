"""Records of a teacher whose tokenizer is another one (dump_logits.py --map-vocabulary, --align
bytes).

The teacher reads each row as its own template writes it (reread.py), and what it says is put into
the student's ids (translate.py). Where one token of both stands for the same bytes, a record is as
any other: the k likeliest tokens that both know, and the mass of all others, also of those that
only the teacher knows.

--map-vocabulary is for tokenizers that differ in a few tokens (DeepSeek-R1-Distill-Qwen and
Qwen2.5): of any other target nothing is known, and it is refused where these are many.

--align bytes is for any two. Of a group of tokens that cover the same bytes the chain rule gives
the teacher's log-probability, log P. A single token of the student's that the teacher writes as
several has a record of this one token and of all else; of several tokens of the student's the first
one's record holds log P and how many they are (`joint`), and the loss compares P with the product
of theirs. T = 1 alone, and no shape: a product of probabilities is none of a softened distribution.
"""

import argparse
import collections
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lib import checkpoints, data, files, models, template
from lib.head import Head
from lib.teacher import record, reread, translate, writer
from lib.teacher.basis import Basis

LEAST_SHARED = 0.99  # of the answer tokens, which --map-vocabulary wants to be one token to both
LARGEST = 64  # of our tokens in a group, to be compared: it lies in one chunk of targets
MUCH = 0.2  # of the answer tokens that are not compared: it is warned of more
CERTAIN = 1e-6  # what is left beside a group of probability 1, as float32 sums it


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of a teacher with another tokenizer, under a heading of their own."""
    group = parser.add_argument_group("a teacher with another tokenizer (data with --export)")
    either = group.add_mutually_exclusive_group()
    either.add_argument(
        "--map-vocabulary",
        action="store_true",
        help="it differs in a few tokens: map them by their bytes, special ones by their role",
    )
    either.add_argument(
        "--align",
        choices=["bytes"],
        help="it cuts text otherwise: compare where both have cut at the same byte; T = 1",
    )


def check_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse (exit code 2) flags that cannot work together."""
    if not (args.map_vocabulary or args.align):
        return
    which = "--align bytes" if args.align else "--map-vocabulary"
    if args.teacher is None:
        parser.error(f"{which} needs --teacher DIR: a model that is run here")
    if args.verify:
        parser.error(f"--verify N does not go with {which}: --verify alone checks every byte")
    if not args.align:
        return
    if not writer.is_one(args.temperatures):
        parser.error(
            f"--temperatures is {args.temperatures}, wanted 1: the probability of several tokens"
            " together is a product, which says nothing of another T"
        )
    if args.tail_rank:
        parser.error(f"--tail-rank is {args.tail_rank}, wanted 0 with {which}: one bucket")
    args.temperatures, args.tail_rank = "1", 0


def is_asked(args: argparse.Namespace) -> bool:
    """Return whether the flags tell of a teacher with another tokenizer."""
    return args.map_vocabulary or args.align is not None


@dataclass(frozen=True)
class Across:
    """Makes the records of a split, `ours`, which the teacher reads as `theirs`; joint: of groups
    of several tokens too. about: the tokenizer that reads it."""

    ours: data.Split
    theirs: reread.Reread
    joint: bool
    about: str

    @property
    def lost(self) -> dict[str, np.ndarray]:
        """The rows that have no record, by the reason."""
        return self.theirs.lost

    def records(
        self,
        teacher: models.Model,
        head: Head,
        batch: data.Batch,
        k: int,
        temperatures: list[float],
        dtype: np.dtype,
        shape: Basis | None = None,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return what writer.teacher_records does, at our targets of a batch's rows. The
        cross-entropy of a group stands at its first target, and 0 at the others."""
        assert isinstance(teacher, translate.Translated)
        hidden, labels = teacher.hidden(batch), teacher.label[batch.labels]
        each = writer.of_hidden(hidden, labels, head, k, temperatures, dtype, shape, teacher.others)
        wanted = self.ours.batch([[row] for row in batch.rows]).labels.numpy()
        first, last, begin, end = self.groups(batch.rows).T
        found = np.zeros(len(wanted), dtype), np.zeros(len(wanted)), np.zeros(len(wanted), bool)
        records, ce, hits = found
        sums = np.concatenate([[0.0], np.cumsum(each[1])])
        nats = sums[end] - sums[begin]
        single = (last - first == 1) & (end - begin == 1)
        single &= labels.cpu().numpy()[begin] == wanted[first]
        records[first[single]] = each[0][begin[single]]
        more = ~single & (last - first <= LARGEST) & self.joint
        heard = single | more
        right = np.where(single, each[2][begin], nats < math.log(2))
        ce[first[heard]], hits[first[heard]] = nats[heard], right[heard]
        sizes, own = (last - first)[more], wanted[first[more]]
        records[first[more]] = of_groups(nats[more], own, sizes, dtype, head.vocab)
        return found

    def groups(self, rows: list[int]) -> np.ndarray:
        """Return the groups (n, 4) of some rows, end to end."""
        begins = (ends_before(part.rows["targets"][rows]) for part in (self.ours, self.theirs))
        found = [np.zeros((0, 4), np.int64)]
        for row, mine, other in zip(rows, *begins):
            found.append(self.theirs.groups[row] + np.array([mine, mine, other, other]))
        return np.concatenate(found)


def ends_before(counts: np.ndarray) -> np.ndarray:
    """Return how many there are before each: ends_before([2, 3]) == [0, 2]."""
    return np.cumsum(counts, dtype=np.int64) - counts


def of_groups(
    nats: np.ndarray, label: np.ndarray, size: np.ndarray, dtype: np.dtype, vocab: int
) -> np.ndarray:
    """Return the records (n,) of groups of probability exp(-nats): of one token `label`, or, of
    several, for their product (`joint`)."""
    k = dtype["gap"].shape[0]
    ids = (label[:, None] + np.arange(k)) % vocab  # any others behind it
    rest = np.log(np.maximum(-np.expm1(-nats), CERTAIN)) + nats
    known, joint = (size == 1).astype(int), np.where(size > 1, size, 0)
    return record.pack(
        ids, np.zeros(ids.shape), rest[:, None], dtype, vocab, count=known, joint=joint
    )


def read_rows(
    args: argparse.Namespace, dataset: data.Dataset, folder: Path
) -> tuple[dict[str, Across], translate.Table]:
    """Return the rows as the teacher in `folder` reads them, by split, and which tokens are one;
    say both, and refuse a --map-vocabulary that maps too little."""
    which = "--align bytes" if args.align else "--map-vocabulary"
    if dataset.labels:
        seen, mend = (
            "classes",
            "the same without it: a classifier reads the texts by its own tokens",
        )
        files.fail(f"{which} does not go with {dataset.folder}", seen, "language", mend)
    if checkpoints.is_gguf(folder):
        mend = "the checkpoint that it was made of"
        files.fail(f"{which} does not read {folder}", "a GGUF file", "a folder", mend)
    words = checkpoints.with_tokenizer(folder)
    teacher, student = template.load_tokenizer(words, args.trust_remote_code), dataset.tokenizer()
    table = translate.shared(student, teacher, vocab_of(args, student))
    for line in translate.table_said(table, student, teacher):
        print(line)
    reader, made = reread.Reader(dataset, teacher, table), {}
    about = template.identities(teacher)["tokenizer"]
    for name in ("train", "val"):
        with files.telling(f"reading {name} by the teacher's tokenizer"):
            theirs = reread.reread(dataset, name, reader, args.tokens_per_microbatch)
        made[name] = Across(getattr(dataset, name), theirs, args.align is not None, about)
    longest = max(int(one.theirs.rows["length"].max()) for one in made.values())
    models.check_window(folder, longest, args.trust_remote_code)
    say_shared(made, folder)
    return made, table


def vocab_of(args: argparse.Namespace, student) -> int:
    """Return V: --vocab, or the rows of --student's output layer, or the data's tokens."""
    if args.vocab:
        return args.vocab
    if not args.student:
        return len(student)
    return checkpoints.tokens_of(checkpoints.local_folder(args.student, args.trust_remote_code))


def settings_across(made: dict[str, Across], teacher: models.Model) -> dict:
    """Return what a chunk must also have been made with to be continued."""
    if not made:
        return {}
    assert isinstance(teacher, translate.Translated)
    settings = {"counted": True, "across": made["train"].about}
    if made["train"].joint:
        return settings | {"joint": True}
    limit = teacher.limit or teacher.vocab
    return settings | {"no_mass": [id for id in teacher.lacking if id < limit]}


def say_shared(made: dict[str, Across], folder: Path) -> None:
    """Print how much of the answers is compared, and warn where it is little; refuse where it is
    nothing, or --map-vocabulary maps too little of what was read."""
    lost: collections.Counter[str] = collections.Counter()
    targets = single = several = inside = 0
    for one in made.values():
        lost.update({why: len(rows) for why, rows in one.lost.items()})
        gone = np.concatenate([np.zeros(0, np.int64), *one.lost.values()])
        targets += one.ours.targets - int(one.ours.rows["targets"][gone].sum())
        for first, last, begin, end in (groups.T for groups in one.theirs.groups):
            mine, theirs = last - first, end - begin
            single += int(((mine == 1) & (theirs == 1)).sum())
            several += int(((mine == 1) & (theirs > 1)).sum())
            inside += int(mine[mine > 1].sum())
    for why, count in lost.items():
        print(f"rows: {count:,} have no record ({why})")
    if not targets:
        files.fail(
            f"{folder} can read no row",
            "; ".join(lost),
            mend="another teacher, or prepare_data.py --answers teacher: its text",
        )
    joint, share = made["train"].joint, single / targets
    print(f"tokens: {single:,} of {targets:,} answer tokens ({share:.2%}) are one token to both")
    rest = 1 - share
    if joint:
        rest = 1 - (single + several + inside) / targets
        print(
            f"tokens: {several / targets:.2%} are several to the teacher, {inside / targets:.2%}"
            f" lie in groups of several, {rest:.2%} are not compared"
        )
    if not joint and share < LEAST_SHARED:
        files.fail(
            f"--map-vocabulary does not map enough of {folder}'s tokens",
            f"{share:.1%} of the answer tokens",
            f"at least {LEAST_SHARED:.0%}",
            "--align bytes, for tokenizers that cut text otherwise",
        )
    if rest > MUCH:
        print(
            f"WARNING: {rest:.0%} of the answer tokens are not compared: the teacher's tokenizer"
            " writes another text (another case, other blanks); there the labels alone teach"
        )
