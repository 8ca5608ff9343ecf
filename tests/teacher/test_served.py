"""Records that a server fills (dump_logits.py --teacher-url): against those of the same model here,
and what becomes of a server that misbehaves."""

import collections
import http.server
import json
import os
import re
import signal
import socket
import threading
import time

import make
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import dump_logits
import stage2_kd
from lib import data, files, losses
from lib.prepare import ask
from lib.teacher import logits, record, served, truncated, writer

K = 8


class Server(http.server.ThreadingHTTPServer):
    """A server that scores token ids as vLLM does. does(number, body): what request `number` of a
    row meets."""

    daemon_threads = True
    request_queue_size = 64  # of five, some are reset on a machine that is busy

    def __init__(self, folder, does=lambda number, body: "ok", port=0):
        super().__init__(("127.0.0.1", port), Handler)
        self.model = AutoModelForCausalLM.from_pretrained(folder)
        self.names = make.tokenizer().convert_ids_to_tokens([*range(make.V)])
        self.does, self.bodies, self.tries = does, [], collections.Counter()
        self.guard = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        threading.Thread(
            target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
        ).start()

    def handle_error(self, *_):
        pass

    @torch.no_grad()
    def scores(self, ids, k):
        """Return prompt_logprobs: none for the first token, then the k likeliest and the token that
        is there."""
        with self.guard:
            known = self.model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
        entries = [None]
        for place in range(1, len(ids)):
            row = known[place - 1]
            best = row.topk(k).indices.tolist()
            order = row.argsort(descending=True).tolist()
            entries.append(
                {
                    str(id): {
                        "logprob": row[id].item(),
                        "rank": order.index(id) + 1,
                        "decoded_token": self.names[id] if id < make.V else None,
                    }
                    for id in dict.fromkeys([ids[place], *best])
                }
            )
        return entries


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def reply(self, status, value):
        words = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(words)))
        self.end_headers()
        self.wfile.write(words)

    def do_GET(self):
        self.reply(200, {"data": [{"id": "big"}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.guard:
            self.server.bodies.append((self.path, body))
            name = tuple(body["prompt"])
            self.server.tries[name] += 1
            number = self.server.tries[name]
        deed = self.server.does(number, body)
        if isinstance(deed, int):
            return self.reply(deed, {"error": {"message": f"no: {body['model']}"}})
        if isinstance(deed, str) and deed not in ("ok", "none", "moved", "added", "nan", "renamed"):
            return self.reply(400, {"error": {"message": deed}})
        if deed == "moved":
            body["prompt"] = [(id + 1) % make.V for id in body["prompt"]]
        if deed == "added":
            body["prompt"] = [2, *body["prompt"]]
        told = self.server.scores(body["prompt"], body["prompt_logprobs"])
        if deed == "nan":
            for one in told[-1].values():
                one["logprob"] = None
        if deed == "renamed":
            for entry in told[1:]:
                for one in entry.values():
                    one["decoded_token"] = "other"
        choice = {"index": 0, "text": "x", "finish_reason": "length", "prompt_logprobs": told}
        if deed == "none":
            del choice["prompt_logprobs"]
        self.reply(200, {"object": "text_completion", "choices": [choice]})


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(ask, "FIRST", 0.02)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("TEACHER_API_KEY", raising=False)


@pytest.fixture
def server():
    made = []

    def start(*args, **options):
        made.append(Server(*args, **options))
        return made[-1]

    yield start
    for one in made:
        one.shutdown()
        one.server_close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = make.world(tmp_path_factory.mktemp("served"), rows=40, val=6, rows_per_chunk=25)
    make.call(dump_logits.main, *make.dump(folder, "--values", "fp16", "--temperatures", "1"))
    return folder


def remotely(folder, url, *more, out="served"):
    """Return dump_logits.py's arguments for a `world` whose teacher is served."""
    words = [*make.dump(folder, "--retry-for", 5, "--values", "fp16", *more, out=out)]
    at = words.index("--teacher")
    words[at : at + 2] = ["--teacher-url", url, "--teacher-model", "big"]
    return words


def chunks_of(folder, out):
    dataset = data.Dataset(folder / "data")
    return {
        chunk: logits.Chunk(record.chunk_folder(folder / out, chunk), chunk, dataset)
        for chunk in (0, 1, "val")
    }


def test_a_served_record_is_that_of_the_model_run_here(folder, server, capsys):
    make.call(dump_logits.main, *remotely(folder, server(folder / "teacher").url))
    here, there = chunks_of(folder, "logits"), chunks_of(folder, "served")
    for chunk, part in there.items():
        mine, vocab = here[chunk], part.meta["vocab"]
        assert vocab == mine.meta["vocab"] == make.V and len(part.records) == len(mine.records)
        one, other = (record.unpack(each.records, vocab, 0) for each in (mine, part))
        assert torch.equal(one.ids, other.ids)
        assert (one.gap - other.gap).abs().max() < 1e-2  # fp16 of a gap of 16 rounds to 0.008
        assert (one.tail - other.tail).abs().max() < 1e-4
        assert part.meta["teacher_ce"] == pytest.approx(mine.meta["teacher_ce"], abs=1e-5)
        assert part.meta["teacher_acc1"] == mine.meta["teacher_acc1"]
        assert part.meta["temperatures"] == [1.0] and part.meta["tail_rank"] == 0
    said = capsys.readouterr().out
    assert "no other T, no shape (one bucket)" in said and "top 8 of" in said


def test_ids_are_sent_up_to_the_last_target_and_each_row_once(folder, server):
    one = server(folder / "teacher")
    make.call(dump_logits.main, *remotely(folder, one.url, "--concurrency", 3, out="once"))
    dataset = data.Dataset(folder / "data")
    wanted = []
    for split in (dataset.train, dataset.val):
        for row in range(len(split.rows)):
            ids, answer = split.row(row)
            wanted.append(tuple(ids[: np.flatnonzero(answer)[-1] + 1].tolist()))
    assert one.tries == collections.Counter(wanted)
    path, body = one.bodies[0]
    assert path == "/v1/completions" and body["prompt_logprobs"] == K and body["model"] == "big"
    assert body["max_tokens"] == 1


def test_a_server_that_fails_and_is_killed_twice_is_asked_on_and_the_bytes_are_the_same(
    folder, server
):
    steady = server(folder / "teacher")
    make.call(dump_logits.main, *remotely(folder, steady.url, out="steady"))
    shaky = server(folder / "teacher", lambda number, body: "ok" if number > 2 else 503)
    make.call(dump_logits.main, *remotely(folder, shaky.url, out="shaky"))
    assert {*shaky.tries.values()} == {3}

    answered = collections.Counter()

    def dies(number, body):
        answered[tuple(body["prompt"])] += 1
        return "ok"

    port, stop = 0, threading.Event()

    def killed():  # again and again the server is gone for a moment
        nonlocal port
        one = Server(folder / "teacher", dies)
        port = one.server_port
        for _ in range(2):
            while len(one.bodies) < 8:
                time.sleep(0.005)
            one.shutdown(), one.server_close()
            time.sleep(0.1)
            one = Server(folder / "teacher", dies, port)
        stop.wait(60)
        one.shutdown(), one.server_close()

    thread = threading.Thread(target=killed, daemon=True)
    thread.start()
    while not port:
        time.sleep(0.01)
    url = f"http://127.0.0.1:{port}/v1"
    make.call(dump_logits.main, *remotely(folder, url, "--concurrency", 2, out="killed"))
    stop.set()
    thread.join()
    for chunk in ("chunk-0000", "chunk-0001", "val"):
        for name in ("topk.npy", "done.npy"):
            right = (folder / "steady" / chunk / name).read_bytes()
            assert (folder / "shaky" / chunk / name).read_bytes() == right
            assert (folder / "killed" / chunk / name).read_bytes() == right


def test_what_is_there_is_not_asked_again(folder, server, capsys):
    left = 30
    one = server(folder / "teacher", lambda number, body: "ok" if len(one.bodies) <= left else 401)
    code, words = make.ends(
        dump_logits.main, *remotely(folder, one.url, "--concurrency", 1, out="twice")
    )
    assert code == 1 and "refuses a request without a key (401)" in words
    there = {row for row, count in one.tries.items() if count}
    two = server(folder / "teacher")
    make.call(dump_logits.main, *remotely(folder, two.url, out="twice"))
    # but the row that was refused, nothing is asked twice: what had come was flushed
    again = {*two.tries} & there
    assert len(again) == 1 and len({*two.tries} | there) == 46
    three = server(folder / "teacher")
    make.call(dump_logits.main, *remotely(folder, three.url, out="twice"))
    assert not three.bodies and "already finished" in capsys.readouterr().out


def test_what_came_is_on_the_disk_while_the_server_is_silent(folder, server, monkeypatch):
    """Thirty rows that a server had answered before it was gone were asked again, for the next row
    alone brought them to the disk."""
    monkeypatch.setattr(writer, "FLUSH_S", 9999.0)
    monkeypatch.setattr(ask, "IDLE_S", 0.02)
    first, place, seen = set(), folder / "silent" / "chunk-0000" / "done.npy", []

    def kept():
        return int(np.load(place)["done"].sum()) if place.exists() else 0

    def does(number, body):
        first.add(tuple(body["prompt"])) if len(first) < 6 else None
        if tuple(body["prompt"]) not in first:
            until = time.monotonic() + 60
            while kept() < 6 and time.monotonic() < until:
                time.sleep(0.01)
            seen.append(kept())
        return "ok"

    one = server(folder / "teacher", does)
    make.call(dump_logits.main, *remotely(folder, one.url, out="silent"))
    assert min(seen) >= 6


def test_a_signal_ends_it_while_the_server_is_waited_for(folder, tmp_path):
    """And not only after --retry-for."""
    with socket.create_server(("127.0.0.1", 0)) as full:  # it takes a connection, and says nothing
        argv = remotely(folder, f"http://127.0.0.1:{full.getsockname()[1]}/v1")
        argv[argv.index("--out") + 1] = tmp_path / "out"
        argv[argv.index("--retry-for") + 1] = 300

        def ends():
            taken.append(full.accept())
            os.kill(os.getpid(), signal.SIGTERM)

        taken = []
        threading.Thread(target=ends, daemon=True).start()
        code, _ = make.ends(dump_logits.main, *argv)
    assert code == 143 and taken


def test_it_is_held_against_the_model_here(folder, server, capsys):
    one, far = server(folder / "teacher"), {}
    for name in ("teacher", "student"):
        more = ["--check-with", folder / name]
        make.call(dump_logits.main, *remotely(folder, one.url, *more, out="checked"))
        said = re.findall(r"at most (\S+) off, .* KL (\S+) nats", capsys.readouterr().out)
        assert len(said) == 3  # two chunks and val
        far[name] = [[float(one), float(kl)] for one, kl in said]
    assert np.max(far["teacher"]) < 1e-3  # of float16 gaps
    assert np.min(far["student"]) > 0.05  # another model


def test_stage_2_learns_from_it_at_t_1_and_says_why_at_no_other(folder, server, capsys):
    make.call(dump_logits.main, *remotely(folder, server(folder / "teacher").url, out="taught"))
    words = make.stage2(folder, "--steps", 2, "--temperature", 1, logits="taught", out="learnt")
    make.call(stage2_kd.main, *words)
    assert "one bucket, at T=1 alone: a server filled" in capsys.readouterr().out
    code, words = make.ends(
        stage2_kd.main,
        *make.stage2(folder, "--steps", 2, "--temperature", 2, logits="taught", out="no"),
    )
    assert code == 1 and "temperature 2 was not dumped" in words and "loaded here" in words
    (folder / "taught/chunk-0001/topk.npy").unlink()
    code, words = make.ends(
        stage2_kd.main,
        *make.stage2(folder, "--steps", 2, "--temperature", 1, logits="taught", out="no"),
    )
    assert code == 1 and "--teacher-url URL --teacher-model big" in words


@pytest.mark.parametrize(
    "deed, words",
    [
        ("none", "returns no prompt_logprobs"),
        ("moved", "has scored other tokens than it was sent"),
        ("added", "has scored other tokens than it was sent"),
        (404, "has no model big, or is no such endpoint"),
        (403, "refuses a request without a key"),
        ("prompt logprobs of 8 is greater than the max allowed: 5", "--max-logprobs 8"),
        ("renamed", "has another tokenizer than the data"),
    ],
)
def test_a_server_that_cannot_help_is_one_line(folder, server, deed, words, tmp_path):
    one = server(folder / "teacher", lambda number, body: deed)
    argv = remotely(folder, one.url, "--concurrency", 2)
    argv[argv.index("--out") + 1] = tmp_path / "out"
    code, said = make.ends(dump_logits.main, *argv)
    assert code == 1 and words in said and "\n" not in said.strip(), said


def test_a_row_that_the_server_refuses_after_others_is_named_with_its_length(
    folder, server, tmp_path
):
    one = server(
        folder / "teacher",
        lambda number, body: "ok" if len(one.bodies) < 9 else "maximum context length is 8",
    )
    argv = remotely(folder, one.url, "--concurrency", 1)
    argv[argv.index("--out") + 1] = tmp_path / "out"
    code, said = make.ends(dump_logits.main, *argv)
    assert code == 1 and "does not score row 8" in said and "--max-len" in said


def test_log_probabilities_that_are_none_are_asked_again_and_then_said(folder, server, tmp_path):
    one = server(folder / "teacher", lambda number, body: "nan")
    argv = remotely(folder, one.url, "--retry-for", 1)
    argv[argv.index("--out") + 1] = tmp_path / "out"
    code, said = make.ends(dump_logits.main, *argv)
    assert code == 1 and "no answer to completions" in said


def test_a_server_that_is_not_there(folder, tmp_path):
    argv = remotely(folder, "http://127.0.0.1:9/v1", "--retry-for", 0.3)
    argv[argv.index("--out") + 1] = tmp_path / "out"
    code, said = make.ends(dump_logits.main, *argv)
    assert code == 1 and "has not answered" in said and "it continues" in said


@pytest.mark.parametrize(
    "more, words",
    [
        (["--teacher", "x"], "exactly one of --teacher DIR and --teacher-url URL"),
        (["--temperatures", "1,2"], "wanted 1: a server gives probabilities at T = 1"),
        (["--tail-rank", 8], "hidden states, which no server gives"),
        (["--verify", 5], "--check-with DIR"),
        (["--teacher-url", "http://x:1/v1?key=abc"], "holds a name, a key or a query"),
        (["--teacher-url", "x"], "no URL"),
    ],
)
def test_flags_that_cannot_work(folder, more, words, capsys):
    with pytest.raises(SystemExit) as end:
        dump_logits.main([str(word) for word in remotely(folder, "http://x:1/v1", *more)])
    said = capsys.readouterr().err
    assert end.value.code == 2 and words in said and "abc" not in said.split("error:")[1]


def test_flags_of_a_server_without_one(folder, capsys):
    for more in (["--teacher-model", "x"], ["--check-with", "x"]):
        with pytest.raises(SystemExit):
            dump_logits.main([str(word) for word in make.dump(folder, *more)])
    assert "belong together" in capsys.readouterr().err


def test_a_tail_without_a_nan_whatever_the_sum_is_rounded_to():
    logp = torch.tensor([[0.0, -20.0], [1e-7, -30.0], [-0.5, -1.2]], dtype=torch.float64)
    seen = truncated.log_rest(logp.numpy()) - logp[:, 0].numpy()
    assert np.isfinite(seen).all()
    wanted = np.log(1 - np.exp(-0.5) - np.exp(-1.2)) + 0.5
    assert seen[2] == pytest.approx(wanted, abs=1e-12)
    assert seen[0] == pytest.approx(np.log(truncated.LEAST_REST)) and seen[1] < seen[2]


def test_meta_says_that_it_is_served(folder, server):
    make.call(dump_logits.main, *remotely(folder, server(folder / "teacher").url, out="meta"))
    meta = files.read_json(folder / "meta" / "val" / "meta.json")
    assert meta["dtype"] == "served" and meta["teacher_folder"] == "big"


def test_tokens_that_the_student_has_not_are_cut_as_of_a_teacher_that_is_run_here(folder, server):
    """A teacher with more rows in its output layer than the student: their mass, as far as the
    server tells it, goes to all others in proportion; the dump does not end."""
    best = np.array([[0, 9, 2]]), np.log([[0.5, 0.3, 0.1]])
    ids, logp = truncated.likeliest(*best, 5, 3)
    assert ids.tolist() == [[0, 2, 1]]
    assert np.exp(logp[0]) == pytest.approx([0.5 / 0.7, 0.1 / 0.7, 0], abs=1e-12)
    make.model(folder / "wider", seed=2, vocab=make.V + 7)
    url = server(folder / "wider").url
    make.call(dump_logits.main, *remotely(folder, url, "--student", folder / "student", out="wide"))
    known = record.unpack(chunks_of(folder, "wide")[0].records, make.V, 0)
    p = losses.teacher_logp(known, 1.0).exp()
    assert (p < 1e-9).any() and torch.allclose(p.sum(1), torch.ones(len(p)))
    assert int(known.ids.max()) < make.V
    assert all(len({*row}) == K for row in known.ids.tolist())


def test_bare_names():
    assert served.bare("\u0120the") == served.bare(" the") == served.bare("\u2581the") == "the"
    assert served.bare("\ufffd") == ""


def test_answers_of_another_teacher_are_said_at_the_dump(folder, server, capsys, tmp_path):
    other = make.world(tmp_path, rows=6, val=2)
    meta = files.read_json(other / "data" / "meta.json")
    about = {"teacher": {"teacher": "huge", "host": "there"}}
    files.write_json(other / "data" / "meta.json", meta | about)
    make.call(dump_logits.main, *remotely(other, server(other / "teacher").url))
    assert "answers: huge on there wrote them, and the teacher is big" in capsys.readouterr().out
