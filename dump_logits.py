"""Run the teacher once over the data and write its top-k logits, with the exact mass and the shape
of the rest, to memory-mapped arrays.

    python dump_logits.py --data data/distilqwen --teacher Qwen/Qwen2.5-7B-Instruct \\
        --student Qwen/Qwen2.5-0.5B --out logits/distilqwen --chunk 3
    # what is there, against its checksums, and 1,000 targets against the teacher
    python dump_logits.py --data data/distilqwen --teacher Qwen/Qwen2.5-7B-Instruct \\
        --out logits/distilqwen --verify 1000
    # a teacher behind a server that scores token ids (vLLM): T = 1 alone, no shape of the rest
    python dump_logits.py --data data/distilqwen --teacher-url http://HOST:8000/v1 \\
        --teacher-model NAME --student Qwen/Qwen2.5-0.5B --out logits/served
    # what another tool has dumped (easydistill, axolotl, distillkit, verl): the same limits
    python dump_logits.py --data data/distilqwen --import logits.jsonl --format easydistill \\
        --student Qwen/Qwen2.5-0.5B --out logits/imported
    # any number of these at once, on hosts with one disk, divide what is missing; how far they are
    python dump_logits.py --data data/distilqwen --teacher Qwen/Qwen2.5-7B-Instruct \\
        --student Qwen/Qwen2.5-0.5B --out logits/distilqwen --shared
    python dump_logits.py --data data/distilqwen --out logits/distilqwen --status
    # CPU, seconds, after `make demo`
    python dump_logits.py --data data/demo --teacher runs/demo/teacher --out logits/try --chunk val

Reads   data/NAME/ (prepare_data.py) and a causal LM with the data's vocabulary; of rows with a
        class each, a classifier of these labels, whose own tokenizer reads the rows' texts: all its
        class logits are written, so that --k, --values, --tail-rank, --vocab and --student are not
        asked.
Writes  logits/NAME/chunk-0003/ (or val/): topk.npy, one record a target; done.npy; meta.json, last
        (lib/teacher/record.py says what they hold); logits/NAME/basis.safetensors, once for all
        chunks: what the coefficients of the rest refer to (lib/teacher/basis.py).
Killed anywhere, the same command goes on with the rows that are missing, and the file is bit for
bit the same.
"""

import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from lib import checkpoints, files, flags, models, plan, train
from lib.data import Dataset
from lib.options import classifier, ranks
from lib.prepare import ask
from lib.run import Interrupt, clock
from lib.teacher import (
    across,
    basis,
    fit,
    imported,
    parallel,
    placed,
    quantised,
    record,
    served,
    shared,
    translate,
    verify,
    worth,
    writer,
    written,
)


