"""chat.py --serve: OpenAI's own client against the real server, what is refused, who goes away, and
how it ends."""

import asyncio
import concurrent.futures
import contextlib
import functools
import gzip
import http.client
import json
import math
import os
import queue
import re
import resource
import signal
import socket
import threading
import time
import types
from pathlib import Path
from types import SimpleNamespace

import jinja2
import make
import openai
import pytest
import tiny_tokenizers
import tokenizers
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

import chat
from lib import generate, template
from lib.chat import api, engine, heat, routes, serve
from lib.chat import model as chat_model
from lib.chat.text import Text
from lib.prepare import demo, templates

ROOT = Path(__file__).parents[2]
TEMPLATES = sorted(path.name for path in (ROOT / "tests/templates").iterdir())
# they write the system message into the user's, with special tokens alone between messages
GLUED = ("gemma3.jinja", "mistral.jinja")
ASKED = [
    "Ann has 38 apples. She buys 45 more. How many apples does Ann have now?",
    "Leo has 69 eggs.",
    "How many?",
    "Tom has 71 pens.",
]


def user(text):
    return [{"role": "user", "content": text}]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder whose student and teacher are random models, their weights large enough that
    their answers wander."""
    return make.chat_run(tmp_path_factory.mktemp("runs") / "demo", b"\x89PNG picture")


def served(run, *argv, teacher=False):
    """Start the server in this process."""
    argv = [
        "--ckpt",
        str(run / "stage2"),
        "--serve",
        "--port",
        "0",
        "--device",
        "cpu",
        "--greedy",
        "--max-new-tokens",
        "12",
        *argv,
    ]
    args = chat.parse_args(argv + (["--teacher", str(run / "teacher")] if teacher else []))
    listening = serve.open_socket(args)
    student, other = chat_model.both(args, templates.make_ready)
    chats = {"student": student} | ({"teacher": other} if other else {})
    return serve.Server(args, chats, run / "stage2/best", listening)


@pytest.fixture(scope="module")
def server(run):
    torch.set_num_threads(1)
    made = served(run, teacher=True)
    yield made
    made.stop()


@contextlib.contextmanager
def other_server(run, *argv, **more):
    made = served(run, *argv, **more)
    try:
        yield made
    finally:
        made.stop()


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def model(server):
    return server.sides[0].id


def ask(url, path, body=None, headers=(), method=None):
    """Return (status, headers, text) of a request by hand. body: bytes, or a value that is sent as
    JSON."""
    place = url.split("//")[1]
    connection = http.client.HTTPConnection(place, timeout=20)
    data = body if isinstance(body, (bytes, type(None))) else json.dumps(body).encode()
    connection.request(
        method or ("GET" if data is None else "POST"),
        path,
        data,
        {"Content-Type": "application/json"} | dict(headers),
    )
    answer = connection.getresponse()
    made = answer.status, dict(answer.getheaders()), answer.read().decode(errors="replace")
    connection.close()
    return made


def until(true, seconds=10):
    """Wait until something is so."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it never was"
        time.sleep(0.01)


def plain(folder, question, count=12):
    """Return transformers' own greedy answer, and its tokens."""
    tokenizer, module = (
        AutoTokenizer.from_pretrained(folder),
        AutoModelForCausalLM.from_pretrained(folder).eval(),
    )
    ids = torch.tensor([template.prompt_ids(tokenizer, user(question))])
    written = module.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False
    )[0, ids.shape[1] :].tolist()
    return tokenizer.decode(written, skip_special_tokens=True), written


# --- OpenAI's client


def test_a_chat_is_answered_as_transformers_does(run, client, model):
    for question in ASKED:
        answer = client.chat.completions.create(model=model, messages=user(question))
        text, ids = plain(run / "stage2/best", question)
        assert answer.choices[0].message.content == text
        ended = ids[-1] == AutoTokenizer.from_pretrained(run / "stage2/best").eos_token_id
        assert answer.choices[0].finish_reason == ("stop" if ended else "length")
        assert answer.usage.completion_tokens == len(ids) - ended
        assert (
            answer.usage.total_tokens == answer.usage.completion_tokens + answer.usage.prompt_tokens
        )


def test_a_request_may_bring_arguments_of_the_template_and_no_template(server, model):
    import tiny_tokenizers as tiny

    from lib import template

    flag = "{% if more is defined %}{{ more }}{% endif %}"
    tokenizer = tiny.tiny(tiny.CHATML + flag)
    ids = functools.partial(template.prompt_ids, tokenizer)
    side = types.SimpleNamespace(chat=types.SimpleNamespace(ids=ids))
    args = api.template_arguments({"chat_template_kwargs": {"more": "yes"}})
    found = api.chat_prompt(side, user("x"), None, template_args=args)[0]
    assert tokenizer.decode(found) == template.render(tokenizer, user("x"), True) + "yes"
    body = {"model": model, "messages": user(ASKED[0]), "max_tokens": 1}
    for args, status in (({"enable_thinking": False}, 200), ({"chat_template": "x"}, 400)):
        sent = body | {"chat_template_kwargs": args}
        assert ask(server.url, "/v1/chat/completions", sent)[0] == status


def test_the_teacher_answers_under_its_own_name(run, server, client):
    assert [entry.role for entry in client.models.list().data] == ["student", "teacher"]
    answer = client.chat.completions.create(model=server.sides[1].id, messages=user(ASKED[0]))
    assert (
        answer.choices[0].message.content
        == plain(run / "teacher/best", ASKED[0])[0]
        != plain(run / "stage2/best", ASKED[0])[0]
    )


