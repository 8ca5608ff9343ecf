"""A teacher whose tokenizer is another one: --map-vocabulary, --align bytes."""

import json
import math
import random
import shlex
import shutil
import types

import make
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny_tokenizers as tiny
import torch
from references import BETAS, reference_divergence
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import dump_logits
import prepare_data
import stage2_kd
from lib import data, files, losses, template
from lib import models as lib_models
from lib import teacher as teachers
from lib.head import Head
from lib.losses import Method, TopK
from lib.teacher import across, logits, record, reread, several, translate, writer

MERGES = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("a", "n"), ("an", "d"), ("Ġ", "and"), ("i", "n")]
OTHER = [("h", "e"), ("t", "he"), ("n", "d"), ("a", "nd"), ("Ġ", "a"), ("1", "2"), ("i", "s")]
RENAMED = {"<|im_start|>": "<|turn|>", "<|im_end|>": "<|end of turn|>"}
TURNS = (
    "{{ '<s>' }}{% for m in messages %}{{ '<|turn|>' + m.role + ': ' + m.content +"
    " '<|end of turn|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|turn|>assistant: ' }}"
    "{% endif %}"
)
WORDS = "the and in this then 12 island; \n  handle! naïve 漢字 🙂 others".split(" ")


def sentence(rng, count):
    return " ".join(rng.choice(WORDS) for _ in range(count))


def conversations(count, seed=0):
    """Questions and answers, every third with an earlier answer."""
    rng, rows = random.Random(seed), []
    for number in range(count):
        said = [
            sentence(rng, rng.randint(1, 6)) or "the" for _ in range(4 if number % 3 == 0 else 2)
        ]
        rows.append({"messages": tiny.chat(*(f"{number} {text} and" for text in said))})
    return rows


def permuted(tokenizer, renamed=RENAMED, chat_template=None, seed=1):
    """The same tokenizer with other ids and other names of special tokens; and the id that each of
    its ids was."""
    made = json.loads(tokenizer.backend_tokenizer.to_str())
    vocab = made["model"]["vocab"]
    order = torch.randperm(len(vocab), generator=torch.Generator().manual_seed(seed)).tolist()
    made["model"]["vocab"] = {name: order[number] for name, number in vocab.items()}
    before = np.arange(len(tokenizer))
    before[order] = np.arange(len(vocab))
    for token in made["added_tokens"]:
        token["content"] = renamed.get(token["content"], token["content"])
    named = {role: renamed.get(name, name) for role, name in tokenizer.special_tokens_map.items()}
    inner = Tokenizer.from_str(json.dumps(made))
    result = PreTrainedTokenizerFast(tokenizer_object=inner, **named)
    shown = tokenizer.chat_template
    for old, new in renamed.items():
        shown = shown.replace(old, new)
    result.chat_template = chat_template or shown
    return result, before


