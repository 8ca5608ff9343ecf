"""Stage 2, white-box distillation: train the student against the teacher's distribution at every
answer token.

    python stage2_kd.py --data data/distilqwen --logits logits/distilqwen --student \
        runs/distilqwen/stage1 --out runs/distilqwen/stage2
    # CPU, after `make demo`
    python stage2_kd.py --data data/demo --logits logits/demo --student runs/demo/stage1 --out \
        runs/try --steps 20
    # nothing is stored
    python stage2_kd.py --data data/demo --teacher runs/demo/teacher --student \
        runs/demo/stage1 --out runs/live --steps 20

Reads   data/NAME/ (prepare_data.py), logits/NAME/ (dump_logits.py; any subset of its chunks) or the
        teacher itself (lib/teacher/live.py), and a causal LM: stage 1's folder, or any other.
Writes  runs/NAME/stage2/: best/ final/ last/ history.jsonl samples.md curves.png config.json
        (lib/run.py says what each is).
Loss    alpha * T^2 * divergence + (1 - alpha) * cross-entropy, in nats, summed over targets,
        divided once by the targets of the whole optimizer step. The divergence is over the
        teacher's top k as stored, and the exact mass of the rest spread over all other tokens as
        the logits' basis says; without a basis, over the top k and one bucket (lib/losses.py,
        lib/teacher/basis.py). With --teacher it is over all tokens, each exact; with --k, over the
        top k and one bucket.
"""

import argparse
import re

import torch

from lib import evaluate, flags, losses, models, plan, teacher, train
from lib.data import Dataset
from lib.options import beside, classifier, gradnorm, lora, mix, samples, sampling
from lib.run import Run, clock
from lib.teacher import worth


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    group = parser.add_argument_group("read and write")
    flags.add(group, "--data")
    flags.add(group, "--student", "--out", "--eval-only")
    teacher.add_flags(parser)
    group = parser.add_argument_group("the method")
    group.add_argument(
        "--alpha",
        type=flags.moving,
        default=0.9,
        help=(
            "weight of the teacher; the rest is cross-entropy; 0.9->0.5: moving over the run"
            " (default: %(default)s)"
        ),
    )
    group.add_argument(
        "--temperature",
        type=flags.moving,
        default=2.0,
        help=(
            "T of the divergence; best one that was dumped; 4->2: moving over the run (default:"
            " %(default)s)"
        ),
    )
    group.add_argument(
        "--divergence",
        choices=losses.DIVERGENCES,
        default="fkl",
        help=(
            "forward KL, reverse KL, Jensen-Shannon, skewed KL, total variation (default:"
            " %(default)s)"
        ),
    )
    group.add_argument(
        "--beta",
        type=float,
        default=None,
        help="the teacher's share of the mixture in jsd and skl (default: 0.5 and 0.1)",
    )
    group.add_argument(
        "--best",
        type=flags.measure("kl", "ce", "acc1", "agree", "macro_f1"),
        default="kl",
        metavar="MEASURE",
        help=(
            "what best/ follows: kl, ce, acc1, agree, kl_NAME, ce_NAME of one source, macro_f1 of"
            " classes (default: %(default)s)"
        ),
    )
    beside.add_flags(parser.add_argument_group("losses beside the logits (--teacher)"))
    flags.add_trainer(parser)
    args = parser.parse_args(argv)
    flags.check_trainer(parser, args)
    teacher.check_flags(parser, args)
    beside.check_flags(parser, args)
    if not all(0 <= share <= 1 for share in flags.ends(args.alpha)):
        parser.error(f"--alpha is {args.alpha}, wanted a share from 0 to 1")
    if args.beta is None:
        args.beta = 0.1 if args.divergence == "skl" else 0.5
    if not 0 < args.beta < 1:
        parser.error(f"--beta is {args.beta}, wanted a share between 0 and 1")
    flags.positive(parser, args, "temperature")
    return args


