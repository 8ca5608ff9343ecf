"""A training run's folder: what makes it resumable, what is logged, and the checkpoints it leaves.

    runs/NAME/STAGE/history.jsonl   one object a log line ("event": "eval" or "train"; stage 2 also
                                    "teacher", its own measures), times in seconds of training; a
                                    number that is not finite is printed and not in it
                    last/           resume state: float32 weights, optimizer, counters; removed when
                                    the run is finished
                    keep/step-400/  with --keep N: the newest N states (hard links, where the disk
                                    has them), to go back to: one takes the place of last/, and
                                    config.json goes
                    best/ final/    ordinary Hugging Face checkpoints with tokenizer and model card
                                    (of an adapter: its folder, lib/checkpoints.py)
                    samples.md      the same few prompts answered at each evaluation
                    curves.png      the history as a picture
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
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from lib import checkpoints, files, models
from lib.head import is_divided

# that a folder is a run's; not config.json, which any model has
MARKS = ("last", ".last.part", ".last.old", "history.jsonl", files.LOCK)
GROWING = ("history.jsonl", "samples.md")  # cut back to their size at the last saved step
RESUME_STATE = {  # of last/state.json
    "step": range(1 << 62),
    "updates": range(1 << 62),
    "best": (None, files.is_number),
    "trained_s": float,
    "measures": dict,
    "more": dict,
    "sizes": {...: range(1 << 62)},
    "scaler": dict,
    "settings": dict,
}
START_ANEW = "--fresh to start anew"
MOST_SKIPPED = 20  # optimizer steps in a row that fp16's scaler may skip
MORE_IS_BETTER = ("acc1", "acc5", "agree", "macro_f1")  # of the measures; of all others less


class Listener(Protocol):
    """What hears of every log line, beside history.jsonl."""

    def line(self, event: str, step: int, values: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


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


def run_settings(args, stage: str, identities: dict[str, Any]) -> dict[str, Any]:
    """Return what must be the same when a run is continued: its flags, but those marked `free`
    (lib/flags.py), and the hashes of what it reads."""
    settings = {name: value for name, value in vars(args).items() if name not in args.free}
    hashes = {f"{name} identity": value for name, value in identities.items()}
    return json.loads(json.dumps(settings)) | {"stage": stage} | hashes


def differing_settings(seen: dict[str, Any], wanted: dict[str, Any], args) -> list[str]:
    """Return what tells a run's settings from those wanted now, each as `name seen (now wanted)`.
    A setting that an older run lacks had its flag's default."""

    def short(value):
        is_hash = isinstance(value, str) and len(value) == 64
        return value[:12] if is_hash else repr(value)

    seen = {name: args.defaults[name] for name in wanted if name in args.defaults} | seen
    # a path whose contents have an identity may be another; of others the spelling
    content = {"logits": "records identity"}
    found = []
    for name in sorted({*seen, *wanted} - args.free):
        then, now = seen.get(name), wanted.get(name)
        by_content = content.get(name, f"{name} identity")
        known = then and now and seen.get(by_content) and wanted.get(by_content)
        if not known and not files.same(then, now):
            found.append(f"{name} {short(then)} (now {short(now)})")
    return found


