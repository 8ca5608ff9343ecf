"""What is said of a prepared data set: its meta.json, whether it is what this command would make,
the table at the end, and rows with their targets marked (--show)."""

import argparse
import hashlib
import itertools
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from lib import data, files, template
from lib.prepare import export, own, places, sources, split, templates

BOTH = {"train": int, "val": int}
DESCRIBED = data.META | {  # of meta.json, what is printed of it
    "schema": str,
    "args": dict,
    "rows": BOTH,
    "tokens": BOTH,
    "targets": BOTH,
    "dropped": {...: int},
    "teacher?": {"generations": int},
    "sources": [
        {"name": str, "read": int, "rows": BOTH, "dropped": {...: int}, "files": [{"name": str}]}
    ],
}


PATHS = ("source", "tokenizer", "chat_template")  # flags that may name a file: its content counts
FEW_VAL = 20


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add --show."""
    parser.add_argument(
        "--show",
        type=int,
        default=0,
        metavar="N",
        help=(
            "print the first N rows as they are understood, before all are read, and N training"
            " rows in the end, targets marked (default: %(default)s)"
        ),
    )


# --- meta.json


def percentiles(values: np.ndarray) -> dict[str, int]:
    points = np.percentile(values, [0, 50, 90, 99, 100], method="nearest")
    return dict(zip(("min", "p50", "p90", "p99", "max"), map(int, points)))


def facts_of_rows(inputs: list[sources.Source], staged: split.Staged, args, shaping: dict) -> dict:
    """Return what meta.json says of the sources and rows."""
    rows = staged.rows

    def both(values):
        mask = staged.is_val
        return {"train": int(values[~mask].sum()), "val": int(values[mask].sum())}

    reasons = split.by_reason(staged.lost)
    told = []
    for number, source in enumerate(inputs):
        seen = [staged.read[number, f] for f in range(len(source.files))]
        lost = {reason: staged.lost[number, reason] for reason in reasons}
        told.append(
            {
                "name": source.name,
                "where": source.where,
                "rows": both(rows["source"] == number),
                "read": sum(seen),
                "dropped": {reason: count for reason, count in lost.items() if count},
                "files": [
                    {"name": str(file.place), **places.stamp(file.place), "rows": count}
                    for file, count in zip(source.files, seen)
                ],
            }
        )
        if source.commit:
            told[-1]["commit"] = source.commit
    schemas = dict.fromkeys(file.described for source in inputs for file in source.files)
    counts = both(np.ones(len(rows), np.int64))
    return {
        "format": data.FORMAT,
        "sources": told,
        "mix": args.mix,
        "schema": "; ".join(schemas),
        "args": shaping,
        "rows": counts,
        "targets": both(rows["targets"]),
        "tokens": both(rows["length"]),
        "dropped": reasons,
        **({"split": dict(zip(("texts", "rows"), staged.cut))} if staged.cut[0] else {}),
        "lengths": {"rows": percentiles(rows["length"]), "targets": percentiles(rows["targets"])},
        "rows_per_chunk": args.rows_per_chunk,
        "chunks": -(-counts["train"] // args.rows_per_chunk),
        "seed": args.seed,
        "tokenizer": args.tokenizer,
    }


def staging_key(inputs: list[sources.Source], written, args, shaping: dict, tokenizer) -> str:
    """Return a hash of all that staged rows depend on, "" where a killed run starts over: rows with
    a class, and rows that are exported too."""
    if args.fresh or args.task == "classify" or export.keeps_text(args):
        return ""
    import tokenizers
    import transformers

    told = [{name: value for name, value in shaping.items() if name not in PATHS}]
    told += [template.identities(tokenizer), transformers.__version__, tokenizers.__version__]
    told += [data.FORMAT, split.STAGED.descr, written and (written.count, written.meta)]
    for name, file in ((source.name, file) for source in inputs for file in source.files):
        place = file.place
        if place.is_local:  # wherever it lies now, by whatever path
            now = os.stat(place.path)
            told.append([name, file.described, now.st_size, now.st_mtime_ns])
        else:
            told.append([str(place), file.described, places.stamp(place)])
    return hashlib.sha256(json.dumps(told, default=str).encode()).hexdigest()


def finished(out: Path, args, shaping: dict) -> dict | None:
    """Return the meta.json of a folder that this very command finished, or None; refuse a folder
    that another one made."""
    foreign = out.exists() and not out.is_dir()
    if out.is_dir() and not (out / "train.rows.npy").exists():
        foreign = any(path.name != files.NEVER_DELETED for path in out.iterdir())
    if foreign:
        files.fail(
            f"--out {out} is in the way",
            seen="something that prepare_data.py did not make",
            wanted="a new folder",
            mend="another --out",
        )
    if args.fresh or not (out / "meta.json").exists():
        return None
    again = "the same command with --fresh"
    meta = files.read_json(out / "meta.json", again, DESCRIBED)
    files.check(out, meta, False, again)
    before, differs, moved = meta["args"], [], moved_sources(args, meta)
    own = {"source"} if moved else set()
    own |= {*PATHS[1:]} if moved_tokenizer(args, meta) else set()
    for name, value in shaping.items():
        if name == "long" and value == "pack" and "text (" not in str(meta.get("schema")):
            value = before.get("long") if before.get("long") == "drop" else value  # the same there
        if name not in own and not files.same(before.get(name), value):
            differs.append(f"{name} {before.get(name)!r} -> {value!r}")
    if meta.get("format") != data.FORMAT:
        differs.append(f"format {meta.get('format')} -> {data.FORMAT}")
    if not differs:
        where = dict(args.wanted)
        names = [source["name"] for source in meta["sources"]]
        if names != list(where):
            differs.append(f"sources {', '.join(names)} -> {', '.join(where)}")
        for source in meta["sources"] if names == list(where) and not moved else ():
            changed = places.changed(where[source["name"]], source["files"])
            differs += [f"{name} has changed" for name in changed]
    if differs:
        files.fail(
            f"{out} was prepared from something else",
            seen=f"{', '.join(differs)}",
            mend="another --out, or --fresh to prepare it anew",
        )
    return meta | {"tokenizer": args.tokenizer}


def moved_sources(args, meta: dict) -> bool:
    """Return whether the sources are named by other paths, and are what the folder was made of."""
    if files.same(meta["args"].get("source"), args.source):
        return False
    if [name for name, _ in args.wanted] != [source["name"] for source in meta["sources"]]:
        return False
    for (_, where), source in zip(args.wanted, meta["sources"]):
        now = [places.stamp(place) for place in sources.locate(where)]
        kinds = ("sha256", "size", "mtime")
        if now != [{k: one[k] for k in kinds if k in one} for one in source["files"]]:
            return False
    return True


def moved_tokenizer(args, meta: dict) -> bool:
    """Return whether a tokenizer or a template is named by another path, and is a folder's own."""
    before = {name: meta["args"].get(name) for name in PATHS[1:]}
    same = {name: files.same(before[name], getattr(args, name)) for name in before}
    if all(same.values()):
        return False
    tokenizer = template.load_tokenizer(args.tokenizer, args.trust_remote_code)
    told = [template.identities(tokenizer)] if same["chat_template"] else []  # of plain texts
    templates.make_ready(tokenizer, args.chat_template, args.template_args)
    told.append(template.identities(tokenizer))
    return meta["identities"].get("tokenizer") in [one["tokenizer"] for one in told]


