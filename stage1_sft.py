"""Stage 1, black-box distillation: fine-tune a student on answers that a teacher wrote.

    python stage1_sft.py --data data/distilqwen --student Qwen/Qwen2.5-0.5B --out \
        runs/distilqwen/stage1
    # CPU, seconds, after `make demo`
    python stage1_sft.py --data data/demo --student demo/student-config --out runs/try --lr \
        2e-3 --steps 20

Reads   data/NAME/ (prepare_data.py) and a causal LM: a folder, a hub id, or a folder with a
        config.json alone (a new model).
Writes  runs/NAME/stage1/: best/ final/ last/ history.jsonl samples.md curves.png config.json
        (lib/run.py says what each is).
Loss    cross-entropy of the answer tokens in nats, summed, divided once by the targets of the whole
        optimizer step.
"""

import argparse

import numpy as np
import torch

from lib import evaluate, flags, losses, models, plan, train
from lib.data import Dataset
from lib.options import classifier, lora, mix, samples, sampling
from lib.run import Run, clock

METHOD = losses.Method(alpha=0.0)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    group = parser.add_argument_group("read and write")
    flags.add(group, "--data", "--student", "--out", "--eval-only")
    group = parser.add_argument_group("the method")
    group.add_argument(
        "--keep-layers",
        default="",
        metavar="0,5,10",
        help="start from these layers of --student alone (default: all)",
    )
    group.add_argument(
        "--best",
        type=flags.measure("ce", "acc1", "macro_f1"),
        default="ce",
        metavar="MEASURE",
        help=(
            "what best/ follows: ce, acc1, ce_NAME of one source, macro_f1 of classes (default:"
            " %(default)s)"
        ),
    )
    flags.add_trainer(parser)
    args = parser.parse_args(argv)
    flags.check_trainer(parser, args)
    try:
        args.keep_layers = [int(number) for number in args.keep_layers.split(",") if number]
    except ValueError:
        parser.error(f"--keep-layers is {args.keep_layers}, wanted numbers like 0,5,10")
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


