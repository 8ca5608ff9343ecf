"""Classification as language: how likely a model finds each label as the answer to a prompt.

Contract: log p(label | prompt) is the sum over the label's tokens and the token that ends the turn,
each as training would have them as targets (`template.encode` of prompt and label together decides,
so the tokens at the border are those of training). With its end a label is a whole answer: labels
are disjoint events, "sport" is not favoured over "sportswear", and the sum over all labels is at
most 1.

Each prompt is run once; its labels read its cache. What a label gets does not depend on the batch,
up to the rounding of the kernels (1e-5).

Calibration (`calibrated`): a model may like a label before it has read anything.

    off      log p(label | prompt)
    length   the same divided by the label's tokens, its end among them: labels of many tokens are
             not punished
    prior    less log p(label | the prompt with "N/A" in the place of its content), which is what
             the prompt adds: arXiv:2102.09690 (content-free input, here subtracted from log p, not
             divided out of p and normalised: the same choice) and arXiv:2104.08315 (PMI)
"""

import copy
import json
import os
import re
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from lib import files, generate, template

CALIBRATIONS = ("off", "length", "prior")
EMPTY = "N/A"
MOST_LABELS = 200  # distinct references, beyond which they are no labels
# a label's tokens behind the prompt, and which of them are targets
Tail = tuple[list[int], list[bool]]


def names(text: str, references: Sequence[str], where: str) -> list[str]:
    """Return the labels of --labels: those listed, or with "auto" the set of the references,
    sorted."""
    found = (
        sorted(set(references))
        if text == "auto"
        else list(dict.fromkeys(name.strip() for name in text.split(",")))
    )
    if text == "auto" and len(found) > MOST_LABELS:
        files.fail(
            f"--labels auto: the references of {where} are no labels",
            f"{len(found)} distinct ones",
            f"at most {MOST_LABELS}",
            "the same command without --labels: answers are then written, not chosen",
        )
    return found


def encode_labels(
    tokenizer, messages: list[dict], labels: Sequence[str], end: bool = True
) -> tuple[list[int], list[Tail]]:
    """Return the prompt's tokens, and each label's that follow them. `end`: the token that ends the
    turn is one of them.

    Where a tokenizer joins a label's first characters with the prompt's last ones, what is prompt
    ends before that token.
    """
    rows = template.encode(
        tokenizer,
        [[*messages, {"role": "assistant", "content": label}] for label in labels],
        turns="last",
    )
    if refused := [(label, row) for label, row in zip(labels, rows) if isinstance(row, str)]:
        files.fail(
            f"the label {refused[0][0]!r} cannot be an answer here",
            refused[0][1],
            "labels that the chat template shows as they are",
        )
    first = min(int(np.flatnonzero(answer)[0]) for _, answer in rows)
    first = len(os.path.commonprefix([ids[:first].tolist() for ids, _ in rows]))
    special, tails = template.special_ids(tokenizer), []
    for ids, answer in rows:
        # a line break that the template writes behind the end of turn is no target
        stop = int(np.flatnonzero(answer)[-1]) + 1
        stop -= not end and int(ids[stop - 1]) in special
        tails.append((ids[first:stop].tolist(), answer[first:stop].tolist()))
    return rows[0][0][:first].tolist(), tails


def content_free(texts: Sequence[str]) -> str:
    """Return what is left of prompts without their content: "N/A" between the words that all of
    them begin and end with.

    Worked example: content_free(["Film: good. Mood?", "Film: a bore. Mood?"]) == "Film: N/A.
    Mood?".
    """
    if len(set(texts)) < 2:
        return EMPTY
    before = re.sub(r"[A-Za-z0-9\u00c0-\u024f]+$", "", os.path.commonprefix(texts))  # no half words
    rest = [text[len(before) :][::-1] for text in texts]
    return (
        before + EMPTY + re.sub(r"[A-Za-z0-9\u00c0-\u024f]+$", "", os.path.commonprefix(rest))[::-1]
    )


@torch.inference_mode()
def logp(module, encoded: Sequence[tuple[list[int], list[Tail]]], rows: int = 32) -> np.ndarray:
    """Return log p(label | prompt) in nats, (B, labels) float64, of B prompts as `encode_labels`
    returns them; labels are run so many `rows` at a time."""
    z, cache, mask = generate.prefill(module, [prompt for prompt, _ in encoded])
    z = z.float()
    # torch's own float32 log_softmax is 1.5e-5 off on the CPU at V = 49,152
    first = z - z.logsumexp(-1, keepdim=True)  # (B, V)
    found = np.zeros((len(encoded), len(encoded[0][1])))
    for b, (_, tails) in enumerate(encoded):
        found[b] = [first[b, ids[0]].item() if scored[0] else 0.0 for ids, scored in tails]
    step = max(1, rows // len(encoded))
    for start in range(0, found.shape[1], step):
        part = [tails[start : start + step] for _, tails in encoded]
        found[:, start : start + step] += rest_of_labels(module, part, cache, mask)
    return found


def rest_of_labels(module, tails: list[list[Tail]], cache: DynamicCache, mask: Tensor):
    """Return the sum of log p over the targets of some labels behind their first token, (B, some),
    which read the prompts' cache. mask (B, width): where that holds a token of the prompt."""
    flat = [tail for each in tails for tail in each]  # prompt by prompt
    several, device = len(flat) // len(tails), module.device
    more = max(len(ids) for ids, _ in flat) - 1
    if not more:
        return np.zeros((len(tails), several))

    def padded(values, fill):
        lines = [[*line, *[fill] * (more - len(line))] for line in values]
        return torch.tensor(lines, device=device)  # (B * some, more)

    given, wanted = (
        padded([ids[:-1] for ids, _ in flat], 0),
        padded([ids[1:] for ids, _ in flat], 0),
    )
    scored = padded([scored[1:] for _, scored in flat], False)
    own = copy.deepcopy(cache)
    own.batch_repeat_interleave(several)
    before = mask.long().repeat_interleave(several, 0)
    places = before.sum(1, keepdim=True) + torch.arange(more, device=device)
    limit = generate.context_of(module) or 1 << 30
    z = module(
        input_ids=given,
        # padding comes last: nothing before attends to it
        attention_mask=torch.cat([before, torch.ones_like(given)], 1),
        position_ids=places.clamp_max(limit - 1),
        past_key_values=own,
        use_cache=True,
    ).logits.float()
    each = z.gather(-1, wanted[..., None])[..., 0] - z.logsumexp(-1)
    return (each.double() * scored).sum(1).view(len(tails), several).cpu().numpy()


def priors(module, tokenizer, prompts: Sequence[list[dict]], labels: Sequence[str]) -> np.ndarray:
    """Return log p of the labels after each prompt without the content of its last message, (N,
    labels); equal ones are run once."""
    free, known, found = content_free([messages[-1]["content"] for messages in prompts]), {}, []
    for messages in prompts:
        asked = [*messages[:-1], {**messages[-1], "content": free}]
        key = json.dumps(asked)
        if key not in known:
            known[key] = logp(module, [encode_labels(tokenizer, asked, labels)])[0]
        found.append(known[key])
    return np.array(found)


def calibrated(
    found: np.ndarray,
    encoded: Sequence[tuple[list[int], list[Tail]]],
    how: str,
    prior: np.ndarray | None = None,
) -> np.ndarray:
    """Return what labels are chosen by, the largest, from `logp` (N, labels); `prior`: log p of the
    labels without content, (N, labels)."""
    if how == "length":
        return found / np.array([[sum(scored) for _, scored in tails] for _, tails in encoded])
    return found - prior if how == "prior" else found
