"""How far is the gradient of offline distillation from that of the whole vocabulary? By what is
kept of the teacher, and its bytes.

    python bench/fidelity/fidelity.py --data data/stdlib --teacher real/smollm2 --student \\
        far=real/smollm2:0,1,3 --out out/fidelity/smollm2
    # after `make demo`
    python bench/fidelity/fidelity.py --data data/demo --teacher runs/demo/teacher --student \\
        near=runs/demo/stage1 --out out/try --quick

A teacher and one or more students (a name, a checkpoint, and the layers of it to keep). Measured on
val's targets, the basis fitted to train's, every figure through the records' own bytes and the
function that trains (losses.TopK.logp_all):

    angle, ratio   between the output layer's gradient with the target P' kept, T (q - P')' h summed
                   over targets, and with the teacher's whole distribution P: degrees, and norm over
                   norm. Sums over its entries in float64.
    kl             KL(P || P') in nats a target (for a bucket, the student's own tail is its shape)

Writes OUT/angles.json; tables.py makes the tables and the picture of docs/fidelity.md of it.
`make fidelity` runs it all.
"""

import argparse
import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
from lib import data, files, losses, models, plan  # noqa: E402
from lib import head as heads  # noqa: E402
from lib.teacher import basis, fit, record, sample  # noqa: E402

DUMPED = 3  # temperatures whose tails a record is counted with
FEWER = [(16, 0, 0), (64, 0, 0), (24, 16, 16), (24, 64, 64), (16, 384, 128)]
KEPT = [  # k, rank, bytes of coefficients
    (16, 0, 0),
    (32, 0, 0),
    (64, 0, 0),
    (24, 8, 8),
    (24, 16, 16),
    (24, 32, 32),
    (24, 64, 64),
    (24, 128, 64),
    (24, 128, 128),
    (32, 256, 80),
    (16, 256, 96),
    (24, 320, 104),
    (16, 384, 128),
    (8, 448, 144),
]
ROUNDS = 50  # of random sampling (RS-KD)


