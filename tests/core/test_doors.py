"""What a model or tokenizer is asked at the door: rows that see each other, positions that end, a
class that cuts text otherwise than its tokenizer.json, a template without end."""

import copy
import json
from types import SimpleNamespace

import make
import pytest
import tiny_tokenizers as tt
import torch
import transformers
from gguf_files import WORDS
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

import dump_logits
import stage1_sft
import stage2_kd
from lib import checkpoints, files, generate, models, template, train
from lib.prepare import templates

SIZES = dict(
    vocab_size=make.V,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=256,
    pad_token_id=3,
    bos_token_id=None,
    eos_token_id=3,
)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
DELTA = dict(
    linear_num_value_heads=2,
    linear_num_key_heads=2,
    linear_key_head_dim=16,
    linear_value_head_dim=16,
    layer_types=["linear_attention", "full_attention"],
)
GPT2 = dict(vocab_size=make.V, n_embd=64, n_layer=2, n_head=4, bos_token_id=3, eos_token_id=3)
APART = {
    "llama": transformers.LlamaConfig(**SIZES),
    "gemma2": transformers.Gemma2Config(**SIZES, sliding_window=16),
    "gpt2": transformers.GPT2Config(**GPT2, n_positions=128),
    "qwen3_moe": transformers.Qwen3MoeConfig(**SIZES, **EXPERTS),
    "codegen": transformers.CodeGenConfig(**GPT2, n_positions=128, rotary_dim=8),
}
LEAKING = {
    "qwen3_next": transformers.Qwen3NextConfig(
        **SIZES, **EXPERTS, **DELTA, shared_expert_intermediate_size=32
    ),
    "minimax": transformers.MiniMaxConfig(**SIZES, num_local_experts=4, block_size=16),
    "mamba": transformers.MambaConfig(
        vocab_size=make.V, hidden_size=64, num_hidden_layers=2, state_size=8
    ),
    "opt": transformers.OPTConfig(
        vocab_size=make.V,
        hidden_size=64,
        word_embed_proj_dim=64,
        ffn_dim=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
    ),
    "gpt_oss": transformers.GptOssConfig(
        **SIZES, num_local_experts=4, num_experts_per_tok=2, sliding_window=32
    ),
}
DTYPES = {
    "float32": (torch.float32, None),
    "amp": (torch.float32, torch.bfloat16),
    "bfloat16": (torch.bfloat16, None),
}


def fresh(config, dtype=torch.float32, **more):
    """Return a Model of new weights, as small as an initializer makes them."""
    torch.manual_seed(0)
    try:
        module = transformers.AutoModelForCausalLM.from_config(config, **more)
    except ValueError:
        module = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    module = module.to(dtype).eval()
    return models.as_model(module, None)


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("name", {**APART, **LEAKING})
def test_whether_packed_rows_see_each_other_is_told_by_a_factor_of_ten(name, kind):
    dtype, amp = DTYPES[kind]
    model = fresh({**APART, **LEAKING}[name], dtype)
    first, other, second = models.rows_to_probe(model)
    with torch.no_grad():
        moved = models.influence(model, amp, second, first, other)
    assert moved <= models.LEAK / 10 if name in APART else moved >= models.LEAK * 10
    assert models.packs(model, amp) is (name in APART)


def test_an_expert_whose_sums_are_cut_otherwise_is_no_leak():
    """Row 1's tokens change how many tokens each expert gets, and so how a kernel cuts its sums: in
    half precision row 2 moves by 1e-3 with them, on a line of its own as well."""
    model = fresh(APART["llama"])
    before, plain = model.body, models.states

    def coarse(model, amp, *lines):
        seen = plain(model, amp, *lines)
        noise = torch.randn(seen.shape, generator=torch.Generator().manual_seed(made.pop()))
        return seen * (1 + 2e-3 * noise)

    made = list(range(100))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "states", coarse)
        rows = models.rows_to_probe(model)
        with torch.no_grad():
            assert models.influence(model, None, rows[2], rows[0], rows[1]) == 0
    assert before is model.body


