"""Turn any instruction, chat or text data into token ids and answer masks: what every later stage
reads.

    python prepare_data.py --source train.parquet --tokenizer Qwen/Qwen2.5-0.5B-Instruct --out \
        data/mine
    # seconds
    python prepare_data.py --source train.parquet --tokenizer Qwen/Qwen2.5-0.5B-Instruct --out \
        data/small --limit 500 --val 50 --show 3
    # text, label: rows with a class each
    python prepare_data.py --source reviews.csv --tokenizer DIR --out data/reviews --task \
        classify
    # or a server of any kind:
    python prepare_data.py --source asked.jsonl --tokenizer DIR --out data/asked --answers \
        teacher --teacher DIR
    python prepare_data.py --source asked.jsonl --tokenizer DIR --out data/asked --answers \
        teacher --teacher-url http://HOST:8000/v1 --teacher-model X

Reads   --source     [NAME=]WHERE, as often as there are sources. WHERE: a file, folder or glob; a
        hub id org/name[:split][@revision];
                     a URI (s3://, gs://, hdfs://). Parquet, json, jsonl or csv (also .gz .bz2 .zst
                     .xz); the schema is found from the column names, or --columns says it
        --tokenizer  a folder or hub id; its chat template decides what a conversation looks like
        --teacher    with --answers teacher: a model folder, or an OpenAI-compatible server, that
                     answers the prompts anew
Writes  --out        {train,val}.{tokens,answer,rows}.npy (see lib/data.py), val.prompts.jsonl,
        tokenizer/, meta.json last,
                     and report.png: how long rows are, where they come from, why others were
                     dropped answers/: the teacher's, as parquet (see lib/prepare/answers.py); a run
                     continues there, and --fresh keeps them
        --export, --push-to-hub  the rows that were kept, as an ordinary parquet data set (messages
                                 or text, source, split, teacher)

--task classify: each row is a text with a label, and its class is its only target
(lib/prepare/classes.py). Train and val, and what --limit keeps, hold the classes in the proportions
of the data.

A row is dropped, and counted by reason, when it is empty, too long, a duplicate, or holds nothing
to learn. Which side of the train / val split a row is on depends on its prompt and the seed alone:
with --val as a share, rows added later change no other row's side (of rows with a class they may,
for the shares of the classes are kept).
"""

import argparse
import collections
import contextlib
import functools
import hashlib
import itertools
import json
import os
import shutil
import sys
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

from lib import data, files, flags, template
from lib.measure import plots
from lib.options import mix
from lib.prepare import answers, classes, export, hub, places, sources, split, workers
from lib.prepare.store import Store

