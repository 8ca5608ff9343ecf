"""Answers written by a teacher: the local generator against transformers' own, the client against a
server that misbehaves, the store against kill -9, and the judge of answers against true and false
positives."""

import collections
import http.server
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import make
import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny_tokenizers as tiny
import torch
import transformers

import prepare_data
from lib import data, files, generate
from lib.prepare import answers, ask, places, quality, questions, sources, store

pytestmark = pytest.mark.usefixtures("no_picture")
STOPS = tuple(range(3, 20))
SMALL = dict(
    vocab_size=make.V,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    eos_token_id=3,
    pad_token_id=3,
)
DECODERS = {
    "llama": make.config(),
    "learned places": transformers.GPT2Config(
        vocab_size=make.V,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=96,
        bos_token_id=3,
        eos_token_id=3,
    ),
    "sliding window": transformers.MistralConfig(**SMALL, sliding_window=8),
    "both kinds of layer": transformers.Gemma3TextConfig(
        **SMALL | dict(num_hidden_layers=4),
        head_dim=8,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"] * 2,
    ),
}


def decoder(config):
    torch.manual_seed(0)
    module = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for weight in module.parameters():
            if weight.dim() > 1:
                weight *= 6  # far from a flat softmax: the argmax is no matter of rounding
    module.generation_config.pad_token_id, module.generation_config.eos_token_id = 3, list(STOPS)
    return module


def requests(count=16, longest=30, limit=40):
    rng = np.random.default_rng(0)
    return [
        generate.Request(
            i,
            rng.integers(20, make.V, int(rng.integers(1, longest))).tolist(),
            int(rng.integers(1, limit)),
            seed=i,
        )
        for i in range(count)
    ]


# --- lib/generate.py


@pytest.mark.parametrize("kind", DECODERS)
def test_greedy_answers_are_those_of_generate_one_by_one_whatever_the_company(kind):
    module, asked = decoder(DECODERS[kind]), requests()
    wanted = {}
    for request in asked:
        ids = module.generate(
            torch.tensor([request.ids]), max_new_tokens=request.max_new_tokens, do_sample=False
        )[0, len(request.ids) :].tolist()
        wanted[request.key] = (ids[:-1], "stop") if ids[-1] in STOPS else (ids, "length")
    assert {finish for _, finish in wanted.values()} == {"stop", "length"} and len(
        {len(ids) for ids, _ in wanted.values()}
    ) > 5
    for slots in (1, 5, 64):
        made = {
            answer.request.key: (answer.ids, answer.finish)
            for answer in generate.generate(module, asked, generate.Sampling(stops=STOPS), slots)
        }
        assert made == wanted


def test_sampled_answers_depend_on_their_own_seed_and_nothing_else():
    module, how = decoder(DECODERS["llama"]), generate.Sampling(1.5, 40, 0.95, 0.01, 1.1, STOPS)
    alone = {
        answer.request.key: answer.ids for answer in generate.generate(module, requests(), how, 1)
    }
    company = {
        answer.request.key: answer.ids
        for answer in generate.generate(module, generate.by_length(requests()), how, 7)
    }
    some = {
        answer.request.key: answer.ids
        for answer in generate.generate(module, requests()[7:], how, 5)
    }
    assert company == alone and some == {key: alone[key] for key in some}
    same = [generate.Request(seed, [10, 11, 12], 30, seed=seed) for seed in range(8)]
    assert len({tuple(answer.ids) for answer in generate.generate(module, same, how, 8)}) > 4


@pytest.mark.parametrize(
    "how",
    [
        generate.Sampling(1.0),
        generate.Sampling(0.7, 5),
        generate.Sampling(1.3, 0, 0.8),
        generate.Sampling(1.0, 20, 0.6),
        generate.Sampling(1.0, 0, 0.9, 0.05),
        generate.Sampling(0.8, 30, 0.9, 0.0, 1.3),
        generate.Sampling(2.0, 0, 0.999),
    ],
)
def test_tokens_are_drawn_with_the_probabilities_of_transformers(how):
    from transformers.generation import logits_process as hf

    torch.manual_seed(0)
    vocab = (
        2500 if how.top_p == 0.999 else make.V
    )  # more than NUCLEUS tokens hold less than the mass asked for
    logits, before = torch.randn(1, vocab) * 2, torch.tensor([[5, 9, 9]])
    chain = [
        hf.RepetitionPenaltyLogitsProcessor(how.repetition_penalty),
        hf.TemperatureLogitsWarper(how.temperature),
    ]
    chain += [
        hf.TopKLogitsWarper(how.top_k or vocab),
        hf.TopPLogitsWarper(how.top_p),
        hf.MinPLogitsWarper(how.min_p),
    ]
    scores = logits.clone()
    for step in chain:
        scores = step(before, scores)
    wanted = scores.softmax(-1)[0]
    grid = (
        torch.arange(20_000) + 0.5
    ) / 20_000  # every uniform number there is, about: their shares are the probabilities
    seen = torch.zeros(1, vocab, dtype=torch.bool)
    seen[0, before[0]] = True
    drawn = torch.cat(
        [
            generate.choose(
                logits.expand(len(part), -1),
                how,
                part,
                seen.expand(len(part), -1) if how.repetition_penalty != 1 else None,
            )
            for part in grid.split(1000)
        ]
    )
    made = torch.bincount(drawn, minlength=vocab) / len(grid)
    assert (made - wanted).abs().max() < 2e-4 and not made[wanted == 0].any()


def test_an_answer_ends_at_the_models_context():
    module = decoder(DECODERS["learned places"])
    (answer,) = generate.generate(
        module, [generate.Request(0, [10] * 80, 500)], generate.Sampling(stops=()), 4
    )
    assert len(answer.ids) == 16 and answer.finish == "length"


def test_tokens_are_heard_as_they_are_written_and_the_listener_may_stop_one():
    module, heard = decoder(DECODERS["llama"]), collections.defaultdict(list)

    def token(request, number, _):
        heard[request.key].append(number)
        return request.key == 2 and len(heard[2]) == 3

    made = {
        answer.request.key: answer
        for answer in generate.generate(module, requests(5), generate.Sampling(stops=()), 3, token)
    }
    assert {key: answer.ids for key, answer in made.items()} == heard and len(made) == 5
    assert len(made[2].ids) == 3 and made[2].finish == "stop"


