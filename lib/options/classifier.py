"""Classifiers: a Hugging Face model with a classification head, behind the doors of a causal LM
(lib/models.py).

Contract: `load` returns a `Classifier`: its `hidden` are the class logits (N, C) of a batch's rows,
in the order of the data's labels, and its `head` is the identity over them. So loss, dump, records
and evaluation are those of language models with V = C: nothing is written twice. A teacher must
bring a trained head whose labels are the data's; a student whose head is missing, or of other
labels, gets a new one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from lib import data, evaluate, files, models, template
from lib.head import Head
from lib.options import lora


@dataclass(frozen=True)
class Classifier(models.Model):
    """order (C,): the place in the model's own logits of each of the data's labels. pad: the token
    its padding is made of."""

    order: Tensor
    pad: int

    @property
    def vocab(self) -> int:
        """Classes."""
        return len(self.order)

    def hidden(self, batch: data.Batch) -> Tensor:
        """Return the class logits (N, C) of the batch's rows, one a line. Positions are the model's
        own: its padding is masked."""
        there = batch.row_of >= 0
        logits = self.body(
            input_ids=batch.tokens.masked_fill(~there, self.pad), attention_mask=there.long()
        ).logits
        return logits[:, self.order]

    def head(self, vocab: int | None = None) -> Head:
        """Return the identity (C, C): what follows `hidden` in a language model has been done
        here."""
        assert vocab in (None, self.vocab), (vocab, self.vocab)
        return Head(torch.eye(self.vocab, device=self.device), None, self.vocab)


def is_classifier(folder: Path) -> bool:
    """Return whether a folder holds a model with a classification head."""
    if models.is_gguf(folder) or lora.is_adapter(folder) or not (folder / "config.json").exists():
        return False
    return any(
        name.endswith("ForSequenceClassification")
        for name in files.read_json(folder / "config.json").get("architectures") or ()
    )


def positions(folder: Path) -> int:
    """Return how many tokens a model reads at most."""
    config = files.read_json(folder / "config.json") if (folder / "config.json").exists() else {}
    config = config.get("text_config", config)
    most = config.get("max_position_embeddings") or 1 << 30
    return (
        most - 2 if config.get("model_type") in ("roberta", "xlm-roberta", "camembert") else most
    )  # these count from the padding id on


def own_labels(folder: Path) -> list[str] | None:
    """Return the names of a classifier's labels in the order of its logits; None for a model
    without such a head."""
    if not is_classifier(folder):
        return None
    config = files.read_json(folder / "config.json")
    names = config.get("id2label") or {
        str(number): f"LABEL_{number}" for number in range(config.get("num_labels", 2))
    }
    return [str(names[number]) for number in sorted(names, key=int)]


def matched(own: list[str], wanted: list[str]) -> list[int] | None:
    """Return the place in `own` of every wanted label, None where they are not the same ones; case
    does not matter.

    LABEL_0, LABEL_1, ... (what transformers writes where nobody gave names) are taken in their
    order.
    """
    if len(own) == len(wanted) and all(
        name.casefold() == f"label_{number}" for number, name in enumerate(own)
    ):
        return list(range(len(own)))
    for key in (str, str.casefold):  # as they are, first: case may tell two labels apart
        place = {key(name): number for number, name in enumerate(own)}
        if len(place) == len(own) == len(wanted) and set(place) == {key(name) for name in wanted}:
            return [place[key(name)] for name in wanted]
    return None


def load(
    name: str,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    *,
    dataset: data.Dataset,
    rows: list[data.Split] | None = None,
    attn: str = "sdpa",
    compiled: bool = False,
    from_scratch: bool = False,
    keep_layers: list[int] | None = None,
    seed: int = 0,
    trust_remote_code: bool = False,
    amp: torch.dtype | None = None,
    pack: bool = False,
) -> Classifier:
    """Load a classifier of the data's labels, check it, and put it on a device. (amp and pack,
    which lib/models.py asks for, are not needed here: rows are never packed.)

    rows: the splits as a teacher's own tokenizer reads them; it must have a head trained for these
    labels. Without, the model is a student: it shares the data's tokenizer, and gets a new head
    where it has none of these labels. `from_scratch` allows a folder without weights.
    """
    from transformers import AutoConfig, AutoModelForSequenceClassification
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder = models.local_folder(name, trust_remote_code)
    if models.is_gguf(folder) or lora.is_adapter(folder):
        files.fail(
            f"{folder} cannot classify",
            "a GGUF file" if models.is_gguf(folder) else "an adapter",
            "whole weights, as safetensors",
        )
    labels, teacher = dataset.labels, rows is not None
    if not teacher:
        models.check_vocabulary(folder, dataset, trust_remote_code)
    own, weights = own_labels(folder), models.has_weights(folder)
    order = None if own is None else matched(own, labels)
    if teacher and (order is None or not weights):
        seen = (
            "no classification head"
            if own is None
            else "no weights"
            if not weights
            else f"labels {', '.join(own[:8])}"
        )
        files.fail(
            f"the teacher {folder} does not know these classes",
            seen,
            f"a head trained for {', '.join(labels[:8])}",
            f"stage1_sft.py --data ... --student {name}, on data of its own tokenizer and these"
            " labels",
        )
    if not weights and not from_scratch:
        files.fail(
            f"{folder} has no weights",
            "config.json alone",
            "*.safetensors beside it",
            "make stage1 (stage1_sft.py makes a new model from a config.json)",
        )
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    text = config.get_text_config()
    if order is None:
        config.num_labels = len(labels)
        config.id2label, config.label2id = (
            dict(enumerate(labels)),
            {label: number for number, label in enumerate(labels)},
        )
    elif own != labels and all(name.casefold().startswith("label_") for name in own):
        print(
            f"model: {folder} calls its classes {own[0]}, {own[1]}, ...; they are taken in the"
            f" data's order: {', '.join(labels[:8])}"
        )
    tokenizer = tokenizer_of(folder, dataset, trust_remote_code) if teacher else dataset.tokenizer()
    text.pad_token_id = pad = next(
        (
            token
            for token in (text.pad_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id)
            if token is not None
        ),
        0,
    )
    text.use_cache = False
    most, longest = (
        positions(folder),
        max(
            int(split.rows["length"].max(initial=0))
            for split in rows or (dataset.train, dataset.val)
        ),
    )
    if longest > most:
        files.fail(
            f"{folder} reads {most} tokens at most",
            f"a row of {longest}",
            mend=f"prepare_data.py --max-len {most}",
        )
    options = dict(attn_implementation=attn, trust_remote_code=trust_remote_code, dtype=dtype)
    torch.manual_seed(seed)  # a new head is random
    try:
        if weights:
            module, loaded = AutoModelForSequenceClassification.from_pretrained(
                folder,
                config=config,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=order is None,
                **options,
            )
        else:
            print(
                f"model: {folder} has no weights: a new model is made from its config.json, seed"
                f" {seed}"
            )
            module, loaded = (
                AutoModelForSequenceClassification.from_config(config, **options),
                {"missing_keys": ()},
            )
    # safetensors, JSON, OSError, missing shards or kernels, code that is not trusted: each says
    # what it saw
    except Exception as broken:
        text = str(broken)
        files.fail(
            f"{folder} cannot be loaded as a classifier",
            f"{type(broken).__name__}: {text[:300]}",
            "config.json and *.safetensors that belong together",
            "--attn eager" if "attention" in text or "attn" in text else None,
        )
    prefix = f"{module.base_model_prefix}."
    missing = sorted(
        {*loaded["missing_keys"], *(entry[0] for entry in loaded.get("mismatched_keys", ()))}
    )
    fresh = [
        key for key in missing if not key.startswith(prefix) or ".pooler." in key
    ]  # the head, and what only it reads
    if lost := [
        key for key in missing if order is not None or key not in fresh
    ]:  # transformers would fill them with random numbers
        files.fail(
            f"{folder} lacks weights",
            ", ".join(lost[:3]) + " missing",
            "every tensor of its config.json",
        )
    if weights and order is None:
        for layer in (
            part
            for name, part in module.named_modules()
            if isinstance(part, nn.Linear) and not name.startswith(prefix)
        ):
            nn.init.normal_(
                layer.weight, std=getattr(text, "initializer_range", 0.02)
            )  # where the sizes agree, other labels' head was read
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        known = (
            "no classification head"
            if own is None
            else f"a head for other labels ({', '.join(own[:4])})"
        )
        print(
            f"model: {folder} has {known}: a new one is made for {len(labels)} classes, seed {seed}"
        )
    if keep_layers:
        models.keep_only_layers(module, keep_layers)
    if broken := next(
        (key for key, value in module.named_parameters() if not torch.isfinite(value).all()), None
    ):
        files.fail(
            f"{folder} holds weights that are not finite",
            f"NaN or infinity in {broken}",
            "a whole checkpoint",
        )
    module.to(device).eval()
    model = Classifier(
        module, module, folder, torch.tensor(order or range(len(labels)), device=device), pad
    )
    probe(model)
    return (
        Classifier(module, torch.compile(module, dynamic=True), folder, model.order, pad)
        if compiled
        else model
    )


@torch.no_grad()
def probe(model: Classifier) -> None:
    """Refuse a model whose logits of a row change with the padding beside it (padding it does not
    mask, or takes for the end of the row)."""
    size = model.module.get_input_embeddings().weight.shape[0]
    tokens = torch.tensor(
        [token for token in range(1, size) if token != model.pad][:8], device=model.device
    )
    row_of = torch.zeros(2, len(tokens), dtype=torch.int64, device=model.device)
    row_of[1], row_of[1, len(tokens) - 3 :] = 1, -1

    def batch(rows, which):
        return data.Batch(rows, rows, rows, rows, rows, [0], which)

    together = model.hidden(batch(tokens.repeat(2, 1), row_of))
    alone = torch.cat(
        [
            model.hidden(batch(rows[None], torch.zeros_like(rows)[None]))
            for rows in (tokens, tokens[:-3])
        ]
    )
    limit = 1e-3 if alone.dtype == torch.float32 else 0.1
    if (
        error := ((together - alone).float().norm() / alone.float().norm().clamp_min(1e-9)).item()
    ) > limit:
        files.fail(
            f"{type(model.module).__name__} reads the padding of its rows",
            f"a relative difference of {error:.2g}",
            f"at most {limit:g}",
        )


def read_by(dataset: data.Dataset, name: str, folder: Path, args) -> data.Split:
    """Return a split (train or val) as the tokenizer of the model in `folder` reads its texts: as
    many tokens as the data's --max-len at most."""
    most = min(dataset.meta["args"]["max_len"], positions(folder))
    return data.retokenized(
        dataset.folder, name, tokenizer_of(folder, dataset, args.trust_remote_code), most
    )


