"""The student's own text (prepare_data.py --answers student): the ids that it sampled, by its own
softmax, are what is stored and what is learnt, each answer as often as it was sampled."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import make
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny_tokenizers as tiny
import torch
from transformers import AutoModelForCausalLM

import prepare_data
from lib import data, files, template
from lib.prepare import ask, own, places, split, store
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
    ends = data.Dataset(tmp_path / "out").meta["student"]["sampling"]["stops"]
    seen[ends] = 0  # such an answer is empty
    assert np.bincount(last, minlength=len(seen)).tolist() == seen.tolist()


def sides(seed):
    """Return which of the prompts x and y is held out with --val 0.5."""
    hashes = [prepared.prompt_hash(tiny.chat(text), seed) for text in "xy"]
    return [split.ValRows(0.5).candidate(one) for one in hashes]


def test_a_cut_answer_has_no_end_and_one_that_ended_has_it(world):
    ends, kinds = data.Dataset(world / "own").meta["student"]["sampling"]["stops"], set()
    for row in stored(world / "own"):
        kinds.add(row["finish_reason"])
        assert (row["answer_ids"][-1] in ends) == (row["finish_reason"] == "stop")
        assert not {*ends} & {*row["answer_ids"][:-1]} and len(row["answer_ids"]) <= 17
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
    again, own = learnt(world / "again"), learnt(world / "own")
    assert [row[:2] for row in again] == [row[:2] for row in own]
    # the module's fixture may have had more threads, which sum in another order
    assert [row[2] for row in again] == pytest.approx(
        [row[2] for row in own], rel=1e-5, nan_ok=True
    )


def test_a_round_against_the_one_before(world, capsys):
    told = {"answers": 9, "mean_tokens": 20.0, "ended": 0.9, "entropy": 1.0}
    own.say(told, told)
    said = capsys.readouterr().out
    assert "WARNING" not in said and "sampled at" not in said
    own.say(told | {"sampling": {"temperature": 0.5, "top_p": 1.0}}, None)
    assert "sampled at T = 0.5, top-p 1: not the student's own" in capsys.readouterr().out
    for name, value in (
        ("mean_tokens", 31),
        ("mean_tokens", 13),
        ("ended", 0.4),
        ("entropy", 0.09),
    ):
        own.say(told | {name: value}, told)
        assert "WARNING" in capsys.readouterr().out, (name, value)


class Server:
    """Answers as vLLM does where it is asked for token ids: two tokens and the end."""

    status_code, says, bodies = 200, True, []

    def __init__(self, body, reads):
        ids = reads(body["messages"])  # a tokenizer that two threads ask at once may refuse one
        self.bodies.append(body)
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

    monkeypatch.setattr(ask.Client, "_post", lambda self, path, body: Server(body, reads))
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
    monkeypatch.setattr(
        ask.Client, "_post", lambda self, path, body: Server(body, lambda _: [1, 2])
    )
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


def held_out_by(world, folder):
    lines = files.read_jsonl(world / folder / "val.prompts.jsonl")
    return {line["messages"][-1]["content"] for line in lines}


@pytest.mark.parametrize("before, now", [("be kind", ""), ("", "be kind"), ("be kind", "be brief")])
def test_a_prompt_is_held_out_whatever_system_message_the_flag_gives_it(
    world, tmp_path, before, now
):
    """Else what the other folder measures on is trained on, and nothing says it."""
    argv = ("--source", world / "rows.jsonl", "--tokenizer", world / "student", "--workers", 1)
    given = (*argv, "--val", 4, *(("--system", before) if before else ()))
    make.call(prepare_data.main, *given, "--out", tmp_path / "given")
    again = (*argv, "--val", tmp_path / "given", *(("--system", now) if now else ()))
    make.call(prepare_data.main, *again, "--out", tmp_path / "again")
    assert held_out_by(tmp_path, "again") == held_out_by(tmp_path, "given")
    assert len(data.Split(tmp_path / "again", "val").rows) == 4


def test_what_the_other_folder_holds_out_and_is_not_found_is_said(world, tmp_path, capsys):
    for name, word in (("some", "question"), ("none", "asked")):
        texts = [{"prompt": f"{word} {i}", "completion": f"R {i}"} for i in range(6)]
        texts += [{"prompt": f"other {i}", "completion": f"R {i}"} for i in range(6)]
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in texts))
        argv = ("--source", path, "--tokenizer", world / "student", "--workers", 1)
        argv += ("--val", world / "given", "--out", tmp_path / name)
        make.call(prepare_data.main, *argv)
        there = len(data.Split(tmp_path / name, "val").rows)
        told = f"of the 4 prompts that the --val folder holds out {there} are among these rows"
        assert (told in capsys.readouterr().out) == (there < 4)


def test_texts_that_the_other_folder_holds_out_are_said_to_be_unknown(world, tmp_path, capsys):
    (tmp_path / "words.txt").write_text("".join(f"some words {i}\n" for i in range(40)))
    argv = ("--source", tmp_path / "words.txt", "--source", world / "rows.jsonl", "--val", "0.5")
    argv += ("--tokenizer", world / "student", "--workers", 1)
    make.call(prepare_data.main, *argv, "--out", tmp_path / "given")
    capsys.readouterr()
    make.call(prepare_data.main, *flags(world, tmp_path / "own", "--val", tmp_path / "given"))
    assert "holds out are no conversations" in capsys.readouterr().out


def test_make_own_holds_out_what_data_holds_out_whatever_the_flags_of_data(tmp_path):
    root = Path(__file__).parents[2]
    (tmp_path / "meta.json").touch()
    words = ["make", "-n", "own", f"DATA={tmp_path}", "SOURCE=a.jsonl", "DATA_ARGS=--val 50"]
    said = subprocess.run(words, cwd=root, capture_output=True, text=True, check=True).stdout
    (line,) = [line for line in said.splitlines() if "prepare_data.py" in line and "--out" in line]
    assert re.findall(r"--val (\S+)", line)[-1] == str(tmp_path)


def test_own_answers_asked_again_have_the_references_of_the_data(world, tmp_path):
    argv = [str(word) for word in flags(world, tmp_path / "again")]
    argv[1] = f"own={world / 'own/answers'}"
    make.call(prepare_data.main, *argv)
    rows = stored(tmp_path / "again")
    assert len(rows) == 12
    for row in rows:
        assert row["reference"] == row["prompt"][0]["content"].replace("question", "REFERENCE")


def test_a_source_that_the_student_wrote_in_part_is_one_line(world, tmp_path, capsys):
    """Its given rows would lose their cross-entropy, as if they were the student's own."""
    part = next((world / "own").glob("answers/*/part-*.parquet"))
    (tmp_path / "mixed").mkdir()
    shutil.copy(part, tmp_path / "mixed")
    pq.write_table(
        pa.table({"prompt": ["a", "b"], "completion": ["c", "d"]}), tmp_path / "mixed/a.parquet"
    )
    argv = ("--source", tmp_path / "mixed", "--tokenizer", world / "student")
    refused("student's own text in part", capsys, *argv, "--out", tmp_path / "out")


