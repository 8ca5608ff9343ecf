"""Byte-level tokenizers without merges (every byte is a token, so an emoji is four), and chat
templates of the common kinds."""

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
# every turn ends in <|im_end|> and a line break
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%"
    " endfor %}" + PROMPT
)
# BOS is part of the template, content is trimmed, nothing follows the end of turn
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|head|>' + m.role + '<|/head|>\\n\\n' + m.content |"
    " trim + '<|eot|>' }}{% endfor %}{% if add_generation_prompt %}{{"
    " '<|head|>assistant<|/head|>\\n\\n' }}{% endif %}"
)
# the last answer opens with an empty think block, which the generation prompt supplies; earlier
# answers are written without it
THINK = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'assistant' and"
    " loop.last %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{{ m.content + '<|im_end|>\\n' }}{%"
    " endfor %}{% if add_generation_prompt %}{{"
    " '<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n' }}{% endif %}"
)
# no system role: the template raises
STRICT = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System"
    " role not supported') }}{% endif %}{{ '<|head|>' + ('model' if m.role == 'assistant' else"
    " m.role) + '\\n' + m.content + '<|eot|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{"
    " '<|head|>model\\n' }}{% endif %}"
)
# the generation prompt ends in a space
SPACE = (
    "{% for m in messages %}{{ ('Q: ' if m.role == 'user' else 'A: ') + m.content + eos_token }}{%"
    " endfor %}{% if add_generation_prompt %}{{ 'A: ' }}{% endif %}"
)
# what an answer was is rewritten when the conversation is shown again: no prefix ever holds
REWRITES = (
    "{% for m in messages %}{{ m.role + ':' + m.content + '<|eot|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'model says:' }}{% endif %}"
)

SPECIAL = [
    "<s>",
    "</s>",
    "<|im_start|>",
    "<|im_end|>",
    "<|head|>",
    "<|/head|>",
    "<|eot|>",
    "<|pad|>",
]


# the templates of published models, in tests/templates in this project's words: the tokens that are
# special to them, and the one that ends a turn
MODELS = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "qwen2.5": ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    "qwen3": ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    "smollm2": ("<|im_start|>", "<|im_end|>"),
    "llama3": ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "gemma3": ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
    "mistral": ("<s>", "[INST]", "[/INST]", "</s>"),
    "phi3": ("<s>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
}


def model(name: str, **more) -> PreTrainedTokenizerFast:
    """A tiny tokenizer with the chat template, the special tokens, and bos and eos of a published
    model."""
    special = MODELS[name]
    bos = special[0] if name in ("llama3", "gemma3", "mistral", "phi3") else None
    eos = {"gemma3": "<eos>", "phi3": "<|endoftext|>"}.get(name, special[-1])
    words = (Path(__file__).parent / "templates" / f"{name}.jinja").read_text(encoding="utf-8")
    return tiny(words, eos=eos, pad=eos, bos=bos, special=special, rstrip=name == "phi3", **more)


def tiny(
    chat_template=CHATML,
    eos="<|im_end|>",
    pad="<|pad|>",
    bos="<s>",
    adds_bos=False,
    trim_offsets=False,
    merges=(),
    special=SPECIAL,
    rstrip=False,
) -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet()) + [
        first + second for first, second in merges
    ]
    inner = Tokenizer(BPE({piece: number for number, piece in enumerate(alphabet)}, list(merges)))
    inner.pre_tokenizer, inner.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    inner.add_special_tokens(
        [AddedToken(token, special=True, normalized=False, rstrip=rstrip) for token in special]
    )
    inner.add_tokens(
        [
            AddedToken(token, special=False, normalized=False)
            for token in ("<think>", "</think>")
            if special is not SPECIAL
        ]
    )
    inner.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    if adds_bos:
        inner.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", inner.token_to_id("<s>"))]
        )
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token=bos, eos_token=eos, pad_token=pad
    )
    made.chat_template = chat_template
    return made


def chat(*contents: str, system: str | None = None) -> list[dict]:
    """A conversation of alternating turns, the user's first."""
    opening = [{"role": "system", "content": system}] if system is not None else []
    return opening + [
        {"role": ("user", "assistant")[turn % 2], "content": content}
        for turn, content in enumerate(contents)
    ]
