"""The page of chat.py --serve in a browser, before the real server with random models; where a
server must misbehave, the test plays it."""

import json
import shutil
import time

import make
import pytest
import torch

import chat
from lib.chat import model, serve
from lib.prepare import templates

CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
SHORT = "Ann has 66 shells."  # the random student ends its answer to this one itself
LONG = "Leo has 69 eggs."
EVIL = (
    "<script>document.title = 'owned'</script>\n\n<img src=x onerror=\"document.title = 'owned'\">"
    " [click](javascript:alert(1)) [data](data:text/html,x) **<b>bold</b>**"
    " [good](https://example.com/a?b=c)\n\n```html\n<iframe src=//example.com></iframe>"
)
PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108060000001f15c4890000000d49444154789c6360606060000000050001a5f64540"
    "0000000049454e44ae426082"
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder whose student and teacher are random models, their weights large enough that
    their answers wander."""
    folder = make.chat_run(tmp_path_factory.mktemp("runs") / "demo", PNG)
    (folder / "stage2" / "samples.md").write_text(
        "## Prompt 1\n\nHow many?\n\n### Step 0, prompt 1\n\n    <b>8</b>\n"
    )
    (folder / "comparison.html").write_text(
        "<title>comparison</title><style>p { color: red }</style><p>compared"
    )
    return folder


@pytest.fixture(scope="module")
def server(run):
    torch.set_num_threads(1)
    args = chat.parse_args(
        [
            "--ckpt",
            str(run / "stage2"),
            "--teacher",
            str(run / "teacher"),
            "--serve",
            "--port",
            "0",
            "--device",
            "cpu",
            "--greedy",
            "--max-new-tokens",
            "24",
        ]
    )
    listening = serve.open_socket(args)
    made = serve.Server(
        args,
        dict(zip(("student", "teacher"), model.both(args, templates.make_ready))),
        run / "stage2" / "best",
        listening,
    )
    yield made
    made.stop()


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="no playwright: pip install playwright"
    )
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine")
    with playwright.sync_playwright() as running:
        opened = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


def watched(page, server, wrong):
    """Note what a page must never do, in any test: a breach of its policy, an error, a request to
    elsewhere, a script of others."""
    page.on(
        "console", lambda said: wrong.append(said.text) if "Security Policy" in said.text else None
    )
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("dialog", lambda dialog: wrong.append("a script ran"))
    page.on(
        "request",
        lambda asked: (
            None
            if asked.url.startswith((server.url, "blob:", "data:"))
            else wrong.append(asked.url)
        ),
    )
    page.set_default_timeout(15000)
    return page


@pytest.fixture(scope="module")
def tab(browser, server):
    """One page for all visitors to a desktop, a new one takes its time; and what went wrong in
    it."""
    wrong = []
    return watched(browser.new_page(viewport={"width": 1280, "height": 800}), server, wrong), wrong


@pytest.fixture
def visit(browser, server, tab):
    """Open the page as a new visitor, visit(); with more about his browser,
    visit(color_scheme="dark"), in one of his own."""
    (page, wrong), own = tab, []

    def opened(**more):
        visitor = page
        if more:
            own.append(browser.new_context(**more))
            visitor = watched(own[-1].new_page(), server, wrong)
        else:
            page.goto(
                server.url + "/healthz"
                # of the same origin, and without the page that would keep its conversation on leaving
            )
            page.evaluate("() => { localStorage.clear(); sessionStorage.clear(); }")
        visitor.goto(server.url)
        visitor.locator("#models li").nth(1).wait_for(state="attached")
        visitor.locator(".hello li").wait_for()
        return visitor

    yield opened
    page.unroute_all()
    for visitor in own:
        visitor.close()
    seen, wrong[:] = [*wrong], []
    assert seen == []


@pytest.fixture
def slow(server, monkeypatch):
    """Let the student take its time: 40 tokens a second."""
    module = server.sides[0].chat.module
    plain = module.forward
    monkeypatch.setattr(
        module, "forward", lambda *args, **options: (time.sleep(0.025), plain(*args, **options))[1]
    )


def say(page, text):
    page.fill("#input", text)
    page.press("#input", "Enter")


def until(page, what, patience_s=15):
    """Wait until an expression is true; page.wait_for_function would use eval(), which the page's
    policy refuses."""
    end = time.monotonic() + patience_s
    while not page.evaluate(what):
        assert time.monotonic() < end, what
        time.sleep(0.02)


def finished(page):
    """Wait until nobody writes any more; return the texts of the last turn's answers."""
    until(
        page,
        "document.querySelector('#go').textContent === 'Send' && document.querySelector('.turn')"
        " !== null",
    )
    return page.evaluate(
        "(turn => ROLES.filter(role => turn[role]).map(role =>"
        " turn[role].text))(state.chat.turns.at(-1))"
    )


