"""What a row says reaches the text or is named: shapes of conversations, what stands beside a
prompt, traces, tools, and answers that are not to be learnt."""

import json
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny_tokenizers as tiny

import prepare_data
from lib import files, template
from lib.prepare import ask, kinds, places, schema, sources

# the parts of Qwen2.5's and Llama 3.1's templates that tools and traces need
TOOLED = (
    "{% if tools %}{{ '<|im_start|>system\\n' }}{% for t in tools %}{{ t | tojson }}{% endfor %}"
    "{{ '<|im_end|>\\n' }}{% endif %}{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
    "{% if m.reasoning_content %}{{ '<think>' + m.reasoning_content + '</think>' }}{% endif %}"
    "{{ m.content }}{% for c in m.tool_calls or [] %}{{ '[CALL]' + (c.function | tojson) }}"
    "{% endfor %}{{ '<|im_end|>\\n' }}{% endfor %}" + tiny.PROMPT
)
ASK = {"role": "user", "content": "Ask"}
SAY = {"role": "assistant", "content": "Say"}
CALL = {"name": "weather", "arguments": {"city": "Bergen"}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


def look(tmp_path, row, columns=None, suffix=".jsonl"):
    path = tmp_path / f"rows{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist([row] * 2), path)
    else:
        path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    told = schema.parse_columns(columns)[1] if columns else None
    return sources.look(places.on_disk(path), told)


def read(tmp_path, row, columns=None, suffix=".jsonl"):
    return next(sources.rows(look(tmp_path, row, columns, suffix)))


def shown(row, chat_template=tiny.CHATML, **how):
    """Return (text, its targets) of a row."""
    tokenizer = tiny.tiny(chat_template)
    ((ids, answer),) = template.encode(tokenizer, [row], **how)
    return tokenizer.decode(ids), tokenizer.decode(ids[answer])


BESIDE = {
    "context": ({"context": "C"}, "Ask\n\nC"),
    "passage": ({"passage": "C"}, "Ask\n\nC"),
    "two contexts": ({"context": "C", "passage": "D"}, "Ask\n\nC\n\nD"),
    "input and context": ({"input": "I", "context": "C"}, "Ask\n\nI\n\nC"),
    "a list of contexts": ({"contexts": ["C", "D"]}, "Ask\n\nC\n\nD"),
    "a blank context": ({"context": ""}, "Ask"),
    "choices": ({"choices": ["w", "i"]}, "Ask\n\nA. w\nB. i"),
    "choices as text": ({"options": '["w", "i"]'}, "Ask\n\nA. w\nB. i"),
    "choices by letter": ({"options": {"A": "w", "B": "i"}}, "Ask\n\nA. w\nB. i"),
    "labelled": ({"choices": {"text": ["w", "i"], "label": ["1", "2"]}}, "Ask\n\n1. w\n2. i"),
    "columns of letters": ({"A": "w", "B": "i"}, "Ask\n\nA. w\nB. i"),
}


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("prompt", ["instruction", "question", "prompt"])
@pytest.mark.parametrize("case", BESIDE)
def test_what_stands_beside_a_prompt_follows_it(tmp_path, case, prompt, suffix):
    more, wanted = BESIDE[case]
    row = read(tmp_path, {prompt: "Ask", "response": "Say", **more}, suffix=suffix)
    assert row == [{"role": "user", "content": wanted}, SAY]


@pytest.mark.parametrize(("answer", "learnt"), [("B", "B"), (1, "B"), ("1", "B"), ("i", "i")])
def test_an_index_among_choices_is_learnt_as_their_letter(tmp_path, answer, learnt):
    row = read(tmp_path, {"question": "Ask", "choices": ["w", "i"], "answer": answer})
    assert row[-1]["content"] == learnt


def test_an_index_past_the_choices_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="row 1: column answer .*index of 2 choices"):
        read(tmp_path, {"question": "Ask", "choices": ["w", "i"], "answer": 2})


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_the_answers_of_reading_comprehension_are_the_first(tmp_path, suffix):
    answers = {"text": ["1923", "in 1923"], "answer_start": [4, 1]}
    row = {"question": "Ask", "context": "C", "answers": answers}
    assert read(tmp_path, row, suffix=suffix)[-1]["content"] == "1923"
    file = look(tmp_path, row, suffix=suffix)
    list(sources.rows(file))
    assert {name for _, name in file.unused} == {"answers.answer_start", "answers past the first"}