def test_a_queue_that_has_nothing_for_now_is_asked_again():
    module, asked = decoder(DECODERS["llama"]), requests(6)
    drip = (entry for request in asked for entry in (None, request, None, None))
    made = {
        answer.request.key: answer.ids
        for answer in generate.generate(module, drip, generate.Sampling(stops=STOPS), 4)
    }
    assert made == {
        answer.request.key: answer.ids
        for answer in generate.generate(module, asked, generate.Sampling(stops=STOPS), 1)
    }


def test_requests_that_come_at_any_time_are_answered_as_alone():
    """A prompt longer than all in work moves the batch's first column; one that came before the
    next step, and had the buffer built anew, lost it."""
    module, asked = decoder(DECODERS["llama"]), requests(24)
    alone = {
        answer.request.key: answer.ids
        for answer in generate.generate(module, asked, generate.Sampling(stops=STOPS), 1)
    }
    for seed in range(4):
        rng, working = np.random.default_rng(seed), set()

        def arriving():
            for place in rng.permutation(len(asked)):
                while working and rng.random() < 0.5:
                    yield None
                working.add(asked[place].key)
                yield asked[place]

        made = {}
        for answer in generate.generate(module, arriving(), generate.Sampling(stops=STOPS), 16):
            working.discard(answer.request.key)
            made[answer.request.key] = answer.ids
        assert made == alone


def test_a_free_place_is_taken_at_once():
    """Eight short answers pass through the second slot while one long answer is written: the passes
    are those of the long one."""
    module, passes = decoder(DECODERS["llama"]), []
    plain = module.forward
    module.forward = lambda *args, **options: (
        passes.append(options["input_ids"].shape) or plain(*args, **options)
    )
    asked = [
        generate.Request("long", [10, 11], 80),
        *(generate.Request(i, [12, 13], 8) for i in range(8)),
    ]
    list(generate.generate(module, asked, generate.Sampling(stops=()), 2))
    assert sum(shape[1] == 1 for shape in passes) < 85


@torch.no_grad()
def test_a_model_with_another_kind_of_memory_answers_one_row_at_a_time():
    """As it would without a memory, whatever it is called and whoever was answered before."""
    heads = dict(num_attention_heads=4, num_key_value_heads=2, head_dim=8, intermediate_size=64)
    small = dict(vocab_size=make.V, hidden_size=32, num_hidden_layers=2)
    for config in (
        transformers.MambaConfig(**small, state_size=4, initializer_range=0.5),
        transformers.RwkvConfig(**small, attention_hidden_size=32),
        # a cache of its own kind; one that is filled and not handed back; none
        transformers.MiniMaxConfig(**small, **heads, num_local_experts=2, block_size=16),
        transformers.RecurrentGemmaConfig(
            **small | dict(num_hidden_layers=3), **heads, lru_width=32
        ),
        transformers.OpenAIGPTConfig(vocab_size=make.V, n_embd=32, n_layer=1, n_head=4),
    ):
        torch.manual_seed(0)
        module, wanted = transformers.AutoModelForCausalLM.from_config(config).eval(), {}
        # RecurrentGemma takes a prompt of one token for a later step
        asked = [replace(request, ids=[20, *request.ids]) for request in requests(3)]
        for request in asked:
            ids = [*request.ids]
            for _ in range(request.max_new_tokens):
                logits = module(torch.tensor([ids]), use_cache=False).logits
                ids.append(logits[0, -1].argmax().item())
            wanted[request.key] = ids[len(request.ids) :]
        made = generate.generate(module, asked, generate.Sampling(), 16)
        assert {answer.request.key: answer.ids for answer in made} == wanted


# --- a server that misbehaves


class Server(http.server.ThreadingHTTPServer):
    """An OpenAI-compatible server. `does(number, body)` says what request `number` of a prompt
    meets: ok, a status, or a fault."""

    daemon_threads, request_queue_size = True, 256

    def __init__(self, does=lambda number, body: "ok", port=0):
        super().__init__(("127.0.0.1", port), Handler)
        self.does, self.bodies, self.headers, self.tries = does, [], [], collections.Counter()
        self.flying = self.most = 0
        self.guard, self.pause = threading.Lock(), 0.0
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        threading.Thread(
            target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
        ).start()

    def handle_error(self, *_):
        pass

    def asked(self):
        return collections.Counter(
            (body["messages"][-1]["content"], body["seed"]) for body in self.bodies
        )


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def reply(self, status, value, headers=()):
        words = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in (
            ("Content-Type", "application/json"),
            ("Content-Length", str(len(words))),
            *headers,
        ):
            self.send_header(name, text)
        self.end_headers()
        self.wfile.write(words)

    def do_GET(self):
        self.reply(200, {"data": [{"id": "big"}, {"id": "bigger"}]})

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.guard:
            server.bodies.append(body)
            server.headers.append(dict(self.headers))
            name = json.dumps([body["messages"], body["seed"]])
            server.tries[name] += 1
            server.flying += 1
            server.most = max(server.most, server.flying)
        try:
            time.sleep(server.pause)
            self.act(server.does(server.tries[name], body), body)
        finally:
            with server.guard:
                server.flying -= 1

    def act(self, deed, body):
        text = f"The reply to {body['messages'][-1]['content']} is number {body['seed'] % 1000}."
        good = {
            "choices": [
                {"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
            ],
            "usage": {"prompt_tokens": 5, "completion_tokens": 7},
        }
        if deed == "ok":
            self.reply(200, good)
        elif isinstance(deed, dict):
            self.reply(200, {"choices": [good["choices"][0] | deed], "usage": good["usage"]})
        elif deed == "echo":
            self.reply(401, {"error": f"wrong key {self.headers['Authorization']}"})
        elif isinstance(deed, int):
            words = f"no: {body['model']} {self.headers['Authorization']}"
            self.reply(
                deed, {"error": {"message": words}}, [("Retry-After", "0.05")] * (deed == 429)
            )
        elif deed == "new name" and "max_tokens" in body:
            time.sleep(0.05)
            self.reply(
                400, {"error": {"message": "max_tokens is not known: use max_completion_tokens"}}
            )
        elif deed == "new name":
            self.reply(200, good)
        elif deed == "no gzip":
            self.send_response(200)
            self.send_header("Content-Encoding", "gzip")
            self.send_header("Content-Length", "3")
            self.end_headers()
            self.wfile.write(b"abc")
        elif deed == "tomorrow":
            self.reply(429, {"error": "quota"}, [("Retry-After", "99999999999")])
        elif deed == "hang":
            time.sleep(1.5)
        elif deed == "garbage":
            self.reply(200, b"<html>hello</html>")
        elif deed == "half":
            words = json.dumps(good).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(words)))
            self.end_headers()
            self.wfile.write(words[:20])
            self.close_connection = True


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


