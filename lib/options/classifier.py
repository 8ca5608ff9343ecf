"""Classifiers: a Hugging Face model with a classification head, behind the doors of a causal LM
(lib/models.py).

Contract: `load` returns a `Classifier`: its `hidden` are the class logits (N, C) of a batch's rows,
in the order of the data's labels, and its `head` is the identity over them. So loss, dump, records
and evaluation are those of language models with V = C: nothing is written twice. A teacher must
bring a trained head whose labels are the data's; a student whose head is missing, or of other
labels, gets a new one.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from lib import checkpoints, data, files, flags, models, template
from lib.head import Head

NO_HEAD = "no classification head"
TEACHER_MEND = "dump_logits.py, and --logits: a record holds all class logits, so nothing is lost"


@dataclass(frozen=True)
class Classifier(models.Model):
    """order (C,): the place in the model's own logits of each of the data's labels. pad: the token
    its padding is made of."""

    order: Tensor = field()
    pad: int = field()

    @property
    def vocab(self) -> int:
        """Classes."""
        return len(self.order)

    def hidden(self, batch: data.Batch) -> Tensor:
        """Return the class logits (N, C) of the batch's rows, one a line. Positions are the model's
        own: its padding is masked."""
        there = (batch.row_of >= 0).to(batch.tokens.device)
        rows = there.any(1)  # a line of padding alone is none, and is not masked: that makes NaN
        there |= ~rows[:, None]
        logits = self.body(
            input_ids=batch.tokens.masked_fill(~there, self.pad), attention_mask=there.long()
        ).logits
        return logits[rows][:, self.order]

    def head(self, vocab: int | None = None) -> Head:
        """Return the identity (C, C): what follows `hidden` in a language model has been done
        here."""
        assert vocab in (None, self.vocab), (vocab, self.vocab)
        return Head(torch.eye(self.vocab, device=self.device), None, self.vocab)


def is_classifier(folder: Path) -> bool:
    """Return whether a folder holds a model with a classification head."""
    if (
        checkpoints.is_gguf(folder)
        or checkpoints.is_adapter(folder)
        or not (folder / "config.json").exists()
    ):
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
    counted_from_pad = config.get("model_type") in ("roberta", "xlm-roberta", "camembert")
    return most - 2 if counted_from_pad else most


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
    attn: str = "auto",
    compiled: bool = False,
    from_scratch: bool = False,
    keep_layers: list[int] | None = None,
    seed: int = 0,
    trust_remote_code: bool = False,
    amp: torch.dtype | None = None,
    pack: bool = False,
) -> Classifier:
    """Load a classifier of the data's labels, as models.load does (rows are never packed).

    rows: the splits as a teacher's own tokenizer reads them; it must have a head for these labels.
    Without: a student, which shares the data's tokenizer and gets a new head where it has none.
    """
    from transformers import AutoModelForSequenceClassification

    folder = checkpoints.local_folder(name, trust_remote_code)
    check_kind(folder)
    own, weights = own_labels(folder), checkpoints.has_weights(folder)
    order = None if own is None else matched(own, dataset.labels)
    config = models.config_of(folder, trust_remote_code)
    if rows is None:
        checkpoints.check_vocabulary(folder, dataset, trust_remote_code)
        dataset.check_tokens(config.get_text_config().vocab_size, folder)
    else:
        check_teacher(name, folder, dataset.labels, own, order)
    tokenizer = tokenizer_of(folder, dataset, trust_remote_code) if rows else dataset.tokenizer()
    name_labels(config, folder, dataset.labels, own, order)
    pad = choose_pad(config.get_text_config(), tokenizer)
    check_positions(folder, rows or [dataset.train, dataset.val])
    torch.manual_seed(seed)  # a new head is random
    module, loaded = models.read(
        AutoModelForSequenceClassification,
        folder,
        "a classifier",
        seed=seed if from_scratch else None,
        config=config,
        # a head for other labels has another size: left out, and listed
        **({"ignore_mismatched_sizes": True} if order is None and weights else {}),
        attn=attn,
        trust_remote_code=trust_remote_code,
        dtype=dtype,
    )
    check_body(module, folder, loaded, order)
    if weights and order is None:
        new_head(module, folder, own, seed)
    models.keep_only_layers(module, keep_layers)
    models.check_finite(folder, module.named_parameters())
    module.to(device).eval()
    place = order or range(len(dataset.labels))
    model = Classifier(module, module, folder, torch.tensor(place, device=device), pad)
    probe_padding(model)
    return replace(model, body=torch.compile(module, dynamic=True)) if compiled else model


def check_kind(folder: Path) -> None:
    """Refuse what cannot classify."""
    if checkpoints.is_gguf(folder) or checkpoints.is_adapter(folder):
        files.fail(
            f"{folder} cannot classify",
            "a GGUF file" if checkpoints.is_gguf(folder) else "an adapter",
            "whole weights, as safetensors",
        )


def check_teacher(
    name: str, folder: Path, labels: list[str], own: list[str] | None, order: list[int] | None
) -> None:
    """Refuse a teacher without a head that was trained for these labels."""
    weights = checkpoints.has_weights(folder)
    if order is not None and weights:
        return
    if own is None:
        seen = NO_HEAD
    else:
        seen = f"labels {', '.join(own[:8])}" if weights else "no weights"
    files.fail(
        f"the teacher {folder} does not know these classes",
        seen,
        f"a head trained for {', '.join(labels[:8])}",
        f"stage1_sft.py --data ... --student {name}, on data of its own tokenizer and these labels",
    )


def name_labels(
    config, folder: Path, labels: list[str], own: list[str] | None, order: list[int] | None
) -> None:
    """Give a configuration the data's labels, where it has none of them; say how nameless ones are
    taken."""
    if order is None:
        config.num_labels = len(labels)
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: number for number, label in enumerate(labels)}
    elif own != labels and all(label.casefold().startswith("label_") for label in own or ()):
        print(
            f"model: {folder} calls its classes {own[0]}, {own[1]}, ...; they are taken in the"
            f" data's order: {', '.join(labels[:8])}"
        )


def choose_pad(config, tokenizer) -> int:
    """Return the token that padding is made of, and put it into the text model's configuration."""
    tokens = (config.pad_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id)
    known = [token for token in tokens if token is not None and token < config.vocab_size]
    config.pad_token_id = next(iter(known), 0)
    config.use_cache = False
    return config.pad_token_id


