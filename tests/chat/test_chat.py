import io
import json
import re
import shutil

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaForCausalLM,
)

import chat
from lib import checkpoints, files, template
from lib.chat import model, talk, terminal
from lib.measure import prompts, score
from lib.prepare import demo, templates

QUESTIONS = [
    "Ann has 38 apples. She buys 45 more. How many apples does Ann have now?",
    "Tom has 71 pens and Eva has 12. How many pens do they have together?",
    "Leo has 69 eggs.",
    "There are 50 toys in a box. Mia takes 21 out. How many toys are in the box?",
    "How many?",
]
SHORT = ["--device", "cpu", "--threads", "1", "--max-new-tokens", "12"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A random model of 2 layers and width 32, its weights large enough that its answers wander,
    with the tokenizer of the demo."""
    torch.manual_seed(0)
    config = demo.config(
        {
            "num_hidden_layers": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        }
    )
    config.initializer_range = 0.3
    model = LlamaForCausalLM(config)
    folder = tmp_path_factory.mktemp("model") / "tiny"
    model.save_pretrained(folder)
    demo.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def prompt_file(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(
        "".join(
            json.dumps({"prompt": question, "reference": str(number)}) + "\n"
            for number, question in enumerate(QUESTIONS)
        )
    )
    return path


def plain(folder, question, decoded=True, **options):
    """What transformers itself answers to a question, or to the last of several messages: as text,
    or as token ids (which a random model's text does not always give again)."""
    tokenizer, model = (
        AutoTokenizer.from_pretrained(folder),
        AutoModelForCausalLM.from_pretrained(folder).eval(),
    )
    messages = [{"role": "user", "content": question}] if isinstance(question, str) else question
    ids = torch.tensor([template.prompt_ids(tokenizer, messages)])
    written = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=12,
        **({"do_sample": False} | options),
    )
    written = written[0, ids.shape[1] :]
    return tokenizer.decode(written, skip_special_tokens=True) if decoded else written.tolist()


def test_a_checkpoint_that_switches_its_cache_off_is_answered_by(checkpoint, tmp_path, capsys):
    """Trainers that checkpoint gradients leave `use_cache: false` in what they save."""
    shutil.copytree(checkpoint, tmp_path / "off")
    for name in ("config.json", "generation_config.json"):
        path = tmp_path / "off" / name
        told = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(told | {"use_cache": False}))
    for question in QUESTIONS:
        chat.main(["--ckpt", str(tmp_path / "off"), "--prompt", question, *SHORT, "--greedy"])
        assert capsys.readouterr().out.strip() == plain(checkpoint, question).strip()


def answers(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def conversation(monkeypatch, capsys, checkpoint, lines, *options):
    """Run the conversation on these lines of input and return what was printed."""
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))
    chat.main(["--ckpt", str(checkpoint), "--greedy", *SHORT, *options])
    return capsys.readouterr().out


def refused(capsys, argv, code):
    """Return the one line that a refused command prints."""
    with pytest.raises(SystemExit) as stop:
        chat.main(argv)
    if code == 2:
        assert stop.value.code == 2
        return capsys.readouterr().err.strip().splitlines()[-1]
    assert (
        isinstance(stop.value.code, str) and "\n" not in stop.value.code
    )  # a string leaves with exit code 1
    return stop.value.code


def test_greedy_answer_equals_plain_transformers(checkpoint, capsys):
    for question in QUESTIONS[:3]:
        chat.main(["--ckpt", str(checkpoint), "--greedy", "--prompt", question, *SHORT])
        assert capsys.readouterr().out == plain(checkpoint, question) + "\n"


def test_batched_answers_equal_single_ones_in_the_order_of_the_file(
    checkpoint, prompt_file, tmp_path
):
    chat.main(
        [
            "--ckpt",
            str(checkpoint),
            "--greedy",
            "--prompts",
            str(prompt_file),
            "--out",
            str(tmp_path / "out.jsonl"),
            "--batch-size",
            "3",
            *SHORT,
        ]
    )
    assert answers(tmp_path / "out.jsonl") == [
        {"prompt": q, "reference": str(n), "answer": plain(checkpoint, q)}
        for n, q in enumerate(QUESTIONS)
    ]


def test_messages_are_answered_as_prompts_are(checkpoint, prompt_file, tmp_path):
    lines = [
        json.dumps({"messages": [{"role": "user", "content": question}]}) + "\n"
        for question in QUESTIONS
    ]
    (tmp_path / "messages.jsonl").write_text("".join(lines))
    for name in ("prompts", "messages"):
        paths = [
            "--prompts",
            str(tmp_path / f"{name}.jsonl"),
            "--out",
            str(tmp_path / f"{name}.out"),
        ]
        chat.main(["--ckpt", str(checkpoint), "--greedy", *paths, *SHORT])
    assert [a["answer"] for a in answers(tmp_path / "messages.out")] == [
        a["answer"] for a in answers(tmp_path / "prompts.out")
    ]