@pytest.mark.parametrize("name", ["system", "system_prompt", "system_message"])
def test_a_system_prompt_in_a_column_opens_the_conversation(tmp_path, name):
    pair, talk = {"question": "Ask", "answer": "Say"}, {"conversations": [ASK, SAY]}
    for row in (pair, talk):
        assert read(tmp_path, row | {name: "Be"}) == [{"role": "system", "content": "Be"}, ASK, SAY]


def test_later_rows_may_have_columns_that_the_first_one_lacks(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"question": "Ask", "answer": "Say"}, {"question": "Ask", "answer": "Say"}]
    rows[1] |= {"system_prompt": "Be", "passage": "C", "odd": 1}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    file = sources.look(places.on_disk(path))
    assert [len(row) for row in sources.rows(file)] == [2, 3]
    assert ("columns", "odd") in file.unused


def test_earlier_turns_come_before_the_question(tmp_path):
    row = read(tmp_path, {"prompt": "Ask", "response": "Say", "history": [["p", "q"]]})
    assert [message["content"] for message in row] == ["p", "q", "Ask", "Say"]


TALKS = {
    "xtuner": [{"system": "S", "input": "Ask", "output": "Say"}],
    "firefly": [{"system": "S"}, {"human": "Ask", "assistant": "Say"}],
    "speaker": [{"speaker": "System", "text": "S"}, ASK, {"speaker": "ai", "text": "Say"}],
    "from": [{"from": "system", "value": "S"}, ASK, {"from": "gpt", "value": "Say"}],
    "columns of a list": {"role": ["system", "user", "assistant"], "content": ["S", "Ask", "Say"]},
}


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("case", TALKS)
def test_known_shapes_of_conversations_are_read(tmp_path, case, suffix):
    row = read(tmp_path, {"conversation": TALKS[case]}, suffix=suffix)
    assert row == [{"role": "system", "content": "S"}, ASK, SAY]


@pytest.mark.parametrize("row", [["Ask", "Say"], [["Ask", "Say"]], [ASK, SAY]])
def test_a_bare_list_is_a_conversation(tmp_path, row):
    assert read(tmp_path, row) == [ASK, SAY]
    path = tmp_path / "rows.jsonl"
    path.write_text(2 * (json.dumps(row) + "\n"), encoding="utf-8")
    assert kinds.recognised(places.on_disk(path), None).suffix == ".jsonl"
    assert read(tmp_path, {"messages": row}) == [ASK, SAY]


PRINTED = {
    "python": f"{[ASK, SAY]}",
    "pandas": f"[{ASK}\n {SAY}]",
    "numpy within": f"[{ASK}\n {SAY | {'loss': 1, 'x': None}}]".replace("None", "array([1, 2])"),
    "array": f"array([{ASK},\n {SAY}], dtype=object)",
    "nan": f"{[ASK | {'x': None}, SAY]}".replace("None", "nan"),
    "texts": "['Ask' 'Say']",
    "pairs": "[('Ask', 'Say')]",
    "json": json.dumps([ASK, SAY]),
}


@pytest.mark.parametrize("case", PRINTED)
def test_a_list_is_read_as_csv_files_have_it(tmp_path, case):
    assert read(tmp_path, {"messages": PRINTED[case]}) == [ASK, SAY]


def test_what_looks_like_a_printed_list_inside_texts_stays_as_it_is(tmp_path):
    said = "nan, array([1]), {'a'}\n{'b'} it's \"so\""
    row = read(tmp_path, {"messages": f"[{ASK}\n {SAY | {'content': said}}]"})
    assert row == [ASK, SAY | {"content": said}]


