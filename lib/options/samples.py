"""samples.md: the same few val prompts, answered greedily at every evaluation, so that learning can
be read."""

import argparse
from pathlib import Path

import numpy as np
import torch

from lib import data, files, flags, generate, models


def add_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("samples of what it writes (samples.md)")
    flags.option(
        group,
        "--samples",
        type=int,
        default=3,
        metavar="N",
        help="val prompts answered at each evaluation; 0 = off (default: %(default)s)",
        free=True,
    )
    flags.option(
        group,
        "--sample-tokens",
        type=int,
        default=64,
        metavar="N",
        help="longest sample (default: %(default)s)",
        free=True,
    )


def check_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    flags.not_negative(parser, args, "samples", "sample_tokens")


class Samples:
    """The first --samples prompts of val, and what a live teacher answers to them."""

    def __init__(self, args, dataset: data.Dataset, tokenizer) -> None:
        self.split, self.tokenizer, self.longest = dataset.val, tokenizer, args.sample_tokens
        self.asked, self.count = args.samples, min(args.samples, len(self.split.rows))
        self.of_teacher: list[str] = []

    def hear(self, teacher: models.Model | None) -> None:
        """Let a live teacher answer, once for all evaluations."""
        self.of_teacher = self.answers(teacher) if teacher else []

    def prompt(self, row: int) -> np.ndarray:
        """Return the token ids of a row before its first target."""
        ids, answer = self.split.row(row)
        return ids[: int(np.flatnonzero(answer)[0])]

    def text(self, ids) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()

    @torch.no_grad()
    @files.telling("writing --samples answers")
    def answers(self, model: models.Model, amp: torch.dtype | None = None) -> list[str]:
        """Return a model's greedy answers."""
        training, made = model.module.training, []
        model.module.eval()
        pad = generate.pad_token(model.module.generation_config, self.tokenizer, model.vocab)
        with torch.autocast(model.device.type, amp, enabled=amp is not None):
            for row in range(self.count):
                prompt = torch.from_numpy(self.prompt(row).astype(np.int64))[None]
                prompt = prompt.to(model.device)
                written = model.module.generate(
                    prompt,
                    attention_mask=torch.ones_like(prompt),
                    do_sample=False,
                    max_new_tokens=self.longest,
                    pad_token_id=pad,
                )
                made.append(self.text(written[0, prompt.shape[1] :].cpu()))
        model.module.train(training)
        return made

    def write(
        self, path: Path, model: models.Model, step: int, amp: torch.dtype | None = None
    ) -> None:
        """Append the answers of a model to a Markdown file, beside each the teacher's, if there
        is one; at step 0 the prompts and references first."""
        if not self.asked:
            return
        with open(path, "a", encoding="utf-8") as out:
            for row, said in enumerate(self.answers(model, amp)):
                if step == 0:
                    ids, answer = self.split.row(row)
                    asked, reference = self.text(self.prompt(row)), self.text(ids[answer])
                    out.write(f"## Prompt {row + 1}\n\n{asked}\n\n")
                    out.write(f"reference:\n\n{indented(reference)}")
                out.write(f"### Step {step}, prompt {row + 1}\n\n{indented(said)}")
                if self.of_teacher:
                    out.write(f"teacher:\n\n{indented(self.of_teacher[row])}")


def indented(text: str) -> str:
    """Return a text as Markdown's block of code."""
    return "    " + text.replace("\n", "\n    ") + "\n\n"
