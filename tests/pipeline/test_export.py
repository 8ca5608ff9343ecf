"""What is read is what the files hold, and what is saved is what was evaluated: adapters against
PEFT's own logits, quantised students, settings that cannot be saved, weights without a place."""

import json
from types import SimpleNamespace

import make
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GptOssConfig

import chat
import stage1_sft
from lib import checkpoints, data, files, generate, models
from lib.chat import api
from lib.measure import plots

CPU = torch.device("cpu")
TOKENS = torch.arange(1, 30)[None]


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr(plots, "curves", lambda *_: None)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make.world(tmp_path_factory.mktemp("world"))


@torch.no_grad()
def logits(module):
    return module.eval()(TOKENS).logits[0]


def edit(path, **values):
    files.write_json(path, files.read_json(path) | values)


def step(world, *more):
    """Run stage 1 for one step that moves nothing."""
    make.call(
        stage1_sft.main,
        *make.stage1(world, "--steps", 1, "--lr", 1e-30, "--samples", 0, "--no-pack", *more),
    )


# --- adapters


def adapter(base, folder, rows=0, **options):
    """Write an adapter as PEFT does; return its own logits."""
    import peft

    torch.manual_seed(1)
    module = AutoModelForCausalLM.from_pretrained(base)
    if rows:
        module.resize_token_embeddings(rows, mean_resizing=False)
    options = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"} | options
    module = peft.get_peft_model(module, peft.LoraConfig(**options))
    with torch.no_grad():
        for p in module.parameters():
            if p.requires_grad:
                p += 0.05 * torch.randn_like(p)
    module.save_pretrained(folder)
    edit(folder / "adapter_config.json", base_model_name_or_path=str(base))
    return logits(module)


