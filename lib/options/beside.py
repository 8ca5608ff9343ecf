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
from collections.abc import Sequence
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn

from lib import data, files, models
from lib.head import wide
from lib.losses import FLOOR
from lib.options.attention import Ear, listen

FEATURES = ("mse", "cosine")
LAYERS = (
    'pairs STUDENT:TEACHER of layers, "0:0,3:7,last:last", or "even:3" for three evenly spaced'
    " (default: %(default)s)"
)


def add_flags(group: argparse._ArgumentGroup) -> None:
    """Add the weights of the losses beside the logits, and what belongs to each."""
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
    weights = {
        name: getattr(args, name)
        for name in ("feature_weight", "attention_weight", "contrastive_weight")
    }
    for name, weight in weights.items():
        flag = f"--{name.replace('_', '-')}"
        if not 0 <= weight < float("inf"):
            parser.error(f"{flag} is {weight}, wanted 0 or more")
        if weight and not args.teacher:
            parser.error(
                f"{flag} needs the teacher live: it goes with --teacher, not with --logits"
            )
    if args.attention_weight and args.attn not in ("sdpa", "eager"):
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


def attention_kl(teacher: Tensor, student: Tensor) -> Tensor:
    """Return KL(teacher || student) (B, L) in nats a query token from log-probabilities (B, H, L,
    L): the mean over heads.

    Where the numbers of heads differ, the maps are averaged over heads first. Both sides are
    floored alike, so that a key that only the student masks (its sliding window) costs at most
    -FLOOR nats.
    """
    if teacher.shape[1] != student.shape[1]:
        teacher, student = (
            logp.logsumexp(1, keepdim=True) - torch.tensor(logp.shape[1], dtype=logp.dtype).log()
            for logp in (teacher, student)
        )
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


