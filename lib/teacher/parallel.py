"""A teacher that lies divided among processes (dump_logits.py --tp, under torchrun).

    torchrun --nproc-per-node 4 dump_logits.py --tp --data ...   # other flags: as of one process

transformers divides each layer by the model's own plan (tensor parallel). The output layer is
divided by tokens: each process makes the logits of its own alone, and what is exchanged of a target
is its k largest logits and a few sums (lib/head.py, class Parts), never its logits. Rank 0 leads:
it reads and writes the folder, and tells the others which rows are next.
"""

import argparse
import signal
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lib import checkpoints, data, files, flags, models
from lib.head import Head, Parts, is_divided, local
from lib.teacher import live, placed, record, writer
from lib.teacher.basis import Basis


def add_flags(group: argparse._ArgumentGroup) -> None:
    """Add the flags of a teacher that is too large for one device."""
    add_tp(group)
    placed.add_flags(group)


def add_tp(group: argparse._ArgumentGroup) -> None:
    """Add the flag of a teacher in parts."""
    flags.option(
        group,
        "--tp",
        free=True,
        action="store_true",
        default=None,
        help="under torchrun: its processes hold a part of the teacher each (tensor parallel)",
    )


def check_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse (exit code 2) what a teacher that lies otherwise than whole on one device does not
    do."""
    placing = live.given_of(args, "tp", "teacher_quant", "device_map")
    if len(placing) > 1:
        parser.error(f"{' and '.join(placing)} do not go together: wanted one of them")
    without = ["map_vocabulary", "align", "teacher_url", "import_"]
    given = [f"--{name.strip('_').replace('_', '-')}" for name in without if getattr(args, name)]
    if args.tp:
        given += ["--compile"] * args.compile + ["--verify"] * (args.verify is not None)
    if placing and given:
        parser.error(f"{placing[0]} does not go with {given[0]}")


def check_live(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse (exit code 2) what a live teacher in parts does not do."""
    without = ["compile", "feature_weight", "attention_weight", "contrastive_weight"]
    given = [flags.spelled(name) for name in without if getattr(args, name)]
    given += ["several teachers"] if flags.folders_of(args.teacher) else []
    if args.tp and given:
        parser.error(f"--tp does not go with {given[0]}")


def placing_of(peers: Any, folder: Path, device: torch.device) -> dict:
    """Return how from_pretrained divides a model among `peers` (the script hands them over:
    lib/options/ranks.py, class Ranks). Refused: what cannot be divided."""
    from transformers.distributed import DistributedConfig

    if peers is None or peers.world == 1:
        files.fail("--tp is for several processes", "one", mend="torchrun --nproc-per-node N")
    if checkpoints.is_adapter(folder) or checkpoints.is_gguf(folder):
        files.fail("--tp cannot divide it", folder, "a folder with all of a model's weights")
    if device.type != (there := "cuda" if torch.cuda.is_available() else "cpu"):
        files.fail("--tp divides among what transformers takes", device, there, "--device auto")
    heads = models.config_of(folder).get_text_config()
    for name in ("num_attention_heads", "num_key_value_heads"):
        if (count := getattr(heads, name, None)) and count % peers.world:
            files.fail(f"{name} is no multiple of the processes", count, f"of {peers.world}")
    return {"distributed_config": DistributedConfig(tp_plan="auto", tp_size=peers.world)}


