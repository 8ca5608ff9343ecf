"""Stand-ins for models that a laptop cannot fetch or train: a tokenizer learnt from a file's own text, and the config.json of small models.

    python bench/small_models.py --source real/debian.parquet --column description --out real/small

Writes, in --out, folders that stage1_sft.py makes new models from (config.json and tokenizer, no weights):

    encoder-teacher (5.3M parameters), encoder-student (1.0M)   BERT, WordPiece of 8,000 tokens, lower case
    decoder-teacher (5.2M), decoder-student (1.0M)              Llama, byte-level BPE of 8,000 tokens, with a chat template of its own
"""
import argparse
from pathlib import Path

import pyarrow.parquet as pq
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import BertConfig, LlamaConfig, PreTrainedTokenizerFast

TEMPLATE = ("{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}")
SIZES = {"teacher": dict(num_hidden_layers=3, hidden_size=192, intermediate_size=768, num_attention_heads=4),
         "student": dict(num_hidden_layers=2, hidden_size=64, intermediate_size=256, num_attention_heads=4)}


def wordpiece(texts: list[str], size: int) -> PreTrainedTokenizerFast:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    inner = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    inner.normalizer, inner.pre_tokenizer, inner.decoder = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    inner.train_from_iterator(texts, trainers.WordPieceTrainer(vocab_size=size, special_tokens=special, show_progress=False))
    inner.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1",
                                                         special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
                                   mask_token="[MASK]", model_max_length=512)


def byte_level(texts: list[str], size: int) -> PreTrainedTokenizerFast:
    special = ["<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    inner.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=size, special_tokens=special, show_progress=False,
                                                         initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    made = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<|pad|>", eos_token="<|end|>", model_max_length=512)
    made.chat_template = TEMPLATE
    return made


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--source", required=True, metavar="FILE", help="a parquet file")
    parser.add_argument("--column", required=True, help="its column of text")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--vocab", type=int, default=8000, metavar="V", help="tokens of both tokenizers (default: %(default)s)")
    args = parser.parse_args(argv)
    texts = [text for text in pq.read_table(args.source, columns=[args.column])[args.column].to_pylist() if text]
    for kind, tokenizer in (("encoder", wordpiece(texts, args.vocab)), ("decoder", byte_level(texts, args.vocab))):
        for role, size in SIZES.items():
            folder = args.out / f"{kind}-{role}"
            tokenizer.save_pretrained(folder)
            common = dict(vocab_size=len(tokenizer), max_position_embeddings=512, pad_token_id=tokenizer.pad_token_id, **size)
            config = BertConfig(**common) if kind == "encoder" else LlamaConfig(
                **common, tie_word_embeddings=True, bos_token_id=None, eos_token_id=tokenizer.eos_token_id)
            config.save_pretrained(folder)
            print(f"{folder}: {len(tokenizer):,} tokens, {config.num_hidden_layers} layers of {config.hidden_size}")


if __name__ == "__main__":
    main()