@pytest.mark.parametrize("more", [(), ("--answers", "student")])
def test_the_journal_of_a_killed_run_is_no_source(world, tmp_path, capsys, more):
    """Its lines would be rendered and tokenized, and learnt as references."""
    names = {field.name for field in store.SCHEMA} - {"teacher", "sampling"}
    names |= {"prompt_ids", "answer_ids", "logp"}
    lines = [{name: row[name] for name in names} for row in stored(world / "own")]
    (tmp_path / "journal.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    argv = ("--source", tmp_path, "--tokenizer", world / "student", "--out", tmp_path / "out")
    argv += (*more, "--student", world / "student") if more else ()
    refused("not whole yet", capsys, *argv)


def test_answers_sampled_in_several_ways_are_said(world, tmp_path, capsys):
    argv = flags(world, tmp_path / "own")
    make.call(prepare_data.main, *argv)
    make.call(prepare_data.main, *argv, "--student-temperature", 0.5, "--fresh")
    argv = ("--source", f"own={tmp_path / 'own/answers'}", "--tokenizer", world / "student")
    capsys.readouterr()
    make.call(prepare_data.main, *argv, "--workers", 1, "--out", tmp_path / "two")
    assert "were sampled in 2 ways, and all of them are learnt" in capsys.readouterr().out


@pytest.mark.parametrize("told", ["generation_config.json", "config.json"])
def test_the_student_stops_where_chat_stops(world, tmp_path, told):
    """At the end tokens of either configuration, and the tokenizer's: an answer that goes on beyond
    one is no answer of its own."""
    folder = shutil.copytree(world / "student", tmp_path / "student")
    (folder / "generation_config.json").unlink(missing_ok=True)
    before = files.read_json(folder / told) if told == "config.json" else {}
    files.write_json(folder / told, before | {"eos_token_id": [70, 71]})
    made = template.load_tokenizer(folder)
    assert own.stops_of(folder, made, False) == (70, 71, made.eos_token_id)


def test_columns_do_not_make_given_answers_of_own_ones(world, tmp_path, capsys):
    argv = ("--source", world / "own/answers", "--columns", "prompt=prompt,answer=answer")
    argv += ("--tokenizer", world / "student", "--out", tmp_path / "out")
    refused("--columns would have .* read as given answers", capsys, *argv)


def test_no_other_val_is_advised_where_a_folder_says_what_is_held_out(world, tmp_path, capsys):
    """Its rows would be trained on."""
    texts = [{"prompt": f"question {i}", "completion": f"R {i}"} for i in range(60)]
    (tmp_path / "many.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    argv = ("--source", tmp_path / "many.jsonl", "--tokenizer", world / "student", "--workers", 1)
    make.call(prepare_data.main, *argv, "--val", world / "given", "--out", tmp_path / "out")
    told = capsys.readouterr().out
    assert "val is 4 row(s)" in told and not re.search(r"--val \d+ makes", told)


def test_rows_in_a_file_called_settings_are_data_where_no_answers_are(world, tmp_path):
    """What the store of answers leaves beside them is no data there; elsewhere the name says
    nothing."""
    shutil.copy(world / "rows.jsonl", tmp_path / "rows.jsonl")
    row = {"prompt": "p", "completion": "c"}
    (tmp_path / "settings.json").write_text(json.dumps([row, row | {"prompt": "q"}]))
    names = sorted(Path(str(place)).name for place in places.find_by_path(str(tmp_path)))
    assert names == ["rows.jsonl", "settings.json"]
    kept = places.find_by_path(str(world / "own/answers"))
    assert {Path(str(place)).suffix for place in kept} == {".parquet"}


def test_an_answer_that_is_cut_at_an_id_of_no_token_has_not_ended(world, tmp_path):
    """A model may have more rows than its tokenizer has tokens."""
    made = template.load_tokenizer(world / "student")
    folder = tmp_path / "student"
    make.model(folder, with_tokenizer=made, vocab=len(made) + 20, scale=2.0)
    files.write_json(folder / "generation_config.json", {"eos_token_id": [*range(70, 170)]})
    argv = [str(word) for word in flags(world, tmp_path / "own", "--generations", 20)]
    argv[argv.index("--student") + 1] = str(folder)
    make.call(prepare_data.main, *argv)
    rows, cut = stored(tmp_path / "own"), 0
    ends = files.read_json(tmp_path / "own/meta.json")["student"]["sampling"]["stops"]
    for row in rows:
        ended = bool(row["answer_ids"]) and row["answer_ids"][-1] in ends
        assert ended == (row["finish_reason"] == "stop")
        cut += row["finish_reason"] == "length" and len(row["answer_ids"]) < 16
    assert cut