def answer(server, messages, side=0, **more):
    """What the API answers."""
    body = {"model": server.sides[side].id, "messages": messages, **more}
    made = server.app.test_client().post(
        "/v1/chat/completions", json=body, headers={"Host": "localhost"}
    )
    return made.json["choices"][0]["message"]["content"]


def user(text):
    return {"role": "user", "content": text}


def stream(*pieces, finish="stop"):
    """A stream of server-sent events, as the API has them."""
    chunks = [
        {"choices": [{"index": 0, "delta": {"content": piece}, "finish_reason": None}]}
        for piece in pieces
    ]
    chunks += [{"choices": [{"index": 0, "delta": {}, "finish_reason": finish}]}] if finish else []
    return "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + (
        "data: [DONE]\n\n" if finish else ""
    )


def answers_with(page, *answers):
    """Let the browser get these (status, headers, body) instead of the server's answers, one after
    the other; return what was asked."""
    asked, left = [], list(answers)

    def fulfil(route):
        asked.append(route.request)
        status, headers, body = left.pop(0) if len(left) > 1 else left[0]
        route.fulfill(
            status=status, headers={"Content-Type": "text/event-stream", **headers}, body=body
        )

    page.route("**/v1/chat/completions", fulfil)
    return asked


# --- the conversation


def test_a_message_is_answered_and_a_reload_keeps_it_beside_a_new_conversation(visit, server):
    page = visit()
    assert page.title() == "stage2" and page.evaluate("document.activeElement.id") == "input"
    say(page, SHORT)
    wanted = answer(server, [user(SHORT)])
    assert finished(page) == [wanted] and page.locator(".body").inner_text() == wanted
    assert (
        "tokens/s" in page.locator(".numbers").inner_text()
        and page.locator("#say").inner_text() == f"stage2: {wanted}"
    )
    say(page, "How\nmany?")
    history = [user(SHORT), {"role": "assistant", "content": wanted}, user("How\nmany?")]
    assert finished(page) == [answer(server, history)], "the model is shown what was said before"

    page.click("#new")
    assert page.locator(".turn").count() == 0 and page.locator("#chats li").count() == 1
    say(page, LONG)
    finished(page)
    page.reload()
    assert page.locator(".asked p").evaluate_all("all => all.map(node => node.lastChild.data)") == [
        LONG
    ], "the one that was open is open again"
    assert page.locator("#chats li > button").all_inner_texts() == [LONG, SHORT], "the latest first"
    page.click(f"#chats button:text-is('{SHORT}')")
    assert page.locator(".turn").count() == 2 and page.locator(".body").first.inner_text() == wanted


def test_an_answer_is_streamed_and_escape_stops_it_here_and_on_the_server(visit, server, slow):
    page = visit()
    page.click("#options-button")
    page.fill("[name=max_tokens]", "200")
    page.keyboard.press("Escape")
    say(page, LONG)
    until(page, "document.querySelector('.body').textContent.length > 10")
    assert page.locator("#go").inner_text() == "Stop" and page.locator(".writing").count() == 1
    page.keyboard.press("Escape")
    [text] = finished(page)
    whole = answer(server, [user(LONG)], max_tokens=60)
    assert (
        10 < len(text) < len(whole)
        and whole.startswith(text)
        and "Stopped." in page.locator(".body").inner_text()
    )
    patience = time.monotonic() + 3
    while server.sides[0].engine.working and time.monotonic() < patience:
        time.sleep(0.01)
    assert not server.sides[0].engine.working, (
        "the server goes on with an answer that nobody waits for"
    )
    page.click("text=Retry")
    until(page, "document.querySelector('.body').textContent.length > 10")
    page.click("#go")
    assert finished(page)[0] and page.locator(".turn").count() == 1


