"""What a job costs on paper, and what failures add to it: the tables of docs/scale.md.

    python bench/scale.py --table       # these tables, as they are there; seconds on one core
    python bench/scale.py --rows 3e5 --gpu V100 --gpus 4 --teacher 3B     # those of another job

Arithmetic first, from constants that docs/scale.md lists; then two simulations. `dump`: workers
take parts by lease, some are slow, some die; a part whose worker died is done again when its lease
is over. `training`: all ranks stop with any of them, and go on from the last save.
"""

import argparse
import heapq
import math
import random
import statistics
from dataclasses import asdict, dataclass

# measured: docs/scale.md says by what; a test holds the bytes to what lib/ says
TARGET_BYTES, TOKEN_BYTES, ROW_BYTES = 197, 5, 26
PLAN_BYTES, PLAN_S = 40, 0.2e-6  # of one row of an epoch, in plan.whole_run
OPEN_BYTES, OPEN_S = 10 * (1 << 22) + (1 << 24), 0.1  # of one chunk, in teacher/logits.py
CORE_TARGETS = 1.4e6  # a second, read at random from the page cache and unpacked by one core
BARE, STAGE2 = 0.96, 1.11  # a forward pass over a dump's; a step of stage 2 over one of stage 1
STATE_BYTES = 24  # of one weight: itself and two moments in float32, written and read (run.save)
# assumed; times in hours
MFU, DISK, OBJECT_PRICE = 0.3, 1e9, 0.023  # share of the peak; bytes/s a reader; $ a GB-month
GPU_MTBF, SPOT_MTBF = 54 * 24 * 16384 / 419, 24.0
LEASE, REPLACE, SLOW_SHARE, SLOW = 2 / 60, 10 / 60, 0.05, 2.0  # share of workers; times as slow
SHARED_PART = 16_384  # targets in a part of dump_logits.py --shared
GPUS = {  # peak FLOP/s in half precision, $ an hour, bytes/s to the job's other GPUs
    "V100": (125e12, 3.06, 150e9),
    "A100": (312e12, 1.84, 300e9),
    "H100": (989e12, 4.92, 50e9),
}
# weights of the body and of the output layer: Qwen2.5's teachers, and the student of 0.5B
TEACHERS = {"7B": (6_525_621_760, 544_997_376), "3B": (2_774_773_760, 311_164_928)}
STUDENT = (357_898_112, 136_134_656)
T95 = {5: 2.776, 100: 1.984}  # Student's t, by the number of runs


@dataclass(frozen=True)
class Job:
    """rows of `tokens` tokens, of which `targets` are learnt; step: tokens of an optimizer step."""

    name: str
    rows: float
    tokens: int
    targets: int
    teacher: str
    gpu: str
    gpus: int
    epochs: float = 3.0
    step: int = 16384
    chunk_rows: int = 20_000
    mfu: float = MFU


JOBS = (
    Job("100k rows, 1 V100", 1e5, 512, 256, "3B", "V100", 1),
    Job("1M rows, 8 A100", 1e6, 512, 256, "7B", "A100", 8),
    Job("10^12 tokens, 256 H100", 1e9, 1000, 1000, "7B", "H100", 256, epochs=1, step=1 << 21),
)
ON_PAPER = """\
tokens; of these targets | rows x tokens a row | {tokens}; {targets}
`data/` | 5 B a token, 26 B a row | {data:B}
`logits/` | 197 B a target | {records:B}
... in object storage, a month | $0.023 a GB | {storage:$}
chunks of 20,000 rows; each | | {chunks:,.0f}; {chunk:B}
dump | 2 (body x tokens + output layer x targets) / (GPUs x peak x MFU x 0.96) | {dump:h}
stage 1 | 6 (body x tokens + output layer x targets) x epochs / (GPUs x peak x MFU) | {stage1:h}
stage 2 | 1.11 x stage 1, + the next line | {stage2:h}
... sums over the ranks | steps x 2 (1 - 1/GPUs) x 4 B x weights / link | {sums:h}
money: dump; stage 2 | GPUs x time x price | {dump_money:$}; {stage2_money:$}
stage 2: a GPU reads | targets/s x 197 B + tokens/s x 5 B | {read:B}/s, {reads} rows/s of {row:B}
... on the CPU | targets/s / 1.4 M | {core:.1%} of a core
chunks that one step touches | K (1 - (1 - 1/K)^(rows of a step)) | {touched:,.0f}
each start of a rank | chunks x (0.1 s + 59 MB / disk) + rows x 0.2 us | {start:h}
plan of an epoch, at its peak, a rank | 40 B a row | {plan:B}
"""