@pytest.mark.parametrize(
    "whole_lines, torn", [(2, b'{"prompt": "torn'), (3, b""), (0, b"{"), (5, b"")]
)
def test_a_killed_file_continues_to_the_bytes_of_a_straight_run(
    checkpoint, prompt_file, tmp_path, capsys, whole_lines, torn
):
    out, part = tmp_path / "out.jsonl", tmp_path / "out.jsonl.part"
    command = [
        "--ckpt",
        str(checkpoint),
        "--prompts",
        str(prompt_file),
        "--out",
        str(out),
        "--batch-size",
        "2",
        "--temperature",
        "1.5",
        *SHORT,
    ]
    chat.main(command)
    straight = out.read_bytes()
    out.unlink()
    part.write_bytes(b"".join(line + b"\n" for line in straight.split(b"\n")[:whole_lines]) + torn)
    chat.main([*command, "--batch-size", "3"])  # each prompt's seed is its own
    assert out.read_bytes() == straight and not part.exists()


def test_a_sampled_answer_depends_on_its_seed_and_on_no_neighbour(
    checkpoint, prompt_file, tmp_path
):
    def sampled(name, seed="1", more=()):
        chat.main(
            [
                "--ckpt",
                str(checkpoint),
                "--prompts",
                str(prompt_file),
                "--out",
                str(tmp_path / name),
                "--temperature",
                "1.5",
                "--seed",
                seed,
                *SHORT,
                *more,
            ]
        )
        return [row["answer"] for row in answers(tmp_path / name)]

    first = sampled("a")
    assert sampled("b", more=("--batch-size", "1")) == first != sampled("c", seed="9")
    assert sampled("d", more=("--limit", "2")) == first[:2]
    prompt_file.write_text(
        "".join(json.dumps({"prompt": question}) + "\n" for question in [QUESTIONS[0]] * 5)
    )
    assert len({*sampled("e")}) > 1


def test_an_answer_in_a_file_is_that_of_the_model_alone_when_a_word_ends_it(
    checkpoint, prompt_file, tmp_path
):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    whole = tokenizer(plain(checkpoint, QUESTIONS[0]), add_special_tokens=False).input_ids
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    (folder / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [5, whole[3]], "pad_token_id": 1})
    )
    files_ = ["--prompts", str(prompt_file), "--out", str(tmp_path / "out.jsonl")]
    chat.main(["--ckpt", str(folder), "--greedy", *files_, *SHORT])
    assert [row["answer"] for row in answers(tmp_path / "out.jsonl")] == [
        plain(folder, question) for question in QUESTIONS
    ]


@pytest.mark.parametrize("strange", ["memory", "settings"])
def test_a_model_whose_rows_cannot_be_mixed_answers_a_file_one_by_one(
    checkpoint, prompt_file, tmp_path, capsys, strange
):
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    if strange == "settings":
        own = {"no_repeat_ngram_size": 2, "eos_token_id": 5, "pad_token_id": 1}
        (folder / "generation_config.json").write_text(json.dumps(own))
    else:
        torch.manual_seed(0)
        config = Lfm2Config(  # a convolution has a state, and no keys
            vocab_size=demo.config({}).vocab_size,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            layer_types=["conv", "full_attention"],
            block_multiple_of=8,
            eos_token_id=5,
            pad_token_id=1,
            initializer_range=0.3,
        )
        Lfm2ForCausalLM(config).save_pretrained(folder)
    command = ["--ckpt", str(folder), "--prompts", str(prompt_file), *SHORT]
    chat.main([*command, "--greedy", "--out", str(tmp_path / "greedy")])
    assert "answered one at a time" in capsys.readouterr().out
    wanted = [plain(folder, question) for question in QUESTIONS]
    assert [row["answer"] for row in answers(tmp_path / "greedy")] == wanted
    command += ["--temperature", "1.5", "--out", str(tmp_path / "sampled")]
    chat.main(command)
    straight = (tmp_path / "sampled").read_bytes()
    (tmp_path / "sampled").unlink()
    (tmp_path / "sampled.part").write_bytes(b"".join(straight.splitlines(keepends=True)[:3]))
    chat.main(command)
    assert (tmp_path / "sampled").read_bytes() == straight


def test_a_continued_file_does_not_answer_again_what_it_has(checkpoint, prompt_file, tmp_path):
    out, part = tmp_path / "out.jsonl", tmp_path / "out.jsonl.part"
    command = [
        "--ckpt",
        str(checkpoint),
        "--greedy",
        "--prompts",
        str(prompt_file),
        "--out",
        str(out),
        "--batch-size",
        "2",
        *SHORT,
    ]
    chat.main(command)
    lines = out.read_text().splitlines(keepends=True)
    out.unlink()
    part.write_text('{"answer": "kept 0"}\n{"answer": "kept 1"}\n' + lines[2])
    chat.main(command)
    assert [a["answer"] for a in answers(out)] == [
        "kept 0",
        "kept 1",
        *(json.loads(line)["answer"] for line in lines[2:]),
    ]