SHAPING = (
    "task",
    "source",
    "tokenizer",
    "columns",
    "system",
    "max_len",
    "long",
    "turns",
    "think",
    "val",
    "limit",
    "rows_per_chunk",
    "mix",
    "seed",
)
PARTS = [
    f"{split}.{part}.npy" for split in ("train", "val") for part in ("tokens", "answer", "rows")
]


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    # --- read and write
    parser.add_argument(
        "--source",
        nargs="+",
        action="extend",
        required=True,
        metavar="[NAME=]WHERE",
        help=(
            "a file, folder or glob, a hub id org/name[:split][@revision], or a URI (may be given"
            " again)"
        ),
    )
    parser.add_argument(
        "--tokenizer",
        required=True,
        metavar="DIR|ID",
        help="tokenizer of the teacher and the student: a folder or a hub id",
    )
    flags.add(parser, "--out")
    parser.add_argument(
        "--export",
        metavar="DIR|URI",
        help="also write the rows kept, as train.parquet and validation.parquet in this folder",
    )
    parser.add_argument(
        "--push-to-hub",
        metavar="REPO",
        help="also push the rows kept to this data set of the hub (private)",
    )
    parser.add_argument(
        "--public",
        action="store_true",
        help="make the data set of --push-to-hub for all to see, if it is new",
    )
    # --- what a row is
    parser.add_argument(
        "--task",
        choices=["language", "classify"],
        default="language",
        help=(
            "what is learnt of a row: the tokens of its answer, or its class (default: %(default)s)"
        ),
    )
    parser.add_argument(
        "--columns",
        action="append",
        metavar="MAP",
        help=(
            f"{sources.COLUMNS_HELP}; may be given again for another SOURCE (default: found from"
            " the column names)"
        ),
    )
    parser.add_argument(
        "--system",
        metavar="TEXT",
        help="system message of every conversation that has none (default: what the template does)",
    )
    parser.add_argument(
        "--max-len",
        type=int,
        default=1024,
        metavar="N",
        help="tokens of the longest row kept (default: %(default)s)",
    )
    parser.add_argument(
        "--long",
        choices=["drop", "truncate"],
        default=None,
        help="what happens to a longer row (default: drop; to classify: truncate)",
    )
    parser.add_argument(
        "--turns",
        choices=["all", "last"],
        default="all",
        help="answers of a conversation to learn (default: %(default)s)",
    )
    parser.add_argument(
        "--think",
        choices=["keep", "drop", "mask"],
        default="keep",
        help=(
            "reasoning traces <think>...</think> of the answers: learnt like the rest, taken out,"
            " or in the text but not learnt (default: %(default)s)"
        ),
    )
    # --- which rows
    parser.add_argument(
        "--val",
        type=float,
        default=0.02,
        metavar="X",
        help="validation rows: a share below 1, or a count (default: %(default)s)",
    )
    parser.add_argument(
        "--limit",
        type=int,
        default=0,
        metavar="N",
        help="stop after N kept rows; 0 = off (default: %(default)s)",
    )
    parser.add_argument(
        "--rows-per-chunk",
        type=int,
        default=20000,
        metavar="N",
        help="rows of one dump of teacher logits (default: %(default)s)",
    )
    parser.add_argument(
        "--mix",
        metavar="WEIGHTS",
        help=(
            'weights of the sources, the trainers\' default: "NAME:0.7 NAME:0.3" (default: as they'
            " are)"
        ),
    )
    # --- the run
    parser.add_argument(
        "--workers",
        type=int,
        default=0,
        metavar="N",
        help="processes; 0 = one a core, at most 16 (default: %(default)s)",
    )
    parser.add_argument(
        "--show",
        type=int,
        default=0,
        metavar="N",
        help="print N training rows, targets marked (default: %(default)s)",
    )
    flags.add(parser, "--seed", "--fresh", "--trust-remote-code")
    answers.add_flags(parser)
    args = parser.parse_args(argv)
    answers.check_flags(parser, args)
    args.long = args.long or ("truncate" if args.task == "classify" else "drop")
    for name in (
        ("system", "answers", "turns", "think", "mix", "export", "push_to_hub")
        if args.task == "classify"
        else ()
    ):
        if getattr(args, name) != parser.get_default(name):
            parser.error(
                f"--{name.replace('_', '-')} is about conversations: it does not go with --task"
                " classify"
            )
    flags.positive(parser, args, "max_len", "rows_per_chunk")
    for name in ("limit", "workers", "show", "seed"):
        if getattr(args, name) < 0:
            parser.error(f"--{name} is {getattr(args, name)}, wanted 0 or more")
    if not args.val >= 0 or args.val >= 1 and args.val % 1:
        parser.error(f"--val is {args.val}, wanted a share below 1 or a whole number of rows")
    if args.public and not args.push_to_hub:
        parser.error("--public is about --push-to-hub REPO, which is not given")
    if args.push_to_hub and not hub.REPO.fullmatch(args.push_to_hub):
        parser.error(f"--push-to-hub is {args.push_to_hub}, wanted org/name")
    if args.export and args.export.partition("?")[0].endswith(".parquet"):
        parser.error(f"--export is {places.redact(args.export)}, wanted a folder")
    try:
        maps = [
            sources.parse_columns(text, args.answers == "given", args.task == "classify")
            for text in args.columns or ()
        ]
    except ValueError as wrong:
        parser.error(f"--columns: {wrong}")
    args.wanted = [sources.named(text) for text in args.source]
    names = [name for name, _ in args.wanted]
    for name, count in collections.Counter(names).items():
        if count > 1:
            parser.error(
                f"--source: the name {name} is given {count} times, wanted a name of its own for"
                " each: --source NAME=WHERE"
            )
    args.named = dict(maps)
    if len(args.named) < len(maps) or not set(args.named) <= {"", *names}:
        told = ", ".join(name or "all sources" for name, _ in maps)
        parser.error(
            f"--columns: saw maps for {told}, wanted at most one for each of {', '.join(names)},"
            " and one for all others"
        )
    if args.columns and len(args.columns) == 1:
        args.columns = args.columns[0]
    try:
        if args.mix and set(mix.parse(args.mix)) != set(names):
            parser.error(
                f"--mix: saw the names {', '.join(mix.parse(args.mix))}, wanted those of the"
                f" sources: {', '.join(names)}"
            )
    except ValueError as wrong:
        parser.error(f"--mix: {wrong}")
    args.source = [places.redact(text) for text in args.source]  # what is stored
    return args