LAYERS = {
    "plain": dict(target_modules=["q_proj"]),
    "head": dict(target_modules=["q_proj", "lm_head"]),
    "embed": dict(target_modules=["q_proj", "embed_tokens"]),
    "both": dict(target_modules=["q_proj", "embed_tokens", "lm_head"]),
    "dora": dict(target_modules=["q_proj", "lm_head"], use_dora=True),
    "one": dict(target_modules=["embed_tokens"], ensure_weight_tying=True),
    "saved": dict(target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]),
    "savedhead": dict(target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "tokens": dict(target_modules=["q_proj"], trainable_token_indices=[3, 4]),
    "resized": dict(target_modules=["q_proj"], rows=make.V + 2),
    "resizedtokens": dict(
        target_modules=["q_proj"], rows=make.V + 2, trainable_token_indices=[make.V, make.V + 1]
    ),
    "resizedsave": dict(target_modules=["q_proj"], rows=make.V + 2, modules_to_save=["lm_head"]),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tied", (True, False), ids=("tied", "untied"))
@pytest.mark.parametrize("name", LAYERS)
def test_a_merged_adapter_has_pefts_logits_in_memory_and_saved(tmp_path, name, tied):
    base = make.model(tmp_path / "base", tie_word_embeddings=tied)
    wanted = adapter(base, tmp_path / "adapter", **LAYERS[name])
    module = models.load(str(tmp_path / "adapter"), CPU, pack=False).module
    torch.testing.assert_close(logits(module), wanted, rtol=1e-3, atol=1e-3)
    checkpoints.save(module, make.tokenizer(), tmp_path / "saved")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(logits(saved), wanted, rtol=1e-3, atol=1e-3)
    both = saved.get_input_embeddings().weight, saved.get_output_embeddings().weight
    assert saved.config.tie_word_embeddings == (both[0] is both[1])  # other readers go by it


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_that_leaves_rows_of_the_output_layer_out_is_refused(tmp_path):
    """PEFT fills them with random numbers when it reads what it has written."""
    resized = dict(target_modules=["q_proj", "embed_tokens"], rows=make.V + 2)
    for tied in (True, False):
        base = make.model(tmp_path / "base", tie_word_embeddings=tied)
        wanted = adapter(base, tmp_path / "adapter", **resized)
        if tied:
            module = models.load(str(tmp_path / "adapter"), CPU, pack=False).module
            torch.testing.assert_close(logits(module), wanted, rtol=1e-3, atol=1e-3)
    with pytest.raises(SystemExit, match="63 embeddings, and no output layer of as many rows"):
        models.load(str(tmp_path / "adapter"), CPU, pack=False)
    assert checkpoints.tokens_of(tmp_path / "adapter") == make.V + 2


@pytest.mark.filterwarnings("ignore")
def test_a_merge_that_is_not_pefts_is_refused(tmp_path, monkeypatch):
    base = make.model(tmp_path / "base", tie_word_embeddings=True)
    adapter(base, tmp_path / "adapter", **LAYERS["head"])
    monkeypatch.setattr(checkpoints, "part", lambda *_: None)
    with pytest.raises(SystemExit, match="cannot be merged into its base; saw logits that differ"):
        models.load(str(tmp_path / "adapter"), CPU, pack=False)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_a_small_adapter_that_is_merged_wrongly_does_not_hide_in_half_precision(
    tmp_path, monkeypatch, dtype
):
    base = make.model(tmp_path / "base", tie_word_embeddings=True)
    adapter(base, tmp_path / "adapter", lora_alpha=0.5, **LAYERS["head"])
    module = models.load(str(tmp_path / "adapter"), CPU, dtype, pack=False).module
    assert {p.dtype for p in module.parameters()} == {dtype}
    buffers = AutoModelForCausalLM.from_pretrained(base, dtype=dtype).named_buffers()
    assert {n: b.dtype for n, b in buffers} == {n: b.dtype for n, b in module.named_buffers()}
    monkeypatch.setattr(checkpoints, "part", lambda *_: None)
    with pytest.raises(SystemExit, match="cannot be merged into its base; saw logits that differ"):
        models.load(str(tmp_path / "adapter"), CPU, dtype, pack=False)
    monkeypatch.setattr(files, "free_memory", lambda: 0)  # then as far as half precision tells
    models.load(str(tmp_path / "adapter"), CPU, dtype, pack=False)


# --- quantised students


def fp8(folder):
    """Write weights as Qwen's and DeepSeek's FP8 checkpoints have them; return what they mean."""
    path, new = folder / "model.safetensors", {}
    whole = load_file(path)
    for name, tensor in whole.items():
        new[name] = tensor
        if name.endswith("proj.weight"):
            scale = tensor.abs().max() / 448
            new[name] = (tensor / scale).to(torch.float8_e4m3fn)
            new[name + "_scale_inv"] = scale.reshape(1, 1)
            whole[name] = new[name].float() * scale
    save_file(new, path, {"format": "pt"})
    how = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    edit(folder / "config.json", quantization_config=how)
    return whole


def mxfp4(folder):
    config = GptOssConfig(
        vocab_size=make.V,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        layer_types=["sliding_attention", "full_attention"],
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    path, new = folder / "model.safetensors", {}
    for name, tensor in load_file(path).items():
        if name.endswith(("gate_up_proj", "down_proj")):
            experts, inner, outer = tensor.shape
            shape = (experts, outer, inner // 32)
            new[name + "_blocks"] = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8)
            new[name + "_scales"] = torch.full(shape, 124, dtype=torch.uint8)
        else:
            new[name] = tensor.bfloat16()
    save_file(new, path, {"format": "pt"})
    how = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head", "model.embed_tokens"]}
    edit(folder / "config.json", quantization_config=how)


@pytest.mark.parametrize("kind", ("fp8", "mxfp4"))
@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_best_of_a_quantised_student_is_whole(mine, kind, dtype):
    """It held float8 weights, or names that transformers does not know."""
    if kind == "fp8":
        wanted = fp8(mine / "student")
    else:
        mxfp4(mine / "student")
    step(mine, "--attn", "eager", "--save-dtype", dtype)
    best = mine / "stage1/best"
    saved = load_file(best / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {getattr(torch, dtype)}
    assert "quantization_config" not in files.read_json(best / "config.json")
    module, info = AutoModelForCausalLM.from_pretrained(best, output_loading_info=True)
    assert not any(info.values()), info
    if kind == "fp8" and dtype == "float32":
        for name, tensor in wanted.items():
            torch.testing.assert_close(saved[name], tensor, rtol=1e-2, atol=1e-2)
    started = models.load(str(mine / "student"), CPU, attn="eager", pack=False).module
    close = 1e-5 if dtype == "float32" else 0.05
    assert checkpoints.difference(logits(module.float()), logits(started)) < close


def test_a_quantised_student_that_cannot_be_widened_is_refused(mine):
    edit(mine / "student/config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    code, words = make.ends(stage1_sft.main, *make.stage1(mine))
    assert code == 1 and "gptq" in words and "the checkpoint that it was made of" in words


def damaged_save(monkeypatch, damage, at):
    """Make the save number `at` (the first is 0) one that writes something else."""
    plain, saves = checkpoints.save, []

    def save(module, tokenizer, folder, dtype=torch.float32, weights=True):
        state = plain(module, tokenizer, folder, dtype, weights)
        if not weights:
            return state
        saves.append(folder)
        path = folder / "model.safetensors"
        if len(saves) == at + 1:
            saved = load_file(path)
            name = sorted(saved)[0]
            if damage == "a value":
                saved[name].view(-1)[7] += 1e-4
            elif damage == "a dtype":
                saved[name] = saved[name].bfloat16()
            elif damage == "a shape":
                saved[name] = saved[name][:-1].clone()
            elif damage == "one less":
                del saved[name]
            else:
                saved[name + "_scale_inv"] = saved[name].clone()
            save_file(saved, path, {"format": "pt"})
        return state

    monkeypatch.setattr(checkpoints, "save", save)
    return saves


@pytest.mark.parametrize("damage", ("a value", "a dtype", "a shape", "one less", "a name"))
@pytest.mark.parametrize("at", (0, 1))
def test_a_checkpoint_that_is_not_the_model_is_never_published(mine, monkeypatch, damage, at):
    """Not the first, and none of the others."""
    saves = damaged_save(monkeypatch, damage, at)
    code, words = make.ends(stage1_sft.main, *make.stage1(mine, "--steps", 1, "--lr", 1e-30))
    assert code == 1 and "is not the model in memory" in words
    assert len(saves) == at + 1 and not (mine / f"stage1/{('best', 'final')[at]}").exists()


@pytest.mark.parametrize("merge", (False, True))
def test_a_saved_adapter_is_compared_too(mine, monkeypatch, merge):
    flags = ("--lora-rank", 2, "--steps", 1) + ("--merge",) * merge
    plain = checkpoints.save_adapter

    def other_value(module, tokenizer, folder, *more):
        state = plain(module, tokenizer, folder, *more)
        path = folder / checkpoints.ADAPTER_WEIGHTS
        saved = load_file(path)
        saved[sorted(saved)[0]].view(-1)[0] += 1e-4
        save_file(saved, path, {"format": "pt"})
        return state

    monkeypatch.setattr(checkpoints, "save_adapter", other_value)
    code, words = make.ends(stage1_sft.main, *make.stage1(mine, *flags))
    assert code == 1 and "is not the model in memory" in words

    def other_name(module, tokenizer, folder, *more):
        state = plain(module, tokenizer, folder, *more)
        path = folder / checkpoints.ADAPTER_WEIGHTS
        saved = {name.replace("q_proj", "q"): tensor for name, tensor in load_file(path).items()}
        save_file(saved, path, {"format": "pt"})
        return {name.replace("q_proj", "q"): tensor for name, tensor in state.items()}

    monkeypatch.setattr(checkpoints, "save_adapter", other_name)
    code, words = make.ends(stage1_sft.main, *make.stage1(mine, *flags, "--fresh"))
    assert code == 1 and "PEFT would not read it" in words
    monkeypatch.setattr(checkpoints, "save_adapter", plain)
    make.call(stage1_sft.main, *make.stage1(mine, *flags, "--fresh"))


def test_what_cannot_be_saved_is_known_before_the_first_evaluation(mine, monkeypatch):
    from lib import evaluate

    plain = models.load

    def load(*args, **options):
        model = plain(*args, **options)
        model.module.generation_config.temperature = 0.7
        model.module.generation_config.do_sample = False
        model.module.config.odd = torch  # no JSON
        return model

    monkeypatch.setattr(models, "load", load)
    monkeypatch.setattr(evaluate, "evaluate", lambda *_: pytest.fail("hours have passed"))
    code, words = make.ends(stage1_sft.main, *make.stage1(mine, "--steps", 1))
    assert code == 1 and "transformers cannot save this" in words, words


def test_tied_weights_are_saved_once_in_any_dtype(tmp_path):
    made = make.model(tmp_path / "base", tie_word_embeddings=True)
    module = models.load(str(made), CPU, pack=False).module
    for dtype in (torch.float32, torch.bfloat16):
        checkpoints.save(module, make.tokenizer(), tmp_path / "saved", dtype)
        assert "lm_head.weight" not in load_file(tmp_path / "saved/model.safetensors"), dtype


def test_weights_that_config_ties_and_that_differ_stay_two_and_best_says_so(mine, capsys):
    """transformers leaves them apart, whatever config.json says; others would tie them."""
    path = mine / "student/model.safetensors"
    saved = load_file(path)
    saved["lm_head.weight"] = saved["model.embed_tokens.weight"] + 1
    save_file(saved, path, {"format": "pt"})
    step(mine)
    assert "they stay two, and best/ will say so" in capsys.readouterr().out
    best = mine / "stage1/best"
    assert files.read_json(best / "config.json")["tie_word_embeddings"] is False
    again = load_file(best / "model.safetensors")
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        torch.testing.assert_close(again[name], saved[name])
    step(mine, "--student", best, "--out", mine / "again")
    assert "they stay two" not in capsys.readouterr().out


# --- generation_config.json

PUBLISHED = (
    {"do_sample": False, "temperature": 0.9, "top_p": 0.6},
    {"do_sample": True, "temperature": 0.0},
    {"do_sample": False, "temperature": 0.6, "min_p": 0.05, "typical_p": 0.9},
    {"num_beams": 1, "early_stopping": True, "length_penalty": 2.0},
    {"do_sample": False, "num_return_sequences": 2},
    {"pad_token_id": -1, "eos_token_id": 2},
    {"max_new_tokens": -1},
    {"do_sample": True, "top_k": 0, "top_p": 0.0, "temperature": 0.7},
    {"do_sample": True, "top_p": 1.5},
    {"cache_implementation": "hybrid"},
    {"return_dict_in_generate": False, "output_scores": True},
    {"do_sample": "true", "temperature": "0.7"},
    {"eos_token_id": [3, "<|im_end|>"]},
    {"eos_token_id": {"a": 1}, "watermarking_config": 3, "early_stopping": "soon"},
)


@pytest.mark.parametrize("settings", PUBLISHED, ids=str)
def test_a_generation_config_as_published_is_mended_before_the_first_step(
    mine, monkeypatch, capsys, settings
):
    path = mine / "student/generation_config.json"
    path.write_text(json.dumps(settings))
    model = models.load(str(mine / "student"), CPU)
    models.stop_at(model, [3], make.tokenizer())
    checkpoints.save(model.module, make.tokenizer(), mine / "saved")
    assert AutoModelForCausalLM.from_pretrained(mine / "saved").generation_config.eos_token_id
    said = capsys.readouterr().out
    unsound = generate.fits(generate.GenerationConfig(), settings) is None
    assert ("left out or mended" in said) == (unsound or said != ""), said
    if 0.0 in (settings.get("temperature"), settings.get("top_p")):
        assert model.module.generation_config.do_sample is False, "0 means the likeliest"
    if settings.get("temperature") == "0.7":
        assert generate.read_config(mine / "student").temperature == 0.7


def test_a_good_generation_config_is_read_as_transformers_reads_it(tmp_path):
    good = {"do_sample": True, "temperature": 0.7, "top_k": 20, "eos_token_id": [3, 5], "mine": 1}
    (tmp_path / "generation_config.json").write_text(json.dumps(good))
    plain = generate.GenerationConfig.from_pretrained(tmp_path)
    assert generate.read_config(tmp_path).to_json_string() == plain.to_json_string()


@pytest.mark.parametrize("text", ('{"eos_token_id": ', "[]", "\xff"))
def test_a_broken_generation_config_is_refused_by_every_stage(mine, text):
    (mine / "student/generation_config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(SystemExit, match="generation_config.json"):
        models.load(str(mine / "student"), CPU)


# --- a config.json that is not of these weights


@pytest.mark.parametrize(
    "told, words",
    (
        ({"num_hidden_layers": 1}, "model.layers.1."),
        ({"num_hidden_layers": 3}, "lacks weights"),
        ({"intermediate_size": 16}, "cannot be loaded"),
    ),
)
def test_a_config_that_asks_for_another_model_than_the_weights_hold(mine, told, words):
    edit(mine / "student/config.json", **told)
    with pytest.raises(SystemExit, match=words):
        models.load(str(mine / "student"), CPU)


def add(folder, **tensors):
    path = folder / "model.safetensors"
    save_file(load_file(path) | tensors, path, {"format": "pt"})


@pytest.mark.parametrize(
    "name, refused",
    (
        ("model.layers.0.self_attn.q_proj.bias", True),
        ("model.layers.1.self_attn.q_norm.weight", True),
        ("model.layers.0.self_attn.rotary_emb.inv_freq", False),
        ("vision_tower.layers.0.mlp.weight", False),
        ("mtp.norm.weight", False),
    ),
)
def test_a_tensor_that_has_no_place_is_refused_or_named(mine, capsys, name, refused):
    add(mine / "student", **{name: torch.ones(32)})
    if refused:
        with pytest.raises(SystemExit, match=f"gives no place; saw {name}"):
            models.load(str(mine / "student"), CPU)
    else:
        models.load(str(mine / "student"), CPU)


def test_weights_that_lie_twice_are_read_and_counted_once(mine):
    before = checkpoints.identity(mine / "student"), checkpoints.weight_bytes(mine / "student")
    path = mine / "student/model.safetensors"
    (mine / "student/consolidated.safetensors").write_bytes(path.read_bytes())
    after = checkpoints.identity(mine / "student"), checkpoints.weight_bytes(mine / "student")
    assert after == before
    assert len(checkpoints.shapes(mine / "student")) == len(load_file(path))


# --- the same run by another path


@pytest.fixture
def spellings(mine, monkeypatch):
    """Return ways to write the path of a folder of `mine`."""
    monkeypatch.chdir(mine)
    (mine / "link").symlink_to(mine)

    def ways(name):
        return (
            name,
            f"{name}/",
            f"./{name}",
            str(mine / name),
            f"link/{name}",
            f"{name}/../{name}",
        )

    return ways


def test_a_run_is_the_same_by_any_spelling_of_its_paths(mine, spellings):
    step(mine, "--data", "data", "--student", "student")
    for rows, student in zip(spellings("data"), spellings("student")):
        with pytest.raises(SystemExit) as ended:
            step(mine, "--data", rows, "--student", student)
        assert ended.value.code == 0, ended.value
    (mine / "copy").mkdir()
    for path in (mine / "student").iterdir():
        (mine / "copy" / path.name).write_bytes(path.read_bytes())
    with pytest.raises(SystemExit) as ended:
        step(mine, "--student", "copy")
    assert ended.value.code == 0, "the same weights elsewhere"
    make.model(mine / "other", seed=5)
    with pytest.raises(SystemExit, match="student identity"):
        step(mine, "--student", "other")


def test_a_setting_is_a_place_or_a_word(mine, spellings):
    for one in spellings("data"):
        assert files.same(one, "data") and files.same([f"general={one}"], ["general=data"])
    assert not files.same("data", "student") and not files.same("a=data", "b=data")
    assert not files.same(["data"], ["data", "data"]) and not files.same("", str(mine))
    assert files.same(None, None) and not files.same(1, True + 1) and not files.same("1", 1)


# --- layers that are kept


def gemma(folder, **more):
    from transformers import Gemma3TextConfig

    config = Gemma3TextConfig(
        vocab_size=make.V,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=12,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        sliding_window=8,
        **more,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return models.load(str(folder), CPU, pack=False).module


FLAGS = ("--data", "d", "--student", "s", "--out", "o", "--keep-layers")


def test_layers_are_kept_evenly(tmp_path):
    module = gemma(tmp_path / "model")
    models.keep_only_layers(module, 4)
    assert len(module.model.layers) == module.config.num_hidden_layers == 4
    evenly = stage1_sft.parse_args([*FLAGS, "evenly:4"])
    assert evenly.keep_layers == 4
    for wrong in ("evenly:x", "0,evenly:2", "evenly", "evenly:0"):
        code, words = make.ends(stage1_sft.parse_args, *FLAGS, wrong)
        assert code == 2, words


@pytest.mark.parametrize(
    "keep, pattern", (([2, 5, 8, 11], 2), ([0, 1, 2, 3], None), ([5, 11], 1), ([0, 5], 2))
)
def test_the_pattern_of_windows_fits_the_layers_kept(tmp_path, capsys, keep, pattern):
    module = gemma(tmp_path / "model")
    name = "sliding_window_pattern"
    if not hasattr(module.config, name):
        name = "_sliding_window_pattern"
    kinds = [module.config.layer_types[i] for i in keep]
    module.config.max_window_layers = 6
    module.config.mlp_only_layers = [5, 7]
    module.config.some_numbers = list(range(12))
    module.config.eos_token_id = list(range(12))
    models.keep_only_layers(module, keep)
    assert module.config.layer_types == kinds
    if pattern:
        assert getattr(module.config, name) == pattern
    assert module.config.max_window_layers == sum(i < 6 for i in keep)
    assert module.config.mlp_only_layers == [new for new, i in enumerate(keep) if i in (5, 7)]
    assert module.config.some_numbers == keep and len(module.config.eos_token_id) == 12


# --- tokenizers that have more tokens


@pytest.fixture
def padded(tmp_path):
    """A student whose tokenizer, configuration and generation_config have a padding token that its
    embedding has no row for, and data of that tokenizer, which do not hold it."""
    words = make.tokenizer()
    words.add_special_tokens({"pad_token": "[PAD]"})
    make.dataset(tmp_path / "data", rows=8, val=4, longest=10)
    words.save_pretrained(tmp_path / "data/tokenizer")
    make.model(tmp_path / "student", with_tokenizer=words)
    for name in ("config.json", "generation_config.json"):
        edit(tmp_path / "student" / name, pad_token_id=make.V)
    return tmp_path


@pytest.mark.filterwarnings("ignore")
def test_tokens_above_the_embedding_are_of_no_weight_where_no_row_holds_them(padded, capsys):
    make.call(stage1_sft.main, *make.stage1(padded, "--steps", 1))
    assert "1 tokens above" in capsys.readouterr().out
    best = padded / "stage1/best"
    words, model = (kind.from_pretrained(best) for kind in (AutoTokenizer, AutoModelForCausalLM))
    words.padding_side = "left"
    rows = words(["w1", "w1 w2"], padding=True, return_tensors="pt")  # plain transformers pads
    model.generate(rows["input_ids"], attention_mask=rows["attention_mask"], max_new_tokens=2)
    assert words.pad_token_id < make.V and words.get_vocab()["[PAD]"] == make.V


@pytest.mark.filterwarnings("ignore")
def test_a_token_above_the_embedding_in_a_row_is_refused_by_name(padded):
    tokens = np.load(padded / "data/train.tokens.npy")
    tokens[5] = make.V
    np.save(padded / "data/train.tokens.npy", tokens)
    code, words = make.ends(stage1_sft.main, *make.stage1(padded, "--steps", 1))
    assert code == 1 and f"token {make.V}, '[PAD]'; wanted 0 to {make.V - 1}" in words
    assert "resize_token_embeddings(62)" in words and "--chat-template" in words


@pytest.mark.filterwarnings("ignore")
def test_a_prompt_that_names_a_token_above_the_embedding_is_one_line(padded, capsys):
    argv = ["--ckpt", padded / "student", "--max-new-tokens", 2, "--device", "cpu", "--prompt"]
    make.call(chat.main, *argv, "w1")
    with pytest.raises(SystemExit):
        make.call(chat.main, *argv, "w1 [PAD] w2")
    assert "none of the model's; saw token 61, '[PAD]'; wanted 0 to 60" in capsys.readouterr().out
    side = SimpleNamespace(chat=SimpleNamespace())
    side.chat.module = AutoModelForCausalLM.from_pretrained(make.model(padded / "plain"))
    side.chat.tokenizer = AutoTokenizer.from_pretrained(padded / "data/tokenizer")
    assert api.completion_prompts(side, "w1") == ([[5]], ["w1"])
    with pytest.raises(api.Refused, match="token 61"):
        api.completion_prompts(side, ["w1", "[PAD]"])


def test_a_teacher_with_other_tokens_that_no_row_holds(mine, capsys):
    dataset = data.Dataset(mine / "data")
    path = mine / "student/tokenizer.json"
    told = json.loads(path.read_text())
    words = told["model"]["vocab"]
    used, unused = dataset.used(), sorted({*words.values()} - {*dataset.used()})
    names = {number: word for word, number in words.items()}
    assert unused, "a token that no row holds"
    words["another"] = words.pop(names[unused[-1]])
    path.write_text(json.dumps(told))
    models.load(str(mine / "student"), CPU, dataset=dataset)
    assert "in all tokens that its rows hold" in capsys.readouterr().out
    words["yet another"] = words.pop(names[used[-1]])
    path.write_text(json.dumps(told))
    with pytest.raises(SystemExit, match="has another tokenizer"):
        models.load(str(mine / "student"), CPU, dataset=dataset)


@pytest.mark.parametrize("how, package", (("gptq", "gptqmodel optimum"), ("torchao", "torchao")))
def test_a_quantised_teacher_names_the_package_that_it_needs(mine, how, package):
    edit(mine / "student/config.json", quantization_config={"quant_method": how, "bits": 4})
    with pytest.raises(SystemExit, match=f"mend it with: pip install {package}"):
        models.load(str(mine / "student"), CPU, torch.bfloat16)
