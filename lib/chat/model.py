"""A model that answers: with its tokenizer, its way to sample, and the memory of a conversation."""

import argparse
import copy
import math
import os

import torch
from transformers import DynamicCache, GenerationConfig
from transformers.cache_utils import DynamicLayer

from lib import checkpoints, files, flags, generate, models, template

# flags that go before the checkpoint's generation_config, which has them under the same names
SETTINGS = ("temperature", "top_p", "top_k", "repetition_penalty", "max_new_tokens")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add how tokens are chosen; None leaves it to the checkpoint's generation_config."""
    own = "(default: the checkpoint's own)"
    parser.add_argument("--greedy", action="store_true", help="always take the likeliest token")
    parser.add_argument(
        "--temperature",
        type=float,
        metavar="T",
        help=f"sample at this temperature; 0 = --greedy {own}",
    )
    parser.add_argument(
        "--top-p",
        type=float,
        metavar="P",
        help=f"sample among the likeliest tokens of this mass {own}",
    )
    parser.add_argument(
        "--top-k", type=int, metavar="K", help=f"sample among this many tokens; 0 = off {own}"
    )
    parser.add_argument("--repetition-penalty", type=float, metavar="X", help=f"1 = off {own}")
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help="longest answer (default: the checkpoint's own, else 512)",
    )