def test_the_last_question_is_edited_and_asked_anew(visit):
    page = visit()
    say(page, SHORT)
    finished(page)
    page.click("text=Edit")
    assert page.input_value("#input") == SHORT
    say(page, LONG)
    finished(page)
    assert page.locator(".asked p").evaluate_all("all => all.map(node => node.lastChild.data)") == [
        LONG
    ]


def test_options_are_sent_and_kept_and_empty_ones_are_the_servers(visit):
    page = visit()
    asked = answers_with(page, (200, {}, stream("fine")))
    say(page, "a")
    finished(page)
    page.click("#options-button")
    assert (
        page.get_attribute("[name=temperature]", "placeholder") == "0"
        and page.get_attribute("[name=max_tokens]", "placeholder") == "24"
    )
    for name, value in (
        ("temperature", "0.5"),
        ("top_p", "0.9"),
        ("max_tokens", "7"),
        ("seed", "3"),
    ):
        page.fill(f"[name={name}]", value)
    page.fill("#system", "Be brief.")
    page.keyboard.press("Escape")
    say(page, "b")
    finished(page)
    first, second = (request.post_data_json for request in asked)
    assert first.keys() == {"model", "messages", "fit", "stream", "stream_options"} and first[
        "messages"
    ] == [user("a")]
    assert {"temperature": 0.5, "top_p": 0.9, "max_tokens": 7, "seed": 3}.items() <= {
        **second,
        "messages": None,
    }.items()
    assert [message["role"] for message in second["messages"]] == [
        "system",
        "user",
        "assistant",
        "user",
    ]
    page.reload()
    page.click("#options-button")
    # they are drawn once the server has said what it is
    page.wait_for_function("document.querySelector('[name=seed]').value !== ''")
    assert (page.input_value("[name=seed]"), page.input_value("#system")) == ("3", "Be brief.")


def test_conversations_are_renamed_exported_deleted_and_brought_back(visit):
    page = visit()
    answers_with(page, (200, {}, stream("fine")))
    say(page, "a")
    finished(page)
    page.click("text=Rename")
    page.keyboard.type("An <i>apple</i>")
    page.keyboard.press("Enter")
    assert page.locator("#chats li > button").inner_text() == "An <i>apple</i>"
    with page.expect_download() as download:
        page.click("text=Export")
    assert download.value.suggested_filename == "an-i-apple-i.json"
    assert json.loads(download.value.path().read_text()) == {
        "messages": [user("a"), {"role": "assistant", "content": "fine"}]
    }
    page.click("text=Delete")
    assert page.locator("#chats li").count() == 0 and page.locator(".turn").count() == 0
    page.click("text=Undo")
    assert page.locator(".turn").count() == 1
    page.click("text=Delete")
    page.reload()
    assert page.locator("#chats li").count() == 0


def test_a_browser_that_keeps_nothing_says_so_and_answers(visit):
    page = visit()
    page.evaluate(
        "() => { Storage.prototype.setItem = () => { throw new DOMException('full',"
        " 'QuotaExceededError'); }; }"
    )
    say(page, SHORT)
    assert finished(page)[0] and "QuotaExceededError" in page.locator("#note").inner_text()


# --- student beside teacher


