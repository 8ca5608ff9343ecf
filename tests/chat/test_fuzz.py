"""Any request that lib/chat/openapi.json can think of, right or wrong: status, type and body of the
answer are those of the file; the server lives.

FUZZ=500 python -m pytest tests/chat/test_fuzz.py      # that many of each kind and route; the suite
                                                       takes 12
"""

import importlib.util
import json
import os
import resource
from pathlib import Path

import hypothesis
import pytest
import schemathesis
from schemathesis import checks
from test_serve import GOOD, ask, served
from test_serve import run as run  # noqa: F401  a fixture

PLACE = Path(__file__).parents[2] / "bench/serving/fuzz.py"
SPEC = importlib.util.spec_from_file_location("fuzz", PLACE)
fuzz = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(fuzz)
EXAMPLES = int(os.environ.get("FUZZ", 12))
MODES = {
    "right": schemathesis.GenerationMode.POSITIVE,
    "wrong": schemathesis.GenerationMode.NEGATIVE,
}
POSTS = ["/v1/chat/completions", "/v1/completions", "/v1/heatmap"]
GETS = [
    "/v1/models",
    "/run.json",
    "/run/curves.png",
    "/run/comparison.html",
    "/run/samples.md",
    "/health",
    "/healthz",
    "/metrics",
]


@pytest.fixture(scope="module")
def server(run):  # noqa: F811
    made = served(run, "--longest", "8", teacher=True)
    yield made
    made.stop()


@pytest.fixture(scope="module")
def schema(server):
    made = schemathesis.openapi.from_dict(json.loads(ask(server.url, "/openapi.json")[2]))
    made.config.update(base_url=server.url)
    return made


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("path", [*POSTS, *GETS])
def test_what_comes_back_is_what_the_file_says(server, schema, path, mode):
    if path in GETS and mode == "wrong":
        return  # nothing about them can be wrong
    operation = schema[path]["POST" if path in POSTS else "GET"]
    names = [
        "not_a_server_error",
        "status_code_conformance",
        "content_type_conformance",
        "response_schema_conformance",
    ]
    wanted = [
        checks.CHECKS.get_one(name)
        for name in names + ["negative_data_rejection"] * (mode == "wrong")
    ]
    seen = set()

    @hypothesis.settings(
        max_examples=EXAMPLES if path in POSTS else 1,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(case=operation.as_strategy(generation_mode=MODES[mode]))
    def every(case):
        if mode == "right" and path in POSTS and "model" in case.body:
            case.body["model"] = server.sides[len(seen) % 2].id  # any text is right to the file
        answer = case.call(timeout=20)
        seen.add(answer.status_code)
        case.validate_response(answer, checks=wanted)

    every()
    assert ask(server.url, "/healthz")[0] == 200
    if path in POSTS:
        assert seen <= ({200, 400} if mode == "right" else {400, 415}) and (mode == "right") == (
            200 in seen
        ), seen


def test_memory_is_flat_whatever_is_asked(server):
    good = {"model": server.sides[0].id} | GOOD
    bodies = [
        good,
        good | {"stream": True},
        good | {"n": 4},
        good | {"n": -1},
        b"[" * 10_000,
        b"x" * 500_000,
        good | {"model": "x" * 100_000},
    ]

    def many(rounds):
        for _ in range(rounds):
            for body in bodies:
                ask(server.url, "/v1/chat/completions", body)
        return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

    before = many(15)  # each of the server's threads gets some of its own, once
    assert many(40) - before < 16 << 20  # forty bodies of 500 kB are more
    assert not server.sides[0].engine.working and not server.sides[0].engine.waiting


def test_hostile_requests_leave_the_server_and_its_good_answers_as_they_were(server):
    """bench/serving/fuzz.py sends 10,000 of them."""
    made = fuzz.Fuzz(server.url.removeprefix("http://"), seed=1, count=10 * EXAMPLES)
    made.run(clients=4)
    assert not made.wrong and made.goods and not server.failed()
    assert sum(made.seen.values()) == 10 * EXAMPLES
    statuses = {status for _, status in made.seen} - {None}
    assert {200, 400} <= statuses <= {200, 400, 404, 413, 429, 503}