def test_a_streamed_answer_is_the_whole_one_in_pieces(client, model, monkeypatch):
    monkeypatch.setattr("lib.chat.api.PACE_S", 0.0)
    whole = client.chat.completions.create(model=model, messages=user(ASKED[0]))
    chunks = list(
        client.chat.completions.create(
            model=model,
            messages=user(ASKED[0]),
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    pieces = [
        chunk.choices[0].delta.content
        for chunk in chunks
        if chunk.choices and chunk.choices[0].delta.content
    ]
    assert "".join(pieces) == whole.choices[0].message.content and len(pieces) > 5
    finished = [
        chunk.choices[0].finish_reason
        for chunk in chunks
        if chunk.choices and chunk.choices[0].finish_reason
    ]
    assert finished == [whole.choices[0].finish_reason]
    assert chunks[-1].usage == whole.usage and not chunks[-1].choices
    assert set(chunks[-1].speed) == {"tok_per_s", "prompt_s", "first_token_s", "memory_bytes"}
    assert (
        len({chunk.id for chunk in chunks}) == 1 and chunks[0].choices[0].delta.role == "assistant"
    )


def test_a_stream_is_written_at_a_readers_pace_and_not_a_token_at_a_time(
    server, client, model, monkeypatch
):
    def pieces(pace_s):
        monkeypatch.setattr("lib.chat.api.PACE_S", pace_s)
        made = client.chat.completions.create(
            model=model, messages=user(ASKED[0]), max_tokens=40, stream=True, logprobs=True
        )
        return [chunk.choices[0] for chunk in made if chunk.choices[0].delta.content]

    few, many = pieces(0.5), pieces(0.0)
    assert len(few) < 5 < len(many)

    def said(choices):
        return (
            "".join(choice.delta.content for choice in choices),
            [entry for choice in choices for entry in choice.logprobs.content],
        )

    assert said(few) == said(many)


def test_a_streams_bytes_are_server_sent_events_that_end_with_done(server, model):
    status, headers, text = ask(
        server.url,
        "/v1/chat/completions",
        {"model": model, "messages": user("How many?"), "stream": True},
    )
    assert status == 200 and headers["Content-Type"].startswith("text/event-stream")
    lines = text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""] and all(
        json.loads(line.removeprefix("data: ")) for line in lines[:-2]
    )


@pytest.mark.parametrize("streamed", [False, True])
def test_an_answer_ends_before_a_stop_string_even_one_of_several_tokens(client, model, streamed):
    whole = (
        client.chat.completions.create(model=model, messages=user(ASKED[0]))
        .choices[0]
        .message.content
    )
    stop = whole[7:13]  # from within a token into another
    made = client.chat.completions.create(
        model=model, messages=user(ASKED[0]), stop=["never", stop], stream=streamed
    )
    if streamed:
        chunks = list(made)
        text, finish = (
            "".join(chunk.choices[0].delta.content or "" for chunk in chunks),
            chunks[-1].choices[0].finish_reason,
        )
    else:
        text, finish = made.choices[0].message.content, made.choices[0].finish_reason
    assert text == whole[: whole.index(stop)] and finish == "stop"


def test_a_seed_decides_an_answer_and_n_answers_differ(client, model):
    def say(**more):
        return [
            choice.message.content
            for choice in client.chat.completions.create(
                model=model, messages=user(ASKED[0]), temperature=1.5, **more
            ).choices
        ]

    two = say(seed=5, n=2)
    assert two == say(seed=5, n=2) and two[0] != two[1]
    assert two[0] == say(seed=5)[0] and say(seed=6)[0] != two[0]
    assert len({say()[0] for _ in range(4)}) > 1  # without a seed: another answer each time


def test_n_answers_are_streamed_side_by_side_and_the_prompt_is_counted_once(client, model):
    whole = client.chat.completions.create(
        model=model, messages=user(ASKED[0]), temperature=1.5, n=3, seed=1
    )
    said, used = ["", "", ""], None
    for chunk in client.chat.completions.create(
        model=model,
        messages=user(ASKED[0]),
        temperature=1.5,
        n=3,
        seed=1,
        stream=True,
        stream_options={"include_usage": True},
    ):
        used = chunk.usage or used
        for choice in chunk.choices:
            said[choice.index] += choice.delta.content or ""
    assert said == [choice.message.content for choice in whole.choices] and used == whole.usage
    assert (
        used.prompt_tokens
        == client.chat.completions.create(model=model, messages=user(ASKED[0])).usage.prompt_tokens
    )


def test_logprobs_are_the_models_own_in_float64(run, client, model):
    folder = run / "stage2/best"
    tokenizer, module = (
        AutoTokenizer.from_pretrained(folder),
        AutoModelForCausalLM.from_pretrained(folder).eval().double(),
    )
    prompt = template.prompt_ids(tokenizer, user(ASKED[0]))
    made = client.chat.completions.create(
        model=model,
        messages=user(ASKED[0]),
        logprobs=True,
        top_logprobs=4,
        temperature=0.7,
        top_p=0.9,
        seed=3,
    )
    entries, text = made.choices[0].logprobs.content, made.choices[0].message.content
    assert (
        "".join(entry.token for entry in entries) == text
        and len(entries) == made.usage.completion_tokens
    )
    assert b"".join(bytes(entry.bytes) for entry in entries).decode() == text
    words = {
        tokenizer.decode([token]): token for token in range(len(tokenizer))
    }  # the demo's tokenizer does not read back every text
    ids = [words[entry.token] for entry in entries]
    with torch.no_grad():
        logp = module(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 :].log_softmax(-1)
    for place, (token, entry) in enumerate(zip(ids, entries)):
        values, best = logp[place].topk(4)
        assert entry.logprob == pytest.approx(logp[place, token].item(), abs=1e-4)
        assert [top.logprob for top in entry.top_logprobs] == pytest.approx(
            values.tolist(), abs=1e-4
        )
        assert [top.token for top in entry.top_logprobs] == [
            tokenizer.decode([t]) for t in best.tolist()
        ]
    without = client.chat.completions.create(model=model, messages=user(ASKED[0]), logprobs=True)
    assert without.choices[0].logprobs.content[0].top_logprobs == []
    assert (
        client.chat.completions.create(model=model, messages=user(ASKED[0])).choices[0].logprobs
        is None
    )


def test_logprobs_end_where_a_stop_string_cuts_the_text(client, model):
    whole = (
        client.chat.completions.create(model=model, messages=user(ASKED[0]))
        .choices[0]
        .message.content
    )
    cut = client.chat.completions.create(
        model=model, messages=user(ASKED[0]), stop=whole[7:13], logprobs=True
    ).choices[0]
    said = "".join(entry.token for entry in cut.logprobs.content)
    assert said.startswith(cut.message.content) and len(said) - len(cut.message.content) < 6
    chunks = client.chat.completions.create(
        model=model, messages=user(ASKED[0]), stop=whole[7:13], logprobs=True, stream=True
    )
    streamed = [
        entry
        for chunk in chunks
        if chunk.choices[0].logprobs
        for entry in chunk.choices[0].logprobs.content
    ]
    assert streamed == cut.logprobs.content


def test_a_completion_continues_texts_and_tokens(run, client, model):
    tokenizer = AutoTokenizer.from_pretrained(run / "stage2/best")
    texts = ["Ann has", "Tom"]
    made = client.completions.create(model=model, prompt=texts, logprobs=2, max_tokens=5)
    tokens = client.completions.create(
        model=model, prompt=[tokenizer(text).input_ids for text in texts], max_tokens=5
    )
    assert [choice.text for choice in made.choices] == [choice.text for choice in tokens.choices]
    module = AutoModelForCausalLM.from_pretrained(run / "stage2/best").eval()
    for text, choice in zip(texts, made.choices):
        ids = tokenizer(text, return_tensors="pt").input_ids
        written = module.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False
        )[0, ids.shape[1] :]
        assert choice.text == tokenizer.decode(written, skip_special_tokens=True)
        tokens = choice.logprobs.tokens
        assert "".join(tokens) == choice.text and [
            len(top) for top in choice.logprobs.top_logprobs
        ] == [2] * len(tokens)
        assert choice.logprobs.text_offset == [len("".join(tokens[:i])) for i in range(len(tokens))]
    streamed = client.completions.create(model=model, prompt="Ann has", max_tokens=5, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == made.choices[0].text


def test_content_in_parts_and_developer_messages_are_text_and_system(client, model):
    def text(part):
        return {"type": "text", "text": part}

    parts = [
        {"role": "developer", "content": "Add."},
        {"role": "user", "content": [text("How "), text("many?")]},
    ]

    def say(messages):
        return (
            client.chat.completions.create(model=model, messages=messages)
            .choices[0]
            .message.content
        )

    assert (
        say(parts)
        == say([{"role": "system", "content": "Add."}, *user("How many?")])
        != say(user("How many?"))
    )


def test_a_system_prompt_of_the_command_line_is_for_conversations_without_one(run, client, model):
    with (
        other_server(run, "--system", "Add.") as made,
        openai.OpenAI(base_url=made.url + "/v1", api_key="x") as own,
    ):

        def say(messages):
            return (
                own.chat.completions.create(model=model, messages=messages)
                .choices[0]
                .message.content
            )

        with_it = client.chat.completions.create(
            model=model, messages=[{"role": "system", "content": "Add."}, *user("How many?")]
        )
        assert say(user("How many?")) == with_it.choices[0].message.content
        assert (
            say([{"role": "system", "content": "Take away."}, *user("How many?")])
            != with_it.choices[0].message.content
        )


def test_32_clients_at_once_are_answered_as_each_alone(server, client, model):
    asked = [ASKED[i % 4] if i < 8 else f"Ann has {i} apples. " * (1 + i % 5) for i in range(32)]

    def say(text):
        return (
            client.chat.completions.create(model=model, messages=user(text), max_tokens=24)
            .choices[0]
            .message.content
        )

    alone = [say(text) for text in asked]
    working = server.sides[0].engine.working
    most = 0
    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        futures = [pool.submit(say, text) for text in asked]
        while not all(future.done() for future in futures):
            most = max(most, len(working))
            time.sleep(0.001)
    assert [future.result() for future in futures] == alone
    assert most > 4, "they were not answered at once"
    until(lambda: not working)


def test_sampled_greedy_and_penalised_answers_in_one_batch_are_those_of_each_alone(
    server, client, model
):
    ways = [
        dict(temperature=0),
        dict(temperature=1.3, seed=1, top_k=5),
        dict(temperature=0.9, seed=2, top_p=0.8),
        dict(repetition_penalty=1.5),
        dict(temperature=1.0, seed=3, min_p=0.05, repetition_penalty=1.2),
        dict(logprobs=True, top_logprobs=2),
    ] * 3

    def say(way):
        known = {
            name: way[name]
            for name in way
            if name in ("temperature", "seed", "top_p", "logprobs", "top_logprobs")
        }
        made = client.chat.completions.create(
            model=model,
            messages=user(ASKED[0]),
            max_tokens=24,
            **known,
            extra_body={name: way[name] for name in way if name not in known},
        )
        return made.choices[0].message.content

    alone = [say(way) for way in ways[:6]]
    assert len(set(alone)) == 5  # only the first and the last are the same
    with concurrent.futures.ThreadPoolExecutor(18) as pool:
        with frozen(server):  # none begins before all wait
            futures = [pool.submit(say, way) for way in ways]
            until(
                lambda: (
                    len(server.sides[0].engine.waiting) + len(server.sides[0].engine.working) == 18
                )
            )
    assert [future.result() for future in futures] == alone * 3


# --- what clients send

# as their sources write it (bench/serving/clients.py runs the first two); which of its fields are
# named as ignored
SENT = {
    "lm-eval": (
        "chat/completions",
        {"messages": [{"role": "user", "content": "How many?", "type": "text"}]}
        | {"max_tokens": 3, "temperature": 0, "stop": ["x"], "seed": 1234},
        "messages.type",
    ),
    "GuideLLM": (
        "chat/completions",
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "How many?"}]}]}
        | {"stream": True, "max_completion_tokens": 3, "stop": None, "ignore_eos": True}
        | {"stream_options": {"include_usage": True, "continuous_usage_stats": True}},
        "stream_options.continuous_usage_stats",
    ),
    "vLLM's bench": (
        "completions",
        {"prompt": "How many?", "max_tokens": 3, "repetition_penalty": 1.0, "temperature": 0.0}
        | {"logprobs": None, "ignore_eos": False, "stream": True, "top_k": -1, "min_p": 0.0}
        | {"stream_options": {"include_usage": True}},
        None,
    ),
    "LangChain, LiteLLM, ...": (
        "chat/completions",
        {"messages": [{"role": "user", "content": "How many?"}], "max_tokens": 3, "n": 1}
        | {"frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "tools": []}
        | {"tool_choice": "auto", "parallel_tool_calls": False, "response_format": {"type": "text"}}
        | {"user": "u", "store": False, "metadata": {}, "service_tier": "auto", "top_p": 0}
        | {"reasoning_effort": "none", "modalities": ["text"], "min_tokens": 0, "b\r\n: \u00e9": 1},
        "b%0D%0A%3A%20%C3%A9, parallel_tool_calls, service_tier, store, user",
    ),
    "no model": ("chat/completions", {"model": None, "messages": user("How many?")}, None),
    "a slash too many": ("chat/completions/", {"messages": user("How many?")}, None),
}


@pytest.mark.parametrize("client_", SENT)
def test_what_does_not_change_an_answer_is_ignored_and_named(server, model, caplog, client_):
    path, body, ignored = SENT[client_]
    for _ in range(2):
        status, headers, text = ask(server.url, f"/v1/{path}", {"model": model} | body)
        assert status == 200, text
        assert headers.get("X-Ignored-Fields") == ignored
    lines = [line for line in caplog.messages if line.startswith("ignored in")]
    assert [line.partition(": ")[2] for line in lines] == [ignored] * (ignored is not None)


