"""A training run's folder: what makes it resumable, what is logged, and the checkpoints it leaves.

    runs/NAME/STAGE/history.jsonl   one object a log line ("event": "eval" or "train"; stage 2
                                    begins with the "teacher" on val), times in seconds of training
                    last/           resume state: float32 weights, optimizer, counters; removed when
                                    the run is finished
                    best/ final/    ordinary Hugging Face checkpoints with tokenizer and model card
                                    (LoRA: last/ holds the adapter's alone, best/ and final/ are
                                    adapter folders, lib/options/lora.py)
                    samples.md      the same few prompts answered at each evaluation
                    curves.png      the history as a picture
                    tensorboard/ wandb/   the history once more, where --track asked for it
                                          (lib/options/track.py)
                    config.json     written last: arguments, versions, identities, git commit, final
                                    figures

Kill it anywhere and run the same command again: it goes on from last/, and the final weights are
those of a straight run, bit for bit (same device, same threads). Nothing random is kept over steps:
each step seeds its own randomness from (seed, step).
"""

import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from lib import files, models
from lib.options import lora, tags, track

MARKS = (
    "last",
    ".last.part",
    ".last.old",
    "history.jsonl",
    ".lock",
)  # and not config.json: any model has one
FREE = {
    "tag",
    "track",
    "device",
    "threads",
    "fresh",
    "log_every",
    "save_every",
    "verify",  # arguments that may differ when a run is continued;
    "tokens_per_microbatch",
    "checkpointing",
    "samples",
    "sample_tokens",
    "teacher_device",
    "teacher_offload",
}  # these change results by float32 rounding at most
ADDED = {
    "eval_only": False,
    "lora_rank": 0,
    "lora_alpha": 32.0,
    "lora_dropout": 0.0,
    "lora_targets": "all-linear",
    "merge": False,
    "patience": 0,
    "eval_sampling": False,
    "feature_weight": 0.0,
    "feature_layers": "last:last",
    "feature_loss": "mse",
    "attention_weight": 0.0,
    "attention_layers": "last:last",
    "contrastive_weight": 0.0,
    "contrastive_temperature": 0.1,
    "balance": "none",
    "balance_every": 10,
}
# arguments that older runs do not name, with what these runs did


class Interrupt:
    """SIGTERM and SIGINT as a flag that a loop looks at: save, then leave. A second signal leaves
    at once, and so does the first with `at_once`. `number`: the one that came, or 0. As a context
    it ends with its block."""

    def __init__(self, say: Callable[[str], None] = print, at_once: bool = False) -> None:
        self.number, self.say, self.at_once = 0, say, at_once
        self.before = {
            number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)
        }

    def __enter__(self) -> "Interrupt":
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame) -> None:
        if self.number or self.at_once:
            raise SystemExit(128 + number)
        self.number = number
        self.say(f"{signal.Signals(number).name}: saving, then leaving (once more: leave at once)")

    def leave(self, said: str) -> None:
        """End the program with the shell's code for the signal (143 or 130), if one came."""
        if self.number:
            self.say(said)
            raise SystemExit(128 + self.number)