def test_student_and_teacher_answer_side_by_side_each_with_its_own_past(visit, server):
    page = visit()
    page.check("#beside")
    say(page, SHORT)
    first = finished(page)
    assert (
        first == [answer(server, [user(SHORT)], side) for side in (0, 1)] and first[0] != first[1]
    )
    say(page, LONG)
    second = finished(page)
    assert second == [
        answer(
            server, [user(SHORT), {"role": "assistant", "content": first[side]}, user(LONG)], side
        )
        for side in (0, 1)
    ]
    student, teacher = (
        page.locator(f".turn:last-child .{role}.answer").bounding_box()
        for role in ("student", "teacher")
    )
    assert student["y"] == teacher["y"] and student["x"] + student["width"] <= teacher["x"]
    for role in ("student", "teacher"):
        said = page.locator(f".turn:last-child .{role}.answer .numbers").inner_text()
        assert all(what in said for what in ("tokens/s", "to first token", "memory", "parameters"))


def test_the_keyboard_alone_asks_opens_the_heat_map_and_moves_in_it(visit, server):
    page = visit()
    page.keyboard.type(SHORT)
    page.keyboard.press("Enter")
    [text] = finished(page)
    for _ in range(20):
        page.keyboard.press("Shift+Tab")
        if page.evaluate("document.activeElement.textContent") == "Show where they differ":
            break
    page.keyboard.press("Enter")
    page.locator(".tokens").wait_for()
    asked = {"messages": [user(SHORT)], "answer": text, "finished": True}
    tokens = (
        server.app.test_client()
        .post("/v1/heatmap", json=asked, headers={"Host": "localhost"})
        .json["tokens"]
    )
    assert page.locator(".tokens span").all_inner_texts() == [
        token["text"].replace("\n", "⏎\n") for token in tokens
    ]
    assert page.locator(".tokens span.special").count() == 1, (
        "the end of the answer is none of its text"
    )
    shares = page.locator(".tokens span").evaluate_all(
        "all => all.map(node => Number(node.style.getPropertyValue('--share')))"
    )
    order = sorted(range(len(tokens)), key=lambda place: tokens[place]["kl"])
    assert [shares[place] for place in order] == sorted(shares), (
        "the more they differ, the stronger the colour"
    )

    for _ in range(20):
        page.keyboard.press("Shift+Tab")
        if page.evaluate("document.activeElement.role") == "option":
            break
    tip = page.locator("#tip")
    for key, place in (("ArrowRight", 1), ("End", -1), ("ArrowLeft", -2), ("Home", 0)):
        page.keyboard.press(key)
        said = tip.inner_text()
        assert (
            f"KL {tokens[place]['kl']:.3f} nats" in said
            and page.locator("[aria-describedby=tip][aria-selected=true]").count() == 1
        )
        names = [
            row.strip().replace(" ", "␣") or "␣"
            for row, _ in tokens[place]["student"] + tokens[place]["teacher"]
        ]
        shown = [name.strip("␣") or "␣" for name in tip.locator("li code").all_inner_texts()]
        assert set(names) <= set(shown), "the likeliest tokens of both"
        assert tip.locator(".chosen").count() == 2, "the token itself, in both columns"
    page.keyboard.press("Escape")
    assert not tip.is_visible()


def test_the_mouse_shows_what_both_would_have_written_and_the_answer_comes_back(visit):
    page = visit()
    say(page, LONG)
    finished(page)
    before = page.locator(".body").inner_html()
    page.click("text=Show where they differ")
    page.hover(".tokens span:nth-child(3)")
    tip = page.locator("#tip")
    assert (
        tip.is_visible()
        and tip.locator(".student li").count() >= 5
        and tip.locator(".teacher li").count() >= 5
    )
    box = tip.bounding_box()
    assert (
        0 <= box["x"]
        and box["x"] + box["width"] <= 1280
        and 0 <= box["y"]
        and box["y"] + box["height"] <= 800
    )
    page.mouse.move(5, 5)
    assert not tip.is_visible()
    page.locator(".worst button").first.click()
    assert tip.is_visible(), "the most different tokens lead to their places"
    page.click("text=Hide where they differ")
    assert (
        page.locator(".tokens").count() == 0
        and page.locator(".body").inner_html() == before
        and not tip.is_visible()
    )


# --- what a model writes is text of others