def check_positions(folder: Path, splits: list[data.Split]) -> None:
    """Refuse rows that are longer than the model reads."""
    most = positions(folder)
    longest = max(int(split.rows["length"].max(initial=0)) for split in splits)
    if longest > most:
        files.fail(
            f"{folder} reads {most} tokens at most",
            f"a row of {longest}",
            mend=f"prepare_data.py --max-len {most}",
        )


def check_body(module, folder: Path, loaded: dict, order: list[int] | None) -> None:
    """Refuse a checkpoint that lacks tensors, or has some without a place; the head, and what only
    it reads, may be missing where a new one is made."""
    missing = {*loaded["missing_keys"], *(key for key, *_ in loaded.get("mismatched_keys", ()))}
    if order is None:
        prefix = f"{module.base_model_prefix}."
        missing = {key for key in missing if key.startswith(prefix) and ".pooler." not in key}
    models.check_complete(folder, missing)
    models.check_used(module, folder, loaded.get("unexpected_keys", ()))


def new_head(module, folder: Path, own: list[str] | None, seed: int) -> None:
    """Make a random head: where the sizes agree, that of its `own`, other labels was read."""
    known = f"a head for other labels ({', '.join(own[:4])})" if own else NO_HEAD
    count = module.config.num_labels
    print(f"model: {folder} has {known}: a new one is made for {count} classes, seed {seed}")
    std = getattr(module.config.get_text_config(), "initializer_range", 0.02)
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear) and not name.startswith(f"{module.base_model_prefix}."):
            nn.init.normal_(layer.weight, std=std)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


@torch.no_grad()
def probe_padding(model: Classifier) -> None:
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
    tokenizer = tokenizer_of(folder, dataset, args.trust_remote_code)
    return data.retokenized(dataset.folder, name, tokenizer, most)


def adapt_flags(args, dataset: data.Dataset) -> None:
    """Set what follows for a trainer from rows that have a class each; refuse what does not go with
    them."""
    if not dataset.labels:
        return
    args.no_pack, args.samples = True, 0
    mends = {"lora_rank": None, "teacher": TEACHER_MEND}
    for name, mend in mends.items():
        if getattr(args, name, None):
            files.fail(
                f"{flags.spelled(name)} does not go with {dataset.folder}",
                "rows with a class each",
                "rows of language",
                mend,
            )


def to_measure(args, dataset: data.Dataset, device: torch.device) -> Classifier:
    """Return the classifier --student for --eval-only, of whatever tokenizer; the val rows become
    those that its own tokenizer reads."""
    folder = checkpoints.local_folder(args.student, args.trust_remote_code)
    if own_labels(folder) is None:
        files.fail(
            f"{folder} cannot be measured",
            NO_HEAD,
            f"one for {', '.join(dataset.labels[:8])}",
            f"stage1_sft.py --data {dataset.folder} --student {args.student}, and what it writes",
        )
    dataset.val = read_by(dataset, "val", folder, args)
    return load(
        args.student,
        device,
        dataset=dataset,
        rows=[dataset.val],
        attn=args.attn,
        trust_remote_code=args.trust_remote_code,
    )


def tokenizer_of(folder: Path, dataset: data.Dataset, trust_remote_code: bool = False):
    """Return a teacher's own tokenizer; where its folder has none, that of the data."""
    if any((folder / name).exists() for name in checkpoints.TOKENIZERS):
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