class Run:
    """Open (or continue) the run in args.out. Attributes: step (where to start), updates (optimizer
    steps taken), best; more: what else a method needs to continue, as JSON."""

    def __init__(self, args, stage: str, identities: dict, best_by: str = "ce") -> None:
        self.args, self.stage, self.identities, self.best_by = args, stage, identities, best_by
        track.check(args.track)
        settings = {
            name: value for name, value in vars(args).items() if name not in FREE and name != "out"
        }
        self.settings = (
            json.loads(json.dumps(settings))
            | {"stage": stage}
            | {f"{name} identity": value for name, value in identities.items()}
        )
        if args.tag == tags.AUTO:
            args.out = str(
                tags.folder(
                    Path(args.out),
                    tags.method(args),
                    lambda settings: not self._differing(settings),
                    args.fresh,
                )
            )
        self.out = Path(args.out)
        finished = self.out / "config.json"
        if args.fresh:
            # what is there goes in `begin`, once everything that could be wrong has been looked at
            pass
        elif finished.exists():
            settings = files.read_json(finished).get("settings")
            if settings is None:
                files.fail(
                    f"{self.out} is no run of ours",
                    "a config.json without settings",
                    "a new folder, or a run's",
                    "another --out",
                )
            self._same(settings, "is finished")
            shutil.rmtree(
                self.out / "last", ignore_errors=True
            )  # a kill after config.json may have left it
            print(f"{stage}: {self.out} is already finished; nothing to do (--fresh starts anew)")
            raise SystemExit(0)
        if not args.fresh:
            self._open()
        (
            self.step,
            self.updates,
            self.best,
            self.resumed,
            self.trained_s,
            self.measures,
            self.more,
        ) = (0, 0, None, None, 0.0, {}, {})
        self.history = self.out / "history.jsonl"
        state = self.out / "last" / "state.json"
        self.state = files.read_json(state) if state.exists() and not args.fresh else None
        if self.state:
            self._same(self.state["settings"], "was started")
            for name in ("step", "updates", "best", "trained_s", "measures"):
                setattr(self, name, self.state[name])
            self.more = self.state.get("more", {})  # states of older versions have none
            self.resumed = self.step
            print(f"{stage}: continues {self.out} at step {self.step}")
        self.bar, self.recent, self.interrupt = None, [], Interrupt(self.say)

    def _open(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        self.lock = files.lock(self.out)
        for name in ("last", "best", "final"):
            files.recover(self.out / name)

    def begin(self) -> None:
        """Touch the disk for the first time: --fresh deletes, a continued run drops the lines it
        will log again, a new one all lines."""
        if self.args.fresh:
            files.remove_ours(self.out, MARKS)
            self._open()
        sizes = self.state["sizes"] if self.state else {}
        for name in ("history.jsonl", "samples.md"):
            if (path := self.out / name).exists():
                os.truncate(path, min(sizes.get(name, 0), path.stat().st_size))
        self.track, self.untrack = track.start(self)

    def _differing(self, settings: dict) -> list[str]:
        """Return what tells these settings from the run's own, each as `name seen (now wanted)`."""

        def short(value):
            return (
                value[:12] if isinstance(value, str) and len(value) == 64 else repr(value)
            )  # hashes

        settings = {
            name: value for name, value in ADDED.items() if name in self.settings
        } | settings
        return [
            f"{k} {short(settings.get(k))} (now {short(self.settings.get(k))})"
            for k in sorted({*settings, *self.settings} - FREE)
            if settings.get(k) != self.settings.get(k)
        ]

    def _same(self, settings: dict, how: str) -> None:
        if differing := self._differing(settings):
            files.fail(
                f"{self.out} {how} with other settings",
                "; ".join(differing),
                "the same command and inputs",
                "--fresh to start anew, or another --out",
            )

    def restore(
        self,
        module: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
    ) -> None:
        """Put the saved state, if there is one, into model, optimizer and scaler."""
        if not self.state:
            return
        folder, device = self.out / "last", next(module.parameters()).device
        saved = load_file(folder / "weights.safetensors")
        with torch.no_grad():
            for name, tensor in tensors(module).items():
                tensor.copy_(saved.pop(name))
        assert not saved, f"last/ holds tensors the model lacks: {list(saved)[:3]}"
        flat, state = load_file(folder / "optimizer.safetensors", device=str(device)), {}
        for name, tensor in flat.items():
            number, key = name.split(".", 1)
            state.setdefault(int(number), {})[key] = (
                tensor.cpu() if key == "step" and device.type == "cpu" else tensor
            )
        optimizer.load_state_dict(
            {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
        )
        if (
            self.state["scaler"] and scaler.is_enabled()
        ):  # one of them is empty where the run moved between CPU and CUDA
            scaler.load_state_dict(self.state["scaler"])

    def save(
        self,
        step: int,
        module: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        measures: dict,
    ) -> None:
        """Write last/: everything that continuing at `step` needs."""
        partial = files.partial_folder(self.out / "last")
        save_file(tensors(module), partial / "weights.safetensors")
        flat = {
            f"{number}.{key}": value
            for number, entry in optimizer.state_dict()["state"].items()
            for key, value in entry.items()
        }
        save_file(flat, partial / "optimizer.safetensors")
        sizes = {
            name: (self.out / name).stat().st_size
            for name in ("history.jsonl", "samples.md")
            if (self.out / name).exists()
        }
        files.write_json(
            partial / "state.json",
            {
                "step": step,
                "updates": self.updates,
                "best": self.best,
                "trained_s": self.trained_s,
                "measures": measures,
                "more": self.more,
                "sizes": sizes,
                "scaler": scaler.state_dict(),
                "settings": self.settings,
            },
        )
        files.publish(partial, self.out / "last")
        self.interrupt.leave(f"{self.stage}: saved at step {step}; the same command continues")

    @property
    def stopping(self) -> bool:
        return bool(self.interrupt.number)

    def log(self, event: str, step: int, **values) -> None:
        """Append one line to history.jsonl and print it: what is printed is what is stored, raw and
        not smoothed."""
        values = {
            name: float(f"{value:.7g}") if isinstance(value, float) else value
            for name, value in values.items()
        }
        with open(self.history, "a", encoding="utf-8") as log:
            log.write(
                json.dumps(
                    {"event": event, "step": step, **values, "time_s": round(self.trained_s, 3)}
                )
                + "\n"
            )
        self.track(event, step, values)
        self.say(
            f"{self.stage} {event} step {step}  "
            + "  ".join(
                f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items()
            )
        )

    def say(self, text: str) -> None:
        if self.bar:
            tqdm.write(text)
        else:
            print(text, flush=True)

    def progress(self, steps: int):
        """Return the progress bar of the loop; on anything but a terminal it stays silent and the
        log lines speak."""
        self.bar = (
            tqdm(total=steps, initial=self.step, desc=self.stage, unit="step", dynamic_ncols=True)
            if sys.stderr.isatty()
            else None
        )

    def tick(self, seconds: float, tokens: int) -> None:
        """Count one optimizer step's time and tokens, evaluation and saving apart."""
        self.trained_s += seconds
        self.recent = [*self.recent[-19:], (tokens, seconds)]
        if self.bar:
            self.bar.update()

    def pace(self, steps_left: int) -> dict:
        """Return tokens/s over the last steps (at most 20; the process's first one is left out once
        there are others), and seconds left."""
        recent = self.recent[1:] or self.recent
        tokens, seconds = (sum(values) for values in zip(*recent))
        return {
            "tok_per_s": round(tokens / seconds, 1),
            "left_s": round(seconds / len(recent) * steps_left, 1),
        }

    def check_finite(self, what: str, value: float, step: int, rows) -> None:
        """Stop the run at a loss or gradient that is not finite, before it reaches the weights:
        nothing after it could be right."""
        if not math.isfinite(value):
            seen = (
                f"{value} on rows {', '.join(map(str, rows[:8]))}{' ...' if len(rows) > 8 else ''}"
            )
            files.fail(
                f"the {what} of step {step} is not finite",
                seen,
                "a number",
                "a lower --lr, --amp off, or a look at these rows; the state before is in"
                f" {self.out}/last",
            )

    def is_better(self, measures: dict) -> bool:
        """Return whether these measures are the best so far by `best_by`, and remember them if
        so."""
        value = measures.get(self.best_by)
        if value is None:  # no val rows: the last one is the best one can say
            return True
        higher = self.best_by in ("acc1", "acc5", "agree", "macro_f1")
        better = self.best is None or (value > self.best if higher else value < self.best)
        self.best = value if better else self.best
        self.more["evaluations_without_better"] = (
            0 if better else self.more.get("evaluations_without_better", 0) + 1
        )
        return better

    @property
    def gives_up(self) -> bool:
        """Whether --patience is at its end: so many evaluations in a row brought nothing better."""
        return 0 < self.args.patience <= self.more.get("evaluations_without_better", 0)

    def export(self, name: str, model: models.Model, tokenizer, step: int, measures: dict) -> None:
        """Write best/ or final/ as an ordinary Hugging Face checkpoint with tokenizer and model
        card; of an adapter, its folder."""
        partial = files.partial_folder(self.out / name)
        dtype, adapter, base = (
            getattr(torch, self.args.save_dtype),
            lora.config_of(model.module),
            model.folder,
        )
        if adapter:
            base, inside = (
                adapter.base_model_name_or_path,
                (partial / "adapter" if self.args.merge else partial),
            )
            lora.save(model.module, tokenizer, inside, dtype, self.identities["student"])
        if not adapter or self.args.merge:
            export(model, tokenizer, partial, dtype)
        library = "peft" if adapter and not self.args.merge else "transformers"
        task = "text-generation" if model.module.can_generate() else "text-classification"
        rows = "\n".join(f"| {k} | {v:.4f} |" for k, v in measures.items() if isinstance(v, float))
        (partial / "README.md").write_text(
            f"---\nbase_model: {base}\nlibrary_name: {library}\npipeline_tag: {task}\ntags:"
            f" [distillation]\n---\n# {self.out.name}, {name} (step {step})\n\nMade by"
            f" `{' '.join(Path(a).name if i == 0 else a for i, a in enumerate(sys.argv))}`.\n\n| on"
            f" held-out targets | |\n| --- | --- |\n{rows}\n",
            encoding="utf-8",
        )
        files.publish(partial, self.out / name)

    def finish(self, steps: int, step: int, measures: dict, shares: dict) -> None:
        """Write config.json, which says that the run is complete, and drop the resume state. step:
        of `steps`, the one it ended at; shares: of the sources, where they were mixed."""
        from lib.measure import plots

        early = {}
        if step < steps:
            early = {
                "stopped_early": step,
                "stopped_because": (
                    f"{self.args.patience} evaluations in a row without a better {self.best_by}"
                ),
            }
            self.say(f"{self.stage}: stopped at step {step} of {steps}: {early['stopped_because']}")
        files.write_json(
            self.out / "config.json",
            {
                "settings": self.settings,
                "command": sys.argv,
                "steps": steps,
                **early,
                "updates": self.updates,
                "best": self.best,
                "best_by": self.best_by,
                "trained_s": self.trained_s,
                "final": measures,
                **({"shares": shares} if shares else {}),
                "versions": versions(),
                "git": git_commit(),
            },
        )
        plots.curves(self.history, self.out / "curves.png", self.stage)
        self.untrack()
        shutil.rmtree(self.out / "last", ignore_errors=True)
        if self.bar:
            self.bar.close()
            self.bar = None
        if shares:
            print(
                f"{self.stage}: realised shares of the run's tokens: "
                + "  ".join(f"{name} {share:.4f}" for name, share in shares.items())
            )


def tensors(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return a model's parameters and persistent buffers, each once (tied weights have one name),
    for saving or filling; with LoRA what is trained alone, for the rest is the student's own. (With
    losses beside the logits the module is a list: the model, and their projections.)
    """
    if any(map(lora.config_of, [module, *module.children()])):
        return {n: p.data for n, p in module.named_parameters() if p.requires_grad}
    keep = set(module.state_dict())
    return {n: p.data for n, p in module.named_parameters()} | {
        n: b for n, b in module.named_buffers() if n in keep
    }


def export(
    model: models.Model, tokenizer, folder: Path, dtype: torch.dtype = torch.float32
) -> None:
    """Save a model and its tokenizer so that plain `from_pretrained` reads them."""
    state = lora.merged(model.module) if lora.config_of(model.module) else model.module.state_dict()
    state = {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in state.items()
    }
    kept = model.module.config.dtype
    model.module.save_pretrained(folder, state_dict=state)
    model.module.config.dtype = dtype  # save_pretrained wrote down that of the weights in memory
    model.module.config.save_pretrained(folder)
    model.module.config.dtype = kept
    tokenizer.save_pretrained(folder)
    for_other_readers(folder)


def for_other_readers(folder: Path) -> None:
    """Write the positions' settings and the tokenizer's class as transformers 4 and mlx-lm read
    them too, beside what transformers 5 has saved.

    Where there is no `rope_theta` at the top of config.json they take their own default and say
    nothing: the model then writes other text.
    """
    config, tokens = (
        files.read_json(folder / "config.json"),
        files.read_json(folder / "tokenizer_config.json"),
    )
    rope = config.get("rope_parameters") or {}
    config |= {
        name: rope[name] for name in ("rope_theta", "partial_rotary_factor") if name in rope
    }  # absent where kinds of layers have their own
    if "rope_theta" in rope and rope.get("rope_type", "default") != "default":
        config["rope_scaling"] = rope
    files.write_json(folder / "config.json", config)
    if (
        tokens.get("tokenizer_class") == "TokenizersBackend"
    ):  # what transformers 5 calls it, which also knows the old name
        files.write_json(
            folder / "tokenizer_config.json",
            tokens | {"tokenizer_class": "PreTrainedTokenizerFast"},
        )


def versions() -> dict:
    import numpy
    import transformers

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": numpy.__version__,
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def git_commit() -> str | None:
    command = [
        "git",
        "-C",
        str(Path(__file__).parent),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=12",
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    return result.stdout.strip() or None


def clock(device: torch.device) -> float:
    """Return seconds, after the device's queued work is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
