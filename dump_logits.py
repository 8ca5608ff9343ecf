"""Run the teacher once over the data and keep its top-k logits, with the exact mass and the shape
of the rest, in memory-mapped arrays.

    python dump_logits.py --data data/distilqwen --teacher Qwen/Qwen2.5-7B-Instruct --student \
        Qwen/Qwen2.5-0.5B --out logits/distilqwen --chunk 3
    # CPU, seconds, after `make demo`
    python dump_logits.py --data data/demo --teacher runs/demo/teacher --out logits/try \
        --chunk val

Reads   data/NAME/ (prepare_data.py) and a causal LM with the data's vocabulary; of rows with a
        class each, a classifier of these labels, whose own tokenizer reads the rows' texts: all its
        class logits are kept, so that --k, --values, --tail-rank, --vocab and --student are not
        asked.
Writes  logits/NAME/chunk-0003/ (or val/): topk.npy, one record a target; done.npy; meta.json, last
        (lib/teacher/logits.py says what they hold); logits/NAME/basis.safetensors, once for all
        chunks: what the coefficients of the rest refer to (lib/teacher/basis.py).
Killed anywhere, the same command goes on with the rows that are missing, and the file is bit for
bit the same.
"""

import argparse
import math
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from lib import checkpoints, files, flags, models, plan
from lib import head as heads
from lib.data import Dataset
from lib.options import classifier
from lib.run import Interrupt, clock, versions
from lib.teacher import basis, logits

FLUSH_S = 5.0  # seconds of work that a power cut may cost


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    group = parser.add_argument_group("read and write")
    flags.add(group, "--data")
    group.add_argument(
        "--teacher",
        required=True,
        metavar="DIR|ID",
        help="the model to run: a folder, a stage folder (its best/), or a hub id",
    )
    flags.add(group, "--out")
    group.add_argument(
        "--chunk",
        default="all",
        metavar="N|all|val",
        help="one chunk, val alone, or all chunks and val (default: %(default)s)",
    )
    group = parser.add_argument_group("the method")
    group.add_argument(
        "--k", type=int, default=16, help="logits kept a target (default: %(default)s)"
    )
    group.add_argument(
        "--temperatures",
        default="1,2,4",
        metavar="1,2,4",
        help="temperatures training may use later (default: %(default)s)",
    )
    group.add_argument(
        "--values",
        choices=["fp16", "u8"],
        default="u8",
        help="format of z_max - z (default: %(default)s)",
    )
    group.add_argument(
        "--tail-rank",
        type=int,
        default=384,
        metavar="R",
        help=(
            "dimensions kept of the shape of the rest; 0 = its mass alone, one bucket (default:"
            " %(default)s)"
        ),
    )
    group.add_argument(
        "--tail-bytes",
        type=int,
        default=128,
        metavar="B",
        help=(
            "bytes a target for these, spent where they tell most; at most R (default: %(default)s)"
        ),
    )
    group.add_argument(
        "--student",
        default="",
        metavar="DIR|ID",
        help="the student to come: the teacher is cut to its tokens, if these are fewer",
    )
    group.add_argument(
        "--vocab",
        type=int,
        default=0,
        metavar="V",
        help="cut both to the first V tokens; 0 = by --student (default: %(default)s)",
    )
    group = parser.add_argument_group("the machine")
    flags.add(
        group,
        "--tokens-per-microbatch",
        "--device",
        "--dtype",
        "--threads",
        "--attn",
        "--compile",
        "--fresh",
        "--trust-remote-code",
    )
    args = parser.parse_args(argv)
    flags.positive(parser, args, "k", "tokens_per_microbatch")
    try:
        args.temperatures = sorted({float(t) for t in args.temperatures.split(",")})
    except ValueError:
        parser.error(f"--temperatures is {args.temperatures}, wanted numbers like 1,2,4")
    if min(args.temperatures) <= 0 or not all(map(math.isfinite, args.temperatures)):
        parser.error("--temperatures must be above 0")
    if args.tail_rank < 0 or args.tail_rank and args.tail_bytes < 1:
        parser.error(
            f"--tail-rank is {args.tail_rank} and --tail-bytes {args.tail_bytes}, wanted 0 or more,"
            " and at least 1"
        )
    if args.chunk not in ("all", "val") and not args.chunk.isdigit():
        parser.error(f"--chunk is {args.chunk}, wanted a number, all or val")
    return args