class Run:
    """Open (or continue) the run in args.out. Attributes: step (where to start), updates (optimizer
    steps taken), best; more: what else a method needs to continue, as JSON, changed in place."""

    def __init__(self, args, stage: str, identities: dict[str, Any], best_by: str = "ce") -> None:
        self.args, self.stage, self.identities, self.best_by = args, stage, identities, best_by
        self.settings = run_settings(args, stage, identities)
        self.out = Path(args.out)
        self.history = self.out / "history.jsonl"
        self.step, self.updates, self.trained_s = 0, 0, 0.0
        self.best: float | None = None
        self.resumed: int | None = None  # the step that this process began at, if not at the first
        self.measures: dict[str, Any] = {}
        self.more: dict[str, Any] = {}
        self.state: dict[str, Any] | None = None
        self.bar: tqdm | None = None
        self.steps = self.ticks = 0
        self.said_at = time.monotonic()
        self.recent: list[tuple[int, float]] = []  # (tokens, seconds) of the last steps
        self.listeners: list[Listener] = []
        self.read_back = False  # whether a saved checkpoint has been loaded again
        if args.fresh:  # what is there goes in `begin`, once all else has been looked at
            files.refuse_foreign(self.out, MARKS)
        else:
            self._leave_if_finished()
        if not args.dry_run:
            self._hold()
        if not args.fresh:
            self._continue()
        self.interrupt = self._listen()

    def _listen(self) -> Interrupt:
        return Interrupt(self.say)

    def _hold(self) -> None:
        """Keep other processes away, and put right what a kill has left."""
        self.lock = files.lock(self.out)
        if not self.args.fresh:
            self._leave_if_finished()  # by another process, before we held it
            self._recover()

    def _leave_if_finished(self) -> None:
        finished = self.out / "config.json"
        if not finished.exists():
            return
        settings = files.read_json(finished).get("settings")
        if not isinstance(settings, dict):
            files.fail(
                f"{self.out} is no run of ours",
                "a config.json without settings",
                "a new folder, or a run's",
                "another --out",
            )
        self._same(settings, "is finished")
        if not self.args.dry_run:  # a kill after config.json may have left it
            shutil.rmtree(self.out / "last", ignore_errors=True)
        print(f"{self.stage}: {self.out} is already finished; nothing to do (--fresh starts anew)")
        raise SystemExit(0)

    def _recover(self) -> None:
        emptied = {path.name[1:-5] for path in self.out.glob(".*.part")}  # by a --fresh, killed
        for name in {"last", "best", "final"} | emptied:
            files.recover(self.out / name)

    def _continue(self) -> None:
        state = self.out / "last" / "state.json"
        if not state.exists():
            return
        self.state = files.read_json(state, START_ANEW, RESUME_STATE)
        if not files.check(state.parent, self.state, True, START_ANEW):
            files.say_none(state.parent)
        before = self.state.get("checksums", {}).get("../history.jsonl")
        if before and self.history.exists() and (seen := files.damage(self.history, before, True)):
            mend = "the file as it was, or delete it: the run goes on without its lines"
            files.fail(f"{self.history} is damaged above the last saved step", seen, mend=mend)
        self._same(self.state["settings"], "was started")
        for name in ("step", "updates", "best", "trained_s", "measures", "more"):
            setattr(self, name, self.state[name])
        self.resumed = self.step
        print(f"{self.stage}: continues {self.out} at step {self.step}")

    def _same(self, settings: dict[str, Any], how: str) -> None:
        if differ := differing_settings(settings, self.settings, self.args):
            files.fail(
                f"{self.out} {how} with other settings",
                "; ".join(differ),
                "the same command and inputs",
                "--fresh to start anew, or another --out",
            )

    def begin(self, model: models.Model, tokenizer) -> None:
        """Touch the disk for the first time: --fresh deletes, a continued run drops the lines it
        will log again, a new one all lines. Then best/ is written once without weights, and
        dropped: what cannot be saved is known before the first evaluation, which may take hours."""
        if self.args.fresh:
            files.remove_ours(self.out, MARKS)
            self._recover()
        sizes = self.state["sizes"] if self.state else {}
        for name in GROWING:
            if (path := self.out / name).exists():
                os.truncate(path, min(sizes.get(name, 0), path.stat().st_size))
        partial = files.partial_folder(self.out / "best")
        checkpoints.save(model.module, tokenizer, partial, weights=False)
        shutil.rmtree(partial)

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
        own, flat = tensors(module), {}
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if any(map(is_divided, own.values())) or not (folder / "weights.safetensors").exists():
            flat = read_divided(folder, own, parameters)
        else:
            shapes = {name: tensor.shape for name, tensor in own.items()}
            saved = read_tensors(folder / "weights.safetensors", shapes)
            with torch.no_grad():
                for name, tensor in own.items():
                    tensor.copy_(saved.pop(name))
            shapes = {}
            for n, p in enumerate(parameters):
                moments = {f"{n}.exp_avg": p.shape, f"{n}.exp_avg_sq": p.shape}
                shapes |= moments | {f"{n}.step": torch.Size()}
            flat = read_tensors(folder / "optimizer.safetensors", shapes, str(device), some=True)
        state: dict[int, dict[str, torch.Tensor]] = {}
        for name, tensor in flat.items():
            number, key = name.split(".", 1)
            state.setdefault(int(number), {})[key] = (
                tensor.cpu() if key == "step" and device.type == "cpu" else tensor
            )
        optimizer.load_state_dict(
            {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
        )
        # one of them is empty where the run moved between CPU and CUDA
        if self.state["scaler"] and scaler.is_enabled():
            scaler.load_state_dict(self.state["scaler"])

    @files.telling("saving last/")
    def save(
        self,
        step: int,
        module: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        measures: dict,
    ) -> None:
        """Write last/: everything that continuing at `step` needs."""
        partial = self._write_tensors(module, optimizer)
        grown = [path for name in GROWING if (path := self.out / name).exists()]
        for path in grown:  # a state after a power cut must not know more of them than there is
            files.sync(path)
        sizes = {path.name: path.stat().st_size for path in grown}
        checksums = files.checksums(partial)
        if "history.jsonl" in sizes:
            size = sizes["history.jsonl"]
            grows = files.sums(self.history, size=size) | {"grows": True}
            checksums["../history.jsonl"] = grows
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
                "checksums": checksums,
            },
        )
        if self.args.keep:
            self._keep(partial, step)
        files.publish(partial, self.out / "last")
        self.interrupt.leave(f"{self.stage}: saved at step {step}; the same command continues")

    def _write_tensors(self, module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Path:
        """Write weights and optimizer into a folder that will be last/, and return it."""
        partial = files.partial_folder(self.out / "last")
        save_file(tensors(module), partial / "weights.safetensors")
        save_file(moments_of(optimizer), partial / "optimizer.safetensors")
        return partial

    def _keep(self, state: Path, step: int) -> None:
        """Keep a finished resume state, and of those before it the newest. Later ones are of a past
        that we came back from."""
        kept = self.out / files.KEPT
        shutil.rmtree(kept / ".new", ignore_errors=True)  # what a kill left
        shutil.copytree(state, kept / ".new", copy_function=files.link)
        named = [path.name.removeprefix("step-") for path in kept.glob("step-*")]
        numbers = {int(name) for name in named if name.isdecimal()}
        before = sorted((n for n in numbers if n < step), reverse=True)
        for number in numbers - {*before[: self.args.keep - 1]}:
            shutil.rmtree(kept / f"step-{number}")
        os.replace(kept / ".new", kept / f"step-{step}")

    def page(self, name: str) -> Path:
        """Return where a file that grows beside the log is written."""
        return self.out / name

    @property
    def stopping(self) -> bool:
        return bool(self.interrupt.number)

    def log(self, event: str, step: int, **values: Any) -> None:
        """Append one line to history.jsonl and print it: what is printed is what is stored, raw and
        not smoothed."""
        values = {
            name: float(f"{value:.7g}") if isinstance(value, float) else value
            for name, value in values.items()
        }
        # JSON has no NaN, and no infinity
        there = {k: v for k, v in values.items() if not isinstance(v, float) or math.isfinite(v)}
        line = {"event": event, "step": step, **there, "time_s": round(self.trained_s, 3)}
        with open(self.history, "a", encoding="utf-8") as log:
            log.write(json.dumps(line, allow_nan=False) + "\n")
        for listener in self.listeners:
            listener.line(event, step, there)
        said = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())
        self.say(f"{self.stage} {event} step {step}  " + "  ".join(said))

    def say(self, text: str) -> None:
        self.said_at = time.monotonic()
        if self.bar:
            tqdm.write(text)
        else:
            print(text, flush=True)

    def progress(self, steps: int) -> None:
        """Show the progress bar of the loop; on anything but a terminal the log lines speak, and
        where they are far between, a line on stderr."""
        self.steps, self.ticks = steps, 0
        if sys.stderr.isatty():
            self.bar = tqdm(
                total=steps, initial=self.step, desc=self.stage, unit="step", dynamic_ncols=True
            )

    def tick(self, seconds: float, tokens: int) -> None:
        """Count one optimizer step's time and tokens, evaluation and saving apart."""
        self.trained_s += seconds
        self.recent = [*self.recent[-19:], (tokens, seconds)]
        self.ticks += 1
        if self.bar:
            self.bar.update()
        elif time.monotonic() - self.said_at > files.TOLD_EVERY_S:
            self.said_at = time.monotonic()
            told = f"{self.stage}: {self.step + self.ticks} of {self.steps} steps"
            print(told, file=sys.stderr, flush=True)

    def pace(self, steps_left: int) -> dict:
        """Return tokens/s over the last steps (at most 20; the process's first one is left out once
        there are others), and seconds left."""
        recent = self.recent[1:] or self.recent
        tokens, seconds = sum(t for t, _ in recent), sum(s for _, s in recent)
        return {
            "tok_per_s": round(tokens / seconds, 1),
            "left_s": round(seconds / len(recent) * steps_left, 1),
        }

    def check_finite(self, step: int, rows: Sequence[int], **values: float) -> None:
        """Stop the run at a loss or gradient that is not finite, before it reaches the weights:
        nothing after it could be right."""
        for name, value in values.items():
            if not math.isfinite(value):
                some = ", ".join(map(str, rows[:8])) + " ..." * (len(rows) > 8)
                files.fail(
                    f"the {name} of step {step} is not finite",
                    f"{value} on rows {some}",
                    "a number",
                    "a lower --lr, --amp off, or a look at these rows; the state before is in"
                    f" {self.out}/last",
                )

    def count(self, step: int, taken: bool) -> None:
        """Count an optimizer step, taken or skipped by fp16's scaler; MOST_SKIPPED in a row end the
        run."""
        self.updates += taken
        if taken:
            self.more.pop("skipped_in_a_row", None)
            return
        self.more["skipped_in_a_row"] = skipped = self.more.get("skipped_in_a_row", 0) + 1
        if skipped >= MOST_SKIPPED:
            files.fail(
                f"{self.stage} has skipped {skipped} optimizer steps in a row, up to step {step}",
                "a gradient that is not finite in float16, however small the loss is scaled",
                "steps that change the weights",
                "--amp bf16 or off, or a look at the student's weights; the state before is in"
                f" {self.out}/last, if one was saved",
            )

    def is_better(self, measures: dict) -> bool:
        """Return whether these measures are the best so far by `best_by`, and remember them if
        so."""
        value = measures.get(self.best_by)
        if value is None:  # no val rows: the last one is the best one can say
            return True
        if self.best is None:
            better = True
        else:
            better = value > self.best if self.best_by in MORE_IS_BETTER else value < self.best
        if better:
            self.best = value
        failed = self.more.get("evaluations_without_better", 0)
        self.more["evaluations_without_better"] = 0 if better else failed + 1
        return better

    @property
    def gives_up(self) -> bool:
        """Whether --patience is at its end: so many evaluations in a row brought nothing better."""
        return 0 < self.args.patience <= self.more.get("evaluations_without_better", 0)

    @files.telling("writing a checkpoint")
    def export(
        self,
        name: str,
        model: models.Model,
        tokenizer,
        step: int,
        measures: dict[str, Any],
        merge: bool = False,
    ) -> None:
        """Write best/ or final/ as an ordinary Hugging Face checkpoint with tokenizer and model
        card; of an adapter its folder, or, to `merge`, the whole weights with it inside."""
        partial = files.partial_folder(self.out / name)
        dtype, adapter = getattr(torch, self.args.save_dtype), checkpoints.adapter_of(model.module)
        base, library = model.folder, "transformers"
        if adapter:
            base = adapter.base_model_name_or_path
            inside = partial / "adapter" if merge else partial
            student = self.identities["student"]
            state = checkpoints.save_adapter(model.module, tokenizer, inside, dtype, student)
            checkpoints.same_weights(inside, state)
            if not self.read_back:
                checkpoints.check_adapter_saved(model.module, inside)
        if not adapter or merge:
            state = checkpoints.save(model.module, tokenizer, partial, dtype)
            # every one bit for bit; loaded again the first of this process, for all others have its
            # names, and each one where transformers writes other names than those in memory
            if not checkpoints.same_weights(partial, state) or not self.read_back:
                amp = models.pick_amp(self.args.amp, model.device)
                checkpoints.check_saved(model.module, partial, amp, dtype)
            del state
        else:
            library = "peft"
        self.read_back = True
        task = "text-generation" if model.module.can_generate() else "text-classification"
        command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
        rows = "\n".join(f"| {k} | {v:.4f} |" for k, v in measures.items() if isinstance(v, float))
        files.write_text(
            partial / "README.md",
            f"---\nbase_model: {base}\nlibrary_name: {library}\npipeline_tag: {task}\n"
            f"tags: [distillation]\n---\n# {self.out.name}, {name} (step {step})\n\n"
            f"Made by `{command}`.\n\n| on held-out targets | |\n| --- | --- |\n{rows}\n",
        )
        checkpoints.write_checksums(partial)
        files.publish(partial, self.out / name)

    def finish(self, steps: int, step: int, measures: dict[str, Any], shares: dict) -> None:
        """Write config.json, which says that the run is complete, and drop the resume state. step:
        of `steps`, the one it ended at; shares: of the sources, where they were mixed."""
        config = {
            "settings": self.settings,
            "command": sys.argv,
            "steps": steps,
            "updates": self.updates,
            "best": self.best,
            "best_by": self.best_by,
            "trained_s": self.trained_s,
            "final": measures,
            "versions": versions(),
            "git": git_commit(),
        }
        if step < steps:
            because = f"{self.args.patience} evaluations in a row without a better {self.best_by}"
            config |= {"stopped_early": step, "stopped_because": because}
            self.say(f"{self.stage}: stopped at step {step} of {steps}: {because}")
        if skipped := step - self.updates:
            said = f"{skipped} of {step} steps were skipped: their gradient overflowed float16"
            if not self.updates:
                files.fail(
                    f"{self.out} has learnt nothing",
                    said,
                    "steps that change the weights",
                    "--amp bf16 or off, or more --steps; and --fresh",
                )
            config["skipped"] = skipped
            self.say(f"{self.stage}: {said}")
        if shares:
            config["shares"] = shares
        if "packed" in self.more:
            config["packed"] = self.more["packed"]
        there = [self.history] if self.history.exists() else []
        config["checksums"] = {path.name: files.sums(path) for path in there}
        files.write_json(self.out / "config.json", config)
        for listener in self.listeners:
            listener.close()
        shutil.rmtree(self.out / "last", ignore_errors=True)
        if self.bar:
            self.bar.close()
            self.bar = None
        if shares:
            said = "  ".join(f"{name} {share:.4f}" for name, share in shares.items())
            print(f"{self.stage}: realised shares of the run's tokens: {said}")


