"""Which tokens of a conversation are targets, for the templates people use."""

import numpy as np
import pytest
import tiny_tokenizers as tiny
from tiny_tokenizers import chat

from lib import template


def encoded(tokenizer, row, **how):
    (result,) = template.encode(tokenizer, [row], **how)
    return result


def learned(tokenizer, row, **how):
    """Return each run of targets as text."""
    ids, answer = encoded(tokenizer, row, **how)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], answer, [0]])))
    return [tokenizer.decode(ids[begin:end]) for begin, end in edges.reshape(-1, 2)]


EVERY_TEMPLATE = {
    "chatml": tiny.tiny(),
    "llama3": tiny.tiny(tiny.LLAMA3, eos="<|eot|>", adds_bos=True),
    "think": tiny.tiny(tiny.THINK),
    "strict": tiny.tiny(tiny.STRICT, eos="</s>"),
    "space": tiny.tiny(tiny.SPACE, eos="</s>"),
    "pad is eos": tiny.tiny(pad="<|im_end|>"),
}


@pytest.mark.parametrize("tokenizer", EVERY_TEMPLATE.values(), ids=EVERY_TEMPLATE.keys())
def test_trap10_targets_begin_right_after_what_chat_would_send(tokenizer):
    ids, answer = encoded(tokenizer, chat("Hi", "Hello!"))
    first = int(np.flatnonzero(answer)[0])
    assert ids[:first].tolist() == template.prompt_ids(tokenizer, chat("Hi"))
    assert tokenizer.decode(ids[first : first + 1]) == "H"


def test_trap10_the_end_of_turn_is_a_target_and_the_line_break_after_it_is_not():
    assert learned(tiny.tiny(), chat("Hi", "Hello!")) == ["Hello!<|im_end|>"]
    ids, answer = encoded(tiny.tiny(), chat("Hi", "Hello!"))
    assert not answer[-1] and tiny.tiny().decode(ids[-1:]) == "\n"


def test_trap10_where_nothing_follows_the_end_of_turn_it_is_the_last_target():
    tokenizer = tiny.tiny(tiny.LLAMA3, eos="<|eot|>")
    ids, answer = encoded(tokenizer, chat("Hi", "  Hello!\n"))
    assert answer[-1] and learned(tokenizer, chat("Hi", "  Hello!\n")) == ["Hello!<|eot|>"]


def test_trap11_with_pad_equal_to_eos_every_end_of_turn_is_still_a_target():
    tokenizer = tiny.tiny(pad="<|im_end|>")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    assert learned(tokenizer, chat("a", "b", "c", "d")) == ["b<|im_end|>", "d<|im_end|>"]


def test_trap12_a_template_without_generation_marks_has_targets_in_every_turn():
    assert "generation %" not in tiny.CHATML
    row = chat("one", "two", "three", "four", "five", "six", system="Be brief")
    assert learned(tiny.tiny(), row) == ["two<|im_end|>", "four<|im_end|>", "six<|im_end|>"]


def test_trap12_an_earlier_turn_that_the_template_rewrites_is_context_only():
    assert learned(tiny.tiny(tiny.THINK), chat("one", "two", "three", "four")) == ["four<|im_end|>"]


def test_trap12_a_row_whose_prefixes_never_hold_has_no_target_and_says_so():
    assert (
        encoded(tiny.tiny(tiny.REWRITES), chat("Hi", "Hello!")) == "rewritten by the chat template"
    )


@pytest.mark.parametrize("name", ["llama3", "strict"])
def test_trap13_a_template_with_bos_and_a_tokenizer_that_adds_bos_give_one(name):
    tokenizer = EVERY_TEMPLATE[name]
    ids, _ = encoded(tokenizer, chat("Hi", "Hello!"))
    assert ids.tolist().count(tokenizer.bos_token_id) == 1
    assert template.prompt_ids(tokenizer, chat("Hi")).count(tokenizer.bos_token_id) == 1


def test_trap13_a_text_that_begins_with_bos_already_gets_no_second_one():
    tokenizer = tiny.tiny(adds_bos=True, eos="</s>")
    for text in ("abc", "<s>abc", "abc</s>"):
        ids, answer = encoded(tokenizer, text)
        assert tokenizer.decode(ids) == "<s>abc</s>"
        assert answer.tolist() == [False, True, True, True, True]