@pytest.mark.parametrize("value", [[], [1], -5, "x"])
def test_a_field_that_is_ignored_is_not_read(server, model, value):
    """A chat's max_completion_tokens, which nobody has looked at, in a completion: 500."""
    body = {"model": model, "prompt": "Ann has", "max_tokens": 2, "max_completion_tokens": value}
    status, headers, text = ask(server.url, "/v1/completions", body)
    assert status == 200, text
    assert headers.get("X-Ignored-Fields") == ("max_completion_tokens" if value else None)


def test_an_answer_goes_back_as_the_sdk_has_it(client, server, model):
    asked = {"model": model, "max_tokens": 4}
    said = client.chat.completions.create(messages=user("How many?"), **asked).choices[0].message
    content = said.content
    more = {"annotations": [], "audio": None, "reasoning_content": None, "refusal": None}
    wanted = None
    for echo in (said, said.to_dict(), said.model_dump(), dict(said), said.model_dump() | more):
        messages = [*user("How many?"), echo, *user("And now?")]
        made = client.chat.completions.create(messages=messages, **asked).choices[0].message
        wanted = wanted or made.content
        assert made.content == wanted
    assert wanted != content
    nothing = [*user("How many?"), {"role": "assistant", "content": None}, *user("And now?")]
    assert client.chat.completions.create(messages=nothing, **asked).choices
    for side in server.sides:  # these ids are absolute paths
        assert client.models.retrieve(side.id).id == side.id
        assert json.loads(ask(server.url, f"/v1/models/{side.id}")[2])["id"] == side.id
    with pytest.raises(openai.NotFoundError, match="there is no model"):
        client.models.retrieve("runs/other")

    async def at_once():
        async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="x") as own:
            asks = [
                own.chat.completions.create(messages=user("How many?"), **asked) for _ in range(3)
            ]
            return [made.choices[0].message.content for made in await asyncio.gather(*asks)]

    assert asyncio.run(at_once()) == [content] * 3


def test_calls_and_tools_are_written_by_the_template(server, model):
    tokenizer = tiny_tokenizers.tiny((ROOT / "tests/templates/qwen3.jinja").read_text())
    side = SimpleNamespace(
        chat=SimpleNamespace(ids=functools.partial(template.prompt_ids, tokenizer))
    )
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    talk = [
        *user("Add."),
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "83"},
    ]
    found = tokenizer.decode(api.chat_prompt(side, talk, None, tools=[TOOL])[0])
    assert json.dumps(TOOL) in found and "<|im_start|>tool\n83" in found
    assert '<tool_call>\n{"name": "add", "arguments": {"a": 1}}' in found
    body = {"model": model, "messages": talk, "max_tokens": 1, "tools": [TOOL]}
    body |= {"tool_choice": "none"}
    assert ask(server.url, "/v1/chat/completions", body)[0] == 200


def test_an_echoed_prompt_has_the_log_probabilities_of_transformers(run, server, model):
    """lm-eval's log-likelihoods: token_logprobs[context:-1], with the token written left out, be it
    the one that ends the answer."""
    module = AutoModelForCausalLM.from_pretrained(run / "stage2/best").eval()
    side, prompts = server.sides[0], [[7, 9, 30, 11, 64], [12, 5, 8], [6]]
    body = {"model": model, "prompt": prompts, "echo": True, "logprobs": 1, "temperature": 0}

    def choices(**more):
        status, _, text = ask(server.url, "/v1/completions", body | {"max_tokens": 1} | more)
        assert status == 200, text
        return json.loads(text)["choices"]

    for ids, choice, alone in zip(prompts, choices(), choices(max_tokens=0)):
        with torch.no_grad():
            logp = module(torch.tensor([ids])).logits[0].log_softmax(-1)
        told = choice["logprobs"]
        assert told["token_logprobs"][0] is None and told["top_logprobs"][0] == {}
        assert len(told["tokens"]) == len(ids) + 1
        own = [logp[at, token].item() for at, token in enumerate(ids[1:])]
        assert told["token_logprobs"][1:-1] == pytest.approx(own, abs=1e-4)
        best = [max(top.values()) for top in told["top_logprobs"][1:]]
        assert best == pytest.approx(logp.max(-1).values.tolist(), abs=1e-4)
        text = side.chat.tokenizer.decode(ids, skip_special_tokens=True)
        assert choice["text"].startswith(text) and alone["text"] == text
        assert alone["logprobs"] == {name: few[:-1] for name, few in told.items()}
        assert alone["finish_reason"] == "length"
    own = server.sides[0].chat.tokenizer.eos_token_id
    stopped = choices(stop_token_ids=list(range(side.chat.module.vocab_size)))
    for ids, choice in zip(prompts, stopped):
        assert choice["finish_reason"] == "stop"
        assert len(choice["logprobs"]["token_logprobs"]) == len(ids) + 1, own
    words = json.loads(
        ask(server.url, "/v1/completions", {"prompt": "Ann has", "echo": True, "max_tokens": 0})[2]
    )
    assert words["choices"][0]["text"] == "Ann has" and words["choices"][0]["logprobs"] is None
    streamed = ask(server.url, "/v1/completions", body | {"max_tokens": 2, "stream": True})[2]
    chunks = [json.loads(line[6:]) for line in streamed.split("\n\n")[:-2]]
    for place, choice in enumerate(choices(max_tokens=2)):
        mine = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == place]
        assert "".join(one["text"] for one in mine) == choice["text"]
        parts = [one["logprobs"]["token_logprobs"] for one in mine if one["logprobs"]]
        assert sum(parts, []) == choice["logprobs"]["token_logprobs"]


def test_the_token_that_ends_an_answer_can_be_ignored_put_off_or_chosen(server, model, monkeypatch):
    side, body = server.sides[0], {"model": model, "max_tokens": 8, "prompt": [7, 9, 30]}
    monkeypatch.setattr(side.engine, "how", generate.Sampling())

    def said(**more):
        made = json.loads(ask(server.url, "/v1/completions", body | {"logprobs": 0} | more)[2])
        choice = made["choices"][0]
        return choice["logprobs"]["tokens"], choice["finish_reason"], choice["text"]

    module = side.chat.module
    with torch.no_grad():
        first = module(torch.tensor([body["prompt"]])).logits[0, -1].topk(2).indices.tolist()
    whole = said()
    assert len(whole[0]) == 8 and whole[1] == "length"
    plain = {"model": model, "max_tokens": 8, "prompt": [7, 9, 30], "stop_token_ids": first[:1]}
    made = json.loads(ask(server.url, "/v1/completions", plain)[2])
    assert made["choices"][0]["text"] == "" and made["choices"][0]["finish_reason"] == "stop"
    monkeypatch.setattr(side.engine, "how", generate.Sampling(stops=(first[0],)))
    assert json.loads(ask(server.url, "/v1/completions", body)[2])["choices"][0]["text"] == ""
    assert said(ignore_eos=True) == whole
    later = said(min_tokens=1)
    assert later[0][0] == side.chat.tokenizer.decode([first[1]])  # the likeliest but it


def test_logits_that_are_no_numbers_make_no_broken_json(server, model, monkeypatch):
    """NaN and Infinity are none."""
    asked = SimpleNamespace(side=server.sides[0], chat=True, jobs=[SimpleNamespace(top=1)])
    for bad in (math.nan, -math.inf):
        tokens = [engine.WrittenToken(5, 0, generate.Likely(bad, [(6, bad)]))]
        entry = api.logprobs(asked, tokens)["content"][0]
        assert entry["logprob"] == entry["top_logprobs"][0]["logprob"] == -9999.0
    token = routes.heat.ComparedToken(5, "x", math.nan, [], [], math.nan, 0.5)
    monkeypatch.setattr(routes.heat, "compare_tokens", lambda *_, **__: [token])
    body = {"messages": user("How many?"), "answer": "8"}
    status, _, text = ask(server.url, "/v1/heatmap", body)
    assert status == 500 and "not finite" in json.loads(text)["error"]["message"]


# --- what is refused

TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
GOOD = {"messages": [{"role": "user", "content": "How many?"}]}
BAD = [
    (b"{", 400, None),
    (b"", 400, None),
    (b"[]", 400, None),
    (b"\xff\xfe", 400, None),
    (b"[" * 100_000, 400, None),
    (b'{"a": NaN}', 400, None),
    (b'{"n": ' + b"9" * 5000 + b"}", 400, None),
    ({}, 400, None),
    ({"messages": []}, 400, "messages"),
    ({"messages": "hi"}, 400, "messages"),
    ({"messages": [{"role": "user"}]}, 400, "messages.0"),
    ({"messages": [{"role": "robot", "content": "x"}]}, 400, "messages.0.role"),
    ({"messages": [{"role": "user", "content": 7}]}, 400, "messages.0.content"),
    (
        {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "image_url", "image_url": {"url": "http://x"}}],
                }
            ]
        },
        400,
        "messages.0.content",
    ),
    ({"messages": user("\ud800")}, 400, None),
    (GOOD | {"model": "no such"}, 404, "model"),
    (GOOD | {"model": "../../etc/passwd"}, 404, "model"),
    (GOOD | {"model": 7}, 400, "model"),
    (GOOD | {"temperature": -1}, 400, "temperature"),
    (GOOD | {"temperature": "hot"}, 400, "temperature"),
    (GOOD | {"top_p": 1.5}, 400, "top_p"),
    (GOOD | {"max_tokens": -5}, 400, "max_tokens"),
    (GOOD | {"max_tokens": 1.5}, 400, "max_tokens"),
    (GOOD | {"n": 10**9}, 400, "n"),
    (GOOD | {"n": 0}, 400, "n"),
    (GOOD | {"n": True}, 400, "n"),
    (GOOD | {"stop": [""]}, 400, "stop.0"),
    (GOOD | {"stop": ["x"] * 99}, 400, "stop"),
    (GOOD | {"seed": 2**70}, 400, "seed"),
    (GOOD | {"top_logprobs": 3}, 400, "top_logprobs"),
    (GOOD | {"logprobs": True, "top_logprobs": 99}, 400, "top_logprobs"),
    (GOOD | {"frequency_penalty": 1}, 400, "frequency_penalty"),
    (GOOD | {"tools": [{"type": "function"}]}, 400, "tools"),
    (GOOD | {"response_format": {"type": "json_object"}}, 400, "response_format"),
    (GOOD | {"tools": [TOOL], "tool_choice": "auto"}, 400, "tools"),
    (GOOD | {"tools": [TOOL], "tool_choice": "required"}, 400, "tool_choice"),
    (GOOD | {"response_format": {"type": "json_schema", "json_schema": {}}}, 400, "response_f"),
    (GOOD | {"logit_bias": {"5": -100}, "colour": "red"}, 400, "logit_bias"),
    (GOOD | {"guided_regex": "a*"}, 400, "guided_regex"),
    (GOOD | {"functions": [{"name": "add"}]}, 400, "functions"),
    (GOOD | {"modalities": ["text", "audio"]}, 400, "modalities"),
    ({"messages": [{"role": "user", "content": None}]}, 400, "messages.0.content"),
    ({"messages": [{"role": "assistant", "content": "x", "audio": {"id": "1"}}]}, 400, "messages"),
    ({"messages": user("apples " * 400)}, 400, "messages"),
]