def tensors(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return a model's parameters and persistent buffers, each once (tied weights have one name),
    for saving or filling; where an adapter is trained, what is trained alone, for the rest is the
    student's own. (With losses beside the logits the module is a list: the model, and their
    projections.)
    """
    named = dict(module.named_parameters())
    if any(map(checkpoints.adapter_of, [module, *module.children()])):
        return {name: p.data for name, p in named.items() if p.requires_grad}
    there = set(module.state_dict())
    buffers = {name: b for name, b in module.named_buffers() if name in there}
    return {name: p.data for name, p in named.items()} | buffers


def moments_of(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Return an optimizer's state, by each parameter's number and what it is: 3.exp_avg."""
    flat: dict[str, torch.Tensor] = {}
    for number, entry in optimizer.state_dict()["state"].items():
        flat |= {f"{number}.{key}": value for key, value in entry.items()}
    return flat


def read_divided(
    folder: Path, own: dict[str, torch.Tensor], parameters: list[torch.nn.Parameter]
) -> dict[str, torch.Tensor]:
    """Fill a model's tensors, whole or divided, from what processes have written, each its part, or
    one alone; return what there is of the optimizer's (`moments_of`), by the `parameters`' order.
    """
    from torch.distributed import checkpoint, is_initialized

    reader = checkpoint.HuggingFaceStorageReader(str(folder))  # safetensors: no pickle
    try:
        there = reader.read_metadata().state_dict_metadata
        wanted = dict(own)
        for n, p in enumerate(parameters):
            moments = {name: torch.zeros_like(p.data) for name in ("exp_avg", "exp_avg_sq")}
            moments["step"] = torch.zeros(())
            wanted |= {f"{n}.{k}": t for k, t in moments.items() if f"{n}.{k}" in there}
        seen = {name: tuple(getattr(one, "size", ())) for name, one in there.items()}
        if seen != {name: tuple(tensor.shape) for name, tensor in wanted.items()}:
            other = sorted({*seen} ^ {*wanted}) or ["another shape"]
            files.fail(f"{folder} does not fit the model", other[0], mend=START_ANEW)
        with warnings.catch_warnings():  # that one process loads what several have written
            warnings.simplefilter("ignore", UserWarning)
            checkpoint.load(wanted, storage_reader=reader, no_dist=not is_initialized())
    except (OSError, SafetensorError, ValueError, checkpoint.CheckpointException) as broken:
        files.fail(f"{folder} cannot be read", broken, mend=START_ANEW)
    return {name: tensor for name, tensor in wanted.items() if name not in own}


