"""Of a distribution the k likeliest tokens' log-probabilities at T = 1 and nothing else: all that a
server (served.py), or a file of somebody else's (imported.py), says of a teacher. The mass of the
other tokens is 1 less their sum; of other temperatures, and of the rest's shape, nothing follows.
"""

import argparse
import math

import numpy as np

from lib import checkpoints, data, models
from lib.teacher import record

# the least mass outside the top k: log-probabilities in float32 sum to 1 no nearer than so
LEAST_REST = 2.0**-20
# nats below 1 of a token that stands for none
NO_MASS = 30.0


def log_rest(logp: np.ndarray) -> np.ndarray:
    """Return the log mass (n,) outside a top k of log-probabilities (n, k): log(1 - sum) without a
    NaN, whatever the sum was rounded to."""
    rest = -np.expm1(np.logaddexp.reduce(logp, axis=1))
    return np.log(np.maximum(rest, LEAST_REST))


def tail_of(logp: np.ndarray) -> np.ndarray:
    """Return the same, largest of a top k first, where the largest counts 1 (record.py's `tail` at
    T = 1)."""
    return log_rest(logp) - logp[:, 0]


def within(best: list[tuple[float, int]], vocab: int, k: int) -> list[tuple[float, int]]:
    """Return (-log p, id) of k tokens below `vocab`, where some lie above it, which the student has
    not: as a teacher that is run here is cut, their mass goes to all others in proportion. Tokens
    of no mass fill the places."""
    lost = sum(math.exp(-minus) for minus, id in best if id >= vocab)
    left = [(minus + math.log1p(-min(lost, 0.999)), id) for minus, id in best if id < vocab][:k]
    there = {id for _, id in left}
    spare = (id for id in range(vocab) if id not in there)
    least = max([minus for minus, _ in left], default=0.0)
    return left + [(max(least, NO_MASS), next(spare)) for _ in range(k - len(left))]


def packed(ids: np.ndarray, logp: np.ndarray, dtype: np.dtype, vocab: int) -> np.ndarray:
    """Return the records (n,) of a top k, ids (n, k) and their log-probabilities (n, k), largest
    first."""
    return record.pack(ids, logp[:, :1] - logp, tail_of(logp)[:, None], dtype, vocab)


def settings_of(
    args: argparse.Namespace, dataset: data.Dataset, identity: str, name: str, kind: str
) -> dict:
    """Return what a chunk must have been made with to be continued. identity, name: the teacher's;
    kind: record.SERVED or record.IMPORTED."""
    vocab = args.vocab or len(dataset.tokenizer())
    if args.student and not args.vocab:
        folder = checkpoints.local_folder(args.student, args.trust_remote_code)
        models.check_fits(folder, dataset, args.trust_remote_code)
        vocab = checkpoints.tokens_of(folder)
    return {
        "teacher": identity,
        "teacher_folder": name,
        "data": dataset.identities["data"],
        "k": args.k,
        "rows_per_chunk": dataset.meta["rows_per_chunk"],
        "temperatures": args.temperatures,
        "values": args.values,
        "vocab": vocab,
        "tail_rank": 0,
        "dtype": kind,
        "tokens_per_microbatch": args.tokens_per_microbatch,
    }