class Figure(float):
    """A number that is written with three digits: f"{Figure(1.97e14):B}" == "197 TB"."""

    def __format__(self, unit: str) -> str:
        if unit.startswith((",", ".")):
            return format(float(self), unit)
        value, prefix = float(self), ""
        if unit == "h":
            size, unit = (1, "h") if value >= 1 else (60, "min") if 60 * value >= 1 else (3600, "s")
            value *= size
        elif value >= 1e3:
            size = int(math.log10(value * 1.0005) // 3)
            value, prefix = value / 1000.0**size, "kMGTPEZ"[size - 1]
        number = f"{value:,.{max(0, 2 - math.floor(math.log10(max(value, 1) * 1.0005)))}f}"
        return f"${number}{prefix}" if unit == "$" else f"{number} {prefix}{unit}".strip()


def costs(job: Job) -> dict[str, Figure]:
    """Return what arithmetic says of a job, by the names of ON_PAPER; times in hours."""
    tokens, targets = job.rows * job.tokens, job.rows * job.targets
    records, chunks = TARGET_BYTES * targets, math.ceil(job.rows / job.chunk_rows)
    peak, price, link = GPUS[job.gpu]
    (body, head), (student, layer) = TEACHERS[job.teacher], STUDENT
    an_hour = job.gpus * peak * job.mfu * 3600  # FLOP of all GPUs
    dump_h = 2 * (body * tokens + head * targets) / an_hour / BARE
    stage1 = 6 * (student * tokens + layer * targets) * job.epochs / an_hour
    sums = 2 * (1 - 1 / job.gpus) * 4 * (student + layer) / link / 3600  # of one step
    sums *= job.epochs * tokens / job.step
    stage2 = stage1 * STAGE2 + sums
    a_second = targets * job.epochs / stage2 / 3600 / job.gpus  # targets of one GPU
    found = dict(tokens=tokens, targets=targets, records=records, chunks=chunks)
    found |= dict(dump=dump_h, stage1=stage1, stage2=stage2, sums=sums)
    found |= dict(storage=records / 1e9 * OBJECT_PRICE, chunk=records / chunks)
    found |= dict(data=TOKEN_BYTES * tokens + ROW_BYTES * job.rows, plan=PLAN_BYTES * job.rows)
    found |= dict(dump_money=dump_h * job.gpus * price, stage2_money=stage2 * job.gpus * price)
    found |= dict(reads=a_second / job.targets, row=TARGET_BYTES * job.targets)
    found["read"] = a_second * (TARGET_BYTES + TOKEN_BYTES * tokens / targets)
    found["core"] = a_second / CORE_TARGETS
    found["touched"] = chunks * (1 - (1 - 1 / chunks) ** (job.step / job.tokens))
    found["start"] = (chunks * (OPEN_S + OPEN_BYTES / DISK) + job.rows * PLAN_S) / 3600
    return {name: Figure(value) for name, value in found.items()}


def dump(workers, parts, each, seed, mtbf=math.inf, slow=0.0) -> tuple[float, float]:
    """Return the hours until the last of `parts` is there (`each` hours of work), and the hours of
    work that died with a worker. mtbf: of one worker; slow: the share of slow ones."""
    dice = random.Random(seed)

    def born(at):
        life = dice.expovariate(1 / mtbf) if mtbf < math.inf else mtbf
        return at + life, SLOW if dice.random() < slow else 1.0  # its death, its pace

    lives = [born(0.0) for _ in range(workers)]
    events = [(0.0, worker, "free") for worker in range(workers)]
    idle, untaken, missing, lost, now = [], parts, parts, 0.0, 0.0
    while missing:
        now, worker, what = heapq.heappop(events)
        missing -= what == "done"
        if what == "found":  # a lease is over
            untaken += 1
            if not idle:
                continue
            worker = idle.pop()
        if lives[worker][0] <= now:  # the next one, in its place
            lives[worker] = born(now)
        if not untaken:
            idle.append(worker)
            continue
        untaken, (death, pace) = untaken - 1, lives[worker]
        if (end := now + each * pace) <= death:
            heapq.heappush(events, (end, worker, "done"))
        else:
            lost += (death - now) / pace
            heapq.heappush(events, (death + LEASE, -1, "found"))
            heapq.heappush(events, (death + REPLACE, worker, "free"))
    return now, lost


def training(work, saves, save, restart, mtbf, seed) -> float:
    """Return the hours that `work` hours of steps take, saved so many times, where a failure of any
    rank (mtbf: of the job) stops all, and what was done since the last save is done again."""
    dice, total, left, segment = random.Random(seed), 0.0, saves, work / saves + save
    while (failure := dice.expovariate(1 / mtbf)) < left * segment:
        left -= int(failure / segment)
        total += failure
        while (again := dice.expovariate(1 / mtbf)) < restart:  # a start fails as well
            total += again
        total += restart
    return total + left * segment


def expected(work, saves, save, restart, mtbf) -> float:
    """Return the mean of `training`. Source: Daly 2006, the complete cost function."""
    return mtbf * math.exp(restart / mtbf) * math.expm1((work / saves + save) / mtbf) * saves


def percent(above: list[float], below: list[float]) -> str:
    """Return mean(above) / mean(below) in %; one of them varies: half of its 95 % interval too."""
    share = 100 * statistics.mean(above) / statistics.mean(below)
    varies = max(above, below, key=len)
    if len(set(varies)) == 1:
        return f"{share:.1f}"
    half = T95[len(varies)] * statistics.stdev(varies) / math.sqrt(len(varies))
    return f"{share:.1f} ± {share * half / statistics.mean(varies):.1f}"


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows))


