"""From a conversation to token ids and an answer mask, through the tokenizer's own chat template.

Contract: `encode` marks as targets exactly the tokens that the model must write itself: the text of
every assistant turn and its end-of-turn token; nothing that the generation prompt supplies, nothing
after the end of turn.

How an answer is found, with no help from the template (most have no `{% generation %}`): the
conversation up to the turn, rendered with its generation prompt, must be a prefix of the whole
rendered conversation, and so must the conversation up to and with the turn; what lies between the
two is the answer. Where a template rewrites earlier turns (Qwen3), that fails, and the turn is
context only.

Reasoning traces (`traces`) are targets like the rest, or dropped from the text, or masked: they
stay in the text and are no targets.

Worked example (ChatML):

    whole    <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\nHello!<|im_end|>\\n
    prompt   <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\n
    targets                                                         Hello!<|im_end|>   (no last \\n)
"""

import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
import numpy as np
from tokenizers import Tokenizer

from lib import files

Span = tuple[int, int]  # the first character of a part of a text, and the one after its last

ROLES = ("system", "user", "assistant", "tool")
# a reasoning trace, as Qwen3, DeepSeek-R1 and their students write it
OPEN, CLOSE = "<think>", "</think>"
# half a surrogate pair, from an escape in JSON that was cut: no tokenizer takes it
BROKEN = re.compile("[\ud800-\udfff]")

# what a chat template may take for two words
TEMPLATE_BYTES, TEMPLATE_SECONDS = 2 << 30, 5

# For a tokenizer without a template of its own: plain headings, and eos_token as the end of an
# assistant's turn. Every heading ends in a line break, which no common tokenizer merges with the
# word after it. `{bos}` becomes bos_token where the tokenizer adds one.
FALLBACK = (
    "{bos}{% for message in messages %}{{ {'system': 'System', 'user': 'User', 'assistant':"
    " 'Assistant', 'tool': 'Tool'}[message['role']] + ':\\n' + message['content'] }}{% if"
    " message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n\\n' }}{% endfor %}{% if"
    " add_generation_prompt %}{{ 'Assistant:\\n' }}{% endif %}"
)


# what a tokenizer is tried on, beside its special tokens: all that classes cut in their own way
TRIAL = (
    "Room 1234 costs 98765.43, 10203 in 2024; it's I'LL",
    " a  b\n\n\tif (x != y[0]) { return f_12->next; }  # done\r\n   ",
    "漢字かな 한국어, 中文1999年。Ünïcödé ﬁ e\u0301 اللغة ١٢٣ हिन्दी",
    "🙂👩\u200d👩\u200d👧 🇩🇪 <b>x</b> https://a.bc/?q=1&r=%20",
)


def load_tokenizer(name, trust_remote_code: bool = False):
    """Load a tokenizer from a folder or hub id; the one-line error when there is none.

    Its tokenizer.json is what it means, and what other programs read: a class that
    tokenizer_config.json names, and that cuts text otherwise (transformers 5 builds some of them
    anew, with rules of their own), gives way to it.
    """
    if str(name).endswith(".gguf"):
        files.fail(
            f"{name} is a GGUF file",
            wanted="a checkpoint's folder, or a hub id",
            mend="--teacher of stage2_kd.py for it, and no other flag",
        )
    try:
        return as_stored(name, trust_remote_code)
    except (OSError, ValueError, KeyError) as missing:
        files.fail(
            f"no tokenizer could be loaded from {name}",
            seen=str(missing)[:200],
            wanted="a folder with tokenizer.json, or a hub id",
        )