SPOKEN = {
    "hh-rlhf": "\n\nHuman: Ask\n\nAssistant: Say",
    "lines": "Human: Ask\nAssistant: Say\nHuman:",
    "guanaco": "### Human: Ask### Assistant: Say",
    "glaive": "USER: Ask\n\n\nASSISTANT: Say <|endoftext|>\n\n\n",
}


@pytest.mark.parametrize("case", SPOKEN)
def test_a_conversation_in_one_text_is_read(tmp_path, case):
    assert read(tmp_path, {"chat": SPOKEN[case]}) == [ASK, SAY]
    inside = read(tmp_path, {"chat": "\n\nHuman: a\nHuman: b\n\nAssistant: Say"})
    assert inside[0]["content"] == "a\nHuman: b"
    plain = read(tmp_path, {"instruction": "USER: say hi", "output": "Say"})
    assert [message["content"] for message in plain] == ["USER: say hi", "Say"]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("value", [42, 2.5, True, Decimal(7)])
def test_a_number_is_an_answer(tmp_path, value, suffix):
    if isinstance(value, Decimal) and suffix == ".jsonl":
        return
    row = read(tmp_path, {"instruction": "Ask", "input": value, "output": value}, suffix=suffix)
    assert [message["content"] for message in row] == [f"Ask\n\n{value}", f"{value}"]
    if suffix == ".jsonl":
        row = read(tmp_path, {"messages": [ASK, SAY | {"content": value}]})
        assert row[-1]["content"] == f"{value}"


def test_several_texts_for_one_part_are_said_and_the_first_is_taken(tmp_path):
    found = look(tmp_path, {"question": "Ask", "answer": ["Say", "Or this"], "cot": ["Hm", "Ha"]})
    (row,) = sources.rows(found)
    assert row == [ASK, SAY | {"reasoning_content": "Hm"}]
    assert {name for _, name in found.unused} == {"answer past the first", "cot past the first"}


def test_the_first_rows_may_lack_what_the_others_have(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"id": 1}\n{"id": 2, "question": "Ask", "answer": "Say"}\n', encoding="utf-8")
    *_, row = sources.rows(sources.look(places.on_disk(path)))
    assert row == [ASK, SAY]


def test_rows_with_a_class_are_told_of_the_task(tmp_path):
    with pytest.raises(SystemExit, match="--task classify"):
        look(tmp_path, {"sentence": "x", "label": 1})


def test_lists_of_two_lengths_are_no_conversation(tmp_path):
    with pytest.raises(SystemExit, match="a conversation"):
        read(tmp_path, {"messages": {"role": ["user", "assistant"], "content": ["Ask"]}})


def test_a_tree_in_a_csv_has_its_ranks_and_marks_as_text(tmp_path):
    path = tmp_path / "tree.csv"
    path.write_text(
        "message_tree_id,message_id,parent_id,role,text,rank,deleted\nt,1,,prompter,Ask,,False\n"
        "t,2,1,assistant,Worse,10.0,False\nt,3,1,assistant,Say,9.0,False\n"
        "t,4,1,assistant,Gone,0.0,True\nt,5,1,assistant,Odd,first,False\n",
        encoding="utf-8",
    )
    assert list(sources.rows(sources.look(places.on_disk(path)))) == [[ASK, SAY]]


# --- conversations that are rendered already


TWICE = [ASK, SAY, ASK | {"content": "More?"}, SAY | {"content": "<think>hm</think>\n\nYes"}]


@pytest.mark.parametrize("think", ["keep", "mask", "drop"])
@pytest.mark.parametrize("turns", ["all", "last"])
@pytest.mark.parametrize("name", ["chatml", "qwen2.5", "llama3", "gemma3", "mistral", "phi3"])
def test_rendered_text_is_learnt_as_its_messages_are(name, turns, think):
    tokenizer = tiny.model(name)
    text = template.Marked(template.render(tokenizer, TWICE))
    (ids, answer), (wanted, learnt) = (
        template.encode(tokenizer, [row], turns, think)[0] for row in (text, TWICE)
    )
    assert ids[: len(wanted)].tolist() == wanted.tolist()  # Phi-3: and what closes all
    assert np.flatnonzero(answer).tolist() == np.flatnonzero(learnt).tolist()


