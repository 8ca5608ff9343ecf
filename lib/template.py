"""From a conversation to token ids and an answer mask, through the tokenizer's own chat template.

Contract: `encode` marks as targets exactly the tokens that the model must write itself: the text of
every assistant turn and its end-of-turn token; nothing that the generation prompt supplies, nothing
after the end of turn.

How an answer is found, with no help from the template (most have no `{% generation %}`): the
conversation up to the turn, rendered with its generation prompt, must be a prefix of the whole
rendered conversation, and so must the conversation up to and with the turn; what lies between the
two is the answer. Where a template rewrites earlier turns (Qwen3), that fails, and the turn is
context only.

A message is {"role", "content"}, both text, and where it has them: `reasoning_content`,
`tool_calls`, `name`, `tool_call_id`, in the first one the conversation's `tools`; "learn": False is
an answer that is context only. What the template does not write of them stands in the content
(`spelled_out`): a trace between <think> and </think>, tools and calls as Hermes and Qwen have them.

Reasoning traces (`traces`) are targets like the rest, or dropped from the text, or masked: they
stay in the text and are no targets.

Worked example (ChatML):

    whole    <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\nHello!<|im_end|>\\n
    prompt   <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\n
    targets                                                         Hello!<|im_end|>   (no last \\n)
"""

import functools
import hashlib
import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from tokenizers import Tokenizer

from lib import files

Span = tuple[int, int]  # the first character of a part of a text, and the one after its last

ROLES = ("system", "user", "assistant", "tool")
# a reasoning trace, as Qwen3, DeepSeek-R1 and their students write it
OPEN, CLOSE = "<think>", "</think>"
EMPTY_TRACE = re.compile(r"<think>\s*</think>\s*$")  # at the end of a generation prompt
CLOSED = re.compile(rf"{CLOSE}\s*")
# half a surrogate pair, from an escape in JSON that was cut: no tokenizer takes it
BROKEN = re.compile("[\ud800-\udfff]")

# what a tokenizer is tried on, beside its special tokens: all that classes cut in their own way
TRIAL = (
    "Room 1234 costs 98765.43, 10203 in 2024; it's I'LL",
    " a  b\n\n\tif (x != y[0]) { return f_12->next; }  # done\r\n   ",
    "漢字かな 한국어, 中文1999年。Ünïcödé ﬁ e\u0301 اللغة ١٢٣ हिन्दी",
    "🙂👩\u200d👩\u200d👧 🇩🇪 <b>x</b> https://a.bc/?q=1&r=%20",
)
# what a template's argument cannot be called
RESERVED = frozenset(
    "messages tools documents chat_template add_generation_prompt strftime_now raise_exception"
    " tokenize continue_final_message return_assistant_tokens_mask conversation padding truncation"
    " max_length return_tensors return_dict tokenizer_kwargs sanitize_control_tokens self"
    " namespace dict range loop true false none True False None and or not in is if else for set"
    " macro block filter call import include from with".split()
)

# what a message carries that is never rendered
ASIDE = ("written", "learn")
SPELLED_OUT = ("reasoning_content", "tool_calls", "tools")  # in the content, if need be
# what a template without tools is told of them, in the words of Hermes and Qwen
TOOLS = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are"
    " provided with function signatures within <tools></tools> XML tags:\n<tools>\n{tools}\n"
    "</tools>\n\nFor each function call, return a json object with function name and arguments"
    ' within <tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, "arguments":'
    " <args-json-object>}\n</tool_call>"
)


