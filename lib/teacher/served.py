"""A teacher that nobody loads here: records filled by a server (dump_logits.py --teacher-url).

vLLM scores a prompt that is given as token ids: with `prompt_logprobs` = k it returns, for every
token of it, the log-probabilities of the k likeliest ones at T = 1. So a record of it holds these,
and the mass of all others, 1 - their sum; of other temperatures and of the rest's shape a server
says nothing. Ids are sent, never text, and those that come back are held against them.

Each row is one request, and is kept as it comes (writer.Writer): killed anywhere, the same command
asks for the rows that are missing, and the file is byte for byte that of a dump left alone, as far
as the server says the same again. The client (lib/prepare/ask.py) is handed over by the script.
"""

import argparse
import hashlib
import sys
import time
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import torch
from tqdm import tqdm

from lib import checkpoints, data, files, flags, losses, models
from lib.run import Interrupt
from lib.teacher import record, sample, truncated, writer, written
from lib.teacher.logits import Chunk

K = 20  # what a vLLM grants that was not told otherwise (--max-logprobs)
# of a row's tokens, how many the server may name otherwise: special ones, and pieces of characters
MISNAMED = 0.2
BLANKS = str.maketrans({"\u0120": " ", "\u2581": " ", "\u010a": "\n"})  # of BPE, SentencePiece
NAMED_ROWS = 8  # whose tokens are compared by name
CHECKED = 200  # rows that --check-with scores here too


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of a served teacher, under a heading of their own."""
    group = parser.add_argument_group("a teacher behind a server")
    group.add_argument(
        "--teacher-url",
        metavar="URL",
        help=(
            "instead of --teacher: a server that knows prompt_logprobs (vLLM), up to and with /v1;"
            " its key: TEACHER_API_KEY or OPENAI_API_KEY in the environment"
        ),
    )
    group.add_argument("--teacher-model", metavar="NAME", help="the model's name on that server")
    flags.add(group, "--concurrency", "--timeout", "--retry-for")
    group.add_argument(
        "--check-with",
        metavar="DIR|ID",
        help=f"the same model, here: {CHECKED} rows of each chunk are scored by it and compared",
    )


def check_flags(
    parser: argparse.ArgumentParser, args: argparse.Namespace, keys: tuple[str, ...]
) -> None:
    """Refuse (exit code 2) flags that cannot work together, and put in what a server can say: T = 1
    and no shape. keys: the variables that may hold a key."""
    if (args.teacher is None) == (args.teacher_url is None):
        parser.error("wanted exactly one of --teacher DIR and --teacher-url URL (or --import PATH)")
    if (args.teacher_url is None) != (args.teacher_model is None):
        parser.error("--teacher-url URL and --teacher-model NAME belong together")
    if args.teacher_url is None:
        if args.check_with is not None:
            parser.error("--check-with needs --teacher-url")
        return
    flags.check_server(parser, args, keys)
    if not writer.is_one(args.temperatures):
        parser.error(
            f"--temperatures is {args.temperatures}, wanted 1: a server gives probabilities at"
            " T = 1 alone, and the mass outside the top k at another T does not follow from them"
        )
    if args.tail_rank:
        parser.error(
            f"--tail-rank is {args.tail_rank}, wanted 0: the shape of the rest is fitted to hidden"
            " states, which no server gives"
        )
    if args.verify:
        parser.error("--verify N needs --teacher DIR; with --teacher-url: --check-with DIR")
    args.temperatures, args.tail_rank = "1", 0
    args.k = K if args.k is None else args.k
    args.values = args.values or "fp16"


@dataclass(frozen=True)
class ScoreRequest:
    """A row up to its last target: ids, and the places of its targets among them."""

    path: ClassVar[str] = "completions"
    row: int
    ids: list[int]
    places: np.ndarray
    k: int
    vocab: int
    named: dict[int, str] = field(default_factory=dict)  # what the data's tokenizer calls some ids

    def mend(self, said: str) -> str:
        if "prompt_logprobs" in said and "nexpected" in said:  # transformers serve
            return "a server that scores a prompt of token ids, such as vLLM"
        if "logprobs" in said:
            return f"--k {K}, or a server that grants more (vllm serve --max-logprobs {self.k})"
        return (
            "a server with a longer context, or a smaller --max-len of prepare_data.py"
            f" ({len(self.ids)} tokens here)"
        )

    def body(self) -> dict:
        return {"prompt": self.ids, "prompt_logprobs": self.k}

    def read(self, client: Any, value: dict) -> "Scores":
        """Return what a server says of the row; end the program where it is of other tokens, or is
        nothing."""
        choice = value["choices"][0]
        told = choice.get("prompt_logprobs", value.get("prompt_logprobs"))
        if told is None:
            files.fail(
                f"{client.url} returns no prompt_logprobs",
                ", ".join(sorted(choice)),
                "a server that scores a prompt of token ids, such as vLLM",
                "--teacher DIR, if the model can be loaded here",
            )
        there = [{int(id): one for id, one in (entry or {}).items()} for entry in told]
        changed = [
            i for i in range(1, len(self.ids)) if i < len(there) and self.ids[i] not in there[i]
        ]
        if len(there) != len(self.ids) or changed:
            at = (
                f"another token at place {changed[0]} of" if changed else f"{len(there)} tokens for"
            )
            files.fail(
                f"{client.url} has scored other tokens than it was sent",
                f"{at} the {len(self.ids)} of row {self.row}",
                "the ids that were sent, as they are (no token added in front, no chat template)",
                "the server of a model with the data's tokenizer",
            )
        self._check_names(client, there)
        return self._scores(client, [there[place] for place in self.places])

    def _check_names(self, client: Any, there: list[dict[int, dict]]) -> None:
        """End the program where the server's tokenizer calls the ids otherwise than ours: any
        server has a token of each id. (Pieces of a character have no name that all agree on.)"""
        both = [
            (bare(str(there[i][id].get("decoded_token") or "")), bare(self.named[id]))
            for i, id in enumerate(self.ids)
            if i and id in self.named
        ]
        both = [(theirs, ours) for theirs, ours in both if theirs and ours]
        other = [f"{theirs!r} for {ours!r}" for theirs, ours in both if theirs != ours]
        if len(other) > MISNAMED * len(both):
            files.fail(
                f"{client.url} has another tokenizer than the data",
                f"{other[0]}, and {len(other)} of {len(both)} tokens of row {self.row}",
                "a model whose token ids are the data's",
                "prepare_data.py --tokenizer of that model, or a server of another one",
            )

    def _scores(self, client: Any, told: list[dict[int, dict]]) -> "Scores":
        shape, labels = (len(told), max(map(len, told))), np.zeros(len(told))
        ids, logp = np.full(shape, -1), np.full(shape, -np.inf)
        for i, (entry, place) in enumerate(zip(told, self.places)):
            if len(entry) < self.k:
                files.fail(
                    f"{client.url} gives fewer log-probabilities than were asked for",
                    f"{len(entry)} at a token",
                    self.k,
                    f"--k {len(entry)}",
                )
            labels[i] = float(entry[self.ids[place]]["logprob"])
            ids[i, : len(entry)] = [*entry]
            logp[i, : len(entry)] = [float(one["logprob"]) for one in entry.values()]
        if not np.isfinite(logp[ids >= 0]).all() or logp.max(initial=0.0) > 1e-3:
            raise ValueError("log-probabilities that are none")
        ids, logp = truncated.likeliest(ids, logp, self.vocab, self.k)
        return Scores(self, ids, logp, labels)


@dataclass(frozen=True)
class Scores:
    """What a server said of a row: the k likeliest ids (n, k) at each target, their log p, and that
    (n,) of the labels, nats."""

    request: ScoreRequest
    ids: np.ndarray
    logp: np.ndarray
    labels: np.ndarray
    finish: str = "scored"


def bare(token: str) -> str:
    """Return a token's text without blanks and the marks that stand for one; "" of a piece of a
    character, which each tokenizer shows in its own way."""
    return "" if "\ufffd" in token else token.translate(BLANKS).strip()


def keep(made: writer.Writer, scores: Scores) -> None:
    """Put what a server said of a row among the records of a chunk."""
    vocab = scores.request.vocab
    records = truncated.packed(scores.ids, scores.logp, made.dtype, vocab)
    hits = scores.labels >= scores.logp[:, 0]
    made.add(np.array([scores.request.row]), records, -scores.labels, hits)


def dump(
    args: argparse.Namespace, dataset: data.Dataset, wanted: list, out: Path, ask: ModuleType
) -> None:
    """Write the chunks `wanted` as a server fills them; ask: lib/prepare/ask.py."""
    if dataset.labels:
        files.fail("--teacher-url does not go with classes", wanted="--teacher DIR, a classifier")
    # what lies behind a URL may move: the identity is that of the name
    identity = hashlib.sha256(f"served {args.teacher_model}".encode()).hexdigest()
    settings = truncated.settings_of(args, dataset, identity, args.teacher_model, record.SERVED)
    if args.check_with:  # before anything is asked
        local_model(args, dataset)
    missing = [
        chunk
        for chunk in wanted
        if args.fresh or not writer.is_finished(record.chunk_folder(out, chunk), settings)
    ]
    host = urllib.parse.urlsplit(args.teacher_url).netloc
    print(
        f"teacher: {args.teacher_model} on {host}; the top {args.k} of {settings['vocab']:,} at"
        " T = 1, and the mass of the rest: no other T, no shape (one bucket)"
    )
    if other := written.other_teacher(dataset, [(args.teacher_model, "")]):
        print(other)
    writer.check_disk(out, dataset, missing, settings, width=0)
    if args.dry_run:
        return print("--dry-run: nothing was asked or written")
    held = writer.empty_chunks(out, missing) if args.fresh else {}
    Interrupt(at_once=True)  # also while a server is waited for
    for chunk in wanted:
        folder = record.chunk_folder(out, chunk)
        if chunk not in missing:
            print(f"dump {folder}: already finished; nothing to do (--fresh dumps it anew)")
            continue
        holding = held.get(chunk) or files.lock(folder)
        if not (folder / "meta.json").exists():  # another process may have finished it
            fill(args, dataset, chunk, folder, settings, ask)
        holding.release()
    if args.check_with:
        held_against(args, dataset, wanted, out)


def fill(
    args: argparse.Namespace,
    dataset: data.Dataset,
    chunk: int | str,
    folder: Path,
    settings: dict,
    ask: ModuleType,
) -> None:
    """Write one chunk, or what is missing of it."""
    split = dataset.val if chunk == "val" else dataset.train
    made = writer.Writer(folder, chunk, split, writer.rows_of(dataset, chunk), settings)
    left = made.missing
    print(
        f"dump {folder}: {len(made.rows):,} rows, {made.targets:,} targets, {made.dtype.itemsize}"
        f" bytes each; {len(left):,} rows are asked for",
        flush=True,
    )
    # one token has to be generated
    how = {"max_tokens": 1, "temperature": 0}
    client = ask.Client(args.teacher_url, args.teacher_model, how, args.concurrency, args.timeout)
    bar = tqdm(
        total=int(made.counts[left].sum()),
        desc=f"dump {chunk}",
        unit="target",
        unit_scale=True,
        disable=not sys.stderr.isatty(),
    )
    begun, said, targets = time.monotonic(), time.monotonic(), 0
    requests = requests_of(dataset, split, left, settings)
    try:
        how_long = args.concurrency, args.retry_for
        for scores in ask.ask(client, requests, *how_long, outage, made.flush):
            if scores.finish in ("refused", "failed"):
                not_scored(client, scores)
            keep(made, scores)
            bar.update(len(scores.ids))
            targets += len(scores.ids)
            if bar.disable and time.monotonic() - said > 15:
                said = time.monotonic()
                share = f"{targets:,} of {bar.total:,} targets"
                print(
                    f"dump {chunk}: {share}, {targets / (said - begun):.0f} targets/s", flush=True
                )
    except SystemExit:
        print(f"dump: what came is kept in {folder}; the same command continues", flush=True)
        raise
    finally:  # however it ends
        made.flush()
    bar.close()
    cost = {"dumped_s": round(time.monotonic() - begun, 1), "checksums": {}}
    files.write_json(folder / writer.COST_FILE, cost)
    meta = made.finish(dataset.identities, dataset.sources)
    print(
        f"dump {folder}: done, {made.dtype.itemsize} bytes a target, teacher ce"
        f" {meta['teacher_ce']:.4f} acc1 {meta['teacher_acc1']:.4f}, top-k coverage at T=1"
        f" {meta['coverage']['1']:.3f}",
        flush=True,
    )


def outage(line: str) -> None:
    print(f"dump: {line}", flush=True)


def requests_of(
    dataset: data.Dataset, split: data.Split, rows: np.ndarray, settings: dict
) -> Iterator[ScoreRequest]:
    tokenizer = dataset.tokenizer()
    for count, row in enumerate(rows.tolist()):
        ids, answer = split.row(row)
        places = np.flatnonzero(answer)
        sent = ids[: int(places[-1]) + 1].tolist()
        named = {id: tokenizer.decode([id]) for id in {*sent}} if count < NAMED_ROWS else {}
        yield ScoreRequest(row, sent, places, settings["k"], settings["vocab"], named)


def not_scored(client: Any, reply: Any) -> None:
    """Say in one line that a server will not score a row, and what to do."""
    mend = "the same command: it asks for what is missing"
    if reply.finish == "refused":
        mend = reply.request.mend(reply.said)
    files.fail(
        f"{client.url} does not score row {reply.request.row}",
        reply.said,
        "prompt_logprobs of it",
        mend,
    )


def local_model(args: argparse.Namespace, dataset: data.Dataset) -> tuple:
    """Return the folder of --check-with, refused if it does not fit the data, and the ids that are
    other tokens to it."""
    folder = checkpoints.local_folder(args.check_with, args.trust_remote_code)
    return folder, models.check_fits(folder, dataset, args.trust_remote_code, teacher=True)


@torch.inference_mode()
def held_against(args: argparse.Namespace, dataset: data.Dataset, wanted: list, out: Path) -> None:
    """Print how far the server's records are from what the same model says here (--check-with)."""
    device = models.pick_device(args.device, args.threads)
    folder, apart = local_model(args, dataset)
    dtype = models.pick_dtype(args.dtype, device, folder)
    options = dict(attn=args.attn, compiled=args.compile, trust_remote_code=args.trust_remote_code)
    here = models.load(
        args.check_with, device, dtype, dataset=dataset, pack=False, apart=apart, **options
    )
    for chunk in wanted:
        part = Chunk(record.chunk_folder(out, chunk), chunk, dataset)
        head = replace(here, limit=part.meta["vocab"]).head()
        split = dataset.val if chunk == "val" else dataset.train
        rows = writer.rows_of(dataset, chunk)
        first, figures = int(split.rows["first_target"][rows[0]]), []
        some = sample.evenly(rows, CHECKED)
        for lines in writer.batches_of(some, split.rows["length"], args.tokens_per_microbatch):
            batch = split.batch([[row] for row in lines.tolist()]).to(device)
            records = part.records[batch.numbers.numpy() - first]
            for piece, z in head.chunks(here.hidden(batch)):
                figures.append(differences(z, record.unpack(records[piece], head.vocab, 0)))
        far, same, kl = (torch.cat(each) for each in zip(*figures))
        print(
            f"dump {part.folder}: {len(some)} rows scored by {args.check_with} too: a probability"
            f" is at most {far.max():.2g} off, the likeliest token the same at"
            f" {same.float().mean():.1%}, KL {kl.mean():.2g} nats a target",
            flush=True,
        )


def differences(
    z: torch.Tensor, known: losses.TopK
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return how far a model's logits z (n, V) are from a record, each (n,): the largest difference
    of a probability at T = 1, of the k tokens and the rest; whether the likeliest is the same; KL
    over these, in nats."""
    logp = z.log_softmax(1).double().cpu()
    top = logp.gather(1, known.ids)
    rest = logp.scatter(1, known.ids, -torch.inf).logsumexp(1, keepdim=True)
    own, stored = torch.cat([top, rest], 1), losses.teacher_logp(known, 1.0).double()
    far = (own.exp() - stored.exp()).abs().amax(1)
    return far, logp.argmax(1) == known.ids[:, 0], (own.exp() * (own - stored)).sum(1)