@pytest.mark.parametrize("body, status, param", BAD, ids=[str(i) for i in range(len(BAD))])
def test_a_bad_request_gets_its_status_and_says_where(server, model, body, status, param):
    body = body if isinstance(body, bytes) else {"model": model} | body
    for more in ({}, {"stream": True}):
        got, _, text = ask(
            server.url, "/v1/chat/completions", body if isinstance(body, bytes) else body | more
        )
        error = json.loads(text)["error"]
        assert (
            got == status
            and (error["param"] or "").startswith(param or "")
            and set(error) == {"message", "type", "param", "code"}
        )
        assert "\n" not in error["message"] and len(error["message"]) < 400
    assert ask(server.url, "/healthz")[0] == 200


def test_a_whole_number_may_have_a_point(server, model):
    """To JSON Schema 5.0 is an integer; torch took it for none, and the engine died of it."""
    floats = {
        "top_k": 5.0,
        "n": 2.0,
        "max_tokens": 3.0,
        "seed": 1.0,
        "top_logprobs": 2.0,
        "logprobs": True,
        "temperature": 1.0,
    }
    whole = {name: int(value) if name != "logprobs" else value for name, value in floats.items()}
    choices = [
        json.loads(ask(server.url, "/v1/chat/completions", {"model": model} | GOOD | more)[2])[
            "choices"
        ]
        for more in (floats, whole)
    ]
    assert choices[0] == choices[1] and len(choices[0]) == 2
    assert (
        ask(
            server.url,
            "/v1/completions",
            {"model": model, "prompt": [5.0, 6.0], "logprobs": 1.0, "max_tokens": 2.0},
        )[0]
        == 200
    )


def test_openais_client_raises_its_own_errors(client, model):
    with pytest.raises(openai.NotFoundError, match="no model"):
        client.chat.completions.create(model="other", messages=user("x"))
    with pytest.raises(openai.BadRequestError, match="temperature") as wrong:
        client.chat.completions.create(model=model, messages=user("x"), temperature=-1)
    assert wrong.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as long:
        client.chat.completions.create(model=model, messages=user("apples " * 400))
    assert long.value.code == "context_length_exceeded"


@pytest.mark.parametrize(
    "body, status",
    [
        ({"prompt": ""}, 200),
        ({"prompt": []}, 400),
        ({"prompt": [[]]}, 400),
        ({"prompt": [10**6]}, 400),
        ({"prompt": ["a"] * 81}, 400),
        ({"prompt": ["a"] * 41, "n": 2}, 400),
        ({"prompt": "a", "best_of": 2}, 400),
        ({"prompt": "a", "suffix": "b"}, 400),
        ({"prompt": [-1]}, 400),
        ({"prompt": [1.5]}, 400),
        ({"prompt": {"a": 1}}, 400),
        ({}, 400),
    ],
)
def test_a_bad_completion_is_refused(server, model, body, status):
    got, _, text = ask(server.url, "/v1/completions", {"model": model} | body)
    empty = not server.sides[0].chat.tokenizer("").input_ids
    assert got == (400 if status == 200 and empty else status), text


def test_a_body_of_another_type_or_a_large_one_is_refused_and_memory_stays_flat(server, model):
    assert (
        ask(
            server.url,
            "/v1/chat/completions",
            {"model": model} | GOOD,
            {"Content-Type": "text/plain"},
        )[0]
        == 415
    )
    zipped = gzip.compress(json.dumps({"model": model} | GOOD).encode())
    told = ask(server.url, "/v1/chat/completions", zipped, {"Content-Encoding": "gzip"})
    assert told[0] == 415 and "gzip" in told[2]
    big = b'{"messages": "' + b"x" * 10_000_000 + b'"}'
    assert ask(server.url, "/v1/chat/completions", big)[0] == 413
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(20):
        status, _, text = ask(server.url, "/v1/chat/completions", big)
        assert status == 413 and "1.0" in json.loads(text)["error"]["message"]
    assert (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 40_000
    )  # KB: not another ten bodies


@pytest.mark.parametrize(
    "path, more, status",
    [
        ("completions", {"prompt": [1] * 300_000}, 400),
        ("completions", {"prompt": [-1] * 250_000}, 400),
        ("completions", {"prompt": [1.5] * 200_000}, 400),
        ("chat/completions", {"messages": [1] * 300_000}, 400),
        ("chat/completions", {"messages": [{}] * 200_000}, 400),
        ("chat/completions", {str(number): 1 for number in range(50_000)}, 400),
    ],
)
def test_a_body_of_many_values_is_refused_at_once(server, model, path, more, status):
    """The schema's check took 40 s of the server's CPU for a body of 600 kB."""
    began = time.process_time()
    assert ask(server.url, f"/v1/{path}", {"model": model} | more)[0] == status
    assert time.process_time() - began < 5


def test_tokens_of_a_long_prompt_are_checked_each(server, model):
    for prompt, says in (
        ([5] * 40 + [-1], "minimum"),
        ([5] * 40 + [10**6], "none of the model's"),
        ([5] * 40 + [True], "prompt"),
    ):
        status, _, text = ask(server.url, "/v1/completions", {"model": model, "prompt": prompt})
        assert status == 400 and says in text
    assert (
        ask(server.url, "/v1/completions", {"model": model, "prompt": [5] * 40, "max_tokens": 1})[0]
        == 200
    )


def test_a_body_as_deep_as_python_can_read_is_refused(server):
    """Some are deep enough that their complaint cannot be printed, and not so deep that they cannot
    be read."""
    for depth in range(850, 1000, 3):
        assert (
            ask(
                server.url,
                "/v1/chat/completions",
                f'{{"messages": {"[" * depth + "]" * depth}}}'.encode(),
            )[0]
            == 400
        )


@pytest.mark.parametrize(
    "path, method, status",
    [
        ("/nothing", "GET", 404),
        ("/v1/chat/completions", "GET", 405),
        ("/healthz", "POST", 405),
        ("/run/../chat.py", "GET", 404),
        ("/run/%2e%2e/comparison.html", "GET", 404),
        ("/run/", "GET", 404),
        ("/lib/chat/openapi.json", "GET", 404),
        ("/run/history.jsonl", "GET", 404),
    ],
)
def test_only_what_is_there_is_served_and_no_path_reaches_a_file(server, path, method, status):
    got, _, text = ask(server.url, path, method=method)
    assert got == status and json.loads(text)["error"]["message"]


def test_what_a_run_has_is_served_and_what_it_lacks_is_not(run, server):
    assert json.loads(ask(server.url, "/run.json")[2]) == {
        "ckpt": str(run / "stage2"),
        "curves": True,
        "comparison": True,
        "samples": False,
    }
    assert (
        ask(server.url, "/run/comparison.html")[2] == "<title>comparison</title>"
        and "PNG picture" in ask(server.url, "/run/curves.png")[2]
    )
    assert ask(server.url, "/run/comparison.html")[1]["Content-Security-Policy"].startswith(
        "sandbox;"
    )
    assert ask(server.url, "/run/samples.md")[0] == 404


def test_the_page_runs_its_own_script_and_no_other(server):
    status, headers, text = ask(server.url, "/")
    policy = headers["Content-Security-Policy"]
    assert status == 200 and "unsafe" not in policy and "default-src 'none'" in policy
    assert (
        len(re.findall("'sha256-[A-Za-z0-9+/=]{44}'", policy))
        == text.count("<script>") + text.count("<style>")
        == 2
    )


# --- who may ask


def test_names_and_pages_of_other_sites_are_refused_where_there_is_no_key(server, model):
    port = server.url.rpartition(":")[2]
    names = {
        f"localhost:{port}": 200,
        f"127.0.0.1:{port}": 200,
        f"[::1]:{port}": 200,
        "evil.example": 403,
        f"evil.example:{port}": 403,
    }
    for name, status in names.items():
        assert ask(server.url, "/v1/models", headers={"Host": name})[0] == status, name
    good = {"model": model} | GOOD
    assert (
        ask(server.url, "/v1/chat/completions", good, {"Origin": "http://evil.example"})[0] == 403
    )
    assert ask(server.url, "/v1/chat/completions", good, {"Origin": "null"})[0] == 403
    assert (
        ask(server.url, "/v1/chat/completions", good, {"Origin": f"{server.url}.evil.example"})[0]
        == 403
    )
    assert ask(server.url, "/v1/chat/completions", good, {"Origin": server.url})[0] == 200


