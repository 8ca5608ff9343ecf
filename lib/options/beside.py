"""Losses beside the logits, with a live teacher: hidden states, attention maps, and what a whole
row looks like.

Each is a small function of what `Beside` captures of one forward pass of the student and one of the
teacher over the same batch:

    feature      how far chosen layers' outputs are from the teacher's; per token; no unit: mse as a
                 share of the teacher's squared norm (1 = as bad as zero), or 1 - cosine. A learned
                 projection where widths differ (FitNets, arXiv:1412.6550, eq. 3)
    attention    KL(teacher's map || student's map) of chosen layers, nats a query token
                 (MobileBERT's attention transfer, arXiv:2004.02984)
    contrastive  InfoNCE over the rows of the whole optimizer step, nats a row above what the
                 teacher itself would have (arXiv:1807.03748)

All three are 0 where the student equals the teacher. The first two are at their least there;
InfoNCE goes on pushing rows apart. Sums over real tokens or rows are divided by those of the WHOLE
optimizer step, so that a step's figure does not depend on how it is cut into micro-batches.
"""

import argparse
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from lib import data, evaluate, files, flags, models
from lib.head import FLOOR, wide
from lib.options.attention import listen
from lib.options.capture import Side, layer_pairs
from lib.options.gradnorm import Balance

FEATURES = ("mse", "cosine")
LAYERS = (
    'pairs STUDENT:TEACHER of layers, "0:0,3:7,last:last", or "even:3" for three evenly spaced'
    " (default: %(default)s)"
)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the weights of the losses beside the logits, and what belongs to each."""
    group = parser.add_argument_group("losses beside the logits (--teacher)")
    group.add_argument(
        "--feature-weight",
        type=float,
        default=0.0,
        metavar="W",
        help="of the distance of hidden states (default: %(default)s)",
    )
    group.add_argument("--feature-layers", default="last:last", metavar="PAIRS", help=LAYERS)
    group.add_argument(
        "--feature-loss",
        choices=FEATURES,
        default="mse",
        help=(
            "squared distance as a share of the teacher's square, or 1 - cosine (default:"
            " %(default)s)"
        ),
    )
    group.add_argument(
        "--attention-weight",
        type=float,
        default=0.0,
        metavar="W",
        help="of the KL of attention maps (default: %(default)s)",
    )
    group.add_argument("--attention-layers", default="last:last", metavar="PAIRS", help=LAYERS)
    group.add_argument(
        "--contrastive-weight",
        type=float,
        default=0.0,
        metavar="W",
        help="of InfoNCE between the means of rows; the teacher runs twice (default: %(default)s)",
    )
    group.add_argument(
        "--contrastive-temperature",
        type=float,
        default=0.1,
        metavar="T",
        help="of its cosines (default: %(default)s)",
    )
    group.add_argument(
        "--balance",
        choices=["none", "gradnorm"],
        default="none",
        help=(
            "gradnorm: move these weights until all losses pull equally hard"
            " (lib/options/gradnorm.py; default: %(default)s)"
        ),
    )
    group.add_argument(
        "--balance-every",
        type=int,
        default=10,
        metavar="N",
        help="steps between its measurements (default: %(default)s)",
    )


def check_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse (exit code 2) values that cannot work."""
    names = ("feature_weight", "attention_weight", "contrastive_weight")
    weights = {name: getattr(args, name) for name in names}
    for name, weight in weights.items():
        flag = flags.spelled(name)
        if not 0 <= weight < float("inf"):
            parser.error(f"{flag} is {weight}, wanted 0 or more")
        if weight and not args.teacher:
            parser.error(
                f"{flag} needs the teacher live: it goes with --teacher, not with --logits"
            )
        if weight and flags.folders_of(args.teacher):
            parser.error(f"{flag} needs one teacher, and --teacher names several: wanted one DIR")
    if args.attention_weight and args.attn not in ("auto", "sdpa", "eager"):
        parser.error(
            f"--attention-weight needs maps, which --attn {args.attn} does not give: wanted --attn"
            " sdpa or eager"
        )
    if args.balance == "gradnorm" and not any(weights.values()):
        parser.error(
            "--balance gradnorm has nothing to balance: wanted --feature-weight, --attention-weight"
            " or --contrastive-weight"
        )
    for name in ("contrastive_temperature", "balance_every"):
        if not getattr(args, name) > 0:
            parser.error(
                f"--{name.replace('_', '-')} is {getattr(args, name)}, wanted a number above 0"
            )


