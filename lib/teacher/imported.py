"""Records made of other people's dumps (dump_logits.py --import PATH --format NAME; what a file
holds: foreign.py): the k likeliest tokens at T = 1 and the mass of all others, as of a server.

A file's rows are the data's by their token ids alone: a row of the data takes what a row of the
file says whose tokens begin with its own, up to its last target (where a format has no prompts, its
answer). So the file's order, its length, and what it holds beside, do not matter; rows of the data
that nothing is said of get no record.

The file is read twice, row by row: first to see what it holds, so that nothing is written of one
that does not fit; then to write. Killed anywhere, the same command goes on with the rows that are
missing, and the records are byte for byte those of an import left alone.
"""

import argparse
import collections
import hashlib
import itertools
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from lib import data, files, flags
from lib.run import Interrupt
from lib.teacher import foreign, record, truncated, writer, written
from lib.teacher.foreign import FORMS, Form, Told

MOST_UNMATCHED = 0.1  # of the rows of the file, or of the data where these are fewer
# of the probabilities of a target: what was stored in few bits sums to 1 no nearer than so
MOST_MASS = 1.1
WIDEST = 0.99  # of the targets: so many keep every token that the file has (k)
LEAD_ROWS = 64  # rows by which the lead of a format is found out that has none for certain
RENORMALISED = 1e-5  # mass outside the top k, below which there is none
SELDOM = 0.5  # of the targets: fewer whose own token is told of are a sign of something else
NO_ROW = "no row of the data has these tokens"
OF_MANY = "the same answer to several prompts"
SILENT = "no distribution at a target"
NO_MASSES = "probabilities that sum to more than 1"
MISSING = "not in the file"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of an import, under a heading of their own."""
    group = parser.add_argument_group("another tool's dump")
    group.add_argument(
        "--import",
        dest="import_",
        nargs="+",
        metavar="PATH",
        help=(
            "instead of --teacher: files or folders of another tool's dump; --teacher-model: whose"
            " it is, where that is known"
        ),
    )
    group.add_argument("--format", choices=sorted(FORMS), help="which tool's (docs/methods.md)")


def check_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> bool:
    """Refuse (exit code 2) flags that cannot work, and put in what a file can say: T = 1 and no
    shape. Return whether there is an import at all."""
    if (args.import_ is None) != (args.format is None):
        parser.error("--import PATH and --format NAME belong together")
    if args.import_ is None:
        return False
    for name in ("teacher", "teacher_url", "check_with"):
        if getattr(args, name) is not None:
            parser.error(f"--import PATH takes the place of a teacher: no {flags.spelled(name)}")
    if not writer.is_one(args.temperatures):
        parser.error(
            f"--temperatures is {args.temperatures}, wanted 1: the file holds probabilities, and"
            " the mass outside the top k at another T does not follow from them"
        )
    if args.tail_rank:
        parser.error(
            f"--tail-rank is {args.tail_rank}, wanted 0: the file says nothing of the rest's shape"
        )
    if args.verify:
        parser.error("--verify N needs --teacher DIR")
    args.asked_k, args.temperatures, args.tail_rank = args.k, "1", 0
    args.values = args.values or "fp16"
    return True


class Index:
    """The rows of the data by a hash of their tokens up to the last target (`alone`: from the first
    one on); those of val are numbered behind those of train."""

    def __init__(self, dataset: data.Dataset, alone: bool) -> None:
        self.dataset, self.alone = dataset, alone
        self.train = len(dataset.train.rows)
        self.count = self.train + len(dataset.val.rows)
        keys = np.zeros(self.count, np.uint64)
        for row in range(self.count):
            keys[row] = prefix_keys(self.tokens(row))[-1:].sum()
        self.rows = np.argsort(keys, kind="stable")
        self.keys = keys[self.rows]

    def row(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Return a row's token ids up to its last target (L,), and the places of its targets."""
        split, at = self.dataset.train, number
        if number >= self.train:
            split, at = self.dataset.val, number - self.train
        ids, answer = split.row(at)
        places = np.flatnonzero(answer)
        return ids[: int(places[-1]) + 1 if len(places) else 0].astype(np.int64), places

    def tokens(self, number: int) -> np.ndarray:
        """Return the tokens by which a row is found."""
        ids, places = self.row(number)
        return ids[places[0] :] if self.alone and len(places) else ids

    def find(self, ids: np.ndarray) -> list[int]:
        """Return the rows of the data with which tokens (L,) begin; of answers the longest."""
        keys = prefix_keys(ids)
        first, behind = (np.searchsorted(self.keys, keys, side) for side in ("left", "right"))
        found: list[int] = []
        for end in np.flatnonzero(first < behind)[::-1].tolist():
            rows = self.rows[first[end] : behind[end]].tolist()
            found += [row for row in rows if np.array_equal(self.tokens(row), ids[: end + 1])]
            if found and self.alone:
                break
        return found

    def entries(self, number: int, lead: int) -> np.ndarray:
        """Return the places, among the entries of a row of a file, of a row's targets."""
        _, places = self.row(number)
        return (places - places[0] if self.alone else places) - lead