@pytest.fixture
def folder(tmp_path):
    rows = [{"prompt": f"question {i}", "answer": f"SECRET reference {i}"} for i in range(20)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def flags_of(folder, tokenizer, *more, out="out", source="rows.jsonl"):
    return [
        str(word)
        for word in (
            "--source",
            folder / source,
            "--tokenizer",
            tokenizer,
            "--out",
            folder / out,
            "--workers",
            1,
            "--val",
            0.2,
            "--answers",
            "teacher",
            *more,
        )
    ]


def remotely(folder, tokenizer, url, *more, **options):
    return flags_of(
        folder,
        tokenizer,
        "--teacher-url",
        url,
        "--teacher-model",
        "big",
        "--retry-for",
        20,
        *more,
        **options,
    )


def stored(out):
    """Return the rows of all answers of a data set, from the parquet files alone."""
    return [
        row
        for path in sorted(Path(out).glob("answers/*/part-*.parquet"))
        for row in pq.read_table(path).to_pylist()
    ]


def names(rows):
    return sorted((row["prompt"][-1]["content"], row["generation"]) for row in rows)


def everything(prompts=20, generations=1):
    return sorted(
        (f"question {i}", generation) for i in range(prompts) for generation in range(generations)
    )


def test_every_prompt_is_answered_and_becomes_a_row(folder, tokenizer_dir, server, capsys):
    one = server()
    make.call(
        prepare_data.main,
        *remotely(
            folder,
            tokenizer_dir,
            one.url,
            "--generations",
            2,
            "--max-new-tokens",
            77,
            "--teacher-temperature",
            0.5,
        ),
    )
    rows, made = stored(folder / "out"), data.Dataset(folder / "out")
    assert names(rows) == everything(20, 2) and len(one.bodies) == 40
    assert {
        (body["model"], body["max_tokens"], body["temperature"], len(body["messages"]))
        for body in one.bodies
    } == {("big", 77, 0.5, 1)}
    assert len({body["seed"] for body in one.bodies}) == 40
    assert (
        made.meta["rows"]["train"] + made.meta["rows"]["val"] == 40
        and made.meta["sources"][0]["read"] == 20
    )
    told = {
        "teacher": "big",
        "host": "127.0.0.1",
        "max_new_tokens": 77,
        "seed": 0,
        "generations": 2,
        "prompts": 20,
        "answers": 40,
    }
    assert made.meta["teacher"].items() >= told.items() and made.meta["teacher"]["sampling"] == {
        "temperature": 0.5,
        "top_p": None,
    }
    texts = [
        [made.tokenizer().decode(part.row(row)[0]) for row in range(len(part.rows))]
        for part in (made.train, made.val)
    ]
    asked = [{text.split("<|im_end|>")[0] for text in side} for side in texts]
    assert (
        not asked[0] & asked[1] and len(asked[0] | asked[1]) == 20
    )  # the two answers of a prompt lie on one side
    assert all(
        f"The reply to {text.split('user')[1].split('<')[0].strip()} is" in text
        for text in texts[0] + texts[1]
    )
    row = next(row for row in rows if row["prompt"][0]["content"] == "question 7")
    assert (
        row["reference"] == "SECRET reference 7"
        and row["prompt_tokens"] == 5
        and row["answer_tokens"] == 7
        and row["teacher"] == "big@127.0.0.1"
    )
    before = len(one.bodies)
    make.call(
        prepare_data.main,
        *remotely(
            folder,
            tokenizer_dir,
            one.url,
            "--generations",
            2,
            "--max-new-tokens",
            77,
            "--teacher-temperature",
            0.5,
        ),
    )
    assert "finished already" in capsys.readouterr().out and len(one.bodies) == before


def test_the_teacher_never_sees_the_reference(tmp_path, tokenizer_dir, server, monkeypatch):
    talk = tiny.chat("first", "an earlier answer", "second", "SECRET")
    rows = [
        {"messages": talk},
        {"messages": talk[:3]},
        {"messages": tiny.chat("third", "SECRET", system="be brief")},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    one = server()
    make.call(prepare_data.main, *remotely(tmp_path, tokenizer_dir, one.url, "--val", 0))
    assert "SECRET" not in json.dumps(one.bodies)
    sent = sorted(
        (body["messages"] for body in one.bodies), key=len
    )  # the first two rows have one prompt: it is asked once
    assert sent == [tiny.chat("third", system="be brief"), talk[:3]]

    seen, plain = [], generate.generate
    monkeypatch.setattr(
        generate,
        "generate",
        lambda module, asked, *more: plain(
            module, (seen.append(entry) or entry for entry in asked), *more
        ),
    )
    made = tiny.tiny()
    teacher = make.model(tmp_path / "teacher", with_tokenizer=made, vocab=len(made))
    make.call(
        prepare_data.main,
        *flags_of(
            tmp_path,
            tokenizer_dir,
            "--teacher",
            teacher,
            "--max-new-tokens",
            4,
            "--keep-truncated",
            "--device",
            "cpu",
            "--teacher-temperature",
            1,
            "--val",
            0,
            out="local",
        ),
    )
    texts = [made.decode(request.ids) for request in seen]
    assert (
        len(texts) == 2
        and not any("SECRET" in text for text in texts)
        and all(text.endswith("<|im_start|>assistant\n") for text in texts)
    )


def test_prompts_alone_will_do_and_those_that_are_too_long_are_counted(
    tmp_path, tokenizer_dir, server
):
    rows = [{"question": f"question {i}"} for i in range(8)] + [
        {"question": "x" * 200},
        {"question": " "},
        {"question": "question 3"},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    one = server()
    make.call(
        prepare_data.main,
        *remotely(tmp_path, tokenizer_dir, one.url, "--max-prompt", 100, "--val", 0),
    )
    assert (
        names(stored(tmp_path / "out")) == everything(8)
        and stored(tmp_path / "out")[0]["reference"] is None
    )
    assert data.Dataset(tmp_path / "out").meta["dropped"] == {
        "prompt too long": 1,
        "empty": 1,
        "prompt asked already": 1,
    }
    make.call(
        prepare_data.main,
        *remotely(
            tmp_path,
            tokenizer_dir,
            one.url,
            "--columns",
            "prompt=question",
            "--limit",
            3,
            "--val",
            0,
            out="few",
        ),
    )
    assert names(stored(tmp_path / "few")) == everything(3)


@pytest.mark.parametrize("limit,asked", [(6, [3, 3]), (7, [4, 3]), (12, [9, 3]), (90, [20, 3])])
def test_a_limit_asks_of_every_source_its_share(tmp_path, tokenizer_dir, limit, asked):
    words = []
    for name, count in (("a", 20), ("b", 3)):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(f'{{"prompt": "{name}{i}"}}\n' for i in range(count)))
        words += ["--source", str(path)]
    more = ["--answers", "teacher", "--teacher-url", "http://x", "--teacher-model", "x"]
    words += ["--tokenizer", str(tokenizer_dir), "--out", str(tmp_path / "out"), *more]
    args = prepare_data.parse_args([*words, "--limit", str(limit)])
    counts, tokenizer = (collections.Counter(), collections.Counter()), tiny.tiny()
    found = questions.questions(sources.open_all(args), args, tokenizer, 100, *counts)
    names = collections.Counter(question.source for question in found)
    assert [names["a"], names["b"]] == asked


@pytest.mark.parametrize("deed", [429, 500, 503, "hang", "garbage", "half"])
def test_a_fault_of_the_server_is_tried_again_and_every_answer_is_right(
    folder, tokenizer_dir, server, deed
):
    one = server(
        lambda number, body: (
            deed if number <= 2 and body["messages"][0]["content"][-1] in "37" else "ok"
        )
    )
    make.call(prepare_data.main, *remotely(folder, tokenizer_dir, one.url, "--timeout", 0.5))
    rows = stored(folder / "out")
    assert names(rows) == everything() and len(one.bodies) == 20 + 2 * 4
    assert all(
        row["answer"].startswith(f"The reply to {row['prompt'][0]['content']} is") for row in rows
    )


def test_requests_are_in_flight_together_and_no_more_than_asked_for(folder, tokenizer_dir, server):
    one = server()
    one.pause = 0.1
    make.call(prepare_data.main, *remotely(folder, tokenizer_dir, one.url, "--concurrency", 5))
    assert 4 <= one.most <= 5


def test_retry_after_is_honoured(server):
    one, begun = server(lambda number, body: 429 if number == 1 else "ok"), time.monotonic()
    Handler_reply, waits = Handler.reply, []
    client = ask.Client(one.url, "big", {}, 2, 5)
    assert ask.retry_after("3") == 3 and ask.retry_after(None) == 0 and ask.retry_after("soon") == 0
    assert (
        50
        < ask.retry_after(time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 60)))
        <= 60
    )
    Handler.reply = lambda self, status, value, headers=(): Handler_reply(
        self, status, value, [("Retry-After", "0.6")] * (status == 429)
    )
    try:
        (answer,) = ask.ask(client, [ask.ChatRequest(0, tiny.chat("hi"))], 2, 10, waits.append)
    finally:
        Handler.reply = Handler_reply
    assert answer.finish == "stop" and time.monotonic() - begun > 0.6


