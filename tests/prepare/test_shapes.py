"""The shapes of data sets that people know by name, each a row: what is learnt of it, or the one
line that it ends in."""

import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny_tokenizers as tiny

from lib import template
from lib.prepare import kinds, places, schema, sources

ASK = {"role": "user", "content": "Ask"}
SAY = {"role": "assistant", "content": "Say"}
BE = {"role": "system", "content": "Be"}
PAIR = [ASK, SAY]
CALL = {"name": "add", "arguments": {"a": 1}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALLED = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": CALL}],
}
BAD = SAY | {"learn": False}
TEN = [f"w{i}" for i in range(10)]
TEN_SHOWN = "Ask\n\n" + "\n".join(f"{'ABCDEFGHIJ'[i]}. w{i}" for i in range(10))
AB = "Ask\n\nA. w\nB. i"


def asked(text):
    return [ASK | {"content": text}, SAY]


def pair(prompt, answer):
    return {"prompt": "Ask", "completion": "Say", prompt: answer}


SHAPES = {
    # --- choices
    "mmlu-pro": (
        {"question": "Ask", "options": TEN, "answer": "I", "answer_index": 8, "cot_content": ""},
        [ASK | {"content": TEN_SHOWN}, SAY | {"content": "I"}],
    ),
    "thirty choices": (
        {"question": "Ask", "choices": [*"abcdefghijklmnopqrstuvwxyzabcd"], "answer": 27},
        "28",
    ),
    "mmlu": ({"question": "Ask", "subject": "x", "choices": ["w", "i"], "answer": 1}, "B"),
    "commonsense_qa": (
        {"question": "Ask", "choices": {"label": ["A"], "text": ["w"]}, "answerKey": "A"},
        [ASK | {"content": "Ask\n\nA. w"}, SAY | {"content": "A"}],
    ),
    "a choice that is null": (
        {"question": "Ask", "choices": ["w", "i", None], "answer": "Say"},
        asked(AB),
    ),
    "option1, option2": (
        {"question": "Ask", "option1": "w", "option2": "i", "answer": "Say"},
        asked(AB),
    ),
    "OptionA, OptionB": (
        {"question": "Ask", "OptionA": "w", "OptionB": "i", "answer": "Say"},
        asked(AB),
    ),
    "a, b, c": (
        {"question": "Ask", "a": "w", "b": "i", "c": "s", "answer": "Say"},
        asked(AB + "\nC. s"),
    ),
    "choices that are numbers": (
        {"question": "Ask", "A": 1, "B": 2, "answer": "Say"},
        asked("Ask\n\nA. 1\nB. 2"),
    ),
    # --- pairs
    "MATH, numina": ({"problem": "Ask", "level": "5", "solution": "Say"}, PAIR),
    "numina 1.5": ({"problem": "Ask", "solution": "Say", "answer": "7"}, PAIR),
    "aya, flan": ({"inputs": "Ask", "targets": "Say", "language": "x"}, PAIR),
    "firefly": ({"kind": "x", "input": "Ask", "target": "Say"}, PAIR),
    "input, output": ({"input": "Ask", "output": "Say"}, PAIR),
    "r1 distill zh": (
        {"input": "Ask", "reasoning_content": "Hm", "content": "Say"},
        [ASK, SAY | {"reasoning_content": "Hm"}],
    ),
    "reasoning-base": (
        {"user": "Ask", "assistant": "Say", "reasoning": "Hm", "template": "x"},
        [ASK, SAY | {"reasoning_content": "Hm"}],
    ),
    "nemotron": (
        {"input": [ASK], "output": "Say", "reasoning": "off", "system_prompt": "Be"},
        [BE, *PAIR],
    ),
    "metamath": ({"query": "Ask", "response": "Say", "original_question": "x"}, PAIR),
    "a number as the answer": (
        {"question": "Ask", "answer": 42},
        [ASK, SAY | {"content": "42"}],
    ),
    "rag": (
        {"question": "Ask", "documents": [{"title": "T", "text": "x"}, {"text": "y"}]} | {"answer": "Say"},
        asked("Ask\n\nT\nx\n\ny"),
    ),
    "alpaca with its prompt": (
        {"instruction": "Ask", "input": "", "output": "Say", "prompt": "### Ask\n###"},
        PAIR,
    ),
    "two prompts": (
        {"instruction": "Do", "question": "Ask", "answer": "Say"},
        "column question is not the prompt that instruction is.*input=question",
    ),
    # --- preferences
    "orca dpo pairs": (
        {"system": "Be", "question": "Ask", "chosen": "Say", "rejected": "No"},
        [BE, *PAIR],
    ),
    "distilabel": ({"system": "Be", "input": "Ask", "chosen": "Say", "rejected": "x"}, [BE, *PAIR]),
    "hh-rlhf": ({"chosen": "\n\nHuman: Ask\n\nAssistant: Say", "rejected": "\n\nHuman: No"}, PAIR),
    "full hh-rlhf": (
        {"prompt": "\n\nHuman: Ask\n\nAssistant:", "response": "Say", "rejected": "No"},
        PAIR,
    ),
    "llama-factory's dpo": (
        {
            "conversations": [{"from": "human", "value": "Ask"}],
            "chosen": {"from": "gpt", "value": "Say"},
            "rejected": {"from": "gpt", "value": "No"},
        },
        PAIR,
    ),
    "dolphin-r1": (
        {"messages": [BE, ASK], "reasoning": "Hm", "answer": "Say", "model": "x"},
        [BE, ASK, SAY | {"reasoning_content": "Hm"}],
    ),
    "ultrafeedback": (
        {"prompt": "Ask", "chosen": PAIR, "rejected": PAIR, "messages": PAIR, "score_chosen": 1.5},
        PAIR,
    ),
    "one message as the completion": ({"prompt": [ASK], "completion": SAY}, PAIR),
    "openai's preferences": (
        {
            "input": {"messages": [ASK], "tools": [TOOL], "parallel_tool_calls": True},
            "preferred_output": [SAY],
            "non_preferred_output": [SAY],
        },
        [ASK | {"tools": [TOOL]}, SAY],
    ),
    # --- answers that are not to be learnt
    "kto": (pair("label", False), [ASK | {"learn": False}, BAD]),
    "kto, desired": (pair("label", True), PAIR),
    "a label that is a class": (pair("label", 0), PAIR),
    "kto_tag": (
        {"conversations": PAIR, "kto_tag": False},
        [ASK | {"learn": False}, BAD],
    ),
    "a row's weight": (pair("weight", 0.0), [ASK | {"learn": False}, BAD]),
    "a row's weight of 1": (pair("weight", 1), PAIR),
    "a row's weight of 2.5": (pair("weight", 2.5), PAIR),
    "a row's train": ({"messages": PAIR, "train": False}, [ASK | {"learn": False}, BAD]),
    "a row's train is a split": ({"messages": PAIR, "train": "yes"}, PAIR),
    "a mask of turns": (pair("loss_mask", [0, 1]), "loss_mask carries meaning"),
    "a text's weight": ({"text": "x y", "weight": 0}, [BAD | {"content": "x y"}]),
    "axolotl's detail": (
        {"messages": [ASK, SAY | {"train_detail": [{"begin_offset": 0, "train": False}]}]},
        "train_detail carries meaning",
    ),
    "a part that is not learnt": (
        {"messages": [SAY | {"content": [{"type": "text", "text": "Say", "train": False}]}]},
        "one train an answer.*ignore=train",
    ),
    "xtuner's": (
        {"conversation": [{"input": "Ask", "output": "Say", "output_with_loss": False}]},
        [ASK, BAD],
    ),
    "openhermes": (
        {
            "conversations": [
                {"from": "human", "value": "Ask", "weight": 0},
                {"from": "gpt", "value": "Say", "weight": 1},
            ]
        },
        PAIR,
    ),
    "torchtune": ({"messages": [ASK | {"masked": True}, SAY | {"masked": False}]}, PAIR),
    # --- tools
    "xlam": (
        {"query": "Ask", "answers": json.dumps([CALL]), "tools": json.dumps([TOOL["function"]])},
        [ASK | {"tools": [TOOL]}, CALLED],
    ),
    "hermes": (
        {
            "conversations": [
                BE | {"content": f"Be\n<tools>{json.dumps(TOOL)}</tools>"},
                *PAIR,
            ],
            "tools": json.dumps([TOOL]),
        },
        [BE | {"content": f"Be\n<tools>{json.dumps(TOOL)}</tools>"}, *PAIR],
    ),
    "a result that is an object": (
        {"messages": [{"role": "ipython", "content": {"sum": 3}}]},
        [{"role": "tool", "content": '{"sum": 3}'}],
    ),
    "llama-factory": (
        {"conversations": [{"from": "human", "value": "Ask"}, SAY], "system": "Be", "tools": "[]"},
        [BE, *PAIR],
    ),
    # --- conversations
    "slim orca": (
        {"conversations": [{"from": "system", "value": "Be", "weight": None}, *PAIR]},
        [BE, *PAIR],
    ),
    "lima": ({"conversations": ["Ask", "Say"], "source": "x"}, PAIR),
    "messages that are json": ({"messages": [json.dumps(ASK), json.dumps(SAY)]}, PAIR),
    "capital keys": ({"messages": [{"Role": "User", "Content": "Ask"}, {"From": "GPT", "Value": "Say"}]}, PAIR),
    "capybara": ({"conversation": [{"input": "Ask", "output": "Say"}], "source": "x"}, PAIR),
    "alpaca with history": (
        {"instruction": "Ask", "input": "", "output": "Say", "system": "Be", "history": [["p", "q"]]},
        [BE, ASK | {"content": "p"}, SAY | {"content": "q"}, *PAIR],
    ),
    "pictures that are not there": ({"messages": PAIR, "images": []}, PAIR),
    "pictures": ({"messages": PAIR, "images": ["a.png"]}, "images carries meaning"),
    # --- plain text
    "oasst": (
        {"message_id": "1", "parent_id": "0", "text": "Say", "role": "assistant"},
        "(role|parent_id) carries meaning",
    ),
    "text": ({"text": "x y", "meta": {"a": 1}, "label": False}, "x y"),
}  # fmt: skip