@files.telling("loading a tokenizer")
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
    files.refuse_pointers(Path(name))
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
    stored = made_by(Tokenizer.from_file, file)
    stored.no_truncation()
    special = [token.content for token in stored.get_added_tokens_decoder().values()][:8]
    texts = [*TRIAL, *(f"{token} 1 a{token}b\n {token}" for token in special)]
    wanted = plain_ids(stored, texts)
    seen = plain_ids(made.backend_tokenizer, texts) if made else None
    more = {*made.get_vocab()} - {*stored.get_vocab()} if made else set()
    if seen == wanted and not more:
        return made
    if seen is not None and wanted is not None and seen != wanted:
        text, ids, own = next(parts for parts in zip(texts, seen, wanted) if parts[1] != parts[2])
        why = f"makes {len(ids)} tokens of {text!r} where its tokenizer.json makes {len(own)}"
    elif more:
        why = f"has tokens that its tokenizer.json has not ({', '.join(sorted(more)[:4])})"
    if made and seen != wanted and type(stored.model).__name__ == "WordPiece":
        files.fail(
            f"the tokenizer {name} means two things",
            f"tokenizer_config.json's {kind} {why}",
            "one meaning",
            "the do_lower_case and strip_accents that the model was trained with, in both files",
        )
    plain = made_by(PreTrainedTokenizerFast.from_pretrained, name)
    if made and seen is not None and plain_ids(plain.backend_tokenizer, texts) == seen:
        # not the class but a setting of tokenizer_config.json (add_prefix_space, a token added)
        if plain.get_vocab() == made.get_vocab():
            return made
    print(
        f"tokenizer: {name}: tokenizer_config.json's class {kind} {why or 'does not read it'}:"
        " tokenizer.json is followed",
        flush=True,
    )
    return plain


def made_by(library: Callable[[Any], Any], name) -> Any:
    """Return what a library makes of a file; whatever it raises of a broken one is a ValueError."""
    try:
        return library(name)
    except Exception as broken:  # tokenizers' has no kind of its own, transformers' has several
        raise ValueError(f"{name}: {broken}") from None


def plain_ids(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]] | None:
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


def token_names(tokenizer) -> dict[int, str]:
    """Return what a tokenizer calls its tokens, by id."""
    return {number: token for token, number in tokenizer.get_vocab().items()}


def named_apart(one: dict[int, str], other: dict[int, str]) -> list[int]:
    """Return the ids, in order, that two tokenizers' names give different tokens, or that only one
    of them has: the logits of such an id mean two things."""
    return sorted(id for id in one.keys() | other.keys() if one.get(id) != other.get(id))


def adds_bos(tokenizer) -> bool:
    """Return whether the tokenizer puts bos_token before plain text."""
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("a")["input_ids"][:1] == [bos]


def bad_arguments(args: object) -> str | None:
    """Return what is wrong with arguments for a chat template, from JSON, or None."""
    if not isinstance(args, dict):
        return "no object"
    for name in args:
        if not re.fullmatch(r"[a-zA-Z]\w*", name) or name in RESERVED:
            return f"the name {name[:60]!r}"
    return "half a character" if BROKEN.search(_json(args)) else None


def special_ids(tokenizer) -> set[int]:
    """Return the ids of all special tokens, those of the chat template (<|im_end|>, <|eot_id|>)
    among them."""
    added = tokenizer.added_tokens_decoder.items()
    return {number for number, token in added if token.special} | set(tokenizer.all_special_ids)


def beside_text(message: dict) -> dict:
    """Return what a message says beside its role and its content."""
    return {name: message[name] for name in message if name not in ("role", "content", *ASIDE)}


def render(
    tokenizer, messages: list[dict], add_generation_prompt: bool = False, **more: object
) -> str:
    """Return the conversation as the text that the chat template makes of it; `more`: its
    arguments. Whatever the template raises is a jinja2.TemplateError, or a TypeError."""
    tools = None
    if any(beside_text(message) for message in messages):
        messages, tools = spelled_out(tokenizer, messages)
    try:
        return tokenizer.apply_chat_template(
            messages,
            tools=tools,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            **more,
        )
    except (jinja2.TemplateError, TypeError):
        raise
    # a template is a program of others: 1 // 0, a macro that calls itself, 'x' * 10**10
    except Exception as broken:
        raise jinja2.TemplateError(f"{type(broken).__name__}: {broken}") from None


