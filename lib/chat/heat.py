"""A student beside its teacher at every token of an answer that stands already: how far apart they
are, and what each would have written.

Contract: both read the same answer, each after its own prompt, in one pass; their output layers are
cut to the tokens that both know, and logits are made a chunk of places at a time (lib/head.py).
KL(teacher || student) is over all these tokens, at T = 1, in nats.
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lib import files, generate, losses, models, template
from lib.chat.text import Text


@dataclass(frozen=True)
class ComparedToken:
    """A token of an answer. text: its piece of the answer's text; of a special token its name. kl:
    KL(teacher || student), nats. student, teacher: the tokens that each finds likeliest there, with
    their probabilities, the likeliest first. student_p, teacher_p: the token's own.
    """

    id: int
    text: str
    kl: float
    student: list[tuple[str, float]]
    teacher: list[tuple[str, float]]
    student_p: float
    teacher_p: float


@functools.lru_cache(maxsize=2)  # of the two that are served
def measured(module: nn.Module) -> models.Model:
    """Return the Model of a module; it takes four passes, and so is made once."""
    return models.as_model(module, None)


@generate.one_memory_error()
@torch.inference_mode()
def compare_tokens(
    student: nn.Module,
    teacher: nn.Module,
    tokenizer,
    prompt: list[int],
    answer: list[int],
    top: int = 5,
    teacher_prompt: list[int] | None = None,
) -> list[ComparedToken]:
    """Return a ComparedToken for every token of `answer`. prompt: the tokens before it;
    `teacher_prompt`, where the teacher's template writes others."""
    if not answer:
        return []
    mine, other = measured(student), measured(teacher)
    vocab = min(mine.vocab, other.vocab)
    if max(answer) >= vocab:
        files.fail(
            "the answer cannot be compared",
            f"token {max(answer)}",
            f"those that both models know, below {vocab}",
        )
    chunks = zip(
        mine.head(vocab).chunks(hidden(mine, prompt, answer)),
        other.head(vocab).chunks(hidden(other, teacher_prompt or prompt, answer)),
    )
    texts, word, found = token_texts(tokenizer, answer), namer(tokenizer), []
    # (n, V) each, of the same places: a chunk is as long as V lets it be
    for (part, z), (_, z_teacher) in chunks:
        logq, logp = logarithms(z), logarithms(z_teacher.to(z.device, z.dtype))
        # rounding leaves -1e-8 of two that are almost equal
        kls = losses.divergence(logp, logq, "fkl").clamp_min(0).tolist()
        here = torch.tensor(answer[part], device=z.device)[:, None]
        own = [logs.gather(1, here)[:, 0].exp().tolist() for logs in (logq, logp)]
        best = [top_tokens(logs, min(top, vocab), word) for logs in (logq, logp)]
        found += map(ComparedToken, answer[part], texts[part], kls, *best, *own)
    return found


@generate.one_memory_error()
@torch.inference_mode()
def likely_tokens(module: nn.Module, ids: list[int], top: int) -> list[generate.Likely | None]:
    """Return how likely a model finds each token of a text behind those before it; None for the
    first."""
    model = measured(module)
    found: list[generate.Likely | None] = [None]
    for part, z in model.head(model.vocab).chunks(hidden(model, ids[:1], ids[1:])):
        logp = logarithms(z)
        own = logp.gather(1, torch.tensor(ids[1:][part], device=z.device)[:, None])[:, 0].tolist()
        values, best = logp.topk(min(top, model.vocab))
        for one, *pair in zip(own, best.tolist(), values.tolist()):
            found.append(generate.Likely(one, list(zip(*pair))))
    return found


def top_tokens(logs: Tensor, count: int, word) -> list[list[tuple[str, float]]]:
    """Return the likeliest tokens of each row of log-probabilities (n, V), as (text, probability).
    word(token): its text."""
    values, indices = logs.topk(count)
    found = []
    for ids, chances in zip(indices.tolist(), values.exp().tolist()):
        found.append([(word(token), chance) for token, chance in zip(ids, chances)])
    return found


def hidden(model: models.Model, prompt: list[int], answer: list[int]) -> Tensor:
    """Return the last hidden states (N, D) from which the N tokens of the answer are predicted."""
    tokens = torch.tensor([prompt + answer[:-1]], device=model.device)
    return model.body(input_ids=tokens, use_cache=False).last_hidden_state[0, len(prompt) - 1 :]


def logarithms(z: Tensor) -> Tensor:
    """Return log-probabilities of logits (n, V), which are overwritten; torch's own float32
    log_softmax is 1.5e-5 off on the CPU at V = 49,152."""
    return z.sub_(z.logsumexp(1, keepdim=True))


def token_texts(tokenizer, ids: list[int]) -> list[str]:
    """Return what each token adds to the text; of a special token its name. Joined without special
    tokens they are the text of all.

    A character of several tokens is the last one's: token_texts("né" in bytes) == ["n", "", "é"].
    """
    special, text, found, last = template.special_ids(tokenizer), Text(tokenizer), [], None
    for place, token in enumerate(ids):
        piece = text.add(token)
        if token not in special:
            last = place
        elif piece:  # it ends a character that was never finished
            found[last] += piece
        found.append(tokenizer.convert_ids_to_tokens(token) if token in special else piece)
    if rest := text.end():
        found[last] += rest
    return found


def namer(tokenizer):
    """Return a function from a token to its text inside of a sentence: some tokenizers drop the
    blank of a first one, so it is read off a second."""
    special, decode, known = template.special_ids(tokenizer), tokenizer.decode, {}

    def word(token: int) -> str:
        if token not in known:
            known[token] = (
                tokenizer.convert_ids_to_tokens(token)
                if token in special
                else decode([token, token])[len(decode([token])) :]
            )
        return known[token]

    return word


def incomparable(student_tokenizer, teacher_tokenizer) -> str | None:
    """Return why the tokens of two tokenizers cannot be compared (the first that stands for
    something else), or None where they can."""
    one, two = (template.token_names(one) for one in (student_tokenizer, teacher_tokenizer))
    for number in template.named_apart(one, two):
        mine, theirs = (repr(v[number]) if number in v else "nothing" for v in (one, two))
        return (
            f"the teacher has other tokens than the student: number {number} is {theirs} to"
            f" it, {mine} to the student"
        )
    return None