def test_a_server_that_is_restarted_is_waited_for_and_said_once(
    folder, tokenizer_dir, server, capsys
):
    one = server()
    one.shutdown()
    one.server_close()
    threading.Timer(0.8, lambda: server(port=one.server_port)).start()
    make.call(prepare_data.main, *remotely(folder, tokenizer_dir, one.url))
    said = capsys.readouterr().out
    assert names(stored(folder / "out")) == everything()
    assert said.count("the server is not reached") == 1 and said.count("the server is back") == 1


def test_one_prompt_that_the_server_refuses_or_never_manages(folder, tokenizer_dir, server):
    """A refused prompt (400) is an answer of its kind, asked once; one that only fails (500) is
    asked again by the same command, alone."""
    bad = {"question 3": 400, "question 5": 500}
    one = server(lambda number, body: bad.get(body["messages"][0]["content"], "ok"))
    argv = remotely(folder, tokenizer_dir, one.url, "--concurrency", 2)
    code, words = make.ends(prepare_data.main, *argv)
    assert (
        code == 1
        and words.startswith("error: 1 requests failed while others succeeded")
        and "\n" not in words
    )
    before = len(one.bodies)
    del bad["question 5"]
    make.call(prepare_data.main, *argv)
    assert [body["messages"][0]["content"] for body in one.bodies[before:]] == ["question 5"]
    assert data.Dataset(folder / "out").meta["dropped"] == {"refused by the server": 1}


@pytest.mark.parametrize(
    "deed, words",
    [
        (401, r"refuses a request without a key \(401\); saw .*export TEACHER_API_KEY"),
        (403, "refuses a request without a key"),
        (
            404,
            (
                r"has no model big, or is no such endpoint \(404\); saw .*the models big, bigger;"
                r" wanted .*--teacher-model"
            ),
        ),
        (405, "is no such endpoint"),
        (422, r"refuses every request; saw 422: .*no: big"),
        ("garbage", r"has not answered for \d+ s; saw a reply that is no answer to chat"),
        (500, r"has not answered for \d+ s; saw 500"),
    ],
)
def test_a_server_that_cannot_help_is_one_line(folder, tokenizer_dir, server, deed, words, capsys):
    code, said = make.ends(
        prepare_data.main,
        *remotely(folder, tokenizer_dir, server(lambda *_: deed).url, "--retry-for", 0.3),
    )
    assert code == 1 and said.startswith("error: ") and "\n" not in said
    assert re.search(words, said), said
    assert not stored(folder / "out")


