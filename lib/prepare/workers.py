"""Work on a stream of rows in several processes: order kept, the reader never far ahead, same
results whatever the number of workers."""

import collections
import concurrent.futures
import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator

from lib import files

BATCH_ROWS, BATCH_CHARACTERS = (
    256,
    1 << 19,
)  # one piece of work for a worker ends at whichever comes first
SMALL = 8  # batches: below this, starting worker processes costs more than they save


def start_worker():
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process a core already
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ctrl-C is the parent's to handle
    # a killed parent would leave its workers waiting for ever
    threading.Thread(
        target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True
    ).start()


def batches(numbered):
    """Cut an iterator of (source number, row) into lists that are short in rows and in
    characters."""
    batch, size = [], 0
    for number, row in numbered:
        batch.append((number, row))
        size += (
            len(row)
            if isinstance(row, str)
            else sum(len(message["content"] or "") for message in row)
        )
        if len(batch) == BATCH_ROWS or size > BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def encoded_rows(numbered: Iterator, work: Callable[[list], list], workers: int) -> Iterator:
    """Yield (source number, row, encoded row) in source order. The reader stays at most two batches
    a worker ahead."""
    work_list = batches(numbered)
    head = list(itertools.islice(work_list, SMALL))
    work_list = itertools.chain(head, work_list)
    if workers == 1 or len(head) < SMALL:
        for batch in work_list:
            yield from (
                (number, row, encoded)
                for (number, row), encoded in zip(batch, work([row for _, row in batch]))
            )
        return
    pool = concurrent.futures.ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), start_worker
    )
    waiting = collections.deque()
    try:
        for batch in itertools.chain(work_list, itertools.repeat(None)):
            if batch is not None:
                waiting.append((batch, pool.submit(work, [row for _, row in batch])))
            elif not waiting:
                break
            if batch is None or len(waiting) > 2 * workers:
                batch, future = waiting.popleft()
                yield from (
                    (number, row, encoded) for (number, row), encoded in zip(batch, future.result())
                )
    except concurrent.futures.BrokenExecutor:
        files.fail(
            "a worker process was killed",
            wanted="more free memory",
            mend="the same command with fewer --workers",
        )
    finally:
        pool.shutdown(cancel_futures=True)