def pick_vocab(args, teacher, dataset):
    """Return V, the tokens both models know: the smaller output layer, cut before softmax and top-k
    on both sides."""
    vocab = args.vocab or teacher.vocab
    if dataset.labels:
        return teacher.vocab
    if args.student and not args.vocab:
        config = files.read_json(
            checkpoints.base_of(checkpoints.local_folder(args.student, args.trust_remote_code))
            / "config.json"
        )
        vocab = min(vocab, config.get("text_config", config)["vocab_size"])
    known = len(dataset.tokenizer())
    if not known <= vocab <= teacher.vocab:
        files.fail(
            "V does not fit",
            vocab,
            f"from {known} (the tokenizer's tokens) to {teacher.vocab} (the teacher's output"
            " layer)",
            "--vocab 0",
        )
    if args.k > vocab:
        files.fail("k does not fit", f"--k {args.k}", f"at most V = {vocab}", f"--k {vocab}")
    return vocab


def differing(seen, wanted):
    """Return what differs between two sets of settings, for people."""
    return "; ".join(
        f"{k} {seen.get(k)!r} (now {v!r})" for k, v in wanted.items() if seen.get(k) != v
    )


def allocate(path):
    """Take the disk blocks of a file that was only sized, so that a disk that fills up later cannot
    kill us in the middle of a write."""
    if hasattr(os, "posix_fallocate"):
        with open(path, "r+b") as file:
            try:
                os.posix_fallocate(file.fileno(), 0, max(1, os.fstat(file.fileno()).st_size))
            except OSError as full:
                files.fail(
                    f"{path} cannot be allocated",
                    full,
                    "enough free disk",
                    "a smaller --k, --values u8, or one --chunk at a time",
                )


def basis_wanted(args, settings, missing):
    """Return what the folder's basis has to be fitted to, and whether it is there. Refused: one
    fitted to something else, and finished chunks of another one, or of one that is lost; unless
    everything is made anew."""
    path = Path(args.out) / basis.NAME
    about = {
        name: settings[name]
        for name in ("teacher", "data", "vocab", "k", "tail_rank", "tail_bytes")
    }
    if args.fresh and args.chunk == "all":
        return about, False
    metas = {
        meta.parent: files.read_json(meta) for meta in sorted(Path(args.out).glob("*/meta.json"))
    }
    used = {
        folder: meta["basis"]
        for folder, meta in metas.items()
        if "basis" in meta and meta["chunk"] not in missing
    }
    if not path.exists():
        if used:
            files.fail(
                f"{path} is missing",
                f"{min(used)}, which was dumped with it",
                "that file",
                "copy it there, or --fresh with --chunk all",
            )
        return about, False
    _, seen = basis.load(path, "--fresh with --chunk all")
    if differ := differing(seen, about):
        files.fail(
            f"{path} was fitted to something else",
            differ,
            "what this dump is of",
            "another --out, or --fresh with --chunk all",
        )
    this = files.sha256(path)
    for folder, hashed in used.items():
        if hashed != this:
            files.fail(
                f"{folder} was dumped with another basis than {path}",
                hashed[:12],
                this[:12],
                f"its own {basis.NAME} there, or --chunk {metas[folder]['chunk']} --fresh",
            )
    return about, True