def test_a_key_is_asked_for_on_every_path_but_four(run):
    with other_server(run, "--api-key", "sesame") as made:
        with_key = {"Authorization": "Bearer sesame", "Host": "any.example"}
        for rule in made.app.url_map.iter_rules():
            open_ = rule.rule in routes.FOR_ALL
            get = "GET" in rule.methods
            for headers in (
                {},
                {"Authorization": "Bearer wrong"},
                {"Authorization": "Bearer s\u00e9same".encode().decode("latin-1")},
            ):
                status = ask(made.url, rule.rule, None if get else {}, headers)[0]
                assert (status == 200) if open_ else (status == 401), (rule.rule, status)
            assert ask(made.url, rule.rule, None if get else {}, with_key)[0] in (200, 400, 404)
        with openai.OpenAI(base_url=made.url + "/v1", api_key="sesame") as own:
            assert own.models.list().data


def test_a_page_elsewhere_that_has_the_key_may_ask(run, model):
    """A browser asks first (a preflight), without the key: that was 401."""
    elsewhere = {"Origin": "http://localhost:5173"}
    before = elsewhere | {"Access-Control-Request-Method": "POST"}
    before |= {"Access-Control-Request-Headers": "authorization,content-type"}
    body = {"model": model, "max_tokens": 2} | GOOD
    path = "/v1/chat/completions"
    with other_server(run, "--api-key", "abc") as made:
        status, headers, text = ask(made.url, path, None, before, "OPTIONS")
        assert status == 204 and not text and headers["Access-Control-Allow-Origin"] == "*"
        # the SDK for JavaScript sends x-stainless-os and others
        assert headers["Access-Control-Allow-Headers"] == "Authorization, *"
        for key, wanted in (("abc", 200), ("abd", 401)):
            key_ = elsewhere | {"Authorization": f"Bearer {key}"}
            status, headers, _ = ask(made.url, path, body, key_)
            assert status == wanted and headers["Access-Control-Allow-Origin"] == "*"
        assert ask(made.url, "/v1/models", None, elsewhere, "OPTIONS")[0] == 401
    with other_server(run) as made:  # without a key no page of another site may
        status, headers, _ = ask(made.url, path, None, before, "OPTIONS")
        assert status == 403 and "Access-Control-Allow-Origin" not in headers


@pytest.mark.parametrize("kind", ["application/x-www-form-urlencoded", ""])
def test_a_body_may_come_without_its_type(server, model, kind):
    body = {"model": model, "max_tokens": 2} | GOOD
    assert ask(server.url, "/v1/chat/completions", body, {"Content-Type": kind})[0] == 200


@pytest.mark.parametrize(
    "argv, says",
    [
        (["--host", "0.0.0.0"], "--api-key"),
        (["--port", "99999"], "--port"),
        (["--slots", "0"], "--slots"),
        (["--queue", "-1"], "--queue"),
        (["--time-limit", "0"], "--time-limit"),
        (["--prompt", "x"], "exclude"),
        (["--out", "x"], "belong together"),
    ],
)
def test_flags_that_cannot_work_are_refused(run, capsys, argv, says):
    with pytest.raises(SystemExit) as end:
        chat.parse_args(["--ckpt", str(run / "stage2"), "--serve", *argv])
    assert end.value.code == 2 and says in capsys.readouterr().err


def test_a_servers_flags_want_serve(run, capsys):
    with pytest.raises(SystemExit) as end:
        chat.parse_args(["--ckpt", str(run / "stage2"), "--port", "1"])
    assert end.value.code == 2 and "--serve" in capsys.readouterr().err


@pytest.mark.parametrize("package", ["flask", "waitress", "jsonschema"])
def test_what_is_not_installed_is_named_with_its_pip_line(run, monkeypatch, package):
    find = serve.files.importlib.util.find_spec
    monkeypatch.setattr(
        serve.files.importlib.util,
        "find_spec",
        lambda name, *more: None if name == package else find(name, *more),
    )
    with pytest.raises(SystemExit, match=f"pip install .*{package}"):
        chat.parse_args(["--ckpt", str(run / "stage2"), "--serve"])


def test_a_port_that_is_taken_is_one_line(run, server):
    with pytest.raises(SystemExit, match="--port") as end:
        served(run, "--port", server.url.rpartition(":")[2])
    assert "\n" not in end.value.code


# --- a full queue, slow clients, and clients that go away


def frozen(server):
    """While this is held the model does not take a step."""
    return server.sides[0].engine.turns


def start(server, body):
    """Send a request and return its socket, without reading the answer."""
    host, port = server.url.split("//")[1].split(":")
    made = socket.create_connection((host, int(port)))
    data = json.dumps(body).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type:"
        " application/json\r\nContent-Length: "
    )
    made.sendall(f"{head}{len(data)}\r\n\r\n".encode() + data)
    return made


def test_a_full_queue_says_429_and_everyone_in_it_is_answered(run, model):
    with other_server(run, "--slots", "2", "--queue", "2") as made:
        eng, good = made.sides[0].engine, {"model": model} | GOOD
        with concurrent.futures.ThreadPoolExecutor(5) as pool:
            with frozen(made):
                futures = [
                    pool.submit(ask, made.url, "/v1/chat/completions", good) for _ in range(4)
                ]
                until(lambda: len(eng.waiting) + len(eng.working) == 4)
                status, headers, text = ask(made.url, "/v1/chat/completions", good)
                assert (
                    status == 429
                    and headers["Retry-After"] == "1"
                    and json.loads(text)["error"]["code"] == "queue_full"
                )
                assert ask(made.url, "/healthz")[0] == 200
            assert [future.result()[0] for future in futures] == [200] * 4
        assert ask(made.url, "/v1/chat/completions", good)[0] == 200
        assert (
            ask(made.url, "/v1/chat/completions", good | {"n": 5})[0] == 400
        )  # more answers at once than could ever wait


@pytest.mark.parametrize("streamed", [True, False])
def test_a_client_that_leaves_frees_its_slot(run, model, streamed):
    with other_server(run, "--max-new-tokens", "200", "--slots", "2") as made:
        eng = made.sides[0].engine
        gate, wrote = threading.Semaphore(0), []
        step, admit = eng.batch.step, eng.batch.admit
        eng.batch.step = lambda: (gate.acquire(), wrote.append(1), step())[2]
        with start(made, {"model": model, "stream": streamed, "stop": None} | GOOD) as gone:
            gate.release(3)
            got = b""
            while streamed and b"data: " not in got:  # the head may come alone
                got += (piece := gone.recv(65536))
                assert piece, got
            until(lambda: len(wrote) >= 3)
        job = next(iter(eng.working))
        until(lambda: (gate.release(), job.cancelled)[1])
        gate.release(1000)
        until(lambda: not eng.working)
        assert len(wrote) < 150 and job.count < 190  # and not at its 200th token
        eng.batch.step, eng.batch.admit = step, admit
        assert (
            ask(made.url, "/v1/chat/completions", {"model": model, "max_tokens": 2} | GOOD)[0]
            == 200
        )


def test_a_client_that_leaves_the_queue_is_never_begun(run, model):
    with other_server(run, "--slots", "1", "--queue", "4") as made:
        eng = made.sides[0].engine
        with frozen(made):
            first = start(made, {"model": model} | GOOD)
            until(lambda: eng.working)
            second = start(made, {"model": model} | GOOD)
            until(lambda: eng.waiting)
            read = eng.prompt_tokens
            job = eng.waiting[0]
            second.close()
            until(lambda: job.cancelled)
        assert b"200 OK" in first.recv(65536)
        first.close()
        until(lambda: not eng.working and not eng.waiting)
        assert eng.prompt_tokens == read and job.count == 0


def test_slow_and_silent_clients_keep_nobody_waiting(server, model):
    host, port = server.url.split("//")[1].split(":")
    silent = [socket.create_connection((host, int(port))) for _ in range(40)]
    for number, one in enumerate(silent):
        one.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n"
            + (b"\r\n{" if number % 2 else b"")
        )
    unread = start(
        server, {"model": model, "stream": True, "max_tokens": 200} | GOOD
    )  # never reads
    assert ask(server.url, "/v1/chat/completions", {"model": model} | GOOD)[0] == 200
    for one in [*silent, unread]:
        one.close()
    until(lambda: not server.sides[0].engine.working)


def test_an_answer_that_takes_too_long_is_cut_and_one_that_is_never_begun_is_told(
    run, model, monkeypatch
):
    monkeypatch.setattr("lib.chat.api.WATCH_S", 0.05)
    with other_server(run, "--time-limit", "0.3", "--max-new-tokens", "200") as made:
        step = made.sides[0].engine.batch.step
        made.sides[0].engine.batch.step = lambda: (time.sleep(0.1), step())[1]
        status, _, text = ask(made.url, "/v1/chat/completions", {"model": model} | GOOD)
        assert (
            status == 200
            and json.loads(text)["choices"][0]["finish_reason"] == "length"
            and json.loads(text)["usage"]["completion_tokens"] < 20
        )
        with frozen(made):
            status, headers, text = ask(made.url, "/v1/chat/completions", {"model": model} | GOOD)
            assert (
                status == 503
                and json.loads(text)["error"]["code"] == "timeout"
                and "Retry-After" in headers
            )


def test_no_answer_is_longer_than_the_server_allows_or_the_context(run, client, model):
    with other_server(run, "--longest", "7") as made:
        status, _, text = ask(
            made.url, "/v1/chat/completions", {"model": model, "max_tokens": 10**9} | GOOD
        )
        assert status == 200 and json.loads(text)["usage"]["completion_tokens"] <= 7
    made = client.chat.completions.create(
        model=model, messages=user(ASKED[0]), max_tokens=10**9, temperature=2.0, seed=1, stop=None
    )
    assert made.usage.total_tokens <= 256