def parse_args(argv=None):
    parser = flags.new_parser(__doc__)
    group = parser.add_argument_group("read and write")
    flags.add(group, "--data")
    group.add_argument(
        "--teacher",
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
    writer.add_flags(group)
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
    group.add_argument(
        "--verify",
        type=int,
        nargs="?",
        const=0,
        metavar="N",
        help=(
            "write nothing: check every byte of what is there by its checksum, and let the teacher"
            " score N random targets again; exit code 1 if something is wrong"
        ),
    )
    group.add_argument(
        "--status",
        action="store_true",
        help="write nothing: how far the chunks of --out are, who is at work, and until when",
    )
    group = parser.add_argument_group("the machine")
    group.add_argument(
        "--shared",
        action="store_true",
        help="one of many workers, on any hosts that share --out, each with the same command",
    )
    flags.add(group, "--tokens-per-microbatch", "--device", "--dtype", "--threads", "--attn")
    flags.add(group, "--compile", "--fresh", "--dry-run", "--trust-remote-code")
    parallel.add_flags(group)
    served.add_flags(parser)
    across.add_flags(parser)
    imported.add_flags(parser)
    args = parser.parse_args(argv)
    if args.status:
        return args
    if args.shared:
        shared.check_flags(parser, args)
    if not imported.check_flags(parser, args):
        served.check_flags(parser, args, ask.KEYS)
    across.check_flags(parser, args)
    parallel.check_flags(parser, args)
    writer.check_flags(parser, args)
    if args.chunk not in ("all", "val") and not args.chunk.isdigit():
        parser.error(f"--chunk is {args.chunk}, wanted a number, all or val")
    if (args.verify or 0) < 0 or args.verify is not None and args.fresh:
        parser.error(f"--verify is {args.verify}, wanted 0 or more, and no --fresh beside it")
    return args


def chunks_wanted(args, dataset):
    """Return the chunks that --chunk names: numbers, and "val"; with rows (of --only)."""
    found, only = chunks_named(args, dataset), writer.only_sources(args, dataset).get("only")
    wanted = [chunk for chunk in found if writer.has_rows(dataset, chunk, only)]
    if without := [str(chunk) for chunk in found if chunk not in wanted]:
        print(f"dump: chunk {', '.join(without)}: no row of {' '.join(args.only)} is in it")
    return wanted


def chunks_named(args, dataset):
    """Return the chunks that --chunk names, and say where there is no val."""
    if args.chunk.isdigit():
        if int(args.chunk) < dataset.chunks:
            return [int(args.chunk)]
        files.fail(
            f"chunk {args.chunk} does not exist",
            f"{dataset.chunks} chunks in {args.data}",
            f"0 to {dataset.chunks - 1}, val or all",
        )
    train = list(range(dataset.chunks)) if args.chunk == "all" else []
    if len(dataset.val.rows):
        return [*train, "val"]
    print("dump: val is empty, so there is nothing to dump for it")
    return train


@dataclass
class Job:
    """What every chunk of a dump needs: a teacher, cut to the tokens that the student knows too,
    and the rows that it reads, by split. others: who makes a split's records, for a teacher with
    other tokens. shape: the basis of its tails, once there is one. cost: of --teacher-quant, for
    meta.json."""

    dataset: Dataset
    teacher: models.Model
    splits: dict
    others: dict = field(default_factory=dict)
    shape: basis.Basis | None = None
    cost: dict = field(default_factory=dict)


def load_teacher(args, dataset, folder, device, dtype, peers=None):
    """Return the dump's teacher and the rows that it reads: a classifier's own tokenizer reads
    their texts, and so does that of a teacher with other tokens."""
    others, cost = {}, {}
    splits = {"train": dataset.train, "val": dataset.val}
    options = dict(
        dataset=dataset,
        attn=args.attn,
        compiled=args.compile,
        trust_remote_code=args.trust_remote_code,
    )
    if dataset.labels:
        for flag in ("teacher_quant", "device_map", "tp"):
            if getattr(args, flag):
                said = f"{flags.spelled(flag)} is for causal LMs"
                files.fail(said, f"{dataset.folder} has a class a row", mend="without it")
        splits = {name: classifier.read_by(dataset, name, folder, args) for name in splits}
    if across.is_asked(args):
        others, table = across.read_rows(args, dataset, folder)
        splits = {name: one.theirs for name, one in others.items()}
        options["dataset"] = None
    lengths = [split.rows["length"] for split in splits.values()]
    plan.check_lengths(np.concatenate(lengths), args.tokens_per_microbatch)
    if dataset.labels:
        rows = list(splits.values())
        teacher = classifier.load(args.teacher, device, dtype, rows=rows, **options)
        args.k, args.values, args.tail_rank = teacher.vocab, "fp16", 0
    elif others:
        teacher = models.load(args.teacher, device, dtype, pack=False, **options)
        teacher = translate.translated(teacher, table)
    else:
        apart = models.check_fits(folder, dataset, args.trust_remote_code, teacher=True)
        placing = parallel.placing_of(peers, folder, device) if args.tp else None
        options |= dict(apart=apart, placing=placing)
        teacher, cost = load_placed(args, dataset, folder, device, dtype, options)
    teacher.module.requires_grad_(False)
    teacher = cut(args, teacher, dataset)
    teacher = parallel.in_parts(teacher, peers) if args.tp else teacher
    return Job(dataset, teacher, splits, others, cost=cost)


def load_placed(args, dataset, folder, device, dtype, options):
    """Return a teacher, as --teacher-quant or --device-map say, and what the first costs (where it
    is to be dumped)."""
    whole = None
    placed.check_placing(args, folder)
    if args.device_map:
        shapes = checkpoints.shapes(folder)
        beside = placed.beside_bytes(shapes, args.tokens_per_microbatch, dtype)
        room = train.available_bytes(device) - beside
        words = folder, dtype, device, room, beside, args.trust_remote_code
        options = options | {"placing": placed.over_cards(*words)}
    if args.teacher_quant:
        if (
            args.verify is None
            and not args.dry_run
            and quantised.has_room(folder, device, dtype, args)
        ):
            teacher = cut(
                args, models.load(args.teacher, device, dtype, pack=False, **options), dataset
            )
            whole = quantised.states_at_rows(teacher, dataset.train, args.tokens_per_microbatch)
            del teacher
        options = options | {"placing": placed.in_bits(args.teacher_quant, device, dtype)}
    teacher = models.load(args.teacher, device, dtype, pack=False, **options)
    if whole is None:
        return teacher, {}
    ours = quantised.states_at_rows(
        cut(args, teacher, dataset), dataset.train, args.tokens_per_microbatch
    )
    cost = quantised.nats_lost(args.teacher_quant, whole, ours, args.temperatures)
    return teacher, {"quantised": cost}


def cut(args, teacher, dataset):
    """Return the teacher cut to V, the tokens both models know (the smaller output layer), before
    softmax and top-k on both sides, and without those that are other tokens to one of them."""
    if dataset.labels:
        return replace(teacher, limit=teacher.vocab)
    vocab, apart = args.vocab or teacher.vocab, {*teacher.apart}
    if args.student:
        folder = checkpoints.local_folder(args.student, args.trust_remote_code)
        if not args.vocab:
            vocab = min(vocab, checkpoints.tokens_of(folder))
        apart |= {*models.check_fits(folder, dataset, args.trust_remote_code)}
    known = len(dataset.tokenizer())
    if vocab < known:  # works where no row holds the others
        known = max(dataset.used(), default=0) + 1
    if not known <= vocab <= teacher.vocab:
        files.fail(
            "V does not fit",
            vocab,
            f"from {known} (the tokenizer's tokens) to {teacher.vocab} (the teacher's output"
            " layer)",
            "--vocab 0",
        )
    teacher = replace(teacher, limit=vocab, apart=tuple(sorted(apart)))
    without = teacher.head().apart
    left = vocab - (0 if without is None else len(without))
    if args.k > left:
        files.fail("k does not fit", f"--k {args.k}", f"at most V = {left}", f"--k {left}")
    return teacher


def plan_of(job, chunk, settings):
    """Return what a writer.ChunkPlan is made of, and what scores its batches: rows -> records, the
    teacher's cross-entropy and hits."""
    dataset, name = job.dataset, "val" if chunk == "val" else "train"
    split, other, head = job.splits[name], job.others.get(name), job.teacher.head()
    score = other.records if other else writer.teacher_records
    wanted = settings["k"], settings["temperatures"], record.dtype_of(settings), job.shape

    def scored(rows):
        batch = split.batch([[row] for row in rows.tolist()]).to(job.teacher.device)
        head.parts.told((name, rows.tolist()))  # to those that have a part of the teacher
        return score(job.teacher, head, batch, *wanted)

    rows, lengths = writer.rows_of(dataset, chunk), split.rows["length"]
    plan = chunk, getattr(dataset, name), rows, settings, lengths, other and other.lost
    return plan, scored


def new_bar(what, total=None):
    hidden = not sys.stderr.isatty()
    return tqdm(total=total, desc=what, unit="target", unit_scale=True, disable=hidden)


def dump(out, chunk, job, settings, interrupt, holding):
    """Write one chunk (or val), or what is missing of it. holding: its lock, if there is one."""
    folder = record.chunk_folder(out, chunk)
    holding = holding or files.lock(folder)
    if (folder / "meta.json").exists():
        print(f"dump {folder}: another process has finished it")
        return holding.release()
    shared.check_begun(out, [chunk], False)  # again, now that the lock is ours
    plan, scored = plan_of(job, chunk, settings)
    made = writer.Writer(folder, *plan)
    batches, left = len(made.batches), len(made.left)
    print(
        f"dump {folder}: {len(made.rows):,} rows, {made.targets:,} targets, {made.dtype.itemsize}"
        " bytes each"
        + (f"; {batches - left} of {batches} batches are there" if left < batches else ""),
        flush=True,
    )
    bar = new_bar(f"dump {chunk}", sum(int(made.counts[rows].sum()) for rows in made.left))
    targets, seconds, said, speed = 0, 0.0, time.monotonic(), "one batch"
    begun = time.monotonic()

    for number, rows in enumerate(made.left):
        started = clock(job.teacher.device)
        records, ce, hits = scored(rows)
        if number:  # the first one warms up
            seconds += clock(job.teacher.device) - started
            targets += len(records)
            speed = f"{targets / seconds:.0f} targets/s"
        made.add(rows, records, ce, hits)
        bar.update(len(records))
        if interrupt.number:
            made.flush()
            job.teacher.head().parts.told(None)
            interrupt.leave(f"dump: saved {folder}; the same command continues")
        if bar.disable and time.monotonic() - said > 15:
            print(f"dump {chunk}: {number + 1} of {left} batches, {speed}", flush=True)
            said = time.monotonic()
    bar.close()
    finish(made, job, folder, time.monotonic() - begun, speed)
    holding.release()


def dump_shared(args, out, wanted, job, settings):
    """Write chunks as one of many workers: part after part, until all are there, by whomever."""
    with shared.Worker(out, Interrupt()) as worker:
        print(f"dump: worker {worker.name}", flush=True)
        if args.tail_rank:
            job.shape, settings["basis"] = worker.shared_basis(
                job.splits["train"], job.teacher, settings, wanted
            )
        bar, said = new_bar(f"dump {worker.name}"), time.monotonic()

        for chunk, number in shared.tasks(worker, wanted, lambda one: plan_of(job, one, settings)):
            with worker.unless_finished(chunk.place):
                if number == shared.MERGE:
                    made = chunk.merge()
                    finish(made, job, chunk.place, chunk.age_s(made), worker.speed)
                    chunk.publish(made)
                    continue
                batches = []
                for rows in chunk.parts[number]:
                    started = clock(job.teacher.device)
                    batches.append(chunk.scored(rows))
                    count = len(batches[-1][0])
                    worker.count(count, clock(job.teacher.device) - started)
                    bar.update(count)
                    worker.leave()
                chunk.put(number, batches)
            if bar.disable and time.monotonic() - said > 15:
                print(f"dump {worker.told['doing']}, {worker.speed}", flush=True)
                said = time.monotonic()
        bar.close()


def finish(made, job, place, seconds, speed):
    """End a chunk, which took so many seconds, and say what is in it; place: where it will lie."""
    # apart from what is the same whatever the machine
    cost = {"dumped_s": round(seconds, 1), "checksums": {}}
    files.write_json(made.folder / writer.COST_FILE, cost)
    dataset, alone = job.dataset, job.teacher.head().parts.world == 1
    asked = made.chunk == "val" and not dataset.labels and not job.others and alone
    more = job.cost | ({"answers": worth.answered(job.teacher, dataset)} if asked else {})
    meta = made.finish(dataset.identities, dataset.sources, **more)
    print(
        f"dump {place}: done, {speed}, {made.dtype.itemsize} bytes a target, teacher ce"
        f" {meta['teacher_ce']:.4f} acc1 {meta['teacher_acc1']:.4f}, top-k coverage "
        + "  ".join(f"T={t}: {share:.3f}" for t, share in meta["coverage"].items()),
        flush=True,
    )
    for line in writer.errors_said(meta):
        print(line, flush=True)


def unfinished(args, wanted, out, settings):
    """Return the chunks that are to be dumped, and say which are there."""
    missing = []
    for chunk in wanted:
        place = record.chunk_folder(out, chunk)
        if args.fresh or not writer.is_finished(place, settings):
            missing.append(chunk)
        else:
            print(f"dump {place}: already finished; nothing to do (--fresh dumps it anew)")
    return missing


def look_again(args, dataset, wanted, out, device):
    """--verify: check what is there by its checksums, and N targets by the teacher."""
    there = verify.check_chunks(out, wanted, dataset)
    if args.verify:
        folder = checkpoints.local_folder(args.teacher, args.trust_remote_code)
        checkpoints.check_written(folder, verify=True)
        dtype = models.pick_dtype(args.dtype, device, folder)
        args.k = min(part.meta["k"] for part in there.values())
        for part in there.values():
            if (bits := part.meta.get("teacher_quant")) != args.teacher_quant:
                seen, wanted = (one or "none" for one in (args.teacher_quant, bits))
                files.fail(f"{part.folder} is of another --teacher-quant", seen, wanted)
        job = load_teacher(args, dataset, folder, device, dtype)
        who = job.teacher, checkpoints.identity(folder)
        verify.against_teacher(there, args.verify, dataset, job.splits, *who)
    print(f"verify: {out} is in order")


@files.script
def main(argv=None):
    args = parse_args(argv)
    files.check_out(args.out)
    if not args.tp:
        ranks.refuse_several()
    peers = ranks.assemble(args) if args.tp else None
    device = models.pick_device(args.device, args.threads)
    dataset = Dataset(args.data, args.trust_remote_code, args.verify is not None)
    wanted, out = chunks_wanted(args, dataset), Path(args.out)
    if args.status:
        return shared.say_status(out, dataset, wanted)
    if args.verify is not None:
        return look_again(args, dataset, wanted, out, device)
    if args.teacher_url:
        return served.dump(args, dataset, wanted, out, ask)
    if args.import_:
        return imported.convert(args, dataset, wanted, out)
    placed.check_packages(args)
    folder = checkpoints.local_folder(args.teacher, args.trust_remote_code)
    dtype = models.pick_dtype(args.dtype, device, folder)
    writer.check_files(folder, dataset, wanted, args)
    parts = peers.world if peers else placed.cards(args, device)
    writer.say_memory(folder, dtype, device, args, dataset, parts)
    job = load_teacher(args, dataset, folder, device, dtype, peers)
    teacher = job.teacher
    parts = teacher.head().parts
    settings = writer.dump_settings(args, dataset, checkpoints.identity(folder), teacher, dtype)
    settings |= across.settings_across(job.others, teacher)

    # what is done is skipped; what is not has its size said and its room checked before the first
    # forward pass, and everything that could be wrong is looked at before anything is deleted
    missing = parts.lead(unfinished, args, wanted, out, settings)
    if other := written.other_teacher(dataset, [(args.teacher, settings["teacher"])]):
        print(other)
    print(
        f"teacher: {folder}, {teacher.parameters:,} parameters, {teacher.limit:,} tokens, on"
        f" {device}, {dtype}; the top {args.k}, the exact rest at T ="
        f" {', '.join(f'{t:g}' for t in args.temperatures)}"
        + (f", and its shape in {args.tail_bytes} bytes" if args.tail_rank else "")
    )
    width = teacher.head().weight.shape[1]
    parts.lead(writer.check_disk, out, dataset, missing, settings, width)
    parts.lead(shared.check_begun, out, missing, args.shared)
    anew = args.fresh and args.chunk == "all"
    if args.tail_rank:
        parts.lead(fit.check_basis, out, settings, missing, anew)
    if args.dry_run:
        return print("--dry-run: nothing was written")
    if args.shared:
        dump_shared(args, out, wanted, job, settings)
    else:
        held = writer.empty_chunks(out, missing) if args.fresh and not parts.rank else {}
        if args.tail_rank and missing:
            job.shape, settings["basis"] = fit.shared_basis(
                out, job.splits["train"], teacher, settings, missing, anew
            )
        elif anew and not parts.rank:
            (out / basis.FILE).unlink(missing_ok=True)

        if parts.rank:
            return parallel.follow(job, settings)
        interrupt = Interrupt()
        for chunk in missing:
            dump(out, chunk, job, settings, interrupt, held.get(chunk))
        parts.told(None)
    name = Path(args.data).name
    student = f"runs/{name}/stage1"
    if not Path(student).exists():
        student = args.student or "STUDENT"
    words = ["--data", args.data, "--logits", args.out, "--student", student]
    words += [] if 2.0 in args.temperatures else ["--temperature", f"{args.temperatures[0]:g}"]
    following = files.command("stage2_kd.py", *words, "--out", f"runs/{name}/stage2")
    print(f"dump: {out} holds what was asked for. Next: {following}")


if __name__ == "__main__":
    main()
