"""The conversation of chat.py: its commands, a teacher beside the student, and, in a
pseudo-terminal, what only a terminal shows."""

import io
import json
import os
import pty
import re
import select
import shutil
import signal
import sys
import time

import make
import pytest
import torch
from gguf_files import WORDS, to_gguf
from tiny_tokenizers import tiny
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

import chat
from lib import files, template
from lib.chat import heat, model, talk, terminal
from lib.prepare import demo, templates

QUESTIONS = ["Ann has 38 apples.", "How many?", "Tom has 71 pens and Eva has 12."]
SHORT = ["--device", "cpu", "--threads", "1", "--max-new-tokens", "12"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with student/ and teacher/: random models of 2 layers and width 32, of the demo's
    tokenizer."""
    folder = tmp_path_factory.mktemp("world")
    for seed, name in enumerate(("student", "teacher")):
        torch.manual_seed(seed)
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
        LlamaForCausalLM(config).save_pretrained(folder / name)
        demo.tokenizer().save_pretrained(folder / name)
    return folder


def plain(folder, messages, count=12):
    """What transformers itself answers, greedily."""
    tokenizer, model = (
        AutoTokenizer.from_pretrained(folder),
        AutoModelForCausalLM.from_pretrained(folder).eval(),
    )
    messages = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
    ids = torch.tensor([template.prompt_ids(tokenizer, messages)])
    written = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False
    )
    return tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)


def turns(*texts, system=None):
    opening = [{"role": "system", "content": system}] if system else []
    return opening + [
        {"role": ("user", "assistant")[number % 2], "content": text}
        for number, text in enumerate(texts)
    ]


@pytest.fixture
def converse(world, monkeypatch, capsys):
    """Run a conversation on these lines of input, greedily unless told otherwise, and return what
    was printed."""

    def run(lines, *options, how=("--greedy",)):
        monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))
        chat.main(["--ckpt", str(world / "student"), *how, *SHORT, *options])
        return capsys.readouterr().out

    return run


def talking(world, *more):
    args = chat.parse_args(["--ckpt", str(world / "student"), "--greedy", *SHORT, *more])
    return talk.Conversation(*model.both(args, templates.make_ready), args)


# --- commands


def test_retry_samples_another_answer_to_the_same_question_and_goes_on_from_it(converse, tmp_path):
    said = converse(
        [QUESTIONS[0], "/retry", "/retry", f"/save {tmp_path}/talk.json"],
        how=("--temperature", "3"),
    ).splitlines()
    assert len({*said[:3]}) == 3
    assert files.read_json(tmp_path / "talk.json")["messages"] == turns(QUESTIONS[0], said[2])


def test_retry_answers_greedily_what_it_did(converse, world):
    first = plain(world / "student", QUESTIONS[0])
    second = plain(world / "student", turns(QUESTIONS[0], first, QUESTIONS[1]))
    assert converse(["/retry", *QUESTIONS[:2], "/retry"]) == "\n".join(
        ["there is nothing to answer again", first, second, second, ""]
    )


def test_what_was_saved_is_loaded_and_gone_on_from(converse, world, tmp_path):
    saved = [f"/system {QUESTIONS[2]}", QUESTIONS[0], f"/save {tmp_path}/talk.json"]
    messages = turns(QUESTIONS[0], system=QUESTIONS[2])
    messages += [
        {"role": "assistant", "content": plain(world / "student", messages)},
        {"role": "user", "content": QUESTIONS[1]},
    ]
    wanted = plain(world / "student", messages)
    assert wanted != plain(world / "student", messages[1:])
    converse(saved)
    (tmp_path / "talk.jsonl").write_text(
        "\n" + json.dumps({"messages": messages[:-1], "id": 3}) + "\nno JSON\n"
    )
    for path in (tmp_path / "talk.json", tmp_path / "talk.jsonl"):
        said = converse([QUESTIONS[2], f"/load {path}", QUESTIONS[1]])
        assert said.endswith(f"\nloaded 3 messages from {path}\n{wanted}\n")
    said = converse([f"/load {tmp_path}/talk.json", "/reset", "/system", QUESTIONS[1]])
    assert said.endswith(f"no system prompt of yours\n{plain(world / 'student', QUESTIONS[1])}\n")


def test_a_loaded_question_without_an_answer_is_answered_by_retry(converse, world, tmp_path):
    messages = turns(QUESTIONS[0], "#### 38", QUESTIONS[1])
    (tmp_path / "t.json").write_text(json.dumps({"messages": messages}))
    loaded, answer = (
        f"loaded 3 messages from {tmp_path}/t.json; /retry answers the last one\n",
        plain(world / "student", messages) + "\n",
    )
    assert converse(
        [f"/load {tmp_path}/t.json", "/retry", f"/load {tmp_path}/t.json", QUESTIONS[1]]
    ) == 2 * (loaded + answer)


@pytest.mark.parametrize(
    "content, says",
    [
        (None, "No such file"),
        ("{", "wanted"),
        ("[" * 100_000, "recursion"),
        ("[]", "no messages"),
        ('{"messages": []}', "no messages"),
        ('{"messages": [{"role": "user", "content": 3}]}', "no messages"),
        ('{"messages": [{"role": "assistant", "content": "x"}]}', "roles assistant"),
        ('{"messages": [{"role": "system", "content": "x"}]}', "roles system"),
        ('{"messages": [{"role": "robot", "content": "x"}]}', "roles robot"),
        (
            json.dumps({"messages": turns("x") + turns("y", system="late")}),
            "roles user, system, user",
        ),
        (b"\xff\xfe", "codec"),
        ('{"messages": [{"role": "user", "content": "\\ud83d"}]}', "half a character"),
    ],
)
def test_a_file_that_cannot_be_loaded_is_one_line_and_leaves_the_conversation_as_it_is(
    converse, tmp_path, content, says
):
    path = tmp_path / "t.json"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    undisturbed = converse(QUESTIONS[:2]).splitlines()
    said = converse([QUESTIONS[0], f"/load {path}", QUESTIONS[1]]).splitlines()
    assert (
        [said[0], said[2]] == undisturbed
        and said[1].startswith("not loaded: ")
        and says in said[1]
        and len(said) == 3
    )


@pytest.mark.parametrize(
    "line, says",
    [
        ("/load", "/load needs a file name"),
        ("/save a\0b", "not saved: embedded null byte"),
        ("/temp x", "'x' is not a number"),
        ("/temp nan", "'nan' is not"),
        ("/temp -1", "'-1' is not"),
        ("/temp inf", "'inf' is not"),
        ("/tokens 0", "'0' is not a whole number above 0"),
        ("/tokens 2.5", "'2.5' is not"),
        ("/diff", "/diff needs a teacher: start with --teacher DIR"),
        ("a\udcffb", "that was no UTF-8"),
        ("/temp", "greedy"),
        ("/tokens", "at most 12 tokens"),
        ("/retry", "nothing to answer again"),
    ],
)
def test_a_command_that_cannot_be_done_says_so_and_changes_nothing(converse, world, line, says):
    said = converse([line, QUESTIONS[0]]).splitlines()
    assert says in said[0] and said[1:] == [plain(world / "student", QUESTIONS[0])]


def test_temperature_and_tokens_are_changed_while_talking(converse, world):
    said = converse(
        ["/tokens 3", QUESTIONS[0], "/temp 3", "/retry", "/retry", "/temp 0", "/retry"]
    ).splitlines()
    three = plain(world / "student", QUESTIONS[0], 3)
    assert [said[0], said[1], said[2], said[5], said[6]] == [
        "at most 3 tokens",
        three,
        "temperature 3",
        "greedy",
        three,
    ]
    assert len({said[1], said[3], said[4]}) == 3


def test_a_blank_before_a_command_sends_it_to_the_model(converse, world):
    assert converse([" /reset"]).splitlines() == [plain(world / "student", " /reset")]


def test_tab_completes_commands_and_file_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "talk[1].json").touch()
    (tmp_path / "talks").mkdir()
    assert (
        talk.completions("/s", "/s") == ["/system", "/save"]
        and talk.completions("", "") == talk.COMMANDS
    )
    assert talk.completions("/load ta", "ta") == ["talk[1].json", "talks/"] and talk.completions(
        "/load talk[", "talk["
    ) == ["talk[1].json"]
    assert talk.completions("/temp ta", "ta") == [] == talk.completions("hello ta", "ta")


def test_the_history_is_where_xdg_says(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ann")
    for state, wanted in (
        ("/state", "/state"),
        ("", "/home/ann/.local/state"),
        ("relative", "/home/ann/.local/state"),
    ):
        monkeypatch.setenv("XDG_STATE_HOME", state)
        assert str(terminal.history_file()) == f"{wanted}/distil/chat_history"


# --- the cache of the turn before


def test_a_turn_reads_only_what_is_new_and_answers_the_same(world):
    here, read = talking(world), []
    forward = here.student.module.forward

    def counted(input_ids=None, **options):
        read.append(input_ids.shape[1])
        return forward(input_ids=input_ids, **options)

    here.student.module.forward = counted
    messages, before = [], 0
    for question in (*QUESTIONS, QUESTIONS[0]):
        messages.append({"role": "user", "content": question})
        read.clear()
        talk.answer_message(here, question)
        assert here.messages[-1]["content"] == plain(world / "student", messages)
        assert (
            0 < read[0] <= len(here.said[1]) - before
        )  # at least the prompt before is not read again
        messages, before = list(here.messages), len(here.said[1])
    talk.obey(here, "/retry")  # the prompt is known but for its last token, whose logits are wanted
    assert here.messages == messages and 1 in read[-len(here.said[2]) :]


def test_an_answer_stopped_within_a_step_leaves_no_half_token_in_the_cache(world, capsys):
    """Ctrl-C may come between two layers: the first has a token more than the second."""
    here = talking(world)
    layers, count = here.student.module.model.layers, 0

    def interrupted(*_):
        nonlocal count
        count += 1
        if count == 5:
            raise KeyboardInterrupt

    hook = layers[1].register_forward_pre_hook(interrupted)
    talk.answer_message(here, QUESTIONS[0])
    hook.remove()
    assert "(stopped)" in capsys.readouterr().out and 0 < len(here.said[2]) < 12
    talk.answer_message(here, QUESTIONS[1])
    assert here.messages[-1]["content"] == plain(world / "student", here.messages[:-1])


def test_a_cache_that_cannot_be_cut_is_not_kept(tmp_path):
    from transformers import MistralConfig

    folder = make.model(tmp_path / "model")
    torch.manual_seed(0)
    small = dict(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    AutoModelForCausalLM.from_config(
        MistralConfig(sliding_window=8, eos_token_id=3, pad_token_id=3, **small)
    ).save_pretrained(folder)
    args = chat.parse_args(["--ckpt", str(folder), "--greedy", *SHORT])
    here = talk.Conversation(model.load(args, templates.make_ready), None, args)
    assert here.student.remembered([1, 2, 3]) is None
    for question in ("w5 w6 w7", "w9"):
        talk.answer_message(here, question)
        assert here.messages[-1]["content"] == plain(folder, here.messages[:-1])


# --- beside a teacher


def test_both_answer_and_the_history_is_the_students(converse, world, tmp_path):
    said = converse(
        [*QUESTIONS[:2], f"/save {tmp_path}/talk.json"], "--teacher", str(world / "teacher")
    ).splitlines()
    mine = plain(world / "student", QUESTIONS[0])
    second = turns(QUESTIONS[0], mine, QUESTIONS[1])
    assert said[:8] == [
        "teacher:",
        plain(world / "teacher", QUESTIONS[0]),
        "student:",
        mine,
        "teacher:",
        plain(world / "teacher", second),
        "student:",
        plain(world / "student", second),
    ]
    assert files.read_json(tmp_path / "talk.json")["messages"] == [
        *second,
        {"role": "assistant", "content": said[7]},
    ]


def test_a_prompt_is_answered_by_both(world, capsys):
    chat.main(
        [
            "--ckpt",
            str(world / "student"),
            "--teacher",
            str(world / "teacher"),
            "--prompt",
            QUESTIONS[0],
            "--greedy",
            *SHORT,
        ]
    )
    answers = [plain(world / name, QUESTIONS[0]) for name in ("teacher", "student")]
    assert capsys.readouterr().out == "teacher:\n{}\nstudent:\n{}\n".format(*answers)


def test_settings_are_changed_for_both_and_each_keeps_its_own_defaults(
    world, tmp_path, monkeypatch, capsys
):
    shutil.copytree(world / "teacher", tmp_path / "own")
    own = {"do_sample": True, "temperature": 2.0, "eos_token_id": 5, "pad_token_id": 1}
    (tmp_path / "own" / "generation_config.json").write_text(json.dumps(own))
    monkeypatch.setattr("sys.stdin", io.StringIO("/temp\n/temp 0.5\n/tokens 4\n/tokens\n"))
    chat.main(["--ckpt", str(world / "student"), "--teacher", str(tmp_path / "own"), *SHORT])
    said = capsys.readouterr().out.splitlines()
    assert said == [
        "student: greedy; teacher: temperature 2",
        "temperature 0.5",
        "at most 4 tokens",
        "at most 4 tokens",
    ]


def test_ctrl_c_stops_one_answer_and_the_other_begins(converse, world, monkeypatch):
    plain_show = terminal.Printer.show

    def interrupted(printer, text):
        plain_show(printer, text)
        if not shown:
            shown.append(text)
            raise KeyboardInterrupt

    shown = []
    monkeypatch.setattr(terminal.Printer, "show", interrupted)
    said = converse([QUESTIONS[0]], "--teacher", str(world / "teacher")).splitlines()
    assert said == [
        "teacher:",
        f"{shown[0]} (stopped)",
        "student:",
        plain(world / "student", QUESTIONS[0]),
    ]


def test_diff_shows_the_tokens_that_were_written_and_where_the_two_are_furthest_apart(
    world, capsys
):
    here = talking(world, "--teacher", str(world / "teacher"))
    talk.obey(here, "/diff")
    assert "nothing was answered yet" in capsys.readouterr().out
    talk.answer_message(here, QUESTIONS[0])
    capsys.readouterr()
    talk.obey(here, "/diff")
    said = capsys.readouterr().out
    ids, tokens = here.said[1:]
    found = heat.compare_tokens(
        here.student.module, here.teacher.module, here.student.tokenizer, ids, tokens
    )
    marked = "".join(
        f"{place.text}[{place.kl:.1f}]" if place.kl > 0.5 else place.text for place in found
    )
    assert said.startswith(marked + "\n") and "[" in marked and len(tokens) == 12
    assert f"mean KL {sum(place.kl for place in found) / 12:.3f} nats over 12 tokens" in said
    worst = sorted(sorted(range(12), key=lambda n: -found[n].kl)[:3])
    rows = said.split("differ most:\n")[1].splitlines()[1:]
    assert [row.split()[0] for row in rows[::2]] == [str(n + 1) for n in worst] and len(rows) == 6
    for n, (student, teacher) in zip(worst, zip(rows[::2], rows[1::2])):
        for row, best in ((student, found[n].student), (teacher, found[n].teacher)):
            assert all(f"{word!r} {p:.2f}" in row for word, p in best)
    talk.obey(here, "/reset")
    talk.obey(here, "/diff")
    assert "nothing was answered yet" in capsys.readouterr().out


def test_a_student_that_is_its_teacher_is_marked_nowhere(converse, world):
    said = converse([QUESTIONS[0], "/diff"], "--teacher", str(world / "student")).splitlines()
    assert said[4] == plain(world / "student", QUESTIONS[0]) and said[5].startswith(
        "mean KL 0.000 nats"
    )


def test_a_diff_that_does_not_fit_into_memory_ends_no_conversation(world, monkeypatch, capsys):
    def no_memory(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory\nmore")

    here = talking(world, "--teacher", str(world / "teacher"))
    talk.answer_message(here, QUESTIONS[0])
    monkeypatch.setattr("lib.chat.heat.compare_tokens", no_memory)
    talk.obey(here, "/diff")
    assert (
        capsys.readouterr().out.splitlines()[-1]
        == "too little memory for /diff (CUDA out of memory)"
    )


def test_a_teacher_of_other_tokens_answers_and_is_not_compared(tmp_path, monkeypatch, capsys):
    make.model(tmp_path / "student")
    make.model(tmp_path / "teacher", seed=1, with_tokenizer=make.tokenizer("v"))
    monkeypatch.setattr("sys.stdin", io.StringIO("w5 w6\n/diff\n"))
    chat.main(
        [
            "--ckpt",
            str(tmp_path / "student"),
            "--teacher",
            str(tmp_path / "teacher"),
            "--greedy",
            *SHORT,
        ]
    )
    said = capsys.readouterr().out.splitlines()
    assert said[-1].startswith("/diff cannot be: the teacher has other tokens") and said[
        1
    ] == plain(tmp_path / "teacher", "w5 w6")


def test_a_gguf_file_is_a_teacher_with_the_students_tokenizer(tmp_path, capsys):
    """And no progress bar of its reading stands in a log."""
    pytest.importorskip("gguf")
    make.model(tmp_path / "student")
    make.model(tmp_path / "teacher", seed=1)

    def command(name):
        return [
            "--ckpt",
            str(tmp_path / "student"),
            "--teacher",
            str(tmp_path / name),
            "--prompt",
            "w5 w6",
            *SHORT,
        ]

    to_gguf(tmp_path / "teacher", tmp_path / "teacher.gguf", WORDS)
    to_gguf(
        tmp_path / "teacher", tmp_path / "other.gguf", [*WORDS[:7], WORDS[8], WORDS[7], *WORDS[9:]]
    )
    student, teacher = model.both(chat.parse_args(command("teacher.gguf")), templates.make_ready)
    assert "de-quantizing" not in capsys.readouterr().err
    assert teacher.tokenizer is student.tokenizer
    _, wanted = model.both(chat.parse_args(command("teacher")), templates.make_ready)
    places = [
        heat.compare_tokens(wanted.module, other.module, wanted.tokenizer, [1, 7, 2], [8, 9, 3])
        for other in (teacher, student)
    ]
    assert max(place.kl for place in places[0]) < 1e-6 < 0.1 < max(place.kl for place in places[1])
    chat.main(command("teacher.gguf"))
    assert capsys.readouterr().out.startswith("teacher:\n")
    code, words = make.ends(chat.main, *command("other.gguf"))
    assert (
        code == 1
        and "other.gguf has another tokenizer than" in words
        and "'w4' as token 7" in words
    )


def test_a_teacher_goes_with_no_file_of_prompts_and_is_no_classifier(world, tmp_path, capsys):
    for more in (["--prompts", "x", "--out", "y"], ["--score", "x", "--out", "y"]):
        assert make.ends(chat.main, "--ckpt", "x", "--teacher", "y", *more)[0] == 2
        assert "--teacher goes with" in capsys.readouterr().err
    (tmp_path / "config.json").write_text('{"architectures": ["BertForSequenceClassification"]}')
    code, words = make.ends(
        chat.main, "--ckpt", world / "student", "--teacher", tmp_path, "--prompt", "x", *SHORT
    )
    assert code == 1 and "a classifier; wanted a language model" in words
    code, words = make.ends(
        chat.main, "--ckpt", tmp_path, "--teacher", world / "student", "--prompt", "x", *make.CPU
    )
    assert code == 1 and "--teacher does not go with" in words


# --- a terminal


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_control_characters_of_a_model_never_reach_a_terminal(monkeypatch):
    text = "\x1b[2J\x07a\rb\x9b1m\x7f\n\tnaïve 日本 🎉"
    tokenizer = tiny()
    ids = tokenizer(text, add_special_tokens=False).input_ids
    for stdout, shown in (
        (Terminal(), "\u241b[2J\u2407a\u240db\\x9b1m\u2421\n\tnaïve 日本 🎉\n"),
        (io.StringIO(), text + "\n"),
    ):
        monkeypatch.setattr(sys, "stdout", stdout)
        printer = terminal.Printer(tokenizer)
        printer.put(torch.tensor([[1, 2]]))
        for token in ids:
            printer.put(torch.tensor([token]))
        printer.end()
        assert stdout.getvalue() == shown and printer.text == text
    places = [heat.ComparedToken(0, text, 9.0, [(text, 1.0)], [(text, 1.0)], 1.0, 1.0)]
    assert not {*(talk.heated(places) + talk.furthest(places))} & {
        *map(chr, range(128, 160)),
        *"\x1b\x07\r\x7f",
    }


@pytest.mark.parametrize(
    "environment, colours",
    [({}, True), ({"NO_COLOR": "1"}, False), ({"NO_COLOR": ""}, True), ({"TERM": "dumb"}, False)],
)
def test_colours_are_for_terminals_that_want_them(monkeypatch, environment, colours):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "stdout", Terminal())
    assert (
        terminal.takes_colours() is colours
        and (talk.shaded("x", 1.5) == "\x1b[38;5;16;48;5;210mx\x1b[0m") is colours
    )
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert not terminal.takes_colours() and terminal.paint("x", "2") == "x"


def test_a_token_is_shaded_by_its_kl_and_a_line_end_by_a_picture_of_it(monkeypatch):
    monkeypatch.setattr(terminal, "takes_colours", lambda: True)

    def place(text, kl):
        return heat.ComparedToken(0, text, kl, [], [], 0.0, 0.0)

    def on(text, shade):
        return f"\x1b[38;5;16;48;5;{shade}m{text}\x1b[0m"

    assert talk.heated(
        [place(" a", 0.09), place("b", 0.1), place("", 2.5), place("é", 0.0)]
    ) == " a" + on("b", 224) + on("é", 203)
    assert talk.shaded("x\n\n", 0.5) == on("x\u21b5", 217) + "\n" + on("\u21b5", 217) + "\n"
    monkeypatch.setattr(terminal, "takes_colours", lambda: False)
    assert talk.heated([place(" a", 0.5), place("b\n", 1.26)]) == " ab[1.3]\n"


def test_the_numbers_below_an_answer_say_why_it_was_cut(world):
    here = talking(world)
    printer = terminal.Printer(here.student.tokenizer)
    printer.tokens, printer.times = list(range(12)), [0.0, 1.0, 3.0]
    assert (
        talk.footnote(here.student, [1] * 9, printer)
        == "12 tokens, 5.5 tokens/s; greedy; cut at 12 tokens; /tokens N"
    )
    assert talk.footnote(here.student, [1] * 244, printer).endswith(
        "; greedy; cut where the 256 tokens that the model sees are full"
    )
    printer.tokens[-1] = here.student.how.eos_token_id[0]
    assert talk.footnote(here.student, [1] * 9, printer) == "12 tokens, 5.5 tokens/s; greedy"
    printer.tokens = [7]
    assert talk.footnote(here.student, [1], printer) == "1 token; greedy"


def in_terminal(argv, slave, environment):
    """Run chat.py with a pseudo-terminal as stdin, stdout and its controlling terminal; every token
    takes 20 ms at least."""
    os.setsid()
    handle = os.open(slave, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(handle, number)
    sys.stdin, sys.stdout, sys.stderr = (
        open(0, closefd=False),
        open(1, "w", closefd=False),
        open(2, "w", closefd=False),
    )
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.update(environment)
    torch.set_num_threads(1)
    put = terminal.Printer.put
    terminal.Printer.put = lambda printer, value: (time.sleep(0.02), put(printer, value))
    chat.main(argv)


class Session:
    """chat.py in a pseudo-terminal: `type` a line and get what was shown until the next prompt (or
    another text) appears."""

    def __init__(self, argv, **environment):
        self.master, slave = pty.openpty()
        environment = {"TERM": "xterm", "NO_COLOR": "", "INPUTRC": "/dev/null"} | environment
        self.process = make.processes().Process(
            target=in_terminal, args=(argv, os.ttyname(slave), environment)
        )
        self.process.start()
        self.slave = slave

    def until(self, text):
        seen, end = "", time.monotonic() + 120
        while text not in seen:
            assert time.monotonic() < end and select.select([self.master], [], [], 60)[0], (
                text,
                seen,
            )
            seen += os.read(self.master, 65536).decode(errors="replace")
        return seen

    def type(self, keys, until="> "):
        os.write(self.master, keys.encode())
        return self.until(until)

    def leave(self, keys="\x04"):
        os.write(self.master, keys.encode())
        self.process.join(30)
        for handle in (self.master, self.slave):
            os.close(handle)
        return self.process.exitcode


SGR = re.compile(r"\x1b\[[0-9;]*m")


def test_a_terminal_shows_colours_numbers_and_keeps_what_was_typed(world, tmp_path):
    state = tmp_path / "state"
    argv = [
        "--ckpt",
        str(world / "student"),
        "--teacher",
        str(world / "teacher"),
        "--greedy",
        "--device",
        "cpu",
        "--threads",
        "1",
    ]
    first = Session([*argv, "--max-new-tokens", "8"], XDG_STATE_HOME=str(state))
    assert "/help for help" in first.until("\x1b[1;32m>")
    said = first.type(f"{QUESTIONS[0]}\r", "\x1b[1;32m>")
    answers = [plain(world / name, QUESTIONS[0], 8) for name in ("teacher", "student")]
    assert all(answer in said.replace("\r\n", "\n") for answer in answers)
    assert (
        re.findall(
            r"\x1b\[2m(\d+ tokens), [\d.]+ tokens/s; greedy; cut at 8 tokens; /tokens N\x1b\[0m",
            said,
        )
        == ["8 tokens"] * 2
    )
    assert "\x1b[1;35mteacher:" in said and "\x1b[1;36mstudent:" in said
    assert "\x1b[38;5;16;48;5;203m 2 \x1b[0m" in first.type(
        "/di\t\r", "\x1b[1;32m>"
    )  # Tab completes the command
    assert first.leave() == 0
    path = state / "distil" / "chat_history"
    assert (
        path.read_text().splitlines() == [QUESTIONS[0], "/diff"]
        and path.stat().st_mode & 0o777 == 0o600
    )

    # another start, without colours: the line before the last is two cursors up; Ctrl-C stops the
    # answer and the next question is answered
    second = Session(
        [*argv[:2], *argv[4:], "--max-new-tokens", "200"], XDG_STATE_HOME=str(state), NO_COLOR="1"
    )
    second.until("> ")
    stopped = second.type("\x1b[A\x1b[A\r", plain(world / "student", QUESTIONS[0], 8)[:6])
    stopped += second.type("\x03")
    assert "(stopped)" in stopped and not SGR.search(stopped)
    said = second.type("/tokens 4\r") + second.type("/reset\r") + second.type(f"{QUESTIONS[1]}\r")
    assert (
        plain(world / "student", QUESTIONS[1], 4) in said
        and "4 tokens, " in said
        and not SGR.search(said)
    )
    assert "leaves" in second.type("\x03")  # at the prompt it does not end the program either
    assert second.leave("/exit\r") == 0
    assert path.read_text().splitlines()[2:] == [
        QUESTIONS[0],
        "/tokens 4",
        "/reset",
        QUESTIONS[1],
        "/exit",
    ]


def test_a_history_that_cannot_be_kept_is_said_once_and_ends_nothing(world, tmp_path):
    (tmp_path / "distil").write_text("a file where the folder should be")
    session = Session(
        ["--ckpt", str(world / "student"), "--greedy", *SHORT],
        XDG_STATE_HOME=str(tmp_path),
        NO_COLOR="1",
    )
    assert session.until("> ").count("what you type is not kept") == 1
    assert "12 tokens, " in session.type(f"{QUESTIONS[0]}\r") and session.leave() == 0
