"""Turn any instruction, chat or text data into token ids and answer masks: what every later stage
reads.

    python prepare_data.py --source train.parquet --tokenizer Qwen/Qwen2.5-0.5B-Instruct \\
        --out data/mine
    # seconds
    python prepare_data.py --source train.parquet --tokenizer Qwen/Qwen2.5-0.5B-Instruct \\
        --out data/small --limit 500 --val 50 --show 3
    # text, label: rows with a class each
    python prepare_data.py --source reviews.csv --tokenizer DIR --out data/reviews \\
        --task classify
    # prompts alone: a teacher answers them, run here or by a server of any kind
    python prepare_data.py --source asked.jsonl --tokenizer DIR --out data/asked \\
        --answers teacher --teacher DIR
    python prepare_data.py --source asked.jsonl --tokenizer DIR --out data/asked \\
        --answers teacher --teacher-url http://HOST:8000/v1 --teacher-model X
    # the student's own text, for another round of stage 2; what data/mine holds out stays held out
    python prepare_data.py --source asked.jsonl --out data/mine-own1 --val data/mine \
        --answers student --student runs/mine/stage2 --generations 4

Reads   --source     [NAME=]WHERE, as often as there are sources. WHERE: a file, folder or glob; a
                     hub id org/name[:split][@revision]; a URI (s3://, gs://, hdfs://). Parquet,
                     arrow, json, jsonl, csv, tsv or txt (text also packed); the schema is found
                     from the column names, or --columns says it. FOLDER:test: another split
        --tokenizer  a folder or hub id; its chat template decides what a conversation looks like
        --teacher    with --answers teacher: a model folder, or an OpenAI-compatible server, that
                     answers the prompts anew; --student with --answers student
Writes  --out        {train,val}.{tokens,answer,rows}.npy (see lib/data.py), val.prompts.jsonl,
                     tokenizer/, meta.json last, and report.png: how long rows are, where they come
                     from, why others were dropped
                     answers/: the teacher's or the student's, as parquet (lib/prepare/store.py); a
                     run continues there, and --fresh keeps them. A student's may be a --source
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

import contextlib
import functools
import itertools
import shutil
import sys
import time
from pathlib import Path

from tqdm import tqdm

from lib import data, files, flags, template
from lib.measure import plots
from lib.options import mix
from lib.prepare import answers, classes, describe, export, own, rows, sources, split, workers
from lib.prepare.store import Store

SHAPING = (
    "task source tokenizer chat_template template_args encoding columns system max_len long turns"
    " think val limit rows_per_chunk mix seed"
).split()
# a killed run goes on after the last whole shard; what is said meanwhile
SHARD_ROWS, SHARD_TOKENS, SAY_EVERY_S = 10_000, 1 << 24, 8


def parse_args(argv=None):
    parser = flags.new_parser(__doc__)
    # --- read and write
    sources.add_flags(parser)
    parser.add_argument(
        "--tokenizer",
        metavar="DIR|ID",
        help=(
            "tokenizer of the teacher and the student: a folder or a hub id (default with --answers"
            " student: the student's)"
        ),
    )
    flags.add(parser, "--chat-template", "--template-args", "--out")
    export.add_flags(parser)
    # --- what a row is
    classes.add_flags(parser)
    rows.add_flags(parser)
    # --- which rows
    parser.add_argument(
        "--val",
        default="0.02",
        metavar="X|DIR",
        help=(
            "validation rows: a share below 1; a count; or those whose prompts another prepared"
            " folder holds out, answered once whatever --generations (default: %(default)s)"
        ),
    )
    parser.add_argument(
        "--limit",
        type=int,
        default=0,
        metavar="N",
        help=(
            "stop after N kept rows, of several sources each its share (--mix, else by their rows"
            " where all files say how many, else evenly); 0 = off (default: %(default)s)"
        ),
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
    describe.add_flags(parser)
    flags.add(parser, "--seed", "--fresh", "--dry-run", "--trust-remote-code")
    answers.add_flags(parser)
    args = parser.parse_args(argv)
    for option in (answers, classes, rows, export, sources):
        option.check_flags(parser, args)
    flags.positive(parser, args, "rows_per_chunk")
    for name in ("limit", "workers", "show", "seed"):
        if getattr(args, name) < 0:
            parser.error(f"--{name} is {getattr(args, name)}, wanted 0 or more")
    rows.check_val(parser, args)
    if not args.tokenizer and args.answers != "student":
        parser.error("--tokenizer is missing: that of the teacher and the student")
    names = [name for name, _ in args.wanted]
    try:
        shares = mix.parse(args.mix) if args.mix else dict.fromkeys(names)
    except ValueError as wrong:
        parser.error(f"--mix: {wrong}")
    if set(shares) != set(names):
        parser.error(
            f"--mix: saw the names {', '.join(shares)}, wanted those of the sources:"
            f" {', '.join(names)}"
        )
    args.weights = {name: pair and pair[0] for name, pair in shares.items()}
    return args


def each_row(partial, inputs, args, written, tokenizer, progress, kept):
    """Yield ((source, file), row, encoded row) of all rows, in their order; progress.full: sources
    of which no more are wanted."""
    encode = functools.partial(rows.encode_batch, partial / "tokenizer", args)
    if written:
        progress.quotas = [-1] * len(inputs)  # so many were asked
        passes = [itertools.islice(written.rows, progress.read.total(), None)]
    else:
        passes = sources.passes(inputs, args, args.limit, progress, kept)
    for numbered in passes:
        numbered = rows.short_of(numbered, tokenizer, args)
        with contextlib.closing(workers.encoded_rows(numbered, encode, args.workers)) as encoded:
            for number, row, result in encoded:
                if len(progress.full) == len(inputs):
                    break
                if number[0] not in progress.full:
                    yield number, row, result


def stage(partial, inputs, args, written, tokenizer, texts, progress, val_rows):
    """Encode all rows into temporary files in their order, and the kept ones as text into `texts`,
    if given; note now and then how far it has come. Return what was staged."""
    seen = split.Seen()
    staging, said = split.Staging(partial, progress.sizes), time.time()
    staging.replay(seen, val_rows)
    read, lost, saved, begun = progress.read, progress.lost, staging.tokens.count, time.time()
    counts = [file.count for source in inputs for file in source.files]
    total = written.count if written else None if None in counts else sum(counts)
    bar = tqdm(total=total, unit="row", desc="prepare", disable=not sys.stderr.isatty())
    bar.update(read.total())
    encoded = each_row(partial, inputs, args, written, tokenizer, progress, staging.kept)
    with bar, contextlib.closing(encoded):
        for number, row, result in encoded:
            read[number] += 1
            bar.update()
            if bar.disable and (read.total() % 50_000 == 0 or time.time() - said > SAY_EVERY_S):
                said = time.time()
                print(
                    f"prepare rows={read.total()} kept={staging.count}"
                    f" tokens={staging.tokens.count} time_s={said - begun:.1f}",
                    flush=True,
                )
            several = isinstance(result, list)
            if several:
                progress.cut[0] += 1
                progress.cut[1] += len(result)
            for one in result if several else [result]:
                if not isinstance(one, str) and one.digest and not seen.add(one.digest):
                    one = "duplicate"
                if isinstance(one, str):
                    lost[number[0], one] += 1
                    continue
                staging.append(one.ids, one.answer, number[0], one.prompt, one.logp)
                if args.think == "drop" and not isinstance(row, str):
                    row = template.without_think(row)
                if val_rows.candidate(one.prompt) and not isinstance(row, str):
                    staging.append_prompt(rows.prompt_of_row(row), one.reference)
                if texts:
                    texts.append(one.reference if several else row, args.wanted[number[0]][0])
                if staging.kept[number[0]] == progress.quotas[number[0]]:
                    progress.full.add(number[0])
                    break
            if args.limit and staging.count == args.limit:
                break
            if read.total() % SHARD_ROWS == 0 or staging.tokens.count - saved > SHARD_TOKENS:
                saved = staging.tokens.count
                staging.save(progress)
    if texts:
        texts.close()
    staged = staging.close()
    return split.Staged(staged, val_rows.mask(staged["prompt"]), read, lost, progress.cut)


def write(partial, staged, inputs, args, shaping, tokenizer, dated, written, texts):
    """Divide the staged rows into train and val; the folder is whole once meta.json is in it.
    Return what that says."""
    if texts:
        export.write_splits(
            partial / "staged.texts.parquet", partial / "rows", staged.is_val, sorted(texts.keys)
        )
    split.write_sides(partial, staged)

    meta = describe.facts_of_rows(inputs, staged, args, shaping)
    parts = split.on_both_sides(partial, split.FILES)
    if args.task == "classify":
        meta |= classes.facts_of_classes(partial, staged.labels)
        parts += split.on_both_sides(partial, classes.LABEL_FILES)
    meta["identities"] = {**template.identities(tokenizer), "data": files.sha256(*parts)}
    meta |= {"date": dated} if dated else {}
    meta |= rows.told_of(tokenizer, inputs)
    meta |= own.facts_of_own(inputs, args, written)
    if written and args.answers == "teacher":
        meta["teacher"] = written.meta
    meta["checksums"] = files.checksums(partial)
    files.write_json(partial / "meta.json", meta)
    plots.prepared(partial)
    return meta


def hand_over(out, args, meta):
    """Tell what is in the finished folder, and write its rows where --export and --push-to-hub
    say."""
    describe.show_rows(out, args.show)
    describe.print_table(out, meta)
    describe.say_small(meta)
    export.deliver(out / "rows", args)
    describe.say_next(out, meta)


@files.script
def main(argv=None):
    args = parse_args(argv)
    files.check_out(args.out)
    out = Path(args.out)
    # to another disk, perhaps: renames must stay on one; and beside "." there is nothing
    if out.is_symlink() or out.name in ("", ".."):
        out = out.resolve()
    settings = answers.settings(args)
    held_out = rows.held_out(args)
    shaping = {name: getattr(args, name) for name in SHAPING} | answers.shaping(args, settings)
    partial = files.beside(out, "part")
    if not args.dry_run:
        # from the first moment: two would empty each other's folder
        holding = files.lock_beside(out)
        files.recover(out, split.NOTED)
    if (meta := describe.finished(out, args, shaping)) is not None:
        print(f"prepare done: {out} is finished already (--fresh makes it anew)")
        return None if args.dry_run else hand_over(out, args, meta)

    # --- look at everything that can be wrong before anything is written
    with files.telling("looking at the sources"):
        inputs = sources.open_all(args)
    for source in inputs:
        commit = f" commit={source.commit}" if source.commit else ""
        print(
            f"prepare source={source.name} where={source.where}{commit} files={len(source.files)}"
            f" schema={source.described}",
            flush=True,
        )
    if not args.dry_run:
        export.begin(args, inputs)
    tokenizer = template.load_tokenizer(args.tokenizer, args.trust_remote_code)
    with files.telling("trying the chat template"):
        dated = rows.make_template_ready(tokenizer, inputs, args)
    for source in inputs if args.show else ():
        numbered = rows.short_of(sources.all_rows([source], args.system), tokenizer, args)
        most = -(-args.show // len(inputs))
        describe.show_first(numbered, source.name, args, tokenizer, most)
    if args.dry_run:
        return describe.dry_run(out, args, inputs, tokenizer)
    store = Store(out / files.NEVER_DELETED, settings) if settings else None
    if args.fresh:
        files.remove_ours(out, ("train.rows.npy",))
    val_rows = split.ValRows(held_out)
    written = answers.answer_all(store, inputs, args, tokenizer, val_rows) if store else None

    # --- tokenize into temporary files, then divide them into train and val
    key = describe.staging_key(inputs, written, args, shaping, tokenizer)
    progress = split.Progress.found(partial, key)
    if progress.sizes:
        print(f"prepare goes on: {progress.read.total():,} rows were read before", flush=True)
    else:
        partial = files.partial_folder(out)
    tokenizer.save_pretrained(partial / "tokenizer")
    rows.saved_tokenizer.cache_clear()  # another run of this process may have used the same folder
    # later stages load this one: so does this run
    tokenizer = rows.saved_tokenizer(partial / "tokenizer", args.trust_remote_code)
    texts = None
    if export.keeps_text(args):
        texts = export.RowWriter(partial / "staged.texts.parquet", inputs, bool(written))
    try:
        if args.task == "classify":
            numbered = rows.short_of(sources.all_rows(inputs), tokenizer, args)
            staged = classes.stage(partial, numbered, inputs, tokenizer, args)
        else:
            staged = stage(partial, inputs, args, written, tokenizer, texts, progress, val_rows)
        if written:
            staged.read, staged.lost = written.read, staged.lost + written.lost
        split.refuse_empty(staged)
        rows.say_held_out(args, staged)
    except SystemExit:  # rows that cannot be learnt: nothing of them is left behind
        if not (partial / split.NOTED).exists():
            shutil.rmtree(partial)
        raise
    with files.telling("writing train and val"):
        meta = write(partial, staged, inputs, args, shaping, tokenizer, dated, written, texts)
    files.publish(partial, out)
    holding.release()
    ends = set(data.Split(out, "train").end_tokens())
    if args.task == "language" and not ends & template.special_ids(tokenizer):
        print(
            "prepare warning: no special token ends nine answers in ten: the student will not learn"
            " where to stop",
            flush=True,
        )
    hand_over(out, args, meta)


if __name__ == "__main__":
    main()