@torch.no_grad()
def hidden_states(
    model: models.Model, split: data.Split, targets: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the hidden states (N, D) at the targets of rows spread evenly over a split, float32,
    and each target's place in its answer."""
    share = min(1.0, targets / max(1, split.targets))
    rows = sample.evenly(np.arange(len(split.rows)), max(1, round(len(split.rows) * share)))
    made, places = [], []
    for lines in plan.microbatches(rows, split.rows["length"], 2048, 2048, pack=False):
        batch = split.batch(lines)
        made.append(model.hidden(batch).float())
        places += [np.arange(split.rows[row]["targets"]) for row in batch.rows]
    return torch.cat(made), torch.from_numpy(np.concatenate(places))


class Gradient:
    """The output layer's gradient for one student at one temperature with the whole teacher, and
    how far another target's is from it."""

    def __init__(
        self, z: torch.Tensor, s: torch.Tensor, hidden: torch.Tensor, temperature: float
    ) -> None:
        self.hidden, self.whole = hidden, torch.zeros(z.shape[1], hidden.shape[1])
        for part in pieces(z):
            p, q = (z[part] / temperature).softmax(1), (s[part] / temperature).softmax(1)
            self.whole.addmm_((q - p).t(), hidden[part])

    def compare(self, difference: torch.Tensor) -> tuple[float, float]:
        """Return the angle in degrees and the norm ratio, given sum over targets of (P - P')' h; in
        float64, 4,096 tokens at once."""
        dot = aa = bb = 0.0
        for x, y in zip(difference.split(4096), self.whole.split(4096)):
            y = y.double()
            x = x.double() + y
            dot, aa, bb = (
                dot + (x * y).sum().item(),
                aa + (x * x).sum().item(),
                bb + (y * y).sum().item(),
            )
        return math.degrees(math.acos(max(-1.0, min(1.0, dot / math.sqrt(aa * bb))))), math.sqrt(
            aa / bb
        )


def pieces(z: torch.Tensor) -> list[slice]:
    size = max(1, (1 << 26) // (4 * z.shape[1]))
    return [slice(start, min(start + size, len(z))) for start in range(0, len(z), size)]


class Bench:
    """One teacher, its students and the temperatures: `measure(name, bytes, target)` adds a row for
    each student and temperature."""

    def __init__(
        self, z: torch.Tensor, hidden: torch.Tensor, students: dict, temperatures: list[float]
    ) -> None:
        self.z, self.hidden, self.students, self.temperatures, self.rows = (
            z,
            hidden,
            students,
            temperatures,
            [],
        )
        self.gradients = {
            (name, t): Gradient(z, s, h, t)
            for name, (s, h) in students.items()
            for t in temperatures
        }

    def measure(self, name: str, size: int, target, by_student: bool = False, **about) -> None:
        """target(part, T, s or None) returns P' (n, V) for a slice of the targets; with
        `by_student` it is given the student's logits."""
        for t in self.temperatures:
            difference = {
                student: torch.zeros_like(self.gradients[student, t].whole)
                for student in self.students
            }
            kl = dict.fromkeys(self.students, 0.0)
            for part in pieces(self.z):
                p = (self.z[part] / t).softmax(1)
                shared = None if by_student else target(part, t, None)
                for student, (s, hidden) in self.students.items():
                    kept = shared if shared is not None else target(part, t, s[part])
                    kl[student] += torch.special.xlogy(p, p / kept.clamp_min(0)).sum().item() / len(
                        self.z
                    )
                    difference[student].addmm_((p - kept).t(), hidden[part])
            for student in self.students:
                angle, ratio = self.gradients[student, t].compare(difference[student])
                self.rows.append(
                    {
                        "student": student,
                        "method": name,
                        "bytes": size,
                        "T": t,
                        "angle": angle,
                        "ratio": ratio,
                        "kl": kl[student] if math.isfinite(kl[student]) else None,
                        **about,
                    }
                )
        last = self.rows[-len(self.students) * len(self.temperatures) :]
        print(
            f"{name:44s}{size:4d} B  "
            + "   ".join(
                s + " " + " ".join(f"{r['angle']:.1f}" for r in last if r["student"] == s)
                for s in self.students
            ),
            flush=True,
        )


def kept_of(
    z: torch.Tensor,
    hidden: torch.Tensor,
    k: int,
    temperatures: list[float],
    shape: basis.Basis | None,
    packed: int,
) -> tuple[dict, int]:
    """Return {T: TopK} of teacher logits z (N, V) as they come back from records of k uint8 gaps
    and `packed` bytes, and the bytes of one."""
    vocab = z.shape[1]
    ids, gaps, tails = (
        torch.cat(made)
        for made in zip(
            *(heads.topk_and_tails(z[part].clone(), k, temperatures) for part in pieces(z))
        )
    )
    dtype = record.record_dtype(k, temperatures, vocab, "u8", packed)
    records = record.pack(
        ids.numpy(),
        gaps.numpy(),
        tails.numpy(),
        dtype,
        vocab,
        shape and shape.pack(shape.encode(hidden)),
    )
    size = record.record_dtype(k, temperatures[:1] * DUMPED, vocab, "u8", packed).itemsize
    return {t: record.unpack(records, vocab, i, shape) for i, t in enumerate(temperatures)}, size


def stored(shape: basis.Basis) -> basis.Basis:
    """Return a basis as it comes back from its file: rows in float16."""
    return replace(shape, rows=shape.rows.half().float())


def dense(kept: dict, shape: basis.Basis):
    """Return the target of a top k and a basis, as the loss makes it."""
    return lambda part, t, s: kept[t][part].logp_all(shape.logits(kept[t].coef[part]), t).exp_()


def bucket(kept: dict):
    """Return the target that the bucket's gradient comes from: its mass in the shape of the
    student's own tail."""

    def target(part, t, s):
        logp, ids = losses.teacher_logp(kept[t][part], t), kept[t].ids[part]
        tail = (s / t).scatter(1, ids, -torch.inf).softmax(1)
        return tail.mul_(logp[:, -1:].exp()).scatter_(1, ids, logp[:, :-1].exp())

    return target


def renormalised(kept: dict):
    """Return the teacher's top k scaled to 1, and nothing elsewhere."""

    def target(part, t, s):
        p = (-kept[t].gap[part] / t).softmax(1)
        return torch.zeros(len(p), kept["vocab"]).scatter_(1, kept[t].ids[part], p)

    return target


def sampled(z: torch.Tensor, rounds: int):
    """Return random sampling KD (arXiv:2503.16870): `rounds` tokens drawn from the teacher at T,
    each with weight 1 / rounds."""

    def target(part, t, s):
        p = (z[part] / t).softmax(1)
        drawn = torch.multinomial(p, rounds, replacement=True)
        return torch.zeros_like(p).scatter_add_(1, drawn, torch.full(drawn.shape, 1.0 / rounds))

    return target


# --- tried, and not taken: what each would add to a basis of 64 dimensions, unpacked


def with_student(kept: dict, shape: basis.Basis, dual: torch.Tensor, share: float):
    """The student's own tail, by `share`, for what the basis cannot say. dual (V, R) reads
    coefficients from logits."""

    def target(part, t, s):
        away = s - shape.mean
        z = shape.logits(kept[t].coef[part] - share * (away @ dual)).add_(away, alpha=share)
        return kept[t][part].logp_all(z, t).exp_()

    return target


def with_samples(kept: dict, shape: basis.Basis, z: torch.Tensor, count: int):
    """`count` tail tokens drawn at T=2 on top, weighted so that the expected target is the
    teacher's own distribution."""
    plain = dense(kept, shape)

    def target(part, t, s):
        p, made = (z[part] / t).softmax(1), plain(part, t, s)
        drawn_from = (z[part] / 2).scatter(1, kept[t].ids[part], -torch.inf).softmax(1)
        drawn = torch.multinomial(drawn_from, count, replacement=True)
        return made.scatter_add_(
            1,
            drawn,
            (p.gather(1, drawn) - made.gather(1, drawn)) / (count * drawn_from.gather(1, drawn)),
        )

    return target


def fitted_to_kl(
    kept: dict, shape: basis.Basis, z: torch.Tensor, at: float, rounds: int = 2
) -> dict:
    """Coefficients that lower the tail's KL at one temperature, by Newton steps with the mean
    Hessian, instead of squared error."""
    ids, coef = kept[at].ids, kept[at].coef.clone()

    def tail(logits_, part):
        return (logits_ / at).scatter_(1, ids[part], -torch.inf).softmax(1)

    hessian, some = torch.zeros(coef.shape[1], coef.shape[1], dtype=torch.float64), slice(0, 256)
    p = tail(z[some].clone(), some)
    hessian = (
        (shape.rows * p.sum(0)) @ shape.rows.t() - (p @ shape.rows.t()).t() @ (p @ shape.rows.t())
    ).double() / len(p)
    for _ in range(rounds):
        for part in pieces(z):
            missing = (
                tail(z[part].clone(), part) - tail(shape.logits(coef[part]), part)
            ) @ shape.rows.t()
            coef[part] += at * missing @ torch.linalg.inv(hessian).float()
    return {t: replace(kept[t], coef=coef) for t in kept}


def with_top_k(
    kept: dict, shape: basis.Basis, z: torch.Tensor, more: basis.Basis, variance: torch.Tensor
):
    """What the stored top k say of the dimensions that are not kept: their mean given the k logits
    (`more`: a basis of all dimensions)."""
    rank = len(shape.bits)

    def target(part, t, s):
        ids, base = kept[t].ids[part], shape.logits(kept[t].coef[part])
        rest = more.rows[rank:]
        at = rest.t()[ids]  # (n, k, D - R)
        cov = (
            (at * variance[rank:]) @ at.transpose(1, 2) + 0.1 * torch.eye(ids.shape[1]) + 100.0
        )  # an unknown constant is in all of them
        weights = torch.linalg.solve(cov, (z[part] - base).gather(1, ids)[..., None])
        base += ((at.transpose(1, 2) @ weights)[..., 0] * variance[rank:]) @ rest
        return kept[t][part].logp_all(base, t).exp_()

    return target


def tried(
    bench: Bench,
    head: heads.Head,
    train: torch.Tensor,
    place_train: torch.Tensor,
    place: torch.Tensor,
    k: int = 16,
    rank: int = 64,
) -> None:
    """Measure what was tried and not taken, each beside the plain basis of as many dimensions
    (coefficients not packed)."""
    bench.temperatures = [t for t in bench.temperatures if t in (1, 2, 4)]
    shape = tried_weights(bench, head, train, k, rank)
    kept = unpacked(bench, shape, k)
    tried_coefficients(bench, shape, kept)
    width = bench.hidden.shape[1]
    more, _ = fit.fit_basis(head, train, k, width, width)
    tried_targets(bench, shape, kept, k, more, more.encode(train).square().mean(0))
    tried_places(bench, head, train, place_train, place, shape, kept)


def unpacked(bench: Bench, shape: basis.Basis, k: int) -> dict[float, losses.TopK]:
    """Return the records of each temperature with coefficients that are not rounded."""
    kept, _ = kept_of(bench.z, bench.hidden, k, bench.temperatures, shape, len(shape.bits))
    return {t: replace(kept[t], coef=shape.encode(bench.hidden)) for t in bench.temperatures}


def tried_weights(
    bench: Bench, head: heads.Head, train: torch.Tensor, k: int, rank: int
) -> basis.Basis:
    """Measure bases whose fit weighs the tokens by other temperatures; return the plain one."""
    shapes, plain_at = {}, fit.WEIGH_AT
    for name, at in (
        ("tokens weighted by their tail mass at T=2 (ours)", plain_at),
        ("... at T=1", 1.0),
        ("... at T=4", 4.0),
        ("all tokens weigh alike", 1e9),
    ):
        fit.WEIGH_AT = at
        shapes[at], _ = fit.fit_basis(head, train, k, rank, rank)
        bench.measure(name, 0, dense(unpacked(bench, shapes[at], k), shapes[at]), tried=True)
    fit.WEIGH_AT = plain_at
    return shapes[plain_at]


def tried_coefficients(bench: Bench, shape: basis.Basis, kept: dict) -> None:
    """Measure no coefficients at all, and coefficients that are fitted to the divergence."""
    empty = replace(
        shape,
        rows=shape.rows[:0],
        bits=shape.bits[:0],
        step=shape.step[:0],
        encoder=shape.encoder[:, :0],
    )
    none = {t: replace(kept[t], coef=kept[t].coef[:, :0]) for t in kept}
    bench.measure("the mean alone, no coefficient", 0, dense(none, empty), tried=True)
    for t in kept:
        fitted = dense(fitted_to_kl(kept, shape, bench.z, t), shape)
        bench.measure(f"coefficients fitted to KL at T={t:g}", 0, fitted, tried=True)


def tried_targets(
    bench: Bench, shape: basis.Basis, kept: dict, k: int, more: basis.Basis, power: torch.Tensor
) -> None:
    """Measure targets whose tail is told by something else than the basis alone."""
    dual = (shape.rows * tail_share(bench.z, k)).t().contiguous()
    for part in (0.5, 1.0):
        bench.measure(
            f"the student's own tail for the rest, by {part:g}",
            0,
            with_student(kept, shape, dual, part),
            by_student=True,
            tried=True,
        )
    for count in (16, 64):
        sampled = with_samples(kept, shape, bench.z, count)
        bench.measure(f"{count} sampled tail tokens on top, weighted", 0, sampled, tried=True)
    inferred = with_top_k(kept, shape, bench.z, more, power)
    bench.measure("the rest inferred from the top k", 0, inferred, tried=True)


def tried_places(
    bench: Bench,
    head: heads.Head,
    train: torch.Tensor,
    place_train: torch.Tensor,
    place: torch.Tensor,
    shape: basis.Basis,
    kept: dict,
) -> None:
    """Measure a basis with a mean for each of four places in the answer."""

    def bins(places):
        return torch.bucketize(places, torch.tensor([4, 16, 48]))

    means = torch.stack([train[bins(place_train) == b].mean(0) for b in range(4)])  # (4, D)
    means -= shape.center
    moved = means @ head.weight.detach()[: head.vocab].float().t()
    coef = shape.encode(bench.hidden - means[bins(place)])

    def by_place(part, t, s):
        return kept[t][part].logp_all(shape.logits(coef[part]) + moved[bins(place[part])], t).exp_()

    bench.measure("a mean for each of four places in the answer", 0, by_place, tried=True)


def tail_share(z: torch.Tensor, k: int) -> torch.Tensor:
    """Return each token's share (V,) of the tails' softened mass."""
    share = sum(
        (z[part] / fit.WEIGH_AT).softmax(1).scatter_(1, z[part].topk(k, 1).indices, 0.0).sum(0)
        for part in pieces(z)
    )
    return share / share.sum()


def student_of(text: str) -> tuple[str, str, list[int] | None]:
    """Return name, checkpoint and layers of NAME=CHECKPOINT[:0,1,2]."""
    name, _, rest = text.partition("=")
    checkpoint, _, layers = rest.partition(":")
    return name, checkpoint, [int(i) for i in layers.split(",")] if layers else None


@torch.no_grad()
def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--data", required=True)
    parser.add_argument("--teacher", required=True)
    parser.add_argument(
        "--student",
        required=True,
        action="append",
        type=student_of,
        metavar="NAME=CHECKPOINT[:LAYERS]",
    )
    parser.add_argument("--out", required=True)
    parser.add_argument("--targets", type=int, default=2200)
    parser.add_argument("--temperatures", default="1,1.5,2,3,4")
    parser.add_argument("--tried", action="store_true", help="also what was tried and not taken")
    parser.add_argument(
        "--fewer", action="store_true", help="fewer records: for a vocabulary three times as large"
    )
    parser.add_argument(
        "--quick", action="store_true", help="few targets and two temperatures, to see that it runs"
    )
    args = parser.parse_args(argv)
    out, device = Path(args.out), torch.device("cpu")
    asked = {
        name: vars(args)[name]
        for name in ("student", "targets", "temperatures", "tried", "fewer", "quick")
    }
    asked["student"] = [
        [name, Path(checkpoint).name, layers] for name, checkpoint, layers in args.student
    ]
    if (out / "angles.json").exists():
        if (seen := files.read_json(out / "angles.json")["asked"]) != asked:
            files.fail(
                f"{out} holds other measurements", seen, asked, "another --out, or delete it"
            )
        print(
            f"fidelity: {out}/angles.json is there; nothing to do (delete it after a change of the"
            " code)"
        )
        return
    torch.manual_seed(0)
    dataset = data.Dataset(args.data)
    targets, temperatures = (
        (64, [1.0, 2.0])
        if args.quick
        else (args.targets, [float(t) for t in args.temperatures.split(",")])
    )
    teacher = models.load(args.teacher, device, dataset=dataset)
    train, place_train = hidden_states(teacher, dataset.train, sample.LEAST)
    hidden, place = hidden_states(teacher, dataset.val, targets)
    head, width = teacher.head(), hidden.shape[1]
    z = torch.cat([z.clone() for _, z in head.chunks(hidden)])
    students, about = (
        {},
        {
            "teacher": Path(args.teacher).name,
            "targets": len(hidden),
            "fitted_to": len(train),
            "vocab": head.vocab,
            "width": width,
        },
    )
    for name, checkpoint, layers in args.student:
        student = models.load(checkpoint, device, dataset=dataset, keep_layers=layers)
        h, _ = hidden_states(student, dataset.val, targets)
        s = torch.cat([s.clone() for _, s in student.head(head.vocab).chunks(h)])
        students[name] = s, h
        kl = sum(
            (z[part].softmax(1) * (z[part].log_softmax(1) - s[part].log_softmax(1))).sum().item()
            for part in pieces(z)
        ) / len(z)
        about[name] = {"kl": kl, "student": Path(checkpoint).name, "layers": layers}
        print(
            f"{name}: KL(teacher || student) {kl:.3f} nats at T=1, {len(hidden)} targets, V"
            f" {head.vocab:,}",
            flush=True,
        )
        del student
    bench = Bench(z, hidden, students, temperatures)
    for k, rank, size in KEPT[::4] if args.quick else FEWER if args.fewer else KEPT:
        k, rank = min(k, head.vocab - 2), min(rank, width)
        size = min(size, rank)
        shape = stored(fit.fit_basis(head, train, k, rank, size)[0]) if rank else None
        kept, total = kept_of(z, hidden, k, temperatures, shape, size)
        if rank:
            bench.measure(
                f"top {k}, rank {rank} in {size} bytes", total, dense(kept, shape), k=k, rank=rank
            )
        else:
            bench.measure(
                f"top {k}, renormalised",
                total - 4 * DUMPED,
                renormalised(kept | {"vocab": head.vocab}),
                k=k,
                kind="renormalised",
            )
            bench.measure(
                f"top {k}, exact bucket", total, bucket(kept), by_student=True, k=k, kind="bucket"
            )
    size = ROUNDS * (3 if head.vocab <= 1 << 16 else 4)
    bench.measure(f"random sampling, {ROUNDS} rounds", size, sampled(z, ROUNDS), kind="sampling")
    if args.tried:
        tried(bench, head, train, place_train, place, min(16, head.vocab - 2), min(64, width))
    out.mkdir(parents=True, exist_ok=True)
    files.write_json(out / "angles.json", {"asked": asked, "about": about, "rows": bench.rows})


if __name__ == "__main__":
    main()