def prepared(folder, tokenizer, rows, name="data"):
    tokenizer.save_pretrained(folder / "tokenizer")
    pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet")
    words = ["--source", folder / "rows.parquet", "--tokenizer", folder / "tokenizer", "--export"]
    make.call(prepare_data.main, *words, "--out", folder / name, "--val", 6, "--workers", 1)
    return data.Dataset(folder / name)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Data of one tokenizer with its own teacher; `permuted`: the same teacher by another name of
    each token, and `turns`: with a template of its own; `other`: of another tokenizer."""
    folder = tmp_path_factory.mktemp("across")
    ours = tiny.tiny(merges=MERGES)
    dataset = prepared(folder, ours, conversations(40))
    size = len(ours)
    make.model(folder / "teacher", vocab=size, with_tokenizer=ours)
    make.model(folder / "student", seed=1, vocab=size, with_tokenizer=ours)
    module = AutoModelForCausalLM.from_pretrained(folder / "teacher")
    for name, shown in (("permuted", None), ("turns", TURNS)):
        renamed = RENAMED if shown else {"<|im_end|>": "<|end of turn|>"}
        theirs, before = permuted(ours, renamed, chat_template=shown)
        with torch.no_grad():
            weight = module.get_input_embeddings().weight[torch.from_numpy(before)].clone()
        other = AutoModelForCausalLM.from_pretrained(folder / "teacher")
        other.get_input_embeddings().weight.data.copy_(weight)
        other.save_pretrained(folder / name)
        theirs.save_pretrained(folder / name)
    cut = tiny.tiny(
        TURNS.replace("<|end of turn|>", "<|eot|>").replace("<|turn|>", "<|head|>"),
        eos="<|eot|>",
        merges=OTHER,
    )
    make.model(folder / "other", seed=4, vocab=len(cut), with_tokenizer=cut)
    assert len(dataset.train.rows) > 30
    return folder


def dumped(folder, teacher, *more, out):
    words = ["--data", folder / "data", "--teacher", folder / teacher, "--out", folder / out]
    make.call(dump_logits.main, *words, "--k", 8, *make.CPU, *more)
    return logits.Records(folder / out, data.Dataset(folder / "data"), None)


# --- what is one token to both


def test_groups_are_the_shortest_stretches_of_the_same_bytes():
    assert reread.groups([b"un", b"happy", b"!"], [b"un", b"hap", b"py", b"!"]) == [
        (0, 1, 0, 1),
        (1, 2, 1, 3),
        (2, 3, 3, 4),
    ]
    rng = random.Random(0)
    for _ in range(200):
        text = bytes(rng.choice(b"ab\xc3\xa9") for _ in range(rng.randint(1, 30)))

        def cut():
            ends = sorted({*rng.choices(range(1, len(text) + 1), k=rng.randint(0, 12)), len(text)})
            return [text[a:b] for a, b in zip([0, *ends], ends)]

        ours, theirs = cut(), cut()
        found = reread.groups(ours, theirs)
        assert [place for a, b, _, _ in found for place in range(a, b)] == [*range(len(ours))]
        assert [place for *_, c, d in found for place in range(c, d)] == [*range(len(theirs))]
        for a, b, c, d in found:
            assert b"".join(ours[a:b]) == b"".join(theirs[c:d])
            inner = {len(b"".join(ours[a:i])) for i in range(a + 1, b)}
            assert not inner & {len(b"".join(theirs[c:i])) for i in range(c + 1, d)}


def test_where_the_texts_part_nothing_is_paired_until_they_go_on_alike():
    assert reread.groups([b"a", b"b", b"c"], [b"a", b"X", b"c"]) == [(0, 1, 0, 1)]
    ours = [b"caf", b"e\xcc\x81", b" au", b" lait"]  # composed by the other's normalizer
    theirs = [b"caf\xc3\xa9", b" ", b"au lait"]
    assert reread.groups(ours, theirs) == [(2, 4, 1, 3)]
    assert reread.groups([b"ab", b"c"], [b"a", b"bX"]) == []
    assert reread.alike(b"caffe latte", b"cafe latte") == [(0, 0, 3), (4, 3, 7)]
    assert reread.alike(b"a" * 50 + b"b", b"c" * 50 + b"b") == []
    assert reread.groups([b"a"], []) == []


def test_a_blank_before_the_text_that_sentencepiece_writes_is_none():
    assert reread.groups([b"a", b"b"], [b" a", b"b"]) == [(0, 1, 0, 1), (1, 2, 1, 2)]
    assert reread.groups([b" ", b"a"], [b"a"]) == [(1, 2, 0, 1)]
    assert reread.groups([b" the", b" a"], [b"  ", b"the", b" a"]) == [(0, 1, 0, 2), (1, 2, 2, 3)]


def test_tokens_stand_for_the_bytes_that_a_tokenizer_makes_of_them():
    one = tiny.tiny(merges=MERGES)
    known = translate.bytes_of(one)
    for text in ("the naïve 漢字 🙂\n\tand", "\x00\xff \x7f"):
        ids = one(text, add_special_tokens=False)["input_ids"]
        assert b"".join(known[id] for id in ids) == text.encode()
    vocab = {"<unk>": 0, **{f"<0x{byte:02X}>": byte + 1 for byte in range(256)}}
    for piece in ("▁the", "▁", "t", "h", "e", "th", "the"):
        vocab[piece] = len(vocab)
    pieces = Tokenizer(
        models.BPE(
            vocab, [("t", "h"), ("th", "e"), ("▁", "the")], unk_token="<unk>", byte_fallback=True
        )
    )
    pieces.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback()])
    known = translate.bytes_of(PreTrainedTokenizerFast(tokenizer_object=pieces))
    assert known[vocab["▁the"]] == b" the" and known[vocab["<0x0A>"]] == b"\n"


def test_tokens_are_paired_by_their_bytes_and_special_ones_by_their_role(world):
    ours = template.load_tokenizer(world / "data" / "tokenizer")
    theirs, before = permuted(ours, chat_template=TURNS)
    table = translate.shared(ours, theirs, len(ours) + 2)
    assert table.lacking.tolist() == [
        ours.convert_tokens_to_ids("<|im_start|>"),
        len(ours),
        len(ours) + 1,
    ]
    there = table.theirs >= 0
    assert (before[table.theirs[there]] == np.flatnonzero(there)).all()
    assert table.roles["end of turn"] == tuple(
        one.convert_tokens_to_ids(name)
        for one, name in ((ours, "<|im_end|>"), (theirs, "<|end of turn|>"))
    )
    said = translate.table_said(table, ours, theirs)
    assert "<|end of turn|> is the student's <|im_end|>" in " ".join(said)


# --- --map-vocabulary


@pytest.mark.parametrize("flags", (["--tail-rank", 0], ["--tail-rank", 8, "--tail-bytes", 8]))
def test_records_of_the_same_teacher_with_other_ids_and_names_are_its_own(world, flags, capsys):
    kind = f"{flags[1]}"
    exact = ["--values", "fp16", *flags]
    plain = dumped(world, "teacher", *exact, "--temperatures", "1,2", out=f"plain{kind}")
    mapped = dumped(
        world,
        "permuted",
        "--map-vocabulary",
        "--student",
        world / "student",
        *exact,
        "--temperatures",
        "1,2",
        out=f"mapped{kind}",
    )
    assert "(100.00%) are one token to both" in capsys.readouterr().out
    assert (mapped.val.records["count"] == 8).all()
    for one, other in ((plain.val, mapped.val), (plain.parts[0], mapped.parts[0])):
        seen, wanted = (record.unpack(part.records, plain.vocab, 1) for part in (other, one))
        assert torch.equal(seen.ids, wanted.ids)
        torch.testing.assert_close(seen.gap, wanted.gap, atol=2e-3, rtol=0)
        for column, t in enumerate((1.0, 2.0)):
            seen, wanted = (
                record.unpack(part.records, plain.vocab, column) for part in (other, one)
            )
            p = [losses.teacher_logp(known, t).double() for known in (wanted, seen)]
            assert (p[0].exp() * (p[0] - p[1])).sum(1).abs().max() < 1e-6
    assert mapped.val.meta["teacher_ce"] == pytest.approx(plain.val.meta["teacher_ce"], rel=1e-6)


def scored_by_hand(folder, name, prompt, said, end):
    """Return a teacher's log-probabilities (n, V') in float64 at each of its own tokens of an
    answer, behind a prompt; and these tokens."""
    theirs = template.load_tokenizer(folder / name)
    module = AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float64).eval()

    def ids_of(text):
        return theirs(text, add_special_tokens=False)["input_ids"]

    before, own = ids_of(prompt), [*ids_of(said), theirs.convert_tokens_to_ids(end)]
    with torch.no_grad():
        z = module(torch.tensor([before + own])).logits[0]
    return z.log_softmax(1)[len(before) - 1 : -1], own


def rows_of(folder, split):
    path = folder / "data" / "rows" / f"{reread.TEXTS[split]}.parquet"
    return list(reread.messages_of(path))


def test_a_mapped_record_is_what_the_teacher_says_behind_its_own_prompt(world):
    """Against the model itself in float64: prompt by its own template, its mass on tokens that only
    it knows among the rest's."""
    mapped = dumped(
        world,
        "turns",
        "--map-vocabulary",
        "--tail-rank",
        0,
        "--values",
        "fp16",
        "--temperatures",
        "1,2",
        out="turns-mapped",
    )
    ours, theirs = (template.load_tokenizer(world / n) for n in ("tokenizer", "turns"))
    table = translate.shared(ours, theirs, mapped.vocab)
    there = np.flatnonzero(table.theirs >= 0)
    dataset, checked = data.Dataset(world / "data"), 0
    for row, messages in enumerate(rows_of(world, "val")):
        if len(messages) > 2:
            continue
        prompt = f"<s><|turn|>user: {messages[0]['content']}<|end of turn|><|turn|>assistant: "
        logp, own = scored_by_hand(
            world, "turns", prompt, messages[1]["content"], "<|end of turn|>"
        )
        batch = dataset.val.batch([[row]])
        known = mapped.val_at(batch, 2.0)
        assert len(own) == len(batch.labels) and known.count is None
        z = logp[:, table.theirs[there]]  # what both know
        softened = (logp / 2).log_softmax(1)
        for i, ids in enumerate(known.ids.tolist()):
            best = there[z[i].topk(8).indices.numpy()].tolist()
            assert ids == best
            p = torch.cat([softened[i, table.theirs[ids]], torch.zeros(1, dtype=torch.float64)])
            p[-1] = torch.log1p(-p[:-1].exp().sum())
            seen = losses.teacher_logp(known[slice(i, i + 1)], 2.0)[0]
            assert (p.exp() - seen.double().exp()).abs().max() < 1e-3
            checked += 1
    assert checked > 20


