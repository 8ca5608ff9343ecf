"""Stage 2, white-box distillation: train the student against the teacher's distribution at every
answer token.

    python stage2_kd.py --data data/distilqwen --logits logits/distilqwen --student runs/stage1 \\
        --out runs/stage2
    # CPU, seconds, after `make demo`; with --teacher nothing is stored
    python stage2_kd.py --data data/demo --logits logits/demo --student runs/demo/stage1 \\
        --out runs/try --steps 20
    python stage2_kd.py --data data/demo --teacher runs/demo/teacher --student runs/demo/stage1 \\
        --out runs/live --steps 20

Reads   data/NAME/ (prepare_data.py), logits/NAME/ (dump_logits.py; any subset of its chunks) or the
        teacher itself (lib/teacher/live.py), and a causal LM: stage 1's folder, or any other.
Writes  runs/NAME/stage2/: best/ final/ last/ history.jsonl samples.md curves.png config.json
        (lib/run.py says what each is).
Loss    alpha * T^2 * divergence + (1 - alpha) * cross-entropy (tvd: T, not T^2), in nats, summed
        over targets, divided once by the targets of the whole optimizer step. The divergence is
        over the teacher's top k as stored, and the exact mass of the rest spread over all other
        tokens as the logits' basis says; without a basis, over the top k and one bucket
        (lib/losses.py, lib/teacher/basis.py). With --teacher it is over all tokens, each exact;
        with --k, over the top k and one bucket.
"""

from pathlib import Path

import torch

from lib import checkpoints, data, evaluate, files, flags, losses, models, train
from lib import teacher as teachers
from lib.measure import plots
from lib.options import (
    beside,
    bysource,
    classifier,
    lora,
    mix,
    onpolicy,
    ranks,
    samples,
    sampling,
    tags,
    track,
)
from lib.run import clock
from lib.teacher import worth

STAGE = "stage2"
OPTIONS = (beside, mix, sampling, onpolicy, lora, samples, tags, track, ranks)


def next_step(args):
    """Return what comes next."""
    return "Talk to it"


def parse_args(argv=None):
    parser = flags.new_parser(__doc__)
    group = parser.add_argument_group("read and write")
    flags.add(group, "--data", "--student", "--out", "--eval-only")
    teachers.add_flags(parser)
    group = parser.add_argument_group("the method")
    group.add_argument(
        "--alpha",
        type=flags.by_source(flags.moving),
        default=0.9,
        help=(
            "weight of the teacher; the rest is cross-entropy; 0.9->0.5: moving over the run;"
            " 'given:0.9 own:1': by source (default: %(default)s)"
        ),
    )
    group.add_argument(
        "--temperature",
        type=flags.by_source(flags.moving),
        default=2.0,
        help=(
            "T of the divergence; best one that was dumped; 4->2: moving over the run; by source"
            " likewise (default: %(default)s)"
        ),
    )
    group.add_argument(
        "--divergence",
        type=flags.by_source(flags.choice_of(losses.DIVERGENCES)),
        default="fkl",
        metavar="|".join(losses.DIVERGENCES),
        help=(
            "forward KL, reverse KL, Jensen-Shannon, skewed KL and reverse KL, total variation;"
            " 'given:fkl own:rkl': by source (default: %(default)s)"
        ),
    )
    group.add_argument(
        "--beta",
        type=float,
        default=None,
        help=(
            "the teacher's share of the mixture in jsd and skl, the student's in srkl (default:"
            " 0.5, 0.1 and 0.1)"
        ),
    )
    group.add_argument(
        "--best",
        type=flags.best_measure("kl", "ce", "acc1", "agree", "macro_f1"),
        default="kl",
        metavar="MEASURE",
        help=(
            "what best/ follows: kl, ce, acc1, agree, kl_NAME, ce_NAME of one source, macro_f1 of"
            " classes (default: %(default)s)"
        ),
    )
    flags.add_trainer(parser)
    for option in OPTIONS:
        option.add_flags(parser)
    args = flags.parse_flags(parser, argv)
    flags.check_trainer(parser, args)
    teachers.check_flags(parser, args)
    for option in OPTIONS:
        option.check_flags(parser, args)
    if not all(0 <= share <= 1 for share in flags.ends(args.alpha)):
        parser.error(f"--alpha is {args.alpha}, wanted a share from 0 to 1")
    if args.beta is None and isinstance(args.divergence, str):
        args.beta = losses.BETA.get(args.divergence, 0.5)
    if args.beta is not None and not 0 < args.beta < 1:
        parser.error(f"--beta is {args.beta}, wanted a share between 0 and 1")
    flags.positive(parser, args, "temperature")
    return args