def as_stored(name, trust_remote_code: bool = False):
    """Return the tokenizer that AutoTokenizer makes, if it cuts text as its tokenizer.json does;
    else that file's, and say so."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast
    from transformers.utils import cached_file

    kind, why = "that is named", ""
    try:
        made = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
        # the plain class reads the file as it is, and a maker's own code is what it means
        if not made.is_fast or not type(made).__module__.startswith("transformers.models."):
            return made
        kind = type(made).__name__
    except (OSError, ValueError, KeyError):
        raise
    except Exception as broken:  # the library has no other for a class that does not fit the file
        made, why = None, f"cannot be built of it ({str(broken)[:80]})"
    file = cached_file(name, "tokenizer.json", _raise_exceptions_for_missing_entries=False)
    if file is None:
        if made is None:
            raise ValueError(f"the class {kind} {why}")
        return made
    stored = Tokenizer.from_file(file)
    stored.no_truncation()
    special = [token.content for token in stored.get_added_tokens_decoder().values()][:8]
    texts = [*TRIAL, *(f"{token} 1 a{token}b\n {token}" for token in special)]
    wanted = cut(stored, texts)
    seen = cut(made.backend_tokenizer, texts) if made else None
    if seen == wanted:
        return made
    if seen is not None and wanted is not None:
        text, ids, own = next(parts for parts in zip(texts, seen, wanted) if parts[1] != parts[2])
        why = f"makes {len(ids)} tokens of {text!r} where its tokenizer.json makes {len(own)}"
    if made and type(stored.model).__name__ == "WordPiece":
        files.fail(
            f"the tokenizer {name} means two things",
            f"tokenizer_config.json's {kind} {why}",
            "one meaning",
            "the do_lower_case and strip_accents that the model was trained with, in both files",
        )
    plain = PreTrainedTokenizerFast.from_pretrained(name)
    if seen is not None and cut(plain.backend_tokenizer, texts) == seen:
        return made  # not the class but a setting of tokenizer_config.json (add_prefix_space)
    print(
        f"tokenizer: {name}: tokenizer_config.json's class {kind} {why or 'does not read it'}:"
        " tokenizer.json is followed",
        flush=True,
    )
    return plain


def cut(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]] | None:
    """Return the ids of texts, without what is added around them; None where it cannot."""
    try:
        return [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    except Exception:  # the library has no other: no unknown token, where one is needed
        return None


def say_misread(tokenizer, folder: Path, model_type: str) -> None:
    """Say where plain transformers reads the plain tokenizer of a saved checkpoint by the class of
    the model's type, whatever the folder says (Qwen 2 and 3.5), and that class cuts otherwise."""
    from transformers import AutoTokenizer
    from transformers.models.auto import tokenization_auto as known

    forced = getattr(known, "MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS", ())
    plain = not type(tokenizer).__module__.startswith("transformers.models.")
    if not plain or not tokenizer.is_fast or model_type not in forced:
        return
    read = AutoTokenizer.from_pretrained(folder)
    if type(read) is not type(tokenizer) and read(list(TRIAL)) != tokenizer(list(TRIAL)):
        print(
            f"tokenizer: AutoTokenizer reads {folder.name}/ as {type(read).__name__}, since the"
            f" model is a {model_type}, and not as its tokenizer.json says:"
            " PreTrainedTokenizerFast.from_pretrained and chat.py follow the file"
        )


def _hash(value: object) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def identities(tokenizer) -> dict:
    """Return `vocabulary` (which token has which id: what logits mean) and `tokenizer` (that,
    special ids and chat template).

    Stages must agree on the vocabulary. Templates may differ: one data set, made with one of them,
    serves teacher and student (the templates of Qwen2.5-Coder 0.5B and 1.5B differ in their tools
    block).
    """
    vocabulary, special = tokenizer.get_vocab(), {}
    for name, token in tokenizer.special_tokens_map.items():
        if isinstance(token, str):
            special[name] = tokenizer.convert_tokens_to_ids(token)
    return {
        "vocabulary": _hash(vocabulary),
        "tokenizer": _hash([vocabulary, special, tokenizer.chat_template]),
    }


def adds_bos(tokenizer) -> bool:
    """Return whether the tokenizer puts bos_token before plain text."""
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("a")["input_ids"][:1] == [bos]


def ensure_template(tokenizer) -> bool:
    """Give the tokenizer the `FALLBACK` template if it has none, and return whether that was so;
    save_pretrained keeps it."""
    if tokenizer.chat_template is not None:
        try:
            tokenizer.get_chat_template()
        except ValueError as several:
            files.fail(
                f"the tokenizer {tokenizer.name_or_path} has several chat templates",
                seen=several,
                wanted="one named default",
            )
        check_template(tokenizer)
        return False
    if tokenizer.eos_token is None:
        files.fail(
            f"the tokenizer {tokenizer.name_or_path} cannot end an answer",
            seen="neither a chat template nor an eos_token",
            wanted="one of them in tokenizer_config.json",
            mend="--tokenizer of an instruct model of the same family",
        )
    tokenizer.chat_template = FALLBACK.replace(
        "{bos}", "{{ bos_token }}" if adds_bos(tokenizer) else ""
    )
    return True


def special_ids(tokenizer) -> set[int]:
    """Return the ids of all special tokens, those of the chat template (<|im_end|>, <|eot_id|>)
    among them."""
    added = tokenizer.added_tokens_decoder.items()
    return {number for number, token in added if token.special} | set(tokenizer.all_special_ids)


