"""What is the student's own text worth? From one start, equal steps on text that was given, that
the teacher wrote and that the student wrote, on disk and live; measured on the same held-out rows.

    # after `make demo SEED=0`, and 1, and 2; the same command continues what was killed
    python bench/onpolicy/evidence.py --setting demo --seeds 0 1 2 --out out/onpolicy
    # real/ holds smollm2 and stdlib.parquet (docs/real-models.md)
    python bench/onpolicy/evidence.py --setting smollm2 --real real --out out/onpolicy
    # the same in small, for the harness alone: the figures mean nothing
    python bench/onpolicy/evidence.py --setting demo --seeds 0 --out out/smoke --smoke

Runs the five scripts, a process each, and reads what they leave. Everything of a seed lies in
OUT/SETTING/SEED: logs/ (each command, and all that it said), steps/ (one file a finished command,
which is not run again), conditions/ (one file a condition: measures and cost), and data, records
and runs, these without their weights once they are measured. A command that was killed is run
anew, but for answers, which are kept as they are written. Writes, after each seed, --results for
evidence_tables.py: all conditions under OUT/SETTING, beside the seeds that it has from elsewhere
(another machine's; a seed is compared with itself alone).
"""

import argparse
import os
import random
import re
import resource
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
from lib import files  # noqa: E402

# {demo}: demo, or demo-SEED; {real}: --real; {out}: of this seed. smoke: what --smoke puts instead
SETTINGS = {
    "demo": {
        "source": "{demo}/student.parquet",
        "tokenizer": "{demo}/tokenizer",
        "prepare": "--val data/{demo}",  # what the start was not trained on, whatever the seed
        "teacher": "runs/{demo}/teacher",
        "start": "runs/{demo}/stage2",
        "heal": "",  # `make demo` made the start
        "train": "--tokens-per-step 1024 --lr 3e-3 --beta2 0.99 --weight-decay 0.01 --warmup 0.05"
        " --no-pack",
        "dump": "",
        "steps": 1000,
        "generations": 6,
        "longest": 80,
        "write": "--teacher-batch 512",
        "score": "exact",
        "batch": 250,
        "smoke": {"prepare": "--val 12 --limit 40", "steps": 4, "generations": 2, "longest": 60},
    },
    "smollm2": {
        "source": "{out}/source.parquet",
        "tokenizer": "{real}/smollm2",
        "prepare": "--val 24 --limit 84 --max-len 160",
        "teacher": "{real}/smollm2",
        "start": "{out}/start/stage2",
        "heal": "--keep-layers 0,1,2,4,5,6,8,9,10,12,13,14,16,17,18,20,21,22,24,25,26,28,29",
        "train": "--tokens-per-step 512 --tokens-per-microbatch 512 --lr 3e-4 --warmup 0.1",
        "dump": "--tail-rank 128 --tail-bytes 64 --tokens-per-microbatch 512",
        "steps": 24,
        "generations": 2,
        "longest": 64,
        "write": "",
        "score": "rougeL",
        "batch": 24,
        "smoke": {
            "prepare": "--val 2 --limit 6 --max-len 96",
            "steps": 1,
            "longest": 8,
            "dump": "--tail-rank 0",
        },
    },
}
SMOKED = ("given", "half", "live-1")  # of --smoke, unless --only says otherwise: each way once
SAMPLED = "--teacher-temperature 1 --teacher-top-p 1"


@dataclass
class Text:
    """A data folder and the teacher's records of it; what they have cost so far."""

    data: Path
    logits: Path | None = None
    cost: dict[str, float] = field(default_factory=dict)


def added(*costs: dict) -> dict:
    """Return the sum of costs: added({"a": 1}, {"a": 2, "b": 3}) == {"a": 3, "b": 3}."""
    return {name: sum(cost.get(name, 0) for cost in costs) for cost in costs for name in cost}