def test_where_attention_is_to_a_selection_rows_are_longer_than_it():
    config = transformers.LlamaConfig(**SIZES | {"max_position_embeddings": 8192})
    model = fresh(config)
    assert len(models.rows_to_probe(model)[0]) == 64
    config.index_topk = 512
    assert 2 * len(models.rows_to_probe(model)[0]) > 512
    del config.index_topk
    config.compress_rates = {"csa": 4, "hca": 128}
    assert len(models.rows_to_probe(model)[0]) >= 128


def save(model, folder):
    model.module.save_pretrained(folder)
    make.tokenizer().save_pretrained(folder)
    return folder


def load(folder, **more):
    return models.load(str(folder), torch.device("cpu"), **more)


def test_a_model_that_sees_the_future_is_told_how_to_become_a_decoder(tmp_path):
    small = {name: SIZES[name] for name in SIZES if name not in ("head_dim", "num_key_value_heads")}
    save(fresh(transformers.BertConfig(**small)), tmp_path)
    with pytest.raises(SystemExit, match='attends to later tokens.*"is_decoder": true'):
        load(tmp_path)


def test_a_model_whose_rows_alone_see_their_own_future_is_refused(tmp_path):
    """PaliGemma reads a prompt both ways; what stands behind a packed row it does not see."""
    torch.manual_seed(0)
    vision = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    config = transformers.PaliGemmaConfig(
        text_config=transformers.GemmaConfig(**SIZES),
        vision_config=vision | dict(image_size=28, patch_size=14),
    )
    transformers.PaliGemmaForConditionalGeneration(config).save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match="attends to later tokens"):
        load(tmp_path)


def test_a_model_that_counts_its_positions_otherwise_is_refused(tmp_path):
    small = {name: SIZES[name] for name in SIZES if name not in ("head_dim", "num_key_value_heads")}
    config = transformers.RobertaConfig(**small, is_decoder=True, initializer_range=0.3)
    save(fresh(config), tmp_path)
    with pytest.raises(SystemExit, match="does not count its positions from 0"):
        load(tmp_path)


def test_a_model_that_wants_an_image_is_one_line(tmp_path):
    torch.manual_seed(0)
    vision = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    text = dict(vocab_size=make.V, hidden_size=16, intermediate_size=32, num_hidden_layers=1)
    config = transformers.BlipConfig(
        text_config=text | dict(num_attention_heads=2, bos_token_id=1, sep_token_id=2),
        vision_config=vision | dict(image_size=28, patch_size=14),
    )
    transformers.BlipForConditionalGeneration(config).save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match="does not run on text alone.*language model inside it"):
        load(tmp_path)


def test_a_routers_loss_that_is_not_added_is_said(tmp_path):
    for asked, said in ((True, "load-balancing loss (times 0.01)"), (False, "float32")):
        config = copy.deepcopy(APART["qwen3_moe"])
        config.output_router_logits, config.router_aux_loss_coef = asked, 0.01
        line = train.described(load(save(fresh(config), tmp_path / str(asked))), None)
        assert said in line and asked is ("load-balancing" in line)


def test_a_model_that_takes_padding_for_text_is_refused():
    model = fresh(APART["llama"])
    body = model.body

    def counting(input_ids, **more):
        seen = body(input_ids=input_ids, **more)
        seen.last_hidden_state = seen.last_hidden_state * (input_ids > 0).sum(-1)[:, None, None]
        return seen

    with pytest.raises(SystemExit, match="attends to later tokens"):
        models.probe(models.Model(model.module, counting, None))


def test_a_model_without_sdpa_is_loaded_eager_and_it_is_said(tmp_path, capsys):
    save(fresh(APART["codegen"]), tmp_path)
    assert load(tmp_path).module.config._attn_implementation == "eager"
    assert "has no sdpa attention: eager" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="--attn auto"):
        load(tmp_path, attn="sdpa")


def test_the_body_of_llama_4_is_found(tmp_path):
    config = transformers.Llama4TextConfig(
        **SIZES, intermediate_size_mlp=64, num_local_experts=2, num_experts_per_tok=1
    )
    model = load(save(fresh(config), tmp_path))
    assert hasattr(model.body, "layers") and model.body is not model.module


