"""The same checkpoint measured by us and by lm-evaluation-harness on the same rows: accuracy among
labels, and perplexity.

    python -m venv out/lmeval && out/lmeval/bin/pip install "lm-eval[hf]==0.4.13"
    python bench/fidelity/harness.py --python out/lmeval/bin/python --model real/smollm2 --source \\
        real/debian.parquet --out out/harness

The rows are Debian's packages: description -> section, one of six; and the descriptions as plain
text. Two task files for the harness are written to --out, so that nothing is downloaded. How both
come to measure the same thing:

accuracy    The harness runs with --apply_chat_template and the prompt as the user's message, as
            chat.py --labels does. Its choices are the labels with the end of the turn behind them,
            for we score a label as a whole answer. It counts the generation prompt's last line
            break among a choice's tokens, we do not: one number, the same for all choices of a
            prompt, which is why each row's differences are compared.
perplexity  The harness (loglikelihood_rolling) puts the BOS token before a text, predicts every
            token of it, and appends nothing. Ours predicts every token but the first of a plain
            text's row, and ends it with EOS. So our text begins with BOS (where the tokenizer does
            not put it there itself), and the harness's ends in EOS. Its byte_perplexity counts
            EOS's letters as bytes; over our targets, the same log-likelihood is the perplexity. (Of
            what is left, 1.5e-5 nats a target, all is torch's float32 log_softmax on the CPU, which
            the harness takes: in float64 the number is ours.)
"""

import argparse
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import chat
import prepare_data
from lib import data, evaluate, files, models, template

SECTIONS = ("games", "fonts", "python", "sound", "database", "kernel")
QUESTION = "{}\nIs this package of {}?"
TASKS = {  # JSON is YAML
    "ours_labels": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{prompt}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{place}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    },
    "ours_text": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [
            {
                "metric": "byte_perplexity",
                "aggregation": "weighted_perplexity",
                "higher_is_better": False,
            }
        ],
    },
}


def lines(path, rows):
    files.write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def ours(args, rows, out):
    """Measure with our own code: accuracy and log p of every label; nats, targets and texts of the
    held-out rows."""
    lines(out / "prompts.jsonl", rows)
    chat.main(
        [
            "--ckpt",
            args.model,
            "--score",
            str(out / "prompts.jsonl"),
            "--labels",
            ",".join(SECTIONS),
            "--out",
            str(out / "answers.jsonl"),
            "--device",
            "cpu",
            "--threads",
            str(args.threads),
            "--fresh",
        ]
    )
    answers = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    tokenizer = template.load_tokenizer(args.model)
    bos = "" if template.adds_bos(tokenizer) else tokenizer.bos_token or tokenizer.eos_token
    lines(out / "texts.jsonl", [{"text": bos + row["text"]} for row in rows])
    prepare_data.main(
        [
            "--source",
            str(out / "texts.jsonl"),
            "--tokenizer",
            args.model,
            "--out",
            str(out / "data"),
            "--val",
            str(len(rows) // 2),
            "--fresh",
        ]
    )
    dataset = data.Dataset(out / "data")
    model = models.load(args.model, models.pick_device("cpu", args.threads), dataset=dataset)
    measures = evaluate.evaluate(model, dataset.val, model.vocab, 1024)
    texts = [
        tokenizer.decode(dataset.val.row(number)[0][1:-1])
        for number in range(len(dataset.val.rows))
    ]
    assert {row["text"] for row in rows} >= set(texts), "decoding is not the inverse of encoding"
    return (
        {
            "accuracy": files.read_json(out / "answers.scores.json")["metrics"]["accuracy"][
                "value"
            ],
            "nats": measures["ce"] * measures["targets"],
            "targets": measures["targets"],
        },
        [list(row["logp"].values()) for row in answers],
        texts,
    )


def write_tasks(rows, texts, tokenizer, out):
    """Write what the harness reads: the rows of its two tasks, and a file about each task."""
    end = tokenizer.convert_ids_to_tokens(model_end(tokenizer))
    choices = [name + end for name in SECTIONS]
    asked = [
        {"prompt": row["prompt"], "choices": choices, "place": SECTIONS.index(row["reference"])}
        for row in rows
    ]
    lines(out / "ours_labels.jsonl", asked)
    lines(out / "ours_text.jsonl", [{"text": text + tokenizer.eos_token} for text in texts])
    for name, task in TASKS.items():
        source = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str((out / f"{name}.jsonl").resolve())}},
        }
        files.write_json(out / f"{name}.yaml", source | {"test_split": "test"} | task)