@functools.cache
def saved_tokenizer(folder, trust_remote_code):
    """Load the tokenizer that this run saved, once a process."""
    return template.load_tokenizer(folder, trust_remote_code)


def prompt_hash(row, seed):
    """Return 64 bits of what comes before the first answer (all of a plain text): equal prompts
    share one side of the split."""
    if not isinstance(row, str):
        first = next(
            place for place, message in enumerate(row) if place and message["role"] == "assistant"
        )
        row = [[message["role"], message["content"]] for message in row[:first]]
    return int.from_bytes(
        hashlib.blake2b(json.dumps(row).encode(), digest_size=8, key=str(seed).encode()).digest(),
        "little",
    )


def encode_batch(rows, folder, trust_remote_code, max_len, long, turns, think, seed):
    """Encode a batch of rows in a worker. Return one entry a row: (ids, answer, prompt hash, ids
    hash), or the reason it is dropped."""
    result = []
    for row, encoded in zip(
        rows, template.encode(saved_tokenizer(folder, trust_remote_code), rows, turns, think)
    ):
        if not isinstance(encoded, str):
            ids, answer = encoded
            if (
                not isinstance(row, str)
                and row[-1].get("written", {}).get("finish_reason") == "length"
                and len(last := np.flatnonzero(answer))
            ):
                answer[last[-1]] = (
                    False  # the end of turn that the template wrote is not where the teacher ended
                )
            if len(ids) > max_len and long == "truncate":
                ids, answer = ids[:max_len], answer[:max_len]
            if len(ids) > max_len:
                encoded = "too long"
            elif not answer.any():
                encoded = "no target"  # the cut took them all
            else:
                digest = int.from_bytes(
                    hashlib.blake2b(ids.tobytes(), digest_size=8).digest(), "little"
                )
                encoded = ids, answer, prompt_hash(row, seed), digest
        result.append(encoded)
    return result