def check_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse (exit code 2) settings that cannot be sampled with."""
    given = [name for name in SETTINGS if getattr(args, name) is not None]
    for name in given:
        flag, value = f"--{name.replace('_', '-')}", getattr(args, name)
        if args.greedy and name in ("temperature", "top_p", "top_k"):
            parser.error(f"--greedy and {flag} exclude each other")
        if name in ("temperature", "top_k") and value < 0:
            parser.error(f"{flag} is {value}, wanted 0 or more")
    above_zero = ("top_p", "repetition_penalty", "max_new_tokens")
    flags.positive(parser, args, *(name for name in given if name in above_zero))
    if args.top_p is not None and args.top_p > 1:
        parser.error(f"--top-p is {args.top_p}, wanted at most 1")


class Chat:
    """A model, its tokenizer and how to sample. context: most tokens of prompt and answer together,
    or None."""

    def __init__(self, args, module, tokenizer):
        self.module, self.device, self.tokenizer = module, module.device, tokenizer
        self.context = generate.context_of(module)
        self.past = ([], DynamicCache())  # tokens of the last turn of a conversation, and its cache
        # transformers would fill what we leave out from the module's own
        self.own, module.generation_config = module.generation_config, GenerationConfig()
        self.choose(args)

    def choose(self, args):
        """Sample as these arguments say, and where they say nothing as the checkpoint's
        generation_config does."""
        how = copy.deepcopy(self.own)
        for name in SETTINGS:
            if getattr(args, name) is not None:
                setattr(how, name, getattr(args, name))
        if args.temperature or args.top_p is not None or args.top_k is not None:
            how.do_sample = True
        if args.greedy or args.temperature == 0 or not how.do_sample:
            how.do_sample, how.temperature, how.top_p, how.top_k = False, None, None, None
        how.max_new_tokens, how.max_length, how.num_beams = how.max_new_tokens or 512, None, 1
        how.use_cache = True  # or transformers reads all anew, behind the cache that it is given
        how.eos_token_id = generate.end_tokens(how, self.tokenizer.eos_token_id) or None
        how.pad_token_id = generate.pad_token(
            how, self.tokenizer, self.module.config.get_text_config().vocab_size
        )
        self.how = how

    def sampling(self, temperature=None, top_p=None) -> generate.Sampling:
        """Return the way to sample as lib/generate.py takes it, with what is given in its place."""
        return generate.sampling_of(self.how, self.tokenizer, temperature, top_p)

    def ids(self, messages, **more):
        """Return the prompt's token ids, ready for the answer. more: arguments of the template."""
        ids = template.prompt_ids(self.tokenizer, messages, **more)
        return generate.known(self.module, ids, self.tokenizer)

    def fit(self, messages, **more):
        """Return (prompt ids, messages dropped): the oldest turns go, until a quarter of the
        context, or the longest answer, has room.

        Worked example: system, user, assistant, user becomes system, user. The system prompt and
        the last message stay.
        """
        first = int(messages[0]["role"] == "system")
        room = math.inf
        if self.context:
            room = self.context - min(self.how.max_new_tokens, self.context // 4)

        def ids_without(turns: int) -> list[int]:
            return self.ids(messages[:first] + messages[first + 2 * turns :], **more)

        fewest, most, ids = 0, max(0, (len(messages) - first - 1) // 2), ids_without(0)
        if len(ids) <= room:
            return ids, 0
        # by halves: each try tokenizes the rest of the conversation, which may have 1,000 messages
        while fewest < most:
            middle = (fewest + most) // 2
            fewest, most = (
                (middle + 1, most) if len(ids_without(middle)) > room else (fewest, middle)
            )
        return ids_without(most), 2 * most

    def remembered(self, ids):
        """Return the cache of the turn before, cut to the tokens that `ids` begins with as well: a
        conversation is not read anew at every turn. None where a model's memory is more than keys
        and values of every token, which cannot be cut (sliding windows, Mamba).
        """
        plain = DynamicCache(config=self.module.config.get_text_config()).layers
        if any(type(layer) is not DynamicLayer for layer in plain):
            return None
        if generate.unknown_cache(self.module):
            return None
        known, cache = self.past
        common = len(os.path.commonprefix([known, ids]))
        # one token is left to be read: its logits are wanted. A layer may be one token longer than
        # others, if Ctrl-C came in between
        lengths = [layer.get_seq_length() for layer in cache.layers]
        held = min([common, len(ids) - 1, *lengths])
        for layer in cache.layers:
            layer.crop(held - layer.get_seq_length())
        self.past = (ids, cache)
        return cache

    @generate.one_memory_error()
    @torch.inference_mode()
    def answer(self, ids, streamer=None):
        """Return the answer to a prompt's token ids. With a streamer it is a turn of a
        conversation: heard of token by token, and remembered."""
        how = copy.deepcopy(self.how)
        if not how.do_sample:
            how.min_p = None  # or it is warned of
        if self.context:
            how.max_new_tokens = min(how.max_new_tokens, self.context - len(ids))
        cache = self.remembered(ids) if streamer is not None else None
        tokens = torch.tensor([ids], device=self.device)
        written = self.module.generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            generation_config=how,
            streamer=streamer,
            past_key_values=cache,
        )[0].tolist()  # the prompt, and the answer
        if cache is not None:
            self.past = (written, cache)
        return self.tokenizer.decode(written[len(ids) :], skip_special_tokens=True)


def load(args, ready, name=None, student=None):
    """Return the Chat of the model `name` (None: --ckpt). A GGUF file gets the tokenizer of the
    `student`, if it has its tokens; ready: gives any other one its chat template
    (prepare/templates.py)."""
    device = models.pick_device(args.device, args.threads)
    folder = checkpoints.local_folder(name or args.ckpt, args.trust_remote_code, unfinished=True)
    if student is not None and checkpoints.is_gguf(folder):
        tokenizer = student.tokenizer
        checkpoints.check_gguf_tokenizer(folder, tokenizer, args.ckpt)
    else:
        tokenizer = template.load_tokenizer(
            checkpoints.with_tokenizer(folder), args.trust_remote_code
        )
        ready(tokenizer, args.chat_template, args.template_args, name is not None)
    dtype = models.pick_dtype(args.dtype, device, folder)
    model = models.load(
        str(folder), device, dtype, pack=False, trust_remote_code=args.trust_remote_code
    )
    return Chat(args, model.module, tokenizer)


def both(args, ready):
    """Return the Chat of --ckpt, and that of --teacher or None."""
    student = load(args, ready)
    return student, None if args.teacher is None else load(args, ready, args.teacher, student)


def preflight(args, ready):
    """--dry-run: load what would answer, and say what it is and what it takes. Memory is that of
    one answer of the longest kind; several at once take as many caches."""
    for chat in both(args, ready):
        if chat is None:
            continue
        module, config = chat.module, chat.module.config.get_text_config()
        weights = sum(p.nbytes for p in module.parameters())
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        each = 2 * config.num_hidden_layers * heads * size * module.dtype.itemsize
        tokens = chat.context or chat.how.max_new_tokens
        print(
            f"chat: {module.config._name_or_path}, {sum(p.numel() for p in module.parameters()):,}"
            f" parameters, on {chat.device}, {module.dtype}\n"
            f"memory: {files.human(weights)} of weights, and at most {files.human(each)} a token of"
            f" the conversation, {files.human(each * tokens)} for {tokens:,} of them"
        )
    print("--dry-run: nothing was written")
