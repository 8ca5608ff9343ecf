"""A student beside its teacher at every token of an answer (lib/chat/heat.py): KL against float64
over all tokens, texts against the decoding."""

import make
import pytest
import torch
from tiny_tokenizers import tiny
from tokenizers import Tokenizer, decoders, normalizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from lib import head, models
from lib.chat import heat

CPU = torch.device("cpu")
PROMPT, ANSWER = [1, 7, 9, 11, 2], [20, 21, 22, 23, 24, 25, 26, 3]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Student and teacher of one tokenizer whose output layers are padded differently, to 64 and to
    80 rows."""
    folder = tmp_path_factory.mktemp("pair")
    return [
        models.load(str(make.model(folder / name, seed=seed, vocab=rows)), CPU).module
        for seed, (name, rows) in enumerate((("student", 64), ("teacher", 80)))
    ]


def exact(module, prompt, vocab):
    """Log-probabilities in float64 at every token of ANSWER, over the first `vocab` tokens."""
    module = module.double()
    with torch.no_grad():
        z = module(torch.tensor([prompt + ANSWER])).logits[0, len(prompt) - 1 : -1, :vocab]
    module.float()
    return z.log_softmax(-1)


@pytest.mark.parametrize("teacher_prompt", (None, [1, 5, 2]))
@pytest.mark.parametrize("order", (1, -1))
def test_kl_and_probabilities_are_those_of_float64_over_all_tokens_that_both_know(
    pair, order, teacher_prompt
):
    student, teacher = pair[::order]
    found = heat.compare_tokens(
        student, teacher, make.tokenizer(), PROMPT, ANSWER, top=4, teacher_prompt=teacher_prompt
    )
    logq, logp = exact(student, PROMPT, 64), exact(teacher, teacher_prompt or PROMPT, 64)
    kl = (logp.exp() * (logp - logq)).sum(-1)
    assert [place.id for place in found] == ANSWER and kl.min() > 0.1
    torch.testing.assert_close(
        torch.tensor([place.kl for place in found]).double(), kl, rtol=1e-4, atol=1e-5
    )
    for name, logs in (("student", logq), ("teacher", logp)):
        here = torch.tensor([getattr(place, f"{name}_p") for place in found]).double()
        torch.testing.assert_close(
            here, logs.exp()[range(len(ANSWER)), ANSWER], rtol=1e-4, atol=1e-6
        )
        best, ids = logs.exp().topk(4)
        torch.testing.assert_close(
            torch.tensor([[p for _, p in getattr(place, name)] for place in found]).double(),
            best,
            rtol=1e-4,
            atol=1e-6,
        )
        words = heat.namer(make.tokenizer())
        assert [[word for word, _ in getattr(place, name)] for place in found] == [
            [words(token) for token in row] for row in ids.tolist()
        ]


def test_a_student_that_is_its_teacher_is_nowhere_apart(pair):
    found = heat.compare_tokens(pair[0], pair[0], make.tokenizer(), PROMPT, ANSWER)
    assert [place.kl for place in found] == [0.0] * len(ANSWER) and all(
        place.student == place.teacher for place in found
    )
    assert heat.compare_tokens(*pair, make.tokenizer(), PROMPT, []) == []


def test_logits_are_made_in_chunks_and_nothing_depends_on_their_size(pair, monkeypatch):
    whole, sizes, plain = (
        heat.compare_tokens(*pair, make.tokenizer(), PROMPT, ANSWER),
        [],
        head.Head.logits,
    )

    def counted(self, hidden, *rest):
        sizes.append(len(hidden))
        return plain(self, hidden, *rest)

    monkeypatch.setattr(head, "CHUNK_BYTES", 4 * 64 * 3)
    monkeypatch.setattr(head.Head, "logits", counted)
    cut = heat.compare_tokens(*pair, make.tokenizer(), PROMPT, ANSWER)
    assert sizes[-6:] == [3, 3, 3, 3, 2, 2]  # after what is compared with the models' own logits
    for one, two in zip(whole, cut, strict=True):
        assert (one.id, one.text) == (two.id, two.text)
        assert two.kl == pytest.approx(one.kl, rel=1e-4) and [word for word, _ in one.teacher] == [
            word for word, _ in two.teacher
        ]


def test_a_token_that_only_one_of_the_two_knows_is_refused_in_one_line(pair):
    with pytest.raises(
        SystemExit, match="saw token 70; wanted those that both models know, below 64"
    ):
        heat.compare_tokens(*pair, make.tokenizer(), PROMPT, [20, 70])


def test_half_precision_is_compared_in_float32(pair, tmp_path):
    half = models.load(
        str(make.model(tmp_path / "half", seed=1, vocab=80)), CPU, torch.bfloat16
    ).module
    rough, fine = (
        heat.compare_tokens(pair[0], teacher, make.tokenizer(), PROMPT, ANSWER)
        for teacher in (half, pair[1])
    )
    assert [place.kl for place in rough] == pytest.approx([place.kl for place in fine], rel=0.3)


def llama2():
    """A tokenizer whose words begin with a blank that the first one loses, and whose rare
    characters are bytes: as Llama 2's."""
    words = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "\u2581",
        *"Paris,",
        "\u2581P",
        "ar",
        "is",
        "aris",
    ]
    merges = [("\u2581", "P"), ("a", "r"), ("i", "s"), ("ar", "is")]
    inner = Tokenizer(
        BPE(
            {word: number for number, word in enumerate(words)},
            merges,
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    inner.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    inner.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


TEXTS = ("Paris, Paris", "né 日本 🎉!\n", "\x1b[2J \ufffd!", " Paris  Paris ", "日", "")


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("maker", (tiny, llama2, make.tokenizer))
def test_pieces_joined_are_the_decoding_and_a_character_is_never_cut(maker, text):
    tokenizer = maker()
    ids = tokenizer(text, add_special_tokens=False).input_ids
    decoded = tokenizer.decode(ids, skip_special_tokens=True)
    assert (
        "".join(heat.token_texts(tokenizer, ids)) == decoded or maker is make.tokenizer
    )  # its unknown words are a special token
    end = tokenizer.eos_token_id
    assert heat.token_texts(tokenizer, [*ids, end]) == [
        *heat.token_texts(tokenizer, ids),
        tokenizer.eos_token,
    ]
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in heat.token_texts(tokenizer, ids))


@pytest.mark.parametrize("maker", (tiny, llama2))
@pytest.mark.parametrize("end", (0, 1, 2))
def test_a_character_that_was_never_finished_is_in_the_text_too(maker, end):
    tokenizer = maker()
    ids = tokenizer("Pa🎉", add_special_tokens=False).input_ids[:-2]
    pieces = heat.token_texts(tokenizer, ids + [tokenizer.eos_token_id] * end)
    assert "".join(pieces[: len(ids)]) == tokenizer.decode(ids) and "\ufffd" in pieces[len(ids) - 1]
    assert pieces[len(ids) :] == [tokenizer.eos_token] * end


def test_special_tokens_in_the_midst_are_named_and_leave_the_text_as_it_is():
    tokenizer = llama2()
    ids = tokenizer("Paris Paris", add_special_tokens=False).input_ids
    ids = [1, *ids[:2], 1, *ids[2:], 2]
    pieces = heat.token_texts(tokenizer, ids)
    assert [piece for piece in pieces if piece.startswith("<")] == ["<s>", "<s>", "</s>"]
    assert (
        "".join(piece for piece in pieces if not piece.startswith("<"))
        == tokenizer.decode(ids, skip_special_tokens=True)
        == "Paris Paris"
    )


def test_a_word_is_named_as_it_stands_inside_of_a_sentence():
    tokenizer = llama2()
    word = heat.namer(tokenizer)
    assert [
        word(tokenizer.convert_tokens_to_ids(token)) for token in ("\u2581P", "aris", "</s>")
    ] == [" P", "aris", "</s>"]


def test_tokens_are_comparable_only_where_every_number_means_the_same():
    one = make.tokenizer()
    assert heat.incomparable(one, make.tokenizer()) is None
    assert (
        heat.incomparable(one, make.tokenizer("v"))
        == "the teacher has other tokens than the student: number 4 is 'v0' to it, 'w0' to the"
        " student"
    )
    assert "number 61 is 'w57' to it, nothing to the student" in heat.incomparable(
        one, make.tokenizer(size=62)
    )


def test_a_model_is_measured_once_and_not_at_every_request(pair):
    student, passes = pair[0], []
    heat.likely_tokens(student, ANSWER, 3)
    hook = student.register_forward_hook(lambda *_: passes.append("the head is measured"))
    heat.likely_tokens(student, ANSWER, 3)
    hook.remove()
    assert not passes  # of the body alone