def test_a_model_with_a_vision_part_is_read_with_text_alone(tmp_path):
    torch.manual_seed(0)
    vision = transformers.CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    text = transformers.LlamaConfig(**SIZES)
    config = transformers.LlavaConfig(text_config=text, vision_config=vision)
    transformers.LlavaForConditionalGeneration(config).save_pretrained(tmp_path)
    make.tokenizer().save_pretrained(tmp_path)
    model = load(tmp_path)
    assert type(model.module).__name__ == "LlavaForConditionalGeneration" and model.packs
    assert model.vocab == make.V


def test_what_an_image_is_read_with_goes_along_with_the_vision_part(tmp_path):
    """Without it neither AutoProcessor nor vLLM can read best/."""
    config = transformers.Gemma3Config(
        text_config=SIZES | dict(head_dim=8, vocab_size=make.V),
        vision_config=dict(hidden_size=16, intermediate_size=32, num_attention_heads=2)
        | dict(num_hidden_layers=1, image_size=28, patch_size=14),
    )
    transformers.Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path / "from")
    make.tokenizer().save_pretrained(tmp_path / "from")
    (tmp_path / "from" / "preprocessor_config.json").write_text('{"size": 28}', encoding="utf-8")
    checkpoints.save(load(tmp_path / "from").module, make.tokenizer(), tmp_path / "to")
    assert (tmp_path / "to" / "preprocessor_config.json").read_text("utf-8") == '{"size": 28}'


def test_a_model_is_tried_with_logits_of_a_few_tokens():
    """Of all that a row may have, 2,112, they are gigabytes."""
    model, seen = fresh(transformers.LlamaConfig(**SIZES)), []
    model.module.lm_head.register_forward_hook(lambda *given: seen.append(given[2].shape[1]))
    models.probe(model)
    assert seen and max(seen) == 8


# --- rows that are longer than positions


@pytest.fixture
def data_of_24(tmp_path):
    return make.dataset(tmp_path / "data", longest=24)


@pytest.mark.parametrize("name", ("gpt2", "codegen", "opt"))
def test_rows_longer_than_learned_positions_are_refused_before_weights_are_loaded(
    name, data_of_24, tmp_path, monkeypatch
):
    config = {**APART, **LEAKING}[name]
    config = type(config)(**config.to_dict() | {"max_position_embeddings": 16, "n_positions": 16})
    save(fresh(config), tmp_path / "model")
    monkeypatch.setattr(models, "made", None)
    with pytest.raises(SystemExit, match="16 positions, and no more; saw a row of 24 tokens.*16"):
        load(tmp_path / "model", dataset=data_of_24)


def test_rows_longer_than_what_a_rotary_model_was_made_for_are_said(data_of_24, tmp_path, capsys):
    make.model(tmp_path / "model", max_position_embeddings=16)
    load(tmp_path / "model", dataset=data_of_24)
    assert "was made for 16 tokens, and the longest row has 24" in capsys.readouterr().out
    make.model(tmp_path / "other", max_position_embeddings=24)
    load(tmp_path / "other", dataset=data_of_24)
    assert "WARNING" not in capsys.readouterr().out


def test_a_window_is_what_rope_scaling_makes_of_it():
    def config(**rope):
        return transformers.LlamaConfig(**SIZES, rope_parameters={"rope_theta": 1e4, **rope})

    first = {"original_max_position_embeddings": 256}
    assert generate.window(config(rope_type="default")) == 256
    assert generate.window(config(rope_type="yarn", factor=4.0, **first)) == 1024
    assert generate.window(config(rope_type="linear", factor=4.0)) == 256
    assert generate.window(transformers.GPT2Config(**GPT2, n_positions=128)) == 128
    assert generate.window(transformers.BloomConfig()) is None


def test_a_row_that_fits_no_micro_batch_is_said_before_the_teacher_is_loaded(
    data_of_24, tmp_path, monkeypatch
):
    make.model(tmp_path / "teacher")
    monkeypatch.setattr(models, "load", None)
    argv = ["--data", data_of_24.folder, "--teacher", tmp_path / "teacher", *make.CPU]
    argv += ["--out", tmp_path / "logits", "--tokens-per-microbatch", 16]
    with pytest.raises(SystemExit, match="longest row does not fit in a micro-batch"):
        make.call(dump_logits.main, *argv)