def test_markup_in_an_answer_stays_text_and_only_web_links_are_links(visit):
    page = visit()
    answers_with(page, (200, {}, stream(EVIL[:40], EVIL[40:])))
    say(page, "<img src=x onerror=alert(1)>")
    finished(page)
    shown = page.locator("#log").inner_text()
    assert all(
        text in shown
        for text in (
            "<script>document.title = 'owned'</script>",
            '<img src=x onerror="document',
            "[click](javascript:alert(1))",
            "[data](data:text/html,x)",
            "<b>bold</b>",
            "<iframe src=//example.com></iframe>",
        )
    )
    assert (
        page.locator("#log :is(script, img, iframe, b:not(header b, .numbers b))").count() == 0
        and page.title() == "stage2"
    )
    links = page.evaluate(
        "[...document.querySelectorAll('#log a')].map(link => [link.href, link.rel, link.target])"
    )
    assert links == [["https://example.com/a?b=c", "noopener noreferrer", "_blank"]]


MARKDOWN = {
    "a *b* **c** `d*e*` ~~f~~ x_y_z 2*3*4": (
        "<p>a <em>b</em> <strong>c</strong> <code>d*e*</code> <s>f</s> x_y_z 2*3*4</p>"
    ),
    "# One\ntwo\nthree": "<h2>One</h2><p>two\nthree</p>",
    "#### 83": "<h5>83</h5>",
    "- a\n- b\n  - c\n  - d\n- e": (
        "<ul><li>a</li><li>b<ul><li>c</li><li>d</li></ul></li><li>e</li></ul>"
    ),
    "3. a\n4. b\n\ntext": '<ol start="3"><li>a</li><li>b</li></ol><p>text</p>',
    "> a\n> **b**\n\n---": "<blockquote><p>a\n<strong>b</strong></p></blockquote><hr>",
    "| a | b |\n|---|---|\n| 1 | `2` |": (
        '<div class="table"><table><thead><tr><th>a</th><th>b</th></tr></thead>'
        "<tbody><tr><td>1</td><td><code>2</code></td></tr></tbody></table></div>"
    ),
    "\\*not\\* &amp; <b>": "<p>*not* &amp;amp; &lt;b&gt;</p>",
    "see https://a.b/c_d, or [e](http://f)": (
        '<p>see <a href="https://a.b/c_d" rel="noopener noreferrer"'
        ' target="_blank">https://a.b/c_d</a>, or <a href="http://f" rel="noopener noreferrer"'
        ' target="_blank">e</a></p>'
    ),
}


def test_markdown_is_read_and_a_growing_answer_ends_as_the_whole_one(visit):
    page = visit()
    read = (
        "texts => { const box = make('div'); for (const text of texts) showMarkdown(box, text);"
        " return box.innerHTML; }"
    )
    for text, wanted in MARKDOWN.items():
        assert page.evaluate(read, [text]) == wanted
    code = page.evaluate(read, ["```python\nif a < b:\n    pass\n"])
    assert "<code>if a &lt; b:\n    pass\n</code>" in code and ">python<" in code, (
        "a block that is not closed yet"
    )
    whole = "\n\n".join([*MARKDOWN, "```\ncode\n```", "last"])
    assert page.evaluate(
        read, [whole[:length] for length in range(0, len(whole) + 1, 3)] + [whole]
    ) == page.evaluate(read, [whole])