def test_a_tokenizer_that_adds_no_bos_gives_text_none():
    ids, answer = encoded(tiny.tiny(adds_bos=False, eos="</s>"), "abc")
    assert len(ids) == 4 and answer.tolist() == [False, True, True, True]


def test_trap14_a_think_block_that_the_generation_prompt_supplies_is_no_target():
    assert learned(tiny.tiny(tiny.THINK), chat("Hi", "Hello!")) == ["Hello!<|im_end|>"]


def test_a_think_block_that_the_model_must_write_is_a_target():
    bare = tiny.THINK.replace(
        "{{ '<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n' }}",
        "{{ '<|im_start|>assistant\\n' }}",
    )
    assert learned(tiny.tiny(bare), chat("Hi", "Hello!")) == [
        "<think>\n\n</think>\n\nHello!<|im_end|>"
    ]


@pytest.mark.parametrize("tokenizer", EVERY_TEMPLATE.values(), ids=EVERY_TEMPLATE.keys())
def test_emoji_and_chinese_cut_into_bytes_are_targets_whole(tokenizer):
    (answer,) = learned(tokenizer, chat("🙂 你好吗", "😀你好 👩‍🚀 ok🙂"))
    assert answer.startswith("😀你好 👩‍🚀 ok🙂<") and answer.count("<") == 1


def test_a_lone_space_of_the_prompt_is_no_target_though_its_trimmed_offsets_lie_on_the_border():
    assert learned(tiny.tiny(tiny.SPACE, eos="</s>", trim_offsets=True), chat("Hi", "Hello!")) == [
        "Hello!</s>"
    ]


def test_trap10_a_token_that_begins_in_the_prompt_is_no_target_though_it_ends_in_the_answer():
    tokenizer = tiny.tiny(merges=[("Ċ", "Ċ")])  # two line breaks are one token
    ids, answer = encoded(tokenizer, chat("Hi", "\n\nHello!"))
    assert [tokenizer.decode(ids[answer][:1]), tokenizer.decode(ids[~answer][-2:-1])] == [
        "\n",
        "\n\n",
    ]


def test_an_answer_that_quotes_the_end_of_turn_is_learnt_to_its_real_end():
    assert learned(tiny.tiny(), chat("Hi", "it is <|im_end|> there")) == [
        "it is <|im_end|> there<|im_end|>"
    ]


def test_an_answer_without_any_end_token_is_learnt_to_the_end_of_its_span():
    plain = (
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}{% if"
        " add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    for answer in ("Hello!", "it is <|im_end|> there"):
        assert learned(tiny.tiny(plain), chat("Hi", answer)) == [answer + "\n"]


@pytest.mark.parametrize("more", [["never answered"], ["answered by", " "]])
def test_what_follows_the_last_answer_is_left_out(more):
    ids, _ = encoded(tiny.tiny(), chat("a", "b", *more))
    assert tiny.tiny().decode(ids).endswith("b<|im_end|>\n")


def test_the_first_token_of_a_row_is_never_a_target():
    bare = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content + eos_token }}{% endif"
        " %}{% endfor %}"
    )
    assert learned(tiny.tiny(bare, eos="</s>"), chat("Hi", "Hello!")) == ["ello!</s>"]


def test_an_answer_with_nothing_before_it_is_context_only():
    assert learned(tiny.tiny(), [{"role": "assistant", "content": "Welcome"}, *chat("a", "b")]) == [
        "b<|im_end|>"
    ]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ([], "empty"),
        (chat("Hi"), "empty"),
        (chat("Hi", "  "), "empty"),
        (chat(" ", "answer"), "empty"),
        ("  \n", "empty"),
        ([{"role": "judge", "content": "x"}, *chat("a", "b")], "unknown role judge"),
        ([{"role": "user", "content": None}, {"role": "assistant", "content": "x"}], "not text"),
        (chat("a", "half \ud83d"), "broken Unicode"),
        ("half \ud83d", "broken Unicode"),
    ],
)
def test_a_useless_row_is_returned_as_its_reason(row, reason):
    assert encoded(tiny.tiny(), row) == reason


def test_a_template_that_refuses_a_role_is_a_reason_and_for_chat_one_line(capsys):
    tokenizer = tiny.tiny(tiny.STRICT)
    assert (
        encoded(tokenizer, chat("a", "b", system="s"))
        == "refused by the chat template (System role not supported)"
    )
    with pytest.raises(SystemExit, match="System role not supported"):
        template.prompt_ids(tokenizer, chat("a", system="s"))