def prefix_keys(ids: np.ndarray) -> np.ndarray:
    """Return a hash (L,) of each beginning of tokens (L,)."""
    powers = np.multiply.accumulate(np.full(len(ids), 0x9E3779B97F4A7C15, np.uint64))
    return np.cumsum((ids.astype(np.uint64) + np.uint64(1)) * powers)


@dataclass
class Found:
    """What files hold of the data. file, place (rows,): where what is said of a row lies, file -1:
    nowhere, and why (rows,); rows: of the files, of which `again` say what was said before, and
    `unmatched` by the reason are of no use; first: the first of them that no row of the data has;
    widths: targets by the number of tokens that are told; inside, whole: of all targets, those
    whose own token is told of, and those outside whose tokens there is no mass."""

    file: np.ndarray
    place: np.ndarray
    why: list[str]
    lead: int
    rows: int = 0
    again: int = 0
    first: str = ""
    unmatched: collections.Counter[str] = field(default_factory=collections.Counter)
    widths: collections.Counter[int] = field(default_factory=collections.Counter)
    inside: int = 0
    whole: int = 0

    @property
    def k(self) -> int:
        """The fewest tokens that are all that is told at WIDEST of the targets."""
        wanted = WIDEST * self.widths.total()
        ends = itertools.accumulate(count for _, count in sorted(self.widths.items()))
        return next(width for width, end in zip(sorted(self.widths), ends) if end >= wanted)

    def say(self, name: str, dataset: data.Dataset) -> None:
        """Print how much of the files is of the data, and refuse files that are not."""
        bad, without = self.unmatched.total(), int((self.file < 0).sum())
        reasons = "; ".join(f"{count:,}: {why}" for why, count in self.unmatched.most_common())
        limit = int(MOST_UNMATCHED * min(self.rows, len(self.file)))
        if min(bad, without) > limit or without == len(self.file):
            files.fail(
                f"{name} is not of {dataset.folder}",
                f"{bad:,} of {self.rows:,} rows without their like ({reasons}), and {without:,} of"
                f" the data's {len(self.file):,} left over{self.first}",
                f"at most {limit:,} of either ({MOST_UNMATCHED:.0%} of the fewer)",
                "data prepared with the tokenizer and chat template of the dump (prepare_data.py"
                " --tokenizer, --chat-template), or its own --format",
            )
        print(
            f"import: {self.rows - bad:,} of {self.rows:,} rows are the data's"
            + (f" ({reasons})" if reasons else "")
            + (f", {self.again:,} of them say again what another said" if self.again else "")
            + f"; {without:,} of the data's {len(self.file):,} rows get no record"
        )
        targets = max(1, self.widths.total())
        print(
            f"import: the data's own token is told of at {self.inside / targets:.1%} of the"
            " targets; where it is not, the teacher's cross-entropy is counted as low as it can be"
            + (
                "; WARNING: that is few: is it this data's?"
                if self.inside < SELDOM * targets
                else ""
            )
        )
        if self.whole > WIDEST * targets:
            print(
                "import: WARNING: at nearly all targets the k probabilities sum to 1: they were"
                " renormalised, or cut, when they were written, and what the teacher gave all other"
                " tokens is lost: the student will learn that it gave them none"
            )