def read_tensors(
    path: Path, wanted: dict[str, torch.Size], device: str = "cpu", some: bool = False
) -> dict[str, torch.Tensor]:
    """Return the tensors of a safetensors file, refused where they are not those `wanted`, by name
    and shape (`some`: not all of them may be there)."""
    try:
        with safe_open(path, "pt", device=device) as file:
            seen = {name: torch.Size(file.get_slice(name).get_shape()) for name in file.keys()}
            missing = [] if some else [name for name in wanted if name not in seen]
            other = [name for name in seen if seen[name] != wanted.get(name)] + missing
            if not other:
                return {name: file.get_tensor(name) for name in seen}
    except (OSError, SafetensorError, ValueError, OverflowError) as broken:
        files.fail(f"{path} cannot be read", broken, mend=START_ANEW)
    name = other[0]
    shapes = [tuple(one[name]) if name in one else "none" for one in (seen, wanted)]
    files.fail(f"{path} does not fit the model", f"{name} {shapes[0]}", shapes[1], START_ANEW)


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
    command = "git describe --always --dirty --abbrev=12".split()
    here = Path(__file__).parent
    if shutil.which("git") is None:
        return None
    result = subprocess.run(command, cwd=here, capture_output=True, text=True)
    return result.stdout.strip() or None


def clock(device: torch.device) -> float:
    """Return seconds, after the device's queued work is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