def test_rows_of_one_batch_do_not_disturb_each_other():
    tokenizer, rows = (
        tiny.tiny(),
        [chat("a", "b"), "plain text", chat("x"), chat("longer question", "longer answer")],
    )
    together = template.encode(tokenizer, rows)
    for row, result in zip(rows, together):
        alone = encoded(tokenizer, row)
        assert (
            result == alone
            if isinstance(alone, str)
            else all(np.array_equal(a, b) for a, b in zip(result, alone))
        )


# --- the templates of published models (tests/templates): for every turn that is learnt, what the
# targets decode to

MODELS = {name: tiny.model(name) for name in tiny.MODELS}
END = {
    "llama3": "<|eot_id|>",
    "gemma3": "<end_of_turn>",
    "mistral": "</s>",
    "phi3": "<|end|>",
}  # the others: <|im_end|>
TALKS = {
    "single turn": chat("Hi", "Hello!"),
    "multi-turn": chat("one", "two", "three", "four", "five", "six"),
    "system": chat("Hi", "Hello!", system="Be brief"),
    "empty system": chat("Hi", "Hello!", system=""),
    "system and multi-turn": chat("one", "two", "three", "four", system="Be brief"),
    "emoji": chat("🙂?", "👩\u200d\U0001f680 ok 😀"),
    "Chinese": chat("你好", "你好，世界。", "再见", "再见！"),
    "blanks around": chat("Hi", "\n  Hello! \n"),
    "quotes its own end": chat(
        "Hi", "it is <|im_end|> or <|eot_id|> or <end_of_turn> or </s> or <|end|>, so"
    ),
}


def expected(name, talk):
    """Return what the targets of each learnt turn decode to, from what is known of the model and
    not from its template."""
    answers = [message["content"] for message in talk if message["role"] == "assistant"]
    if name == "qwen3" or name == "mistral" and talk[0]["role"] == "system":
        answers = answers[
            -1:
        ]  # earlier turns are shown otherwise than the model once wrote them: context only
    if name in ("llama3", "gemma3", "mistral"):
        answers = [answer.strip() for answer in answers]  # the template trims
    if name == "qwen3":
        answers = [
            "<think>\n\n</think>\n\n" + answer.lstrip("\n") for answer in answers
        ]  # the model writes the empty block itself
    if name == "mistral":
        answers = [
            " " + answer for answer in answers
        ]  # the prompt ends in [/INST], and the model writes the space
    if name == "phi3":
        answers = [
            answer.lstrip() for answer in answers
        ]  # the token <|assistant|> takes the blanks after it along
    return [answer + END.get(name, "<|im_end|>") for answer in answers]


@pytest.mark.parametrize("talk", TALKS)
@pytest.mark.parametrize("name", MODELS)
def test_of_every_model_exactly_the_answers_and_their_end_of_turn_are_targets(name, talk):
    assert learned(MODELS[name], TALKS[talk]) == expected(name, TALKS[talk])


@pytest.mark.parametrize("talk", TALKS)
@pytest.mark.parametrize("name", MODELS)
def test_of_every_model_what_comes_before_a_turns_targets_is_what_chat_would_send(name, talk):
    ids, answer = encoded(MODELS[name], TALKS[talk])
    starts = np.flatnonzero(np.diff(answer.astype(int)) == 1) + 1
    turns = [place for place, message in enumerate(TALKS[talk]) if message["role"] == "assistant"][
        -len(starts) :
    ]
    for start, turn in zip(starts, turns, strict=True):
        assert ids[:start].tolist() == template.prompt_ids(MODELS[name], TALKS[talk][:turn])


@pytest.mark.parametrize("name", MODELS)
def test_of_every_model_the_last_turn_alone_is_learnt_with_the_same_tokens_before_it(name):
    ids, answer = encoded(MODELS[name], TALKS["multi-turn"])
    again, last = encoded(MODELS[name], TALKS["multi-turn"], turns="last")
    assert (
        np.array_equal(ids, again)
        and learned(MODELS[name], TALKS["multi-turn"], turns="last")
        == expected(name, TALKS["multi-turn"])[-1:]
    )
    assert not (last & ~answer).any()