LENGTH = 64_000
# each is repeated to that length behind its beginning
NASTY = [
    ("", "*", ""),
    ("", "`a", ""),
    ("", "**a ", ""),
    ("", "> ", ""),
    ("", "- ", "x"),
    ("", "[", ""),
    ("", "[a](", ""),
    ("", "[a](http://", ""),
    ("", "|-", ""),
    ("", "_a", ""),
    ("", "-*a", ""),
    ("", "\u200b*a", ""),
    ("", "https://", ""),
    ("", "http://" + "." * 2000 + " ", ""),
    ("", "  ", "- a"),
    ("", "` " + "a" * 1990 + "`", ""),
    ("a|b\n", " ", ""),  # 25 s
    ("a|b\n", " |", "x"),
    ("a|b\n", ":-|", "x"),
    ("a|b\n-|-\n", "|\n", ""),
    ("|" * 32_000 + "\n", "-|", ""),  # a table of 32,000 columns: 6 s to lay out
    ("a|b\n-|-\n", "|", ""),
    ("```", " ", "`"),
    ("```", "a", "`"),
    ("", "~", "`"),
    ("~" * 32_000 + "\n", "~~~~\n", ""),
    ("# ", " ", "\u2028"),  # 17 s
    ("# a", "# ", "x"),
    ("---", " ", "x"),
    ("", "a\n\n", ""),  # 7 s
    ("", "-\n", ""),
    ("", "- a\n1. b\n", ""),
    ("- " + " " * 300 + "a\n", " b\n", ""),
    ("", "> > > > > > > > > a\n", ""),
    ("", "- - - - - - - - a\n", ""),
    ("", "```\n", ""),
    ("", "---\n", ""),
    ("", "\\*", ""),
]


def test_no_text_hangs_the_page(visit):
    page = visit()
    timed = """text => {
        const box = make('div.body'), began = performance.now();
        showMarkdown(box, text);
        showMarkdown(box, text + 'x');  // the redraw, once another token has come
        const time = performance.now() - began;
        return [time, box.querySelectorAll('*').length]; }"""
    texts = ["\n".join(" " * depth + "- a" for depth in range(350))]
    for begin, again, end in NASTY:
        texts.append(begin + (again * LENGTH)[: LENGTH - len(begin + end)] + end)
    for text in texts:
        took, nodes = page.evaluate(timed, text)
        assert took < 2000, text[:20]  # two draws
        assert nodes < 6000, text[:20]  # and laid out in time