def test_rendered_text_that_lacks_its_beginning_or_end_is_read(tmp_path):
    tokenizer = tiny.model("llama3")
    text = template.render(tokenizer, TWICE[:2])
    bare = text.removeprefix(tokenizer.bos_token)
    (ids, answer), (whole, _) = (
        template.encode(tokenizer, [template.Marked(row)])[0] for row in (bare, text)
    )
    assert ids.tolist() == whole.tolist() and tokenizer.decode(ids[answer]) == "Say<|eot_id|>"
    cut = template.Marked(text.removesuffix("<|eot_id|>"))
    ((ids, answer),) = template.encode(tokenizer, [cut])
    assert tokenizer.decode(ids[answer]) == "Say"
    other = template.Marked("<|im_start|>assistant\nSay<|im_end|>")
    assert "without '<|start_header_id|>assistant" in template.encode(tokenizer, [other])[0]


def test_rendered_answers_never_hold_another_turn():
    """Llama 2's way of several turns in one <s> has no end behind the first answer; a question may
    name a tag of reasoning."""
    mistral, chatml = tiny.model("mistral"), tiny.model("chatml")
    row = template.Marked("<s>[INST] Ask[/INST] Say[INST] More?[/INST] Yes</s>")
    assert "an answer without '</s>'" in template.encode(mistral, [row])[0]
    text = "<|im_start|>user\nWhat is <think>?<|im_end|>\n<|im_start|>assistant\n{}<|im_end|>"
    thought, plain = (
        template.Marked(text.format(answer)) for answer in ("<think>hm</think>\n\nSay", "Say")
    )
    (ids, answer), (wanted, learnt) = template.encode(chatml, [thought, plain], think="drop")
    assert ids.tolist() == wanted.tolist() and answer.tolist() == learnt.tolist()
    unclosed = template.Marked(text.format("<think>hm"))
    assert template.encode(chatml, [unclosed], think="drop") == ["unclosed think"]


def test_rendered_text_is_said_and_read_by_a_flag(tmp_path, prepare, capsys):
    text = "<|im_start|>user\nAsk {}<|im_end|>\n<|im_start|>assistant\nSay{}<|im_end|>\n"
    rows = [{"text": text.format(i, i)} for i in range(6)] + [{"text": text.format("x" * 99, "")}]
    prepare(rows, tiny.CHATML, "--val", "0", out="plain")
    assert "rendered already (<|im_start|>)" in capsys.readouterr().out
    words = ["--val", "0", "--columns", "rendered=text", "--max-len", "99"]
    meta = files.read_json(prepare(rows, tiny.CHATML, *words) / "meta.json", mend="")
    assert meta["dropped"] == {"too long": 1}  # and never cut into rows
    assert meta["targets"]["train"] == 6 * len("Say0.")
    assert "rendered already" not in capsys.readouterr().out
    look(tmp_path, {"prompt": text, "completion": "Say"})
    assert "rendered once more" in capsys.readouterr().out


def test_an_unknown_role_is_named_and_can_be_told(tmp_path):
    talk = [{"role": "customer", "content": "Ask"}, {"role": "agent", "content": "Say"}]
    assert template.fault(read(tmp_path, {"messages": talk})) == "unknown role agent, customer"
    told = read(tmp_path, {"messages": talk}, "user=customer,assistant=agent")
    assert told == [ASK, SAY]


PREFERENCES = {
    "completions": {"prompt": [ASK], "completion": [SAY]},
    "chosen": {"prompt": [ASK], "chosen": [SAY], "rejected": [ASK]},
    "chosen as text": {"prompt": "Ask", "chosen": "Say", "rejected": "No"},
    "chosen with its prompt": {"prompt": "Ask", "chosen": [ASK, SAY], "rejected": [ASK, ASK]},
    "without prompt": {"chosen": [ASK, SAY], "rejected": [ASK, ASK]},
}


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("case", PREFERENCES)
def test_prompt_and_completion_are_read_as_trl_does(tmp_path, case, suffix):
    assert read(tmp_path, PREFERENCES[case], suffix=suffix) == [ASK, SAY]


