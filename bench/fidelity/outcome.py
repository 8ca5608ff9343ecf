"""What is a teacher's stored shape worth? Students trained from one start for equal steps by each
method, and measured on held-out rows.

    python bench/fidelity/outcome.py --data data/stdlib --teacher real/smollm2 --student \\
        real/smollm2 --keep-layers 0,1,...,29 --out out/far
    # CPU, after `make demo`
    python bench/fidelity/outcome.py --data data/demo --teacher runs/demo/teacher --student \\
        runs/demo/stage1 --out out/try --steps 5

ce            cross-entropy alone (alpha 0)
renormalised  the teacher's top k scaled to 1, the student's softmax over all tokens: what most
              tools do
bucket        dump_logits.py --tail-rank 0: the top k and one bucket with the exact rest
rank          dump_logits.py --tail-rank R: the bucket's mass where the basis says it lies; all of
              it through the records' own bytes
live          the whole vocabulary of the teacher beside it: what the others try to be

Every method goes through losses.head_loss, the function that stage 2 trains with. The teacher's
hidden states are computed once. Writes OUT/METHOD-T-SEED.json as each run ends (what is there is
not run again), and prints the table: held-out KL(teacher || student) over the whole vocabulary at
T=1 and cross-entropy, mean and spread over the seeds, and KL as a ratio to live.
"""

import argparse
import statistics
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
from lib import data, files, losses, models, plan, train  # noqa: E402
from lib import head as heads  # noqa: E402
from lib.teacher import basis, fit, record  # noqa: E402

SETTINGS = (
    "keep_layers",
    "k",
    "values",
    "tail_rank",
    "tail_bytes",
    "alpha",
    "steps",
    "tokens_per_step",
    "rows",
    "val_rows",
    "lr",
)
METHODS = ("ce", "renormalised", "bucket", "rank", "live")


@torch.no_grad()
def hidden_states(model: models.Model, split: data.Split, rows: np.ndarray) -> torch.Tensor:
    """Return the hidden states (N, D) at all targets of a split, by target number; zeros for rows
    that are not in `rows`."""
    out = None
    for lines in plan.microbatches(rows, split.rows["length"], 2048, 2048, pack=False):
        batch = split.batch(lines).to(model.device)
        made = model.hidden(batch).float()
        if out is None:
            out = torch.zeros(split.targets, made.shape[1], device=model.device)
        out[batch.numbers] = made
    return out


class Teacher:
    """The teacher as each method sees it: `kept(method, numbers, temperature)`, the TopK of train
    targets by their numbers."""

    def __init__(self, head: heads.Head, train: torch.Tensor, numbers: np.ndarray, args) -> None:
        self.head, self.train, self.args = head, train, args
        rank = min(args.tail_rank, train.shape[1])
        self.bytes = min(args.tail_bytes, rank)
        shape, _ = fit.fit_basis(head, train[torch.as_tensor(numbers)], args.k, rank, self.bytes)
        self.shape = replace(shape, rows=shape.rows.half().float())  # as its file holds it
        weight = head.weight.detach()[: head.vocab].float()
        assert head.bias is None and head.scale == 1 and not head.softcap, (
            "this bench knows plain heads only"
        )
        # all D dimensions are a basis as well: the exact logits, so that the tail's softmax is the
        # teacher's own
        unused = torch.zeros(0)
        self.whole = basis.Basis(
            torch.zeros(head.vocab), weight.t(), unused, unused, unused, unused
        )

    def kept(self, method: str, numbers: torch.Tensor, temperature: float) -> losses.TopK:
        hidden, k, args = self.train[numbers], 1 if method == "live" else self.args.k, self.args
        parts = [heads.topk_and_tails(z, k, [temperature]) for _, z in self.head.chunks(hidden)]
        ids, gaps, tails = (torch.cat(part) for part in zip(*parts))
        if method == "live":
            return losses.TopK(ids, gaps, tails[:, 0], hidden, self.whole)
        if method == "renormalised":
            return losses.TopK(ids, gaps, torch.full_like(tails[:, 0], losses.FLOOR))
        shape = self.shape if method == "rank" else None
        dtype = record.record_dtype(
            k, [temperature], self.head.vocab, args.values, self.bytes if shape else 0
        )
        records = record.pack(
            ids.numpy(),
            gaps.numpy(),
            tails.numpy(),
            dtype,
            self.head.vocab,
            shape and shape.pack(shape.encode(hidden)),
        )
        return record.unpack(records, self.head.vocab, 0, shape)


