"""Flags that several scripts share: one name, one default, one text each, so that they cannot drift apart."""
import argparse

SHARED = {
    "--data": dict(required=True, metavar="DIR", help="the folder prepare_data.py wrote"),
    "--out": dict(required=True, metavar="DIR", help="where to write; running the same command again continues there"),
    "--tokens-per-microbatch": dict(type=int, default=4096, metavar="N", help="tokens of one forward pass: what memory allows (default: %(default)s)"),
    "--seed": dict(type=int, default=0, help="seed of every random choice (default: %(default)s)"),
    "--device": dict(default="auto", help="auto, cpu, cuda, cuda:1, mps (default: %(default)s)"),
    "--amp": dict(choices=["auto", "fp16", "bf16", "off"], default="auto", help="mixed precision; auto is fp16 on CUDA, off elsewhere (default: %(default)s)"),
    "--attn": dict(choices=["sdpa", "eager", "flash_attention_2", "flex_attention"], default="sdpa", help="attention kernel (default: %(default)s)"),
    "--compile": dict(action="store_true", help="torch.compile the model's body"),
    "--fresh": dict(action="store_true", help="throw away what --out holds and start anew (default: continue it)"),
    "--trust-remote-code": dict(action="store_true", help="let a model folder run its own Python code (default: refuse)"),
    "--threads": dict(type=int, default=0, metavar="N", help="CPU threads; 0 = torch's own choice (default: %(default)s)"),
}


def add(parser: argparse.ArgumentParser, *names: str) -> None:
    """Add the shared flags `names` to a parser, in that order."""
    for name in names:
        parser.add_argument(name, **SHARED[name])


def positive(parser: argparse.ArgumentParser, args: argparse.Namespace, *names: str) -> None:
    """Refuse (exit code 2) a value that is not above zero, for each attribute in `names`."""
    for name in names:
        if getattr(args, name) <= 0:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}, wanted a number above 0")