def measure_only(args, dataset, device, amp):
    """--eval-only: measure --student on val, also against the teacher, and write eval.json."""
    teacher = teachers.open_teacher(args, dataset)
    source = checkpoints.local_folder(args.student, args.trust_remote_code)
    checkpoints.check_apart(args.out, source)
    holding = None if args.dry_run else files.lock_beside(Path(args.out, "eval.json"))
    lora.check_start(args, source)
    if dataset.labels:
        student = classifier.to_measure(args, dataset, device)
    else:
        student = models.load(args.student, device, **train.loading(args, dataset, amp))
        student = teacher.join(student, args, amp)
    teacher.say()
    about = {"logits": args.logits} if args.logits else {"teacher": args.teacher, "k": args.k}
    about |= {"combine": args.combine} if args.combine else {}
    if teacher.compares:
        about |= {"kl_is_over": teacher.over, "kl_is_to": teacher.name}
    evaluate.alone(args, student, dataset, student.head().vocab, amp, teacher, **about)
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
    teacher = teachers.open_teacher(args, dataset, together)
    rows = onpolicy.open_rows(args, dataset, teacher.rows())
    rows.check()
    source = checkpoints.to_train(args.student, args.out, args.trust_remote_code, args.verify)
    lora.check_start(args, source)
    inputs = dataset.identities | {"student": checkpoints.identity(source)} | rows.identity()
    inputs |= teacher.identity()
    best = worth.best_by(args.best, teacher)
    tags.choose_out(args, STAGE, inputs)
    run = together.open(args, STAGE, inputs, best)
    rows.resume(run.more)

    load = classifier.load if dataset.labels else models.load
    student = load(args.student, **together.loading(device, train.loading(args, dataset, amp)))
    lora.attach(args, student)
    tokenizer = dataset.tokenizer()
    models.stop_at(student, dataset.train.end_tokens(), tokenizer)
    student = together.share(student, rows, amp, device)
    student = teacher.join(student, args, amp, rows)
    head = student.head()
    rows.lay(student, run.more)
    steps = rows.steps
    eval_every = args.eval_every or max(1, steps // 10)
    save_every = args.save_every or eval_every

    print(train.described(student, amp))
    rows.say(eval_every)
    teacher.say()
    near = beside.open_step(args, student, teacher.model, run.more, together)
    trained = near.beside(student.module)
    train.make_room(
        args,
        student,
        amp,
        rows,
        teacher.memory_bytes(device, train.largest(args, rows).targets),
        near.memory_bytes(args.tokens_per_microbatch, max(rows.line, int(rows.lengths.max()))),
        merge=args.merge,
    )

    together.divide(trained)
    run.begin(student, tokenizer)
    track.start(run, args.track)
    student.module.train()
    optimizer = train.adamw(trained, args.lr, args.weight_decay, args.beta2, device)
    scaler = torch.amp.GradScaler(device.type, enabled=amp == torch.float16)
    run.restore(trained, optimizer, scaler)
    written = samples.Samples(args, dataset, tokenizer)
    written.hear(teacher.model)
    run.progress(steps)
    measures = run.measures
    schedule = bysource.open_schedule(args, dataset, rows, steps)

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
                teacher,
                dataset.sources,
                together,
            )
            run.log("eval", step, **measures, **rows.hear(step, measures))
            worth.report(run, step, teacher, dataset, measures, student, tokenizer)
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
        batches = near.begin(batches, step, tokens, len(rows.of(step)))
        for batch in batches:
            method = schedule(step, batch)
            with near.watch("teacher"):
                known = teacher.at(batch, method.temperature)
            with near.watch("student"), torch.autocast(device.type, amp, enabled=amp is not None):
                hidden = student.hidden(batch)  # (N, D)
            leaf = near.cut(hidden)
            loss_sum, ce_sum, kd_sum = losses.head_loss(
                leaf, head, batch.labels, known, method, amp
            )
            scaler.scale(loss_sum / targets).backward()
            near.backward(batch, scaler)
            sums += torch.stack([loss_sum.detach(), ce_sum, kd_sum])
        together.add(trained, sums)
        figures = schedule.figures(step, sums, targets, near.end())
        run.check_finite(step, rows.of(step), **figures)
        lr = train.cosine(run.updates, steps, args.lr, args.warmup)
        norm = train.gradient_norm(optimizer, scaler, trained, args.clip)
        if amp != torch.float16:  # the scaler skips a step whose fp16 gradient overflows
            run.check_finite(step, rows.of(step), gradient=norm)
        run.count(step, train.update(optimizer, scaler, lr))
        run.tick(clock(device) - started, tokens)
        if step % args.log_every == 0 or near.moved:
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