def test_a_prompt_that_the_chosen_conversation_does_not_hold_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="row 1: column prompt is not in the conversation"):
        read(tmp_path, {"prompt": "Other", "chosen": [ASK, SAY]})


# --- traces in a field of their own


@pytest.mark.parametrize("name", ["reasoning_content", "thinking", "reasoning", "thought"])
@pytest.mark.parametrize("chat_template", [tiny.CHATML, TOOLED])
def test_a_trace_is_learnt_from_a_field_and_from_a_column(tmp_path, name, chat_template):
    field = read(tmp_path, {"messages": [ASK, SAY | {name: "Hm"}]})
    column = read(tmp_path, {"prompt": "Ask", "response": "Say", name: "Hm"})
    assert field == column
    wanted = "<think>Hm</think>Say" if chat_template is TOOLED else "<think>\nHm\n</think>\n\nSay"
    assert shown(field, chat_template)[1] == f"{wanted}<|im_end|>"
    assert shown(field, chat_template, think="drop")[1] == "Say<|im_end|>"
    assert "Hm" not in shown(field, chat_template, think="drop")[0]
    text, learnt = shown(field, chat_template, think="mask")
    assert "Hm" in text and learnt == "Say<|im_end|>"


def test_a_trace_in_tags_of_the_templates_own_is_masked():
    own = TOOLED.replace("<think>", "(why: ").replace("</think>", ") ")
    text, learnt = shown([ASK, SAY | {"reasoning_content": "Hm"}], own, think="mask")
    assert "(why: Hm)" in text and learnt == "Say<|im_end|>"


def test_a_switch_beside_messages_is_no_trace(tmp_path):
    file = look(tmp_path, {"messages": [ASK, SAY], "reasoning": "off"})
    assert list(sources.rows(file)) == [[ASK, SAY]]
    assert ("columns", "reasoning (a switch)") in file.unused


# --- tools

TALK = [ASK, {"role": "tool", "content": "rain"}, SAY]
CALLS = {
    "openai": {"role": "assistant", "content": None, "tool_calls": [{"id": "a", "function": CALL}]},
    "arguments as text": {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"function": CALL | {"arguments": json.dumps(CALL["arguments"])}}],
    },
    "bare": {"role": "assistant", "tool_calls": [CALL]},
    "older": {"role": "assistant", "content": None, "function_call": CALL},
    "sharegpt": {"from": "function_call", "value": json.dumps(CALL)},
    "ms-swift": {"role": "tool_call", "content": json.dumps(CALL)},
}


@pytest.mark.parametrize("chat_template", [tiny.CHATML, TOOLED])
@pytest.mark.parametrize("case", CALLS)
def test_a_call_is_learnt_like_an_answer(tmp_path, case, chat_template):
    talk = [ASK, CALLS[case], {"role": "tool", "content": "rain"}, SAY]
    for tools in ([TOOL], json.dumps([TOOL]), [TOOL["function"]]):
        row = read(tmp_path, {"messages": talk, "tools": tools})
        text, learnt = shown(row, chat_template)
        call = '{"name": "weather", "arguments": {"city": "Bergen"}}'
        wanted = (
            f"[CALL]{call}" if chat_template is TOOLED else f"<tool_call>\n{call}\n</tool_call>"
        )
        assert learnt == f"{wanted}<|im_end|>Say<|im_end|>"
        assert json.dumps(TOOL) in text and "rain" in text


def test_a_call_that_the_template_opens_with_an_empty_trace_once_is_learnt():
    # Qwen3: the last turn has a think block, an answered one without a trace has none
    opening = (
        "{% if loop.last and m.role == 'assistant' %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
    )
    chat_template = TOOLED.replace(
        "{% if m.reasoning_content", opening + "{% if m.reasoning_content"
    )
    row = [ASK, {"role": "assistant", "content": "", "tool_calls": [{"function": CALL}]}, *TALK[1:]]
    assert shown(row, chat_template)[1].startswith('[CALL]{"name": "weather"')


