"""Stage 1, black-box distillation: fine-tune a student on answers that a teacher wrote.

    python stage1_sft.py --data data/distilqwen --student Qwen/Qwen2.5-0.5B --out runs/stage1
    # CPU, seconds, after `make demo`
    python stage1_sft.py --data data/demo --student demo/student-config --out runs/try --steps 20

Reads   data/NAME/ (prepare_data.py) and a causal LM: a folder, a hub id, or a folder with a
        config.json alone (a new model).
Writes  runs/NAME/stage1/: best/ final/ last/ history.jsonl samples.md curves.png config.json
        (lib/run.py says what each is).
Loss    cross-entropy of the answer tokens in nats, summed, divided once by the targets of the whole
        optimizer step.
"""

import re
from pathlib import Path

import torch

from lib import checkpoints, data, evaluate, files, flags, losses, models, train
from lib.measure import plots
from lib.options import bysource, classifier, lora, mix, ranks, samples, sampling, tags, track
from lib.run import clock

STAGE = "stage1"
OPTIONS = (mix, sampling, lora, samples, tags, track, ranks)
METHOD = losses.Method(alpha=0.0)


def next_step(args):
    """Return what comes next, as commands that work as they are, but for the teacher's name."""
    if (Path(args.student) / "history.jsonl").exists():  # a control, or a second pass
        return "Talk to it"
    out, logits = Path(args.out), f"logits/{Path(args.data).name}"
    given = ["--data", args.data, "--student", args.out]
    dump = files.command("dump_logits.py", *given, "--teacher", "TEACHER", "--out", logits)
    given += ["--logits", logits, "--out", out.with_name("stage2")]
    return f"Next: {dump}, then {files.command('stage2_kd.py', *given)}; or talk to it"


def parse_args(argv=None):
    parser = flags.new_parser(__doc__)
    group = parser.add_argument_group("read and write")
    flags.add(group, "--data", "--student", "--out", "--eval-only")
    group = parser.add_argument_group("the method")
    group.add_argument(
        "--keep-layers",
        default="",
        metavar="0,5,10",
        help="start from these layers of --student alone, or evenly:12 of them (default: all)",
    )
    group.add_argument(
        "--best",
        type=flags.best_measure("ce", "acc1", "macro_f1"),
        default="ce",
        metavar="MEASURE",
        help=(
            "what best/ follows: ce, acc1, ce_NAME of one source, macro_f1 of classes"
            " (default: %(default)s)"
        ),
    )
    flags.add_trainer(parser)
    for option in OPTIONS:
        option.add_flags(parser)
    args = flags.parse_flags(parser, argv)
    flags.check_trainer(parser, args)
    for option in OPTIONS:
        option.check_flags(parser, args)
    given = args.keep_layers
    even = re.fullmatch(r"evenly:([1-9]\d*)", given)
    try:
        args.keep_layers = int(even[1]) if even else [int(i) for i in given.split(",") if i]
    except ValueError:
        parser.error(f"--keep-layers is {given}, wanted numbers like 0,5,10, or evenly:12")
    if args.keep_layers and args.eval_only:
        parser.error(
            "--keep-layers and --eval-only exclude each other: what is measured is a checkpoint as"
            " it is"
        )
    if args.keep_layers and args.lora_rank:
        parser.error(
            "--keep-layers and --lora-rank exclude each other: an adapter's base must lie on the"
            " disk"
        )
    return args


def measure_only(args, dataset, device, amp):
    """--eval-only: measure --student on val and write eval.json."""
    source = checkpoints.local_folder(args.student, args.trust_remote_code)
    checkpoints.check_apart(args.out, source)
    holding = None if args.dry_run else files.lock_beside(Path(args.out, "eval.json"))
    lora.check_start(args, source)
    if dataset.labels:
        student = classifier.to_measure(args, dataset, device)
    else:
        student = models.load(args.student, device, **train.loading(args, dataset, amp))
    evaluate.alone(args, student, dataset, student.head().vocab, amp)
    holding.release()


