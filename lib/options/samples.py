"""samples.md: the same few val prompts, answered greedily at every evaluation, so that learning can
be read."""

from pathlib import Path

import numpy as np
import torch

from lib import data, generate, models


@torch.no_grad()
def answers(
    model: models.Model,
    split: data.Split,
    tokenizer,
    count: int,
    max_new_tokens: int,
    amp: torch.dtype | None = None,
) -> list[str]:
    """Return a model's greedy answers to the first `count` prompts."""
    training, made = model.module.training, []
    model.module.eval()
    pad = generate.pad_token(model.module.generation_config, tokenizer)
    with torch.autocast(model.device.type, amp, enabled=amp is not None):
        for row in range(min(count, len(split.rows))):
            ids, answer = split.row(row)
            prompt = torch.from_numpy(ids[: int(np.flatnonzero(answer)[0])].astype(np.int64))[
                None
            ].to(model.device)
            written = model.module.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                do_sample=False,
                max_new_tokens=max_new_tokens,
                pad_token_id=pad,
            )
            made.append(
                tokenizer.decode(
                    written[0, prompt.shape[1] :].cpu(), skip_special_tokens=True
                ).strip()
            )
    model.module.train(training)
    return made


def write(
    path: Path,
    model: models.Model,
    split: data.Split,
    tokenizer,
    step: int,
    count: int,
    max_new_tokens: int,
    amp: torch.dtype | None = None,
    teacher: list[str] | None = None,
) -> None:
    """Append the answers of the first `count` val prompts to a Markdown file; beside each the
    `teacher`'s, if given."""

    def block(text):
        return "    " + text.replace("\n", "\n    ") + "\n\n"

    with open(path, "a", encoding="utf-8") as out:
        for row, said in enumerate(answers(model, split, tokenizer, count, max_new_tokens, amp)):
            ids, answer = split.row(row)
            if step == 0:
                parts = ids[: int(np.flatnonzero(answer)[0])], ids[answer]
                asked, reference = (
                    tokenizer.decode(part, skip_special_tokens=True).strip() for part in parts
                )
                out.write(f"## Prompt {row + 1}\n\n{asked}\n\nreference:\n\n{block(reference)}")
            out.write(f"### Step {step}, prompt {row + 1}\n\n{block(said)}")
            if teacher:
                out.write(f"teacher:\n\n{block(teacher[row])}")