@torch.inference_mode()
def shared_basis(args, dataset, teacher, head, settings, missing):
    """Return the basis of the logits folder and its file's hash: the one that is there, or a new
    one, fitted to a fixed sample of train rows."""
    path = Path(args.out) / basis.NAME
    holding = files.lock(path.parent, wait=True)  # of several dumps, the first makes it
    about, there = basis_wanted(args, settings, missing)
    if not there:
        lengths, started = dataset.train.rows["length"], clock(teacher.device)
        rows = basis.sample_rows(dataset.train.rows["targets"])
        hidden = torch.cat(
            [
                teacher.hidden(dataset.train.batch(lines).to(teacher.device))
                for lines in plan.microbatches(
                    rows, lengths, args.tokens_per_microbatch, int(lengths.max()), pack=False
                )
            ]
        )
        if not torch.isfinite(hidden).all():
            files.fail(
                "the teacher's hidden states are not finite",
                seen="NaN or infinity",
                mend="--dtype float32 (some models overflow float16)",
            )
        shape, held = basis.fit(head, hidden, args.k, args.tail_rank, args.tail_bytes)
        basis.save(shape, path, about | {"targets": len(hidden), "variance": held})
        print(
            f"basis {path}: {len(shape.bits)} of {hidden.shape[1]} dimensions, in {args.tail_bytes}"
            f" bytes a target, hold {held:.1%} of the variance of the tail's logits; fitted to"
            f" {len(hidden):,} targets in {clock(teacher.device) - started:.0f} s",
            flush=True,
        )
    shape, _ = basis.load(path, "--fresh with --chunk all")
    holding.release()
    return replace(shape, rows=shape.rows[:, :0], mean=shape.mean[:0]).to(
        teacher.device
    ), files.sha256(path)  # a dump only encodes


def teacher_records(teacher, head, batch, k, temperatures, dtype, shape=None):
    """Return the records of a batch's targets, the teacher's cross-entropy at each (nats) and
    whether it had it right, each (N,)."""
    with_one = sorted({*temperatures, 1.0})
    kept = [with_one.index(t) for t in temperatures]
    hidden = teacher.hidden(batch)
    records, ce, hits = [], [], []
    for part, z in head.chunks(hidden):
        label = batch.labels[part]
        at_label = (z.gather(1, label[:, None]) - z.amax(1, keepdim=True))[:, 0]
        ids, gaps, tails = heads.topk_and_tails(z, k, with_one)
        log_z = torch.logaddexp((-gaps).logsumexp(1), tails[:, with_one.index(1.0)])
        coef = None if shape is None else shape.pack(shape.encode(hidden[part]))
        records.append(
            logits.encode(
                ids.cpu().numpy(),
                gaps.cpu().numpy(),
                tails[:, kept].cpu().numpy(),
                dtype,
                head.vocab,
                coef,
            )
        )
        ce.append((log_z - at_label).cpu().double().numpy())
        hits.append((at_label == 0).cpu().numpy())
    return np.concatenate(records), np.concatenate(ce), np.concatenate(hits)


def open_chunk(folder, settings, dtype, targets, rows):
    """Return a chunk's two memory maps, topk (targets,) and done (rows,): those of a killed dump
    with the same settings, or new ones."""
    if (folder / "done.npy").exists():
        if (
            seen := {"tail_rank": 0} | files.read_json(folder / "settings.json")
        ) != settings:  # 0: before there was a basis
            files.fail(
                f"{folder} was started with other settings",
                differing(seen, settings),
                "the same command",
                "--fresh to start it anew, or another --out",
            )
        topk, done = (
            np.lib.format.open_memmap(folder / name, mode="r+") for name in ("topk.npy", "done.npy")
        )
    else:  # done.npy appears last: once it is there, all three are whole
        files.write_json(folder / "settings.json", settings)
        topk = np.lib.format.open_memmap(
            folder / "topk.npy", mode="w+", dtype=dtype, shape=(targets,)
        )
        allocate(folder / "topk.npy")
        done = np.lib.format.open_memmap(
            folder / "done.npy.part", mode="w+", dtype=logits.DONE, shape=(rows,)
        )
        done.flush()
        (folder / "done.npy.part").replace(folder / "done.npy")
    return topk, done


