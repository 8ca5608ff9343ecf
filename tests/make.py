"""Tiny tokenizers, data sets and models, made in the test: 61 tokens, width 32, two layers."""
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from lib import data, files, template

V = 61


def tokenizer(prefix: str = "w", size: int = V) -> PreTrainedTokenizerFast:
    words = ["<unk>", "<user>", "<assistant>", "<end>", *(f"{prefix}{i}" for i in range(size - 4))]
    inner = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="<end>", pad_token="<end>")
    made.chat_template = ("{% for m in messages %}{{ '<user> ' if m.role == 'user' else '<assistant> ' }}{{ m.content }}{{ ' <end> ' }}{% endfor %}"
                          "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}")
    return made


def dataset(folder: Path, rows: int = 40, val: int = 8, rows_per_chunk: int = 20000, seed: int = 0, longest: int = 20, maker=None) -> data.Dataset:
    """Write a prepared data set of random rows (no prepare_data.py): the last third or so of each row are targets, ended by <end>."""
    rng, folder = np.random.default_rng(seed), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    made = maker or tokenizer()
    counts, targets = {}, {}
    for name, count in (("train", rows), ("val", val)):
        tokens, answer, records, start, first = [], [], np.zeros(count, data.ROW), 0, 0
        for i in range(count):
            length = int(rng.integers(6, longest + 1))
            ids = rng.integers(4, len(made), length)
            # a pattern that can be learnt: each target repeats the first token
            cut = length - int(rng.integers(2, max(3, length // 2)))
            ids[cut:] = ids[0]
            ids[-1] = 3
            mask = np.arange(length) >= cut
            records[i] = (start, length, first, mask.sum(), 0)
            start, first = start + length, first + int(mask.sum())
            tokens.append(ids)
            answer.append(mask)
        join = lambda parts, dtype: np.concatenate(parts).astype(dtype) if parts else np.zeros(0, dtype)
        np.save(folder / f"{name}.tokens.npy", join(tokens, np.uint32))
        np.save(folder / f"{name}.answer.npy", join(answer, bool))
        np.save(folder / f"{name}.rows.npy", records)
        counts[name], targets[name] = count, first
    made.save_pretrained(folder / "tokenizer")
    parts = [folder / f"{name}.{part}.npy" for name in ("train", "val") for part in ("tokens", "answer", "rows")]
    files.write_json(folder / "meta.json", {"format": data.FORMAT, "identities": template.identities(made) | {"data": files.sha256(*parts)},
                                            "rows": counts, "targets": targets, "rows_per_chunk": rows_per_chunk, "seed": seed})
    return data.Dataset(folder)


def config(vocab: int = V, width: int = 32, layers: int = 2, **more) -> LlamaConfig:
    return LlamaConfig(vocab_size=vocab, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
                       max_position_embeddings=256, tie_word_embeddings=True, bos_token_id=None, eos_token_id=3, pad_token_id=3, **more)


def model(folder: Path, seed: int = 0, scale: float = 8.0, with_tokenizer=True, **options) -> Path:
    """Save a random model whose logits are spread enough (times `scale`) that its softmax is far from flat."""
    torch.manual_seed(seed)
    made = AutoModelForCausalLM.from_config(config(**options))
    with torch.no_grad():
        made.get_input_embeddings().weight *= scale
    made.save_pretrained(folder)
    if with_tokenizer:
        (tokenizer() if with_tokenizer is True else with_tokenizer).save_pretrained(folder)
    return Path(folder)