def test_a_finished_file_is_left_alone(checkpoint, prompt_file, tmp_path, capsys):
    command = [
        "--ckpt",
        str(checkpoint),
        "--greedy",
        "--prompts",
        str(prompt_file),
        "--out",
        str(tmp_path / "out.jsonl"),
        *SHORT,
    ]
    chat.main(command)
    before = (tmp_path / "out.jsonl").stat().st_mtime_ns
    with pytest.raises(SystemExit) as stop:
        chat.main(command)
    assert stop.value.code == 0 and "finished already" in capsys.readouterr().out
    assert (tmp_path / "out.jsonl").stat().st_mtime_ns == before


@pytest.mark.parametrize("change", ["--max-new-tokens=5", "--system=Add", "prompts", "weights"])
def test_other_settings_are_refused_until_fresh(checkpoint, prompt_file, tmp_path, capsys, change):
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    command = [
        "--ckpt",
        str(folder),
        "--greedy",
        "--prompts",
        str(prompt_file),
        "--out",
        str(tmp_path / "out.jsonl"),
        *SHORT,
    ]
    chat.main(command)
    if change == "prompts":
        prompt_file.write_text(prompt_file.read_text() + '{"prompt": "one more"}\n')
    elif change == "weights":
        model = AutoModelForCausalLM.from_pretrained(folder)
        with torch.no_grad():
            model.get_input_embeddings().weight *= 0.5
        model.save_pretrained(folder)
    else:
        command.append(change)
    assert "--fresh" in refused(capsys, command, 1)
    chat.main([*command, "--fresh"])


def test_a_file_that_chat_did_not_write_is_never_overwritten(
    checkpoint, prompt_file, tmp_path, capsys
):
    (tmp_path / "thesis.txt").write_text("three years of work")
    refused(
        capsys,
        [
            "--ckpt",
            str(checkpoint),
            "--prompts",
            str(prompt_file),
            "--out",
            str(tmp_path / "thesis.txt"),
            "--fresh",
            *SHORT,
        ],
        1,
    )
    assert (tmp_path / "thesis.txt").read_text() == "three years of work"


@pytest.mark.parametrize(
    "made, asked",
    [
        ("stage2/best", "stage2"),
        ("stage2/final", "stage2"),
        ("stage2/best", "stage2/best"),
        ("plain", "plain"),
    ],
)
def test_stage_folders_and_plain_checkpoints_are_found(checkpoint, tmp_path, capsys, made, asked):
    shutil.copytree(checkpoint, tmp_path / made)
    if made != "plain":
        (tmp_path / "stage2" / "config.json").write_text('{"settings": {}}')
        (tmp_path / "stage2" / "history.jsonl").touch()
    chat.main(["--ckpt", str(tmp_path / asked), "--greedy", "--prompt", QUESTIONS[0], *SHORT])
    assert capsys.readouterr().out == plain(checkpoint, QUESTIONS[0]) + "\n"


def test_best_is_preferred_to_final(checkpoint, tmp_path, capsys):
    shutil.copytree(checkpoint, tmp_path / "best")
    (tmp_path / "final").mkdir()
    chat.main(["--ckpt", str(tmp_path), "--greedy", "--prompt", "How many?", *SHORT])
    assert capsys.readouterr().out == plain(checkpoint, "How many?") + "\n"


def test_defaults_come_from_the_checkpoints_generation_config(checkpoint, tmp_path, capsys):
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    own = {
        "do_sample": True,
        "temperature": 2.0,
        "max_new_tokens": 12,
        "eos_token_id": 5,
        "pad_token_id": 1,
    }
    (folder / "generation_config.json").write_text(json.dumps(own))
    torch.manual_seed(3)
    wanted = plain(folder, QUESTIONS[0], do_sample=True)
    chat.main(["--ckpt", str(folder), "--prompt", QUESTIONS[0], "--seed", "3", "--device", "cpu"])
    assert capsys.readouterr().out == wanted + "\n" != plain(folder, QUESTIONS[0]) + "\n"


def test_an_answer_stops_at_every_end_token(checkpoint, tmp_path, capsys):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    whole = plain(checkpoint, QUESTIONS[0], decoded=False)
    stop = next(number for number in whole[2:] if number not in whole[:2] and number > 5)
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    (folder / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [5, stop], "pad_token_id": 1})
    )
    chat.main(["--ckpt", str(folder), "--greedy", "--prompt", QUESTIONS[0], *SHORT])
    assert capsys.readouterr().out == tokenizer.decode(whole[: whole.index(stop) + 1]) + "\n"


def test_seed_decides_a_sampled_answer(checkpoint, capsys):
    def sampled(seed):
        chat.main(
            [
                "--ckpt",
                str(checkpoint),
                "--temperature",
                "3",
                "--seed",
                seed,
                "--prompt",
                "How many?",
                *SHORT,
            ]
        )
        return capsys.readouterr().out

    assert sampled("1") == sampled("1") != sampled("2")


def test_conversation_answers_with_its_history(monkeypatch, capsys, checkpoint):
    first = plain(checkpoint, QUESTIONS[2])
    history = [
        {"role": "user", "content": QUESTIONS[2]},
        {"role": "assistant", "content": first},
        {"role": "user", "content": QUESTIONS[4]},
    ]
    second = plain(checkpoint, history)
    assert second != plain(checkpoint, QUESTIONS[4])
    assert (
        conversation(monkeypatch, capsys, checkpoint, [QUESTIONS[2], QUESTIONS[4]])
        == f"{first}\n{second}\n"
    )


