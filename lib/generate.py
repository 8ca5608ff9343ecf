"""Answers of a local model, many at once: a row that is finished leaves, and a waiting prompt takes
its place at once.

Contract: `generate` takes an iterable of requests and yields an answer for each as it is finished.
What a request is answered does not depend on its company (up to the rounding of sums whose order a
kernel chooses by shape): greedy is the argmax, and sampling reads one uniform number a token from
the request's own seed.

How the cache is laid out: every row has a slot in one buffer a layer, (slots, heads, columns, D),
and all rows end at the same column `hi`, so that one forward pass appends one column. A row's
tokens are the columns from its `start`; what lies before is masked. The model is shown columns
lo..hi, lo = the smallest start of a living row: what is padding for all costs nothing. Nothing is
copied from step to step; a new prompt is run alone and written into the free slot, so that it ends
at `hi` too:

    slot 0   . . . . p p p a a |        p prompt, a answer, . masked
    slot 1   p p p p p a a a a |        finished: slot 1 is given to a prompt of six tokens,
    slot 1   . . . p p p p p p |        and lo becomes 3
                               hi

transformers' own continuous batching (5.23, `generate_batch`) has one seed for all requests: a
sampled answer depends on its company.
"""

import copy
import inspect
import json
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from lib import files

# what transformers' models call the memory that they hand back and take again
MEMORIES = {"past_key_values", "cache_params", "state", "mems"}
ROOM = 256  # columns added when the buffer is full
# a student's own text has gone wrong (`drifted`) where its answers are so many times as long, or as
# short, and by more than a token; where the share that ends is at most so much of what it was, and
# less by a tenth of all; where the entropy is
LONGER, FEWER_ENDS, LESS_ENTROPY = 1.5, 0.5, 0.1
# likeliest tokens that are sorted first for top_p; all are, where these hold less than its mass
NUCLEUS = 1024
# settings of a generation_config that would change an answer and that `Sampling` does not know
UNKNOWN = (
    "no_repeat_ngram_size",
    "bad_words_ids",
    "suppress_tokens",
    "begin_suppress_tokens",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "sequence_bias",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
    "guidance_scale",
    "encoder_repetition_penalty",
    "penalty_alpha",
)


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen. temperature 0: the likeliest; top_k 0, top_p 1, min_p 0 and
    repetition_penalty 1 are off. stops: tokens that end; min_tokens: none of them before so many.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stops: tuple[int, ...] = ()
    min_tokens: int = 0


@dataclass(frozen=True)
class Request:
    """key: handed back with the answer. ids: the prompt's tokens. seed: of its own random numbers.
    how: its own way to sample, in place of the batch's. top: with each token its log-probability
    comes, and those of the `top` likeliest; None: without. written: the first tokens of the answer,
    where it was begun already: it goes on behind them, as if it had never been cut.
    """

    key: Hashable
    ids: list[int]
    max_new_tokens: int
    seed: int = 0
    how: Sampling | None = None
    top: int | None = None
    written: tuple[int, ...] = ()

    @property
    def tokens(self) -> list[int]:
        return [*self.ids, *self.written]


@dataclass(frozen=True)
class Likely:
    """Log-probabilities, nats, of the model itself: at T=1, before any filter or penalty. top:
    (token, log p), the likeliest first."""

    logp: float
    top: list[tuple[int, float]]


@dataclass(frozen=True)
class Answer:
    """ids: the tokens written, without `end`, the one that ended it (None: none did). finish: stop,
    or length (cut at max_new_tokens or at the model's context). likely: of `end`, where the request
    asked."""

    request: Request
    ids: list[int]
    finish: str
    end: int | None = None
    likely: Likely | None = None


@contextmanager
def one_memory_error() -> Iterator[None]:
    """Raise torch.OutOfMemoryError on every device: the CPU's is a RuntimeError or a
    MemoryError."""
    try:
        yield
    except (RuntimeError, MemoryError) as full:
        if isinstance(full, RuntimeError) and "DefaultCPUAllocator" not in str(full):
            raise
        raise torch.OutOfMemoryError(str(full) or "MemoryError") from None


