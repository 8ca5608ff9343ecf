"""Stand-ins for the data sets and models of recipes/ that a machine without a network can make:
descriptions of Debian's packages.

    python bench/data/standins.py --source real/debian.parquet --out real

Reads   --source: parquet with the columns description, synopsis and section (../shared/README.md
        says how it is made)
Writes, in --out, no package twice, for a teacher that sees much and a student that sees little:

    sections-teacher.parquet, sections.parquet   text, label: 9,000 and 3,500 descriptions of ten
                                                 sections, to classify
    synopsis-teacher.parquet, synopsis.parquet   instruction, output: 1,500 and 750 short ones with
                                                 their summary in one line
    text-teacher.parquet, text.parquet           text: 12,000 and 2,500 descriptions, for language
                                                 modelling
    encoder-teacher/ encoder-student/            BERT, 3 layers of 192 and 2 of 64, WordPiece of
                                                 8,000 tokens: config.json and tokenizer, no
                                                 weights,
    decoder-teacher/ decoder-student/            and Llama with byte-level BPE: stage1_sft.py makes
                                                 new models from such folders
"""

import argparse
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import BertConfig, LlamaConfig, PreTrainedTokenizerFast

SECTIONS = (
    "admin",
    "devel",
    "games",
    "java",
    "javascript",
    "net",
    "perl",
    "python",
    "science",
    "sound",
)
TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>'"
    " }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
VOCAB = 8000
SIZES = {
    "teacher": dict(
        num_hidden_layers=3, hidden_size=192, intermediate_size=768, num_attention_heads=4
    ),
    "student": dict(
        num_hidden_layers=2, hidden_size=64, intermediate_size=256, num_attention_heads=4
    ),
}


def wordpiece(texts: list[str], size: int) -> PreTrainedTokenizerFast:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    inner = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    inner.normalizer, inner.pre_tokenizer, inner.decoder = (
        normalizers.BertNormalizer(),
        pre_tokenizers.BertPreTokenizer(),
        decoders.WordPiece(),
    )
    inner.train_from_iterator(
        texts,
        trainers.WordPieceTrainer(vocab_size=size, special_tokens=special, show_progress=False),
    )
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=512,
    )


def byte_level(texts: list[str], size: int) -> PreTrainedTokenizerFast:
    special = ["<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    inner.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=special,
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<|pad|>", eos_token="<|end|>", model_max_length=512
    )
    made.chat_template = TEMPLATE
    return made


def apart(rows: list[dict], *keys) -> list[dict]:
    """Return the rows in a random order, none that shares a key with an earlier one: packages of a
    family have much text in common."""
    random.Random(0).shuffle(rows)
    seen, kept = set(), []
    for row in rows:
        if not seen & (mine := {key(row) for key in keys}):
            seen |= mine
            kept.append(row)
    return kept


def halves(rows: list[dict], name: str, many: int, few: int, out: Path) -> None:
    for end, part in (("-teacher", rows[:many]), ("", rows[many : many + few])):
        pq.write_table(pa.Table.from_pylist(part), out / f"{name}{end}.parquet")
        print(f"{out / name}{end}.parquet: {len(part):,} rows")


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--source", required=True, metavar="FILE")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR")
    args = parser.parse_args(argv)
    packages = [
        row | {"text": " ".join(row["description"].split())}
        for row in pq.read_table(args.source).to_pylist()
    ]
    of_sections = apart(
        [row for row in packages if row["section"] in SECTIONS], lambda row: row["description"][:80]
    )
    halves(
        [{"text": row["text"], "label": row["section"]} for row in of_sections],
        "sections",
        9000,
        3500,
        args.out,
    )
    short = [
        row
        for row in packages
        if 120 <= len(row["description"]) <= 420
        and 15 <= len(row["synopsis"]) <= 80
        and row["description"].isascii()
    ]
    short = apart(short, lambda row: row["description"][:60], lambda row: row["synopsis"])
    halves(
        [
            {
                "instruction": f"Summarise this package in one line.\n\n{row['text']}",
                "output": row["synopsis"],
            }
            for row in short
        ],
        "synopsis",
        1500,
        750,
        args.out,
    )
    halves(
        [{"text": row["text"]} for row in apart(packages, lambda row: row["description"][:80])],
        "text",
        12000,
        2500,
        args.out,
    )
    texts = [row["description"] for row in pq.read_table(args.source).to_pylist()]
    for kind, tokenizer in (
        ("encoder", wordpiece(texts, VOCAB)),
        ("decoder", byte_level(texts, VOCAB)),
    ):
        for role, size in SIZES.items():
            folder = args.out / f"{kind}-{role}"
            tokenizer.save_pretrained(folder)
            common = dict(
                vocab_size=len(tokenizer),
                max_position_embeddings=512,
                pad_token_id=tokenizer.pad_token_id,
                **size,
            )
            config = (
                BertConfig(**common)
                if kind == "encoder"
                else LlamaConfig(
                    **common,
                    tie_word_embeddings=True,
                    bos_token_id=None,
                    eos_token_id=tokenizer.eos_token_id,
                )
            )
            config.save_pretrained(folder)
            print(
                f"{folder}: {len(tokenizer):,} tokens, {config.num_hidden_layers} layers of"
                f" {config.hidden_size}"
            )


if __name__ == "__main__":
    main()