def test_a_prompt_that_fills_the_context_is_refused_and_one_token_less_is_answered(server, model):
    context = server.sides[0].chat.context
    for length, status in ((context - 1, 200), (context, 400), (context + 1, 400)):
        got, _, text = ask(
            server.url, "/v1/completions", {"model": model, "prompt": [5] * length, "max_tokens": 9}
        )
        assert got == status, text
        if status == 200:
            assert json.loads(text)["usage"]["completion_tokens"] <= 1
    assert ask(server.url, "/healthz")[0] == 200


def test_settings_at_the_edge_of_what_is_allowed_are_answered(server, model):
    def say(**more):
        return json.loads(
            ask(server.url, "/v1/chat/completions", {"model": model} | GOOD | more)[2]
        )["choices"][0]["message"]["content"]

    for temperature in (1e-5, 1e-30, 1e-300):
        assert say(temperature=temperature) == say(temperature=0)
    # of the likeliest token alone; below float32's smallest number it was the least likely
    for top_p in (1e-30, 1e-300):
        assert say(temperature=100, top_p=top_p) == say(temperature=0)
    for seed in (-1, -(2**63), 2**63 - 1, 1e18, -1e18, float(2**53), -0.0):
        assert say(temperature=1.5, seed=seed, n=2) == say(temperature=1.5, seed=seed, n=2)
    assert ask(server.url, "/healthz")[0] == 200


def test_the_logprobs_of_an_answer_know_their_place_in_its_text_though_a_stop_string_holds_some_back(
    client, model
):
    plain = client.completions.create(
        model=model, prompt="Ann has", logprobs=0, max_tokens=12
    ).choices[0]
    held = plain.text[3:6] + "\x07"  # looks like it until it is not
    made = client.completions.create(
        model=model, prompt="Ann has", logprobs=0, max_tokens=12, stop=held
    ).choices[0]
    assert made.text == plain.text and made.logprobs.text_offset == plain.logprobs.text_offset
    assert made.logprobs.tokens == plain.logprobs.tokens


# --- how it ends, and what happens when the model fails


def test_no_thread_is_left_over(run, model):
    before = {thread.ident for thread in threading.enumerate()}
    with (
        other_server(run, teacher=True) as made,
        openai.OpenAI(base_url=made.url + "/v1", api_key="x") as own,
    ):
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            list(
                pool.map(
                    lambda text: own.chat.completions.create(model=model, messages=user(text)),
                    ASKED * 2,
                )
            )
    until(lambda: not {thread.ident for thread in threading.enumerate()} - before)


@contextlib.contextmanager
def process(log, target, *args):
    """Start a server in a process of its own, target(*args, log), and ask it for a stream: yield
    (process, stream)."""
    child = make.processes().Process(target=target, args=(*args, log))
    child.start()
    try:
        until(lambda: log.exists() and "Ctrl-C" in log.read_text(), 60)
        server = SimpleNamespace(url=re.search(r"http://[\d.:]+", log.read_text()).group())
        model = json.loads(ask(server.url, "/v1/models")[2])["data"][0]["id"]
        with start(server, {"model": model, "stream": True} | GOOD) as stream:
            yield child, stream
    finally:
        child.kill()
        child.join()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_at_once_and_closes_its_streams(run, tmp_path, number):
    folder, log = tmp_path / "long", tmp_path / "log"
    module = AutoModelForCausalLM.from_pretrained(run / "stage2/best", max_position_embeddings=4096)
    module.generation_config.eos_token_id = (
        None  # it writes, some 3,900 tokens, until it is stopped
    )
    module.save_pretrained(folder)
    tokenizer = demo.tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(folder)
    argv = [
        "--ckpt",
        str(folder),
        "--serve",
        "--port",
        "0",
        "--device",
        "cpu",
        "--greedy",
        "--max-new-tokens",
        "3900",
    ]
    with process(log, make.script, "chat", argv) as (child, stream):
        got = b""
        while got.count(b"data: ") < 4:
            got += stream.recv(65536)
        began = time.monotonic()
        os.kill(child.pid, number)
        while piece := stream.recv(65536):
            got += piece
        child.join(10)
        assert child.exitcode == 0 and time.monotonic() - began < 5
        assert (
            b"the server is stopping" in got and b"[DONE]" not in got and got.endswith(b"0\r\n\r\n")
        )
        assert "stopped" in log.read_text()


def test_a_signal_in_a_pass_that_takes_long_is_no_crash(run, tmp_path):
    """A thread that came back from torch while Python was ending aborted the process (SIGABRT)."""
    argv, log = (
        ["--ckpt", str(run / "stage2"), "--serve", "--port", "0", "--device", "cpu", "--greedy"],
        tmp_path / "log",
    )
    with process(log, make.never_ends, "generate", "InFlight", "step", "chat", argv) as (
        child,
        stream,
    ):
        got = b""
        while b'"role"' not in got:
            got += stream.recv(65536)
        time.sleep(0.5)
        os.kill(child.pid, signal.SIGTERM)
        child.join(20)
        assert child.exitcode == 0 and "terminate" not in log.read_text(), log.read_text()