def test_of_an_earlier_answer_too_the_teacher_is_asked_behind_what_its_template_writes(world):
    split, dataset = "train", data.Dataset(world / "data")
    ours, theirs = (template.load_tokenizer(world / n) for n in ("tokenizer", "turns"))
    reader = reread.Reader(dataset, theirs, translate.shared(ours, theirs, len(ours)))
    made = reread.reread(dataset, split, reader, 500)
    several = 0
    for row, messages in enumerate(rows_of(world, split)):
        ids, mask = made.row(row)
        text = theirs.apply_chat_template(messages, tokenize=False)
        assert theirs.decode(ids) == text
        answers = [m["content"] + "<|end of turn|>" for m in messages if m["role"] == "assistant"]
        assert theirs.decode(ids[mask]) == "".join(answers)
        several += len(answers) > 1
        assert len(made.groups[row]) == dataset.train.rows["targets"][row]
    assert several > 5


def read_by(theirs, messages, turns="all", ours=None):
    """Return what a tokenizer reads of a conversation: its text, that of its targets, and the share
    of ours that are paired; or why none."""
    ours = ours or tiny.tiny(merges=MERGES)
    ((ids, answer),) = template.encode(ours, [messages], turns)
    dataset = types.SimpleNamespace(tokenizer=lambda: ours, meta={"args": {}})
    reader = reread.Reader(dataset, theirs, translate.shared(ours, theirs, len(ours)))
    made = reader.conversation(messages, ids, answer)
    if isinstance(made, str):
        return made
    whole, found = made
    targets = [id for *_, first, last in found for id in whole[first:last]]
    return (
        theirs.decode(whole),
        theirs.decode(targets),
        sum(b - a for a, b, *_ in found) / answer.sum(),
    )