def match(paths: list[Path], form: Form, index: Index) -> Found:
    """Return what files hold of the data."""
    lead = lead_of(paths, form, index) if form.lead is None else form.lead
    count = index.count
    found = Found(np.full(count, -1, np.int32), np.zeros(count, np.int64), [MISSING] * count, lead)
    for number, path in enumerate(paths):
        for place, where, parts in foreign.rows_told(path, form):
            for said in parts:
                found.rows += 1
                faults = {row: unusable(said, index, row, lead) for row in index.find(said.ids)}
                usable = [row for row, wrong in faults.items() if not wrong]
                if index.alone and len({index.row(row)[0].tobytes() for row in faults}) > 1:
                    faults, usable = dict.fromkeys(faults, OF_MANY), []
                if not usable:
                    found.unmatched[next(iter(faults.values()), NO_ROW)] += 1
                for row, wrong in faults.items():
                    if wrong and found.file[row] < 0:
                        found.why[row] = wrong
                if not faults and not found.first:
                    own = " ".join(map(str, index.tokens(0)[:6]))
                    theirs = " ".join(map(str, said.ids[:6]))
                    found.first = f"; {path} {where} begins {theirs}, the data's first {own}"
                fresh = [row for row in usable if found.file[row] < 0]
                found.again += bool(usable) and not fresh
                for row in fresh:
                    found.file[row], found.place[row] = number, place
                    count_in(found, said, index, row)
    return found


def unusable(said: Told, index: Index, row: int, lead: int) -> str:
    """Return why what a file says of a row of the data cannot be used, "" where it can."""
    entries = index.entries(row, lead)
    if entries[0] < 0 or entries[-1] >= len(said.logp):
        return SILENT
    masses = np.exp(said.logp[entries]).sum(1)
    return SILENT if not masses.all() else NO_MASSES if masses.max() > MOST_MASS else ""


def count_in(found: Found, said: Told, index: Index, row: int) -> None:
    """Count a row of the data among what was found."""
    entries = index.entries(row, found.lead)
    logp = said.logp[entries]
    found.widths.update(np.isfinite(logp).sum(1).tolist())
    found.whole += int((np.exp(logp).sum(1) > 1 - RENORMALISED).sum())
    own = own_logp(said.top[entries], logp, index, row)
    found.inside += int(np.isfinite(own).sum())


def own_logp(top: np.ndarray, logp: np.ndarray, index: Index, row: int) -> np.ndarray:
    """Return the log-probabilities (n,) that what is told of a row's targets, ids (n, m) and theirs
    (n, m), gives the tokens that are there; -inf of those that it does not tell of."""
    ids, places = index.row(row)
    return np.where(top == ids[places][:, None], logp, -np.inf).max(1)


def lead_of(paths: list[Path], form: Form, index: Index) -> int:
    """Return the lead with which the data's own tokens are told of more often, over the first rows
    that are the data's: what an entry is of, in a format of which two readings are in use."""

    def pairs() -> Iterator[tuple[Told, int]]:
        for path in paths:
            for _place, _where, parts in foreign.rows_told(path, form):
                for said in parts:
                    for row in index.find(said.ids):
                        yield said, row

    inside, targets = {1: 0, 0: 0}, 0
    for said, row in itertools.islice(pairs(), LEAD_ROWS):
        targets += len(index.entries(row, 0))
        for lead in inside:
            if not unusable(said, index, row, lead):
                entries = index.entries(row, lead)
                own = own_logp(said.top[entries], said.logp[entries], index, row)
                inside[lead] += int(np.isfinite(own).sum())
    lead = max(inside, key=lambda one: inside[one])
    if targets:
        shares = {one: f"{count / targets:.1%}" for one, count in inside.items()}
        print(
            f"import: entry j is read as of token j + {lead}: so the data's own token is told of at"
            f" {shares[lead]} of {targets:,} targets, as of token j + {1 - lead} at"
            f" {shares[1 - lead]}"
        )
    return lead