@torch.no_grad()
def measure(
    student: models.Model,
    taught: heads.Head,
    hidden_t: torch.Tensor,
    split: data.Split,
    rows: np.ndarray,
) -> dict:
    """Return full-vocabulary KL(teacher || student) at T=1 and cross-entropy on the rows, nats a
    target."""
    student.module.eval()
    learnt, kl, ce, count = student.head(taught.vocab), 0.0, 0.0, 0
    for lines in plan.microbatches(rows, split.rows["length"], 2048, 2048, pack=False):
        batch = split.batch(lines)
        for (part, z), (_, s) in zip(
            taught.chunks(hidden_t[batch.numbers]), learnt.chunks(student.hidden(batch))
        ):
            logp, logq = z.log_softmax(1), s.log_softmax(1)
            kl += (logp.exp() * (logp - logq)).sum().item()
            ce -= logq.gather(1, batch.labels[part, None]).sum().item()
            count += len(z)
    student.module.train()
    return {"kl": kl / count, "ce": ce / count, "targets": count}


def trained(
    args,
    dataset: data.Dataset,
    teacher: Teacher,
    val: torch.Tensor,
    val_rows: np.ndarray,
    rows: np.ndarray,
    method: str,
    temperature: float,
    seed: int,
) -> dict:
    """Train one student from the common start; return its measures."""
    student = models.load(
        args.student, torch.device("cpu"), dataset=dataset, keep_layers=args.keep_layers
    )
    head, lengths = student.head(teacher.head.vocab), dataset.train.rows["length"]
    steps = plan.whole_run(rows, lengths, seed, args.tokens_per_step, 1, args.steps)
    optimizer = train.adamw(student.module, args.lr, 0.01, 0.99, student.device)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    loss = losses.Method(0.0) if method == "ce" else losses.Method(args.alpha, temperature)
    start = measure(student, teacher.head, val, dataset.val, val_rows)
    line = plan.line_length(lengths[rows], args.tokens_per_step * 2, "sdpa")
    for step, chosen in enumerate(steps):
        targets = int(dataset.train.rows["targets"][chosen].sum())
        for lines in plan.microbatches(chosen, lengths, args.tokens_per_step * 2, line):
            batch = dataset.train.batch(lines)
            kept = None if method == "ce" else teacher.kept(method, batch.numbers, temperature)
            loss_sum, _, _ = losses.head_loss(student.hidden(batch), head, batch.labels, kept, loss)
            (loss_sum / targets).backward()
        train.gradient_norm(optimizer, scaler, student.module, 1.0)
        train.update(optimizer, scaler, train.cosine(step, len(steps), args.lr, 0.1))
    return {"start": start, **measure(student, teacher.head, val, dataset.val, val_rows)}


