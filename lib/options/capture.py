"""What is captured of one forward pass of a model: outputs of chosen layers, their attention
maps, the last hidden states. For the losses beside the logits (lib/options/beside.py)."""

from contextlib import contextmanager
from functools import partial

from torch import nn

from lib import files, models
from lib.options.attention import Ear


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
    for part in model.body.modules():
        if isinstance(part, nn.ModuleList) and len(part) == count:
            return part
    files.fail(
        f"{type(model.module).__name__} has no list of decoder layers",
        wanted=f"one of {count} layers",
    )


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
