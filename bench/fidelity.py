"""How far is the gradient of top-k distillation from that of the whole vocabulary? On a real teacher and student.

    python bench/fidelity.py --data data/stdlib --teacher real/smollm2 --student real/smollm2 --keep-layers 0,1,2,...,25 --targets 1200
    python bench/fidelity.py --data data/demo --teacher runs/demo/teacher --student runs/demo/stage1    # CPU, seconds, after `make demo`

Prints, by k and T: the angle in degrees (and the norm ratio) between the output layer's gradient of our loss (top k and one exact
bucket, through the very function that trains) and that of KL over all V tokens; beside it the same for the teacher's top k
renormalised to 1, which is what most tools train on. Sums over a gradient's entries are in float64: float32 is off by degrees.
"""
import argparse
import math
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from lib import head as heads  # noqa: E402
from lib import losses, models, plan  # noqa: E402
from lib.data import Dataset  # noqa: E402


@torch.no_grad()
def hidden_states(model: models.Model, dataset: Dataset, targets: int) -> torch.Tensor:
    """Return the hidden states (targets, D) of the first val targets (train's, where val has too few), float32."""
    split = dataset.val if dataset.val.targets >= targets else dataset.train
    lengths, made, count = split.rows["length"], [], 0
    for lines in plan.microbatches(np.arange(len(lengths)), lengths, 2048, 2048, pack=False):
        made.append(model.hidden(split.batch(lines)).float())
        count += len(made[-1])
        if count >= targets:
            break
    return torch.cat(made)[:targets]


def dense_gradient(s: torch.Tensor, p: torch.Tensor, hidden: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return d/dW of the sum of T^2 KL(p || softmax(s/T)): T (q - p)' h."""
    return (temperature * ((s / temperature).softmax(-1) - p)).t() @ hidden


def compare(a: torch.Tensor, b: torch.Tensor) -> tuple[float, float]:
    """Return the angle between a and b in degrees, and |a| / |b|; row by row in float64, so that no second copy is made."""
    dot = aa = bb = 0.0
    for x, y in zip(a.split(4096), b.split(4096)):
        x, y = x.double(), y.double()
        dot, aa, bb = dot + (x * y).sum().item(), aa + (x * x).sum().item(), bb + (y * y).sum().item()
    return math.degrees(math.acos(max(-1.0, min(1.0, dot / math.sqrt(aa * bb))))), math.sqrt(aa / bb)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--data", required=True)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--student", required=True)
    parser.add_argument("--keep-layers", default="", help="layers of --student to keep (default: all)")
    parser.add_argument("--targets", type=int, default=1200)
    parser.add_argument("--k", default="16,32,64")
    parser.add_argument("--temperatures", default="1,2,4")
    args = parser.parse_args(argv)
    device = torch.device("cpu")
    dataset = Dataset(args.data)
    teacher = models.load(args.teacher, device, dataset=dataset)
    taught, hidden_t = teacher.head(), hidden_states(teacher, dataset, args.targets)
    keep = [int(i) for i in args.keep_layers.split(",") if i]
    student = models.load(args.student, device, dataset=dataset, keep_layers=keep)
    learnt, hidden = student.head(), hidden_states(student, dataset, args.targets)
    vocab = min(taught.vocab, learnt.vocab)
    taught, learnt = teacher.head(vocab), student.head(vocab)
    weight = student.module.get_output_embeddings().weight
    kl = 0.0
    ks = [int(k) for k in args.k.split(",") if int(k) <= vocab]

    print(f"{len(hidden)} targets, V {vocab:,}; teacher {teacher.folder}, student {student.folder}" + (f" with {len(keep)} layers" if keep else ""))
    print("| T | k | renormalised top-k | exact bucket |\n| --- | --- | --- | --- |")
    for t in [float(t) for t in args.temperatures.split(",")]:
        full = torch.zeros(vocab, hidden.shape[1])
        renormalised, kept = {k: torch.zeros_like(full) for k in ks}, {k: [] for k in ks}
        for (part, s), (_, z) in zip(learnt.chunks(hidden), taught.chunks(hidden_t)):
            p = (z / t).softmax(-1)
            with torch.no_grad():
                full += dense_gradient(s, p, hidden[part], t)
                if t == 1:
                    kl += (p * (p.log() - s.log_softmax(-1))).sum().item() / len(hidden)
                for k in ks:
                    top = p.topk(k, 1)
                    cut = torch.zeros_like(p).scatter_(1, top.indices, top.values / top.values.sum(1, keepdim=True))
                    renormalised[k] += dense_gradient(s, cut, hidden[part], t)
                    kept[k].append(heads.topk_and_tails(z.clone(), k, [t]))
        for k in ks:
            ids, gaps, tails = (torch.cat(parts) for parts in zip(*kept[k]))
            weight.grad = None
            unused = torch.zeros(len(hidden), dtype=torch.long)  # labels: alpha is 1
            loss, _, _ = losses.head_loss(hidden, learnt, unused, losses.Kept(ids, gaps, tails[:, 0]), losses.Method(1.0, t))
            loss.backward()
            cells = [f"{angle:.1f} deg, x{ratio:.2f}" for angle, ratio in (compare(renormalised[k], full), compare(weight.grad[:vocab], full))]
            print(f"| {t:g} | {k} | {cells[0]} | {cells[1]} |", flush=True)
    print(f"\nKL(teacher || student) at T=1: {kl:.3f} nats a target")


if __name__ == "__main__":
    main()