class Portion(Parts):
    """The part of a vocabulary, `tokens` from `first` on, that is this process's; the others are
    those of `peers`, in their order."""

    def __init__(self, peers: Any, tokens: int) -> None:
        self.peers, self.rank, self.world, self.tokens = peers, peers.rank, peers.world, tokens
        counts = self.of_each(torch.tensor(tokens))
        self.first = int(sum(counts[: self.rank]))
        if not all(counts):
            files.fail("fewer tokens than processes", counts, mend="a smaller --nproc-per-node")

    def of_each(self, x: Tensor) -> list[Tensor]:
        """Return x of every part, all of one shape."""
        found = [torch.empty_like(x) for _ in range(self.world)]
        dist.all_gather(found, x.contiguous())
        return found

    def most(self, x: Tensor) -> Tensor:
        dist.all_reduce(x := x.clone(), dist.ReduceOp.MAX)
        return x

    def total(self, x: Tensor) -> Tensor:
        dist.all_reduce(x := x.clone())
        return x

    def merged(self, values: Tensor, ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
        lacking = (0, k - values.shape[1])  # a part may have fewer tokens than k
        values = torch.nn.functional.pad(values, lacking, value=-torch.inf)
        ids = torch.nn.functional.pad(ids, lacking)
        values, places = torch.cat(self.of_each(values), 1).topk(k, dim=1)
        return values, torch.cat(self.of_each(ids), 1).gather(1, places)

    def whole(self, x: Tensor) -> Tensor:
        counts = torch.stack(self.of_each(torch.tensor(x.shape[-1]))).tolist()
        x = torch.nn.functional.pad(x, (0, max(counts) - x.shape[-1]))
        return torch.cat([part[..., :n] for part, n in zip(self.of_each(x), counts)], -1)

    def softmax(self, z: Tensor) -> Tensor:
        top = self.most(mine := z.logsumexp(1))
        log_sum = top + self.total((mine - top).exp()).log()
        return z.softmax(1).mul_((mine - log_sum).exp()[:, None])

    def own(self, shape: Basis) -> Basis:
        mine = slice(self.first, self.first + self.tokens)
        rows = shape.rows[:, mine].contiguous()
        return replace(shape, mean=shape.mean[mine].contiguous(), rows=rows)

    def told(self, value: Any = None) -> Any:
        return self.peers.told(value)

    def lead(self, do: Any, *words: Any) -> Any:
        made = None
        with self.peers.first():
            if not self.rank:
                made = do(*words)
        return self.told(made)


@dataclass(frozen=True)
class InParts(models.Model):
    """A teacher of which this process has a part of the output layer, beside its part of each
    layer."""

    parts: Portion = field(kw_only=True)

    def hidden(self, batch: data.Batch) -> Tensor:
        """Return the hidden states (N, D): those of rank 0, so that what follows is one to all."""
        hidden = super().hidden(batch).contiguous()
        dist.broadcast(hidden, 0)
        return hidden

    def head(self, vocab: int | None = None) -> Head:
        return portion_of(super().head(vocab), self.parts)


def portion_of(head: Head, parts: Portion) -> Head:
    """Return this process's rows of an output layer."""
    first, last = parts.first, parts.first + parts.tokens

    def mine(rows: Tensor) -> Tensor:
        return local(rows)[: parts.tokens] if is_divided(rows) else rows[first:last]

    apart = None if head.apart is None else head.apart[(head.apart >= first) & (head.apart < last)]
    if apart is not None:
        apart = apart - first if len(apart) else None
    bias = None if head.bias is None else mine(head.bias)
    return replace(head, weight=mine(head.weight), bias=bias, apart=apart, parts=parts)


def check_divided(teacher: models.Model) -> None:
    """Refuse a model that transformers has left whole."""
    if not any(map(is_divided, teacher.module.parameters())):
        kind = type(teacher.module).__name__
        files.fail(f"transformers has no plan to divide {kind}", mend="no --tp")


def in_parts(teacher: models.Model, peers: Any) -> InParts:
    """Return a teacher that transformers has divided, its output layer divided likewise."""
    check_divided(teacher)
    layer, vocab = teacher.module.get_output_embeddings().weight, teacher.limit or teacher.vocab
    if is_divided(layer):
        each = -(-len(layer) // peers.world)  # as torch.chunk cuts it
        first, rows = each * peers.rank, len(local(layer))
    else:  # whole in each process: cut here
        each = -(-vocab // peers.world)
        first, rows = each * peers.rank, each
    parts = Portion(peers, max(0, min(rows, vocab - first)))
    assert parts.first == min(first, vocab), (parts.first, first)
    fields = {name: getattr(teacher, name) for name in models.Model.__dataclass_fields__}
    return InParts(**fields, parts=parts)


def follow(job: Any, settings: dict) -> None:
    """Compute, in every process but rank 0, its part of each batch that rank 0 dumps (`job` is
    dump_logits.py's), until there is none. A signal is rank 0's to hear: it saves, then ends all.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    head, wanted = job.teacher.head(), (settings["k"], settings["temperatures"])
    while (told := head.parts.told()) is not None:
        name, rows = told
        batch = job.splits[name].batch([[row] for row in rows]).to(job.teacher.device)
        kind = record.dtype_of(settings)
        writer.teacher_records(job.teacher, head, batch, *wanted, kind, job.shape)


class LiveInParts(live.LiveTeacher):
    """A live teacher that lies divided among the processes that train (stage2_kd.py --tp). Each of
    their batches goes through its layers in turn, by all together; the output layer is whole in
    each, so that no logits are exchanged."""

    def __init__(self, args: argparse.Namespace, dataset: data.Dataset, peers: Any) -> None:
        super().__init__(args, dataset)
        self.peers, self.parts = peers, placing_of(peers, self.folder, self.device)
        self.room = -1  # nothing of val is remembered: all must have forgotten the same

    def _placing(self, room: int) -> dict | None:
        return self.parts

    def _load(self, room: int) -> None:
        super()._load(room)
        check_divided(self.model)

    def weight_bytes(self) -> int:
        return super().weight_bytes() // self.peers.world

    def hidden(self, batch: data.Batch) -> Tensor:
        mine = self.head.weight.new_empty(0, self.head.weight.shape[1])
        for number, one in enumerate(self.peers.of_each(batch.to(torch.device("cpu")))):
            if len(one.labels):
                hidden = super().hidden(one)
                mine = hidden if number == self.peers.rank else mine
        return mine