@pytest.mark.parametrize("stage", ("stage1", "stage2", "live", "dump"))
@pytest.mark.parametrize("what", ("a row", "the disk", "k", "vocab"))
def test_what_flags_and_files_tell_is_said_before_weights_are_hashed_or_loaded(
    tmp_path_factory, monkeypatch, stage, what
):
    if (stage in ("stage1", "stage2") and what in ("k", "vocab")) or (stage, what) == (
        "live",
        "vocab",
    ):
        pytest.skip("no such flag")
    folder = make.world(tmp_path_factory.mktemp("early"))
    if stage == "stage2":
        make.call(dump_logits.main, *make.dump(folder))
    more, words = {
        "a row": (("--tokens-per-microbatch", 8), "does not fit in a micro-batch"),
        "the disk": ((), "is too small; saw 100 B free"),
        "k": (("--k", 99), "k does not fit; saw --k 99"),
        "vocab": (("--vocab", 99), "vocab does not fit; saw --vocab 99"),
    }[what]
    if what == "the disk":
        monkeypatch.setattr(files, "free_bytes", lambda _: 100)
    monkeypatch.setattr(models, "load", None)
    monkeypatch.setattr(checkpoints, "identity", None)
    main = {"stage1": stage1_sft.main, "dump": dump_logits.main}.get(stage, stage2_kd.main)
    with pytest.raises(SystemExit, match=words):
        make.call(main, *getattr(make, stage)(folder, *more, "--out", folder / "new"))


# --- rows that see each other: one row a line, by itself


def test_what_cannot_be_packed_is_not_and_the_run_is_that_of_no_pack(data_of_24, tmp_path, capsys):
    folder = save(fresh(LEAKING["mamba"]), tmp_path / "mamba")
    argv = ["--data", data_of_24.folder, "--student", folder, "--steps", 4, *make.QUICK]
    make.call(stage1_sft.main, *argv, "--out", tmp_path / "plain")
    assert "one row a line, as with --no-pack" in capsys.readouterr().out
    make.call(stage1_sft.main, *argv, "--out", tmp_path / "asked", "--no-pack")
    assert make.history(tmp_path / "plain") == make.history(tmp_path / "asked")
    for name in ("plain", "asked"):
        assert files.read_json(tmp_path / name / "config.json")["packed"] is False


def test_a_run_that_began_with_one_row_a_line_goes_on_so(data_of_24):
    from lib import plan

    rows = plan.Rows(make.plan_args(), data_of_24)
    rows.lay(SimpleNamespace(packs=True), {})
    assert rows.pack
    rows.lay(SimpleNamespace(packs=True), {"packed": False})
    assert not rows.pack


# --- tokenizers