def records_of(
    said: Told, index: Index, row: int, lead: int, made: writer.Writer
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the records of a row's targets, the teacher's cross-entropy at each (nats) and whether
    it had it right, each (n,). Of a token that is not told of, the most that it can have counts:
    the mass of the rest, or that of the least likely token that is."""
    entries, vocab, k = index.entries(row, lead), made.settings["vocab"], made.settings["k"]
    most = min(vocab, max(k, said.top.shape[1]))
    ids, logp = truncated.likeliest(said.top[entries], said.logp[entries], vocab, most)
    own, ids, logp = own_logp(ids, logp, index, row), ids[:, :k], logp[:, :k]
    least = np.where(np.isfinite(logp), logp, 0.0).min(1)
    ce = -np.where(np.isfinite(own), own, np.minimum(least, truncated.log_rest(logp)))
    hits = np.isfinite(own) & (own >= logp[:, 0])
    return truncated.packed(ids, logp, made.dtype, vocab), ce, hits


def all_there(args: argparse.Namespace, settings: dict, wanted: list, out: Path) -> bool:
    """Return whether all chunks are finished, and say so: then the files need not be read."""
    metas = [record.chunk_folder(out, chunk) / "meta.json" for chunk in wanted]
    if args.fresh or not all(path.exists() for path in metas):
        return False
    k = args.asked_k or files.read_json(metas[0], writer.DUMP_ANEW).get("k")
    if not all(writer.is_finished(path.parent, settings | {"k": k}) for path in metas):
        return False
    for path in metas:
        print(f"dump {path.parent}: already finished; nothing to do (--fresh dumps it anew)")
    return True


def convert(args: argparse.Namespace, dataset: data.Dataset, wanted: list, out: Path) -> None:
    """Write the chunks `wanted` from another tool's files."""
    if dataset.labels:
        files.fail("--import does not go with classes", wanted="--teacher DIR, a classifier")
    paths, form, called = foreign.paths_of(args.import_), FORMS[args.format], " ".join(args.import_)
    with files.telling(f"reading {called}"):
        identity = hashlib.sha256(f"imported {files.sha256(*paths)}".encode()).hexdigest()
        name = args.teacher_model or called
        settings = truncated.settings_of(args, dataset, identity, name, record.IMPORTED)
        settings["counted"] = True  # some targets may have fewer
        if all_there(args, settings, wanted, out):
            return
        index = Index(dataset, form.alone)
        found = match(paths, form, index)
    found.say(called, dataset)
    settings["k"], most = args.asked_k or found.k, min(max(found.widths), settings["vocab"])
    if settings["k"] > most:
        told = f"at most {most}, of the tokens that are told of at a target"
        files.fail("k does not fit", settings["k"], told, f"--k {most}")
    missing = []
    for chunk in wanted:
        folder = record.chunk_folder(out, chunk)
        numbers = writer.rows_of(dataset, chunk) + (index.train if chunk == "val" else 0)
        if not args.fresh and writer.is_finished(folder, settings):
            print(f"dump {folder}: already finished; nothing to do (--fresh dumps it anew)")
        elif (found.file[numbers] < 0).all():
            print(f"dump {folder}: nothing is said of its rows; it is not written")
        else:
            missing.append(chunk)
    print(
        f"teacher: {name}, from {args.format}'s files; the top {settings['k']} of"
        f" {settings['vocab']:,} at T = 1, as which they are taken, and the mass of the rest: no"
        " other T, no shape (one bucket), no answers of its own"
    )
    if args.teacher_model and (other := written.other_teacher(dataset, [(args.teacher_model, "")])):
        print(other)
    writer.check_disk(out, dataset, missing, settings, width=0)
    if args.dry_run:
        return print("--dry-run: nothing was written")
    held = writer.empty_chunks(out, missing) if args.fresh else {}
    interrupt = Interrupt()
    for chunk in missing:
        folder = record.chunk_folder(out, chunk)
        holding = held.get(chunk) or files.lock(folder)
        if not (folder / "meta.json").exists():  # another process may have finished it
            write_chunk(args, paths, chunk, folder, settings, index, found, interrupt)
        holding.release()


def write_chunk(
    args: argparse.Namespace,
    paths: list[Path],
    chunk: int | str,
    folder: Path,
    settings: dict,
    index: Index,
    found: Found,
    interrupt: Interrupt,
) -> None:
    """Write one chunk, or what is missing of it."""
    dataset, before = index.dataset, index.train if chunk == "val" else 0
    split = dataset.val if chunk == "val" else dataset.train
    made = writer.Writer(folder, chunk, split, writer.rows_of(dataset, chunk), settings)
    nowhere = made.missing
    nowhere = nowhere[found.file[nowhere + before] < 0]
    for why in sorted({found.why[row + before] for row in nowhere}):
        rows = [row for row in nowhere if found.why[row + before] == why]
        made.leave_out(np.array(rows), why)
    left = made.missing
    print(
        f"dump {folder}: {len(made.rows) - len(nowhere):,} of {len(made.rows):,} rows,"
        f" {made.dtype.itemsize} bytes a target; {len(left):,} rows are to be read",
        flush=True,
    )
    bar = tqdm(total=len(left), desc=f"dump {chunk}", unit="row", disable=not sys.stderr.isatty())
    begun = heard = time.monotonic()
    for count, (row, said) in enumerate(
        read_again(paths, args.format, index, found, left + before)
    ):
        records, ce, hits = records_of(said, index, row, found.lead, made)
        made.add(np.array([row - before]), records, ce, hits)
        bar.update()
        if interrupt.number:
            made.flush()
            interrupt.leave(f"dump: saved {folder}; the same command continues")
        if bar.disable and time.monotonic() - heard > files.TOLD_EVERY_S:
            heard = time.monotonic()
            print(f"dump {chunk}: {count + 1:,} of {len(left):,} rows", flush=True)
    bar.close()
    cost = {"dumped_s": round(time.monotonic() - begun, 1), "checksums": {}}
    files.write_json(folder / writer.COST_FILE, cost)
    origin = {"paths": args.import_, "format": args.format}
    meta = made.finish(dataset.identities, dataset.sources, imported=origin)
    print(
        f"dump {folder}: done, {made.dtype.itemsize} bytes a target, teacher ce"
        f" {meta['teacher_ce']:.4f} acc1 {meta['teacher_acc1']:.4f}, top-k coverage at T=1"
        f" {meta['coverage']['1']:.3f}",
        flush=True,
    )


def read_again(
    paths: list[Path], name: str, index: Index, found: Found, rows: np.ndarray
) -> Iterator[tuple[int, Told]]:
    """Yield rows of the data, in the files' order, and what was found of them there."""
    for number, path in enumerate(paths):
        left = {*rows[found.file[rows] == number].tolist()}
        wanted = sorted({int(found.place[row]) for row in left})
        for place, _where, parts in foreign.rows_told(path, FORMS[name], wanted) if wanted else ():
            for said in parts:
                for row in index.find(said.ids):
                    here = row in left and found.place[row] == place
                    if here and not unusable(said, index, row, found.lead):
                        left.remove(row)
                        yield row, said
