"""The tokens of a teacher whose tokenizer is another one, in the student's ids.

Tokens are one where they stand for the same bytes ("Ġthe" of a byte-level BPE, "▁the" of
SentencePiece), and special tokens where they have one role: end of turn, begin and end of text,
padding. `Translated` is such a teacher: its output layer in the order of the student's ids. A token
that only the student knows has no mass there; what only the teacher knows is no token of it, but
its mass counts among the rest's (`Translated.others`).
"""

import json
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from lib import models, template
from lib.head import Head

BYTE = {  # of the letters that byte-level BPE writes bytes as (GPT-2, encoder.py), the bytes
    chr(letter): byte
    for byte, letter in zip(
        [*range(33, 127), *range(161, 173), *range(174, 256), *range(33), *range(127, 161), 173],
        [*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324)],
    )
}
SPECIAL_ROLES = ("bos_token", "eos_token", "pad_token", "unk_token")  # beside the end of turn


def bytes_of(tokenizer) -> dict[int, bytes]:
    """Return what each token but special ones stands for, by id.

    bytes_of(GPT-2's)[262] == b" the"; of SentencePiece b" the" of "▁the", b"\\n" of "<0x0A>".
    """
    kinds = json.dumps(json.loads(tokenizer.backend_tokenizer.to_str()).get("decoder"))
    added, found = tokenizer.added_tokens_decoder, {}
    for name, number in tokenizer.get_vocab().items():
        if number in added:
            if not added[number].special:
                found[number] = name.encode()
        elif '"ByteLevel"' in kinds and all(letter in BYTE for letter in name):
            found[number] = bytes(BYTE[letter] for letter in name)
        elif '"ByteFallback"' in kinds and len(name) == 6 and name.startswith("<0x"):
            found[number] = bytes([int(name[3:5], 16)])
        else:
            found[number] = name.replace("\u2581", " ").encode()
    return found


@dataclass(frozen=True)
class Table:
    """theirs (V,): of each of the student's ids the teacher's, -1 where it has none. ours: of the
    teacher's ids the student's. roles: which special tokens were paired, by name."""

    theirs: np.ndarray
    ours: dict[int, int]
    roles: dict[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def lacking(self) -> np.ndarray:
        """The student's ids that the teacher has no token for."""
        return np.flatnonzero(self.theirs < 0)


def end_of_turn(tokenizer) -> int | None:
    """Return the token that ends an answer in the chat template, None where it is not one token,
    or there is no template."""
    if not tokenizer.chat_template:
        return None
    *_, end = template.marks(tokenizer, str(tokenizer.chat_template))
    ids = tokenizer(end, add_special_tokens=False, verbose=False)["input_ids"]
    return ids[0] if len(ids) == 1 else None


def shared(student, teacher, vocab: int) -> Table:
    """Return which tokens of two tokenizers are one, for the student's ids below `vocab`. Of
    several tokens of the same bytes the first counts."""
    theirs, ours = np.full(vocab, -1), {}
    by_bytes: dict[bytes, int] = {}
    for number, meant in sorted(bytes_of(teacher).items()):
        by_bytes.setdefault(meant, number)

    def pair(mine: int, other: int) -> bool:
        if mine >= vocab or theirs[mine] >= 0 or other in ours:
            return False
        theirs[mine], ours[other] = other, mine
        return True

    roles = {}
    pairs = {"end of turn": (end_of_turn(student), end_of_turn(teacher))}
    for role in SPECIAL_ROLES:
        pairs[role] = tuple(getattr(one, f"{role}_id") for one in (student, teacher))
    known, names = template.token_names(student), template.token_names(teacher)
    same = {names[number]: number for number in template.special_ids(teacher)}
    for role, (mine, other) in pairs.items():
        if mine is not None and other is not None and pair(mine, other):
            roles[role] = mine, other
    for number in sorted(template.special_ids(student)):
        name = known[number]
        if name in same and pair(number, same[name]):
            roles[name] = number, same[name]
    for number, meant in sorted(bytes_of(student).items()):
        if meant in by_bytes:
            pair(number, by_bytes[meant])
    return Table(theirs, ours, roles)


def table_said(found: Table, student, teacher) -> list[str]:
    """Return in words what was mapped."""
    ours, theirs = template.token_names(student), template.token_names(teacher)
    both, missing = len(found.ours), len(found.lacking)
    lines = [
        f"vocabulary: {both:,} tokens are one to both; {missing:,} only the student knows,"
        f" {len(theirs) - both:,} only the teacher"
    ]
    for role, (mine, other) in found.roles.items():
        if ours[mine] != theirs[other]:
            lines.append(f"vocabulary: {role}: {theirs[other]} is the student's {ours[mine]}")
    return lines


@dataclass(frozen=True)
class Translated(models.Model):
    """A teacher in the student's ids, of which it has `weight` (V, D) and `bias` (V,), zeros where
    it has no token. lacking (n,): these; `others`: the layer of the tokens that only it knows, None
    without; label (its own ids,): our id, or -1 - i for the i-th of the others."""

    weight: torch.Tensor = field(kw_only=True)
    bias: torch.Tensor | None = field(kw_only=True)
    lacking: tuple[int, ...] = field(kw_only=True)
    others: Head | None = field(kw_only=True)
    label: torch.Tensor = field(kw_only=True)

    @property
    def vocab(self) -> int:
        return len(self.weight)

    def head(self, vocab: int | None = None) -> Head:
        vocab = vocab or self.limit or self.vocab
        none = sorted(id for id in {*self.lacking, *self.apart} if id < vocab)
        ids = torch.tensor(none, device=self.weight.device) if none else None
        return Head(self.weight, self.bias, vocab, self.scale, self.softcap, ids)


@torch.no_grad()
def translated(teacher: models.Model, found: Table) -> Translated:
    """Return a teacher in the student's ids."""
    own = teacher.head(teacher.vocab)
    place = torch.from_numpy(found.theirs).to(own.weight.device)
    there, at = place >= 0, place.clamp_min(0)

    def ordered(rows: torch.Tensor) -> torch.Tensor:
        return rows.detach()[at].masked_fill_(~there.view(-1, *[1] * (rows.dim() - 1)), 0.0)

    only = torch.ones(own.vocab, dtype=torch.bool, device=place.device)
    only[place[there]] = False
    label, others = -only.long().cumsum(0), None
    label[place[there]] = torch.arange(len(place), device=place.device)[there]
    if only.any():
        bias = None if own.bias is None else own.bias.detach()[only]
        others = replace(own, weight=own.weight.detach()[only], bias=bias, vocab=int(only.sum()))
    fields = {name: getattr(teacher, name) for name in models.Model.__dataclass_fields__}
    return Translated(
        **fields,
        weight=ordered(own.weight),
        bias=None if own.bias is None else ordered(own.bias),
        lacking=tuple(found.lacking.tolist()),
        others=others,
        label=label,
    )