TALK = tiny.chat("q1", "the first", "q2", "and second")


@pytest.mark.parametrize("name", ("chatml", "qwen2.5", "llama3", "gemma3", "mistral"))
def test_each_answer_stands_where_the_teachers_template_writes_it(name):
    theirs = tiny.model(name)
    text, said, share = read_by(theirs, TALK)
    assert theirs.apply_chat_template(TALK, tokenize=False).startswith(text) and share == 1
    end = tiny.MODELS[name][-1] if name != "gemma3" else "<end_of_turn>"
    assert said.replace(" the", "the").replace(" and", "and") == f"the first{end}and second{end}"


def test_of_two_answers_the_one_that_is_learnt_is_asked_for():
    begins = "Sure! Here is the revised version: "
    talk = tiny.chat("q1", begins + "aaa", "q2", begins + "bbb")
    text, said, share = read_by(tiny.model("llama3"), talk, "last")
    assert said == begins + "bbb<|eot_id|>" and share == 1
    assert "aaa" in text and "q2" in text


def test_a_trace_that_the_template_writes_before_an_answer_belongs_to_the_prompt():
    text, said, share = read_by(tiny.model("qwen3"), tiny.chat("q1", "the first"))
    assert text.endswith("<think>\n\n</think>\n\nthe first<|im_end|>") and share == 1
    assert said == "the first<|im_end|>"


def test_an_answer_that_ends_otherwise_in_the_template_is_read_all_the_same():
    text, said, share = read_by(tiny.model("llama3"), tiny.chat("q1", "the\n", "q2", "and"))
    assert said == "the\n<|eot_id|>and<|eot_id|>" and share == 1


def test_the_system_message_of_a_template_that_shows_it_once_is_there():
    talk = tiny.chat("q1", "the first", system="be nice")
    text, said, share = read_by(tiny.model("mistral"), talk)
    assert text == "<s>[INST] be nice\n\nq1[/INST] the first</s>" and share == 1


def test_an_answer_with_the_text_of_a_special_token_is_read():
    text, said, share = read_by(tiny.model("llama3"), tiny.chat("q1", "say <|im_end|> and go"))
    assert "say <|im_end|> and go<|eot_id|>" in text