def spelled_out(tokenizer, messages: list[dict]) -> tuple[list[dict], list[dict] | None]:
    """Return (messages, tools) as the template is to be given them: what it does not write by
    itself stands in the content."""
    tools = next((message["tools"] for message in messages if message.get("tools")), None)
    shown = []
    for message in messages:
        own = {"role": message["role"], "content": message["content"], **beside_text(message)}
        own.pop("tools", None)
        if calls := own.get("tool_calls"):
            own["tool_calls"] = [with_arguments(call) for call in calls]
            if not writes(tokenizer, "assistant", "tool_calls"):
                text = [
                    f"<tool_call>\n{_json(_function(c))}\n</tool_call>" for c in own["tool_calls"]
                ]
                own["content"] = "\n".join([*filter(None, [own["content"]]), *text])
                del own["tool_calls"]
        if thought := own.pop("reasoning_content", None):
            if writes(tokenizer, "assistant", "reasoning_content"):
                own |= {"reasoning_content": thought, "thinking": thought}  # gpt-oss: the second
            else:
                own["content"] = f"{OPEN}\n{thought.strip()}\n{CLOSE}\n\n{own['content']}"
        shown.append(own)
    if tools and not writes(tokenizer, "user", "tools"):
        told = TOOLS.replace("{tools}", "\n".join(map(_json, tools)))
        if shown[0]["role"] == "system":
            told = f"{shown.pop(0)['content']}\n\n{told}"
        shown.insert(0, {"role": "system", "content": told})
        tools = None
    return shown, tools


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def _function(call: dict) -> dict:
    """Return the name and the arguments of a call."""
    inner = call.get("function", call)
    return {"name": inner.get("name"), "arguments": inner.get("arguments") or {}}


def with_arguments(call: dict) -> dict:
    """Return a call whose arguments are an object, where they are JSON text of one (OpenAI's
    form): that is what templates want."""
    inner = call.get("function")
    if not isinstance(inner, dict) or not isinstance(inner.get("arguments"), str):
        return call
    try:
        read = json.loads(inner["arguments"] or "{}")
    except (ValueError, RecursionError):
        return call
    return {**call, "function": {**inner, "arguments": read}} if isinstance(read, dict) else call


def writes(tokenizer, role: str, name: str) -> bool:
    """Return whether the chat template writes this of a message of that role ("tool_calls",
    "tool_calls.id", ...), or the tools of a conversation."""
    return _writes(tokenizer, str(tokenizer.chat_template), role, name)


@functools.lru_cache(maxsize=256)
def _writes(tokenizer, template: str, role: str, name: str) -> bool:
    mark = "zqjvzqjvz"  # an id is nine characters, to Mistral
    asked = {"role": "user", "content": "x"}
    call = {"id": "abcdefghi", "type": "function", "function": {"name": "x", "arguments": {}}}
    about = {"description": "x", "parameters": {"type": "object", "properties": {}}}
    named = mark if name == "tools" else "x"
    tools = [{"type": "function", "function": {"name": named, **about}}]
    said: dict = {"role": role, "content": "x"}
    if name == "tool_calls":
        said["tool_calls"] = [{**call, "function": {"name": mark, "arguments": {"x": mark}}}]
        said["content"] = ""
    elif name.startswith("tool_calls."):
        said |= {"tool_calls": [{**call, name.partition(".")[2]: mark}], "content": ""}
    elif name == "reasoning_content":
        said |= {"reasoning_content": mark, "thinking": mark}
    elif name != "tools":
        said[name] = mark
    talk = [asked, said] if role != "user" else [said]
    if role == "tool":
        said = {"name": "x", "tool_call_id": "abcdefghi", **said}
        talk = [asked, {"role": "assistant", "content": "", "tool_calls": [call]}, said]
    with_tools = None if name == "reasoning_content" else tools
    try:
        text = tokenizer.apply_chat_template(talk, tools=with_tools, tokenize=False)
    except (jinja2.TemplateError, TypeError):
        return False
    return text.count(mark) >= (2 if name == "tool_calls" else 1)