def test_nobody_there_is_one_line(folder, tokenizer_dir, capsys):
    code, said = make.ends(
        prepare_data.main,
        *remotely(folder, tokenizer_dir, "http://127.0.0.1:9/v1", "--retry-for", 0.2),
    )
    assert (
        code == 1
        and "http://127.0.0.1:9/v1 has not answered" in said
        and "the same command" in said
        and "\n" not in said
    )


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--teacher-url", "ftp://x/v1", "--teacher-model", "m"], "--teacher-url is no URL"),
        (
            ["--teacher-url", "http://me:hunter2@host/v1", "--teacher-model", "m"],
            "holds a name, a key or a query",
        ),
        (["--teacher-url", "http://host/v1"], "belong together"),
        (
            ["--teacher-url", "http://host/v1", "--teacher-model", "m", "--teacher", "x"],
            "exactly one",
        ),
        ([], "exactly one"),
        (["--teacher", "x", "--generations", "0"], "--generations is 0"),
        (["--teacher", "x", "--teacher-top-p", "1.5"], "--teacher-top-p is 1.5"),
        (["--answers", "given", "--teacher", "x"], "--teacher needs --answers teacher"),
    ],
)
def test_flags_that_cannot_work_are_refused(folder, tokenizer_dir, capsys, argv, words):
    code, _ = make.ends(prepare_data.main, *flags_of(folder, tokenizer_dir, *argv))
    said = capsys.readouterr().err
    assert code == 2 and words in said.splitlines()[-1] and "hunter2" not in said


def test_the_key_is_sent_and_written_nowhere(folder, tokenizer_dir, server, monkeypatch, capfd):
    key = "sk-test-0123456789"
    monkeypatch.setenv("OPENAI_API_KEY", key)
    one = server(
        lambda number, body: (
            500 if number == 1 else 400 if body["messages"][0]["content"] == "question 3" else "ok"
        )
    )
    make.call(prepare_data.main, *remotely(folder, tokenizer_dir, one.url))
    assert {headers["Authorization"] for headers in one.headers} == {f"Bearer {key}"}
    code, said = make.ends(
        prepare_data.main,
        *remotely(folder, tokenizer_dir, server(lambda *_: "echo").url, out="other"),
    )  # it quotes the key
    assert code == 1 and "***" in said
    out = capfd.readouterr()
    assert key not in said + out.out + out.err
    written = [path for path in folder.rglob("*") if path.is_file()]
    assert len(written) > 10 and not any(key.encode() in path.read_bytes() for path in written)
    monkeypatch.setenv("OPENAI_API_KEY", "two\nlines")
    code, said = make.ends(
        prepare_data.main, *remotely(folder, tokenizer_dir, one.url, out="third")
    )
    assert code == 1 and "is no key" in said and "two" not in said


# --- the store


def test_a_kill_while_a_server_answers_loses_nothing_and_asks_nothing_twice(
    folder, tokenizer_dir, server
):
    one = server()
    one.pause = 0.15
    argv = remotely(folder, tokenizer_dir, one.url, "--generations", 3, "--concurrency", 4)
    for least in (8, 25):
        running = subprocess.Popen(
            [sys.executable, "prepare_data.py", *argv],
            cwd=Path(prepare_data.__file__).parent,
            stdout=subprocess.DEVNULL,
        )
        while (
            sum(
                map(
                    len,
                    (
                        path.read_bytes().splitlines()
                        for path in folder.glob("out/answers/*/journal.jsonl")
                    ),
                )
            )
            < least
        ):
            assert running.poll() is None
            time.sleep(0.02)
        running.kill()
        running.wait()
    (journal,) = folder.glob("out/answers/*/journal.jsonl")
    kept = journal.read_bytes()
    journal.write_bytes(kept + b'{"key": "torn')
    before, sure = (
        len(one.bodies),
        {
            (row["prompt"][0]["content"], row["generation"])
            for row in map(json.loads, kept.splitlines())
        },
    )
    time.sleep(0.3)
    make.call(prepare_data.main, *argv)
    assert names(stored(folder / "out")) == everything(20, 3)
    assert len(one.bodies) - before == 60 - len(sure)
    # at each kill four are in flight, and as many may wait to be written down
    assert one.asked().total() <= 60 + 2 * (4 + 4)
    assert not list(folder.glob("out/answers/*/journal.jsonl"))
    assert data.Dataset(folder / "out").meta["rows"]["train"] > 40


@pytest.mark.parametrize(
    "damage, lost",
    (
        (lambda text: text.replace(b'"crc32"', b'"crc31"', 1), 1),  # no older line among newer
        (lambda text: b"\xff\xfe" + text.decode().encode("utf-16-le"), 4),
        (lambda text: text.replace(b"two", b"tw0", 1), 1),
        (lambda text: text[:-9], 1),
    ),
)
def test_a_damaged_line_of_the_journal_is_asked_again_and_no_other(tmp_path, capsys, damage, lost):
    made = {"teacher": "t", "host": "h", "sampling": {}}
    first = store.Store(tmp_path, made)
    for key in ("one", "two", "three"):
        first.add({"key": key, "generation": 0, "prompt": [], "answer": f"{key}."})
    first.file.close()
    first.lock.release()
    first.journal.write_bytes(damage(first.journal.read_bytes()))
    again = store.Store(tmp_path, made)
    assert len(again.have) == max(0, 3 - lost)
    assert f"{lost} lines of" in capsys.readouterr().out
    again.close()
    again.lock.release()
    (again.folder / "checksums.json").write_text('{"": null}')
    with pytest.raises(SystemExit, match="checksums.json holds what no script of ours wrote"):
        store.Store(tmp_path, made)


@pytest.fixture(scope="module")
def processes():
    return make.processes()


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    made = tiny.tiny()
    return make.model(folder, with_tokenizer=made, vocab=len(made))