def digit_by_digit(folder, kind: str):
    """Save a tokenizer whose file cuts digits one by one, under the class `kind`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [(a, b) for a in "0123456789" for b in "0123456789"]
    vocab = {piece: i for i, piece in enumerate([*alphabet, *(a + b for a, b in merges)])}
    inner = Tokenizer(BPE(vocab, merges))
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    inner.decoder = decoders.ByteLevel()
    names = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>", "<unk>")
    inner.add_special_tokens([AddedToken(x, special=True, normalized=False) for x in names])
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|im_end|>")
    made.chat_template = tt.CHATML
    made.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": kind}))
    return folder


@pytest.mark.parametrize(
    "kind", ("GPT2Tokenizer", "CodeGenTokenizer", "GPTNeoXTokenizerFast", "GemmaTokenizerFast")
)
def test_a_class_that_cuts_otherwise_than_tokenizer_json_gives_way_to_it(kind, tmp_path, capsys):
    folder, text = digit_by_digit(tmp_path / "words", kind), "Room 1234 costs 98765."
    wanted = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids
    made = template.load_tokenizer(folder)
    assert made(text)["input_ids"] == wanted
    said = capsys.readouterr().out
    assert kind.removesuffix("Fast") in said and "tokenizer.json is followed" in said
    made.save_pretrained(tmp_path / "saved")  # and plain transformers reads what is saved
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")(text).input_ids == wanted
    template.load_tokenizer(tmp_path / "saved")
    assert not capsys.readouterr().out


def test_a_class_that_agrees_with_its_file_stays(tmp_path, capsys):
    pieces = {piece: i for i, piece in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    transformers.Qwen2Tokenizer(vocab=pieces, merges=[]).save_pretrained(tmp_path)
    made = template.load_tokenizer(tmp_path)
    assert type(made).__name__ == "Qwen2Tokenizer" and not capsys.readouterr().out


def test_a_class_that_has_tokens_of_its_own_gives_way_to_the_file(tmp_path, capsys):
    """AutoTokenizer reads the tokenizer of any model of type qwen2 as Qwen's, which has
    <|endoftext|>: of stage 1's result stage 2 said that it had another tokenizer."""
    pieces = {piece: i for i, piece in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    made = transformers.Qwen2Tokenizer(vocab=pieces, merges=[])
    core = Tokenizer(BPE(pieces, []))
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        setattr(core, part, getattr(made.backend_tokenizer, part))
    words = transformers.PreTrainedTokenizerFast(tokenizer_object=core)
    words.save_pretrained(tmp_path)
    transformers.Qwen2Config(**SIZES | {"vocab_size": len(words)}).save_pretrained(tmp_path)
    assert len(transformers.AutoTokenizer.from_pretrained(tmp_path)) == len(words) + 1
    assert template.load_tokenizer(tmp_path).get_vocab() == words.get_vocab()
    assert "<|endoftext|>" in capsys.readouterr().out


def test_best_says_where_plain_transformers_reads_its_tokenizer_otherwise(tmp_path, capsys):
    """AutoTokenizer takes Qwen2Tokenizer for a model of type qwen2, whatever class is named."""
    words = tt.tiny(merges=[("1", "2")])
    config = transformers.Qwen2Config(**SIZES | {"vocab_size": len(words)})
    checkpoints.save(fresh(config).module, words, tmp_path)
    assert "AutoTokenizer reads" in capsys.readouterr().out
    made = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert made("x 12")["input_ids"] == words("x 12")["input_ids"]
    assert template.load_tokenizer(tmp_path)("x 12")["input_ids"] == words("x 12")["input_ids"]


def test_blanks_of_sentencepiece_are_blanks_in_a_gguf_file(monkeypatch):
    words = tt.tiny()
    words.add_tokens(["\u2581\u2581", "\u2581\u2581\u2581"])
    tokens = sorted(words.get_vocab(), key=words.get_vocab().get)

    class Reader:
        def get_field(self, name):
            return self

        def contents(self):
            return [token.replace("\u2581", " ") for token in tokens]

    monkeypatch.setattr(checkpoints, "gguf_reader", lambda folder: Reader())
    checkpoints.check_gguf_tokenizer(None, words, "data")
    tokens[-1] = "another"
    with pytest.raises(SystemExit, match="another tokenizer"):
        checkpoints.check_gguf_tokenizer(None, words, "data")
    assert len(WORDS) == make.V


# --- chat templates are programs of others


@pytest.mark.parametrize(
    "text", ("{{ 1 // 0 }}", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ 'x'.y.z }}")
)
def test_a_template_that_raises_is_one_line(text):
    words = tt.tiny(text)
    templates.ensure_template(words)
    with pytest.raises(SystemExit, match="the chat template refused the conversation"):
        template.prompt_ids(words, tt.chat("x"))
    (reason,) = template.encode(words, [tt.chat("x", "y")])
    assert reason.startswith("refused by the chat template (")


@pytest.mark.parametrize(
    "text",
    (
        "{{ 'x' * 10 ** 10 }}",
        "{{ 'x'.ljust(10 ** 10) }}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% for k in range(99999) %}"
        "{% endfor %}{% endfor %}{% endfor %}",
    ),
)
def test_a_template_without_end_is_one_line(text, monkeypatch):
    monkeypatch.setattr(templates, "TEMPLATE_SECONDS", 1)
    with pytest.raises(SystemExit, match="the chat template of .*does not end"):
        templates.ensure_template(tt.tiny(text))