def test_marks_of_rows_hold_beside_columns_that_a_user_named(tmp_path):
    path, rows = tmp_path / "rows.jsonl", []
    for more in ({}, {"weight": 0}, {"train": "false"}, {"weight": 1}):
        rows.append({"q": "Ask", "r": "Say", **more})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    columns = schema.parse_columns("prompt=q,answer=r")[1]
    found = list(sources.rows(sources.look(places.on_disk(path), columns)))
    reasons = [template.fault(row) for row in found]
    assert reasons == [None, "marked as not to be learnt", "marked as not to be learnt", None]
    assert template.encode(tiny.tiny(), found[1:2]) == ["marked as not to be learnt"]
    columns = schema.parse_columns("prompt=q,answer=r,ignore=weight")[1]
    found = list(sources.rows(sources.look(places.on_disk(path), columns)))
    assert [template.fault(row) for row in found] == [None, None, reasons[2], None]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("case", SHAPES)
def test_a_row_of_a_shape_that_is_known_by_name(tmp_path, case, suffix):
    row, wanted = SHAPES[case]
    path = tmp_path / f"rows{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist([row] * 2), path)
    else:
        path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    if isinstance(wanted, str) and " " in wanted and case != "text":
        with pytest.raises(SystemExit, match=wanted):
            list(sources.rows(sources.look(places.on_disk(path))))
        return
    found = next(sources.rows(sources.look(places.on_disk(path))))
    if isinstance(wanted, str) and isinstance(found, list):
        found = found[-1]["content"]
    assert found == wanted


