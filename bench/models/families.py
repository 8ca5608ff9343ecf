"""Every causal language model of the installed transformers, tiny and of random weights, through
the whole pipeline: docs/models.md.

    python bench/models/families.py --out out/families --doc docs/models.md
    python bench/models/families.py --out out/families llama mamba llava

Of each type whose configuration can be made small: stage1_sft.py (its own student), dump_logits.py
(its own teacher), stage2_kd.py from these records, chat.py, and a request to the server, with no
flag that is about the model. A type is

    works           every step
    works unpacked  the same, one row a line, which the trainer has said by itself
    refused         one line, which is quoted; it is looked at by hand whether it is right
    TRACEBACK       a fault
    WRONG           a fault: the trainers' cross-entropy on val or the dump's is not that of plain
                    transformers, a row at a time, of the start, the teacher or final/; or an answer
                    of chat.py or the server is not the likeliest tokens of a model without a cache

What is refused with "is_decoder": true named is tried with that too. Weights are larger than an
initializer makes them, so that what a token attends to shows. Writes --out/results.jsonl, one line
a type; with --doc the table. One process a type, one at a time: about 8 minutes of one core.
"""

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import re
import shutil
import socket
import sys
import time
import traceback
import warnings
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
import chat  # noqa: E402
import dump_logits  # noqa: E402
import prepare_data  # noqa: E402
import stage1_sft  # noqa: E402
import stage2_kd  # noqa: E402
from lib import data, files, generate, template  # noqa: E402
from lib.prepare import demo  # noqa: E402

# what makes a configuration small, by the names that transformers has for it
SMALL = dict(
    hidden_size=64,
    n_embd=64,
    d_model=64,
    dim=64,
    emb_dim=64,
    embedding_size=64,
    input_embedding_size=64,
    output_embedding_size=64,
    embedding_dim=64,
    word_embed_proj_dim=64,
    attention_hidden_size=64,
    lru_width=64,
    intermediate_size=128,
    intermediate_size_mlp=128,
    ffn_dim=128,
    n_inner=128,
    d_ff=128,
    ffn_hidden_size=128,
    decoder_ffn_dim=128,
    encoder_ffn_dim=128,
    shared_intermediate_size=64,
    dense_intermediate_size=128,
    expert_ffn_hidden_size=32,
    moe_intermediate_size=32,
    shared_expert_intermediate_size=32,
    moe_shared_expert_intermediate_size=32,
    num_hidden_layers=2,
    n_layer=2,
    n_layers=2,
    num_layers=2,
    decoder_layers=2,
    encoder_layers=2,
    num_attention_heads=4,
    n_head=4,
    n_heads=4,
    num_heads=4,
    decoder_attention_heads=4,
    encoder_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    dim_head=16,
    qkv_proj_dim=64,
    max_position_embeddings=256,
    n_positions=256,
    max_seq_len=256,
    max_target_positions=256,
    num_experts=4,
    n_routed_experts=4,
    num_local_experts=4,
    moe_num_experts=4,
    num_experts_per_tok=2,
    moe_topk=2,
    moe_k=2,
    n_shared_experts=1,
    n_group=1,
    topk_group=1,
    kv_lora_rank=16,
    q_lora_rank=16,
    qk_rope_head_dim=8,
    qk_nope_head_dim=8,
    v_head_dim=16,
    rotary_dim=8,
    state_size=8,
    mamba_d_state=8,
    mamba_d_head=16,
    mamba_n_heads=8,
    mamba_n_groups=1,
    mamba_num_heads=8,
    mamba_head_dim=16,
    n_mamba_heads=2,
    ssm_state_size=8,
    n_groups=1,
    chunk_size=16,
    linear_num_value_heads=2,
    linear_num_key_heads=2,
    linear_key_head_dim=16,
    linear_value_head_dim=16,
    sliding_window=48,
    vocab_size_per_layer_input=300,
    hidden_size_per_layer_input=16,
    laurel_rank=8,
    index_n_heads=2,
    index_head_dim=16,
    max_source_positions=64,
    depth=1,
    image_size=28,
    patch_size=14,
    out_hidden_size=64,
    embed_dim=64,
    num_query_tokens=4,
    adapter_in_dim=64,
    text_hidden_size=64,
    projector_hidden_size=64,
)
LISTS = ("layer_types", "mlp_layer_types", "attention_types", "layers_block_type", "block_types")
SUBS = ("text_config", "vision_config", "language_config", "decoder", "audio_config")
SUBS += ("qformer_config", "adapter_config", "vlm_config", "encoder_config", "perceiver_config")
DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
DROP = object()
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
THREE = {"rope_parameters": ROPE | {"mrope_section": [2, 3, 3]}}  # time, height and width
HALF = {"rope_parameters": ROPE | {"mrope_section": [1, 1, 2], "partial_rotary_factor": 0.5}}
# what these names do not say, by model_type
OWN = {
    "bailing_hybrid": {"num_experts": 8, "n_group": 1},
    "bamba": {"attn_layer_indices": [1]},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "falcon_h1": {"mamba_d_ssm": 128},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 48},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "hunyuan_vl_text": {"head_dim": 16} | THREE,
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 8},
    "kimi_linear": {"num_experts_per_token": 2, "linear_head_dim": 16, "linear_num_heads": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8},
    "ministral": {"head_dim": 16},
    "nemotron": {"num_key_value_heads": 2},
    "prophetnet": {"num_hidden_layers": DROP, "num_decoder_layers": 2, "num_encoder_layers": 2},
    "glm4v_text": THREE,
    "glm46v_text": THREE,
    "glm_ocr_text": THREE,
    "glmga_text": THREE,
    "glm4v_moe_text": HALF,
    "paddleocr_vl_text": THREE,
    "qwen2_vl_text": THREE,
    "qwen2_5_vl_text": THREE,
    "qwen2_5_omni_text": THREE,
    "qwen4_exp_text": {
        "indexer_budget": 64,
        "indexer_compress_ratio": 4,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
    },
    "qwen2_5_omni_thinker": {"vision_start_token_id": 3},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 3},
    "reformer": {"is_decoder": True, "axial_pos_shape": (16, 16), "axial_pos_embds_dim": (32, 32)},
    "xlnet": {"max_position_embeddings": DROP},
    "xmod": {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
}
BEGIN = "<!-- made by bench/models/families.py --doc, to the end -->"
LARGER = 3.0  # times an initializer's matrices
NEAR = 2e-3  # nats a target, and logits: what sums in another order change is a hundredth of it
SWITCH = {"is_decoder", "causal"}  # what a configuration calls being a decoder
CPU = "--device cpu --threads 1".split()
TRAIN = "--steps 3 --tokens-per-step 512 --tokens-per-microbatch 512 --lr 3e-3 --samples 1".split()
TRAIN += "--sample-tokens 4 --eval-every 3".split()
ASKED = "Ann has 38 apples."