def end_tokens(how, *more: int | None) -> list[int]:
    """Return the tokens that end an answer: a generation_config's own, and `more`."""
    own = how.eos_token_id if isinstance(how.eos_token_id, list) else [how.eos_token_id]
    return [token for token in dict.fromkeys([*own, *more]) if token is not None]


def pad_token(how, tokenizer, vocab: int) -> int:
    """Return what fills a row up: the generation_config's token, the tokenizer's, or any, of the
    `vocab` that a model knows."""
    known = (how.pad_token_id, tokenizer.pad_token_id, *end_tokens(how, tokenizer.eos_token_id), 0)
    return next(token for token in known if token is not None and token < vocab)


def known(module, ids: list[int], tokenizer) -> list[int]:
    """Return a prompt's tokens; the one-line error where the model has no row for one of them: a
    tokenizer may have more tokens than its model, and a text may name them."""
    most, rows = max(ids, default=0), module.get_input_embeddings().weight.shape[0]
    if most >= rows:
        name = f", {tokenizer.convert_ids_to_tokens(most)!r}" if most < len(tokenizer) else ""
        files.fail(
            "the prompt holds a token that is none of the model's",
            f"token {most}{name}",
            f"0 to {rows - 1}",
        )
    return ids


def read_config(folder: Path):
    """Return a folder's generation_config as transformers can write it again, or None where there
    is no file. What it sets beyond that is left out, and said; greedy is what a temperature or
    top_p of 0 means."""
    if not (path := folder / "generation_config.json").exists():
        return None
    told = files.read_json(path, "a whole one, or none")
    if not isinstance(told, dict):
        files.fail(f"{path} holds no settings", type(told).__name__, "a JSON object")
    plain = {name: as_meant(name, value) for name, value in told.items()}
    if 0 in (plain.get("temperature"), plain.get("top_p")):
        plain["do_sample"] = False
    if plain == told and (whole := fits(GenerationConfig(), told)):
        return whole
    # what others depend on comes first
    first = ("do_sample", "num_beams", "return_dict_in_generate")
    kept, left_out = GenerationConfig(), []
    for name in sorted(told, key=lambda name: (name not in first, name)):
        if trial := fits(kept, {name: plain[name]}):
            kept = trial
        if not trial or plain[name] != told[name]:
            left_out.append(f"{name} {told[name]!r}")
    if left_out:
        print(f"model: of {path} these are left out or mended: {', '.join(left_out)}")
    return kept


def as_meant(name: str, value: Any) -> Any:
    """Return a setting whose number or truth value was written as a text, or whose tokens are not
    all numbers of tokens, without that."""
    if name.endswith("_token_id"):
        some = value if isinstance(value, list) else [value]
        good = [token for token in some if type(token) is int and token >= 0]
        return value if len(good) == len(some) else good or None
    try:
        read = json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return value
    return read if isinstance(read, bool | int | float) else value


def fits(how: GenerationConfig, more: dict[str, Any]) -> GenerationConfig | None:
    """Return a generation_config with more settings, or None where it could not be saved."""
    trial = copy.deepcopy(how)
    try:
        trial.update(allow_custom_entries=True, **more)
        trial.validate(strict=True)
        json.loads(trial.to_json_string())
    except (ValueError, TypeError, AttributeError):
        return None
    return trial


def unknown_settings(how) -> dict[str, object]:
    """Return what a generation_config sets beyond what `Sampling` knows."""
    given = {name: getattr(how, name, None) for name in UNKNOWN}
    return {name: value for name, value in given.items() if value not in (None, 0, 1, [], {})}


def sampling_of(
    how, tokenizer, temperature: float | None = None, top_p: float | None = None
) -> Sampling:
    """Return a model's own way to sample (its generation_config `how`), with what is given in its
    place."""

    def own(name, default):
        return default if getattr(how, name, None) is None else getattr(how, name)

    for name, value in unknown_settings(how).items():
        files.fail(
            f"the model's generation_config.json sets {name}",
            seen=value,
            wanted="temperature, top_k, top_p, min_p or repetition_penalty",
            mend="another generation_config.json, or a server (--teacher-url)",
        )
    sampled = bool(own("do_sample", False)) or top_p is not None
    if temperature is None:
        temperature = own("temperature", 1.0) if sampled else 0.0
    stops = tuple(end_tokens(how, tokenizer.eos_token_id))
    penalty = own("repetition_penalty", 1.0)
    if not temperature:
        return Sampling(0.0, repetition_penalty=penalty, stops=stops)
    return Sampling(
        temperature,
        own("top_k", 50),
        own("top_p", 1.0) if top_p is None else top_p,
        own("min_p", 0.0),
        penalty,
        stops,
    )