def test_reset_forgets_the_conversation(monkeypatch, capsys, checkpoint):
    said = conversation(
        monkeypatch,
        capsys,
        checkpoint,
        [QUESTIONS[2], "/reset", QUESTIONS[4], "/exit", QUESTIONS[0]],
    )
    assert (
        said == f"{plain(checkpoint, QUESTIONS[2])}\nthe conversation is"
        f" forgotten\n{plain(checkpoint, QUESTIONS[4])}\n"
    )


@pytest.mark.parametrize(
    "lines",
    [
        ["Leo has\\", "69 eggs."],
        ['"""', "Leo has", "69 eggs.", '"""'],
        ['"""Leo has', '69 eggs."""'],
    ],
)
def test_a_message_may_span_lines(monkeypatch, capsys, checkpoint, lines):
    assert (
        conversation(monkeypatch, capsys, checkpoint, lines)
        == plain(checkpoint, "Leo has\n69 eggs.") + "\n"
    )


def test_save_writes_the_conversation_with_its_system_prompt(
    monkeypatch, capsys, checkpoint, tmp_path
):
    conversation(
        monkeypatch,
        capsys,
        checkpoint,
        ["/system Add the ones", "How many?", f"/save {tmp_path / 'talk.json'}"],
    )
    messages = json.loads((tmp_path / "talk.json").read_text())["messages"]
    assert messages[:2] == [
        {"role": "system", "content": "Add the ones"},
        {"role": "user", "content": "How many?"},
    ]
    assert messages[2] == {"role": "assistant", "content": plain(checkpoint, messages[:2])}


def test_unknown_commands_and_bad_paths_do_not_end_the_conversation(
    monkeypatch, capsys, checkpoint, tmp_path
):
    said = conversation(
        monkeypatch,
        capsys,
        checkpoint,
        ["/quit", f"/save {tmp_path}/none/x.json", "/save", "/help", "", QUESTIONS[2]],
    )
    assert (
        "unknown command /quit" in said
        and "not saved" in said
        and "needs a file name" in said
        and talk.HELP in said
    )
    assert said.endswith(plain(checkpoint, QUESTIONS[2]) + "\n")


def test_ctrl_c_stops_the_answer_and_not_the_program(monkeypatch, capsys, checkpoint):
    show, shown = terminal.Printer.show, []

    def interrupted(printer, text):
        show(printer, text)
        shown.append(text)
        if len(shown) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(terminal.Printer, "show", interrupted)
    said = conversation(monkeypatch, capsys, checkpoint, [QUESTIONS[0], "/reset", QUESTIONS[2]])
    assert (
        said == f"{''.join(shown[:4])} (stopped)\nthe conversation is"
        f" forgotten\n{plain(checkpoint, QUESTIONS[2])}\n"
    )


def test_oldest_turns_are_dropped_when_the_context_is_full(
    monkeypatch, capsys, checkpoint, tmp_path
):
    long = " ".join(["Ann has 38 apples."] * 8)  # 56 tokens; the context is 256
    said = conversation(
        monkeypatch, capsys, checkpoint, [long] * 5 + [f"/save {tmp_path / 'talk.json'}"]
    )
    assert said.count("no longer fit") >= 1
    messages = json.loads((tmp_path / "talk.json").read_text())["messages"]
    assert (
        messages[0]["role"] == "user" and messages[-1]["role"] == "assistant" and len(messages) < 10
    )


def test_system_prompt_and_last_turns_stay_when_old_ones_are_dropped(checkpoint):
    args = chat.parse_args(["--ckpt", str(checkpoint), *SHORT])
    talking = model.load(args, templates.make_ready)
    messages = [{"role": "system", "content": "Add the ones"}]
    for name in demo.PEOPLE:
        messages.append(
            {
                "role": "user",
                "content": f"{name} has 38 apples. How many apples does {name} have now?",
            }
        )
        messages.append({"role": "assistant", "content": "#### 38"})
    ids, dropped = talking.fit(messages[:-1])
    assert ids == template.prompt_ids(talking.tokenizer, [messages[0], *messages[1 + dropped : -1]])
    assert dropped % 2 == 0 and 0 < dropped < 30 and len(ids) + 12 <= 256


def test_a_message_longer_than_the_context_is_refused_and_the_next_one_answered(
    monkeypatch, capsys, checkpoint
):
    said = conversation(monkeypatch, capsys, checkpoint, ["apples " * 300, QUESTIONS[2]])
    assert "too long" in said and said.endswith(plain(checkpoint, QUESTIONS[2]) + "\n")


def test_streamed_text_is_the_decoding_of_all_tokens(capsys):
    class Bytes:  # a tokenizer of bytes: characters arrive in parts
        def decode(self, ids, skip_special_tokens):
            return bytes(ids).decode(errors="replace")

    printer = terminal.Printer(Bytes())
    printer.put(torch.tensor([[1, 2, 3]]))
    for byte in "né 日\n!".encode():
        printer.put(torch.tensor([byte]))
    printer.end()
    assert capsys.readouterr().out == "né 日\n!\n"