def prompt_ids(tokenizer, messages: list[dict], **more: object) -> list[int]:
    """Return the token ids to generate an answer from: exactly what training saw before the
    answer's first target. `more`: arguments of the template."""
    try:
        text = render(tokenizer, messages, add_generation_prompt=True, **more)
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
        if (close := CLOSED.search(text, start)) is None:
            return None
        begin, end = start if text[end:start].strip() else end, close.end()
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
            ends = [0, *(place for span in found for place in span), len(text)]
            text = "".join(text[ends[i] : ends[i + 1]] for i in range(0, len(ends), 2))
        kept = {name: value for name, value in message.items() if name != "reasoning_content"}
        shown.append({**kept, "content": text})
    return shown


def texts_of(role: str, messages: list[dict]) -> list[str]:
    """Return what one role says."""
    return [message["content"] for message in messages if message["role"] == role]


def fault(messages: list[dict], think: str = "keep") -> str | None:
    """Return why a conversation cannot be used (the reason it is counted under), or None."""
    if unknown := {message["role"] for message in messages} - {*ROLES}:
        return f"unknown role {', '.join(sorted(unknown))[:60]}".rstrip()
    if any(not isinstance(message["content"], str) for message in messages):
        return "not text"
    for message in messages:
        more = beside_text(message)
        if BROKEN.search(message["content"]) or more and BROKEN.search(_json(more)):
            return "broken Unicode"
    if think != "keep":
        if any(traces(text) is None for text in texts_of("assistant", messages)):
            return "unclosed think"
        messages = without_think(messages)
    asked = texts_of("user", messages)
    if asked and not any(text.strip() for text in asked) or not any(map(speaks, messages)):
        return "empty"
    return None if any(map(is_answer, messages)) else "marked as not to be learnt"


def speaks(message: dict) -> bool:
    """Return whether a message is an assistant's turn that says or calls something."""
    said = message["content"].strip() or message.get("tool_calls")
    return message["role"] == "assistant" and bool(said)


def is_answer(message: dict) -> bool:
    """Return whether a message is an assistant's turn to be learnt."""
    return speaks(message) and message.get("learn", True)


def last_answer(messages: list[dict]) -> int:
    """Return the place of the last answer; what comes after it is not used."""
    return max(place for place, message in enumerate(messages) if is_answer(message))


def reference(tokenizer, messages: list[dict]) -> str:
    """Return the last answer as a model writes it: its text, or with a call or a trace of its own
    what the template makes of it, without its end of turn."""
    answer = messages[last_answer(messages)]
    if not beside_text(answer).keys() & {"tool_calls", "reasoning_content"}:
        return answer["content"]
    text, spans = answer_spans(tokenizer, messages, "last")
    ids = tokenizer(text[slice(*spans[0])], add_special_tokens=False, verbose=False)["input_ids"]
    return tokenizer.decode(ids, skip_special_tokens=True).strip()


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
    if not whole.startswith(prompt) and (opened := EMPTY_TRACE.search(prompt)):
        # enable_thinking=False, of a template that shows the empty trace in its prompt alone
        head = prompt[: opened.start()]
        whole = prompt + whole[len(head) :] if whole.startswith(head) else whole
    spans = []
    for turn in [last] if turns == "last" else range(1, last + 1):
        if turn == 0 or not is_answer(messages[turn]):
            continue
        before, end = prompt, whole
        if turn != last:
            before, end = ask(messages[:turn]), show(messages[: turn + 1])
            if messages[turn].get("tool_calls") and not whole.startswith(end):
                # Qwen3 opens a call with an empty trace, and once it is answered with none
                (_, cut), *_ = traces(end[len(before) :]) or [(0, 0)]
                end = before + end[len(before) + cut :]
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