def render(tokenizer, messages: list[dict], add_generation_prompt: bool = False) -> str:
    """Return the conversation as the text that the chat template makes of it. Whatever it raises is
    a jinja2.TemplateError, or a TypeError."""
    try:
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except (jinja2.TemplateError, TypeError):
        raise
    # a template is a program of others: 1 // 0, a macro that calls itself, 'x' * 10**10
    except Exception as broken:
        raise jinja2.TemplateError(f"{type(broken).__name__}: {broken}") from None


def check_template(tokenizer) -> None:
    """Refuse a chat template that takes more than TEMPLATE_BYTES or TEMPLATE_SECONDS of processor
    time for two words: it is tried in a child, which may be killed."""
    if not hasattr(os, "fork"):  # Windows
        return
    import resource

    child = os.fork()
    if not child:
        code = 1
        try:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            most = pages * resource.getpagesize() + TEMPLATE_BYTES
            resource.setrlimit(resource.RLIMIT_AS, (most, most))
            resource.setrlimit(resource.RLIMIT_CPU, (TEMPLATE_SECONDS, TEMPLATE_SECONDS))
            render(tokenizer, [{"role": role, "content": "x"} for role in ("user", "assistant")])
            code = 0
        except (jinja2.TemplateError, TypeError) as refused:  # which is told where rows are read
            code = 2 if "MemoryError" in str(refused) else 0
        finally:
            os._exit(code)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 2:
        long = os.WIFSIGNALED(status)
        files.fail(
            f"the chat template of {tokenizer.name_or_path} does not end",
            f"more than {TEMPLATE_SECONDS} s"
            if long
            else f"{files.human(TEMPLATE_BYTES)} and more",
            "a conversation of two words rendered at once",
            "another chat_template in tokenizer_config.json (or chat_template.jinja)",
        )


def prompt_ids(tokenizer, messages: list[dict]) -> list[int]:
    """Return the token ids to generate an answer from: exactly what training saw before the
    answer's first target."""
    try:
        text = render(tokenizer, messages, add_generation_prompt=True)
    except (jinja2.TemplateError, TypeError) as refused:
        files.fail("the chat template refused the conversation", seen=refused)
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def is_conversation(messages: object) -> bool:
    """Return whether a value from JSON is a list of at least one {"role": "...", "content":
    "..."}."""

    def whole(message: object) -> bool:
        if not isinstance(message, dict):
            return False
        return isinstance(message.get("role"), str) and isinstance(message.get("content"), str)

    return isinstance(messages, list) and bool(messages) and all(map(whole, messages))


def with_system(messages: list[dict], system: str | None) -> list[dict]:
    """Return the messages with the system prompt before them, where there is one and they bring
    none of their own."""
    if system and [message["role"] for message in messages[:1]] != ["system"]:
        return [{"role": "system", "content": system}, *messages]
    return messages


def traces(text: str) -> list[Span] | None:
    """Return the (start, end) characters of the reasoning traces in an answer, or None if one of
    them is never closed.

    A trace goes from <think> to </think> and the blanks that follow. Where </think> comes first,
    the generation prompt had opened the trace (DeepSeek-R1), and it begins with the answer:
    traces("hm</think>\\n\\nYes") == [(0, 12)].
    """
    found, end = [], 0
    start = text.find(OPEN)
    if text.find(CLOSE, 0, start if start >= 0 else None) >= 0:
        start = 0
    while start >= 0:
        close = text.find(CLOSE, start)
        if close < 0:
            return None
        begin, end = start if text[end:start].strip() else end, close + len(CLOSE)
        end += len(text) - end - len(text[end:].lstrip())
        found.append((begin, end))
        start = text.find(OPEN, end)
    return found


def without_think(messages: list[dict]) -> list[dict]:
    """Return the conversation without the reasoning traces of its assistant turns: what --think
    drop renders."""
    shown = []
    for message in messages:
        text = message["content"]
        if message["role"] == "assistant":
            found = traces(text)
            assert found is not None, text
            for start, end in reversed(found):
                text = text[:start] + text[end:]
        shown.append({**message, "content": text})
    return shown


def texts_of(role: str, messages: list[dict]) -> list[str]:
    """Return what one role says."""
    return [message["content"] for message in messages if message["role"] == role]