# --- scores


def scoring(checkpoint, source, out, *more):
    return [
        "--ckpt",
        str(checkpoint),
        "--score",
        str(source),
        "--out",
        str(out),
        "--batch-size",
        "2",
        *SHORT,
        *more,
    ]


@pytest.fixture
def asked(tmp_path):
    """Prompts with references: what the model answers for the first two, something else for the
    others."""
    path = tmp_path / "asked.jsonl"

    def write(checkpoint, references=None):
        references = references or [
            *(plain(checkpoint, question) for question in QUESTIONS[:2]),
            "#### 69",
            "#### 29",
            "#### 0",
        ]
        path.write_text(
            "".join(
                json.dumps({"prompt": q, "reference": r}) + "\n"
                for q, r in zip(QUESTIONS, references)
            )
        )
        return path

    return write


def test_scored_answers_are_the_greedy_ones_with_their_scores(checkpoint, asked, tmp_path, capsys):
    folder, out = (
        shutil.copytree(checkpoint, tmp_path / "model"),
        tmp_path / "new" / "answers.jsonl",
    )
    (folder / "generation_config.json").write_text(
        json.dumps({"do_sample": True, "temperature": 2.0, "eos_token_id": 5, "pad_token_id": 1})
    )
    chat.main(scoring(folder, asked(checkpoint), out, "--metrics", "exact,bleu"))
    rows = answers(out)
    assert [row["answer"] for row in rows] == [
        plain(checkpoint, question) for question in QUESTIONS
    ]
    assert [row["scores"]["exact"] for row in rows][:2] == [1, 1] and all(
        set(row["scores"]) == {"exact", "bleu"} for row in rows
    )
    made = json.loads((tmp_path / "new" / "answers.scores.json").read_text())
    assert made["metrics"] == score.summarise(rows, ["exact", "bleu"]) and made["count"] == 5
    assert (
        made["prompts"] == files.sha256(asked(checkpoint))
        and made["weights"] == checkpoints.identity(folder)
        and made["ckpt"] == str(folder)
    )
    assert "bleu" in (said := capsys.readouterr().out) and "answers.scores.json" in said


def test_a_finished_scored_file_shows_its_scores_again(checkpoint, asked, tmp_path, capsys):
    command = scoring(checkpoint, asked(checkpoint), tmp_path / "a.jsonl")
    chat.main(command)
    table = capsys.readouterr().out.split("answers/s)")[1]
    assert (
        "finished already" in (said := finished(command, capsys))
        and said.endswith(table)
        and "exact" in table
    )


def finished(command, capsys):
    with pytest.raises(SystemExit) as stop:
        chat.main(command)
    assert stop.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(
    "more",
    [
        ["--metrics", "exact"],
        ["--metrics", "bleu", "--temperature", "1.5"],
        ["--labels", "auto"],
        ["--labels", "auto", "--calibrate", "prior"],
    ],
)
def test_a_killed_scored_file_continues_to_the_bytes_of_a_straight_run(
    checkpoint, asked, tmp_path, capsys, more
):
    out, source = tmp_path / "a.jsonl", asked(checkpoint, ["Ann", "Tom", "Leo", "Mia", "Ann"])
    command = scoring(checkpoint, source, out, *more)
    chat.main(command)
    straight, summary = out.read_bytes(), json.loads((tmp_path / "a.scores.json").read_text())
    for kept in (0, 3):  # killed at the beginning, and within a batch
        (tmp_path / "a.scores.json").unlink()
        out.unlink()
        (tmp_path / "a.jsonl.part").write_bytes(
            b"".join(straight.splitlines(keepends=True)[:kept]) + b'{"torn'
        )
        chat.main(command)
        assert out.read_bytes() == straight
    (tmp_path / "a.scores.json").unlink()  # killed before the summary
    chat.main(command)
    assert out.read_bytes() == straight
    again = json.loads((tmp_path / "a.scores.json").read_text())
    assert again | {"speed": 0, "seal": 0} == summary | {"speed": 0, "seal": 0}


def test_labels_are_chosen_by_likelihood_and_told_apart_in_the_summary(
    checkpoint, asked, tmp_path, capsys
):
    references = ["Ann", "Tom", "Leo", "Ann", "Tom"]
    chat.main(
        scoring(
            checkpoint,
            asked(checkpoint, references),
            tmp_path / "a.jsonl",
            "--labels",
            "Tom,Ann,Leo,Eva",
        )
    )
    rows, made = answers(tmp_path / "a.jsonl"), json.loads((tmp_path / "a.scores.json").read_text())
    for row in rows:
        assert list(row["logp"]) == ["Tom", "Ann", "Leo", "Eva"] and row["answer"] == max(
            row["logp"], key=row["logp"].get
        )
        assert row["scores"] == {"accuracy": float(row["answer"] == row["reference"])}
    assert made["labels"] == ["Tom", "Ann", "Leo", "Eva"] == list(made["per_class"]) and np.array(
        made["confusion"]
    ).sum(1).tolist() == [2, 2, 1, 0]
    assert (
        made["metrics"]["accuracy"]["value"] == np.mean([row["scores"]["accuracy"] for row in rows])
        and "macro_f1" in made["metrics"]
    )
    assert "precision" in capsys.readouterr().out