@pytest.mark.parametrize("name", MODELS)
def test_of_every_model_a_row_shows_each_message_once_and_one_bos(name):
    shown = MODELS[name].decode(encoded(MODELS[name], TALKS["system and multi-turn"])[0])
    assert [shown.count(word) for word in ("Be brief", "one", "two", "three", "four")] == [1] * 5
    assert shown.count(MODELS[name].bos_token or "<s>") == (name in ("llama3", "gemma3", "mistral"))


def test_mistral_sees_the_system_message_where_chat_would_put_it_though_its_template_drops_it_from_an_answered_conversation():
    assert "Be brief" not in template.render(MODELS["mistral"], TALKS["system"])
    assert (
        MODELS["mistral"].decode(encoded(MODELS["mistral"], TALKS["system"])[0])
        == "<s>[INST] Be brief\n\nHi[/INST] Hello!</s>"
    )


def test_what_phi3_writes_after_every_conversation_ends_no_turn():
    assert template.coda(MODELS["phi3"]) == "<|endoftext|>"
    assert {template.coda(MODELS[name]) for name in MODELS if name != "phi3"} == {""}
    assert "<|endoftext|>" not in MODELS["phi3"].decode(
        encoded(MODELS["phi3"], TALKS["multi-turn"])[0]
    )