def test_ctrl_c_while_a_model_is_loaded_is_one_line(run, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(chat_model, "both", interrupted)
    for more in ([], ["--serve", "--port", "0"]):
        with pytest.raises(SystemExit) as end:
            chat.main(["--ckpt", str(run / "stage2"), *more])
        assert end.value.code == 130 and capsys.readouterr().out.strip() == "chat: stopped"


def test_what_a_run_has_is_found_from_within_its_folder(run, monkeypatch):
    wanted = {name: path.resolve() for name, path in routes.run_files(run / "stage2/best").items()}
    for folder, name in (
        (run, "stage2/best"),
        (run / "stage2", "best"),
        (run / "stage2/best", "."),
        (run.parent, "demo/stage2/best"),
    ):
        monkeypatch.chdir(folder)
        assert (
            {name: path.resolve() for name, path in routes.run_files(Path(name)).items()}
            == wanted
            != {}
        )


@pytest.mark.parametrize("name", ["", *TEMPLATES])
def test_a_prompt_of_the_samples_is_shown_as_it_was_asked(tmp_path, name):
    """The rendered one ("System: ... Assistant:"), sent, was wrapped twice."""
    tokenizer = tiny_tokenizers.tiny()
    if name:
        tokenizer.chat_template = (ROOT / "tests/templates" / name).read_text()
        marks = re.findall(r"<[|a-z_]\w+[|a-z_]?>|\[/?INST\]", tokenizer.chat_template)
        tokenizer.add_special_tokens({"additional_special_tokens": sorted({*marks})})
    templates.ensure_template(tokenizer)
    talks = [user("How many eggs?\n\nSay a number."), user("Why?")]
    talks.append([{"role": "assistant", "content": "Because."}, *user("Oh?")])
    talks[2] = [*user("Why?"), *talks[2]]
    try:
        system = [{"role": "system", "content": "You count."}, *user("Why?")]
        template.render(tokenizer, system, add_generation_prompt=True)
        talks.insert(1, system)
    except jinja2.TemplateError:
        pass
    with open(tmp_path / "samples.md", "w") as out:
        for number, talk in enumerate(talks, 1):
            ids = template.prompt_ids(tokenizer, talk)
            asked = tokenizer.decode(ids, skip_special_tokens=True).strip()
            out.write(f"## Prompt {number}\n\n{asked}\n\nreference:\n\n    8\n\n")
    found = routes.sampled_prompts(tmp_path / "samples.md", tokenizer)
    assert {"user": "How many eggs?\n\nSay a number."} == found[0]
    if len(talks) == 4 and name not in GLUED:
        assert found[1] == {"system": "You count.", "user": "Why?"}
    assert all("Because" not in asked["user"] for asked in found) or name in GLUED


def test_a_model_that_runs_out_of_memory_says_so_and_answers_the_next(run, model):
    with other_server(run) as made:
        eng = made.sides[0].engine

        def no_memory(new):
            raise torch.OutOfMemoryError("CUDA out of memory")

        eng.batch.admit = no_memory
        status, _, text = ask(made.url, "/v1/chat/completions", {"model": model} | GOOD)
        assert status == 503 and "out of memory" in json.loads(text)["error"]["message"]
        until(lambda: not eng.working)  # or its slot would be lost for good
        assert ask(made.url, "/v1/chat/completions", {"model": model} | GOOD)[0] == 200


def test_a_cpu_without_memory_is_out_of_memory_and_any_other_error_is_not():
    with pytest.raises(torch.OutOfMemoryError), generate.one_memory_error():
        torch.empty(1 << 60, dtype=torch.uint8)
    with pytest.raises(RuntimeError) as other, generate.one_memory_error():
        torch.zeros(2) + torch.zeros(3)
    assert not isinstance(other.value, torch.OutOfMemoryError)


def test_a_request_that_breaks_a_pass_fails_alone_and_the_log_says_which(run, model, caplog):
    """`seed: 1e18` was a float to numpy, and ended the server for all."""
    bodies = [{"model": model, "prompt": [place] * 9, "max_tokens": 12} for place in (5, 6, 7, 8)]
    with other_server(run) as made:
        eng, inner = made.sides[0].engine, made.sides[0].chat.module
        alone = [ask(made.url, "/v1/completions", body)[2] for body in bodies]
        forward, poison = inner.forward, 200

        def broken(input_ids, **more):
            if input_ids.shape[1] > 1 and poison in input_ids[:, -1]:
                raise RuntimeError("a bug")
            return forward(input_ids=input_ids, **more)

        inner.forward = broken
        bad = {"model": model, "prompt": [poison] * 7}
        bodies[1:1], bodies[3:3] = [bad], [bad | {"stream": True}]
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            with frozen(made):
                futures = [pool.submit(ask, made.url, "/v1/completions", b) for b in bodies]
                until(lambda: len(eng.waiting) + len(eng.working) == 6)
            answers = [future.result() for future in futures]
        for place in (1, 3):
            error = json.loads(answers[place][2].removeprefix("data: "))["error"]
            assert error["type"] == "server_error" and "failed" in error["message"]
            assert f"{error['message'].split()[-1]} failed (7 tokens)" in caplog.text
        assert [answers[place][0] for place in range(6)] == [200, 500, 200, 200, 200, 200]
        said = [json.loads(answers[place][2])["choices"] for place in (0, 2, 4, 5)]
        assert said == [json.loads(text)["choices"] for text in alone]
        assert not made.failed() and ask(made.url, "/healthz")[0] == 200
        assert not eng.working and not eng.waiting and not eng.fresh


@pytest.mark.parametrize("how", [{}, {"temperature": 1.5, "repetition_penalty": 1.3, "seed": 3}])
def test_answers_go_on_where_they_were_when_a_pass_failed(run, model, caplog, how):
    """Nobody is to blame: each is tried alone, and says what it would have said."""
    body = {"model": model, "max_tokens": 30, "logprobs": True, **how}
    bodies = []
    for place, text in enumerate(ASKED):
        bodies.append(body | {"messages": user(text), "stream": place % 2 == 1})
    with other_server(run) as made:
        eng = made.sides[0].engine
        wanted = [ask(made.url, "/v1/chat/completions", one)[2] for one in bodies]
        step, steps = eng.batch.step, []

        def fails_once():
            steps.append(len(eng.working))
            if len(steps) == 9:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return step()

        eng.batch.step = fails_once
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            with frozen(made):
                futures = [pool.submit(ask, made.url, "/v1/chat/completions", b) for b in bodies]
                until(lambda: len(eng.waiting) + len(eng.working) == 4)
            answers = [future.result() for future in futures]
    assert max(steps) > 1 and "each alone" in caplog.text
    for (status, _, text), before in zip(answers, wanted):
        assert status == 200 and content(text) == content(before)


def content(text):
    """Return what an answer says, streamed or whole, its tokens, and how it ended."""
    said = [json.loads(line[6:]) for line in text.split("\n\n") if line.startswith("data: {")]
    choices = [value["choices"][0] for value in said or [json.loads(text)]]
    parts = [choice.get("delta") or choice.get("message") or {} for choice in choices]
    tokens = [entry for c in choices if c["logprobs"] for entry in c["logprobs"]["content"]]
    return (
        "".join(part.get("content", "") for part in parts),
        [entry["token"] for entry in tokens],
        choices[-1]["finish_reason"],
    )


def test_a_model_that_fails_ends_the_server_and_nobody_waits(run, model, caplog):
    with other_server(run) as made:

        def broken(*_, **more):
            raise RuntimeError("device-side assert triggered")

        made.sides[0].chat.module.forward = broken
        status, _, text = ask(made.url, "/v1/chat/completions", {"model": model} | GOOD)
        assert status in (500, 503) and "failed" in json.loads(text)["error"]["message"]
        until(made.failed)
        assert "the model failed" in caplog.text and "device-side assert" in caplog.text
        assert (
            ask(made.url, "/healthz")[0] == 503
            and ask(made.url, "/v1/chat/completions", {"model": model} | GOOD)[0] == 503
        )


# --- what is published


def test_the_openapi_file_names_every_route_and_no_other(server):
    described = json.loads((ROOT / "lib/chat/openapi.json").read_text())
    routes = {
        (re.sub("<.*>", "{id}", rule.rule), method)
        for rule in server.app.url_map.iter_rules()
        for method in rule.methods - {"HEAD", "OPTIONS"}
    }
    named = {
        (path, method.upper()) for path, methods in described["paths"].items() for method in methods
    }
    assert routes - {("/", "GET"), ("/openapi.json", "GET")} == named
    assert json.loads(ask(server.url, "/openapi.json")[2]) == described


def test_metrics_are_prometheus_text_and_count(server, model):
    def values():
        return dict(
            re.fullmatch(r'(\w+(?:\{(?:\w+="[^"]*",?)*\})?) (\S+)', line).groups()
            for line in ask(server.url, "/metrics")[2].splitlines()
            if not line.startswith("#")
        )

    before = values()
    answer = json.loads(ask(server.url, "/v1/chat/completions", {"model": model} | GOOD)[2])
    after = values()

    def gained(name):
        return float(after[name]) - float(before.get(name, 0))

    assert (
        gained('distil_answer_tokens_total{model="student"}')
        == answer["usage"]["completion_tokens"]
    )
    assert gained('distil_prompt_tokens_total{model="student"}') == answer["usage"]["prompt_tokens"]
    assert gained('distil_requests_total{path="/v1/chat/completions",status="200"}') == 1
    assert (
        gained("distil_first_token_seconds_count")
        == gained('distil_first_token_seconds_bucket{le="+Inf"}')
        == 1
    )
    assert (
        math.isfinite(gained("distil_first_token_seconds_sum"))
        and float(after['distil_memory_bytes{model="teacher"}']) > 0
    )


def test_a_heatmap_is_zero_for_a_student_that_is_its_teacher_and_not_for_another(run, server):
    body = {"messages": user(ASKED[0]), "answer": "Ones: 8+5=13, carry 1.", "finished": True}
    tokens = json.loads(ask(server.url, "/v1/heatmap", body)[2])["tokens"]
    assert (
        "".join(token["text"] for token in tokens[:-1]) == body["answer"]
        and max(token["kl"] for token in tokens) > 0.1
    )
    assert all(len(token["student"]) == len(token["teacher"]) == 5 for token in tokens)
    args = chat.parse_args(
        [
            "--ckpt",
            str(run / "stage2"),
            "--teacher",
            str(run / "stage2"),
            "--serve",
            "--port",
            "0",
            "--device",
            "cpu",
        ]
    )
    same = serve.Server(
        args,
        dict(zip(("student", "teacher"), chat_model.both(args, templates.make_ready))),
        run / "stage2/best",
        serve.open_socket(args),
    )
    try:
        assert (
            max(
                token["kl"] for token in json.loads(ask(same.url, "/v1/heatmap", body)[2])["tokens"]
            )
            < 1e-6
        )
        assert (
            len({entry["id"] for entry in json.loads(ask(same.url, "/v1/models")[2])["data"]}) == 2
        )
    finally:
        same.stop()


def test_a_heatmap_wants_a_teacher_and_room(run, server, model):
    body = {"messages": user("How many?"), "answer": "6"}
    with other_server(run) as made:
        status, _, text = ask(made.url, "/v1/heatmap", body)
        assert status == 400 and "--teacher" in json.loads(text)["error"]["message"]
        assert json.loads(ask(made.url, "/v1/models")[2])["heatmap"] is False
    assert json.loads(ask(server.url, "/v1/models")[2])["heatmap"] is True
    assert ask(server.url, "/v1/heatmap", body | {"answer": "6 " * 300})[0] == 400


def test_all_heatmaps_are_made_in_one_thread(server, monkeypatch):
    """Each thread that runs a model keeps scratch memory to its end: of 160 it was a gigabyte."""
    threads, whole = [], heat.compare_tokens

    def noted(*args, **more):
        threads.append(threading.current_thread())
        return whole(*args, **more)

    monkeypatch.setattr(heat, "compare_tokens", noted)
    body = {"messages": user("How many?"), "answer": "6"}
    with concurrent.futures.ThreadPoolExecutor(3) as askers:
        statuses = [*askers.map(lambda _: ask(server.url, "/v1/heatmap", body)[0], range(3))]
    assert statuses == [200] * 3 and len(threads) == 3 and len(set(threads)) == 1


def test_a_conversation_that_is_too_long_loses_its_oldest_turns_where_fit_is_asked_for(
    server, model
):
    talk = [{"role": "system", "content": "Add."}]
    for number in range(24):
        talk += [
            *user(f"Ann has {number} apples. How many?"),
            {"role": "assistant", "content": f"{number} apples."},
        ]
    body = {"model": model, "messages": talk + user("How many?")}
    assert ask(server.url, "/v1/chat/completions", body)[0] == 400
    made = json.loads(ask(server.url, "/v1/chat/completions", body | {"fit": True})[2])
    kept = [talk[0], *talk[1 + made["dropped"] :], *user("How many?")]
    again = json.loads(ask(server.url, "/v1/chat/completions", body | {"messages": kept})[2])
    assert (
        made["dropped"] % 2 == 0
        and again["choices"] == made["choices"]
        and again["usage"] == made["usage"]
        and "dropped" not in again
    )
    chat_ = server.sides[0].chat
    assert (
        len(chat_.fit(body["messages"])[0]) == made["usage"]["prompt_tokens"] <= chat_.context - 12
    )
    heat = {"answer": "6", "messages": body["messages"], "fit": True}
    assert (
        ask(server.url, "/v1/heatmap", heat)[2]
        == ask(server.url, "/v1/heatmap", {"answer": "6", "messages": kept})[2]
    )


def test_fit_finds_the_first_turn_that_fits_in_a_few_tries(server, monkeypatch):
    """999 messages, 1 MB, were tokenized once for every turn: no answer in 200 s."""
    made, tries = server.sides[0].chat, []

    def ids(messages):
        tries.append(len(messages))
        return [0] * sum(len(message["content"]) for message in messages)

    monkeypatch.setattr(made, "ids", ids)
    room = made.context - min(made.how.max_new_tokens, made.context // 4)
    for count in (1, 2, 3, 4, 5, 8, 9, 50, 51):
        for system in (False, True):
            for size in (1, 20, 90, 2 * room):
                messages = [{"role": "user", "content": "x" * size} for _ in range(count)]
                messages[:0] = [{"role": "system", "content": "sys"}] * system
                kept, first = list(messages), int(system)  # one turn after the other
                while len(ids(kept)) > room and len(kept) > first + 2:
                    del kept[first : first + 2]
                assert made.fit(messages) == (ids(kept), len(messages) - len(kept))
    tries.clear()
    made.fit([{"role": "user", "content": "x" * 1000}] * 999)
    assert len(tries) < 13


def test_idle_connections_make_room_for_others(run, model):
    """600 that said nothing kept /healthz out until they were a minute old."""
    with other_server(run, "--slots", "1", "--queue", "0") as made:
        adj, place = made.server.adj, made.url.removeprefix("http://").split(":")
        assert adj.connection_limit < 150
        with contextlib.ExitStack() as held:
            for number in range(adj.connection_limit + 20):
                one = held.enter_context(socket.create_connection(place))
                one.sendall(b"POST /v1/completions HTTP/1.1\r\nHo" * (number % 2))
            assert ask(made.url, "/healthz")[0] == 200  # or `ask` has waited for 20 s
        until(lambda: len(made.server.active_channels) <= 1)
        with socket.create_connection(place) as quiet:  # with room left, a minute is allowed
            until(lambda: made.server.active_channels)
            made.close_idle(time.time() + 50)
            quiet.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert quiet.recv(12) == b"HTTP/1.1 200"


def test_many_heatmaps_at_once_leave_the_servers_threads_to_others(run, server):
    body = {"messages": user("How many?"), "answer": "6"}
    with concurrent.futures.ThreadPoolExecutor(2 * routes.HEATS) as pool:
        with frozen(server):
            futures = [
                pool.submit(ask, server.url, "/v1/heatmap", body) for _ in range(2 * routes.HEATS)
            ]
            until(lambda: sum(future.done() for future in futures) == routes.HEATS)
        made = [future.result() for future in futures]
    assert sorted(status for status, _, _ in made) == [200] * routes.HEATS + [429] * routes.HEATS
    assert all(headers["Retry-After"] == "1" for status, headers, _ in made if status == 429)
    assert ask(server.url, "/v1/heatmap", body)[0] == 200


def test_a_heatmap_that_does_not_fit_into_memory_says_so(server, monkeypatch):
    def no_memory(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    for _ in range(routes.HEATS + 1):
        with monkeypatch.context() as patch:
            patch.setattr("lib.chat.heat.compare_tokens", no_memory)
            status, _, text = ask(
                server.url, "/v1/heatmap", {"messages": user("How many?"), "answer": "6"}
            )
        assert status == 503 and "memory" in json.loads(text)["error"]["message"]
    assert ask(server.url, "/v1/heatmap", {"messages": user("How many?"), "answer": "6"})[0] == 200


def test_a_streams_lines_end_where_they_should_whatever_the_text():
    """httpx's iter_lines, and others that read text and not bytes, take U+2028 or U+0085 for the
    end of a line."""
    text, events = "a\u2028b\u0085c\u2029 caf\u00e9 \U0001f600\r\n\n", queue.SimpleQueue()
    events.put(engine.Event(0, text, finish="stop"))
    jobs = [engine.Job([5], 9, generate.Sampling(), 0, time.monotonic() + 9, events)]
    asked = api.Asked(SimpleNamespace(id="m"), True, [[5]], jobs)
    lines = "".join(api.event_stream(asked, lambda: False)).splitlines()
    assert all(line == "" or line.startswith("data: ") for line in lines)
    said = [
        json.loads(line.removeprefix("data: "))["choices"][0]["delta"].get("content", "")
        for line in lines
        if line and "[DONE]" not in line
    ]
    assert "".join(said) == text


def test_an_empty_answer_beside_a_late_one_was_not_left_waiting(monkeypatch):
    monkeypatch.setattr("lib.chat.api.WATCH_S", 0.01)
    jobs = [
        engine.Job([5], 9, generate.Sampling(), 0, time.monotonic(), queue.SimpleQueue(), index)
        for index in (0, 1)
    ]
    jobs[1].events, jobs[1].first = jobs[0].events, time.monotonic()
    jobs[0].events.put(engine.Event(0, finish="stop"))  # of no token at all
    late = threading.Timer(0.2, jobs[0].events.put, (engine.Event(1, "x", finish="length"),))
    late.start()
    assert [event.finish for event in api.heard(jobs, lambda: False)] == ["stop", "length"]
    late.join()


# --- the engine


def test_every_token_that_is_counted_has_its_logprob_a_special_one_at_the_end_too(
    server, monkeypatch
):
    side = server.sides[0]
    special = side.chat.tokenizer.all_special_ids[0]
    monkeypatch.setattr(side.engine, "how", generate.Sampling())  # nothing ends the answer
    word = side.chat.tokenizer("Ann").input_ids[-1]
    for ids in ([word, special], [special], [special, word], [word, special, special]):
        written = iter(ids)
        monkeypatch.setattr(
            generate,
            "choose",
            lambda logits, how, uniform, seen, written=written: torch.full(
                (len(logits),), next(written)
            ),
        )
        events = queue.SimpleQueue()
        side.engine.ask(
            [
                job := engine.Job(
                    [5], len(ids), generate.Sampling(), 0, time.monotonic() + 20, events, top=0
                )
            ]
        )
        heard = list(api.heard([job], lambda: False))
        assert [token.id for event in heard for token in event.tokens] == ids and heard[
            -1
        ].finish == "length"


def test_turns_go_to_whoever_waits_longest():
    turns, order = engine.Turns(), []

    def take(name):
        with turns:
            order.append(name)

    with turns:
        threads = []
        for name in range(5):
            threads.append(threading.Thread(target=take, args=(name,)))
            threads[-1].start()
            until(lambda: len(turns.waiting) == name + 1)
    for thread in threads:
        thread.join()
    assert order == list(range(5))


def test_two_models_that_answer_at_once_take_turns(server, client, monkeypatch):
    order = []
    for side in server.sides:
        step = side.engine.batch.step
        monkeypatch.setattr(
            side.engine.batch,
            "step",
            lambda role=side.role, step=step: (order.append(role), step())[1],
        )

    def say(side):
        return client.chat.completions.create(model=side.id, messages=user(ASKED[0]), max_tokens=40)

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        list(pool.map(say, server.sides))
    changes = sum(a != b for a, b in zip(order, order[1:]))
    assert changes > len(order) // 2, order


def test_what_is_asked_about_tokens_does_not_change_them():
    torch.manual_seed(0)
    config = demo.config(
        {
            "num_hidden_layers": 1,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        }
    )
    module = LlamaForCausalLM(config).eval()

    def say(**more):
        return next(
            generate.generate(
                module, [generate.Request(0, [5, 6, 7], 8, **more)], generate.Sampling()
            )
        ).ids

    assert (
        say()
        == say(top=3)
        == say(how=generate.Sampling(0.0), top=0)
        != say(how=generate.Sampling(2.0), seed=1)
    )


# --- the text of an answer, token by token


@pytest.mark.parametrize("stops", [(), ("END", "\u00e9n"), ("bb", "abc")])
def test_the_pieces_of_an_answer_are_its_text_without_half_characters_or_stop_strings(stops):
    tokenizer = tiny_tokenizers.tiny()
    for words in (
        "aabbab END of",
        "caf\u00e9 \U0001f600\U0001f680 \u00e9n\u00e9",
        "ab\ufffdbbabc",
        "\U0001f600",
        "a" * 40 + "EN",
        "x<|im_end|>y",
    ):
        ids = tokenizer(words, add_special_tokens=False).input_ids
        for cut in (len(ids), len(ids) - 1):  # the last may be half a character
            made, shown = Text(tokenizer, stops), []
            for token in ids[:cut]:
                shown.append(made.add(token))
                if made.stopped:
                    break
            shown.append(made.end())
            whole = tokenizer.decode(ids[:cut], skip_special_tokens=True)
            ends = [whole.index(stop) for stop in stops if stop in whole]
            assert "".join(shown) == whole[
                : min(ends, default=len(whole))
            ] and made.stopped == bool(ends)
            if "\ufffd" not in words:
                assert not any("\ufffd" in piece for piece in shown[:-1])


def test_a_special_token_within_an_answer_costs_no_blank():
    """Sentencepiece's decoders drop the blank of the first word they are given, and a special token
    alone is no word."""
    inner = tokenizers.Tokenizer(
        tokenizers.models.WordLevel(
            {"<x>": 0, "<unk>": 1, "\u2581so": 2, "\u2581it": 3}, unk_token="<unk>"
        )
    )
    inner.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("\u2581", " "),
            tokenizers.decoders.Fuse(),
            tokenizers.decoders.Strip(" ", 1, 0),
        ]
    )
    inner.add_special_tokens([tokenizers.AddedToken("<x>", special=True)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")
    for ids in ([2, 3], [2, 0, 3], [0, 2, 3], [2, 0, 0, 3, 0, 2]):
        made = Text(tokenizer)
        assert "".join([*map(made.add, ids), made.end()]) == tokenizer.decode(
            ids, skip_special_tokens=True
        )


def test_of_several_stop_strings_in_one_token_the_first_in_the_text_ends_it():
    assert Text(tiny_tokenizers.tiny(), ("bb", "abc")).show("x abc bb", False) == "x "


def test_speed_leaves_out_the_first_token_and_what_others_took():
    job = engine.Job(
        [1],
        9,
        generate.Sampling(),
        0,
        0.0,
        queue.SimpleQueue(),
        asked=10.0,
        first=12.5,
        count=5,
        begun=1.0,
        read=1.5,
        last=3.5,
    )
    assert job.speed() == {"tok_per_s": 2.0, "prompt_s": 0.5, "first_token_s": 2.5}


def test_text_is_shown_as_soon_as_it_cannot_become_a_stop_string():
    tokenizer = tiny_tokenizers.tiny()
    made = Text(tokenizer, ("aab",))
    assert [
        made.add(token) for token in tokenizer("aaacaab!", add_special_tokens=False).input_ids
    ] == ["", "", "a", "aac", "", "", "", ""]
    assert made.stopped


# --- any request at all