def stage(partial, numbered, work, args, val_rows, total, texts=None, names=()):
    """Encode all rows, numbered (source, file), into temporary files in their order, and the kept
    ones as text into `texts`, if given.

    Return the staged records, the rows read by (source, file), and those dropped by (source,
    reason).
    """
    seen, dropped, read, kept, begun = (
        split.Seen(),
        collections.Counter(),
        collections.Counter(),
        0,
        time.time(),
    )
    processes = args.workers or min(
        16, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    )
    tokens, answers, records = (
        files.NpyWriter(partial / f"staged.{part}.npy", dtype)
        for part, dtype in (("tokens", np.uint32), ("answer", bool), ("rows", split.STAGED))
    )
    bar = tqdm(total=total, unit="row", desc="prepare", disable=not sys.stderr.isatty())
    with (
        bar,
        open(partial / "staged.prompts.jsonl", "w", encoding="utf-8") as prompts,
        contextlib.closing(workers.encoded_rows(numbered, work, processes)) as encoded,
    ):
        for number, row, result in encoded:
            read[number] += 1
            bar.update()
            if bar.disable and read.total() % 50_000 == 0:
                print(
                    f"prepare rows={read.total()} kept={kept} tokens={tokens.count}"
                    f" time_s={time.time() - begun:.1f}",
                    flush=True,
                )
            if not isinstance(result, str) and not seen.add(result[3]):
                result = "duplicate"
            if isinstance(result, str):
                dropped[number[0], result] += 1
                continue
            ids, answer, prompt, _ = result
            tokens.append(ids)
            answers.append(answer)
            records.append(np.array([(len(ids), answer.sum(), number[0], prompt)], split.STAGED))
            if args.think == "drop" and not isinstance(row, str):
                row = template.without_think(row)
            if val_rows.candidate(prompt) and not isinstance(row, str):
                last = template.last_answer(row)
                prompts.write(
                    json.dumps(
                        [kept, {"messages": row[:last], "reference": row[last]["content"]}],
                        ensure_ascii=False,
                    )
                    + "\n"
                )
            if texts:
                texts.append(row, names[number[0]])
            kept += 1
            if kept == args.limit:
                break
    for writer in (tokens, answers, records, *([texts] if texts else [])):
        writer.close()
    return np.load(partial / "staged.rows.npy"), read, dropped


def finished(out, args, shaping):
    """Return the meta.json of a folder that this very command finished, or None; refuse a folder
    that another one made."""
    if out.exists() and (
        not out.is_dir()
        or {path.name for path in out.iterdir()} - {files.NEVER_DELETED}
        and not (out / "train.rows.npy").exists()
    ):
        files.fail(
            f"--out {out} is in the way",
            seen="something that prepare_data.py did not make",
            wanted="a new folder",
            mend="another --out",
        )
    if args.fresh or not (out / "meta.json").exists():
        return None
    meta = files.read_json(out / "meta.json", mend="the same command with --fresh")
    before = {"turns": "all", "think": "keep", "task": "language"} | meta.get(
        "args", {}
    )  # a folder may be older than these flags
    differs = [
        f"{name} {before.get(name)!r} -> {value!r}"
        for name, value in shaping.items()
        if before.get(name) != value
    ]
    if meta.get("format") != data.FORMAT:
        differs.append(f"format {meta.get('format')} -> {data.FORMAT}")
    if not differs:
        for source in meta.get("sources", []):
            where = dict(args.wanted).get(source["name"], "")
            differs += [
                f"{name} has changed"
                for name in places.changed(where, source.get("files", [source]))
            ]  # older folders: an entry a file
    if differs:
        files.fail(
            f"{out} was prepared from something else",
            seen=f"{', '.join(differs)}",
            mend="another --out, or --fresh to prepare it anew",
        )
    return meta


