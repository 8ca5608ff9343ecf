"""The student's own text (prepare_data.py --answers student): the ids that it sampled, by its own
softmax, are what is stored and what is learnt, each answer as often as it was sampled."""

import json
import re

import make
import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny_tokenizers as tiny
import torch
from transformers import AutoModelForCausalLM

import prepare_data
from lib import data, files, template
from lib.prepare import ask, split
from lib.prepare import rows as prepared

pytestmark = pytest.mark.usefixtures("no_picture")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A student with a tokenizer of bytes, whose text read again is often of other tokens; prompts
    with reference answers; and a data set of these that holds some out."""
    folder, made = tmp_path_factory.mktemp("own"), tiny.tiny()
    make.model(folder / "student", with_tokenizer=made, vocab=len(made), scale=2.0)
    texts = [{"prompt": f"question {i}", "completion": f"REFERENCE {i}"} for i in range(12)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    argv = ("--source", folder / "rows.jsonl", "--tokenizer", folder / "student", "--workers", 1)
    make.call(prepare_data.main, *argv, "--val", 4, "--out", folder / "given")
    make.call(prepare_data.main, *flags(folder, "own", "--generations", 3))
    return folder


def flags(folder, out, *more, student="student"):
    return (
        *("--source", f"own={folder / 'rows.jsonl'}", "--answers", "student", "--device", "cpu"),
        *("--student", folder / student, "--out", folder / out, "--workers", 1),
        *("--max-new-tokens", 16, "--val", folder / "given", *more),
    )


def stored(folder):
    parts = sorted(folder.glob("answers/*/part-*.parquet"))
    return [row for part in parts for row in pq.read_table(part).to_pylist()]


def learnt(folder):
    """Return (ids, answer mask, logp) of all rows of both sides."""
    found = []
    for name in ("train", "val"):
        side = data.Split(folder, name)
        for number in range(len(side.rows)):
            ids, answer = side.row(number)
            found.append((ids.tolist(), answer.tolist(), float(side.logp[number])))
    return found


def test_the_ids_learnt_are_the_ids_sampled_also_where_the_text_reads_otherwise(world):
    made, otherwise = template.load_tokenizer(world / "own/tokenizer"), 0
    wanted = []
    for row in stored(world / "own"):
        prompt, answer = row["prompt_ids"], row["answer_ids"]
        said = template.render(made, row["prompt"], add_generation_prompt=True)
        assert made(said, add_special_tokens=False)["input_ids"] == prompt
        otherwise += made(row["answer"], add_special_tokens=False)["input_ids"] != answer
        if len(answer) > (row["finish_reason"] == "stop"):
            mask = [False] * len(prompt) + [True] * len(answer)
            wanted.append((prompt + answer, mask, np.float32(row["logp"])))
    assert sorted(learnt(world / "own")) == sorted(wanted)
    assert otherwise > 10, otherwise


def test_the_log_probability_is_the_students_own(world):
    module = AutoModelForCausalLM.from_pretrained(world / "student").double().eval()
    for row in stored(world / "own"):
        ids = torch.tensor([row["prompt_ids"] + row["answer_ids"]])
        with torch.no_grad():
            logp = module(ids).logits[0].log_softmax(-1)
        told = logp[:-1].gather(1, ids[0, 1:, None])[len(row["prompt_ids"]) - 1 :].sum()
        assert row["logp"] == pytest.approx(float(told), abs=1e-3)


def test_what_is_sampled_follows_the_softmax_and_equal_answers_stay(world, tmp_path):
    """Chi-square over 20,000 answers of one token, all classes of which more than ten are expected;
    an answer is a row as often as it was sampled."""
    made, count = tiny.tiny(), 20_000
    make.model(tmp_path / "student", with_tokenizer=made, vocab=len(made), scale=1.0)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "x"}\n{"prompt": "y"}\n')
    argv = list(flags(tmp_path, "out", "--generations", count, "--student-batch", 1024))
    argv[argv.index("--max-new-tokens") + 1], argv[argv.index("--val") + 1] = 1, 0.5
    seeds = (s for s in range(99) if sides(s) == [False, True])
    make.call(prepare_data.main, *argv, "--seed", next(seeds))
    drawn = [row for row in stored(tmp_path / "out") if row["prompt"][0]["content"] == "x"]
    module = AutoModelForCausalLM.from_pretrained(tmp_path / "student").double()
    with torch.no_grad():
        logits = module(torch.tensor([drawn[0]["prompt_ids"]])).logits[0, -1]
    wanted = count * logits.softmax(-1).numpy()
    seen = np.bincount([row["answer_ids"][0] for row in drawn], minlength=len(wanted))
    some = wanted > 10
    chi = float(((seen - wanted)[some] ** 2 / wanted[some]).sum())
    assert seen.sum() == count and some.sum() > 100
    assert chi < some.sum() + 5 * (2 * some.sum()) ** 0.5, (chi, some.sum())
    last = [ids[-1] for ids, _, _ in learnt(tmp_path / "out") if drawn[0]["prompt_ids"] == ids[:-1]]
    seen[3] = 0  # the end: such an answer is empty
    assert np.bincount(last, minlength=len(seen)).tolist() == seen.tolist()


def sides(seed):
    """Return which of the prompts x and y is held out with --val 0.5."""
    hashes = [prepared.prompt_hash(tiny.chat(text), seed) for text in "xy"]
    return [split.ValRows(0.5).candidate(one) for one in hashes]


def test_a_cut_answer_has_no_end_and_one_that_ended_has_it(world):
    (end,), kinds = data.Dataset(world / "own").meta["student"]["sampling"]["stops"], set()
    for row in stored(world / "own"):
        kinds.add(row["finish_reason"])
        assert (row["answer_ids"][-1] == end) == (row["finish_reason"] == "stop")
        assert end not in row["answer_ids"][:-1] and len(row["answer_ids"]) <= 17
    assert "length" in kinds


def test_what_the_other_folder_holds_out_is_held_out_and_asked_once(world):
    asked = {}
    for row in stored(world / "own"):
        asked.setdefault(row["prompt"][0]["content"], []).append(row["generation"])
    lines = files.read_jsonl(world / "given/val.prompts.jsonl")
    held = {line["messages"][0]["content"] for line in lines}
    assert len(held) == 4 and len(asked) == 12
    for prompt, numbers in asked.items():
        assert sorted(numbers) == ([0] if prompt in held else [0, 1, 2])
    own = files.read_jsonl(world / "own/val.prompts.jsonl")
    assert {line["messages"][0]["content"] for line in own} <= held
    # what the student wrote is no reference; what the data had is
    for line in own:
        assert line["reference"] == line["messages"][0]["content"].replace("question", "REFERENCE")


def test_meta_says_who_wrote_and_how(world):
    meta, rows = data.Dataset(world / "own").meta, stored(world / "own")
    told, count = meta["student"], len(rows)
    assert meta["own"] == ["own"] and "teacher" not in meta
    assert told["weights"] and told["sampling"]["temperature"] == told["sampling"]["top_p"] == 1
    assert told["sampling"]["top_k"] == 0 and told["generations"] == 3
    kept = [r for r in rows if len(r["answer_ids"]) > (r["finish_reason"] == "stop")]
    tokens = sum(len(row["answer_ids"]) for row in kept)
    assert told["mean_tokens"] == pytest.approx(tokens / len(kept)) and count == 8 * 3 + 4
    ended = sum(row["finish_reason"] == "stop" for row in kept)
    assert told["ended"] == pytest.approx(ended / len(kept))
    assert told["entropy"] == pytest.approx(-sum(row["logp"] for row in kept) / tokens)


def test_the_answers_are_a_source_beside_others_ids_as_they_are(world):
    argv = ("--source", f"own={world / 'own/answers'}", "--source", f"given={world / 'rows.jsonl'}")
    argv += ("--tokenizer", world / "student", "--val", world / "given", "--workers", 1)
    make.call(prepare_data.main, *argv, "--out", world / "both")
    own, both = learnt(world / "own"), learnt(world / "both")
    given = [row for row in both if np.isnan(row[2])]
    assert sorted(row for row in both if not np.isnan(row[2])) == sorted(own)
    assert len(given) == 12 and data.Dataset(world / "both").meta["own"] == ["own"]
    before = [ids.tolist() for ids, _ in map(data.Split(world / "given", "val").row, range(4))]
    assert {tuple(row[0]) for row in given if row[0] in before} == {*map(tuple, before)}


def test_a_killed_run_goes_on_with_rows_alike(world, monkeypatch):
    """Staged rows that are told again: none of the student's is a duplicate, of itself or of
    others."""
    monkeypatch.setattr(prepare_data, "SHARD_ROWS", 5)
    whole, saved = split.Staging.save, []

    def killed(staging, progress):
        whole(staging, progress)
        saved.append(1)
        if len(saved) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(split.Staging, "save", killed)
    argv = flags(world, "again", "--generations", 3)
    with pytest.raises(KeyboardInterrupt):
        make.call(prepare_data.main, *argv)
    monkeypatch.setattr(split.Staging, "save", whole)
    make.call(prepare_data.main, *argv)
    assert learnt(world / "again") == learnt(world / "own")


def test_a_round_against_the_one_before(world, capsys):
    from lib.prepare import own

    told = {"answers": 9, "mean_tokens": 20.0, "ended": 0.9, "entropy": 1.0}
    own.say(told, told)
    assert "WARNING" not in capsys.readouterr().out
    for name, value in (
        ("mean_tokens", 31),
        ("mean_tokens", 13),
        ("ended", 0.4),
        ("entropy", 0.09),
    ):
        own.say(told | {name: value}, told)
        assert "WARNING: against the round before" in capsys.readouterr().out, (name, value)


class Server:
    """Answers as vLLM does where it is asked for token ids: two tokens and the end."""

    status_code, says, bodies = 200, True, []

    def __init__(self, body, reads):
        self.bodies.append(body)
        ids = reads(body["messages"])
        self.value = {"choices": [{"message": {"content": "hi"}, "finish_reason": "stop"}]}
        if self.says:
            self.value["prompt_token_ids"] = ids
            told = {"content": [{"logprob": -0.5 * n, "token": "x"} for n in (1, 2, 3)]}
            self.value["choices"][0] |= {"token_ids": [70, 71, 3], "logprobs": told}

    def json(self):
        return self.value


def served(world, out, *more):
    argv = [str(word) for word in flags(world, out, *more)]
    at = argv.index("--student")
    argv[at : at + 2] = ["--student-url", "http://127.0.0.1:9/v1", "--student-model", "mine"]
    return (*argv, "--tokenizer", world / "student")


@pytest.fixture
def server(world, monkeypatch):
    made = template.load_tokenizer(world / "given/tokenizer")

    def reads(messages):
        said = template.render(made, messages, add_generation_prompt=True)
        return made(said, add_special_tokens=False)["input_ids"]

    monkeypatch.setattr(ask.Client, "_post", lambda self, body: Server(body, reads))
    monkeypatch.setattr(Server, "bodies", [])


def test_a_student_behind_a_server_says_its_tokens(world, server):
    make.call(prepare_data.main, *served(world, "served"))
    assert len(Server.bodies) == 12
    wanted = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "logprobs": True}
    wanted |= {"repetition_penalty": 1.0, "return_token_ids": True, "max_tokens": 16}
    assert all(wanted.items() <= body.items() for body in Server.bodies)
    rows = learnt(world / "served")
    assert len(rows) == 12
    for ids, answer, logp in rows:
        assert ids[-3:] == [70, 71, 3] and sum(answer) == 3 and logp == -3.0


def test_a_server_that_says_no_tokens_or_renders_otherwise_is_one_line(
    world, server, monkeypatch, capsys
):
    monkeypatch.setattr(Server, "says", False)
    refused("does not say which tokens it sampled", capsys, *served(world, "no1"))
    monkeypatch.setattr(ask.Client, "_post", lambda self, body: Server(body, lambda _: [1, 2]))
    monkeypatch.setattr(Server, "says", True)
    refused("renders a prompt otherwise than --tokenizer", capsys, *served(world, "no2"))


def another(world, *words):
    other = make.model(world / "other", with_tokenizer=make.tokenizer())
    return ("--tokenizer", other, *words)


REFUSED = {
    "another tokenizer": (another, r"has another tokenizer than the data; saw vocabulary"),
    "no prompts": (lambda world: ("--source", f"own={text(world)}"), r"holds no prompt to answer"),
    "beyond the context": (
        lambda world: ("--max-new-tokens", 5000),
        r"--max-new-tokens is beyond the student's context; saw 5000 tokens",
    ),
    "think": (lambda world: ("--think", "drop"), r"learnt as it was sampled"),
    "a teacher": (lambda world: ("--teacher", "x"), r"--teacher needs --answers teacher"),
    "no held-out prompts": (lambda world: ("--val", world / "student"), r"meta.json is missing"),
}


def text(world):
    (world / "words.txt").write_text("some words\n")
    return world / "words.txt"


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_one_line(world, name, capsys):
    more, words = REFUSED[name]
    argv = [str(word) for word in flags(world, f"bad-{name.split()[0]}")]
    for flag, value in zip(*[iter(map(str, more(world)))] * 2):
        if flag in argv:
            argv[argv.index(flag) + 1] = value
        else:
            argv += [flag, value]
    refused(words, capsys, *argv)


def refused(words, capsys, *argv):
    code, said = make.ends(prepare_data.main, *argv)
    said = said or capsys.readouterr().err.splitlines()[-1]
    assert code and "\n" not in said.strip() and re.search(words, said), said


def test_ids_of_another_tokenizer_are_refused_as_a_source(world, capsys):
    other = make.model(world / "other2", with_tokenizer=make.tokenizer())
    argv = ("--source", f"own={world / 'own/answers'}", "--tokenizer", other, "--out", world / "no")
    refused("holds the ids of another tokenizer; saw vocabulary", capsys, *argv)
