"""samples.md: the same few val prompts, answered greedily at every evaluation, so that learning can be read."""
from pathlib import Path

import numpy as np
import torch

from lib import data, models


@torch.no_grad()
def write(path: Path, model: models.Model, split: data.Split, tokenizer, step: int, count: int, max_new_tokens: int,
          amp: torch.dtype | None = None) -> None:
    """Append the answers of the first `count` val prompts to a Markdown file."""
    training = model.module.training
    model.module.eval()
    with open(path, "a", encoding="utf-8") as out, torch.autocast(model.device.type, amp, enabled=amp is not None):
        for row in range(min(count, len(split.rows))):
            ids, answer = split.row(row)
            first = int(np.flatnonzero(answer)[0])
            prompt = torch.from_numpy(ids[:first].astype(np.int64))[None].to(model.device)
            made = model.module.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=max_new_tokens,
                                         pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id)
            show = lambda part: tokenizer.decode(part, skip_special_tokens=True).strip()
            if step == 0:
                out.write(f"## Prompt {row + 1}\n\n{show(ids[:first])}\n\nreference:\n\n    " + show(ids[answer]).replace("\n", "\n    ") + "\n\n")
            out.write(f"### Step {step}, prompt {row + 1}\n\n    " + show(made[0, first:].cpu()).replace("\n", "\n    ") + "\n\n")
    model.module.train(training)