def test_another_prompt_that_says_the_same_is_named(tmp_path):
    for prompt in ("Ask", [ASK]):
        path = tmp_path / "rows.jsonl"
        row = {"instruction": prompt, "output": "Say", "query": "Ask", "problem": 7}
        path.write_text(json.dumps(row) + "\n", encoding="utf-8")
        file = sources.look(places.on_disk(path))
        assert list(sources.rows(file)) == [PAIR]
        assert {name for _, name in file.unused} == {"query", "problem"}


def turns(*texts):
    """A conversation as ShareGPT has it."""
    return [{"from": who, "value": text} for who, text in zip(("human", "gpt") * 9, texts)]


def node(name, parent, text, rank=None, **more):
    """A message of OASST, the columns that count and a few of the others."""
    role = "prompter" if rank is None else "assistant"
    labels = {"name": ["spam"], "value": [0.1], "count": [3]}
    row = {"message_id": name, "parent_id": parent, "text": text, "role": role, "rank": rank}
    return row | {"message_tree_id": "a", "deleted": False, "lang": "en", "labels": labels} | more


THOUGHT = [ASK, SAY | {"reasoning_content": "Hm"}]
TAGGED = [ASK, SAY | {"content": "<think>Hm</think>Say"}]
GLAIVE = (
    'USER: Ask\n\n\nASSISTANT: <functioncall> {"name": "add", "arguments": \'{"a": 1}\'} '
    '<|endoftext|>\n\n\nFUNCTION RESPONSE: {"sum": 2}\n\n\nASSISTANT: Say <|endoftext|>\n\n\n'
)
S1K = {"solution": "x", "question": "Ask", "cot_type": "math", "source_type": "x", "metadata": "{}"}
# name in the table of docs/data.md -> (rows by the published schema, what is read of them)
HUB = {
    "Dolly": (
        [{"instruction": "Ask", "context": "C", "response": "Say", "category": "closed_qa"}],
        asked("Ask\n\nC"),
    ),
    "OpenOrca": (
        [{"id": "niv.1", "system_prompt": "Be", "question": "Ask", "response": "Say"}],
        [BE, *PAIR],
    ),
    "OpenHermes 2.5": (
        [{
            "conversations": [turn | {"weight": None} for turn in turns("Ask", "Say")],
            **dict.fromkeys(["system_prompt", "custom_instruction", "topic", "title", "model"]),
            "source": "x", "category": "x", "skip_prompt_formatting": False, "views": None,
        }],
        PAIR,
    ),
    "ShareGPT": (
        [{
            "id": "x",
            "conversations": [t | {"markdown": None, "text": None} for t in turns("Ask", "Say")],
        }],
        PAIR,
    ),
    "UltraChat": ([{"id": "0", "data": ["Ask", "Say"]}], PAIR),
    "UltraChat 200k": ([{"prompt": "Ask", "prompt_id": "x", "messages": PAIR}], PAIR),
    "SlimOrca": (
        [{"conversations": [
            {"from": "system", "value": "Be", "weight": None},
            {"from": "human", "value": "Ask", "weight": 0.0},
            {"from": "gpt", "value": "Say", "weight": 1.0},
        ]}],
        [BE, *PAIR],
    ),
    "WizardLM 70k": ([{"instruction": "Ask", "output": "Say"}], PAIR),
    "WizardLM V2 196k": ([{"idx": "x", "conversations": turns("Ask", "Say")}], PAIR),
    "MetaMath": (
        [{"type": "x", "query": "Ask", "original_question": "x", "response": "Say"}],
        PAIR,
    ),
    "GSM8K": ([{"question": "Ask", "answer": "Say"}], PAIR),
    "Magicoder OSS-Instruct": (
        [{"lang": "x", "raw_index": 1, "index": 2, "seed": "x", "openai_fingerprint": "x"}
         | {"problem": "Ask", "solution": "Say"}],
        PAIR,
    ),
    "Magicoder Evol-Instruct": ([{"instruction": "Ask", "response": "Say"}], PAIR),
    "Glaive function calling v2": (
        [{"system": "SYSTEM: Be", "chat": GLAIVE}],
        [
            BE, ASK, SAY | {"content": "", "tool_calls": [
                {"type": "function", "function": CALL | {"arguments": '{"a": 1}'}}
            ]},
            {"role": "tool", "content": '{"sum": 2}'}, SAY,
        ],
    ),
    "LIMA": ([{"conversations": ["Ask", "Say"], "source": "stackexchange"}], PAIR),
    "OASST2": (
        [
            node("a", None, "Ask"), node("b", "a", "No", 1), node("c", "a", "Say", 0),
            node("d", "c", "And?"), node("e", "d", "So", 0), node("f", "d", "!", 0, deleted=True),
            node("g", "b", "Why?"),
        ],
        [*PAIR, ASK | {"content": "And?"}, SAY | {"content": "So"}],
    ),
    "Tulu 3": ([{"id": "x", "messages": PAIR, "source": "x"}], PAIR),
    "Infinity-Instruct": (
        [{
            "id": "1", "conversations": turns("Ask", "Say"), "langdetect": "en", "source": "x",
            "label": {"ability_en": ["a", "b"], "ability_zh": ["c"], "cate_ability_zh": []},
        }],
        PAIR,
    ),
    "Firefly": ([{"kind": "NLI", "input": "Ask", "target": "Say"}], PAIR),
    "BELLE": ([{"instruction": "Ask", "input": "", "output": "Say"}], PAIR),
    "BELLE 3.5M": (
        [{"id": "x", "conversations": [turns("Ask")[0], {"from": "assistant", "value": "Say"}]}],
        PAIR,
    ),
    "BELLE multiturn": (
        [{"instruction": "Human:p\nAssistant:q\nHuman:Ask\nAssistant:\n", "input": "", "output": "Say"}],
        [ASK | {"content": "p"}, SAY | {"content": "q"}, *PAIR],
    ),
    "COIG": (
        [{"instruction": "Be", "conversations": [{"question": "Ask", "answer": "Say"}]}],
        [BE, *PAIR],
    ),
    "COIG-CQIA": (
        [{
            "instruction": "Ask", "input": "", "output": "Say", "human_verified": False,
            "task_type": {"major": ["x"], "minor": ["y", "z"]}, "domain": ["x"], "metadata": "x",
        }],
        PAIR,
    ),
    "DistilQwen_100k": ([{"instruction": "Ask", "output": "Say"}], PAIR),
    "Chinese-DeepSeek-R1-Distill-110k": (
        [{"input": "Ask", "content": "Say", "reasoning_content": "Hm", "repo_name": "x", "score": 10}],
        THOUGHT,
    ),
    "AM-DeepSeek-R1-Distilled": (
        [{"messages": [
            turn | {"info": {"source": "x", "reference_answer": None, "think_content": "Hm"}}
            for turn in TAGGED
        ]}],
        TAGGED,
    ),
    "OpenR1-Math": (
        [{
            "problem": "Ask", "solution": "x", "answer": "7", "generations": ["x", "y"],
            "correctness_math_verify": [True, False], "messages": TAGGED,
        }],
        TAGGED,
    ),
    "R1-Distill-SFT": (
        [{"id": "1", "problem": "Ask", "solution": "x", "verified": None}
         | {"reannotated_assistant_content": "<think>Hm</think>Say"}],
        TAGGED,
    ),
    "s1K": (
        [S1K | {"cot": None, "thinking_trajectories": ["Hm"], "attempt": "Say"}],
        THOUGHT,
    ),
    "s1K-1.1": (
        [S1K | {
            "gemini_thinking_trajectory": "x", "gemini_attempt": "x", "deepseek_grade": "Yes",
            "deepseek_thinking_trajectory": "Hm", "deepseek_attempt": "Say",
        }],
        THOUGHT,
    ),
    "OpenThoughts": (
        [{"system": "Be", "conversations": [ASK | {"from": "user"}, *turns("x", "Say")[1:]]}],
        [BE, *PAIR],
    ),
    "OpenThoughts metadata": (
        [{
            "problem": "Ask", "deepseek_reasoning": "Hm", "deepseek_solution": "Say",
            "ground_truth_solution": "x", "domain": "math", "test_cases": None,
        }],
        THOUGHT,
    ),
    "OpenThoughts 3": (
        [{"difficulty": 8, "domain": "code", "conversations": turns("Ask", "<think>Hm</think>Say")}],
        TAGGED,
    ),
    "UltraFeedback binarized": (
        [{
            "prompt": "Ask", "prompt_id": "x", "chosen": PAIR, "rejected": [ASK, SAY | {"content": "No"}],
            "messages": PAIR, "score_chosen": 8.5, "score_rejected": 7.0,
        }],
        PAIR,
    ),
    "HelpSteer": (
        [{"prompt": "Ask", "response": "Say", "helpfulness": 4, "verbosity": 2}],
        PAIR,
    ),
    "HelpSteer 3": (
        [{"domain": "x", "context": [ASK], "response1": "Say", "response2": "No"}
         | {"overall_preference": -2, "individual_preference": [{"score": -2, "reasoning": "x"}]}],
        PAIR,
    ),
    "CNN/DailyMail": ([{"article": "Ask", "highlights": "Say", "id": "x"}], PAIR),
    "XSum": ([{"document": "Ask", "summary": "Say", "id": "x"}], PAIR),
    "WikiText": ([{"text": " = Title = \n"}], " = Title = \n"),
    "SST-2": ([{"idx": 0, "sentence": "x y", "label": 1}], ("x y", "1")),
    "DBpedia": ([{"label": 1, "title": "T", "content": " x y"}], (" x y", "1")),
    "AG News": ([{"text": "x y", "label": 2}], ("x y", "2")),
}  # fmt: skip


def flags_in_docs():
    """Return the flag beside each name in the table of docs/data.md, "" where none is needed."""
    text = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    table = text.partition("## Data sets by name")[2].partition("\n## ")[0]
    return dict(re.findall(r"^\| ([^|]+?) \|[^|]*\| (?:`([^`|]+)`)? *\|$", table, re.MULTILINE))


def test_the_docs_name_the_data_sets_that_are_tried_here():
    assert {*flags_in_docs()} - {"data set", "---"} == {*HUB}


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("name", HUB)
def test_a_data_set_of_the_hub_is_read_with_the_flag_that_the_docs_name(tmp_path, name, suffix):
    rows, wanted = HUB[name]
    path, flag = tmp_path / f"rows{suffix}", flags_in_docs()[name]
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    columns = flag.partition("--columns ")[2]
    columns = schema.parse_columns(columns)[1] if columns else None
    labelled = flag == "--task classify"
    assert bool(flag) == bool(columns or labelled)
    file = sources.look(kinds.recognised(places.on_disk(path)), columns, True, labelled)
    assert list(sources.rows(file)) == [wanted]