def show(folder, count):
    """Print training rows, spread over all of them, with their targets green on a terminal, in
    brackets elsewhere."""
    rows, tokenizer, meta = (
        data.Split(folder, "train"),
        template.load_tokenizer(folder / "tokenizer"),
        files.read_json(folder / "meta.json"),
    )
    names = [source["name"] for source in meta["sources"]]
    grey, green, bold, plain = (
        ("\x1b[90m", "\x1b[32m", "\x1b[1m", "\x1b[0m") if sys.stdout.isatty() else ("", "[", "", "")
    )
    for row in np.linspace(0, len(rows.rows) - 1, min(count, len(rows.rows))).astype(int):
        ids, answer = rows.row(row)
        if rows.labels is not None:
            print(
                f"\n{bold}row {row:,} of {len(rows.rows):,} from {names[rows.rows[row]['source']]}:"
                f" {len(ids)} tokens, of the class{plain} "
                f"{green}{meta['labels'][rows.labels[row]]}{plain or ']'}\n{grey}{tokenizer.decode(ids)}{plain}"
            )
            continue
        print(
            f"\n{bold}row {row:,} of {len(rows.rows):,} from {names[rows.rows[row]['source']]}:"
            f" {len(ids)} tokens, {answer.sum()} targets{plain}"
        )
        cuts = [0, *(np.flatnonzero(np.diff(answer)) + 1), len(ids)]
        text = ""
        for begin, end in itertools.pairwise(cuts):
            part = tokenizer.decode(
                ids[begin:end], skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
            text += f"{green}{part}{plain or ']'}" if answer[begin] else f"{grey}{part}{plain}"
        print(text.rstrip("\n"))


def report(folder, meta):
    """Print the table of what was kept, and the next command."""
    rows, targets, tokens, lengths = meta["rows"], meta["targets"], meta["tokens"], meta["lengths"]
    print(f"\n{folder}   {meta['schema']}")
    for name, values in (("rows", rows), ("tokens", tokens), ("targets", targets)):
        print(f"{name:<10}train {values['train']:,}   val {values['val']:,}")
    drops = "".join(f"   {reason} {count:,}" for reason, count in meta["dropped"].items())
    print(f"{'dropped':<10}{sum(meta['dropped'].values()):,}{drops}")
    what = (
        f"prompts, answered {meta['teacher']['generations']} times"
        if meta.get("teacher")
        else "read"
    )
    for source in (
        meta["sources"] if len(meta["sources"]) > 1 and "files" in meta["sources"][0] else ()
    ):
        rows, drops = source["rows"], sum(source["dropped"].values())
        print(
            f"{'source':<10}{source['name']}   train {rows['train']:,}   val {rows['val']:,}  "
            f" dropped {drops:,}   of {source['read']:,} {what}"
        )
    if labels := meta.get("labels"):
        most = sorted(meta["classes"].items(), key=lambda item: -item[1]["train"])
        print(
            f"{'classes':<10}{len(labels)}: "
            + "   ".join(
                f"{name} {count['train']:,} + {count['val']:,}" for name, count in most[:8]
            )
            + (
                f"   ... {most[-1][0]} {most[-1][1]['train']:,} + {most[-1][1]['val']:,}"
                if len(most) > 8
                else ""
            )
        )
    for name, key in (("row", "rows"), ("answer", "targets"))[: 1 if labels else 2]:
        print(
            f"{name:<10}tokens:{''.join(f'   {point} {value:,}' for point, value in lengths[key].items())}"
        )
    print(f"{'chunks':<10}{meta['chunks']:,} of {meta['rows_per_chunk']:,} rows")
    print(f"next: make stage1 NAME={folder.name}", flush=True)


def deliver(folder, args):
    """Write the rows kept where --export and --push-to-hub say."""
    if args.export or args.push_to_hub:
        export.deliver(folder / "rows", args.export, args.push_to_hub, args.public)


def percentiles(values):
    points = np.percentile(values, [0, 50, 90, 99, 100], method="nearest")
    return dict(zip(("min", "p50", "p90", "p99", "max"), map(int, points)))


def describe(inputs, staged, is_val, read, lost, args, shaping):
    """Return what meta.json says of the sources and rows."""

    def count(values):
        return {"train": int(values[~is_val].sum()), "val": int(values[is_val].sum())}

    dropped, rows = split.by_reason(lost), count(np.ones(len(staged), np.int64))
    return {
        "format": data.FORMAT,
        "sources": [
            {
                "name": source.name,
                "where": source.where,
                "rows": count(staged["source"] == number),
                "read": sum(read[number, f] for f in range(len(source.files))),
                "dropped": {
                    reason: lost[number, reason] for reason in dropped if lost[number, reason]
                },
                "files": [
                    {"name": str(file.place), **places.stamp(file.place), "rows": read[number, f]}
                    for f, file in enumerate(source.files)
                ],
                **(
                    {"commit": source.files[0].place.revision}
                    if source.files[0].place.revision
                    else {}
                ),
            }
            for number, source in enumerate(inputs)
        ],
        "mix": args.mix,
        "schema": "; ".join(
            dict.fromkeys(file.described for source in inputs for file in source.files)
        ),
        "args": shaping,
        "rows": rows,
        "targets": count(staged["targets"]),
        "tokens": count(staged["length"]),
        "dropped": dropped,
        "lengths": {
            "rows": percentiles(staged["length"]),
            "targets": percentiles(staged["targets"]),
        },
        "rows_per_chunk": args.rows_per_chunk,
        "chunks": -(-rows["train"] // args.rows_per_chunk),
        "seed": args.seed,
    }


def main(argv=None):
    args = parse_args(argv)
    out, shaping = Path(args.out), {name: getattr(args, name) for name in SHAPING}
    if out.is_symlink():  # to another disk, perhaps: renames must stay on one
        out = out.resolve()
    settings = answers.settings(args)
    shaping |= answers.shaping(args, settings)
    if (partial := files.beside(out, "part")).exists():
        files.lock(
            partial
        ).close()  # refused while another process fills it; a killed one left it behind
    files.recover(out)
    if (meta := finished(out, args, shaping)) is not None:
        print(f"prepare done: {out} is finished already (--fresh makes it anew)")
        show(out, args.show)
        report(out, meta)
        return deliver(out, args)

    # --- look at everything that can be wrong before anything is written
    if len(args.wanted) > np.iinfo(split.STAGED["source"]).max:
        files.fail(
            "there are too many sources",
            seen=len(args.wanted),
            wanted=f"at most {np.iinfo(split.STAGED['source']).max}",
        )
    inputs = sources.open_all(
        args.wanted, args.named, args.answers == "given", args.task == "classify"
    )
    for source in inputs:
        commit = (
            f" commit={source.files[0].place.revision}" if source.files[0].place.revision else ""
        )
        print(
            f"prepare source={source.name} where={source.where}{commit} files={len(source.files)}"
            f" schema={source.described}",
            flush=True,
        )
    every = [file for source in inputs for file in source.files]
    plain = {"text" in file.columns for file in every}  # {True}, {False} or both
    if args.export:
        export.check(args.export)
    if args.push_to_hub:
        hub.create(args.push_to_hub, args.public)
    if (args.export or args.push_to_hub) and len(plain) > 1:
        files.fail(
            "one table cannot hold these sources",
            seen="conversations and plain texts",
            wanted="one kind",
            mend="no --export and no --push-to-hub",
        )
    tokenizer = template.load_tokenizer(args.tokenizer, args.trust_remote_code)
    if args.task == "language" and False in plain and template.ensure_template(tokenizer):
        print(
            "prepare warning: the tokenizer has no chat template; the plain one of lib/template.py"
            " is used and saved with it",
            flush=True,
        )
    if (
        args.turns == "all"
        and any("messages" in file.columns for file in every)
        and template.rewrites(tokenizer)
    ):
        print(
            "prepare warning: the chat template rewrites earlier answers: of each conversation only"
            " the last one is learnt",
            flush=True,
        )
    store = Store(out / files.NEVER_DELETED, settings) if settings else None
    if args.fresh:
        files.remove_ours(out, ("train.rows.npy",))
    written = answers.write(store, inputs, args, tokenizer) if store else None

    # --- tokenize into temporary files, then divide them into train and val
    partial = files.partial_folder(out)
    lock = files.lock(partial)
    tokenizer.save_pretrained(partial / "tokenizer")
    saved_tokenizer.cache_clear()  # another run of this process may have used the same folder
    tokenizer = saved_tokenizer(
        partial / "tokenizer", args.trust_remote_code
    )  # later stages load this one: so does this run
    work = functools.partial(
        encode_batch,
        folder=partial / "tokenizer",
        trust_remote_code=args.trust_remote_code,
        max_len=args.max_len,
        long=args.long,
        turns=args.turns,
        think=args.think,
        seed=args.seed,
    )
    numbered = (
        ((s, f), row)
        for s, source in enumerate(inputs)
        for f, file in enumerate(source.files)
        for row in sources.rows(file, args.system)
    )
    total = None if any(file.count is None for file in every) else sum(file.count for file in every)
    if written:
        numbered, total = written.rows, written.count
    val_rows = split.ValRows(args.val)
    texts = (
        export.RowWriter(partial / "staged.texts.parquet", True in plain, bool(written))
        if args.export or args.push_to_hub
        else None
    )
    if args.task == "classify":
        try:
            staged, is_val, labels, read, lost = classes.stage(
                partial, numbered, [file.names for file in every if file.names], tokenizer, args
            )
        except SystemExit:  # rows that cannot be learnt: nothing of them is left behind
            shutil.rmtree(partial)
            raise
    else:
        staged, read, lost = stage(
            partial,
            numbered,
            work,
            args,
            val_rows,
            total,
            texts,
            [source.name for source in inputs],
        )
        is_val = val_rows.chosen(staged["prompt"])
    if written:
        read, lost = written.read, lost + written.lost
    if not len(staged):
        shutil.rmtree(partial)
        reasons = (
            ", ".join(f"{reason} {count}" for reason, count in split.by_reason(lost).items())
            or "nothing dropped"
        )
        files.fail(
            "no row is left",
            seen=f"{read.total()} rows, dropped: {reasons}",
            wanted="rows with a prompt and an answer, within --max-len",
        )
    if is_val.all():
        shutil.rmtree(partial)
        files.fail(
            "no row is left to train on",
            seen=f"{len(staged)} rows, all of them in val",
            wanted="more rows, or a smaller --val",
        )
    if not is_val.any():
        print(
            "prepare warning: val is empty: nothing can be evaluated; give more rows or a larger"
            " --val",
            flush=True,
        )
    if texts:
        export.divide(partial / "staged.texts.parquet", partial / "rows", is_val)
    if args.task == "classify" and (
        lacking := sum(not count["val"] for count in classes.counts(partial, labels).values())
    ):
        print(
            f"prepare warning: {lacking} of {len(labels)} classes have no validation row; give more"
            " rows or a larger --val",
            flush=True,
        )
    split.divide(partial, staged, is_val)

    meta = describe(inputs, staged, is_val, read, lost, args, shaping) | {
        "tokenizer": args.tokenizer
    }
    parts = [partial / part for part in PARTS]
    if args.task == "classify":
        meta |= {"task": args.task, "labels": labels, "classes": classes.counts(partial, labels)}
        parts += [partial / f"{side}.{part}" for side in ("train", "val") for part in classes.FILES]
    meta["identities"] = {**template.identities(tokenizer), "data": files.sha256(*parts)}
    if written:
        meta["teacher"] = written.meta
    files.write_json(partial / "meta.json", meta)
    plots.prepared(partial)
    lock.release()
    (partial / ".lock").unlink()
    files.publish(partial, out)

    # --- what a human should see
    if args.task == "language" and not set(
        data.Split(out, "train").end_tokens()
    ) & template.special_ids(tokenizer):
        print(
            "prepare warning: no special token ends nine answers in ten: the student will not learn"
            " where to stop",
            flush=True,
        )
    show(out, args.show)
    report(out, meta)
    deliver(out, args)


if __name__ == "__main__":
    main()