def test_calibration_changes_what_is_chosen_and_not_the_likelihoods(checkpoint, asked, tmp_path):
    source, made = asked(checkpoint, ["Ann", "Ann has 38 apples", "Leo", "Ann", "Leo"]), {}
    for how in ("off", "length", "prior"):
        chat.main(
            scoring(
                checkpoint,
                source,
                tmp_path / f"{how}.jsonl",
                "--labels",
                "auto",
                "--calibrate",
                how,
            )
        )
        made[how] = answers(tmp_path / f"{how}.jsonl")
    assert (
        [row["logp"] for row in made["off"]]
        == [row["logp"] for row in made["length"]]
        == [row["logp"] for row in made["prior"]]
    )
    picked = {how: [row["answer"] for row in rows] for how, rows in made.items()}
    assert picked["length"] == [
        max(row["logp"], key=lambda label: row["logp"][label] / (2 + 4 * (len(label) > 3)))
        for row in made["off"]
    ]
    assert len(set(map(tuple, picked.values()))) > 1


def test_a_data_folder_stands_for_its_held_out_prompts_and_limit_for_the_first(
    checkpoint, asked, tmp_path, capsys
):
    (tmp_path / "data").mkdir()
    shutil.copy(asked(checkpoint), tmp_path / "data" / "val.prompts.jsonl")
    chat.main(scoring(checkpoint, tmp_path / "data", tmp_path / "all.jsonl", "--metrics", "exact"))
    chat.main(
        scoring(
            checkpoint,
            tmp_path / "data",
            tmp_path / "few.jsonl",
            "--metrics",
            "exact",
            "--limit",
            "2",
        )
    )
    assert answers(tmp_path / "few.jsonl") == answers(tmp_path / "all.jsonl")[:2]
    assert json.loads((tmp_path / "few.scores.json").read_text())["metrics"]["exact"]["n"] == 2
    assert "--fresh" in refused(
        capsys,
        scoring(checkpoint, tmp_path / "data", tmp_path / "few.jsonl", "--metrics", "exact"),
        1,
    )