def window(config) -> int | None:
    """Return the most tokens that a model was made for, or None where its configuration does not
    say: its positions, or what rope scaling makes of those it was first trained with."""
    config = config.get_text_config()
    names = ("max_position_embeddings", "n_positions", "max_seq_len")
    known = [getattr(config, name, None) or 0 for name in names]  # XLNet's is -1: no limit
    most = next((value for value in known if value > 0), None)
    rope = getattr(config, "rope_parameters", None) or {}
    for kind in [rope, *(value for value in rope.values() if isinstance(value, dict))]:
        first = kind.get("original_max_position_embeddings")
        # of a linear one a config gives now what was before, now what is after
        if most and first and kind.get("rope_type") in ("yarn", "llama3", "longrope", "dynamic"):
            most = max(most, int(first * (kind.get("factor") or 1)))
    return most


def context_of(module) -> int | None:
    """Return the most tokens that a model sees, or None where it does not say."""
    return window(module.config)


def unknown_cache(module) -> str | None:
    """Return what a model's memory is where that is more than keys and values of every token
    (Mamba, linear or chunked attention)."""
    config, known = module.config.get_text_config(), {"full_attention", "sliding_attention"}
    strange = {*(getattr(config, "layer_types", None) or ())} - known
    for layer in DynamicCache(config=config).layers:
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            strange.add(type(layer).__name__)
    if not MEMORIES & {*inspect.signature(type(module).forward).parameters}:
        strange.add("none that it takes")
    if strange or getattr(module, "_is_stateful", False) or config.is_encoder_decoder:
        return ", ".join(sorted(strange)) or "a state that is no cache"
    return None


def left_padded(rows: Sequence[list[int]], device) -> tuple[Tensor, Tensor]:
    """Return rows of tokens that all end in the last column, (B, L), and where they are tokens and
    no padding, (B, L) bool."""
    width = max(map(len, rows))
    tokens = torch.tensor([[0] * (width - len(row)) + row for row in rows], device=device)
    pads = torch.tensor([[width - len(row)] for row in rows], device=device)
    return tokens, torch.arange(width, device=device) >= pads