def paper_table(jobs: tuple[Job, ...]) -> str:
    rows = [[part.strip() for part in line.split("|")] for line in ON_PAPER.splitlines()]
    told = [[a, b, *(c.format(**costs(job)) for job in jobs)] for a, b, c in rows]
    return table(["", "arithmetic", *(job.name for job in jobs)], told)


def dump_table(jobs: list[tuple[Job, float]], mtbf: float) -> str:
    """Return the ideal time over the simulated one, in %. jobs: with the chunks of a part."""
    rows = []
    for job, size in jobs:
        ideal, parts = costs(job)["dump"], math.ceil(job.rows / (job.chunk_rows * size))
        work, count = ideal * job.gpus, 5 if parts > 500 else 100
        rows.append([job.name, f"{job.chunk_rows * size:,.0f} rows, {Figure(work / parts):h}"])
        for world in ({}, dict(slow=SLOW_SHARE), dict(mtbf=GPU_MTBF), dict(mtbf=mtbf)):
            seeds = range(count if world else 1)
            runs = [dump(job.gpus, parts, work / parts, n, **world) for n in seeds]
            rows[-1].append(percent([ideal], [end for end, _ in runs]))
        rows[-1].append(percent([lost for _, lost in runs], [work]))  # of the last world
    names = ["no failure", "1 in 20 twice as slow", "MTBF of Llama 3", f"MTBF {mtbf:g} h"]
    return table(["job", "part", *names, "work lost then"], rows)


def training_table(gpus: list[int], late: float, work: float = 100.0) -> str:
    """Return `work` over the simulated time, in %, and as expected. late: a start that is slow."""
    save, rows = STATE_BYTES * sum(STUDENT) / DISK / 3600, []
    for count in gpus:
        mtbf, best = GPU_MTBF / count, math.sqrt(2 * save * GPU_MTBF / count)  # Young 1974
        rows.append([f"{count:,}", f"{Figure(mtbf):h}", f"{Figure(best):h}"])
        often = math.ceil(work / best)
        for saves, restart in ((often, REPLACE), (10, REPLACE), (often, late)):
            words = work, saves, save, restart, mtbf
            told = percent([work], [training(*words, seed) for seed in range(100)])
            rows[-1].append(f"{told} ({100 * work / expected(*words):.1f})")
    names = ["saved so", "saved ten times", f"saved so, a start takes {Figure(late):h}"]
    return table(["GPUs", "MTBF of the job", "Young: save every", *names], rows)


def main(argv=None):
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    parser.add_argument("--table", action="store_true", help="the tables of docs/scale.md")
    choices = {"teacher": [*TEACHERS], "gpu": [*GPUS]}
    for name, value in list(asdict(JOBS[1]).items())[1:]:
        words = dict(default=value, type=type(value), choices=choices.get(name))
        parser.add_argument(f"--{name.replace('_', '-')}", help="default: %(default)s", **words)
    parser.add_argument("--mtbf", type=float, default=SPOT_MTBF, help="hours, of one worker")
    args = vars(parser.parse_args(argv))
    asked, mtbf = args.pop("table"), args.pop("mtbf")
    job = Job("this job", **args)
    jobs, parts, gpus = (job,), [(job, 1), (job, 0.1)], (job.gpus,)
    if asked:
        jobs, gpus = JOBS, (8, 256, 2048, 16384)
        parts = [(JOBS[1], 1), (JOBS[1], 0.1), (JOBS[1], SHARED_PART / (256 * 20_000))]
        parts += [(JOBS[2], 1), (JOBS[2], 10), (JOBS[2], 100)]
    late = REPLACE + costs(jobs[-1])["start"]
    print(paper_table(jobs), dump_table(parts, mtbf), training_table(gpus, late), sep="\n\n")


if __name__ == "__main__":
    main()
