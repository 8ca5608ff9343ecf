"""Of a distribution the k likeliest tokens' log-probabilities at T = 1 and nothing else: all that a
server (served.py), or a file of somebody else's (imported.py), says of a teacher. The mass of the
other tokens is 1 less their sum; of other temperatures, and of the rest's shape, nothing follows.
"""

import argparse
import itertools

import numpy as np

from lib import checkpoints, data, models
from lib.teacher import record, writer

# the least mass outside the top k: log-probabilities in float32 sum to 1 no nearer than so
LEAST_REST = 2.0**-20
# nats below 1 of a token that stands for none
NO_MASS = 30.0


def log_rest(logp: np.ndarray) -> np.ndarray:
    """Return the log mass (n,) outside a top k of log-probabilities (n, k): log(1 - sum) without a
    NaN, whatever the sum was rounded to."""
    rest = -np.expm1(np.logaddexp.reduce(logp, axis=1))
    return np.log(np.maximum(rest, LEAST_REST))


def likeliest(
    ids: np.ndarray, logp: np.ndarray, vocab: int, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return ids and log-probabilities (n, k), largest first, of the k likeliest among those that
    are told of, (n, m) each; id -1, and -inf, stand for none. Tokens from `vocab` on the student
    has not: as a teacher that is run here is cut, their mass goes to all others in proportion. What
    is told of twice counts once; where fewer are known, other ids at -inf follow."""
    lost = np.where(ids >= vocab, np.exp(logp), 0.0).sum(1, keepdims=True)
    logp = np.where((ids >= 0) & (ids < vocab), logp - np.log1p(-np.minimum(lost, 0.999)), -np.inf)
    ids, logp = by_mass(ids, logp)
    alike = np.argsort(ids, axis=1, kind="stable")
    found = np.take_along_axis(ids, alike, 1)
    again = np.zeros(ids.shape, bool)
    np.put_along_axis(again, alike[:, 1:], found[:, 1:] == found[:, :-1], 1)
    if (again & np.isfinite(logp)).any():
        ids, logp = by_mass(ids, np.where(again, -np.inf, logp))
    short = ((0, 0), (0, max(0, k - ids.shape[1])))
    ids = np.pad(ids, short, constant_values=-1)[:, :k]
    logp = np.pad(logp, short, constant_values=-np.inf)[:, :k]
    for i in np.flatnonzero(~np.isfinite(logp).all(1)):
        count = int(np.isfinite(logp[i]).sum())
        there = {*ids[i, :count].tolist()}
        spare = (id for id in range(vocab) if id not in there)
        ids[i, count:] = [*itertools.islice(spare, k - count)]
    return ids, logp


def by_mass(ids: np.ndarray, logp: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return both (n, m) with the likeliest first, the lower id of two that are as likely."""
    order = np.lexsort((ids, -logp), axis=1)
    return np.take_along_axis(ids, order, 1), np.take_along_axis(logp, order, 1)


def packed(ids: np.ndarray, logp: np.ndarray, dtype: np.dtype, vocab: int) -> np.ndarray:
    """Return the records (n,) of what `likeliest` returns. Where a record holds no count of what is
    known, a token at -inf is one of next to no mass."""
    known = np.isfinite(logp)
    spare = np.where(known, logp, 0.0).min(1, keepdims=True)
    if "count" not in (dtype.names or ()):
        spare = np.minimum(spare, -NO_MASS)
    filled = np.where(known, logp, spare)
    tails = (log_rest(logp) - filled[:, 0])[:, None]
    return record.pack(ids, filled[:, :1] - filled, tails, dtype, vocab, count=known.sum(1))


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
        **writer.only_sources(args, dataset),
    }