def test_what_comes_behind_the_last_node_stays_text(visit):
    page = visit()
    shown = """([start, text]) => {
        const box = make('div');
        for (const length of [start, text.length]) showMarkdown(box, text.slice(0, length));
        return box.textContent; }"""
    for again in ("x\n\n", "- x\n", "`x` ", "> x\n>\n", "- - x\n"):
        text = again * 5000
        for start in (0, len(text) // 2, len(text) - 1):
            assert page.evaluate(shown, [start, text]).count("x") == 5000, again
    table = "a|b\n-|-\n" + "x|x\n" * 2500
    assert page.evaluate(shown, [9, table]).count("x") == 5000
    wide = "a|b\n-|-\n" + "x|" * 5000
    assert page.evaluate(shown, [9, wide]).count("x") == 5000


def test_events_are_read_whole_however_the_bytes_are_cut(visit):
    sent = (
        'data: {"a": "né 🙂"}\r\n\r\n: a comment\n\ndata: {"b": 2}\n\ndata: [DONE]\n\ndata: {"c":'
        " 3}\n\n"
    )
    read = """async ([text, size]) => {
        const bytes = new TextEncoder().encode(text), found = [];
        const body = new ReadableStream({start(out) {
            for (let i = 0; i < bytes.length; i += size) out.enqueue(bytes.slice(i, i + size));
            out.close(); }});
        for await (const event of events(new Response(body))) found.push(event);
        return found; }"""
    page = visit()
    for size in (1, 2, 3, 7, 1000):
        assert page.evaluate(read, [sent, size]) == [{"a": "né 🙂"}, {"b": 2}]


# --- when the server refuses


def test_what_the_server_says_of_an_error_is_shown_and_the_answer_can_be_had_again(visit):
    page = visit()
    wrong = json.dumps(
        {
            "error": {
                "message": "the conversation has 300 tokens <b>",
                "type": "invalid_request_error",
                "param": None,
                "code": None,
            }
        }
    )
    broken = stream("one", finish=None) + 'data: {"error": {"message": "it stopped"}}\n\n'
    answers_with(
        page,
        (400, {"Content-Type": "application/json"}, wrong),
        (200, {}, broken),
        (200, {}, stream("half", finish=None)),
        (200, {}, stream("whole")),
    )
    for said in (
        "the conversation has 300 tokens <b>",
        "it stopped",
        "The answer broke off",
        "whole",
    ):
        if page.locator(".turn").count():
            page.click("text=Retry")
        else:
            say(page, "a")
        finished(page)
        assert said in page.locator(".body").inner_text() and page.locator(".turn").count() == 1
    assert page.locator(".problem").count() == 0


def test_a_busy_server_is_asked_once_more_and_one_that_is_gone_is_said(visit):
    page = visit()
    busy = (
        429,
        {"Content-Type": "application/json", "Retry-After": "0.2"},
        json.dumps({"error": {"message": "come again later"}}),
    )
    asked = answers_with(page, busy, (200, {}, stream("here")), busy, busy)
    say(page, "a")
    assert finished(page) == ["here"] and len(asked) == 2
    say(page, "b")
    finished(page)
    assert "come again later" in page.locator(".problem").inner_text() and len(asked) == 4
    page.unroute("**/v1/chat/completions")
    page.route("**/v1/chat/completions", lambda route: route.abort())
    say(page, "c")
    finished(page)
    assert "The server does not answer" in page.locator(".problem").last.inner_text()


def test_a_key_is_asked_for_once_kept_in_the_tab_and_sent(visit):
    page = visit()
    sent = []

    def door(route):
        sent.append(route.request.headers.get("authorization"))
        if sent[-1] == "Bearer sesame":
            return route.fulfill(
                status=200, headers={"Content-Type": "text/event-stream"}, body=stream("open")
            )
        route.fulfill(
            status=401,
            headers={"Content-Type": "application/json"},
            body='{"error": {"message": "no"}}',
        )

    page.route("**/v1/chat/completions", door)
    page.check("#beside")
    say(page, "a")
    page.fill("#key", "wrong")
    page.keyboard.press("Enter")
    until(page, "document.querySelector('#key-text').textContent.includes('refused')")
    page.fill("#key", "sesame")
    page.keyboard.press("Enter")
    assert finished(page) == ["open", "open"]
    say(page, "b")
    assert (
        finished(page) == ["open", "open"]
        and sent[-2:] == ["Bearer sesame"] * 2
        and sent.count(None) == 2
    )
    assert "sesame" not in page.evaluate("JSON.stringify(localStorage)")


# --- the run, and the shape of the page


def test_the_run_has_a_tab_with_what_its_folder_has(visit):
    page = visit()
    page.locator("#chat-tab").focus()
    page.keyboard.press("ArrowRight")
    page.locator("#run img").wait_for()
    until(page, "document.querySelector('#run img').naturalWidth === 1")
    frame = page.frame_locator("#run iframe").locator("p")
    assert (
        frame.inner_text() == "compared"
        and frame.evaluate("node => getComputedStyle(node).color") == "rgb(255, 0, 0)"
    )
    page.locator("#run .body").wait_for()
    assert page.locator("#run .body pre").inner_text() == "<b>8</b>"
    assert not page.locator("#input").is_visible()
    page.keyboard.press("/")
    assert (
        page.evaluate("document.activeElement.id") == "input"
        and page.locator("#input").is_visible()
    )


def test_a_run_without_files_has_no_tab(visit):
    page = visit()
    page.route(
        "**/run.json",
        lambda route: route.fulfill(
            json={"ckpt": "x", "curves": False, "comparison": False, "samples": False}
        ),
    )
    page.reload()
    page.locator("#models li").nth(1).wait_for()
    assert not page.locator("#run-tab").is_visible() and page.locator(".hello li").count() == 0


def test_a_phone_never_scrolls_sideways_and_has_a_drawer(visit):
    page = visit(viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    wide = (
        "W" * 300
        + "\n\n```\n"
        + "x" * 300
        + "\n```\n\n"
        + "|a" * 40
        + "|\n"
        + "|-" * 40
        + "|\n\n"
        + "https://example.com/"
        + "y" * 200
    )
    answers_with(page, (200, {}, stream(wide)))
    page.check("#beside")
    say(page, "V" * 300)
    finished(page)
    sideways = (
        "[document.documentElement, document.querySelector('#scroll')].map(node => node.scrollWidth"
        " <= 360)"
    )
    assert page.evaluate(sideways) == [True, True]
    student, teacher = (
        page.locator(f".{role}.answer").bounding_box() for role in ("student", "teacher")
    )
    assert student["y"] + student["height"] <= teacher["y"], "the teacher stands below"
    assert not page.locator("#new").is_visible()
    page.tap("#menu")
    page.tap("#new")
    page.locator("#new").wait_for(state="hidden")
    page.unroute("**/v1/chat/completions")
    say(page, SHORT)
    finished(page)
    page.tap("text=Show where they differ")
    page.tap(".tokens span:nth-child(2)")
    box = page.locator("#tip").bounding_box()
    assert (
        box["x"] >= 0 and box["x"] + box["width"] <= 360 and page.evaluate(sideways) == [True, True]
    )


def test_a_long_answer_is_followed_until_the_reader_scrolls_up(visit, slow):
    page = visit(viewport={"width": 800, "height": 300})
    page.evaluate("state.settings.sampling.max_tokens = 200")
    say(page, LONG)
    end = (
        "(({scrollTop, scrollHeight, clientHeight}) => scrollHeight - scrollTop -"
        " clientHeight)(document.querySelector('#scroll'))"
    )
    until(page, "document.querySelector('#scroll').scrollHeight > 340")
    page.wait_for_timeout(100)
    assert page.evaluate(end) < 40
    page.hover("#log")
    page.mouse.wheel(0, -200)
    until(page, f"{end} > 60")
    height, top = (
        page.evaluate(f"document.querySelector('#scroll').{name}")
        for name in ("scrollHeight", "scrollTop")
    )
    until(page, f"document.querySelector('#scroll').scrollHeight > {height}")
    assert page.evaluate("document.querySelector('#scroll').scrollTop") <= top, (
        "the text must stay where it is read"
    )
    page.click("#jump")
    assert page.evaluate(end) < 40
    page.click("#go")


def test_the_theme_is_the_systems_until_it_is_chosen(visit):
    page = visit(color_scheme="dark")
    paper = "getComputedStyle(document.body).backgroundColor"
    assert page.evaluate(paper) == "rgb(20, 24, 31)"
    page.click("#theme")
    assert page.evaluate(paper) == "rgb(255, 255, 255)"
    page.reload()
    assert page.evaluate(paper) == "rgb(255, 255, 255)"


def test_two_tabs_of_one_conversation_lose_nothing_of_it(visit, server):
    """A tab that had only stood open overwrote, when it was closed, what the other had added; and
    brought back what was deleted there."""
    first = visit(viewport={"width": 900, "height": 700})
    say(first, SHORT)
    finished(first)
    second = first.context.new_page()
    second.goto(server.url)
    until(second, "state.server !== null && state.chat.turns.length === 1")
    say(first, LONG)
    finished(first)
    until(
        second, "state.chat.turns.length === 2 && state.chat.turns[1].student.state !== 'writing'"
    )
    assert second.locator(".turn").count() == 2
    first.goto(server.url + "/healthz")
    second.goto(server.url + "/healthz")
    first.goto(server.url)
    until(first, "state.chat.turns.length === 2")
    second.goto(server.url)
    until(second, "state.chat.turns.length === 2")
    first.evaluate("remove(state.chat)")
    second.goto(server.url + "/healthz")
    first.goto(server.url)
    until(first, "state.server !== null")
    assert first.evaluate("state.chats.length") == 0


def test_a_conversation_longer_than_the_context_goes_on_without_its_oldest_turns(visit):
    page = visit()
    page.evaluate(
        """() => { for (let i = 0; i < 40; i++)
        state.chat.turns.push({user: `Ann has ${i} apples. How many?`, student: {model: "m", text: `${i} apples.`, state: "done"}}) }"""
    )
    say(page, "How many?")
    assert finished(page)[0]
    assert "oldest messages no longer fit" in page.locator(".answer.student").last.inner_text()
    assert page.evaluate("state.chat.turns.at(-1).student.state") in ("done", "length")
