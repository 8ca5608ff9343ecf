"""Which tokens of a conversation are targets, for the templates people use."""
import numpy as np
import pytest
import tiny_tokenizers as tiny
from tiny_tokenizers import chat

from lib import template


def encoded(tokenizer, row):
    (result,) = template.encode(tokenizer, [row])
    return result


def learned(tokenizer, row):
    """Return each run of targets as text."""
    ids, answer = encoded(tokenizer, row)
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
    assert tokenizer.decode(ids[first:first + 1]) == "H"


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
    assert encoded(tiny.tiny(tiny.REWRITES), chat("Hi", "Hello!")) == "no target"


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
    bare = tiny.THINK.replace("{{ '<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n' }}", "{{ '<|im_start|>assistant\\n' }}")
    assert learned(tiny.tiny(bare), chat("Hi", "Hello!")) == ["<think>\n\n</think>\n\nHello!<|im_end|>"]


@pytest.mark.parametrize("tokenizer", EVERY_TEMPLATE.values(), ids=EVERY_TEMPLATE.keys())
def test_emoji_and_chinese_cut_into_bytes_are_targets_whole(tokenizer):
    (answer,) = learned(tokenizer, chat("🙂 你好吗", "😀你好 👩‍🚀 ok🙂"))
    assert answer.startswith("😀你好 👩‍🚀 ok🙂<") and answer.count("<") == 1


def test_a_lone_space_of_the_prompt_is_no_target_though_its_trimmed_offsets_lie_on_the_border():
    assert learned(tiny.tiny(tiny.SPACE, eos="</s>", trim_offsets=True), chat("Hi", "Hello!")) == ["Hello!</s>"]


def test_trap10_a_token_that_begins_in_the_prompt_is_no_target_though_it_ends_in_the_answer():
    tokenizer = tiny.tiny(merges=[("Ċ", "Ċ")])  # two line breaks are one token
    ids, answer = encoded(tokenizer, chat("Hi", "\n\nHello!"))
    assert [tokenizer.decode(ids[answer][:1]), tokenizer.decode(ids[~answer][-2:-1])] == ["\n", "\n\n"]


def test_an_answer_that_quotes_the_end_of_turn_is_learnt_to_its_real_end():
    assert learned(tiny.tiny(), chat("Hi", "it is <|im_end|> there")) == ["it is <|im_end|> there<|im_end|>"]


def test_an_answer_without_any_end_token_is_learnt_to_the_end_of_its_span():
    plain = "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    for answer in ("Hello!", "it is <|im_end|> there"):
        assert learned(tiny.tiny(plain), chat("Hi", answer)) == [answer + "\n"]


@pytest.mark.parametrize("more", [["never answered"], ["answered by", " "]])
def test_what_follows_the_last_answer_is_left_out(more):
    ids, _ = encoded(tiny.tiny(), chat("a", "b", *more))
    assert tiny.tiny().decode(ids).endswith("b<|im_end|>\n")


def test_the_first_token_of_a_row_is_never_a_target():
    bare = "{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
    assert learned(tiny.tiny(bare, eos="</s>"), chat("Hi", "Hello!")) == ["ello!</s>"]


def test_an_answer_with_nothing_before_it_is_context_only():
    assert learned(tiny.tiny(), [{"role": "assistant", "content": "Welcome"}, *chat("a", "b")]) == ["b<|im_end|>"]


@pytest.mark.parametrize(("row", "reason"), [
    ([], "empty"), (chat("Hi"), "empty"), (chat("Hi", "  "), "empty"), (chat(" ", "answer"), "empty"), ("  \n", "empty"),
    ([{"role": "judge", "content": "x"}, *chat("a", "b")], "unknown role"),
    ([{"role": "user", "content": None}, {"role": "assistant", "content": "x"}], "not text"),
    (chat("a", "half \ud83d"), "broken Unicode"), ("half \ud83d", "broken Unicode"),
])
def test_a_useless_row_is_returned_as_its_reason(row, reason):
    assert encoded(tiny.tiny(), row) == reason


def test_a_template_that_refuses_a_role_is_a_reason_and_for_chat_one_line(capsys):
    tokenizer = tiny.tiny(tiny.STRICT)
    assert encoded(tokenizer, chat("a", "b", system="s")) == "refused by the chat template (System role not supported)"
    with pytest.raises(SystemExit, match="System role not supported"):
        template.prompt_ids(tokenizer, chat("a", system="s"))


def test_rows_of_one_batch_do_not_disturb_each_other():
    tokenizer, rows = tiny.tiny(), [chat("a", "b"), "plain text", chat("x"), chat("longer question", "longer answer")]
    together = template.encode(tokenizer, rows)
    for row, result in zip(rows, together):
        alone = encoded(tokenizer, row)
        assert result == alone if isinstance(alone, str) else all(np.array_equal(a, b) for a, b in zip(result, alone))


@pytest.mark.parametrize("adds_bos", [False, True])
def test_the_fallback_template_ends_turns_by_eos_and_is_saved_with_the_tokenizer(tmp_path, adds_bos):
    tokenizer = tiny.tiny(None, eos="</s>", adds_bos=adds_bos)
    assert template.ensure_template(tokenizer)
    tokenizer.save_pretrained(tmp_path)
    again = template.load_tokenizer(tmp_path)
    assert not template.ensure_template(again)
    row = chat("Hi", "Hello!", "more", "yes", system="Be brief")
    assert learned(again, row) == ["Hello!</s>", "yes</s>"]
    ids, _ = encoded(again, row)
    assert ids.tolist().count(again.bos_token_id) == adds_bos
    assert template.identities(again) == template.identities(tokenizer)


def test_a_tokenizer_with_neither_template_nor_eos_is_refused_in_one_line():
    with pytest.raises(SystemExit, match="neither a chat template nor an eos_token"):
        template.ensure_template(tiny.tiny(None, eos=None))