def fault(messages: list[dict], think: str = "keep") -> str | None:
    """Return why a conversation cannot be used (the reason it is counted under), or None."""
    if any(message["role"] not in ROLES for message in messages):
        return "unknown role"
    if any(not isinstance(message["content"], str) for message in messages):
        return "not text"
    if any(BROKEN.search(message["content"]) for message in messages):
        return "broken Unicode"
    if think != "keep":
        if any(traces(text) is None for text in texts_of("assistant", messages)):
            return "unclosed think"
        messages = without_think(messages)
    asked = texts_of("user", messages)
    answered = any(text.strip() for text in texts_of("assistant", messages))
    return None if answered and (not asked or any(text.strip() for text in asked)) else "empty"


def is_answer(message: dict) -> bool:
    """Return whether a message is an assistant's turn that says something."""
    return message["role"] == "assistant" and bool(message["content"].strip())


def last_answer(messages: list[dict]) -> int:
    """Return the place of the last answer; what comes after it is not used."""
    return max(place for place, message in enumerate(messages) if is_answer(message))


def coda(tokenizer) -> str:
    """Return eos_token if the template closes every conversation with it, after the end of turn and
    whoever spoke last (Phi-3).

    It belongs to no turn: `answer_spans` leaves it out, or no earlier answer would be a prefix, and
    the model would learn to go on after the token that ends its turn.
    """
    eos, asked = tokenizer.eos_token, [{"role": "user", "content": "x"}]
    try:
        closed = render(tokenizer, asked)
        prompt = render(tokenizer, asked, add_generation_prompt=True)
    except (jinja2.TemplateError, TypeError):
        return ""
    if not eos or not closed.endswith(eos) or prompt.startswith(closed):
        return ""
    ends = tuple(tokenizer.convert_ids_to_tokens(special_ids(tokenizer)))
    return eos if closed.removesuffix(eos).rstrip().endswith(ends) else ""


def answer_spans(
    tokenizer, messages: list[dict], turns: str = "all", closing: str = ""
) -> tuple[str, list[Span]]:
    """Render a conversation up to its last answer; return the text and the (start, end) characters
    of each answer to learn.

    Left out: a turn that fails the prefix rule (see the module), a blank one, one with nothing
    before it, and with turns="last" all but the last. `closing`: the template's `coda`. Raises
    jinja2.TemplateError or TypeError where the template refuses the conversation (a system message
    in Gemma 2).
    """
    last = last_answer(messages)
    messages = messages[: last + 1]

    def show(some: list[dict]) -> str:
        return render(tokenizer, some).removesuffix(closing)

    def ask(some: list[dict]) -> str:
        return render(tokenizer, some, add_generation_prompt=True)

    whole, prompt = show(messages), ask(messages[:last]) if last else ""
    if not whole.startswith(prompt) and messages[last - 1]["role"] == "user":
        # Mistral writes the system message into the last question, and nowhere once that is
        # answered: take the prompt that chat would send, and behind it the answer as the template
        # writes it after its question alone
        question, both = ask(messages[last - 1 : last]), show(messages[last - 1 :])
        whole = prompt + both.removeprefix(question) if both.startswith(question) else whole
    spans = []
    for turn in [last] if turns == "last" else range(1, last + 1):
        if turn == 0 or not is_answer(messages[turn]):
            continue
        before, end = prompt, whole
        if turn != last:
            before, end = ask(messages[:turn]), show(messages[: turn + 1])
        if whole.startswith(before) and whole.startswith(end) and len(before) < len(end):
            spans.append((len(before), len(end)))
    return whole, spans


def rewrites(tokenizer) -> bool:
    """Return whether the template shows an earlier answer otherwise than it was given (Qwen3), so
    that only the last can be learnt."""
    talk = [{"role": role, "content": "x"} for role in ("user", "assistant") * 2]
    try:
        return len(answer_spans(tokenizer, talk, closing=coda(tokenizer))[1]) == 1
    except (jinja2.TemplateError, TypeError):
        return False