# --- for people


def say_small(meta: dict) -> None:
    """Warn of a data set that is so small that its figures say little."""
    rows = meta["rows"]
    if 0 < rows["val"] < FEW_VAL:
        more = min(100, (rows["train"] + rows["val"]) // 5)
        known = isinstance(meta["args"].get("val"), str)  # a folder's: another --val would leak
        mend = f"--val {more} makes" if more > rows["val"] and not known else "more rows make"
        said = f"val is {rows['val']} row(s): its figures are noise; {mend} it larger"
        print(f"prepare warning: {said}", flush=True)


def print_table(folder: Path, meta: dict) -> None:
    """Print the table of what was kept, and the next command."""
    print(f"\n{folder}   {meta['schema']}")
    for name in ("rows", "tokens", "targets"):
        print(f"{name:<10}train {meta[name]['train']:,}   val {meta[name]['val']:,}")
    drops = "".join(f"   {reason} {count:,}" for reason, count in meta["dropped"].items())
    print(f"{'dropped':<10}{sum(meta['dropped'].values()):,}{drops}")
    if split := meta.get("split"):
        print(
            f"{'packed':<10}{split['texts']:,} texts longer than --max-len into"
            f" {split['rows']:,} rows (--long drop leaves them out)"
        )
    what = "read"
    if several := (meta.get("teacher") or meta.get("student", {})).get("generations"):
        what = f"prompts, answered {several} times"
    for source in meta["sources"] if len(meta["sources"]) > 1 else ():
        rows, drops = source["rows"], sum(source["dropped"].values())
        print(
            f"{'source':<10}{source['name']}   train {rows['train']:,}   val {rows['val']:,}  "
            f" dropped {drops:,}   of {source['read']:,} {what}"
        )
    if meta.get("date"):
        print(f"{'date':<10}pinned in the chat template: {meta['date']}")
    say_unused(meta)
    lengths = {"row": meta["lengths"]["rows"], "answer": meta["lengths"]["targets"]}
    if meta.get("labels"):
        _say_classes(meta["classes"])
        del lengths["answer"]
    for name, points in lengths.items():
        said = "".join(f"   {point} {value:,}" for point, value in points.items())
        print(f"{name:<10}tokens:{said}")
    print(f"{'chunks':<10}{meta['chunks']:,} of {meta['rows_per_chunk']:,} rows")


def say_next(folder: Path, meta: dict) -> None:
    """Print the command that comes next; a Makefile knows its own."""
    if "MAKELEVEL" in os.environ:
        return
    student = meta["tokenizer"]
    if Path(student).is_dir() and not Path(student, "config.json").exists():
        student = "STUDENT"  # a tokenizer alone
    if meta.get("own"):
        words = ["--data", folder, "--teacher", "TEACHER", "--out", f"logits/{folder.name}"]
        print(f"next: {files.command('dump_logits.py', *words)}, then stage2_kd.py", flush=True)
        return
    words = ["--data", folder, "--student", student, "--out", f"runs/{folder.name}/stage1"]
    print(f"next: {files.command('stage1_sft.py', *words)}", flush=True)


def say_unused(meta: dict, most: int = 20) -> None:
    """Print what the rows say and the text does not."""
    told = []
    for kind, names in meta.get("unused", {}).items():
        more = f" and {len(names) - most} more" if len(names) > most else ""
        told.append(f"{kind} {', '.join(names[:most])}{more}")
    if told:
        print(f"{'not used':<10}{'; '.join(told)}")
    if names := meta.get("spelled_out"):
        print(
            f"{'content':<10}has {', '.join(names)} in it: the chat template writes none by itself"
        )


def _say_classes(classes: dict, most: int = 8) -> None:
    """Print the rows of the largest classes, and of the smallest."""
    largest = sorted(classes.items(), key=lambda item: -item[1]["train"])
    said = [f"{name} {count['train']:,} + {count['val']:,}" for name, count in largest]
    if len(said) > most:
        said[most:] = [f"... {said[-1]}"]
    print(f"{'classes':<10}{len(classes)}: {'   '.join(said)}")


def show_first(numbered: Iterator[tuple], name: str, args, tokenizer, most: int) -> None:
    """Print the first rows of a source as they are understood, before the long run over all."""
    for place, (_, row) in enumerate(itertools.islice(numbered, most), 1):
        head = f"row {place} of {name} as it is read"
        if isinstance(row, tuple):
            show_row(tokenizer, head, tokenizer(row[0])["input_ids"], row[1] or "none")
            continue
        made = "too long"
        if isinstance(row, own.Sampled):
            show_row(tokenizer, head, row.ids, np.array(row.answer))
            continue
        if row is not None:
            (made,) = template.encode(tokenizer, [row], args.turns, args.think)
        if isinstance(made, str):  # prompts that a teacher is to answer are such rows
            print(
                f"\n{head}, {made if args.answers == 'given' else 'to be answered'}: {row}"[:2000]
            )
        else:
            show_row(tokenizer, head, *made)
    sys.stdout.flush()


def show_row(tokenizer, head: str, ids, answer) -> None:
    """Print a row with its targets green on a terminal, in brackets elsewhere; of a row with a
    class `answer` is its name."""
    grey, green, bold, plain, end = "", "[", "", "", "]"
    if sys.stdout.isatty():
        grey, green, bold, plain, end = "\x1b[90m", "\x1b[32m", "\x1b[1m", "\x1b[0m", "\x1b[0m"
    if isinstance(answer, str):
        print(f"\n{bold}{head}: {len(ids)} tokens, of the class{plain} {green}{answer}{end}")
        return print(f"{grey}{tokenizer.decode(ids)}{plain}")
    print(f"\n{bold}{head}: {len(ids)} tokens, {answer.sum()} targets{plain}")
    text, cuts = "", [0, *(np.flatnonzero(np.diff(answer)) + 1), len(ids)]
    for begin, stop in itertools.pairwise(cuts):
        part = tokenizer.decode(
            ids[begin:stop], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        text += f"{green}{part}{end}" if answer[begin] else f"{grey}{part}{plain}"
    print(text.rstrip("\n"))


def show_rows(folder: Path, count: int) -> None:
    """Print training rows, spread over all of them."""
    rows, meta = data.Split(folder, "train"), files.read_json(folder / "meta.json")
    tokenizer = template.load_tokenizer(folder / "tokenizer")
    if count:
        say_unused(meta)
    for row in np.linspace(0, len(rows.rows) - 1, min(count, len(rows.rows))).astype(int):
        ids, answer = rows.row(row)
        name = meta["sources"][rows.rows[row]["source"]]["name"]
        answer = answer if rows.labels is None else meta["labels"][rows.labels[row]]
        show_row(tokenizer, f"row {row:,} of {len(rows.rows):,} from {name}", ids, answer)


def dry_run(out: Path, args, inputs: list[sources.Source], tokenizer) -> None:
    """--dry-run: say what would be read, as far as it is known before a row is."""
    counts = [file.count for source in inputs for file in source.files]
    known = "a number that is known at the end" if None in counts else f"{sum(counts):,}"
    print(
        f"prepare tokenizer={args.tokenizer} tokens={len(tokenizer):,}\n"
        f"prepare rows={known} at most 5 bytes a token and 26 a row are written to {out},"
        f" {files.human(files.free_bytes(out))} free there\n--dry-run: nothing was written"
    )
