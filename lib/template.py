"""From a conversation to token ids and an answer mask, through the tokenizer's own chat template.

Contract: `encode` marks as targets exactly the tokens that the model must write itself: the text of every assistant turn and
its end-of-turn token; nothing that the generation prompt supplies, nothing after the end of turn.
"""
import hashlib
import json


def load_tokenizer(name, trust_remote_code: bool = False):
    """Load a tokenizer from a folder or hub id; the one-line error when there is none."""
    from transformers import AutoTokenizer

    from lib import files

    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as missing:
        files.fail(f"no tokenizer could be loaded from {name}", seen=str(missing)[:200], wanted="a folder with tokenizer.json, or a hub id")


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def identities(tokenizer) -> dict:
    """Return `vocabulary` (which token has which id: what logits mean) and `tokenizer` (that, special ids and chat template).

    Stages must agree on the vocabulary. Templates may differ: one data set, made with one of them, serves teacher and student
    (the templates of Qwen2.5-Coder 0.5B and 1.5B differ in their tools block).
    """
    vocabulary = tokenizer.get_vocab()
    special = {name: tokenizer.convert_tokens_to_ids(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    return {"vocabulary": _hash(vocabulary), "tokenizer": _hash([vocabulary, special, tokenizer.chat_template])}