def small(config, vocab):
    """Return the arguments that make a configuration small, as far as its names are known, and of
    the demo's tokens."""
    told, asked = config.to_dict(), {}
    for name, value in SMALL.items():
        own = getattr(type(config), name, None)
        fixed = isinstance(own, property) and own.fset is None
        if type(told.get(name)) in (int, float, str) and not fixed:
            asked[name] = value
    if "qk_rope_head_dim" in asked:  # DeepSeek's rotations go by it, and each head has its own keys
        asked |= {"head_dim": 8, "num_key_value_heads": 4}
    rope = told.get("rope_parameters")
    if isinstance(rope, dict) and "mrope_section" in rope:
        half = int(16 * rope.get("partial_rotary_factor", 1.0)) // 2
        sections = [half // 4, (half - half // 4) // 2]
        asked["rope_parameters"] = rope | {"mrope_section": [*sections, half - sum(sections)]}
    for name in LISTS:
        value = told.get(name)
        if isinstance(value, list) and value and isinstance(value[0], str):
            kinds = list(dict.fromkeys(value))
            asked[name] = (kinds * 2)[: max(2, len(kinds))]
    count = max([2, *(len(asked[name]) for name in LISTS if name in asked)])
    for name in LISTS:
        if name in asked:
            asked[name] = (asked[name] * count)[:count]
    asked |= {name: count for name in DEPTHS if name in asked}
    for name in SUBS:
        part = getattr(config, name, None)
        if hasattr(part, "to_dict") and part is not config:
            asked[name] = type(part)(**small(part, vocab))
    if "vocab_size" in told:
        asked |= dict(vocab_size=len(vocab), pad_token_id=0, eos_token_id=1)
    if told.get("bos_token_id") is not None:
        asked["bos_token_id"] = 2
    if "forced_eos_token_id" in told:  # of summaries, where the last token that has room is an end
        asked["forced_eos_token_id"] = None
    own = OWN.get(config.model_type, {})
    return {name: value for name, value in (asked | own).items() if value is not DROP}


def build(kind, folder, vocab, **more):
    """Write a tiny model of a type into a folder with its tokenizer, and return its class."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config = CONFIG_MAPPING[kind]()
    config = type(config)(**small(config, vocab) | more)
    causal = type(config) not in AutoModelForImageTextToText._model_mapping
    auto = AutoModelForCausalLM if causal else AutoModelForImageTextToText
    with torch.device("meta"):
        size = sum(p.numel() for p in auto.from_config(config).parameters())
    if size > 20e6:
        raise ValueError(f"{size / 1e6:.0f} M parameters")
    torch.manual_seed(0)
    module = auto.from_config(config).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() > 1:
                parameter *= LARGER
        words = module.get_input_embeddings().weight
        words[0] = words[2]  # an initializer leaves that of padding 0, training does not
        try:
            logits = module(input_ids=torch.arange(5, 15)[None]).logits
            assert torch.isfinite(logits).all(), "weights that overflow"
        except (TypeError, ValueError) as wanting:
            if causal or not re.search("pixel|image|patches|bbox", str(wanting), re.I):
                raise
    module.save_pretrained(folder)
    demo.tokenizer().save_pretrained(folder)
    return type(module).__name__


def attempt(main, *argv):
    """Run a script; return what it printed. SystemExit and others pass, with it as a note."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            main([str(word) for word in argv])
    except BaseException as end:
        end.add_note(said.getvalue()[-3000:])
        raise
    return said.getvalue()


class Plain:
    """A folder as transformers reads it, with no line of ours: a row at a time, without a cache."""

    def __init__(self, folder):
        from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

        try:
            self.module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        except ValueError:
            self.module = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
        self.module.eval()

    @torch.no_grad()
    def logits(self, ids):
        return self.module(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()

    def ce(self, split):
        """Return nats a target."""
        total = 0.0
        for row in range(len(split.rows)):
            ids, answer = split.row(row)
            logp = self.logits(ids.tolist()).log_softmax(-1)
            for place in answer.nonzero()[0]:
                total -= logp[place - 1, int(ids[place])].item()
        return total / split.targets

    def answer(self, ids, ends, longest=8):
        """Return the likeliest tokens, one after the other, until one of `ends`."""
        written = []
        while len(written) < longest and not (written and written[-1] in ends):
            written.append(self.logits([*ids, *written])[-1].argmax().item())
        return written


def ask_server(folder):
    """Send one request to the application that --serve serves; return the answer's text."""
    from lib.chat import model, serve
    from lib.prepare import templates

    args = chat.parse_args(["--ckpt", str(folder), "--serve", "--greedy", *CPU])
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        student = model.load(args, templates.make_ready)
        listening = socket.create_server(("127.0.0.1", 0))
        server = serve.Server(args, {"student": student}, Path(folder), listening)
    asked = [{"role": "user", "content": ASKED}]
    body = {"model": str(folder), "messages": asked, "max_tokens": 8}
    try:
        answer = server.app.test_client().post(
            "/v1/chat/completions",
            json=body,
            headers={"Host": f"127.0.0.1:{listening.getsockname()[1]}"},
        )
        assert answer.status_code == 200, answer.get_data(as_text=True)[:300]
        return answer.get_json()["choices"][0]["message"]["content"]
    finally:
        server.stop()


def through(folder, shared, result):
    """Take one model through the pipeline; note in `result` what was seen."""
    at, start = folder / "run", folder / "start"
    dataset = data.Dataset(shared)
    common = ["--data", shared, *CPU]
    wrong = result["wrong"] = []

    def compare(what, seen, wanted):
        if not abs(seen - wanted) <= NEAR * max(1.0, abs(wanted)):
            wrong.append(f"{what} {seen:.4f}, plain transformers {wanted:.4f}")

    def val(stage):
        lines = (at / stage / "history.jsonl").read_text().splitlines()
        return [line["ce"] for line in map(json.loads, lines) if line["event"] == "eval"]

    result["at"] = "stage 1"
    said = attempt(stage1_sft.main, *common, "--student", start, "--out", at / "stage1", *TRAIN)
    result["packed"] = files.read_json(at / "stage1" / "config.json").get("packed", True)
    result["said"] = [line for line in said.splitlines() if line.startswith("model:")]
    before, after = Plain(start), Plain(at / "stage1" / "final")
    own = before.ce(dataset.val)
    compare("cross-entropy before", val("stage1")[0], own)
    compare("cross-entropy of final/", val("stage1")[-1], after.ce(dataset.val))
    result["at"] = "dump"
    attempt(dump_logits.main, *common, "--teacher", start, "--out", at / "logits", "--k", "8")
    compare("the teacher's", files.read_json(at / "logits/val/meta.json")["teacher_ce"], own)
    result["at"] = "stage 2"
    words = ["--logits", at / "logits", "--student", at / "stage1", "--out", at / "stage2"]
    attempt(stage2_kd.main, *common, *words, *TRAIN)
    distilled = Plain(at / "stage2" / "final")
    compare("stage 2's", val("stage2")[-1], distilled.ce(dataset.val))
    tokenizer, best = template.load_tokenizer(shared / "tokenizer"), at / "stage2" / "final"
    ids = template.prompt_ids(tokenizer, [{"role": "user", "content": ASKED}])
    ends = generate.end_tokens(distilled.module.generation_config, tokenizer.eos_token_id)
    wanted = tokenizer.decode(distilled.answer(ids, ends), skip_special_tokens=True).strip()
    for name, ask in (
        ("chat", lambda: attempt(chat.main, "--ckpt", best, "--prompt", ASKED, *GREEDY)),
        ("server", lambda: ask_server(best)),
    ):
        result["at"] = name
        text = ask().rstrip()
        if not text.endswith(wanted):
            wrong.append(f"{name} answers {text[-80:]!r}, plain transformers {wanted!r}")
    result["at"] = None


GREEDY = ["--greedy", "--max-new-tokens", "8", *CPU]


def one(kind, more, folder, shared, queue):
    """Try one type; put what was seen into the queue."""
    # in this process alone: the picture of a run is not looked at
    stage1_sft.plots.curves = stage2_kd.plots.curves = lambda *_: None
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    begun, result = time.process_time(), {"type": kind, **more}
    try:
        result["class"] = build(kind, folder / "start", demo.vocabulary(), **more)
    except BaseException as broken:
        result["not made"] = f"{type(broken).__name__}: {' '.join(str(broken).split())[:160]}"
        return queue.put(result)
    try:
        through(folder, shared, result)
    except SystemExit as end:
        result["refused"] = str(end)
    except BaseException as broken:
        ours = [f for f in traceback.extract_tb(broken.__traceback__) if "/lib/" in f.filename]
        ours = [f for f in ours if "site-packages" not in f.filename]
        where = f" at {ours[-1].filename.split('/lib/')[-1]}:{ours[-1].lineno}" if ours else ""
        text = " ".join(str(broken).split())[:200]
        result["traceback"] = f"{type(broken).__name__}: {text}{where}"
    result["cpu_s"] = round(time.process_time() - begun, 1)
    queue.put(result)


def kinds():
    """Return the types that are tried: causal models, and those that read images and text."""
    from transformers.models.auto import modeling_auto as auto

    named = auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    seeing = sorted(set(auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES) - set(named))
    return [*sorted(named), *seeing]


def tried(kind, more, folder, shared):
    """Return what came of one type, in a process of its own."""
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    shutil.rmtree(folder, ignore_errors=True)
    process = context.Process(target=one, args=(kind, more, folder, shared, queue))
    process.start()
    process.join(240)
    if process.is_alive():
        process.kill()
    try:
        return queue.get(timeout=2)
    except Exception:
        return {"type": kind, **more, "traceback": f"no end, exit code {process.exitcode}"}


def outcome(result):
    """Return what came of a type, in a word."""
    for word in ("not made", "traceback"):
        if word in result:
            return word
    if result["wrong"]:
        return "wrong"
    if "refused" in result:
        return "refused"
    return "works" if result["packed"] else "unpacked"


def tables(results):
    """Return what docs/models.md says of the results."""
    import transformers

    kinds = {
        word: [] for word in ("works", "unpacked", "refused", "traceback", "wrong", "not made")
    }
    for result in results:
        kinds[outcome(result)].append(result)
    # a type that is refused as an encoder and works as a decoder counts once, as what works
    decoders = {one["type"]: one for one in kinds["works"] + kinds["unpacked"] if SWITCH & {*one}}
    refused = [one for one in kinds["refused"] if one["type"] not in decoders]
    counts = {word: len(kinds[word]) for word in kinds} | {"refused": len(refused)}
    tried = sum(counts.values()) - counts["not made"]
    eager = [one["type"] for one in results if "no sdpa" in str(one.get("said"))]
    lines = [
        f"transformers {transformers.__version__}, {tried} types: {counts['works']} work,"
        f" {counts['unpacked']} work with one row a line, {counts['refused']} are refused in one"
        f" line; {counts['traceback']} tracebacks, {counts['wrong']} wrong. CPU time:"
        f" {sum(one.get('cpu_s', 0) for one in results) / 60:.0f} minutes.",
        "",
        "**Work**, rows packed: " + ", ".join(one["type"] for one in kinds["works"]) + ".",
        "",
        "**Work, one row a line**, which the trainer says by itself (in brackets: how far a row"
        " moves with its neighbour on the line, or from itself alone, relative, in float32): "
        + ", ".join(
            one["type"]
            + "".join(f" with `{name}`" for name in SWITCH & {*one})
            + "".join(
                f" ({found[1]})"
                for line in one["said"]
                if (found := re.search(r"difference of ([\d.e+-]+)\)", line))
            )
            for one in kinds["unpacked"]
        )
        + ".",
        "",
        f"Of these, without SDPA, and so eager by themselves: {', '.join(dict.fromkeys(eager))}.",
        "",
        "**Refused**, each in one line:",
        "",
        "| type | by | the line |",
        "| --- | --- | --- |",
    ]
    for one in refused:
        line = re.sub(r"/\S*/model\b\S*", "MODEL", one["refused"].removeprefix("error: "))
        kind = one["type"] + "".join(f" with `{name}`" for name in SWITCH & {*one})
        lines.append(f"| {kind} | {one['at']} | {line.replace('|', '/')[:300]} |")
    for word in ("traceback", "wrong"):
        lines += [
            f"| {one['type']} | {one['at']} | **{word}** {one[word]} |" for one in kinds[word]
        ]
    names = ", ".join(one["type"] for one in kinds["not made"])
    lines += ["", f"Not tried, since their configurations could not be made small here: {names}."]
    return "\n".join(lines) + "\n"


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("types", nargs="*", help="default: all")
    parser.add_argument("--out", required=True)
    parser.add_argument("--doc", help="the file whose table is written anew")
    parser.add_argument("--keep", action="store_true", help="the models and runs stay in --out")
    args = parser.parse_args(argv)
    if args.doc and BEGIN not in Path(args.doc).read_text():
        parser.error(f"--doc {args.doc} holds no line {BEGIN}")
    os.environ["HF_HUB_OFFLINE"] = "1"
    out = Path(args.out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    shared = out / "data"
    if not (shared / "meta.json").exists():
        with contextlib.redirect_stdout(io.StringIO()):
            demo.main(["--out", str(out / "demo"), "--teacher-rows", "8", "--student-rows", "30"])
            words = f"--source {out}/demo/student.parquet --tokenizer {out}/demo/tokenizer"
            prepare_data.main(f"{words} --out {shared} --limit 20 --val 4 --workers 1".split())
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    # what every type imports is imported before the forks
    Plain(build("llama", out / "model", demo.vocabulary()) and out / "model")
    results = out / "results.jsonl"
    if not args.types:
        results.unlink(missing_ok=True)
    for kind in args.types or kinds():
        folder = out / (kind if args.keep else "model")
        found = [tried(kind, {}, folder, shared)]
        if switch := re.search(r'"(\w+)": true', found[0].get("refused", "")):
            found.append(tried(kind, {switch[1]: True}, folder, shared))
        for result in found:
            print(json.dumps(result), flush=True)
            with results.open("a") as file:
                file.write(json.dumps(result) + "\n")
        if not args.keep:
            shutil.rmtree(folder, ignore_errors=True)
    if args.doc:
        text, found = Path(args.doc).read_text(), map(json.loads, results.read_text().splitlines())
        before = text[: text.index(BEGIN) + len(BEGIN)]
        latest = {(one["type"], bool(SWITCH & {*one})): one for one in found}
        Path(args.doc).write_text(f"{before}\n\n{tables(latest.values())}")


if __name__ == "__main__":
    main()