@pytest.mark.parametrize("think", ("keep", "mask", "drop"))
def test_a_trace_that_the_teachers_prompt_opens_is_opened_once(tmp_path, think):
    """DeepSeek-R1's generation prompt ends in <think>, and so do its students' answers begin."""
    ours = tiny.tiny(merges=MERGES)
    opens = TURNS.replace("'<|turn|>assistant: ' }}", "'<|turn|>assistant: <think>\\n' }}")
    theirs, _ = permuted(ours, chat_template=opens)
    theirs.add_tokens(["<think>", "</think>"])
    trace = "<think>\nhm\n</think>\n\n"
    rows = [{"messages": tiny.chat(f"Q{n}", trace + f"Yes {n}")} for n in range(9)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    ours.save_pretrained(tmp_path / "tokenizer")
    words = ["--source", tmp_path / "rows.parquet", "--tokenizer", tmp_path / "tokenizer"]
    words += ["--export", "--out", tmp_path / "data", "--val", 2, "--workers", 1]
    make.call(prepare_data.main, *words, "--think", think)
    dataset = data.Dataset(tmp_path / "data")
    reader = reread.Reader(dataset, theirs, translate.shared(ours, theirs, len(ours)))
    made = reread.reread(dataset, "train", reader, 500)
    for row, messages in enumerate(rows_of(tmp_path, "train")):
        ids, mask = made.row(row)
        question, answer = (message["content"] for message in messages)
        answer = answer if think != "drop" else answer.removeprefix(trace)
        learnt = answer if think != "mask" else answer.removeprefix(trace)
        assert theirs.decode(ids) == (
            f"<s><|turn|>user: {question}<|end of turn|><|turn|>assistant: {answer}<|end of turn|>"
        )
        assert theirs.decode(ids[mask]) == learnt + "<|end of turn|>"


def test_a_token_that_only_the_student_has_is_light_and_no_infinity(world):
    """With a shape of the rest: no mass, and a reverse KL that a student can live with."""
    flags = ["--tail-rank", 8, "--tail-bytes", 8]
    mapped = dumped(world, "turns", "--map-vocabulary", *flags, out="lacking")
    (none,) = mapped.meta["no_mass"]
    mapped.leave_out(())
    batch = mapped.dataset.val.batch([[0], [1]])
    known = mapped.val_at(batch, 1.0)
    z = torch.randn(len(batch.labels), mapped.vocab)
    p = known.logp_all(known.logits(torch.empty_like(z), z), 1.0)
    assert (p[:, none] < -60).all() and torch.allclose(p.exp().sum(1), torch.ones(len(p)))
    kl, rkl, *_ = losses.distance(z - z.amax(1, keepdim=True), known)
    assert (kl < 20).all() and (rkl < 20).all() and torch.isfinite(rkl).all()


# --- --align bytes


def test_of_two_tokenizers_records_hold_the_common_tokens_and_the_products(world):
    """Each target of val against the teacher in float64 and the chain rule."""
    aligned = dumped(world, "other", "--align", "bytes", "--values", "fp16", out="aligned")
    ours, theirs = (template.load_tokenizer(world / n) for n in ("tokenizer", "other"))
    table = translate.shared(ours, theirs, aligned.vocab)
    mine, other = translate.bytes_of(ours), translate.bytes_of(theirs)
    dataset = data.Dataset(world / "data")
    kinds = {"one": 0, "several of theirs": 0, "several of ours": 0}
    for row, messages in enumerate(rows_of(world, "val")):
        if len(messages) > 2:
            continue
        prompt = f"<s><|head|>user: {messages[0]['content']}<|eot|><|head|>assistant: "
        logp, own = scored_by_hand(world, "other", prompt, messages[1]["content"], "<|eot|>")
        labels = dataset.val.batch([[row]]).labels.tolist()
        batch = dataset.val.batch([[row]])
        known = aligned.val_at(batch, 1.0)
        groups = reread.groups([mine[id] for id in labels[:-1]], [other[id] for id in own[:-1]])
        groups.append((len(labels) - 1, len(labels), len(own) - 1, len(own)))
        heard = []
        for a, b, c, d in groups:
            total = sum(logp[i, own[i]].item() for i in range(c, d))
            joint = 0 if known.joint is None else int(known.joint[a])
            count = 8 if known.count is None else int(known.count[a])
            if (b - a, d - c) == (1, 1):
                kinds["one"] += 1
                assert count == 8 and joint == 0
                p = logp[c, table.theirs[known.ids[a]]].exp()
                assert (
                    p - losses.teacher_logp(known[slice(a, a + 1)], 1.0)[0, :-1].exp()
                ).abs().max() < 1e-3
            elif b - a == 1:
                kinds["several of theirs"] += 1
                assert count == 1 and joint == 0 and known.ids[a, 0] == labels[a]
                seen = losses.teacher_logp(known[slice(a, a + 1)], 1.0)[0, 0]
                assert seen.exp().item() == pytest.approx(math.exp(total), abs=1e-5)
            else:
                kinds["several of ours"] += 1
                assert count == 0 and joint == b - a
                assert math.exp(-math.log1p(math.exp(known.tail[a]))) == pytest.approx(
                    math.exp(total), abs=1e-5
                )
                assert (known.count[a + 1 : b] == 0).all() and (known.joint[a + 1 : b] == 0).all()
            heard.append(total)
        own_ce = float(aligned.val.done()["ce_sum"][row])
        assert own_ce == pytest.approx(-sum(heard), rel=1e-4)
    assert min(kinds.values()) > 1, kinds


@pytest.mark.parametrize("vocab", (300, 151_936))
def test_no_group_gives_no_record_and_one_of_many_tokens_its_own(vocab):
    dtype = record.record_dtype(8, [1.0], vocab, "u8", counted=True, joint=True)
    none = np.zeros(0, np.int64)
    assert len(across.of_groups(np.zeros(0), none, none, dtype, vocab)) == 0
    nats, label = np.array([0.5, 0.0, 40.0]), np.array([vocab - 1, 0, 7])
    made = across.of_groups(nats, label, np.array([1, 2, 1]), dtype, vocab)
    known = record.unpack(made, vocab, 0)
    assert known.ids[:, 0].tolist() == label.tolist()
    assert all(len(set(ids)) == 8 and max(ids) < vocab for ids in known.ids.tolist())
    assert known.count.tolist() == [1, 0, 1] and known.joint.tolist() == [0, 2, 0]
    p = losses.teacher_logp(known, 1.0)[:, 0].exp()
    assert p[0].item() == pytest.approx(math.exp(-0.5), rel=1e-5)
    assert p[2].item() == pytest.approx(math.exp(-40), rel=1e-3)
    rest = torch.log1p(known.tail.double().exp())
    assert rest[1].item() == pytest.approx(0.0, abs=2e-6)


def test_the_teachers_own_measures_are_over_what_it_says(tmp_path):
    """A tokenizer that lowers the case: where the texts part nothing is compared, nor counted."""
    ours, theirs = tiny.tiny(merges=MERGES), tiny.tiny(merges=MERGES)
    theirs.backend_tokenizer.normalizer = normalizers.Lowercase()
    rows = [{"messages": tiny.chat(f"q {n}", "the and THE AND the and then")} for n in range(9)]
    prepared(tmp_path, ours, rows)
    make.model(tmp_path / "lower", vocab=len(theirs), with_tokenizer=theirs)
    some = dumped(tmp_path, "lower", "--align", "bytes", out="lower-logits")
    told = record.said_at(some.val.records)
    targets = some.dataset.val.targets
    assert 0 < told["known"] + told["grouped"] < targets
    ce, done = some.val.meta["teacher_ce"], some.val.done()
    assert ce == pytest.approx(done["ce_sum"].sum() / sum(told.values()))
    assert ce > 0.7 * math.log(len(ours)) and some.val_measures()["targets"] == sum(told.values())
    assert several.ce_of(some.val).tolist() == pytest.approx(
        (done["ce_sum"] / record.heard_of_rows(some.val.records, some.val.counts)).tolist()
    )


def product_loss(s, labels, joint, logp, method):
    """Return the divergence of groups written out: of P and the product of the labels'
    probabilities, over (the text, all else)."""
    logq, total = s.log_softmax(1), 0.0
    for first in joint.nonzero()[:, 0].tolist():
        some = range(first, first + int(joint[first]))
        q = sum(logq[i, labels[i]] for i in some).exp()
        p = logp[first].exp()
        two = [torch.stack([x, 1 - x])[None] for x in (p, q)]
        total = total + reference_divergence(*two, method.divergence, method.beta).sum()
    return total


@pytest.mark.parametrize("kind", losses.DIVERGENCES)
@pytest.mark.parametrize("size", (1, 3, 100))
def test_the_loss_of_several_tokens_compares_their_product(kind, size, monkeypatch):
    """Value and gradient against autograd, however the targets are cut into chunks."""
    made = torch.Generator().manual_seed(0)
    n, v = 9, 11
    hidden, weight, z = (
        torch.randn(*shape, generator=made, dtype=torch.float64)
        for shape in ((n, 5), (v, 5), (n, v))
    )
    labels = torch.randint(v, (n,), generator=made)
    joint = torch.tensor([0, 3, 0, 0, 2, 0, 0, 0, 0])
    count = torch.tensor([4, 0, 0, 0, 0, 0, 4, 1, 0])
    p = torch.rand(n, generator=made, dtype=torch.float64)
    values, ids = z.sort(1, descending=True)
    d = values[:, :1] - values
    tail = (-d[:, 4:]).logsumexp(1)
    tail = torch.where(joint > 0, torch.log1p(-p) - p.log(), tail)
    teacher = TopK(ids[:, :4], d[:, :4], tail, count=count, joint=joint)
    rest = TopK(ids[:, :4], d[:, :4], tail, count=count)
    method = Method(0.7, 1.0, kind, BETAS[kind])
    monkeypatch.setattr(Head, "chunk", lambda self: max(size, 3))

    def gradients(of):
        leaves = [one.clone().requires_grad_() for one in (hidden, weight)]
        loss = of(*leaves)
        loss.backward()
        return [loss.detach(), *(leaf.grad for leaf in leaves)]

    def plain(h, w):
        return losses.head_loss(h, Head(w, None, v), labels, rest, method)[0]

    def products(h, w):
        return method.alpha * product_loss(h @ w.t(), labels, joint, p.log(), method)

    seen = gradients(lambda h, w: losses.head_loss(h, Head(w, None, v), labels, teacher, method)[0])
    wanted = [a + b for a, b in zip(gradients(plain), gradients(products))]
    for one, other in zip(seen, wanted):
        torch.testing.assert_close(one, other, atol=1e-10, rtol=1e-8)


def test_a_product_the_student_is_sure_of_has_a_finite_gradient():
    s = torch.full((2, 5), -60.0).index_fill_(1, torch.tensor([2]), 60.0)
    teacher = TopK(
        torch.zeros(2, 1, dtype=torch.long),
        torch.zeros(2, 1),
        torch.tensor([-1.0, 0.0]),
        count=torch.tensor([0, 0]),
        joint=torch.tensor([2, 0]),
    )
    for kind in losses.DIVERGENCES:
        hidden = s.clone().requires_grad_()
        method = Method(1.0, 1.0, kind, BETAS[kind])
        loss, _, _ = losses.head_loss(
            hidden, Head(torch.eye(5), None, 5), torch.tensor([2, 2]), teacher, method
        )
        loss.backward()
        assert torch.isfinite(loss) and torch.isfinite(hidden.grad).all()


def test_stage_2_learns_from_both_and_measures_on_what_is_known(world, capsys):
    for out, more in (("aligned2", ["--align", "bytes"]), ("mapped2", ["--map-vocabulary"])):
        dumped(world, "other" if "--align" in more else "turns", *more, out=out)
        words = ["--data", world / "data", "--logits", world / out, "--student", world / "student"]
        run = world / f"run-{out}"
        more = ["--steps", 2, "--temperature", 1, "--eval-every", 1]
        more += ["--tokens-per-microbatch", 256]
        make.call(stage2_kd.main, *words, "--out", run, *make.QUICK, *more)
        evals = make.history(run, "eval")
        assert len(evals) == 3 and all(math.isfinite(one["kl"]) and one["kl"] > 0 for one in evals)


def test_beside_another_teacher_groups_stay_with_their_own(tmp_path, world):
    """By source: a micro-batch holds rows of one teacher, whatever rows a step has; combined by the
    likelier one they are refused."""
    ours, sources = tiny.tiny(merges=MERGES), []
    ours.save_pretrained(tmp_path / "tokenizer")
    for number, name in enumerate("ab"):
        rows = pa.Table.from_pylist(conversations(20, seed=number))
        pq.write_table(rows, tmp_path / f"{name}.parquet")
        sources += ["--source", f"{name}={tmp_path}/{name}.parquet"]
    words = [*sources, "--tokenizer", tmp_path / "tokenizer", "--export", "--val", 6]
    make.call(prepare_data.main, *words, "--out", tmp_path / "data", "--workers", 1)
    for name, teacher, more in (("a", "other", ["--align", "bytes"]), ("b", "teacher", [])):
        words = ["--data", tmp_path / "data", "--teacher", world / teacher, "--only", name]
        words += ["--out", tmp_path / name, "--k", 8, "--temperatures", 1, "--tail-rank", 0]
        make.call(dump_logits.main, *words, *more, *make.CPU)
    both = [f"{name}={tmp_path / name}" for name in "ab"]
    argv = ["--data", tmp_path / "data", "--logits", *both, "--student", world / "student"]
    argv += ["--out", tmp_path / "run", "--temperature", 1, "--steps", 2, *make.QUICK]
    argv += ["--tokens-per-microbatch", 256]
    make.call(stage2_kd.main, *argv)
    last = make.history(tmp_path / "run", "eval")[-1]
    assert last["kl_a"] > 0 and last["kl_b"] > 0
    args, dataset = (
        stage2_kd.parse_args([str(word) for word in argv]),
        data.Dataset(tmp_path / "data"),
    )
    teacher, kept = teachers.open_teacher(args, dataset), []
    student = lib_models.load(str(world / "student"), torch.device("cpu"), dataset=dataset)
    rows = types.SimpleNamespace(keep_apart=lambda group: kept.append(group.tolist()))
    teacher.join(student, args, None, rows)
    assert kept == [[0, 1]]
    code, said = make.ends(stage2_kd.main, *argv, "--combine", "best", "--fresh")
    assert code == 1 and "--combine best does not go with records of --align bytes" in said


def test_a_dump_that_was_killed_goes_on_and_is_that_of_one_left_alone(world, monkeypatch):
    words = ["--align", "bytes", "--tokens-per-microbatch", 256]
    whole = dumped(world, "other", *words, out="whole")
    add, added = writer.Writer.add, []

    def until(self, rows, *more):
        if len(added) == 3:
            raise InterruptedError
        added.append(rows)
        return add(self, rows, *more)

    with monkeypatch.context() as patched:
        patched.setattr(writer.Writer, "add", until)
        patched.setattr(writer, "FLUSH_S", -1.0)
        with pytest.raises(InterruptedError):
            dumped(world, "other", *words, out="killed")
    again = dumped(world, "other", *words, out="killed")
    for name, part in (("chunk-0000", again.parts[0]), ("val", again.val)):
        assert part.meta["sha256"] == files.read_json(whole.folder / name / "meta.json")["sha256"]


# --- what is refused


def refused(folder, *more, teacher="other", name="data"):
    words = ["--data", folder / name, "--teacher", folder / teacher, "--out", folder / "refused"]
    return make.ends(dump_logits.main, *words, *make.CPU, *more)


def test_a_tokenizer_that_cuts_otherwise_is_not_mapped(world):
    code, words = refused(world, "--map-vocabulary")
    assert code == 1 and "does not map enough" in words and "--align bytes" in words


def test_data_without_its_rows_as_text_names_the_flag(world):
    prepared_without = world / "bare"
    if not prepared_without.exists():
        make.call(
            prepare_data.main,
            "--source",
            world / "rows.parquet",
            "--tokenizer",
            world / "tokenizer",
            "--out",
            prepared_without,
            "--val",
            6,
            "--workers",
            1,
        )
    code, words = refused(world, "--align", "bytes", name="bare")
    assert code == 1 and "--export" in words and "rows/train.parquet is missing" in words


def test_flags_that_cannot_work_are_refused(world, capsys):
    for more, said in (
        (["--align", "bytes", "--temperatures", "1,2"], "wanted 1"),
        (["--align", "bytes", "--tail-rank", 8], "wanted 0"),
        (["--map-vocabulary", "--verify", 5], "does not go with --map-vocabulary"),
        (["--map-vocabulary", "--align", "bytes"], "not allowed with"),
    ):
        assert refused(world, *more)[0] == 2
        assert said in capsys.readouterr().err


def test_the_mend_of_a_chunk_that_is_missing_can_be_run(world):
    """V is the student's, whatever the teacher has."""
    if not (world / "padded").exists():
        size = len(template.load_tokenizer(world / "tokenizer")) + 40
        make.model(world / "padded", seed=1, vocab=size, with_tokenizer=tiny.tiny(merges=MERGES))
    some = dumped(world, "other", "--align", "bytes", "--student", world / "padded", out="big")
    shutil.rmtree(world / "big" / "val")
    some = logits.Records(world / "big", data.Dataset(world / "data"), 1.0)
    argv = shlex.split(some.mend([*some.parts.values()]).split("dump_logits.py ")[1])
    assert "--align" in argv and argv[argv.index("--vocab") + 1] == str(some.vocab)
    make.call(dump_logits.main, *argv, "--chunk", "val", *make.CPU)
    assert logits.Records(world / "big", data.Dataset(world / "data"), 1.0).compares


def test_a_teacher_without_a_chat_template_is_named(world):
    bare = tiny.tiny(merges=OTHER)
    bare.chat_template = None
    make.model(world / "bare-teacher", seed=4, vocab=len(bare), with_tokenizer=bare)
    code, words = refused(world, "--align", "bytes", teacher="bare-teacher")
    assert code == 1 and "chat template" in words


def test_without_the_flag_the_refusal_names_it(world):
    code, words = refused(world, teacher="turns")
    assert code == 1 and "--map-vocabulary" in words