def main(argv=None):
    args = parse_args(argv)
    device = models.pick_device(args.device, args.threads)
    amp = models.pick_amp(args.amp, device)
    dataset = Dataset(args.data, args.trust_remote_code)
    flags.check_labelled(args, dataset)
    evaluate.check_best(args.best, dataset, args.patience)
    store = teacher.open_teacher(args, dataset)
    best_by = args.best if store.compares else re.sub("^(kl|agree)", "ce", args.best)
    args.mix = mix.chosen(args.mix, dataset)
    rows_there, parts = (
        (None, []) if args.eval_only else mix.divide(args.mix, dataset, store.rows())
    )
    if args.eval_sampling and not parts and not args.eval_only:
        parts = mix.natural(dataset, rows_there)
    source = models.local_folder(args.student, args.trust_remote_code)
    models.check_apart(args.out, source)
    if args.eval_only and dataset.labels:
        return classifier.alone(args, dataset, source, device, amp, store, logits=args.logits)
    if not args.eval_only:
        models.check_trainable(source)
    lora.check_start(args, source, models.has_weights(source))
    inputs = (
        dataset.identities
        | {"student": models.identity(source)}
        | store.identity()
        | mix.identity(parts)
    )
    run = None if args.eval_only else Run(args, "stage2", inputs, best_by)

    load = classifier.load if dataset.labels else models.load
    student = load(
        args.student,
        device,
        dataset=dataset,
        attn=args.attn,
        compiled=args.compile,
        amp=amp,
        pack=not args.no_pack,
        trust_remote_code=args.trust_remote_code,
    )
    if args.lora_rank and not args.eval_only:
        lora.attach(student.module, args, source)
    student = store.join(student, args, amp)
    if args.eval_only:
        store.say()
        about = {"logits": args.logits} if args.logits else {"teacher": args.teacher, "k": args.k}
        return evaluate.alone(args, student, dataset, store.vocab, amp, store, **about)
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
    targets_there = int(dataset.train.rows["targets"][rows_there].sum())
    print(
        f"data: {len(rows_there):,} rows, {targets_there:,} targets; val {len(dataset.val.rows):,}"
        f" rows, {dataset.val.targets:,} targets"
    )
    print(
        f"plan: {steps} steps of about {args.tokens_per_step:,} tokens, evaluation every"
        f" {eval_every}"
    )
    mix.say(parts, dataset, steps_of_rows)
    store.say()
    if best_by != args.best:
        print(f"best/ follows {best_by}, since {args.best} cannot be measured")
    near = beside.build(args, student, store.model)
    for text in near.say():
        print(text)
    trained = torch.nn.ModuleList([student.module, near]) if near.weights else student.module
    if train.checkpointing_needed(
        student,
        args,
        amp,
        store.memory_bytes(device) + near.memory_bytes(args.tokens_per_microbatch, line),
    ):
        student.module.activation_checkpointing_enable({"use_reentrant": False})
    train.disk(args.out, student, whole=args.merge or not args.lora_rank)

    run.begin()
    student.module.train()
    optimizer = train.adamw(trained, args.lr, args.weight_decay, args.beta2, device)
    scaler = torch.amp.GradScaler(device.type, enabled=amp == torch.float16)
    run.restore(trained, optimizer, scaler)
    every = args.balance_every if args.balance == "gradnorm" else 0
    weigh = gradnorm.Balance(
        near.weights, every, near.shared() if every else [], run.more.get("balance")
    )
    taught = (
        samples.answers(store.model, dataset.val, tokenizer, args.samples, args.sample_tokens)
        if store.model
        else None
    )
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
                store,
                dataset.sources,
            )
            run.log("eval", step, **measures, **(sampler.hear(step, measures) if sampler else {}))
            steps_of_rows = sampler.steps_of_rows() if sampler else steps_of_rows
            if step == 0 and dataset.val.targets and (teachers := store.val_measures()):
                run.log("teacher", 0, **teachers)
                worth.teacher_can_teach(
                    teachers,
                    measures,
                    worth.unigram_ce(dataset.train, dataset.val, head.vocab),
                    run.say,
                )
                if dataset.labels:
                    worth.classifier_can_teach(teachers, measures, dataset, run.say)
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
                    taught,
                )
            if run.is_better(measures):
                run.export("best", student, tokenizer, step, measures)
        last = last or run.gives_up
        if last or run.stopping or step and step % save_every == 0:
            run.more |= {"balance": weigh.state} if every else {}
            run.save(step, trained, optimizer, scaler, measures)
        if last:
            run.export("final", student, tokenizer, step, measures)
            break

        # --- one optimizer step: sums over micro-batches, divided once by the targets of the whole
        # step
        started = clock(device)
        rows = steps_of_rows[step]
        targets = int(dataset.train.rows["targets"][rows].sum())
        alpha, temperature = (
            flags.at(args.alpha, step, steps),
            flags.at(args.temperature, step, steps),
        )
        method = losses.Method(alpha, temperature, args.divergence, args.beta)
        torch.manual_seed(args.seed * 1_000_003 + step)  # dropout, if the model has any
        sums, others = torch.zeros(3, device=device), torch.zeros(len(near.weights), device=device)
        lines_of_step = plan.microbatches(
            rows, lengths, args.tokens_per_microbatch, line, not args.no_pack
        )
        batches = (dataset.train.batch(lines).to(device) for lines in lines_of_step)
        batches = (
            list(batches) if "contrastive" in near.weights else batches
        )  # to be seen whole, first
        tokens, begun, pooled = int(lengths[rows].sum()), 0, near.pool_step(batches)
        for batch in batches:
            with near.watch("teacher"):
                kept = store.at(batch, temperature)
            with near.watch("student"), torch.autocast(device.type, amp, enabled=amp is not None):
                hidden = student.hidden(batch)  # (N, D)
            leaf = hidden.detach().requires_grad_() if near.weights else hidden
            loss_sum, ce_sum, kd_sum = losses.head_loss(leaf, head, batch.labels, kept, method, amp)
            scaler.scale(loss_sum / targets).backward()
            sums += torch.stack([loss_sum.detach(), ce_sum, kd_sum])
            # the logits' gradient goes on from the leaf into the body, together with the others'
            if near.weights:
                terms = near.terms(batch, tokens, len(rows), pooled, begun)
                weigh.backward(
                    hidden,
                    leaf.grad,
                    {name: scaler.scale(term) for name, term in terms.items()},
                    step,
                )
                others += torch.stack([term.detach() for term in terms.values()])
                begun += len(batch.rows)
        loss, ce, kd = (sums / targets).tolist()
        terms = dict(zip(near.weights, others.tolist()))
        for name, value in {"loss": loss, **terms}.items():
            run.check_finite(name, value, step, rows)
        pulls = weigh.move() if weigh.due(step) else {}
        lr = train.cosine(run.updates, steps, args.lr, args.warmup)
        norm = train.gradient_norm(optimizer, scaler, trained, args.clip)
        if amp != torch.float16:  # the scaler skips a step whose fp16 gradient overflows
            run.check_finite("gradient", norm, step, rows)
        taken = train.update(optimizer, scaler, lr)
        run.updates += taken
        run.tick(clock(device) - started, tokens)
        if step % args.log_every == 0 or pulls:
            moving = {"alpha": alpha} if isinstance(args.alpha, tuple) else {}
            moving |= {"temperature": temperature} if isinstance(args.temperature, tuple) else {}
            run.log(
                "train",
                step,
                loss=loss,
                kd=kd,
                ce=ce,
                **terms,
                **pulls,
                **moving,
                lr=lr,
                grad_norm=norm,
                targets=targets,
                **mix.realised(
                    parts, dataset, steps_of_rows[max(0, step + 1 - args.log_every) : step + 1]
                ),
                **run.pace(steps - step - 1),
            )

    run.finish(steps, step, measures, mix.realised(parts, dataset, steps_of_rows[:step]))
    print(f"stage2: wrote {run.out}/best and final. Talk to it: python chat.py --ckpt {run.out}")


if __name__ == "__main__":
    main()