def alone(
    args,
    dataset: data.Dataset,
    folder: Path,
    device: torch.device,
    amp: torch.dtype | None,
    store=None,
    **about,
) -> None:
    """--eval-only of a classifier, of whatever tokenizer: see evaluate.alone."""
    if own_labels(folder) is None:
        files.fail(
            f"{folder} cannot be measured",
            "no classification head",
            f"one for {', '.join(dataset.labels[:8])}",
            f"stage1_sft.py --data {dataset.folder} --student {args.student}, and what it writes",
        )
    dataset.val = read_by(dataset, "val", folder, args)
    model = load(
        args.student,
        device,
        dataset=dataset,
        rows=[dataset.val],
        attn=args.attn,
        trust_remote_code=args.trust_remote_code,
    )
    evaluate.alone(args, model, dataset, model.vocab, amp, store, **about)


def tokenizer_of(folder: Path, dataset: data.Dataset, trust_remote_code: bool = False):
    """Return a teacher's own tokenizer; where its folder has none, that of the data."""
    if any((folder / name).exists() for name in models.TOKENIZERS):
        return template.load_tokenizer(folder, trust_remote_code)
    return dataset.tokenizer()


def reader(args, folder: Path) -> tuple[Callable[[list[str]], list[list[dict]]], torch.device]:
    """Return what chat.py asks for the classes of texts (of each its {"label", "score"}, the
    likeliest first), and where it runs."""
    if args.score is not None:
        files.fail(
            f"--score does not go with {folder}",
            "a classifier",
            "a language model",
            "stage1_sft.py --eval-only (accuracy, macro-F1, confusion)",
        )
    for name in (
        "teacher",
        "system",
        "greedy",
        "temperature",
        "top_p",
        "top_k",
        "repetition_penalty",
        "max_new_tokens",
    ):
        if getattr(args, name):
            files.fail(
                f"--{name.replace('_', '-')} does not go with {folder}",
                "a classifier, which writes nothing",
                mend="the same without it",
            )
    from transformers import pipeline
    from transformers.utils import logging

    logging.disable_progress_bar()
    device = models.pick_device(args.device, args.threads)
    known = pipeline(
        "text-classification",
        model=str(folder),
        device=device,
        dtype=models.pick_dtype(args.dtype, device, folder),
        top_k=None,
        trust_remote_code=args.trust_remote_code,
    )
    if known.tokenizer.pad_token is None:
        known.tokenizer.pad_token = known.tokenizer.eos_token
    return lambda texts: known(texts, batch_size=args.batch_size, truncation=True), device