def test_the_nulls_of_arrow_are_no_arguments(tmp_path):
    tools = [TOOL, {"type": "function", "function": {"name": "other", "strict": True}}]
    row = read(tmp_path, {"messages": [ASK, SAY], "tools": tools}, suffix=".parquet")
    assert row[0]["tools"] == tools


# --- answers that are not to be learnt


@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}, {"loss": False}, {"loss": "0"}])
@pytest.mark.parametrize("names", [("role", "content"), ("from", "value")])
def test_a_marked_answer_is_context(tmp_path, mark, names):
    talk = [dict(zip(names, pair)) for pair in (("user", "p"), ("assistant", "WRONG"))]
    row = read(tmp_path, {"messages": [talk[0], talk[1] | mark, ASK, SAY | {"weight": 1}]})
    text, learnt = shown(row)
    assert "WRONG" in text and learnt == "Say<|im_end|>"
    kept = read(tmp_path, {"messages": [talk[0], talk[1] | mark, ASK, SAY]}, f"ignore={[*mark][0]}")
    assert shown(kept)[1] == "WRONG<|im_end|>Say<|im_end|>"


def test_a_conversation_ends_with_the_last_answer_to_learn():
    row = [ASK, SAY, ASK, {"role": "assistant", "content": "WRONG", "learn": False}]
    assert "WRONG" not in shown(row)[0] and shown(row, turns="last")[1] == "Say<|im_end|>"
    alone = [ASK, row[-1]]
    assert template.encode(tiny.tiny(), [alone]) == ["marked as not to be learnt"]


def test_a_share_of_an_answer_cannot_be_learnt(tmp_path):
    with pytest.raises(SystemExit, match=r"weight 0.5.*wanted.*0 or 1.*ignore=weight"):
        read(tmp_path, {"messages": [ASK, SAY | {"weight": 0.5}]})


# --- nothing is dropped in silence

CALLED = {"name": "mark d", "arguments": {"a": "mark e"}, "note": "mark f"}
FULL = {
    "role": "assistant",
    "content": "mark a",
    "reasoning_content": "mark b",
    "tool_calls": [{"id": "mark c", "type": "function", "function": CALLED}],
    "name": "mark g",
    "tool_call_id": "mark h",
    "timestamp": "mark i",
}
# where each of them is named if the text has it not
NAMES = dict(
    zip("cfghik", "tool_calls.id tool_calls.note name tool_call_id timestamp when".split())
)


@pytest.mark.parametrize("chat_template", [tiny.CHATML, TOOLED])
def test_every_field_of_a_message_reaches_the_text_or_is_named(tmp_path, chat_template):
    file = look(tmp_path, {"messages": [ASK | {"content": "mark j"}, FULL], "when": "mark k"})
    (row,) = sources.rows(file)
    text, _ = shown(row, chat_template)
    told = prepare_data.rows.told_of(tiny.tiny(chat_template), [sources.Source("a", "a", [file])])
    named = [name.split(" (")[0] for names in told["unused"].values() for name in names]
    for letter in "abcdefghijk":
        assert f"mark {letter}" in text or NAMES[letter] in named, letter


@pytest.mark.parametrize("name", ["context", "tools", "reasoning", "images", "refusal"])
def test_a_name_that_carries_meaning_is_not_left_out_unless_it_is_said(tmp_path, name):
    row, columns = {"q": "Ask", "r": "Say", name: "x"}, "prompt=q,answer=r"
    with pytest.raises(SystemExit, match=f"{name} carries meaning.*ignore={name}"):
        read(tmp_path, row, columns)
    assert read(tmp_path, row, f"{columns},ignore={name}") == [ASK, SAY]
    assert read(tmp_path, row | {name: None}, columns) == [ASK, SAY]


@pytest.mark.parametrize("columns", ["prompt=a,answer=b,foo=c", "ignore=", "nope=a", "system"])
def test_words_that_no_columns_know_are_refused(columns):
    with pytest.raises(ValueError, match="wanted"):
        schema.parse_columns(columns)