def test_a_checkpoint_that_was_moved_is_known_by_its_weights(
    checkpoint, asked, tmp_path, monkeypatch, capsys
):
    source, out = asked(checkpoint), tmp_path / "a.jsonl"
    chat.main(scoring(checkpoint, source, out))
    shutil.copytree(checkpoint, tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    for folder in (f"{checkpoint}/", "moved", "./moved/"):
        assert "finished already" in finished(scoring(folder, source, "a.jsonl"), capsys)


def test_other_metrics_or_labels_are_other_settings(checkpoint, asked, tmp_path, capsys):
    command = scoring(checkpoint, asked(checkpoint), tmp_path / "a.jsonl")
    chat.main(command)
    for more in (["--metrics", "bleu"], ["--limit", "3"]):
        assert "--fresh" in refused(capsys, [*command, *more], 1)
    chat.main([*command, "--metrics", "bleu", "--fresh"])
    assert list(json.loads((tmp_path / "a.scores.json").read_text())["metrics"]) == ["bleu"]


@pytest.mark.parametrize(
    "references, more, says",
    [
        (["1", "2", None], [], "row 3 has no reference"),
        (["1", " "], [], "row 2 has no reference"),
        (
            ["Ann", "Zoe"],
            ["--labels", "Ann,Tom"],
            "row 2: the reference is no label; saw 'Zoe'; wanted Ann, Tom",
        ),
    ],
)
def test_references_that_are_missing_or_no_label_are_refused_by_line_number(
    checkpoint, asked, tmp_path, capsys, references, more, says
):
    assert says in refused(
        capsys, scoring(checkpoint, asked(checkpoint, references), tmp_path / "a.jsonl", *more), 1
    )
    assert list(tmp_path.iterdir()) == [tmp_path / "asked.jsonl"]


def test_a_label_that_does_not_fit_behind_its_prompt_is_refused_by_line_number(
    checkpoint, tmp_path, capsys
):
    lines = [
        {"prompt": "How many?", "reference": "Ann"},
        {"prompt": "apples " * 245, "reference": "Tom"},
    ]  # the context is 256
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = scoring(checkpoint, tmp_path / "p.jsonl", tmp_path / "a.jsonl", "--labels")
    chat.main([*command, "Ann,Tom"])
    assert "row 2 leaves no room for an answer" in refused(
        capsys, [*command, "Ann,Tom," + "Ann has " * 10, "--fresh"], 1
    )


def test_references_that_are_too_many_to_be_labels_are_refused(checkpoint, tmp_path, capsys):
    (tmp_path / "p.jsonl").write_text(
        "".join(json.dumps({"prompt": "How many?", "reference": str(i)}) + "\n" for i in range(201))
    )
    command = scoring(checkpoint, tmp_path / "p.jsonl", tmp_path / "a.jsonl", "--labels", "auto")
    assert "201 distinct ones; wanted at most 200" in refused(capsys, command, 1)


def test_a_file_as_people_have_it_is_scored(checkpoint, tmp_path):
    """A byte order mark, blank lines, names of other data sets, an answer at the end of a
    conversation, several that are right: refused before."""
    said = [plain(checkpoint, question) for question in QUESTIONS]
    rows = [
        {"question": QUESTIONS[0], "answer": ["#### 1", said[0]], "id": 7},
        {
            "messages": [
                {"role": "user", "content": QUESTIONS[1]},
                {"role": "assistant", "content": said[1]},
            ]
        },
        {
            "conversations": [
                {"from": "human", "value": QUESTIONS[2]},
                {"from": "gpt", "value": "x"},
            ]
        },
    ]
    text = "\n\n".join(map(json.dumps, rows)) + "\n\n\n"
    (tmp_path / "p.jsonl").write_text(text, encoding="utf-8-sig")
    command = scoring(checkpoint, tmp_path / "p.jsonl", tmp_path / "a.jsonl", "--metrics", "exact")
    chat.main(command)
    made = answers(tmp_path / "a.jsonl")
    assert [row["answer"] for row in made] == said[:3]
    assert [row["scores"]["exact"] for row in made] == [1, 1, 0]
    assert [row["reference"] for row in made] == [["#### 1", said[0]], said[1], "x"]
    assert [row["messages"] for row in made] == [
        [{"role": "user", "content": q}] for q in QUESTIONS[:3]
    ]
    assert made[0]["id"] == 7 and all("conversations" not in row for row in made)


def test_one_class_only_is_warned_of(checkpoint, asked, tmp_path, capsys):
    chat.main(
        scoring(
            checkpoint, asked(checkpoint, ["Ann"] * 5), tmp_path / "a.jsonl", "--labels", "Ann,Tom"
        )
    )
    assert "WARNING: every reference is 'Ann'" in capsys.readouterr().out
    chat.main(
        scoring(
            checkpoint,
            asked(checkpoint, ["Ann", "Tom", "Ann", "Ann", "Tom"]),
            tmp_path / "b.jsonl",
            "--labels",
            "Ann,Tom",
        )
    )
    assert "WARNING" not in capsys.readouterr().out


def test_a_data_folder_without_held_out_prompts_is_refused(checkpoint, tmp_path, capsys):
    assert "holds no val.prompts.jsonl" in refused(
        capsys, scoring(checkpoint, tmp_path, tmp_path / "a.jsonl"), 1
    )


@pytest.mark.parametrize("context", [256, 40, 3])
def test_speed_is_measured_within_the_context_and_memory_is_weights_and_cache(checkpoint, context):
    args = chat.parse_args(["--ckpt", str(checkpoint), *SHORT])
    talking = model.load(args, templates.make_ready)
    talking.context = context
    lengths, forward = [], talking.module.forward

    def counted(input_ids, **options):
        lengths.append(input_ids.shape[1])
        return forward(input_ids=input_ids, **options)

    talking.module.forward = counted
    made, (read, written) = (
        prompts.speed(talking, [7, 8, 9]),
        {256: (128, 32), 40: (20, 20), 3: (2, 1)}[context],
    )
    assert (
        lengths == ([read] + [1] * written) * 3 and made["prompt_tok_per_s"] > 0 < made["tok_per_s"]
    )
    weights = sum(p.numel() * 4 for p in talking.module.parameters())
    cache = (
        2 * 2 * 16 * 4 * (read + written)
    )  # keys and values of two layers, two heads of width 8, float32
    assert (
        0 <= made["memory_bytes"] - weights - cache < 1000
        and made["threads"] == 1
        and made["device"] == "cpu"
    )  # what is left: rotary tables


@pytest.mark.parametrize(
    "line, says",
    [
        ("{", "not JSON"),
        ("[]", "[]"),
        ('{"reply": "x"}', "columns reply"),
        ('{"prompt": 3}', "not text"),
        ('{"messages": []}', "[]"),
        ('{"prompt": "x", "answer": "y", "reference": "z"}', "overwrite"),
        ('{"messages": [{"role": "assistant", "content": "x"}]}', "[]"),
        (json.dumps({"prompt": "apples " * 300}), "no room"),
        ('{"prompt": "x", "y": ' + "[" * 100_000 + "}", "not JSON"),
        ('{"prompt": "x", "y": ' + "[" * 1000 + "]" * 1000 + "}", "not JSON"),
        ('{"prompt": "x", "y": ' + "9" * 5000 + "}", "not JSON"),
        (json.dumps({"prompt": "a\ud800b"}), "half a character"),
        (json.dumps({"prompt": "a", "reference": "\udfff"}), "half a character"),
        (
            json.dumps(
                {
                    "messages": [
                        {"role": "system", "content": "\ud800"},
                        {"role": "user", "content": "a"},
                    ]
                }
            ),
            "half a character",
        ),
        (json.dumps({"messages": [{"role": "\udfff", "content": "a"}]}), "half a character"),
    ],
    ids=range(15),
)
def test_a_broken_prompts_file_is_refused_by_line_number(checkpoint, tmp_path, capsys, line, says):
    (tmp_path / "p.jsonl").write_text('{"prompt": "How many?"}\n' + line + "\n")
    said = refused(
        capsys,
        [
            "--ckpt",
            str(checkpoint),
            "--prompts",
            str(tmp_path / "p.jsonl"),
            "--out",
            str(tmp_path / "o.jsonl"),
            *SHORT,
        ],
        1,
    )
    assert (
        re.search(r"(line|row) 2\b", said) and says in said and not (tmp_path / "o.jsonl").exists()
    )


def test_what_is_carried_over_comes_back_whatever_it_is(checkpoint, tmp_path):
    """Half a character in a field that nobody reads ended the run, after its answers."""
    deep = json.loads("[" * 200 + "]" * 200)
    fields = {"prompt": "How many?", "note": "\udfff \ud83d", "\ud800": 1e300, "deep": deep}
    (tmp_path / "p.jsonl").write_text(json.dumps(fields) + "\n")
    argv = ["--ckpt", str(checkpoint), "--prompts", str(tmp_path / "p.jsonl"), *SHORT]
    chat.main([*argv, "--out", str(tmp_path / "o.jsonl")])
    made = json.loads((tmp_path / "o.jsonl").read_bytes())
    assert isinstance(made.pop("answer"), str) and made == fields


@pytest.mark.parametrize("flag", ["--prompt", "--system", "--labels", "--api-key"])
def test_a_flag_that_is_no_utf_8_is_refused_before_anything_is_loaded(checkpoint, capsys, flag):
    more = {"--labels": ["--score", "x", "--out", "o"], "--api-key": ["--serve"]}.get(flag, [])
    said = refused(capsys, ["--ckpt", str(checkpoint), *more, flag, "a\udcffb"], 2)
    assert f"{flag} is 'a\\udcffb', wanted UTF-8" in said


def test_greedy_says_nothing_of_how_the_checkpoint_samples(checkpoint, tmp_path, capfd):
    """transformers put them back in from the model's own configuration, and warned of each."""
    shutil.copytree(checkpoint, tmp_path / "model")
    path = tmp_path / "model" / "generation_config.json"
    sampled = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "min_p": 0.05}
    path.write_text(json.dumps(json.loads(path.read_text()) | sampled))
    argv = ["--ckpt", str(tmp_path / "model"), "--prompt", QUESTIONS[0], *SHORT]
    chat.main([*argv, "--greedy"])
    out, err = capfd.readouterr()
    assert out.strip() == plain(checkpoint, QUESTIONS[0]).strip() and "flags" not in err
    for more in ([], ["--temperature", "0.9"]):  # and what it samples by is still the checkpoint's
        args = chat.parse_args([*argv, *more])
        made = model.load(args, templates.make_ready)
        made.answer(made.ids([{"role": "user", "content": "x"}]))
        how = made.sampling()
        assert (how.top_k, how.top_p, how.min_p) == (20, 0.8, 0.05) and how.temperature > 0.6