def feature_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the squared distance (n,) of hidden states (n, D) as a share of the teacher's squared
    norm.

    A plain mean of squares would be that of the few huge entries that decoders have ("massive
    activations", arXiv:2402.17762).
    """
    return (student - teacher).square().sum(-1) / teacher.square().sum(-1).clamp_min(
        torch.finfo(teacher.dtype).tiny
    )


def feature_cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """Return 1 - cosine (n,) of hidden states (n, D): half the squared distance of PKD's normalised
    states (arXiv:1908.09355)."""

    def unit(hidden):
        return nn.functional.normalize(hidden, dim=-1)

    return (unit(student) - unit(teacher)).square().sum(-1) / 2


def mean_over_heads(logp: Tensor) -> Tensor:
    """Return the log (B, 1, L, L) of the mean over heads of exp(logp), (B, H, L, L)."""
    return logp.logsumexp(1, keepdim=True) - torch.tensor(logp.shape[1], dtype=logp.dtype).log()


def attention_kl(teacher: Tensor, student: Tensor) -> Tensor:
    """Return KL(teacher || student) (B, L) in nats a query token from log-probabilities (B, H, L,
    L): the mean over heads.

    Where the numbers of heads differ, the maps are averaged over heads first. Both sides are
    floored alike, so that a key that only the student masks (its sliding window) costs at most
    -FLOOR nats.
    """
    if teacher.shape[1] != student.shape[1]:
        teacher, student = mean_over_heads(teacher), mean_over_heads(student)
    teacher, student = teacher.clamp_min(FLOOR), student.clamp_min(FLOOR)
    return (teacher.exp() * (teacher - student)).sum(-1).mean(1)


def contrast(student: Tensor, teacher: Tensor, offset: int, temperature: float) -> Tensor:
    """Return InfoNCE (n,) in nats of n pooled student rows, less that of the teacher's own rows: a
    shift without gradient.

    student (n, D); teacher (R, D) all rows of the step. Row i's positive is teacher[offset + i],
    its negatives are the other R - 1; similarities are cosines over `temperature`. Below 0 where
    the student tells rows apart better than the teacher does, and so with a gradient even where it
    equals the teacher. Source: Contrastive Predictive Coding, arXiv:1807.03748, eq. 4, with the
    similarity of SimCLR (arXiv:2002.05709, eq. 1).
    """
    student, teacher = (
        nn.functional.normalize(student, dim=-1),
        nn.functional.normalize(teacher, dim=-1),
    )
    own = teacher[offset : offset + len(student)]

    def nce(rows):
        return (rows @ teacher.t() / temperature).logsumexp(1) - (rows * own).sum(1) / temperature

    return nce(student) - nce(own)


def pool(hidden: Tensor, row_of: Tensor, rows: int) -> Tensor:
    """Return the mean (rows, D) of hidden states (B, L, D) over each row's tokens; row_of (B, L) as
    in data.Batch."""
    row_of = row_of.to(hidden.device)
    real = row_of >= 0
    sums = torch.zeros(rows, hidden.shape[-1], dtype=wide(hidden.dtype), device=hidden.device)
    sums = sums.index_add(0, row_of[real], hidden[real].to(sums.dtype))
    return sums / row_of[real].bincount(minlength=rows)[:, None]


class Beside(nn.Module):
    """The losses beside the logits of a student and its live teacher. Its parameters are the
    learned projections, float32: they belong in the optimizer and in the resume state, and never in
    a checkpoint.

    A weight of 0 switches a loss off: it is not computed, nothing is hooked, and the models are
    left as they are. `weights` holds the others. A micro-batch is one pass of each model under
    `watch`, then `terms`; `Step` does that in a training loop.
    """

    def __init__(
        self,
        student: models.Model,
        teacher: models.Model | None,
        *,
        feature: float = 0.0,
        feature_layers: str = "last:last",
        feature_kind: str = "mse",
        attention: float = 0.0,
        attention_layers: str = "last:last",
        contrastive: float = 0.0,
        contrastive_temperature: float = 0.1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        assert feature_kind in FEATURES, feature_kind
        weights = {"feature": feature, "attention": attention, "contrastive": contrastive}
        self.weights = {name: weight for name, weight in weights.items() if weight > 0}
        self.measure = feature_mse if feature_kind == "mse" else feature_cosine
        self.temperature, self.device = contrastive_temperature, student.device
        self.sides = {"student": Side(student), "teacher": Side(teacher)} if self.weights else {}
        self.feature_pairs, self.attention_pairs = [], []
        self.feature_projections, self.contrastive_projection = nn.ModuleList(), None
        if not self.weights:
            return
        counts = [len(side.layers) for side in self.sides.values()]
        widths = [
            side.model.module.config.get_text_config().hidden_size for side in self.sides.values()
        ]
        made = torch.Generator().manual_seed(seed)
        if feature > 0:
            self.feature_pairs = layer_pairs(feature_layers, *counts)
            self.feature_projections.extend(projection(*widths, made) for _ in self.feature_pairs)
        if contrastive > 0:
            self.contrastive_projection = projection(*widths, made)
        pairs = (
            layer_pairs(attention_layers, *counts, "--attention-layers") if attention > 0 else []
        )
        for place, side in enumerate(self.sides.values()):
            side.hidden_at = sorted({pair[place] for pair in self.feature_pairs})
            side.wants_last = contrastive > 0
            if pairs:
                side.ear = listen(
                    side.model,
                    side.layers,
                    sorted({pair[place] for pair in pairs}),
                    "--attention-weight",
                )
                side.heads = next(iter(side.ear.maps.values())).shape[1]
                side.clear()
        self.attention_pairs = pairs
        self._check_reach()
        self.to(self.device)

    def _check_reach(self) -> None:
        """Refuse a loss that no trained parameter can change: a LoRA adapter may leave out all that
        lies below a layer's output or map."""
        side = self.sides["student"]
        if all(p.requires_grad for p in side.model.module.parameters()):
            return
        self._pass_of_eight_tokens()
        maps, layers = side.ear.maps, lambda numbers: ", ".join(map(str, numbers))
        for flag, there, wanted in (
            ("--feature-layers", side.hidden, {a for a, _ in self.feature_pairs}),
            ("--attention-layers", maps, {a for a, _ in self.attention_pairs}),
        ):
            if fixed := sorted(layer for layer in wanted if not there[layer].requires_grad):
                files.fail(
                    f"{flag}: nothing that is trained changes layer {layers(fixed)} of the student",
                    "an adapter elsewhere alone",
                    mend="--lora-targets all-linear, or other layers",
                )
        side.clear()

    def _pass_of_eight_tokens(self) -> None:
        side, tokens = self.sides["student"], torch.arange(8, device=self.device)[None]
        with torch.enable_grad(), side.watch():
            side.model.body(
                input_ids=tokens % side.model.vocab, position_ids=tokens, use_cache=False
            )

    def watch(self, who: str):
        """Return a context in which one forward pass of "student" or "teacher" is captured for
        `terms` and `pool`; no backward inside."""
        return self.sides[who].watch() if self.weights else nullcontext()

    def say(self) -> list[str]:
        """Return what is computed, a line each."""

        def show(pairs):
            return " ".join(f"{a}:{b}" for a, b in pairs)

        projected = ", through a learned projection" if any(True for _ in self.parameters()) else ""
        lines = {
            "feature": (
                f"feature: {self.measure.__name__[8:]} of the outputs of layers"
                f" {show(self.feature_pairs)} (student:teacher){projected}"
            ),
            "contrastive": (
                f"contrastive: InfoNCE at temperature {self.temperature:g} over the rows of a"
                f" step{projected}"
            ),
        }
        if self.attention_pairs:
            heads = [side.heads for side in self.sides.values()]
            each = (
                "each head"
                if heads[0] == heads[1]
                else f"means over heads, {heads[0]} and {heads[1]}"
            )
            lines["attention"] = (
                f"attention: maps of layers {show(self.attention_pairs)} (student:teacher), {each};"
                " eager attention there alone"
            )
        return [lines[name] for name in self.weights]

    def _teacher(self, tensor: Tensor, real: Tensor | None = None) -> Tensor:
        """Return what was captured of the teacher (at real tokens), on the student's device,
        float32 or wider."""
        if real is not None:
            tensor = tensor[real.to(tensor.device)]
        return tensor.detach().to(self.device, wide(tensor.dtype))

    def pool(self, batch: data.Batch) -> Tensor:
        """Return the teacher's last hidden states as means (rows, D') over the rows of the batch
        that was just watched."""
        assert self.sides["teacher"].last is not None, "no forward pass under watch('teacher')"
        return self._teacher(pool(self.sides["teacher"].last, batch.row_of, len(batch.rows)))

    @torch.no_grad()
    def pool_step(self, batches: Sequence[data.Batch], all_there: bool = True) -> Tensor | None:
        """Return `pool` (R, D') over all micro-batches of a step, by one more pass of the teacher's
        body; None where nothing contrasts, and where one micro-batch is the step (all_there), which
        `terms` can pool itself."""
        if "contrastive" not in self.weights or all_there and len(batches) == 1:
            return None
        side, found = self.sides["teacher"], []
        for batch in batches:
            with side.watch():
                side.model.hidden(batch.to(side.model.device))
            found.append(self.pool(batch))
        return torch.cat(found)

    def memory_bytes(self, tokens: int, line: int) -> int:
        """Return about how many bytes all this takes on the student's device for a micro-batch of
        lines of `line` tokens: four maps a pair and head (log-probabilities and their temporaries
        on both sides), both sides' hidden states.
        """
        if not self.weights:
            return 0
        widths = [
            side.model.module.config.get_text_config().hidden_size for side in self.sides.values()
        ]
        heads = max(side.heads for side in self.sides.values()) if self.attention_pairs else 0
        return (
            4
            * tokens
            * (
                4 * heads * line * len(self.attention_pairs)
                + 2 * sum(widths) * (len(self.feature_pairs) + 1)
            )
        )

    def terms(
        self,
        batch: data.Batch,
        tokens: int,
        rows: int,
        pooled: Tensor | None = None,
        offset: int = 0,
    ) -> dict[str, Tensor]:
        """Return {"feature", "attention"}: sums over the batch's real tokens / tokens,
        {"contrastive"}: sum over its rows / rows.

        Only those with a weight, unweighted, after one pass of each model under `watch`; what was
        captured is let go. tokens and rows are those of the whole optimizer step; pooled (R, D')
        are `pool` of all its micro-batches (None: this is the only one), and this batch's rows
        begin at `offset`.
        """
        if not self.weights:
            return {}
        student, teacher = self.sides["student"], self.sides["teacher"]
        real, found = batch.row_of.to(self.device) >= 0, {}  # (B, L)
        with torch.autocast(self.device.type, enabled=False):
            if self.feature_pairs:
                each = []
                for (a, b), project in zip(self.feature_pairs, self.feature_projections):
                    hidden = student.hidden[a][real]
                    each.append(
                        self.measure(
                            project(hidden.to(wide(hidden.dtype))),
                            self._teacher(teacher.hidden[b], real),
                        ).sum()
                    )
                found["feature"] = torch.stack(each).mean() / tokens
            if self.attention_pairs:
                each = []
                for a, b in self.attention_pairs:
                    kl = attention_kl(self._teacher(teacher.ear.maps[b]), student.ear.maps[a])
                    each.append(kl[real].sum())
                found["attention"] = torch.stack(each).mean() / tokens
            if self.contrastive_projection is not None:
                pooled = self.pool(batch) if pooled is None else pooled
                assert len(pooled) == rows, (
                    "contrastive needs the teacher's pooled rows of the whole step"
                )
                anchors = self.contrastive_projection(
                    pool(student.last, batch.row_of, len(batch.rows))
                )
                found["contrastive"] = (
                    contrast(anchors, pooled, offset, self.temperature).sum() / rows
                )
        for side in self.sides.values():
            side.clear()
        return found

    def shared(self) -> list[nn.Parameter]:
        """Return the student's parameters that lib/options/gradnorm.py measures on: of the highest
        decoder layer that every term's gradient reaches (a layer's own output counts as reached),
        and of an attention map at that layer, those that the map depends on.

        Worked example, 6 layers: feature on 0:0,3:7 reaches layer 3; with attention on 2:4 it is
        layer 2's query and key (and the norm before them); with contrastive alone, layer 5.
        """
        side = self.sides["student"]
        watched = {"feature": self.feature_pairs, "attention": self.attention_pairs}
        tops = {name: max(a for a, _ in pairs) for name, pairs in watched.items() if pairs}
        layer = min([len(side.layers) - 1, *tops.values()])
        found = [p for p in side.layers[layer].parameters() if p.requires_grad]
        if tops.get("attention") == layer:
            self._pass_of_eight_tokens()
            reached = torch.autograd.grad(side.ear.maps[layer].sum(), found, allow_unused=True)
            found = [p for p, g in zip(found, reached) if g is not None]
            side.clear()
        if not found:  # an adapter elsewhere
            files.fail(
                f"--balance gradnorm has nothing to measure on in layer {layer} of the student",
                "no trained parameter that all losses depend on",
                mend="--lora-targets all-linear, or --balance none",
            )
        return found


class Step:
    """The losses beside the logits in a training loop. Worked example, one optimizer step:

        for batch in near.begin(batches, step, tokens, rows):   # tokens and rows of the whole step
            with near.watch("teacher"):
                known = teacher.at(batch, temperature)
            with near.watch("student"):
                hidden = student.hidden(batch)                  # (N, D)
            leaf = near.cut(hidden)
            scaler.scale(loss_of(leaf, known)).backward()       # into the head, and leaf.grad
            near.backward(batch, scaler)                        # all gradients into the body
        figures = near.end()

    moved: whether `end` has just moved the weights (a log line is due).
    """

    def __init__(
        self, near: Beside, every: int, more: dict[str, Any], peers: evaluate.Peers
    ) -> None:
        self.peers = peers
        self.near, self.watch, self.memory_bytes = near, near.watch, near.memory_bytes
        shared = near.shared() if every else []
        self.balance = Balance(near.weights, every, shared, more.get("balance"))
        if every:  # changed in place
            more["balance"] = {"weights": self.balance.weights}
        self.moved = False

    def beside(self, module: nn.Module) -> nn.Module:
        """Return all that is trained: the student, and the projections."""
        return nn.ModuleList([module, self.near])

    def begin(
        self, batches: Iterable[data.Batch], step: int, tokens: int, rows: int
    ) -> Iterable[data.Batch]:
        """Begin an optimizer step, and return its batches; what contrasts sees them whole first."""
        self.step, self.tokens, self.rows, self.begun = step, tokens, rows, 0
        self.sums = torch.zeros(len(self.near.weights), device=self.near.device)
        if "contrastive" in self.near.weights:
            batches = list(batches)
        alone = self.peers.world == 1
        self.pooled = self.near.pool_step(batches, alone)
        if self.pooled is not None and not alone:  # other processes' come before and after
            each = [rows.to(self.near.device) for rows in self.peers.of_each(self.pooled.cpu())]
            self.pooled = torch.cat(each)
            self.begun = sum(len(rows) for rows in each[: self.peers.rank])
        return batches

    def cut(self, hidden: Tensor) -> Tensor:
        """Return a leaf that stands for the student's hidden states (N, D) in the logits' loss."""
        self.hidden, self.leaf = hidden, hidden.detach().requires_grad_()
        return self.leaf

    def backward(self, batch: data.Batch, scaler: torch.amp.GradScaler) -> None:
        """Send the logits' gradient from the leaf on into the body, together with the others'."""
        terms = self.near.terms(batch, self.tokens, self.rows, self.pooled, self.begun)
        scaled = {name: scaler.scale(term) for name, term in terms.items()}
        self.balance.backward(self.hidden, self.leaf.grad, scaled, self.step)
        self.sums += torch.stack([term.detach() for term in terms.values()])
        self.begun += len(batch.rows)

    def end(self) -> dict[str, float]:
        """Return the step's losses by name, and, where their weights were moved, how."""
        self.peers.total(self.sums, *self.balance.measured())
        self.moved = self.balance.due(self.step)
        losses = dict(zip(self.near.weights, self.sums.tolist()))
        return losses | (self.balance.move() if self.moved else {})


class Nothing:
    """The null twin of `Step`: the student learns from the logits alone."""

    moved = False

    def beside(self, module: nn.Module) -> nn.Module:
        return module

    def memory_bytes(self, tokens: int, line: int) -> int:
        return 0

    def begin(
        self, batches: Iterable[data.Batch], step: int, tokens: int, rows: int
    ) -> Iterable[data.Batch]:
        return batches

    def watch(self, who: str):
        return nullcontext()

    def cut(self, hidden: Tensor) -> Tensor:
        return hidden

    def backward(self, batch: data.Batch, scaler: torch.amp.GradScaler) -> None:
        pass

    def end(self) -> dict[str, float]:
        return {}


def open_step(
    args: argparse.Namespace,
    student: models.Model,
    teacher: models.Model | None,
    more: dict[str, Any],
    peers: evaluate.Peers,
) -> Step | Nothing:
    """Return what the flags of `add_flags` ask for, and say it. more: a run's own, which keeps the
    weights. peers: the processes that train together."""
    if not any((args.feature_weight, args.attention_weight, args.contrastive_weight)):
        return Nothing()
    near = Beside(
        student,
        teacher,
        feature=args.feature_weight,
        feature_layers=args.feature_layers,
        feature_kind=args.feature_loss,
        attention=args.attention_weight,
        attention_layers=args.attention_layers,
        contrastive=args.contrastive_weight,
        contrastive_temperature=args.contrastive_temperature,
        seed=args.seed,
    )
    for text in near.say():
        print(text)
    return Step(near, args.balance_every if args.balance == "gradnorm" else 0, more, peers)


def projection(student: int, teacher: int, made: torch.Generator) -> nn.Module:
    """Return a linear map between hidden states, or the identity where the widths agree."""
    if student == teacher:
        return nn.Identity()
    layer = nn.Linear(student, teacher, bias=False, dtype=torch.float32)
    with torch.no_grad():
        layer.weight.uniform_(-(student**-0.5), student**-0.5, generator=made)
    return layer