def test_the_table_and_show_say_what_is_not_used(tmp_path, tokenizer_dir, no_picture, capsys):
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"p{i}", "answer": "a", "id": i + 1, "tools": [TOOL]} for i in range(3)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    call = [
        "--source",
        str(path),
        "--tokenizer",
        str(tokenizer_dir),
        "--out",
        str(tmp_path / "out"),
    ]
    prepare_data.main([*call, "--workers", "1", "--val", "0", "--show", "1"])
    said = capsys.readouterr().out
    assert said.count("not used  columns id") == 2 and said.count("content   has tools in it") == 2
    meta = files.read_json(tmp_path / "out/meta.json", mend="")
    assert meta["unused"] == {"columns": ["id"]} and meta["spelled_out"] == ["tools"]


@pytest.fixture
def prepare(tmp_path, no_picture):
    """Return a function that runs the script on rows with a chat template, and gives its out."""

    def run(rows, chat_template, *more, out="out"):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        tiny.tiny(chat_template).save_pretrained(tmp_path / "tokenizer")
        call = ["--source", path, "--tokenizer", tmp_path / "tokenizer", "--out", tmp_path / out]
        prepare_data.main([*map(str, call), "--workers", "1", *more])
        return tmp_path / out

    return run


def test_calls_and_traces_come_back_from_an_export(tmp_path, prepare):
    call = {"role": "assistant", "content": "", "tool_calls": [{"id": "a", "function": CALL}]}
    last = SAY | {"reasoning_content": "Hm"}
    rows = [{"messages": [ASK | {"content": str(i)}, call, TALK[1], last]} for i in range(4)]
    rows = [{**row, "tools": [TOOL]} for row in rows]
    rows[0]["messages"] = [ASK, SAY | {"train": False}, ASK, SAY]
    prepare(rows, TOOLED, "--val", "0", "--export", str(tmp_path / "export"))
    given = list(sources.rows(look(tmp_path, rows[1])))
    again = sources.look(places.on_disk(tmp_path / "export/train.parquet"))
    assert list(sources.rows(again))[1] == given[0]
    assert list(sources.rows(again))[0][1] == SAY | {"learn": False}


def test_the_held_out_prompt_of_a_call_has_its_tools_and_the_call_as_it_is_written(prepare):
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": CALL}]}
    rows = [{"messages": [ASK | {"content": str(i)}, call], "tools": [TOOL]} for i in range(4)]
    out = prepare(rows, TOOLED, "--val", "2")
    held = [json.loads(line) for line in (out / "val.prompts.jsonl").read_text().splitlines()]
    assert [line["messages"][0]["tools"] for line in held] == [[TOOL]] * 2
    assert held[0]["reference"] == '[CALL]{"name": "weather", "arguments": {"city": "Bergen"}}'


def test_a_day_later_the_data_is_the_same(prepare, monkeypatch):
    import datetime

    import transformers.utils.chat_template_utils as own

    dated = "{{ 'Today: ' + strftime_now('%d %b %Y') + '\\n' }}" + tiny.CHATML
    seen = []
    for day in (3, 4):

        class Day(datetime.datetime):
            @classmethod
            def now(cls, tz=None, day=day):
                return datetime.datetime(2031, 5, day)

        monkeypatch.setattr(own, "datetime", Day)
        rows = [{"prompt": f"p{i}", "answer": "a"} for i in range(3)]
        out = prepare(rows, dated, "--val", "0", out=f"out{day}")
        seen.append(files.read_json(out / "meta.json", mend=""))
    assert seen[0]["identities"] == seen[1]["identities"]
    assert seen[0]["date"] == seen[1]["date"] == "Today: 01 Jan 2025"


def test_a_server_is_asked_with_tools_and_arguments_as_openai_has_them():
    talk = [ASK | {"tools": [TOOL]}, SAY | {"tool_calls": [{"function": CALL}], "learn": False}]
    sent = ask.spoken(talk)
    assert sent["tools"] == [TOOL] and sent["messages"][0] == ASK
    (call,) = sent["messages"][1].pop("tool_calls")
    assert sent["messages"][1] == SAY and call["type"] == "function" and call["id"]
    assert json.loads(call["function"]["arguments"]) == CALL["arguments"]