def main(argv=None):
    args = parse_args(argv)
    device = models.pick_device(args.device, args.threads)
    amp = models.pick_amp(args.amp, device)
    dataset = Dataset(args.data, args.trust_remote_code)
    flags.check_labelled(args, dataset)
    evaluate.check_best(args.best, dataset, args.patience)
    args.mix = mix.chosen(args.mix, dataset)
    rows_there, parts = (
        (None, [])
        if args.eval_only
        else mix.divide(args.mix, dataset, np.arange(len(dataset.train.rows)))
    )
    if args.eval_sampling and not parts and not args.eval_only:
        parts = mix.natural(dataset, rows_there)
    source = models.local_folder(args.student, args.trust_remote_code)
    models.check_apart(args.out, source)
    if args.eval_only and dataset.labels:
        return classifier.alone(args, dataset, source, device, amp)
    if not args.eval_only:
        models.check_trainable(source)
    lora.check_start(args, source, models.has_weights(source))
    inputs = dataset.identities | {"student": models.identity(source)} | mix.identity(parts)
    run = None if args.eval_only else Run(args, "stage1", inputs, args.best)

    load = classifier.load if dataset.labels else models.load
    student = load(
        args.student,
        device,
        dataset=dataset,
        attn=args.attn,
        compiled=args.compile,
        amp=amp,
        pack=not args.no_pack,
        from_scratch=not args.eval_only,
        keep_layers=args.keep_layers,
        seed=args.seed,
        trust_remote_code=args.trust_remote_code,
    )
    if args.eval_only:
        return evaluate.alone(args, student, dataset, student.vocab, amp)
    tokenizer = dataset.tokenizer()
    models.stop_at(student, dataset.train.end_tokens(), tokenizer)
    head = student.head()

    lengths = dataset.train.rows["length"]
    plan.check(lengths[rows_there], args.tokens_per_microbatch)
    steps_of_rows = plan.whole_run(
        rows_there, lengths, args.seed, args.tokens_per_step, args.epochs, args.steps, parts
    )
    line = plan.line_length(lengths[rows_there], args.tokens_per_microbatch, args.attn)
    steps = len(steps_of_rows)
    sampler = None
    if args.eval_sampling:
        sampler = sampling.Sampler(
            parts,
            dataset,
            args.seed,
            args.tokens_per_step,
            steps,
            run.more.setdefault("sampling", {}),
        )
        steps_of_rows = sampler.steps_of_rows()
    eval_every = args.eval_every or max(1, steps // 10)
    save_every = args.save_every or eval_every

    print(
        f"student: {student.folder}, {student.parameters:,} parameters, {student.vocab:,} tokens,"
        f" on {device}, {amp or 'float32'}"
    )
    print(
        f"data: {len(lengths):,} rows, {dataset.train.targets:,} targets; val"
        f" {len(dataset.val.rows):,} rows, {dataset.val.targets:,} targets"
    )
    print(
        f"plan: {steps} steps of about {args.tokens_per_step:,} tokens, evaluation every"
        f" {eval_every}"
    )
    mix.say(parts, dataset, steps_of_rows)
    if args.lora_rank:
        lora.attach(student.module, args, source)
    if train.checkpointing_needed(student, args, amp):
        student.module.activation_checkpointing_enable({"use_reentrant": False})
    train.disk(args.out, student, whole=args.merge or not args.lora_rank)

    run.begin()
    student.module.train()
    optimizer = train.adamw(student.module, args.lr, args.weight_decay, args.beta2, device)
    scaler = torch.amp.GradScaler(device.type, enabled=amp == torch.float16)
    run.restore(student.module, optimizer, scaler)
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
                sources=dataset.sources,
            )
            run.log("eval", step, **measures, **(sampler.hear(step, measures) if sampler else {}))
            steps_of_rows = sampler.steps_of_rows() if sampler else steps_of_rows
            if args.samples:
                samples.write(
                    run.out / "samples.md",
                    student,
                    dataset.val,
                    tokenizer,
                    step,
                    args.samples,
                    args.sample_tokens,
                    amp,
                )
            if run.is_better(measures):
                run.export("best", student, tokenizer, step, measures)
        last = last or run.gives_up
        if last or run.stopping or step and step % save_every == 0:
            run.save(step, student.module, optimizer, scaler, measures)
        if last:
            run.export("final", student, tokenizer, step, measures)
            break

        # --- one optimizer step: sums over micro-batches, divided once by the targets of the whole
        # step
        started = clock(device)
        rows = steps_of_rows[step]
        targets = int(dataset.train.rows["targets"][rows].sum())
        torch.manual_seed(args.seed * 1_000_003 + step)  # dropout, if the model has any
        sums = torch.zeros(3, device=device)
        for lines in plan.microbatches(
            rows, lengths, args.tokens_per_microbatch, line, not args.no_pack
        ):
            batch = dataset.train.batch(lines).to(device)
            with torch.autocast(device.type, amp, enabled=amp is not None):
                hidden = student.hidden(batch)  # (N, D)
            loss_sum, ce_sum, kd_sum = losses.head_loss(
                hidden, head, batch.labels, None, METHOD, amp
            )
            scaler.scale(loss_sum / targets).backward()
            sums += torch.stack([loss_sum.detach(), ce_sum, kd_sum])
        loss, ce, _ = (sums / targets).tolist()
        run.check_finite("loss", loss, step, rows)
        lr = train.cosine(run.updates, steps, args.lr, args.warmup)
        norm = train.gradient_norm(optimizer, scaler, student.module, args.clip)
        if amp != torch.float16:  # the scaler skips a step whose fp16 gradient overflows
            run.check_finite("gradient", norm, step, rows)
        taken = train.update(optimizer, scaler, lr)
        run.updates += taken
        run.tick(clock(device) - started, int(lengths[rows].sum()))
        if step % args.log_every == 0:
            run.log(
                "train",
                step,
                loss=loss,
                ce=ce,
                lr=lr,
                grad_norm=norm,
                targets=targets,
                **mix.realised(
                    parts, dataset, steps_of_rows[max(0, step + 1 - args.log_every) : step + 1]
                ),
                **run.pace(steps - step - 1),
            )

    run.finish(steps, step, measures, mix.realised(parts, dataset, steps_of_rows[:step]))
    print(
        f"stage1: wrote {run.out}/best and final. Next: make logits, make stage2; or talk to it:"
        f" python chat.py --ckpt {run.out}"
    )


if __name__ == "__main__":
    main()