def answer_mask(
    ids: list[int],
    offsets: list[Span],
    text: str,
    spans: list[Span],
    special: set[int],
    masked: Sequence[Span] = (),
) -> np.ndarray:
    """Return which tokens are targets, (L,) bool: those that start inside a span, up to the span's
    end-of-turn token.

    The end of turn is the last special token of the span if only blanks follow it there (ChatML's
    line break). All tokens of an emoji or a rare character share one offset pair, and all count. A
    token with no characters where a span begins (the lone space that GPT-2's offsets trim away)
    belongs to the prompt: hence `end > first`. A token all of whose characters are `masked` is no
    target.
    """
    begins, ends = np.array(offsets, np.int64).reshape(-1, 2).T  # (L,) each
    answer = np.zeros(len(ids), bool)
    for first, stop in spans:
        inside = np.flatnonzero((begins >= first) & (begins < stop) & (ends > first))
        closers = [place for place in inside if ids[place] in special]
        if closers and not text[ends[closers[-1]] : stop].strip():
            inside = inside[inside <= closers[-1]]
        answer[inside] = True
    for first, stop in masked:
        answer[(begins >= first) & (ends <= stop)] = False
    answer[:1] = False  # nothing predicts the first token
    return answer


@dataclass(frozen=True)
class Rendered:
    """A row as text: where its answers lie, and what in them is no target. spans None: a plain
    text, of which every token but the first is one."""

    text: str
    spans: list[Span] | None = None
    masked: Sequence[Span] = ()


def render_row(
    tokenizer, row: list[dict] | str, turns: str, think: str, closing: str
) -> Rendered | str:
    """Return a conversation or a plain text as it is tokenized, or the reason why it cannot be
    used. See `encode`; `closing`: the template's `coda`."""
    if isinstance(row, str):
        if not row.strip():
            return "empty"
        return "broken Unicode" if BROKEN.search(row) else Rendered(row)
    if (reason := fault(row, think)) is not None:
        return reason
    try:
        shown = without_think(row) if think == "drop" else row
        text, spans = answer_spans(tokenizer, shown, turns, closing)
    except (jinja2.TemplateError, TypeError) as refused:
        return f"refused by the chat template ({' '.join(str(refused).split())[:80]})"
    if not spans:
        return "rewritten by the chat template" if last_answer(row) else "no target"
    masked = []
    for start, stop in spans if think == "mask" else ():
        found = traces(text[start:stop])
        if found is None:  # the template cut the end off
            return "unclosed think"
        masked += [(start + begin, start + end) for begin, end in found]
    return Rendered(text, spans, masked)


def encode(
    tokenizer, rows: Sequence[list[dict] | str], turns: str = "all", think: str = "keep"
) -> list[tuple[np.ndarray, np.ndarray] | str]:
    """Turn conversations (or plain texts) into (ids (L,) uint32, answer (L,) bool); a row that
    cannot be used into the reason why.

    A conversation is tokenized once, as a whole and with add_special_tokens=False: the template
    wrote its BOS, if there is one. A plain text gets BOS where the tokenizer adds it, and eos where
    there is one; every token but the first is a target.

    turns  "all": every answer of a conversation is learnt, "last": the last one only.
    think  "keep": traces are learnt like the rest; "drop": they are taken out before the template
           sees the answer; "mask": they stay in the text, and everything from <think> to </think>
           and the blanks that follow is no target. The tags too: a student that learnt </think>
           alone would be taught to end a thought that it was never taught to begin. An empty block
           that the template itself puts before an answer (Qwen3) is a trace like any other, and no
           part of what "drop" takes out.
    """
    if not tokenizer.is_fast:
        files.fail(
            f"the tokenizer {tokenizer.name_or_path} gives no character offsets",
            seen="a slow tokenizer",
            wanted="one with tokenizer.json",
        )
    closing = coda(tokenizer) if any(not isinstance(row, str) for row in rows) else ""
    rendered = [render_row(tokenizer, row, turns, think, closing) for row in rows]
    texts = [row.text for row in rendered if isinstance(row, Rendered)]
    if not texts:
        return [row for row in rendered if isinstance(row, str)]
    encodings = iter(tokenizer(texts, add_special_tokens=False, verbose=False).encodings)
    special = special_ids(tokenizer)
    bos = [tokenizer.bos_token_id] if adds_bos(tokenizer) else []
    eos = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    encoded: list[tuple[np.ndarray, np.ndarray] | str] = []
    for row in rendered:
        if isinstance(row, str):
            encoded.append(row)
            continue
        encoding = next(encodings)
        ids = encoding.ids
        if row.spans is None:
            ids = (bos if ids[:1] != bos else []) + ids + (eos if ids[-1:] != eos else [])
            answer = np.arange(len(ids)) > 0
        else:
            answer = answer_mask(ids, encoding.offsets, row.text, row.spans, special, row.masked)
        encoded.append((np.array(ids, np.uint32), answer) if answer.any() else "no target")
    return encoded
