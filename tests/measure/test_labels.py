"""The likelihood of a label is that of a plain forward pass over prompt and label, whatever it is
run beside; what labels are is checked."""

import make
import numpy as np
import pytest
import tiny_tokenizers
import torch
from transformers import AutoModelForCausalLM, MistralConfig

from lib import template
from lib.measure import labels

NAMES = ["w5", "w5 w6", "w7 w8 w9", "w10"]  # the first begins the second
PROMPTS = [
    [{"role": "user", "content": " ".join(f"w{(i * j) % 57}" for j in range(1, 3 + 4 * i))}]
    for i in range(1, 6)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make.model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def module(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def plain(module, tokenizer, messages, label):
    """log p of the label's targets by one forward pass in float64 over the row as training sees
    it."""
    ((ids, answer),) = template.encode(
        tokenizer, [[*messages, {"role": "assistant", "content": label}]]
    )
    with torch.no_grad():
        logp = (
            module.double()(torch.tensor(ids.astype(np.int64))[None], use_cache=False)
            .logits[0]
            .log_softmax(-1)
        )
    module.float()
    return sum(logp[place - 1, ids[place]].item() for place in np.flatnonzero(answer))


def encoded(tokenizer, prompts=PROMPTS, names=NAMES, **more):
    return [labels.encode_labels(tokenizer, messages, names, **more) for messages in prompts]


def test_it_is_the_likelihood_of_a_plain_forward_pass(module):
    wanted = [
        [plain(module, make.tokenizer(), messages, name) for name in NAMES] for messages in PROMPTS
    ]
    np.testing.assert_allclose(labels.logp(module, encoded(make.tokenizer())), wanted, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 3, 5, 10, 100])
def test_batch_size_padding_and_order_change_nothing(module, rows):
    rows_of = encoded(make.tokenizer())
    alone = np.concatenate([labels.logp(module, [row]) for row in rows_of])
    np.testing.assert_allclose(labels.logp(module, rows_of, rows), alone, atol=1e-4)
    np.testing.assert_allclose(labels.logp(module, rows_of[::-1], rows), alone[::-1], atol=1e-4)
    turned = encoded(make.tokenizer(), names=NAMES[::-1])
    np.testing.assert_allclose(labels.logp(module, turned, rows), alone[:, ::-1], atol=1e-4)


def test_a_model_that_sees_a_window_alone_is_scored_as_by_itself(tmp_path):
    torch.manual_seed(0)
    config = MistralConfig(
        **{
            **make.config().to_dict(),
            "sliding_window": 5,
            "model_type": "mistral",
            "architectures": None,
        }
    )
    module = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        module.get_input_embeddings().weight *= 8
    wanted = [
        [plain(module, make.tokenizer(), messages, name) for name in NAMES] for messages in PROMPTS
    ]
    np.testing.assert_allclose(labels.logp(module, encoded(make.tokenizer()), 3), wanted, atol=1e-4)


def test_labels_are_whole_answers_so_that_all_of_them_share_one_mass(module):
    every = [f"w{i}" for i in range(57)]
    found = labels.logp(module, encoded(make.tokenizer(), PROMPTS[:1], every))[0]
    longer = labels.logp(
        module, encoded(make.tokenizer(), PROMPTS[:1], [f"w5 {name}" for name in every])
    )[0]
    assert (
        np.exp(found).sum() + np.exp(longer).sum() < 1
    )  # not so without the end: w5 alone would hold all that begins with it
    begins = labels.logp(module, encoded(make.tokenizer(), PROMPTS[:1], ["w5"], end=False))[0, 0]
    assert begins > np.logaddexp(found[5], np.logaddexp.reduce(longer))


def test_the_end_of_the_turn_is_a_labels_last_token():
    (_, with_end), (_, without) = (
        labels.encode_labels(make.tokenizer(), PROMPTS[0], NAMES, end=end) for end in (True, False)
    )
    assert [ids[-1] for ids, _ in with_end] == [3] * 4 and [ids[:-1] for ids, _ in with_end] == [
        ids for ids, _ in without
    ]


@pytest.mark.parametrize("name", tiny_tokenizers.MODELS)
def test_tokens_at_the_border_are_those_of_training(name):
    tokenizer = tiny_tokenizers.model(name)
    messages = tiny_tokenizers.chat("Is it good?")
    prompt, tails = labels.encode_labels(tokenizer, messages, ["good", "bad film"])
    assert prompt == template.prompt_ids(tokenizer, messages)
    for label, (ids, scored) in zip(("good", "bad film"), tails):
        ((whole, answer),) = template.encode(
            tokenizer, [[*messages, {"role": "assistant", "content": label}]]
        )
        assert (
            prompt + ids == whole[: len(prompt) + len(ids)].tolist()
            and ids == whole[answer].tolist()
            and all(scored)
        )


def test_a_label_that_merges_with_the_prompts_last_character_is_scored_as_training_sees_it(
    tmp_path,
):
    """The generation prompt ends in a space; " g" is one token and belongs to the prompt, while "b"
    is a token of its own."""
    tokenizer = tiny_tokenizers.tiny(
        tiny_tokenizers.SPACE, merges=[("Ġ", "g")], eos="</s>", pad="</s>"
    )
    folder = make.model(tmp_path, vocab=len(tokenizer), with_tokenizer=tokenizer)
    module, messages = (
        AutoModelForCausalLM.from_pretrained(folder).eval(),
        tiny_tokenizers.chat("How?"),
    )
    prompt, tails = labels.encode_labels(tokenizer, messages, ["good", "bad"])
    assert len({tuple(ids[:1]) for ids, _ in tails}) == 2 and tokenizer.decode(prompt).endswith(
        "A:"
    )
    wanted = [[plain(module, tokenizer, messages, label) for label in ("good", "bad")]]
    np.testing.assert_allclose(labels.logp(module, [(prompt, tails)]), wanted, atol=1e-4)


# --- calibration


def test_length_divides_by_the_labels_tokens_and_prior_subtracts_what_the_model_likes_unasked(
    module,
):
    rows_of, tokenizer = encoded(make.tokenizer()), make.tokenizer()
    found = labels.logp(module, rows_of)
    np.testing.assert_array_equal(labels.calibrated(found, rows_of, "off"), found)
    np.testing.assert_allclose(labels.calibrated(found, rows_of, "length"), found / [[2, 3, 4, 2]])
    prompts = [
        [{"role": "user", "content": f"w1 w2 {messages[0]['content']} w3"}] for messages in PROMPTS
    ]
    prior = labels.priors(module, tokenizer, prompts, NAMES)
    alone = [
        plain(module, tokenizer, [{"role": "user", "content": "w1 w2 N/A w3"}], name)
        for name in NAMES
    ]
    np.testing.assert_allclose(
        labels.calibrated(found, rows_of, "prior", prior), found - [alone], atol=1e-4
    )


def test_a_preference_that_does_not_depend_on_the_prompt_is_taken_away_by_prior(module):
    """Whatever is added to one label's log p at every prompt, the content-free one too, does not
    change what is chosen."""
    rows_of, bias = encoded(make.tokenizer()), np.array([0, 30.0, 0, 0])
    found, prior = (
        labels.logp(module, rows_of),
        labels.priors(module, make.tokenizer(), PROMPTS, NAMES),
    )

    def chosen(shift, how):
        return labels.calibrated(found + shift, rows_of, how, prior + shift).argmax(1).tolist()

    assert chosen(bias, "prior") == chosen(0, "prior") and set(chosen(bias, "off")) == {1} != set(
        chosen(0, "prior")
    )


@pytest.mark.parametrize(
    "texts, free",
    [
        (["Film: good. Mood?", "Film: a bore. Mood?"], "Film: N/A. Mood?"),
        (["abc one", "abd two"], "N/A"),
        (["same", "same"], "N/A"),
        (["判断情感：好", "判断情感：坏"], "判断情感：N/A"),
        (["good dog", "good cat", "good"], "N/A"),
    ],
)
def test_the_content_is_what_prompts_do_not_share(texts, free):
    assert labels.content_free(texts) == free


# --- what labels are


def test_labels_are_those_listed_or_the_references():
    assert labels.names(" pos, neg,pos", [], "x") == ["pos", "neg"] and labels.names(
        "auto", ["b", "a", "b"], "x"
    ) == ["a", "b"]
    labels.names("auto", [str(i) for i in range(200)], "x")
    with pytest.raises(
        SystemExit,
        match="the references of x are no labels; saw 201 distinct ones; wanted at most 200",
    ):
        labels.names("auto", [str(i) for i in range(201)], "x")


def test_a_label_that_the_template_does_not_show_is_refused():
    with pytest.raises(SystemExit, match="the label ' ' cannot be an answer"):
        labels.encode_labels(make.tokenizer(), PROMPTS[0], ["w5", " "])
