"""The map of lib/, and its one rule. The project distils a large language model (the teacher) into
a small one (the student): five scripts, and files on disk are all that passes between them.

    prepare_data.py   any data set                  -> data/NAME/          token ids, answer masks
    stage1_sft.py     data, a student               -> runs/NAME/stage1/   learns the answers
    dump_logits.py    data, the teacher             -> logits/NAME/        its records, once
    stage2_kd.py      data, stage 1's student, logits (or the teacher itself) -> runs/NAME/stage2/
    chat.py           any checkpoint                -> a conversation, a page and an API, scores

The core, flat: what every reader of a trainer needs, from the floor up.

    files        files that are whole or absent, checksums, schemas, locks, errors of one line
                 (`script`: also those of the disk)
    flags        flags that several scripts share: one name, one default, one text
    template     a tokenizer, loaded; a conversation -> token ids, which of them are answer tokens
    data         the prepared data set: memory maps, rows, batches
    plan         which rows go in which optimizer step and micro-batch: a pure function of the seed
    checkpoints  a model on disk: find it, check it, its identity, read adapters, save
    models       a model in memory: body (tokens -> hidden states) and head
    head         the output layer: hidden states -> logits, a chunk of targets at a time
    losses       the mathematics: cross-entropy, divergences, head_loss with its gradient
    train        what both trainers set up: AdamW, schedule, clipping, scaler; does it fit in memory
    evaluate     measures on val: CE, accuracy, calibration, KL to the teacher
    run          a run's folder: resume, log, best/ and final/, what happens on a kill
    generate     a model writes, many rows at once

Rooms: what one may leave out. Each room's __init__ lists its files.

    teacher/   whatever stands for the teacher in stage 2: record (the bytes), writer, shared (many
               writers at once), logits (the reader), verify, basis, fit and sample (the shape of a
               record's tail), served (a server fills it), imported (so does another tool's dump,
               which foreign reads; truncated: what both know of a distribution), across, translate
               and reread (a teacher with another tokenizer), several (teachers as one), live,
               placed (on several cards, or in 4 bits), parallel (in parts: --tp), quantised (what
               4 bits cost), worth (can it teach?), written (who wrote the rows?)
    options/   what a trainer can do without: lora, mix, sampling, bysource (a divergence for each
               source), onpolicy (the student's own text, live; with drift), beside (losses beside
               the logits; with capture, attention, gradnorm), classifier, ranks (several
               GPUs; with shard), tags, track, samples
    prepare/   for prepare_data.py: sources, places, hub, kinds, formats, schema, conversations,
               templates and asked (chat.py hands them over), rows, classes, workers, split,
               quality, export, describe, demo; answers that a model writes: answers, own (the
               student's), questions, ask (of a server), store
    measure/   for chat.py --score and `make compare`: score, labels, prompts; results, runs,
               compare, entries, page, panels, plots
    chat/      for chat.py: model, talk, terminal, heat; its server: serve, routes, api, engine,
               text, chat.html (the page), openapi.json

THE RULE. A flat file imports flat files only. A room imports flat files and itself, never another
room. Scripts import anything; nothing imports a script. What must pass from room to room is handed
over by the script, as an argument. tests/core/test_shape.py holds it.

Where is ...?

    the loss               losses.head_loss: alpha T^2 divergence + (1 - alpha) CE, in one pass
    ... a new divergence   one case in losses.divergence, its name in losses.DIVERGENCES
                           (--divergence offers it), its formula in tests/references.py
    several GPUs           options/ranks.py: torchrun, data parallel; a rank's rows: plan.dealt_to;
                           a student divided among them (FSDP): options/shard.py
    the optimizer step     written out in the loops of stage1_sft.py and stage2_kd.py, nowhere else
    the learning rate      train.cosine; memory and disk before the first step: train.make_room
    packing, batches       plan.microbatches and plan.Rows: which rows lie on one line; data.Batch
    a long row             plan.MASKED: above it a row lies alone, and attention needs no mask
    perplexity, KL, ...    evaluate.measure, at the val targets; BLEU and the like: measure/score.py
    the chat template      given to a tokenizer in prepare/templates.py; written by template.render
    records written        teacher/writer.py, class Writer, called by dump_logits.py; what a record
                           holds, byte by byte: teacher/record.py
    ... by many workers    teacher/shared.py: parts of chunks, leases (dump_logits.py --shared)
    records read           teacher/logits.py, class Records; their tail's shape: teacher/basis.py
    a live teacher         teacher/live.py, class LiveTeacher; what any teacher must answer, and
                           where one is chosen: teacher/__init__.py, class Teacher, open_teacher
    another tokenizer      the teacher's: teacher/across.py; refused where it is not asked for:
                           checkpoints.check_vocabulary
    a server asked         prepare/ask.py: any OpenAI-compatible one, for answers; the same client
                           for a teacher's records (teacher/served.py, vLLM's prompt_logprobs)
    our own server         chat/serve.py (start and stop), routes.py (Flask), api.py (OpenAI's API)
    kill -9                every file is written beside its target and renamed (files.py). A trainer
                           goes on from last/, saved every --save-every steps, and ends in the
                           same weights, bit for bit (run.py); --keep N: older states. A dump
                           writes the rows that done.npy lacks (class Writer). prepare_data.py goes
                           on at its last shard and asks for no answer twice (prepare/store.py).
                           Locks end with their process. SIGTERM, Ctrl-C: a trainer saves first. In
                           every case: the same command again
    an option (--mix ...)  one file of options/, with add_flags and check_flags; in each script that
                           takes it, its name in OPTIONS and the lines that use it. To delete one:
                           that file, those lines, its tests
    a shared flag          flags.py; a flag of one script: that script's parse_args; any new one
                           also in tests/core/flags.txt
    its tests              tests/ROOM as lib/ROOM (the flat files and the rule: tests/core; whole
                           runs: tests/pipeline): make test ROOM=teacher
"""