@torch.inference_mode()
def dump(args, chunk, dataset, split, teacher, head, shape, settings, interrupt):
    """Write one chunk (or val) of a split, or what is missing of it."""
    folder = logits.chunk_folder(args.out, chunk)
    rows = np.arange(len(split.rows)) if chunk == "val" else np.asarray(dataset.chunk_rows(chunk))
    lengths, counts = split.rows["length"], split.rows["targets"]
    first = int(split.rows["first_target"][rows[0]])
    targets = int(counts[rows].sum())
    dtype = logits.record_dtype(args.k, args.temperatures, head.vocab, args.values, args.tail_bytes)

    folder.mkdir(parents=True, exist_ok=True)
    holding = files.lock(folder)
    if (folder / "meta.json").exists():
        print(f"dump {folder}: another process has finished it")
        return holding.release()
    topk, done = open_chunk(folder, settings, dtype, targets, len(rows))

    # batches of rows of like length; a batch is always whole, so that what is computed does not
    # depend on when we were killed
    batches = [
        [row for line in lines for row in line]
        for window in np.array_split(rows, -(-len(rows) // 4096))
        for lines in plan.microbatches(
            window, lengths, args.tokens_per_microbatch, int(lengths.max()), pack=False
        )
    ]
    left = [batch for batch in batches if not done["done"][np.asarray(batch) - rows[0]].all()]
    there = (
        f"; {len(batches) - len(left)} of {len(batches)} batches are there"
        if len(left) < len(batches)
        else ""
    )
    print(
        f"dump {folder}: {len(rows):,} rows, {targets:,} targets, {dtype.itemsize} bytes"
        f" each{there}",
        flush=True,
    )

    bar = tqdm(
        total=sum(int(counts[b].sum()) for b in left),
        desc=f"dump {chunk}",
        unit="target",
        unit_scale=True,
        disable=not sys.stderr.isatty(),
    )
    pending, flushed, said, made, seconds = [], time.monotonic(), time.monotonic(), 0, 0.0

    def flush():
        topk.flush()  # the records first, then the word that they are there
        for batch, sums, right in pending:
            index = np.asarray(batch) - rows[0]
            done["ce_sum"][index], done["hits"][index] = sums, right
            done["done"][index] = True
        done.flush()
        pending.clear()

    for number, batch_rows in enumerate(left):
        started = clock(teacher.device)
        batch = split.batch([[row] for row in batch_rows]).to(teacher.device)
        records, ce, hits = teacher_records(
            teacher, head, batch, args.k, args.temperatures, dtype, shape
        )
        seconds += clock(teacher.device) - started if number else 0.0  # the first one warms up
        made += len(records) if number else 0
        if not np.isfinite(ce).all():
            files.fail(
                "the teacher's logits are not finite",
                f"rows {batch_rows[:8]}",
                "numbers",
                "--dtype float32 (some models overflow float16)",
            )
        starts = np.concatenate([[0], np.cumsum(counts[batch_rows])[:-1]]).astype(int)
        for row, start in zip(batch_rows, starts):
            at = int(split.rows["first_target"][row]) - first
            topk[at : at + int(counts[row])] = records[start : start + int(counts[row])]
        pending.append(
            (batch_rows, np.add.reduceat(ce, starts), np.add.reduceat(hits.astype(int), starts))
        )
        bar.update(len(records))
        if interrupt.number or time.monotonic() - flushed > FLUSH_S:
            flush()
            flushed = time.monotonic()
            interrupt.leave(f"dump: saved {folder}; the same command continues")
        if bar.disable and time.monotonic() - said > 15:
            print(
                f"dump {chunk}: {number + 1} of {len(left)} batches"
                + (f", {made / seconds:.0f} targets/s" if seconds else ""),
                flush=True,
            )
            said = time.monotonic()
    flush()
    bar.close()

    assert done["done"].all(), "rows are missing"
    shares = logits.coverage(topk, args.temperatures, head.vocab)
    ce, acc1 = float(done["ce_sum"].sum() / targets), float(done["hits"].sum() / targets)
    meta = {
        "format": logits.FORMAT,
        "chunk": chunk,
        "targets": targets,
        "rows": len(rows),
        "bytes_per_target": dtype.itemsize,
        **settings,
        "identities": dataset.identities | {"teacher": settings["teacher"]},
        "teacher_ce": ce,
        "teacher_acc1": acc1,
        "coverage": shares,
        "sha256": files.sha256(folder / "topk.npy"),
        "versions": versions(),
    }
    files.write_json(folder / "meta.json", meta)
    (folder / "settings.json").unlink()
    speed = f"{made / seconds:.0f} targets/s" if seconds else "one batch"
    print(
        f"dump {folder}: done, {speed}, {dtype.itemsize} bytes a target, teacher ce {ce:.4f} acc1"
        f" {acc1:.4f}, "
        + "top-k coverage "
        + "  ".join(f"T={t}: {share:.3f}" for t, share in shares.items()),
        flush=True,
    )
    holding.release()


def main(argv=None):
    args = parse_args(argv)
    device = models.pick_device(args.device, args.threads)
    dataset = Dataset(args.data, args.trust_remote_code)
    if args.chunk.isdigit() and int(args.chunk) >= dataset.chunks:
        files.fail(
            f"chunk {args.chunk} does not exist",
            f"{dataset.chunks} chunks in {args.data}",
            f"0 to {dataset.chunks - 1}, val or all",
        )
    wanted = (
        [int(args.chunk)]
        if args.chunk.isdigit()
        else ["val"]
        if args.chunk == "val"
        else [*range(dataset.chunks), "val"]
    )
    if not len(dataset.val.rows) and "val" in wanted:
        print("dump: val is empty, so there is nothing to dump for it")
        wanted.remove("val")
    folder = checkpoints.local_folder(args.teacher, args.trust_remote_code)
    dtype = models.pick_dtype(args.dtype, device, folder)
    splits = {"train": dataset.train, "val": dataset.val}
    options = dict(
        dataset=dataset,
        attn=args.attn,
        compiled=args.compile,
        trust_remote_code=args.trust_remote_code,
    )
    if dataset.labels:
        splits = {name: classifier.read_by(dataset, name, folder, args) for name in splits}
        teacher = classifier.load(
            args.teacher, device, dtype, rows=list(splits.values()), **options
        )
        args.k, args.values, args.tail_rank = teacher.vocab, "fp16", 0
    else:
        teacher = models.load(args.teacher, device, dtype, pack=False, **options)
    plan.check(
        np.concatenate([split.rows["length"] for split in splits.values()]),
        args.tokens_per_microbatch,
    )
    teacher.module.requires_grad_(False)
    vocab = pick_vocab(args, teacher, dataset)
    head = teacher.head(vocab)
    most = (
        0 if args.k >= vocab - 1 else min(head.weight.shape[1], vocab - 1)
    )  # a rest of one token has no shape; logits move in no more dimensions
    if args.tail_rank > most:
        print(f"dump: --tail-rank {args.tail_rank} is cut to {most}: no more is there to be kept")
        args.tail_rank = most
    args.tail_bytes = min(args.tail_bytes, args.tail_rank)  # at most 8 bits a dimension
    settings = {
        "teacher": checkpoints.identity(folder),
        "teacher_folder": str(args.teacher),
        "data": dataset.identities["data"],
        "k": args.k,
        "rows_per_chunk": dataset.meta["rows_per_chunk"],
        "temperatures": args.temperatures,
        "values": args.values,
        "vocab": vocab,
        "tail_rank": args.tail_rank,
        "dtype": str(dtype),
        "tokens_per_microbatch": args.tokens_per_microbatch,
    }
    if args.tail_rank:
        settings["tail_bytes"] = args.tail_bytes

    # what is done is skipped; what is not has its size said and its room checked before the first
    # forward pass
    missing = []
    for chunk in wanted:
        meta = logits.chunk_folder(args.out, chunk) / "meta.json"
        if args.fresh or not meta.exists():
            missing.append(chunk)
            continue
        seen = {"tail_rank": 0} | files.read_json(meta)
        if differ := differing(
            seen,
            {
                k: v
                for k, v in settings.items()
                if k not in ("teacher_folder", "dtype", "tokens_per_microbatch")
            },
        ):
            files.fail(
                f"{meta.parent} is finished with other settings",
                differ,
                "the same command",
                "--fresh to dump it anew, or another --out",
            )
        print(f"dump {meta.parent}: already finished; nothing to do (--fresh dumps it anew)")
    size = logits.record_dtype(
        args.k, args.temperatures, vocab, args.values, args.tail_bytes
    ).itemsize
    need = sum(
        int(
            (dataset.val if c == "val" else dataset.train)
            .rows["targets"][slice(None) if c == "val" else dataset.chunk_rows(c)]
            .sum()
        )
        * size
        for c in missing
    )
    shape_path, shape_size = (
        Path(args.out) / basis.NAME,
        basis.file_bytes(args.tail_rank, vocab, head.weight.shape[1]),
    )
    if missing and not shape_path.exists():
        need += shape_size
    there = [
        logits.chunk_folder(args.out, c) / "topk.npy" for c in missing
    ]  # begun, or to be written anew
    have = files.free_bytes(args.out) + sum(path.stat().st_size for path in there if path.exists())
    print(
        f"teacher: {folder}, {teacher.parameters:,} parameters, {vocab:,} tokens, on {device},"
        f" {dtype}; the top {args.k}, the exact rest at T ="
        f" {', '.join(f'{t:g}' for t in args.temperatures)}"
        + (f", and its shape in {args.tail_bytes} bytes" if args.tail_rank else "")
    )
    shared = f", and {files.human(shape_size)} of basis for all chunks" if args.tail_rank else ""
    print(
        f"disk: {files.human(need)} to be written ({size} bytes a target{shared}),"
        f" {files.human(have)} free at {args.out}"
    )
    if need > have:
        files.fail(
            f"the disk of {args.out} is too small",
            f"{files.human(have)} free",
            files.human(need),
            "smaller --tail-bytes, --tail-rank or --k, --values u8, fewer --temperatures, or one"
            " --chunk at a time",
        )

    if args.tail_rank:
        basis_wanted(args, settings, missing)
    if args.fresh:  # everything that could be wrong was looked at before anything is deleted
        for chunk in missing:
            if (held := logits.chunk_folder(args.out, chunk) / ".lock").exists():
                files.lock(held.parent).release()  # refused while another process writes there
        for chunk in missing:
            files.remove_ours(
                logits.chunk_folder(args.out, chunk),
                ("meta.json", "settings.json", "topk.npy", "done.npy", ".lock"),
            )
    shape = None
    if args.tail_rank and missing:
        Path(args.out).mkdir(parents=True, exist_ok=True)
        shape, settings["basis"] = shared_basis(args, dataset, teacher, head, settings, missing)
    elif args.fresh and args.chunk == "all":
        (Path(args.out) / basis.NAME).unlink(missing_ok=True)
    interrupt = Interrupt()
    for chunk in missing:
        dump(
            args,
            chunk,
            dataset,
            splits["val" if chunk == "val" else "train"],
            teacher,
            head,
            shape,
            settings,
            interrupt,
        )
    print(f"dump: {Path(args.out)} holds what was asked for. Next: make stage2")


if __name__ == "__main__":
    main()
