"""The chat template that a tokenizer is given: the plain one, one that is named, its date, its
arguments."""

import argparse
import datetime

import pytest
import tiny_tokenizers as tiny
from tiny_tokenizers import chat

from lib import flags, template
from lib.prepare import templates

LLAMA32 = (
    "{%- if not date_string is defined %}{%- if strftime_now is defined %}{%- set date_string ="
    " strftime_now('%d %b %Y') %}{%- else %}{%- set date_string = '26 Jul 2024' %}{%- endif %}{%-"
    " endif %}{{- 'Today Date: ' + date_string + '\\n\\n' }}" + tiny.CHATML
)
SMOLLM3 = (
    "{%- set today = strftime_now('%d %B %Y') -%}{{ 'Today: ' ~ today ~ '\\n' }}" + tiny.CHATML
)
GRANITE = (
    "{%- if messages[0]['role'] != 'system' %}{{ 'Date: ' + strftime_now('%B %-d, %Y') + '.\\n' }}"
    "{% endif %}" + tiny.CHATML
)
ASKED = [{"role": "user", "content": "x"}]


@pytest.fixture
def on_day(monkeypatch):
    """Return a function that renders as plain transformers does on some day."""
    import transformers.utils.chat_template_utils as own

    def render(tokenizer, year, **more):
        class Day(datetime.datetime):
            @classmethod
            def now(cls, tz=None):
                return datetime.datetime(year, 3, 4)

        monkeypatch.setattr(own, "datetime", Day)
        return tokenizer.apply_chat_template(ASKED, tokenize=False, **more)

    return render


@pytest.mark.parametrize(
    ("chat_template", "line"),
    [
        (LLAMA32, "Today Date: 26 Jul 2024"),
        (SMOLLM3, "Today: 01 January 2025"),
        (GRANITE, "Date: January 1, 2025."),
    ],
)
def test_a_date_is_pinned_for_every_reader_of_the_template(tmp_path, on_day, chat_template, line):
    tokenizer = tiny.tiny(chat_template)
    assert on_day(tokenizer, 2031) != on_day(tokenizer, 2032)
    assert templates.make_ready(tokenizer)[1] == line
    tokenizer.save_pretrained(tmp_path)
    again = template.load_tokenizer(tmp_path)
    assert templates.make_ready(again)[1] == line and again.chat_template == tokenizer.chat_template
    assert on_day(again, 2031) == on_day(again, 2032) == template.render(again, ASKED)
    assert template.render(again, ASKED).startswith(f"{line}\n")


def test_a_date_that_is_given_is_taken(on_day):
    tokenizer = tiny.tiny(LLAMA32)
    templates.make_ready(tokenizer, args={"date_string": "3 May 'é'"})
    assert on_day(tokenizer, 2031).startswith("Today Date: 3 May 'é'\n")
    assert on_day(tokenizer, 2031, date_string="now").startswith("Today Date: now\n")


@pytest.mark.parametrize("name", tiny.MODELS)
def test_a_template_without_a_date_is_left_as_it_is(name):
    tokenizer = tiny.model(name)
    before = tokenizer.chat_template
    assert templates.make_ready(tokenizer) == ([], "") and tokenizer.chat_template == before


def test_arguments_become_the_templates_defaults_and_what_follows_is_rendered_as_before():
    values = {"flag": False, "more": {"a": [None, 1.5, 'q"\\n\U0001f600']}}
    tokenizer = tiny.tiny("\n  {{ flag }}|{{ more.a[0] }}|{{ more.a[1] }}|{{ more.a[2] }}|")
    templates.make_ready(tokenizer, args=values)
    assert template.render(tokenizer, ASKED) == '\n  False|None|1.5|q"\\n\U0001f600|'
    assert template.render(tokenizer, ASKED, flag=True).startswith("\n  True|")
    with pytest.raises(SystemExit, match="no argument enable_thinking"):
        templates.make_ready(tiny.tiny(), args={"enable_thinking": False})


