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
from lib.prepare import conversations

# one piece of work for a worker ends at whichever comes first
BATCH_ROWS, BATCH_CHARACTERS = 256, 1 << 19
SMALL = 8  # batches: below this, starting worker processes costs more than they save


def start_worker():
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process a core already
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ctrl-C is the parent's to handle
    # a killed parent would leave its workers waiting for ever
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)


def batches(numbered: Iterator[tuple]) -> Iterator[list[tuple]]:
    """Cut an iterator of (number, row) into lists that are short in rows and in characters."""
    batch, size = [], 0
    for number, row in numbered:
        batch.append((number, row))
        size += conversations.characters(row) if row is not None else 0
        if len(batch) == BATCH_ROWS or size > BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def cores() -> int:
    """Return the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _beside(batch: list[tuple], results: list) -> Iterator[tuple]:
    return ((number, row, result) for (number, row), result in zip(batch, results))


def encoded_rows(numbered: Iterator, work: Callable[[list], list], workers: int) -> Iterator:
    """Yield (number, row, encoded row) in source order. The reader stays at most two batches a
    worker ahead. workers: processes; 0: one a core, at most 16."""
    workers = workers or min(16, cores())
    work_list = batches(numbered)
    head = list(itertools.islice(work_list, SMALL))
    work_list = itertools.chain(head, work_list)
    if workers == 1 or len(head) < SMALL:
        for batch in work_list:
            yield from _beside(batch, work([row for _, row in batch]))
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
                yield from _beside(batch, future.result())
    except concurrent.futures.BrokenExecutor:
        files.fail(
            "a worker process was killed",
            wanted="more free memory",
            mend="the same command with fewer --workers",
        )
    finally:
        pool.shutdown(cancel_futures=True)