def table(out: Path) -> str:
    """Return the markdown table of the runs in a folder: mean and spread over seeds, KL as a ratio
    to the live run of the same seed."""
    names = {path: path.stem.split("-") for path in sorted(out.glob("*-*-*.json"))}
    runs = {
        (method, float(t), int(seed)): files.read_json(path)
        for path, (method, t, seed) in names.items()
    }

    def spread(values):
        return f"{statistics.mean(values):.4f}" + (
            f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
        )

    start = next(iter(runs.values()), {}).get("start")
    lines = [
        (
            "| T | trained by | held-out KL to the teacher | ratio to live (least to most) | CE |"
            " seeds |"
        ),
        "| --- | --- | --- | --- | --- | --- |",
    ]
    if start:
        lines.append(f"| | not yet | {start['kl']:.4f} | | {start['ce']:.4f} | |")
    for t in sorted({t for method, t, _ in runs if method != "ce"}):
        for method in METHODS:
            found = {
                seed: run
                for (m, at, seed), run in runs.items()
                if m == method and (at == t or m == "ce")
            }
            ratios = [
                run["kl"] / runs["live", t, seed]["kl"]
                for seed, run in found.items()
                if ("live", t, seed) in runs
            ]
            ratio = (
                f"{statistics.mean(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
                if ratios
                else ""
            )
            if found:
                lines.append(
                    f"| {t:g} | {method} | {spread([run['kl'] for run in found.values()])} |"
                    f" {ratio} | {spread([run['ce'] for run in found.values()])} | {len(found)} |"
                )
    return "\n".join(lines)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--data", required=True)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--student", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument(
        "--keep-layers",
        type=lambda text: [int(i) for i in text.split(",")],
        default=None,
        help="layers of --student to keep",
    )
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--temperatures", default="1,2,4")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--values", default="u8")
    parser.add_argument("--tail-rank", type=int, default=384)
    parser.add_argument("--tail-bytes", type=int, default=128)
    parser.add_argument("--alpha", type=float, default=1.0)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--tokens-per-step", type=int, default=256)
    parser.add_argument(
        "--rows", type=int, default=0, help="train rows to use, from the first on (default: all)"
    )
    parser.add_argument(
        "--val-rows", type=int, default=0, help="val rows to measure on (default: all)"
    )
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--threads", type=int, default=0)
    args = parser.parse_args(argv)
    device = models.pick_device("cpu", args.threads)
    dataset, out = data.Dataset(args.data), Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    temperatures, seeds = (
        [float(t) for t in args.temperatures.split(",")],
        [int(s) for s in args.seeds.split(",")],
    )
    todo = [(m, t, s) for s in seeds for t in temperatures for m in args.methods.split(",")]
    todo = list(dict.fromkeys((m, 1.0 if m == "ce" else t, s) for m, t, s in todo))

    def name(m, t, s):
        return out / f"{m}-{t:g}-{s}.json"

    for path in (name(*run) for run in todo if name(*run).exists()):
        seen = files.read_json(path)["args"]
        if differ := {key: seen[key] for key in SETTINGS if seen[key] != getattr(args, key)}:
            files.fail(
                f"{path} was run with other settings",
                differ,
                {key: getattr(args, key) for key in differ},
                "another --out, or delete it",
            )
    if any(not name(*run).exists() for run in todo):
        model = models.load(args.teacher, device, dataset=dataset)
        rows = np.arange(args.rows or len(dataset.train.rows))
        val_rows = np.arange(args.val_rows or len(dataset.val.rows))
        numbers = np.arange(int(dataset.train.rows["targets"][rows].sum()))
        teacher = Teacher(model.head(), hidden_states(model, dataset.train, rows), numbers, args)
        val = hidden_states(model, dataset.val, val_rows)
        print(
            f"{len(numbers)} train targets, {int(dataset.val.rows['targets'][val_rows].sum())} val;"
            f" k {args.k} {args.values}, rank {args.tail_rank} in {args.tail_bytes} bytes",
            flush=True,
        )
        for method, t, seed in todo:
            if not name(method, t, seed).exists():
                result = trained(args, dataset, teacher, val, val_rows, rows, method, t, seed)
                files.write_json(name(method, t, seed), result | {"args": vars(args)})
                print(
                    f"{method} T={t:g} seed {seed}: kl {result['start']['kl']:.4f} ->"
                    f" {result['kl']:.4f}  ce {result['ce']:.4f}",
                    flush=True,
                )
    print(table(out))


if __name__ == "__main__":
    main()