def test_without_thinking_an_answer_is_learnt_behind_the_empty_trace_of_its_prompt():
    opened = "{{ '<|im_start|>assistant\\n' }}{% if not enable_thinking %}{{ '<think>\\n\\n</think>\\n\\n' }}"
    tokenizer = tiny.tiny(
        tiny.CHATML.replace("{{ '<|im_start|>assistant\\n' }}", opened + "{% endif %}")
    )
    templates.make_ready(tokenizer, args={"enable_thinking": False})
    ((ids, answer),) = template.encode(tokenizer, [chat("a", "<b>")])
    assert ids[: answer.argmax()].tolist() == template.prompt_ids(tokenizer, chat("a"))
    assert tokenizer.decode(ids[answer]) == "<b><|im_end|>"


@pytest.mark.parametrize("name", ["chatml", "llama3", "gemma"])
def test_a_base_model_can_use_the_turn_tokens_of_its_family(name, tmp_path):
    family = {"chatml": "qwen2.5", "gemma": "gemma3"}.get(name, name)
    tokenizer = tiny.model(family)
    tokenizer.chat_template = None
    notes, _ = templates.make_ready(tokenizer)
    assert f"--chat-template {name}" in notes[0]
    tokenizer.chat_template = None
    templates.make_ready(tokenizer, name)
    wanted = tiny.model(family)
    talk = chat("a", "b", "c", "d", system="Be" if name != "gemma" else None)
    facts = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"  # llama3's
    assert template.render(tokenizer, talk) == template.render(wanted, talk).replace(facts, "")
    (tmp_path / "t.jinja").write_text(wanted.chat_template, encoding="utf-8")
    templates.make_ready(tokenizer, str(tmp_path / "t.jinja"))
    assert tokenizer.chat_template == wanted.chat_template
    with pytest.raises(SystemExit, match="has not the turn tokens"):
        templates.make_ready(tiny.tiny(special=["<s>", "<|im_end|>", "<|pad|>"]), "llama3")


def test_one_of_several_templates_is_chosen_by_name_and_a_wrong_one_is_one_line(tmp_path):
    tokenizer = tiny.tiny({"a": tiny.CHATML, "b": tiny.SPACE})
    with pytest.raises(SystemExit, match="several chat templates"):
        templates.make_ready(tokenizer)
    with pytest.raises(SystemExit, match="no chat template c; wanted .*chatml.* a, b"):
        templates.make_ready(tokenizer, "c")
    (tmp_path / "t.jinja").write_text("{% for %}", encoding="utf-8")
    with pytest.raises(SystemExit, match="cannot be read; saw line 1"):
        templates.make_ready(tiny.tiny(), str(tmp_path / "t.jinja"))
    templates.make_ready(tokenizer, "b")
    assert tokenizer.chat_template == tiny.SPACE


@pytest.mark.parametrize("text", ["[1]", "{", '{"messages": 1}', '{"a-b": 1}', '{"a": "\\ud800"}'])
def test_what_is_no_argument_of_a_template_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="wanted JSON like"):
        flags.template_args(text)


@pytest.mark.parametrize("adds_bos", [False, True])
def test_the_fallback_template_ends_turns_by_eos_and_is_saved_with_the_tokenizer(
    tmp_path, adds_bos
):
    tokenizer = tiny.tiny(None, eos="</s>", adds_bos=adds_bos)
    assert templates.ensure_template(tokenizer)
    tokenizer.save_pretrained(tmp_path)
    again = template.load_tokenizer(tmp_path)
    assert not templates.ensure_template(again)
    row = chat("Hi", "Hello!", "more", "yes", system="Be brief")
    ((ids, answer),) = template.encode(again, [row])
    assert again.decode(ids[answer]) == "Hello!</s>yes</s>"
    assert ids.tolist().count(again.bos_token_id) == adds_bos
    assert template.identities(again) == template.identities(tokenizer)


def test_a_tokenizer_with_neither_template_nor_eos_is_refused_in_one_line():
    with pytest.raises(SystemExit, match="neither a chat template nor an eos_token"):
        templates.ensure_template(tiny.tiny(None, eos=None))


def test_a_template_that_writes_tokens_the_tokenizer_calls_otherwise_is_named():
    words = tiny.tiny()
    assert not templates.make_ready(words)[0]
    words.chat_template = tiny.CHATML.replace("<|im_start|>", "<|turn|>")
    notes, _ = templates.make_ready(words)
    assert len(notes) == 1 and "<|turn|>, no token of the tokenizer" in notes[0]