@pytest.mark.parametrize("ckpt", ["none/such/folder", "./none", "empty", "weightless", "torn"])
def test_a_checkpoint_that_cannot_be_loaded_is_one_line(
    checkpoint, tmp_path, capsys, monkeypatch, ckpt
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for name in ("weightless", "torn"):
        shutil.copytree(checkpoint, tmp_path / name)
    (tmp_path / "weightless" / "model.safetensors").unlink()
    (tmp_path / "torn" / "model.safetensors").write_bytes(b"torn")
    assert ckpt in refused(capsys, ["--ckpt", ckpt, "--prompt", "x", *SHORT], 1)


@pytest.mark.parametrize(
    "argv",
    [
        ["--prompts", "x.jsonl"],
        ["--out", "y"],
        ["--prompt", "x", "--prompts", "y", "--out", "z"],
        ["--greedy", "--temperature", "1"],
        ["--temperature", "-1"],
        ["--top-p", "0"],
        ["--top-p", "1.1"],
        ["--top-k", "-1"],
        ["--max-new-tokens", "0"],
        ["--batch-size", "0"],
        ["--promp", "x"],
        ["--score", "x"],
        ["--score", "x", "--prompts", "y", "--out", "z"],
        ["--limit", "3"],
        ["--score", "x", "--out", "z", "--limit", "-1"],
        ["--score", "x", "--out", "z", "--metrics", "blue"],
        ["--metrics", "bleu"],
        ["--score", "x", "--out", "z", "--labels", "a,,b"],
        ["--prompts", "x", "--out", "z", "--labels", "a,b"],
        ["--score", "x", "--out", "z", "--labels", "a,b", "--metrics", "bleu"],
        ["--score", "x", "--out", "z", "--calibrate", "prior"],
    ],
)
def test_bad_arguments_are_refused_with_exit_code_2(capsys, argv):
    assert "error: " in refused(capsys, ["--ckpt", "x", *argv], 2)