def killed(processes, folder, argv, hook):
    process = processes.Process(
        target=make.script,
        args=("prepare_data", argv, folder / "log", hook | {"signal": signal.SIGKILL}),
    )
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL, (process.exitcode, (folder / "log").read_text())


@pytest.mark.parametrize(
    "hooks",
    [
        [
            dict(where="lib.prepare.questions.row_of", number=3),
            dict(where="lib.prepare.questions.row_of", number=9),
        ],
        [
            dict(where="lib.files.sync", number=1, source="part-00000.parquet.part"),
            dict(where="os.ftruncate", number=1),
        ],
        [dict(where="os.replace", number=1, source="part-00000.parquet.part", after=True)],
        [dict(where="lib.files.publish", number=1)],
    ],
)
def test_a_kill_while_a_model_answers_loses_nothing(folder, teacher, processes, hooks, monkeypatch):
    argv = flags_of(
        folder,
        teacher,
        "--teacher",
        teacher,
        "--generations",
        2,
        "--max-new-tokens",
        8,
        "--keep-truncated",
        "--device",
        "cpu",
        "--teacher-batch",
        4,
        "--teacher-temperature",
        1,
    )
    straight = [word if word != str(folder / "out") else str(folder / "straight") for word in argv]
    make.call(prepare_data.main, *straight)
    asked, plain = [], questions.row_of
    monkeypatch.setattr(questions, "row_of", lambda *row: asked.append(row) or plain(*row))
    for hook in hooks:
        killed(processes, folder, argv, hook)
    have = {
        (row["key"], row["generation"])
        for path in folder.glob("out/answers/*/journal.jsonl")
        for row in map(json.loads, path.open())
    }
    have |= {(row["key"], row["generation"]) for row in stored(folder / "out")}
    make.call(prepare_data.main, *argv)
    assert names(stored(folder / "out")) == everything(20, 2) and len(asked) == 40 - len(have)

    def by_name(out):
        return {(row["key"], row["generation"]): row["answer"] for row in stored(folder / out)}

    assert by_name("out") == by_name("straight")  # sampled, and yet what a straight run writes


@pytest.mark.parametrize(
    "where, source, after",
    [
        ("os.replace", "out/tokenizer", False),  # of --fresh
        ("shutil.rmtree", "out/.tokenizer.part", False),
        ("os.replace", "out", False),  # of publishing
        ("os.replace", "out", True),
        ("os.replace", ".out.part", False),
        ("os.replace", ".out.part", True),
        ("os.replace", "answers", False),
        ("os.replace", "answers", True),
    ],
)
def test_fresh_and_publishing_keep_the_answers_wherever_they_are_killed(
    folder, teacher, processes, where, source, after, monkeypatch
):
    argv = flags_of(
        folder,
        teacher,
        "--teacher",
        teacher,
        "--max-new-tokens",
        8,
        "--keep-truncated",
        "--device",
        "cpu",
        "--teacher-temperature",
        1,
    )
    make.call(prepare_data.main, *argv)
    before = stored(folder / "out")
    killed(
        processes,
        folder,
        [*argv, "--fresh"],
        dict(where=where, source=source, after=after, number=1),
    )
    monkeypatch.setattr(answers, "collect", lambda *_: pytest.fail("asked again"))
    make.call(prepare_data.main, *argv, "--fresh")
    assert stored(folder / "out") == before and len(before) == 20
    assert sorted(path.name for path in folder.iterdir() if "out" in path.name) == ["out"]


def test_other_settings_have_another_folder_and_more_generations_do_not(
    folder, tokenizer_dir, server, capsys
):
    one = server()
    make.call(prepare_data.main, *remotely(folder, tokenizer_dir, one.url))
    code, said = make.ends(
        prepare_data.main, *remotely(folder, tokenizer_dir, one.url, "--generations", 2)
    )
    assert code == 1 and "generations 1 -> 2" in said and len(one.bodies) == 20
    make.call(
        prepare_data.main, *remotely(folder, tokenizer_dir, one.url, "--generations", 2, "--fresh")
    )
    assert len(one.bodies) == 40 and names(stored(folder / "out")) == everything(20, 2)
    capsys.readouterr()
    make.call(
        prepare_data.main,
        *remotely(folder, tokenizer_dir, one.url, "--teacher-temperature", 0, "--fresh"),
    )
    said = capsys.readouterr().out
    assert (
        len(one.bodies) == 60
        and len(list((folder / "out" / "answers").glob("*/settings.json"))) == 2
    )
    assert (
        "those of other settings stay in" in said
        and data.Dataset(folder / "out").meta["rows"]["train"] <= 20
    )
    make.call(prepare_data.main, *remotely(folder, tokenizer_dir, one.url, "--fresh"))
    assert len(one.bodies) == 60  # the first settings again: their answers were there all the time
    make.call(
        prepare_data.main,
        *remotely(folder, tokenizer_dir, one.url.replace("127.0.0.1", "localhost"), "--fresh"),
    )
    assert len(one.bodies) == 60  # the server has moved; the teacher is the same


def test_a_generation_config_is_read_for_answers_as_for_training(tmp_path, capsys):
    made = make.model(tmp_path / "odd")
    told = {"do_sample": "true", "temperature": "0.5", "eos_token_id": [3, "<end>"]}
    (made / "generation_config.json").write_text(json.dumps(told))
    how = answers.own_sampling(made, False)
    assert (how.do_sample, how.temperature, how.eos_token_id) == (True, 0.5, [3])
    assert "left out or mended" in capsys.readouterr().out
    (made / "generation_config.json").unlink()
    assert answers.own_sampling(made, False).eos_token_id == 3  # by config.json


def test_a_broken_generation_config_is_said_in_one_line(folder, tokenizer_dir, tmp_path):
    made = make.model(tmp_path / "broken", with_tokenizer=tiny.tiny(), vocab=len(tiny.tiny()))
    (made / "generation_config.json").write_text("{")
    code, said = make.ends(prepare_data.main, *flags_of(folder, tokenizer_dir, "--teacher", made))
    assert code == 1 and "generation_config.json" in said and "\n" not in said.strip()