def run_harness(args, out, task, *more):
    """Run the harness on one task; return its numbers by name, and its log of every row."""
    options = {
        "--model": "hf",
        "--model_args": f"pretrained={args.model},dtype=float32",
        "--device": "cpu",
        "--tasks": task,
        "--include_path": str(out),
        "--batch_size": "8",
        "--output_path": str(out / task),
    }
    words = [word for option in options.items() for word in option]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    subprocess.run(
        [args.python, "-m", "lm_eval", "run", *words, "--log_samples", *more],
        check=True,
        stdout=subprocess.DEVNULL,
        env=os.environ | offline | {"HF_HOME": str(out.resolve() / "hf")},
    )

    def newest(pattern):
        return max((out / task).rglob(pattern), key=lambda path: path.stat().st_mtime)

    results = files.read_json(newest("results_*.json"))["results"][task]
    numbers = {name: value for name, value in results.items() if isinstance(value, float)}
    samples = newest("samples_*.jsonl").read_text().splitlines()
    return numbers, [json.loads(line) for line in samples]


def theirs(args, rows, texts, out):
    """Run the harness on the same rows: its two numbers, and log p of every choice."""
    tokenizer = template.load_tokenizer(args.model)
    write_tasks(rows, texts, tokenizer, out)
    by_label, answered = run_harness(args, out, "ours_labels", "--apply_chat_template")
    by_text, _ = run_harness(args, out, "ours_text")
    answered.sort(key=lambda row: row["doc_id"])
    chosen = [[float(answer[0][0]) for answer in row["resps"]] for row in answered]
    letters = sum(len((text + tokenizer.eos_token).encode()) for text in texts)
    nats = math.log(by_text["byte_perplexity,none"]) * letters
    return {"accuracy": by_label["acc,none"], "nats": nats}, chosen


def model_end(tokenizer):
    """Return the token that ends an answer here."""
    ((ids, answer),) = template.encode(
        tokenizer, [[{"role": "user", "content": "x"}, {"role": "assistant", "content": "x"}]]
    )
    return int(ids[np.flatnonzero(answer)[-1]])


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--python", required=True, help="of the environment that has lm_eval")
    parser.add_argument("--model", required=True)
    parser.add_argument("--source", required=True, help="parquet with description and section")
    parser.add_argument("--out", required=True)
    parser.add_argument(
        "--rows",
        type=int,
        default=24,
        help="of the six sections alike; half of them as text (default: %(default)s)",
    )
    parser.add_argument(
        "--letters",
        type=int,
        default=80,
        help="of a description in a prompt; as text five times as many (default: %(default)s)",
    )
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    args.model, out = str(Path(args.model).resolve()), Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    table = [
        row
        for row in pq.read_table(args.source).to_pylist()
        if len(row["description"]) > args.letters
    ]
    table = [table[i] for i in np.random.default_rng(0).permutation(len(table))]
    picked = [
        row
        for name in SECTIONS
        for row in [row for row in table if row["section"] == name][: args.rows // len(SECTIONS)]
    ]
    rows = []
    for row in picked:
        short, long = (
            " ".join(row["description"][:letters].split())
            for letters in (args.letters, 5 * args.letters)
        )
        rows.append(
            {
                "prompt": QUESTION.format(short, ", ".join(SECTIONS)),
                "reference": row["section"],
                "text": long,
            }
        )
    mine, our_logp, held_out = ours(args, rows, out)
    other, their_logp = theirs(args, rows, held_out, out)
    apart = np.array(our_logp) - np.array(their_logp)
    apart -= apart.mean(1, keepdims=True)
    print(f"\n{'':28}{'ours':>12}{'harness':>12}{'difference':>12}")
    for name, a, b in (
        ("accuracy", mine["accuracy"], other["accuracy"]),
        (
            "perplexity",
            math.exp(mine["nats"] / mine["targets"]),
            math.exp(other["nats"] / mine["targets"]),
        ),
        ("nats a target", mine["nats"] / mine["targets"], other["nats"] / mine["targets"]),
    ):
        print(f"{name:28}{a:12.6f}{b:12.6f}{a - b:12.2g}")
    print(
        f"log p of a label, nats, largest difference over {apart.size} of them:"
        f" {np.abs(apart).max():.2g}"
    )


if __name__ == "__main__":
    main()