def prefill(module, prompts: Sequence[list[int]]) -> tuple[Tensor, Any, Tensor]:
    """Run prompts together. Return the logits of the token after each, (B, V), the cache, and which
    of its columns hold a prompt's tokens, (B, L) bool."""
    tokens, mask = left_padded(prompts, module.device)
    cache = DynamicCache()
    made = module(
        input_ids=tokens,
        attention_mask=mask.long(),
        position_ids=(mask.cumsum(-1) - 1).clamp_min(0),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return made.logits[:, -1], cache, mask


class Slots(DynamicLayer):
    """One layer's keys and values, (slots, heads, columns, D). `span` is shared by all layers: [lo,
    hi]."""

    keys: Any
    values: Any

    def __init__(self, span: list[int], keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.span, self.keys, self.values, self.is_initialized = span, keys, values, True
        self.dtype, self.device = keys.dtype, keys.device

    def update(
        self, key_states: Tensor, value_states: Tensor, *args, **kwargs
    ) -> tuple[Tensor, Tensor]:
        lo, hi = self.span
        end = hi + key_states.shape[-2]
        self.keys[:, :, hi:end], self.values[:, :, hi:end] = key_states, value_states
        return self.keys[:, :, lo:end], self.values[:, :, lo:end]

    def get_seq_length(self) -> int:
        return self.span[1] - self.span[0]

    def move(self, slots: Tensor | None, shape: tuple[int, int], lo: int, hi: int, to: int) -> None:
        """Bring the columns lo..hi of some slots (None: none) to a new buffer of (slots, columns),
        ending at column `to`."""
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = old.new_zeros((shape[0], old.shape[1], shape[1], old.shape[3]))
            if slots is not None:
                new[: len(slots), :, to - (hi - lo) : to] = old[slots.to(old.device), :, lo:hi]
            setattr(self, name, new)


@dataclass
class Row:
    """A slot's tenant. start: its first column."""

    request: Request
    how: Sampling
    start: int
    limit: int
    uniform: np.ndarray | None
    ids: list[int] = field(default_factory=list)

    def drawn(self) -> float:
        """Return the random number of its next token."""
        return 0.0 if self.uniform is None else self.uniform[len(self.ids)]


def choose(logits: Tensor, how: Sampling, uniform: Tensor, seen: Tensor | None) -> Tensor:
    """Return the next token of each row, (B,). logits (B, V); uniform (B,) in [0, 1); seen (B, V):
    tokens of the prompt and the answer so far.

    The filters come in the order of transformers: repetition penalty, temperature, top_k, top_p,
    min_p.
    """
    logits = logits.float()
    if seen is not None:
        logits = torch.where(
            seen,
            torch.where(
                logits > 0, logits / how.repetition_penalty, logits * how.repetition_penalty
            ),
            logits,
        )
    if not how.temperature:
        return logits.argmax(-1)
    logits = logits / how.temperature
    if not how.top_k and how.top_p >= 1 and not how.min_p:
        p, ids = logits.softmax(-1), None
    else:
        whole = logits.shape[-1]
        count = min(how.top_k, whole) if how.top_k else min(NUCLEUS, whole)
        values, ids = logits.topk(count)  # sorted, the largest first
        total = values.logsumexp(-1, True) if how.top_k else logits.logsumexp(-1, True)
        p = (values - total).exp()
        # where these are enough, no token beyond them could be drawn
        enough = (p.sum(-1) >= how.top_p) | (p[:, -1] < how.min_p * p[:, 0])
        if not how.top_k and not bool(enough.all()):
            values, ids = logits.sort(descending=True)
            p = (values - total).exp()
        # a top_p that is 0 in float32 would leave no token at all
        p = p * (
            (p.cumsum(-1) - p < max(how.top_p, torch.finfo(p.dtype).tiny))
            & (p >= how.min_p * p[:, :1])
        )
    mass = p.double().cumsum(-1)
    place = torch.searchsorted(
        mass, (uniform.double() * mass[:, -1])[:, None], right=True
    ).clamp_max(mass.shape[-1] - 1)
    return (place if ids is None else ids.gather(-1, place))[:, 0]


class InFlight:
    """The rows in work. Beside `rows`, a tenant or None for each slot, (slots,) tensors: last (the
    newest token), lengths (tokens in the cache), starts (first column); seen (slots, V): tokens of
    prompt and answer, once a repetition penalty has asked for them.
    """

    def __init__(self, module, how: Sampling, slots: int) -> None:
        self.module, self.how, self.slots, self.device = module, how, slots, module.device
        self.context = context_of(module) or 1 << 30
        self.rows: list[Row | None] = []
        self.layers: list[Slots] = []
        self.span, self.columns = [0, 0], 0  # [lo, hi] in use; how many the buffers have
        self.last, self.lengths, self.starts = (
            torch.zeros(0, dtype=torch.long, device=self.device) for _ in range(3)
        )
        self.seen: Tensor | None = None
        self.likely: dict[int, Likely] = {}  # of the newest tokens, by place

    def tenant(self, place: int) -> Row:
        row = self.rows[place]
        assert row is not None, place
        return row

    def alive(self) -> list[int]:
        return [place for place, row in enumerate(self.rows) if row]

    def choose(self, logits: Tensor, places: list[int], seen: Tensor | None) -> Tensor:
        """Return the next token of the rows in these places, (B,), each in its own way, and note in
        `likely` what is asked about it."""
        rows = [self.rows[place] for place in places]
        plain = logits
        for i, row in enumerate(rows):
            if row and len(row.ids) < row.how.min_tokens:
                logits = logits.clone() if logits is plain else logits
                logits[i, [end for end in row.how.stops if end < logits.shape[-1]]] = -torch.inf
        uniform = torch.tensor([row.drawn() if row else 0.0 for row in rows], device=self.device)
        ways = list(dict.fromkeys(row.how for row in rows if row)) or [self.how]
        if len(ways) == 1:
            chosen = choose(logits, ways[0], uniform, seen)
        else:
            chosen = torch.zeros(len(rows), dtype=torch.long, device=self.device)
            for how in ways:
                at = torch.tensor(
                    [i for i, row in enumerate(rows) if row and row.how == how], device=self.device
                )
                chosen[at] = choose(
                    logits[at], how, uniform[at], None if seen is None else seen[at]
                )
        self.likely = {}
        tops: dict[int, int] = {}  # how many likely tokens are asked for
        for i, row in enumerate(rows):
            if row and row.request.top is not None:
                tops[i] = row.request.top
        if asking := list(tops):
            logp = plain[asking].float().log_softmax(-1)
            values, ids = logp.topk(min(logp.shape[-1], max(tops.values())))
            own = logp.gather(1, chosen[asking, None])[:, 0].tolist()
            for i, one, *pair in zip(asking, own, ids.tolist(), values.tolist()):
                self.likely[places[i]] = Likely(one, list(zip(*pair))[: tops[i]])
        return chosen

    def remember(self, vocabulary: int) -> None:
        """Have `seen` say, from now on, which tokens each row has."""
        self.seen = torch.zeros((len(self.rows), vocabulary), dtype=torch.bool, device=self.device)
        for place in self.alive():
            row = self.tenant(place)
            self.seen[place, torch.tensor(row.request.ids + row.ids, device=self.device)] = True

    def arrange(self, keep: list[int], count: int, hi: int) -> None:
        """Build the buffers anew: the slots `keep` first, of `count`, ending at column `hi`, with
        room for more columns."""
        at = torch.tensor(keep, device=self.device, dtype=torch.long)
        self.columns = -(-(hi + 1) // ROOM) * ROOM
        for layer in self.layers:
            layer.move(at, (count, self.columns), self.span[0], self.span[1], hi)
        fresh, shift = count - len(keep), hi - self.span[1]

        def grow(old, value):
            return torch.cat([old[at], old.new_full((fresh, *old.shape[1:]), value)])

        self.last, self.lengths, self.starts = (
            grow(self.last, 0),
            grow(self.lengths, 1),
            grow(self.starts + shift, hi),
        )
        self.seen = None if self.seen is None else grow(self.seen, False)
        self.rows = [self.rows[place] for place in keep] + [None] * fresh
        for row in filter(None, self.rows):
            row.start += shift
        self.span[:] = [self.span[0] + shift, hi]

    def admit(self, new: list[Request]) -> list[tuple[int, int]]:
        """Run the prompts `new` and give them places. Return the first token of each: (place,
        id)."""
        logits, cache, mask = prefill(self.module, [request.tokens for request in new])
        free = self.make_room(len(new), mask.shape[1], cache)
        at, hi = torch.tensor(free, device=self.device), self.span[1]
        padding = ~mask[:, None, :, None]
        for layer, fresh in zip(self.layers, cache.layers):
            # zeros where nothing is: a masked column still takes part with weight 0, and 0 times
            # infinity would be NaN
            there = fresh.keys.device  # layers may lie on several cards
            places, hidden = at.to(there), padding.to(there)
            layer.keys[places, :, hi - mask.shape[1] : hi] = fresh.keys.masked_fill(hidden, 0)
            layer.values[places, :, hi - mask.shape[1] : hi] = fresh.values.masked_fill(hidden, 0)
        hows = [request.how or self.how for request in new]
        if self.seen is None and any(how.repetition_penalty != 1 for how in hows):
            self.remember(logits.shape[-1])
        for place, request, how in zip(free, new, hows):
            self.seat(place, request, how)
        chosen = self.choose(logits, free, None if self.seen is None else self.seen[at])
        self.last[at] = chosen
        if self.seen is not None:
            self.seen[at, chosen] = True
        return list(zip(free, chosen.tolist()))

    def make_room(self, count: int, width: int, cache: Any) -> list[int]:
        """Return free places for so many prompts of at most `width` tokens, whose cache is of the
        kind that the buffers are to have."""
        if not self.layers:
            self.layers = [
                Slots(self.span, layer.keys[:0], layer.values[:0]) for layer in cache.layers
            ]
        alive, hi = self.alive(), self.span[1]
        lo = self.span[0] = min((self.tenant(place).start for place in alive), default=hi)
        if len(alive) + count > len(self.rows) or width > hi:
            slots = max(len(alive) + count, min(self.slots, len(self.rows)))
            self.arrange(alive, slots, max(width, hi - lo))
        return [place for place, row in enumerate(self.rows) if row is None][:count]

    def seat(self, place: int, request: Request, how: Sampling) -> None:
        """Note whose place this is from now on."""
        start = self.span[1] - len(request.tokens)
        limit = min(request.max_new_tokens, self.context - len(request.ids))
        uniform = np.random.default_rng(request.seed).random(limit) if how.temperature else None
        self.rows[place] = Row(request, how, start, limit, uniform, [*request.written])
        self.lengths[place], self.starts[place] = len(request.tokens), start
        if self.seen is not None:
            self.seen[place] = False
            self.seen[place, torch.tensor(request.tokens, device=self.device)] = True

    def step(self) -> list[tuple[int, int]]:
        """Write one token of every row in work. Return them: (place, id)."""
        # rows that left for good are carried along until they are an eighth; then, and where the
        # buffer is full, it is built anew
        alive = self.alive()
        self.span[0] = min(self.tenant(place).start for place in alive)
        crowded = len(self.rows) - len(alive) > len(self.rows) // 8
        if crowded or self.span[1] == self.columns:
            keep = alive if crowded else list(range(len(self.rows)))
            self.arrange(keep, len(keep), self.span[1] - self.span[0])
            self.span[0] = 0
            alive = self.alive()
        lo, hi = self.span
        columns = torch.arange(lo, hi + 1, device=self.device)
        mask = columns >= self.starts[:, None]  # (slots, columns shown)
        cache: Any = DynamicCache()
        cache.layers = self.layers
        # rows that are done count on, past the last place where there is one
        places = self.lengths.clamp_max(self.context - 1)[:, None]
        logits = self.module(
            input_ids=self.last[:, None],
            attention_mask=mask.long(),
            position_ids=places,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        self.span[1] += 1
        self.lengths += 1
        self.last = self.choose(logits, list(range(len(self.rows))), self.seen)
        if self.seen is not None:
            self.seen[torch.arange(len(self.rows), device=self.device), self.last] = True
        chosen = self.last.tolist()
        return [(place, chosen[place]) for place in alive]


class Alone(InFlight):
    """One row in work, with whatever memory the model makes of it: states of Mamba, linear and
    chunked attention cannot be put in slots."""

    def __init__(self, module, how: Sampling) -> None:
        super().__init__(module, how, 1)
        self.memory: dict[str, Any] = {}
        self.takes = inspect.signature(type(module).forward).parameters

    def admit(self, new: list[Request]) -> list[tuple[int, int]]:
        [request] = new
        self.rows, self.seen, self.memory = [None], None, {}
        self.lengths, self.starts = (torch.zeros(1, dtype=torch.long) for _ in range(2))
        self.seat(0, request, request.how or self.how)
        return self.read(request.tokens)

    def step(self) -> list[tuple[int, int]]:
        return self.read([int(self.last)])

    def read(self, tokens: list[int]) -> list[tuple[int, int]]:
        """Run tokens behind those that are remembered, or behind all where nothing is; choose the
        next one."""
        row = self.tenant(0)
        if not MEMORIES & {*self.takes}:
            tokens = [*row.request.ids, *row.ids]
        end = len(row.request.ids) + len(row.ids)
        places = torch.arange(end - len(tokens), end, device=self.device)[None]
        options = {"position_ids": places, "logits_to_keep": 1, "use_cache": True}
        options = {name: value for name, value in options.items() if name in self.takes}
        ids = torch.tensor([tokens], device=self.device)
        made = self.module(input_ids=ids, **options, **self.memory)
        self.memory |= {name: made[name] for name in MEMORIES if made.get(name) is not None}
        if not self.memory and "past_key_values" in self.takes:  # filled, and not handed back
            config = self.module.config.get_text_config()
            self.memory["past_key_values"] = DynamicCache(config=config)
            return self.read(tokens)
        if row.how.repetition_penalty != 1:
            self.remember(made.logits.shape[-1])
        self.last = self.choose(made.logits[:, -1], [0], self.seen)
        return [(0, int(self.last))]


def in_flight(module, how: Sampling, slots: int) -> InFlight:
    """Return an empty batch for a model, of as many rows as its memory allows."""
    return Alone(module, how) if unknown_cache(module) else InFlight(module, how, slots)


@torch.inference_mode()
def generate(
    module,
    requests: Iterable[Request | None],
    how: Sampling,
    slots: int = 32,
    token: Callable[[Request, int, Likely | None], bool | None] | None = None,
    turn: AbstractContextManager | None = None,
    batch: InFlight | None = None,
) -> Iterator[Answer]:
    """Yield the answers to requests in the order in which they are finished; at most `slots` are in
    work.

    requests are read only as places fall free, neighbours best of like length (see `by_length`).
    One that is None says "none for now" (a server's queue): it is asked again after the next token;
    an iterable that has none while nothing is in work had better block. token(request, id, likely),
    if given, hears of every token as it is written; where it returns True, that answer ends there
    (finish: stop). turn is held during each pass of the model, and at no other time. batch: an
    empty one, for who wants to look at it meanwhile.
    """
    batch, waiting, more = batch or in_flight(module, how, slots), iter(requests), True
    slots = batch.slots
    while True:
        # --- waiting prompts take the free places, a few together: a pass costs as much for one row
        # as for several
        busy = len(batch.alive())
        new: list[Request] = []
        while (
            more
            and len(new) < slots - busy
            and (new or not busy or slots - busy >= max(1, slots // 16))
        ):
            try:
                request = next(waiting)
            except StopIteration:
                more = False
                break
            if request is None:
                break
            assert 0 < len(request.tokens) < batch.context, len(request.tokens)
            new.append(request)
        if not busy and not new:
            if more:
                continue
            return

        # --- one token for every row that has come, or for all
        with turn or nullcontext(), one_memory_error():
            written = batch.admit(new) if new else batch.step()
        for place, next_id in written:
            row = batch.tenant(place)
            finish = "stop" if next_id in row.how.stops else None
            if finish is None:
                row.ids.append(next_id)
                heard = token(row.request, next_id, batch.likely.get(place)) if token else None
                finish = "stop" if heard else "length" if len(row.ids) >= row.limit else None
            if finish:
                batch.rows[place] = None
                end = next_id if next_id in row.how.stops else None
                yield Answer(row.request, row.ids, finish, end, batch.likely.get(place))


def by_length(requests: Iterable[Request], window: int = 4096) -> Iterator[Request]:
    """Reorder requests so that neighbours are of like length, the longest first (what does not fit
    into memory shows at once), a window at a time."""
    pool: list[Request] = []
    for request in requests:
        pool.append(request)
        if len(pool) == window:
            yield from sorted(pool, key=lambda request: -len(request.ids))
            pool = []
    yield from sorted(pool, key=lambda request: -len(request.ids))


def drifted(first: dict[str, float], now: dict[str, float]) -> dict[str, str]:
    """Return what has gone wrong with the text that a student writes since it wrote the `first`: a
    line each, by name. Both are means over many answers, as meta.json's `student` has them:
    mean_tokens of an answer, ended (the share that did by itself), entropy (nats a token)."""
    found = {}
    (length, ended, entropy), (length_now, ended_now, entropy_now) = (
        [means[name] for name in ("mean_tokens", "ended", "entropy")] for means in (first, now)
    )
    more = length_now > length
    short, long = sorted((length, length_now))
    if long > LONGER * short and long > short + 1:
        found["length"] = (
            f"the student's answers {'grow' if more else 'shrink'}: {length_now:.1f} tokens on"
            f" average, {length:.1f} before"
        )
    if ended_now < FEWER_ENDS * ended and ended_now < ended - 0.1:
        found["ended"] = (
            f"the end of turn fades: {ended_now:.1%} of the student's answers end by themselves,"
            f" {ended:.1%} before"
        )
    if entropy_now < LESS_ENTROPY * entropy:
        found["entropy"] = (
            f"the student's entropy collapses: {entropy_now:.4f} nats a token where it writes,"
            f" {entropy:.4f} before"
        )
    return found