@files.script
def main(argv=None):
    args = parse_args(argv)
    files.check_out(args.out)
    together = ranks.meet(args)
    device = models.pick_device(args.device, args.threads)
    amp = models.pick_amp(args.amp, device)
    dataset = data.Dataset(args.data, args.trust_remote_code, args.verify)
    classifier.adapt_flags(args, dataset)
    evaluate.check_best(args.best, dataset, args.patience)
    if args.eval_only:
        return measure_only(args, dataset, device, amp)

    # what is read, and the run that it belongs to
    rows = bysource.referenced(sampling.open_rows(args, dataset))
    rows.check()
    source = checkpoints.to_train(args.student, args.out, args.trust_remote_code, args.verify)
    lora.check_start(args, source)
    inputs = dataset.identities | {"student": checkpoints.identity(source)} | rows.identity()
    best = args.best
    tags.choose_out(args, STAGE, inputs)
    run = together.open(args, STAGE, inputs, best)
    rows.resume(run.more)

    load = classifier.load if dataset.labels else models.load
    student = load(
        args.student,
        from_scratch=True,
        keep_layers=args.keep_layers,
        seed=args.seed,
        **together.loading(device, train.loading(args, dataset, amp)),
    )
    lora.attach(args, student)
    tokenizer = dataset.tokenizer()
    models.stop_at(student, dataset.train.end_tokens(), tokenizer)
    student = together.share(student, rows, amp, device)
    head = student.head()
    rows.lay(student, run.more)
    steps = rows.steps
    eval_every = args.eval_every or max(1, steps // 10)
    save_every = args.save_every or eval_every

    print(train.described(student, amp))
    rows.say(eval_every)
    trained = student.module
    train.make_room(args, student, amp, rows, merge=args.merge)

    together.divide(trained)
    run.begin(student, tokenizer)
    track.start(run, args.track)
    student.module.train()
    optimizer = train.adamw(trained, args.lr, args.weight_decay, args.beta2, device)
    scaler = torch.amp.GradScaler(device.type, enabled=amp == torch.float16)
    run.restore(trained, optimizer, scaler)
    written = samples.Samples(args, dataset, tokenizer)
    run.progress(steps)
    measures = run.measures

    # one pass more than `steps`: step 0 scores the untouched student, the last pass scores the
    # finished one
    for step in range(run.step, steps + 1):
        last = step == steps
        if (last or step % eval_every == 0) and step != run.resumed:
            measures = evaluate.evaluate(
                student,
                dataset.val,
                head.vocab,
                args.tokens_per_microbatch,
                amp,
                None,
                dataset.sources,
                together,
            )
            run.log("eval", step, **measures, **rows.hear(step, measures))
            written.write(run.page("samples.md"), student, step, amp)
            if run.is_better(measures):
                run.export("best", student, tokenizer, step, measures, args.merge)
        last = last or run.gives_up
        if last or run.stopping or step and step % save_every == 0:
            run.save(step, trained, optimizer, scaler, measures)
        if last:
            run.export("final", student, tokenizer, step, measures, args.merge)
            break

        # --- one optimizer step: sums over micro-batches, divided once by the targets of the whole
        started = clock(device)
        targets, tokens = rows.targets(step), rows.tokens(step)
        # dropout, if the model has any
        torch.manual_seed(args.seed * 1_000_003 + step + (together.rank << 40))
        sums = torch.zeros(3, device=device)
        batches = rows.batches(step, device)
        for batch in batches:
            with torch.autocast(device.type, amp, enabled=amp is not None):
                hidden = student.hidden(batch)  # (N, D)
            loss_sum, ce_sum, kd_sum = losses.head_loss(
                hidden, head, batch.labels, None, METHOD, amp
            )
            scaler.scale(loss_sum / targets).backward()
            sums += torch.stack([loss_sum.detach(), ce_sum, kd_sum])
        together.add(trained, sums)
        loss, ce, kd = (sums / targets).tolist()
        figures = {"loss": loss, "ce": ce}
        run.check_finite(step, rows.of(step), **figures)
        lr = train.cosine(run.updates, steps, args.lr, args.warmup)
        norm = train.gradient_norm(optimizer, scaler, trained, args.clip)
        if amp != torch.float16:  # the scaler skips a step whose fp16 gradient overflows
            run.check_finite(step, rows.of(step), gradient=norm)
        run.count(step, train.update(optimizer, scaler, lr))
        run.tick(clock(device) - started, tokens)
        if step % args.log_every == 0:
            shares = rows.shares(max(0, step + 1 - args.log_every), step + 1)
            pace = run.pace(steps - step - 1)
            run.log(
                "train", step, **figures, lr=lr, grad_norm=norm, targets=targets, **shares, **pace
            )

    plots.curves(run.history, run.out / "curves.png", STAGE)
    run.finish(steps, step, measures, rows.shares(0, step))
    said = f"{STAGE}: wrote {run.out}/best and final. {next_step(args)}"
    print(f"{said}: {files.command('chat.py', '--ckpt', run.out)}")


if __name__ == "__main__":
    main()