class Marked(str):
    """A conversation as the chat template wrote it: its answers are found by what stands around
    them."""


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
        if BROKEN.search(row):
            return "broken Unicode"
        return by_marks(tokenizer, row, turns, think) if isinstance(row, Marked) else Rendered(row)
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
    for place, (start, stop) in enumerate(spans if think == "mask" else ()):
        found = traces(text[start:stop])
        if found is None:  # the template cut the end off
            return "unclosed think"
        if not found and any("reasoning_content" in message for message in row):
            bare, others = answer_spans(tokenizer, without_think(row), turns, closing)
            if len(others) == len(spans):
                found = [_inserted(text[start:stop], bare[slice(*others[place])])]
        masked += [(start + begin, start + end) for begin, end in found]
    return Rendered(text, spans, masked)


@functools.lru_cache(maxsize=16)
def marks(tokenizer, template: str) -> tuple[str, str, str, str, str]:
    """Return what its chat template writes first (bos, if it does), before an answer
    ("<|im_start|>assistant", the blanks that follow, an empty trace), and after it
    ("<|im_end|>")."""
    asked, said = ({"role": role, "content": "zqj"} for role in ("user", "assistant"))
    closing = coda(tokenizer)
    try:
        shown = render(tokenizer, [asked]).removesuffix(closing)
        whole = render(tokenizer, [asked, said]).removesuffix(closing)
        prompt = render(tokenizer, [asked], add_generation_prompt=True)
    except (jinja2.TemplateError, TypeError) as refused:
        files.fail("the chat template refused a conversation of two words", seen=refused)
    # Mistral's generation prompt adds nothing: the end of the question begins the answer
    begin = prompt.removeprefix(shown) if prompt != shown else shown[shown.rindex("zqj") + 3 :]
    end = whole[whole.rindex("zqj") + 3 :].strip()
    trace = "".join(EMPTY_TRACE.findall(begin))
    begin = begin.removesuffix(trace).lstrip()
    if not begin.strip() or not end:
        files.fail(
            f"the chat template of {tokenizer.name_or_path} does not mark where answers begin and"
            " end",
            wanted="rows that it is to render: prompts and answers, or messages",
        )
    bos = tokenizer.bos_token or ""
    blanks = begin[len(begin.rstrip()) :]
    return bos if whole.startswith(bos) else "", begin.rstrip(), blanks, trace, end


def by_marks(tokenizer, text: str, turns: str, think: str) -> Rendered | str:
    """Return a conversation that is rendered already, its answers by what stands around them; one
    that is cut ends where it is cut."""
    bos, begin, blanks, trace, end = marks(tokenizer, str(tokenizer.chat_template))
    before = "{}(?:{}(?:{})?)?".format(*map(re.escape, (begin, blanks, trace)))
    text = text if text.startswith(bos) else bos + text
    spans: list[Span] = []
    for found in re.finditer(before, text):
        stop = text.find(end, found.end())
        if spans and found.start() < spans[-1][1]:  # or else it would hold the turn behind it
            return f"an answer without {end!r}, which ends it in the chat template"
        spans.append((found.end(), stop + len(end) if stop >= 0 else len(text)))
    if not spans:
        return f"without {begin!r}, which begins an answer in the chat template"
    masked: list[Span] = []
    for start, stop in spans if think != "keep" else ():
        if (traced := traces(text[start:stop])) is None:
            return "unclosed think"
        masked += [(start + first, start + last) for first, last in traced]
    if think == "drop":
        for start, stop in reversed(masked):
            trace = text[start:stop]
            if not EMPTY_TRACE.fullmatch(trace):
                blanks = trace[: len(trace) - len(trace.lstrip())]  # of the template (Mistral's)
                text = text[:start] + blanks + text[stop:]
        return by_marks(tokenizer, text, turns, "keep")
    return Rendered(text, spans[-1:] if turns == "last" else spans, masked)


def _inserted(text: str, bare: str) -> Span:
    """Return where `text` has what `bare` has not: the trace of a template with tags of its
    own."""
    after = len(os.path.commonprefix([text[::-1], bare[::-1]]))
    before = len(os.path.commonprefix([text, bare[: len(bare) - after]]))
    return before, len(text) - after


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