def test_two_processes_cannot_write_one_folder(folder, tokenizer_dir, server):
    one = server()
    held = store.Store(folder / "out" / "answers", {"teacher": "x", "sampling": {}})
    code, said = make.ends(prepare_data.main, *remotely(folder, tokenizer_dir, one.url))
    assert code == 1 and "is being written by another process" in said and not one.bodies
    del held


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_says_that_the_same_command_continues(
    folder, tokenizer_dir, server, number, capsys
):
    one = server(
        lambda count, body: "ok" if int(body["messages"][0]["content"].split()[1]) < 5 else "hang"
    )
    threading.Timer(1.0, os.kill, (os.getpid(), number)).start()
    handler = signal.getsignal(number)
    code, _ = make.ends(prepare_data.main, *remotely(folder, tokenizer_dir, one.url))
    assert code == 128 + number and signal.getsignal(number) == handler
    assert (
        "answers: stopped with 5 of 20, all of them kept; the same command continues"
        in capsys.readouterr().out
    )
    one.does = lambda *_: "ok"
    before = len(one.bodies)
    make.call(prepare_data.main, *remotely(folder, tokenizer_dir, one.url))
    assert names(stored(folder / "out")) == everything()
    assert {body["messages"][0]["content"] for body in one.bodies[before:]} == {
        f"question {i}" for i in range(5, 20)
    }


def test_tables_are_an_ordinary_data_set(folder, tokenizer_dir, server, monkeypatch):
    monkeypatch.setattr(store, "PART_ROWS", 6)
    make.call(prepare_data.main, *remotely(folder, tokenizer_dir, server().url))
    (kept,) = (path.parent for path in folder.glob("out/answers/*/settings.json"))
    parts = [pq.read_table(path) for path in sorted(kept.glob("part-*.parquet"))]
    assert [len(table) for table in parts] == [6, 6, 6, 2] and all(
        table.schema == store.SCHEMA for table in parts
    )
    looked = sources.look(places.on_disk(next(kept.glob("*.parquet"))), {"messages": "prompt"})
    assert looked.count == 6  # prompts as messages: any reader of ours, and others', takes them


def test_an_export_says_of_every_answer_who_wrote_it_and_how(folder, tokenizer_dir, server):
    make.call(
        prepare_data.main,
        *remotely(
            folder,
            tokenizer_dir,
            server().url,
            "--generations",
            2,
            "--export",
            folder / "shared",
            "--val",
            0,
        ),
    )
    rows = pq.read_table(folder / "shared" / "train.parquet").to_pylist()
    stored_ones = {
        (row["prompt"][0]["content"], row["generation"]): row for row in stored(folder / "out")
    }
    assert len(rows) == 40
    for row in rows:
        kept = stored_ones[row["messages"][0]["content"], row["generation"]]
        assert (
            row["messages"][-1] == {"role": "assistant", "content": kept["answer"]}
            and row["source"] == "rows"
        )
        assert all(
            row[name] == kept[name]
            for name in (
                "reference",
                "finish_reason",
                "prompt_tokens",
                "answer_tokens",
                "teacher",
                "sampling",
            )
        )
    assert row["teacher"] == "big@127.0.0.1" and json.loads(row["sampling"]) == {
        "temperature": None,
        "top_p": None,
    }


# --- what is kept


def test_a_cut_answer_is_dropped_or_kept_without_an_end(folder, tokenizer_dir, server):
    one = server(
        lambda number, body: (
            {"finish_reason": "length"} if body["messages"][0]["content"] == "question 3" else "ok"
        )
    )
    make.call(prepare_data.main, *remotely(folder, tokenizer_dir, one.url, "--val", 0))
    assert data.Dataset(folder / "out").meta["dropped"] == {"answer cut at the limit": 1}
    make.call(
        prepare_data.main,
        *remotely(folder, tokenizer_dir, one.url, "--val", 0, "--keep-truncated", "--fresh"),
    )
    made = data.Dataset(folder / "out")
    assert len(one.bodies) == 20 and not made.meta["dropped"]
    ends = {}
    for row in range(20):
        ids, answer = made.train.row(row)
        ends[made.tokenizer().decode(ids).split("\n")[1].split("<")[0]] = made.tokenizer().decode(
            ids[answer]
        )
    assert not ends.pop("question 3").endswith("<|im_end|>") and all(
        text.endswith(".<|im_end|>") for text in ends.values()
    )


def test_reasons_are_counted(folder, tokenizer_dir, server):
    said = {
        "question 1": "",
        "question 2": "I'm sorry, but I can't help with that.",
        "question 3": "and then he went home " * 30,
        "question 4": None,
        "question 5": "很抱歉，我无法回答这个问题。",
    }
    told = {prompt: {"message": {"content": text}} for prompt, text in said.items()}
    told["question 6"] = {"message": {"content": "Four.", "reasoning_content": "two and two"}}
    one = server(lambda number, body: told.get(body["messages"][0]["content"], "ok"))
    make.call(prepare_data.main, *remotely(folder, tokenizer_dir, one.url))
    assert data.Dataset(folder / "out").meta["dropped"] == {
        "empty answer": 2,
        "answer is a refusal": 2,
        "answer runs in circles": 1,
    }
    (answer,) = (
        row["answer"]
        for row in stored(folder / "out")
        if row["prompt"][0]["content"] == "question 6"
    )
    assert answer == "<think>\ntwo and two\n</think>\n\nFour."


REFUSALS = r"""I'm sorry, but I can't help with that.
I’m sorry, but I cannot assist with this request.
I am unable to provide medical advice.
Unfortunately, I am not able to access real-time data.
I apologize, but I cannot fulfill this request.
As an AI language model, I cannot browse the internet.
<think>Is this allowed?</think> I can't help you with that.
很抱歉，我无法回答这个问题。
对不起，作为一个人工智能，我不能提供医疗建议。
抱歉，无法提供该信息。
作为一个AI语言模型，我无法浏览网页。""".split("\n")
ANSWERS = """I'm sorry to hear that you lost your dog. Here is what to do.
I cannot stress enough how good this is.
Sorry is a board game for four players.
As an AI researcher, Alan Turing could not have known.
Unfortunately, the train was late and we could not catch it.
I can't wait to see you again, my dear friend.
I cannot provide for my family, said the farmer; so he left.
To refuse politely, write: I'm sorry, but I can't help with that.
我不能吃花生，因为我过敏。
很遗憾，他不能来了。
作为人工智能专家，他不能不关心安全。""".split("\n")