def layer_pairs(
    text: str, student: int, teacher: int, flag: str = "--feature-layers"
) -> list[tuple[int, int]]:
    """Read pairs student:teacher of decoder layers. For 4 and 8 layers "0:0,last:last" is [(0, 0),
    (3, 7)], and "even:2", two pairs evenly spaced with the last layers included, is [(1, 3), (3,
    7)].
    """
    wanted = (
        f"STUDENT:TEACHER from 0:0 to {student - 1}:{teacher - 1} or last:last, with commas; or"
        f" even:N, N from 1 to {min(student, teacher)}"
    )
    there = f"the student has {student} layers, the teacher {teacher}"
    try:
        first, _, count = text.partition(":")
        if first == "even":
            n = int(count)
            if not 1 <= n <= min(student, teacher):
                raise ValueError(text)
            return [((i + 1) * student // n - 1, (i + 1) * teacher // n - 1) for i in range(n)]
        pairs = []
        for pair in text.split(","):
            a, b = (
                size - 1 if word.strip() == "last" else int(word)
                for word, size in zip(pair.split(":"), (student, teacher), strict=True)
            )
            if not (0 <= a < student and 0 <= b < teacher):
                raise ValueError(pair)
            pairs.append((a, b))
        return list(dict.fromkeys(pairs))
    except ValueError:
        files.fail(f"{flag} {text} names no layers that are there ({there})", wanted=wanted)


def decoder_layers(model: models.Model) -> nn.ModuleList:
    """Return the list of a model's decoder layers, whatever its body calls it."""
    count = model.module.config.get_text_config().num_hidden_layers
    found = next(
        (
            part
            for part in model.body.modules()
            if isinstance(part, nn.ModuleList) and len(part) == count
        ),
        None,
    )
    if found is None:
        files.fail(
            f"{type(model.module).__name__} has no list of decoder layers",
            wanted=f"one of {count} layers",
        )
    return found


class Side:
    """What is captured of one model: hidden {layer: (B, L, D)}, maps {layer: (B, H, L, L)} as logs,
    last (B, L, D). No nn.Module, so that the models do not become parts of Beside."""

    def __init__(self, model: models.Model) -> None:
        if hasattr(model.body, "_orig_mod"):
            files.fail(
                "a compiled model does not show its layers",
                "--compile",
                "none, with a loss beside the logits",
                "no --compile",
            )
        self.model, self.layers = model, decoder_layers(model)
        self.hidden, self.last, self.ear = {}, None, Ear()
        self.hidden_at, self.wants_last = [], False

    def clear(self) -> None:
        self.hidden, self.last, self.ear.maps = {}, None, {}

    def _keep(self, layer: int | None, _module, _inputs, output) -> None:
        if layer is None:
            self.last = output.last_hidden_state
        else:
            self.hidden[layer] = output[0] if isinstance(output, tuple) else output

    @contextmanager
    def watch(self):
        """Capture the one forward pass that runs inside; the hooks are gone outside, where backward
        may run layers again."""
        self.clear()
        hooks = [
            self.layers[i].register_forward_hook(partial(self._keep, i)) for i in self.hidden_at
        ]
        if self.wants_last:
            hooks.append(self.model.body.register_forward_hook(partial(self._keep, None)))
        self.ear.on = True
        try:
            yield
        finally:
            self.ear.on = False
            for hook in hooks:
                hook.remove()


class Beside(nn.Module):
    """The losses beside the logits of a student and its live teacher. Its parameters are the
    learned projections, float32: they belong in the optimizer and in the resume state, and never in
    a checkpoint.

    A weight of 0 switches a loss off: it is not computed, nothing is hooked, and the models are
    left as they are. `weights` holds the others. Worked example, one optimizer step of two
    micro-batches, `tokens` and `rows` counted over both:

        pooled = []
        # only where "contrastive" is in beside.weights
        for batch in batches:
            with torch.inference_mode(), beside.watch("teacher"):
                teacher.hidden(batch)
            pooled.append(beside.pool(batch))                # (rows of this batch, D')
        pooled, offset = torch.cat(pooled), 0
        for batch in batches:
            with torch.inference_mode(), beside.watch("teacher"):
                teacher.hidden(batch)
            with beside.watch("student"):
                hidden = student.hidden(batch)
            terms = beside.terms(batch, tokens, rows, pooled, offset)
            (logits_loss(hidden) + sum(beside.weights[name] * term for name, term in
            terms.items())).backward() offset += len(batch.rows)
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
        self.weights = {
            name: weight
            for name, weight in (
                ("feature", feature),
                ("attention", attention),
                ("contrastive", contrastive),
            )
            if weight > 0
        }
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
    def pool_step(self, batches: Sequence[data.Batch]) -> Tensor | None:
        """Return `pool` (R, D') over all micro-batches of a step, by one more pass of the teacher's
        body; None where nothing contrasts, and where the step is one micro-batch, which `terms` can
        pool itself."""
        if "contrastive" not in self.weights or len(batches) == 1:
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
                each = [
                    attention_kl(self._teacher(teacher.ear.maps[b]), student.ear.maps[a])[
                        real
                    ].sum()
                    for a, b in self.attention_pairs
                ]
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
        tops = {
            name: max(a for a, _ in pairs)
            for name, pairs in (
                ("feature", self.feature_pairs),
                ("attention", self.attention_pairs),
            )
            if pairs
        }
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


def build(args: argparse.Namespace, student: models.Model, teacher: models.Model | None) -> Beside:
    """Return what the flags of `add_flags` ask for."""
    return Beside(
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


def projection(student: int, teacher: int, made: torch.Generator) -> nn.Module:
    """Return a linear map between hidden states, or the identity where the widths agree."""
    if student == teacher:
        return nn.Identity()
    layer = nn.Linear(student, teacher, bias=False, dtype=torch.float32)
    with torch.no_grad():
        layer.weight.uniform_(-(student**-0.5), student**-0.5, generator=made)
    return layer