def test_the_coda_of_a_template_whose_turns_have_no_other_end_is_their_end():
    bare = (
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}{{ 'assistant: '"
        " if add_generation_prompt else eos_token }}"
    )
    assert template.coda(tiny.tiny(bare, eos="</s>")) == "" and learned(
        tiny.tiny(bare, eos="</s>"), chat("Hi", "Hello!")
    ) == ["Hello!\n</s>"]


@pytest.mark.parametrize("name", ["gemma3", "mistral"])
def test_turns_that_do_not_alternate_are_refused_where_the_template_says_so(name):
    assert (
        encoded(MODELS[name], [*chat("a"), *chat("b", "c")])
        == "refused by the chat template (Roles must alternate: user, assistant)"
    )


def test_only_the_template_that_rewrites_earlier_answers_is_said_to():
    assert [name for name in MODELS if template.rewrites(MODELS[name])] == ["qwen3"]


# --- reasoning traces

TRACE = "<think>\n2 + 2,\n\nso 4\n</think>\n\n"


@pytest.mark.parametrize(
    ("text", "spans"),
    [
        ("Yes", []),
        ("<think>hm</think>Yes", [(0, 17)]),
        ("<think>hm</think> \n Yes", [(0, 20)]),
        ("hm</think>\n\nYes", [(0, 12)]),
        ("a<think>b</think> c<think>d</think>", [(1, 18), (19, 35)]),
        ("<think>a <think> b</think>Yes", [(0, 26)]),
        ("</think>Yes", [(0, 8)]),
        ("<think>hm", None),
        ("<think>a</think>b<think>c", None),
        ("<think", []),
        ("a</think>b<think>c</think>d", [(0, 9), (10, 26)]),
    ],
)
def test_traces_lie_where_they_are_written(text, spans):
    assert template.traces(text) == spans


def test_many_traces_are_found_in_one_pass():
    text = "<think>a</think>\n\nb" * 20_000
    found = template.traces(text)
    assert [text[slice(*span)] for span in found] == ["<think>a</think>\n\n"] * 20_000
    row = [*tiny.chat("Hi"), {"role": "assistant", "content": text}]
    assert template.without_think(row)[-1]["content"] == "b" * 20_000


@pytest.mark.parametrize("name", sorted({*MODELS} - {"qwen3"}))
def test_think_keep_drop_and_mask_on_every_model(name):
    row, end, lead = (
        chat("one", TRACE + "two", "three", TRACE + "four"),
        END.get(name, "<|im_end|>"),
        " " * (name == "mistral"),
    )
    assert learned(MODELS[name], row) == [lead + TRACE + "two" + end, lead + TRACE + "four" + end]
    assert learned(MODELS[name], row, think="drop") == [lead + "two" + end, lead + "four" + end]
    assert learned(MODELS[name], row, think="mask")[-2:] == ["two" + end, "four" + end]
    kept, masked = encoded(MODELS[name], row), encoded(MODELS[name], row, think="mask")
    assert np.array_equal(kept[0], masked[0])  # what is masked stays in the text
    bare = encoded(MODELS[name], chat("one", "two", "three", "four"))
    assert all(np.array_equal(a, b) for a, b in zip(bare, encoded(MODELS[name], row, think="drop")))


def test_of_qwen3_the_last_trace_is_learnt_the_earlier_one_is_not_shown_and_an_empty_block_takes_the_place_of_a_dropped_one():
    row = chat("one", TRACE + "two", "three", TRACE + "four")
    assert learned(MODELS["qwen3"], row) == [TRACE + "four<|im_end|>"]
    assert learned(MODELS["qwen3"], row, think="drop") == ["<think>\n\n</think>\n\nfour<|im_end|>"]
    assert learned(MODELS["qwen3"], row, think="mask") == ["four<|im_end|>"]
    for think in ("keep", "drop", "mask"):
        assert MODELS["qwen3"].decode(encoded(MODELS["qwen3"], row, think=think)[0]).count(
            "2 + 2"
        ) == (think != "drop")
    assert learned(MODELS["qwen3"], chat("Hi", "Hello!"), think="mask") == [
        "Hello!<|im_end|>"
    ]  # the empty block is a trace like any other


def opened(closing="'<think>\\n\\n</think>\\n\\n' + m.content"):
    """ChatML whose generation prompt opens the trace, as that of Qwen3-Thinking does."""
    return tiny.tiny(
        tiny.CHATML.replace(
            "'<|im_start|>assistant\\n'", "'<|im_start|>assistant\\n<think>\\n'"
        ).replace(
            "m.role + '\\n' + m.content",
            "m.role + '\\n' + (m.content if '</think>' in m.content or m.role == 'user' else "
            + closing
            + ")",
        )
    )


def test_a_trace_that_the_generation_prompt_opened_begins_with_the_answer():
    assert learned(opened(), chat("Hi", TRACE + "4")) == [
        TRACE.removeprefix("<think>\n") + "4<|im_end|>"
    ]
    assert learned(opened(), chat("Hi", TRACE + "4"), think="mask") == ["4<|im_end|>"]
    assert learned(opened(), chat("Hi", TRACE + "4"), think="drop") == ["\n</think>\n\n4<|im_end|>"]


@pytest.mark.parametrize("think", ["drop", "mask"])
def test_an_answer_that_only_closes_its_trace_was_opened_by_its_writers_prompt(think):
    assert learned(tiny.tiny(), chat("Hi", TRACE.removeprefix("<think>\n") + "4"), think=think) == [
        "4<|im_end|>"
    ]


def test_a_template_that_opens_the_trace_and_cuts_it_from_every_answer_leaves_nothing_to_learn_and_says_so():
    cuts = tiny.CHATML.replace("m.content", "m.content.split('</think>')[-1]").replace(
        "assistant\\n'", "assistant\\n<think>\\n'"
    )
    assert (
        encoded(tiny.tiny(cuts), chat("Hi", TRACE + "4")) == "rewritten by the chat template"
    )  # DeepSeek-R1's


@pytest.mark.parametrize("think", ["drop", "mask"])
@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (chat("Hi", "<think>too long to"), "unclosed think"),
        (chat("a", "<think>b", "c", "d"), "unclosed think"),
        (chat("Hi", TRACE), "empty"),
        (chat("Hi <think>", "d"), None),
        ("plain <think>", None),
    ],
)
def test_a_trace_without_end_or_without_answer_is_a_reason(row, reason, think):
    result = encoded(tiny.tiny(), row, think=think)
    assert result == reason if reason else not isinstance(result, str)
    assert not isinstance(encoded(tiny.tiny(), row), str)  # kept as it is by default


def test_a_template_that_cuts_the_end_of_a_trace_leaves_an_unclosed_one():
    cuts = tiny.tiny(tiny.CHATML.replace("m.content", "m.content.replace('</think>', '')"))
    assert encoded(cuts, chat("Hi", TRACE + "4"), think="mask") == "unclosed think"


def test_a_token_that_begins_in_the_blanks_after_a_masked_trace_and_ends_in_the_answer_is_a_target():
    tokenizer = tiny.tiny(merges=[("Ġ", "4")])  # a space and a 4 are one token
    assert learned(tokenizer, chat("Hi", "<think>hm</think> 4!"), think="mask") == [" 4!<|im_end|>"]