def test_refusals_are_told_from_answers():
    assert [text for text in REFUSALS if not quality.refusal(text)] == [] and [
        text for text in ANSWERS if quality.refusal(text)
    ] == []


PROSE = " ".join(
    f"The {word} of the house was {other} than before, said number {i}."
    for i, (word, other) in enumerate(
        (a, b)
        for a in ("door", "roof", "window", "garden")
        for b in ("older", "newer", "brighter", "darker", "smaller")
    )
)


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("It is so. " * 10, True),
        ("Yes: " + "na" * 40, True),
        (PROSE + " and so on" * 25, True),
        ("好的" * 60, True),
        ("".join(f"{i}. The item is good and useful.\n" for i in range(100)), True),
        (PROSE, False),
        ("ha ha ha", False),
        ("Row, row, row your boat. Row, row, row your boat.", False),
        ("", False),
        ("# A title\n" + PROSE + "\n" + "=" * 80, False),
        (
            "| a | b |\n|---|---|\n"
            + "".join(f"| {i * 7919} | {i * i * 31} |\n" for i in range(60)),
            False,
        ),
    ],
)
def test_loops_are_told_from_prose(text, wanted):
    assert quality.loop(text) == wanted


def test_near_duplicates_are_found_and_exercises_with_other_numbers_are_not():
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefghij"), 6)) for _ in range(900)]

    def text():
        return list(rng.choice(words, 200))

    rows = [("q", " ".join(text())) for _ in range(60)]
    near = [
        " ".join([*row[1].split()[:-2], "else"]) for row in rows[:20]
    ]  # two words of two hundred
    far = [" ".join(row[1].split()[:100] + text()[:100]) for row in rows[20:40]]  # half of them
    sums = [
        ("How many apples", f"Ann has {i} apples and buys {i + 2}. " + " ".join(words[:150]))
        for i in range(20)
    ]
    found = quality.Duplicates(several=False)
    for number, (prompt, answer) in enumerate(
        [*rows, *(("q", text) for text in near + far), *sums]
    ):
        found.add(prompt, answer, number)
    result = found.found()
    assert not result[:60].any() and result[60:80].mean() > 0.9 and not result[80:].any()


def test_a_short_answer_may_be_given_to_many_prompts_but_not_twice_to_one():
    found = quality.Duplicates(several=True)
    for prompt, key in (("Is water wet?", 1), ("Is the sun hot?", 2), ("Is water wet?", 1)):
        found.add(prompt, "Yes.", key)
    assert found.found().tolist() == [False, False, True]


def test_a_long_context_that_prompts_share_makes_no_duplicates_of_their_answers():
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefghij"), 6)) for _ in range(900)]
    context, found = " ".join(words[:600]), quality.Duplicates(several=False)
    for i in range(40):
        question, answer = (
            " ".join(rng.choice(words, 10)),
            ("yes" if i % 2 else " ".join(rng.choice(words, 15))),
        )
        found.add(f"{context}\n{question}", answer, i)
    assert not found.found().any()


def test_requests_in_flight_when_the_limits_new_name_is_learnt_are_sent_again(
    folder, tokenizer_dir, server
):
    one = server(lambda number, body: "new name")
    make.call(prepare_data.main, *remotely(folder, tokenizer_dir, one.url, "--concurrency", 8))
    rows = stored(folder / "out")
    assert names(rows) == everything() and {row["finish_reason"] for row in rows} == {"stop"}


def test_odd_replies_are_read_or_asked_for_again_and_never_spoil_the_store(
    folder, tokenizer_dir, server
):
    odd = {
        "question 1": {
            "message": {
                "content": [
                    {"type": "text", "text": "The first "},
                    {"type": "text", "text": "of two parts."},
                ]
            }
        },
        "question 2": {"message": {"content": "half a pair \ud83d here"}},
    }
    again = {
        "question 3": "no gzip",
        "question 4": {"finish_reason": 7},
        "question 5": {"message": {"content": 5}},
    }
    one = server(
        lambda number, body: (
            odd.get(asked := body["messages"][0]["content"])
            or (again.get(asked, "ok") if number == 1 else "ok")
        )
    )
    make.call(prepare_data.main, *remotely(folder, tokenizer_dir, one.url))
    rows = {row["prompt"][0]["content"]: row["answer"] for row in stored(folder / "out")}
    assert (
        len(rows) == 20
        and rows["question 1"] == "The first of two parts."
        and rows["question 2"] == "half a pair ? here"
    )
    assert all(rows[name].startswith(f"The reply to {name}") for name in again)


def test_a_server_that_asks_to_wait_longer_than_our_patience_is_one_line(
    folder, tokenizer_dir, server
):
    code, said = make.ends(
        prepare_data.main,
        *remotely(folder, tokenizer_dir, server(lambda number, body: "tomorrow").url),
    )
    assert code == 1 and "asks to wait 1e+11 s" in said and "the same command" in said


@pytest.mark.parametrize("status", (400, 403))
def test_a_prompt_that_the_server_refuses_after_it_has_answered_others_is_one_prompt_lost(
    folder, tokenizer_dir, server, status
):
    one = server(
        lambda number, body: status if body["messages"][0]["content"] == "question 19" else "ok"
    )
    make.call(prepare_data.main, *remotely(folder, tokenizer_dir, one.url, "--concurrency", 1))
    assert data.Dataset(folder / "out").meta["dropped"] == {"refused by the server": 1}


def test_a_folder_of_the_users_is_still_in_the_way(folder, tokenizer_dir):
    (folder / "out" / "mine").mkdir(parents=True)
    code, said = make.ends(
        prepare_data.main, *remotely(folder, tokenizer_dir, "http://127.0.0.1:9/v1")
    )
    assert code == 1 and "is in the way" in said
    with pytest.raises(SystemExit, match="would delete"):
        files.remove_ours(folder / "out", ("train.rows.npy",))