def equal_cost(prompts: int, generations: int, ratio: float) -> tuple[int, int]:
    """Return how many prompts to have answered how often by a writer that costs `ratio` times as
    much a token: equal_cost(800, 4, 7.1) == (451, 1)."""
    answers = max(1, round(prompts * generations / ratio))
    often = -(-answers // prompts)
    return round(answers / often), often


def last_rate(log: str, what: str) -> float:
    """Return the last number before `what` in a log, without commas."""
    found = re.findall(rf"([\d,.]+) {re.escape(what)}", log)
    assert found, f"no {what!r} in the log"
    return float(found[-1].replace(",", ""))


class Steps:
    """The finished commands of one folder: a command runs once."""

    def __init__(self, out: Path, env: dict[str, str] | None = None) -> None:
        self.out, self.env = out, env
        for name in ("steps", "logs", "conditions"):
            (out / name).mkdir(parents=True, exist_ok=True)

    def log(self, name: str) -> Path:
        return self.out / "logs" / f"{name}.log"

    def run(self, name: str, script: str, *words: object) -> None:
        """Run a script unless it has ended well before; note the seconds that it took."""
        record, log = self.out / "steps" / f"{name}.json", self.log(name)
        command = [script, *map(str, words)]
        if record.exists():
            seen = files.read_json(record)
            if seen["command"] != command:
                files.fail(
                    f"{record} was made by another command",
                    shlex.join(seen["command"]),
                    shlex.join(command),
                    "another --out, or delete it and what it made",
                )
            return
        again = ["--fresh"] if log.exists() else []
        print(f"{self.out.parent.name} {self.out.name} {name}", flush=True)
        started, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
        with open(log, "a") as told:
            told.write(f"$ {shlex.join([*command, *again])}\n")
            told.flush()
            ran = [sys.executable, str(ROOT / script), *command[1:], *again]
            code = subprocess.run(ran, cwd=ROOT, stdout=told, stderr=told, env=self.env).returncode
        if code:
            tail = log.read_text(errors="replace").splitlines()[-3:]
            files.fail(f"{script} ended with {code}", " / ".join(tail), "0", f"a look at {log}")
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds = {"time_s": time.monotonic() - started, "cpu_s": used.ru_utime + used.ru_stime}
        seconds["cpu_s"] -= before.ru_utime + before.ru_stime
        files.write_json(record, {"command": command, **seconds, "checksums": {}})

    def keep(self, name: str, make) -> dict:
        """Return the condition that is kept by this name, else what `make()` gives, kept."""
        path = self.out / "conditions" / f"{name}.json"
        if not path.exists():
            files.write_json(path, make() | {"checksums": {}})
        return files.read_json(path)


class Seed:
    """All conditions of one setting and one seed, each made when it is asked for."""

    def __init__(self, setting: dict, seed: int, steps: Steps, real: str) -> None:
        places = {
            "demo": f"demo-{seed}" if seed else "demo",
            "real": os.path.abspath(real),
            "out": str(steps.out),
        }
        self.s = {k: v.format(**places) if isinstance(v, str) else v for k, v in setting.items()}
        self.seed, self.steps, self.out, self.real = seed, steps, steps.out, places["real"]
        self.teacher, self.start = self.s["teacher"], self.s["start"]
        self.runs: list[Path] = []  # of the condition that is being made
        self.train_flags = f"{self.s['train']} --seed {seed} --log-every 1 --samples 0".split()

    # --- text

    def begin(self) -> None:
        """Prepare the given rows, and the start where `make demo` has not made it."""
        if self.s["heal"]:
            shuffled(Path(self.real, "stdlib.parquet"), Path(self.s["source"]), self.seed)
        for needed in (self.s["source"], self.teacher, *([] if self.s["heal"] else [self.start])):
            if not (ROOT / needed).exists():
                files.fail(f"{needed} is missing", mend=f"make demo SEED={self.seed}, or --real")
        rows = self.out / "rows"
        sources = [f"given={self.s['source']}"]
        flags = [*self.s["prepare"].split(), "--export", rows]
        self.given = self.text("given", sources, *flags)
        self.prompts = prompts_of(rows / "train.parquet")
        self.held_prompts = prompts_of(rows / "validation.parquet")
        if self.s["heal"]:
            words = ["--data", self.given.data, *self.train_flags, "--steps", self.s["steps"]]
            first, second = self.out / "start/stage1", self.out / "start/stage2"
            words += ["--eval-every", self.s["steps"]]
            layers = ["--student", self.teacher, *self.s["heal"].split()]
            self.steps.run("start-stage1", "stage1_sft.py", *words, *layers, "--out", first)
            logits = ["--student", first, "--logits", self.given.logits]
            self.steps.run("start-stage2", "stage2_kd.py", *words, *logits, "--out", second)
        # a folder of val rows alone is refused: one prompt of train stands beside them
        asked = self.asked("held", self.held_prompts + self.prompts[:1])
        flags = [*self.writer("student", self.start), "--val", self.given.data]
        self.held = self.prepared("held", [f"own={asked}"], *flags)

    def prepared(self, name: str, sources: list[str], *flags: object) -> Text:
        """Return a prepared folder, and what its answers cost to write, if any were."""
        folder = self.out / f"{name}-data"
        words = ["--tokenizer", self.s["tokenizer"], "--out", folder, "--seed", self.seed]
        self.steps.run(f"{name}-data", "prepare_data.py", "--source", *sources, *words, *flags)
        text = Text(folder)
        if parts := sorted(folder.glob("answers/*/part-*.parquet")):
            tokens = sum(
                sum(pq.read_table(part, columns=["answer_tokens"])["answer_tokens"].to_pylist())
                for part in parts
            )
            rate = last_rate(self.steps.log(f"{name}-data").read_text(), "tokens/s")
            text.cost = {"written_tokens": tokens, "write_s": tokens / rate}
        return text

    def text(self, name: str, sources: list[str], *flags: object) -> Text:
        """Return a prepared folder with the teacher's records."""
        text = self.prepared(name, sources, *flags)
        text.logits = self.out / f"{name}-logits"
        words = ["--data", text.data, "--teacher", self.teacher, "--out", text.logits]
        words += self.s["dump"].split()
        self.steps.run(f"{name}-dump", "dump_logits.py", *words)
        there = [text.logits, *text.logits.glob("chunk-*")]  # without val's
        size = sum(path.stat().st_size for at in there for path in at.iterdir() if path.is_file())
        meta = files.read_json(text.data / "meta.json")
        targets = meta["targets"]["train"]
        log = self.steps.log(f"{name}-dump").read_text()
        fit_s = sum(map(float, re.findall(r"fitted to [\d,]+ targets in (\d+) s", log)[-1:]))
        # a single batch is not timed
        read_s = targets / last_rate(log, "targets/s") if "targets/s" in log else 0.0
        cost = {"dump_s": read_s + fit_s, "record_bytes": size, "rows": meta["rows"]["train"]}
        text.cost = added(text.cost, cost)
        return text

    def asked(self, name: str, prompts: list[str]) -> Path:
        """Return a file of prompts without answers."""
        path = self.out / f"{name}.parquet"
        if not path.exists():
            write_parquet(path, pa.table({"instruction": prompts}))
        return path

    def writer(self, who: str, model: object, generations: int = 1) -> list[str]:
        """Return the flags by which a model answers, at T = 1."""
        words = ["--answers", who, f"--{who}", str(model), "--generations", str(generations)]
        words += ["--max-new-tokens", str(self.s["longest"]), *self.s["write"].split()]
        return words + (SAMPLED.split() + ["--keep-truncated"] if who == "teacher" else [])

    def written(
        self, name: str, who: str, model: object, prompts: list[str], generations: int
    ) -> Text:
        """Return text that a model wrote to train prompts, with the teacher's records."""
        asked, flags = self.asked(name, prompts), self.writer(who, model, generations)
        return self.text(name, [f"{who}={asked}"], *flags, "--val", 0)

    def own(self) -> Text:
        return self.written("own", "student", self.start, self.prompts, self.s["generations"])

    def by_teacher(self) -> Text:
        often = self.s["generations"]
        return self.written("by-teacher", "teacher", self.teacher, self.prompts, often)

    def both(self, name: str, **parts: object) -> Text:
        """Return the text of several sources, files or what a model wrote, with records of its
        own."""
        sources, writing = [], []
        for source, part in parts.items():
            if isinstance(part, Text):
                writing.append({k: part.cost[k] for k in ("written_tokens", "write_s")})
                part = part.data / "answers"
            sources.append(f"{source}={part}")
        text = self.text(name, sources, "--val", 0)
        text.cost = added(text.cost, *writing)
        return text

    # --- training and measures

    def trained(self, name: str, text: Text, student: object, *flags: object) -> Path:
        """Train from `student` on a text, alpha 1 and T = 1; return the run's folder. The measured
        checkpoint is final/: nothing is chosen by the held-out rows."""
        out = self.out / f"{name}-run"
        words = ["--data", text.data, "--student", student, "--out", out, *self.train_flags]
        words += ["--alpha", 1, "--temperature", 1, *flags]
        if "--teacher" not in flags:
            words += ["--logits", text.logits]
        if "--steps" not in flags:
            words += ["--steps", self.s["steps"]]
        words += ["--eval-every", self.s["steps"]]
        self.steps.run(f"{name}-train", "stage2_kd.py", *words)
        self.runs.append(out)
        return out

    def cost_of_run(self, run: Path) -> dict:
        return {"train_s": files.read_json(run / "config.json")["trained_s"]}

    def measured(self, name: str, student: object) -> dict:
        """Return the measures of a checkpoint on the held-out rows, against the teacher itself."""
        out, found = self.out / f"{name}-eval", {}
        for text, data in (("given", self.given.data), ("own", self.held.data)):
            words = ["--data", data, "--teacher", self.teacher, "--student", student]
            words += ["--out", out / text, "--eval-only"]
            self.steps.run(f"{name}-eval-{text}", "stage2_kd.py", *words)
            measures = files.read_json(out / text / "eval.json")
            found |= {f"kl_{text}": measures["kl"], f"rkl_{text}": measures["rkl"]}
        answers = out / "answers.jsonl"
        words = ["--ckpt", student, "--score", self.given.data, "--metrics", self.s["score"]]
        words += ["--max-new-tokens", self.s["longest"], "--batch-size", self.s["batch"]]
        self.steps.run(f"{name}-score", "chat.py", *words, "--out", answers)
        scores = files.read_json(answers.with_suffix(".scores.json"))["metrics"]
        found["score"] = scores[self.s["score"]]["value"]
        return found | {"parameters": measures["parameters"]}

    def offline(self, name: str, text: Text, *flags: object) -> dict:
        run = self.trained(name, text, self.start, *flags)
        cost = added(text.cost, self.cost_of_run(run))
        return {"measures": self.measured(name, run / "final"), "cost": cost}

    def live(self, name: str, share: float, *flags: object) -> dict:
        """Train beside the live teacher, that share of the rows answered anew at each step."""
        words = ["--teacher", self.teacher, "--on-policy", share]
        words += ["--max-new-tokens", self.s["longest"], *flags]
        run = self.trained(name, self.given, self.start, *words)
        history = files.read_jsonl(run / "history.jsonl")
        meta = files.read_json(self.given.data / "meta.json")
        mean_length = meta["tokens"]["train"] / meta["rows"]["train"]
        settings = files.read_json(run / "config.json")["settings"]
        answers = share * settings["tokens_per_step"] / mean_length  # a step, in the mean
        tokens = sum(line.get("own_tokens", 0) * answers for line in history)
        cost = self.cost_of_run(run) | {"written_tokens": round(tokens)}
        return {"measures": self.measured(name, run / "final"), "cost": cost}

    def rounds(self) -> dict:
        """Train in two rounds, each of half the steps on half as many answers, the second round's
        written by the student of the first."""
        student, cost, half = self.start, {}, max(1, self.s["steps"] // 2)
        for number in (1, 2):
            often = max(1, self.s["generations"] // 2)
            text = self.written(f"round{number}", "student", student, self.prompts, often)
            run = self.trained(f"round{number}", text, student, "--steps", half)
            student, cost = run / "final", added(cost, text.cost, self.cost_of_run(run))
        return {"measures": self.measured("rounds", student), "cost": cost}

    def cheap(self) -> Text:
        """Return answers by the teacher whose writing costs as much as the student's: by the ratio
        of parameters, which is that of FLOPs a token."""
        size = {who: self.condition(who)["measures"]["parameters"] for who in ("teacher", "start")}
        ratio = size["teacher"] / size["start"]
        count, often = equal_cost(len(self.prompts), self.s["generations"], ratio)
        return self.written("cheap", "teacher", self.teacher, self.prompts[:count], often)

    def wider(self, who: str, model: str) -> Text:
        """Return text to as many prompts as (c) has answers, each answered once: as many tokens.
        All but the given prompts are new, none of them held out anywhere."""
        count = len(self.prompts) * (self.s["generations"] - 1)
        taken = {*self.prompts, *self.held_prompts}
        if self.s["heal"]:
            there = prompts_of(Path(self.s["source"]))
        else:
            there = prompts_of((ROOT / self.s["source"]).with_name("prompts.parquet"))
        new = [prompt for prompt in dict.fromkeys(there) if prompt not in taken][:count]
        assert len(new) == count, (len(new), count)
        return self.written(f"wider-{who}", who, model, self.prompts + new, 1)

    def condition(self, name: str) -> dict:
        """Return what CONDITIONS says by this name, made once."""
        _, make = CONDITIONS[name]
        kept = self.steps.keep(name, lambda: make(self))
        while self.runs:  # measured: of SmolLM2 1 GB a run
            run = self.runs.pop()
            for weights in ("best", "final"):
                shutil.rmtree(run / weights, ignore_errors=True)
        return kept


def half(seed: Seed, name: str, divergence: str) -> dict:
    text = seed.both("half", given=seed.out / "rows/train.parquet", own=seed.own())
    return seed.offline(name, text, "--mix", "given:0.5 own:0.5", "--divergence", divergence)


def pair(seed: Seed) -> dict:
    text = seed.both("pair", teacher=seed.by_teacher(), own=seed.own())
    return seed.offline("pair", text, "--divergence", "teacher:skl own:srkl")


def untrained(name: str, student: str):
    return lambda seed: {"measures": seed.measured(name, getattr(seed, student)), "cost": {}}


# name: what the tables call it, and how it is made
CONDITIONS = {
    "teacher": ("the teacher", untrained("teacher", "teacher")),
    "start": ("the start: stage 2's student", untrained("start", "start")),
    "given": ("(a) given answers, fkl", lambda s: s.offline("given", s.given)),
    "by-teacher": (
        "(b) the teacher's answers, as many as (c), fkl",
        lambda s: s.offline("by-teacher", s.by_teacher()),
    ),
    "cheap": (
        "(b') the teacher's answers, at the cost of (c)'s, fkl",
        lambda s: s.offline("cheap", s.cheap()),
    ),
    "own-fkl": ("(c) own text, fkl", lambda s: s.offline("own-fkl", s.own())),
    "own-rkl": (
        "(c) own text, rkl",
        lambda s: s.offline("own-rkl", s.own(), "--divergence", "rkl"),
    ),
    "own-jsd": (
        "(c) own text, jsd",
        lambda s: s.offline("own-jsd", s.own(), "--divergence", "jsd"),
    ),
    "pair": ("(c) teacher's text skl, own text srkl", pair),
    "half": ("(d) half given, half own, fkl", lambda s: half(s, "half", "fkl")),
    "half-rkl": (
        "(d) half given fkl, half own rkl",
        lambda s: half(s, "half-rkl", "given:fkl own:rkl"),
    ),
    "rounds": ("(e) own text in two rounds, fkl", lambda s: s.rounds()),
    "live-half": ("(f) live, half own, fkl", lambda s: s.live("live-half", 0.5)),
    "live-1": ("(f) live, all own, fkl", lambda s: s.live("live-1", 1)),
    "wider": (
        "(g) own text, prompts without answers added, fkl",
        lambda s: s.offline("wider", s.wider("student", s.start)),
    ),
    "wider-teacher": (
        "(g') the teacher's answers to the same prompts, fkl",
        lambda s: s.offline("wider-teacher", s.wider("teacher", s.teacher)),
    ),
}


# --- rows


def write_parquet(path: Path, table: pa.Table) -> None:
    partial = path.with_name(path.name + ".part")
    pq.write_table(table, partial)
    os.replace(partial, path)


def prompts_of(path: Path) -> list[str]:
    """Return the prompts of a file of instructions, or of conversations as --export writes them."""
    table = pq.read_table(path)
    if "instruction" in table.column_names:
        return table["instruction"].to_pylist()
    return [row[0]["content"] for row in table["messages"].to_pylist()]


def shuffled(source: Path, path: Path, seed: int) -> None:
    """Write all rows of a file in an order that the seed says, once."""
    if path.exists():
        return
    if not source.exists():
        files.fail(f"{source} is missing", mend="--real DIR (docs/real-models.md)")
    table = pq.read_table(source, columns=["instruction", "output"])
    order = list(range(len(table)))
    random.Random(seed).shuffle(order)
    write_parquet(path, table.take(np.array(order)))


# --- the run


def collected(out: Path, about: dict, before: Path) -> dict:
    """Return all conditions that are kept under out/SEED, by seed and name; of other seeds those
    of the file `before`. Its settings must be those of `about`."""
    found: dict[str, dict] = {}
    if before.exists():
        kept = files.read_json(before)
        if kept["settings"] != about["settings"]:
            files.fail(f"{before} is of other settings", mend="another --results, or delete it")
        found = {seed: each for seed, each in kept["seeds"].items() if not (out / seed).exists()}
    for path in sorted(out.glob("*/conditions/*.json")):
        kept = files.read_json(path)
        found.setdefault(path.parents[1].name, {})[path.stem] = {
            part: kept[part] for part in ("measures", "cost")
        }
    return about | {"labels": {k: v[0] for k, v in CONDITIONS.items()}, "seeds": found}


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--setting", choices=SETTINGS, default="demo")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", default="out/onpolicy")
    parser.add_argument("--real", default="real", help="holds smollm2 and stdlib.parquet")
    parser.add_argument("--only", nargs="+", choices=CONDITIONS, help="these conditions alone")
    parser.add_argument("--smoke", action="store_true", help="few rows and steps")
    parser.add_argument("--threads", type=int, default=1, help="of each command")
    parser.add_argument(
        "--results", help="(default: bench/onpolicy/results-SETTING.json; with --smoke in OUT)"
    )
    args = parser.parse_args(argv)
    setting = dict(SETTINGS[args.setting])
    smoke = setting.pop("smoke")
    if args.smoke:
        setting |= smoke
    out = Path(args.out).absolute() / args.setting
    place = out if args.smoke else ROOT / "bench/onpolicy"
    results = Path(args.results or place / f"results-{args.setting}.json")
    env = os.environ | {"OMP_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": "1"}
    env["OMP_WAIT_POLICY"] = "PASSIVE"
    names = args.only or (SMOKED if args.smoke else [*CONDITIONS])
    for number in args.seeds:
        started = time.monotonic()
        seed = Seed(setting, number, Steps(out / str(number), env), args.real)
        seed.begin()
        for name in names:
            told = "  ".join(f"{k} {v:.4g}" for k, v in seed.condition(name)["measures"].items())
            print(f"{args.setting} {number} {name}: {told}", flush=True)
        print(f"{args.setting} {number}: {time.monotonic() - started:.0f} s", flush=True)
        about = {"setting": args.setting, "settings": setting}
        files.write_json(results, collected(out, about, results))
    command = f"python bench/onpolicy/evidence_tables.py --results {results} --doc DOC"
    print(f"wrote {results}; next: {command}")


if __name__ == "__main__":
    main()
