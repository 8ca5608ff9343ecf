"""A teacher in parts (dump_logits.py --tp): what is known of a vocabulary that lies in several
processes is what one process knows of it, and so are the records and their basis."""

import argparse
import dataclasses
import os
import signal

import make
import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

import dump_logits
from lib import files
from lib import head as heads
from lib.head import Head
from lib.options import ranks
from lib.teacher import fit, parallel, record

V = 151_936
CUTS = (0, 50_001, 150_001, V)  # three parts, none as large as another
TEMPERATURES = [1.0, 2.0, 4.0]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = make.world(tmp_path_factory.mktemp("parallel"), rows=60)
    make.model(folder / "untied", seed=3, tie_word_embeddings=False)
    return folder


def layer(dtype, softcap):
    """Return an output layer, one that is near it, and hidden states: in every process the same."""
    draw = torch.Generator().manual_seed(0)
    weight, noise, hidden = (torch.randn(n, 8, generator=draw, dtype=dtype) for n in (V, V, 40))
    bias = torch.randn(V, generator=draw, dtype=dtype)
    apart = torch.tensor([7, 50_000, 50_001, 151_000])
    head = Head(weight, bias, V, softcap=softcap, apart=apart)
    return head, dataclasses.replace(head, weight=weight + noise / 10), hidden * 2


def known_of(head, near, hidden):
    """Return what records and their basis are made of, told of all parts."""
    parts, some = head.parts, hidden[:6].clone()
    some[5] *= 60  # all but its top k are so light that exp would underflow
    z, stored = (next(one.chunks(some))[1].clone() for one in (head, near))
    found = {"label": heads.at_ids(z, torch.tensor([0, 50_000, 50_001, 150_001, 3, V - 1]), parts)}
    found["share"] = parts.whole(fit.tail_shares(head, some, 16))
    found["ids"], found["gaps"] = heads.take_top(z, 16, parts)
    found["tails"], found["errors"] = heads.tails_and_errors(z, TEMPERATURES, stored, parts)
    shape, _ = fit.fit_basis(head, hidden, 16, 6, 6)
    found["rows"] = shape.rows
    return found


def as_part(rank, port, dtype, softcap, out):
    """Do what one of three processes does, and write what it knows."""
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    dist.init_process_group("gloo", rank=rank, world_size=3)
    head, near, hidden = layer(dtype, softcap)
    peers = ranks.Ranks(argparse.Namespace(), rank, 3)
    parts = parallel.Portion(peers, CUTS[rank + 1] - CUTS[rank])
    head, near = (parallel.portion_of(one, parts) for one in (head, near))
    assert len(head.weight) == CUTS[rank + 1] - CUTS[rank]
    save_file(known_of(head, near, hidden), out / f"{rank}.safetensors")
    dist.destroy_process_group()


@pytest.mark.parametrize(
    "dtype, softcap, rounding", [(torch.float32, 0.0, 1e-5), (torch.float64, 3000.0, 1e-11)]
)
def test_three_uneven_parts_know_what_one_process_knows(tmp_path, dtype, softcap, rounding):
    wanted = known_of(*layer(dtype, softcap))
    assert make.at_once(as_part, [(dtype, softcap, tmp_path)] * 3) == [0, 0, 0]
    assert wanted["tails"].dtype == dtype and (wanted["errors"] > 1e-4).all()
    for rank in range(3):
        seen = load_file(tmp_path / f"{rank}.safetensors")
        assert torch.equal(seen["ids"], wanted["ids"])
        assert torch.equal(seen["label"], wanted["label"])
        for name in ("gaps", "tails", "errors"):
            torch.testing.assert_close(seen[name], wanted[name], rtol=rounding, atol=rounding)
        # a basis is made in float32
        torch.testing.assert_close(seen["share"], wanted["share"], rtol=1e-4, atol=1e-9)
        torch.testing.assert_close(seen["rows"], wanted["rows"], rtol=1e-3, atol=1e-3)


def records(folder):
    return np.load(folder / "topk.npy"), files.read_json(folder / "meta.json")


@pytest.mark.parametrize("teacher", ["teacher", "untied"])
def test_two_processes_dump_what_one_dumps(world, teacher, tmp_path):
    words = ["--teacher", world / teacher, "--tail-rank", 8, "--tail-bytes", 8, "--values", "fp16"]
    words += ["--tokens-per-microbatch", 100]
    one, two = (f"{teacher}-{n}" for n in ("one", "two"))
    make.call(dump_logits.main, *make.dump(world, *words, out=one))
    argv = make.dump(world, *words, "--tp", out=two)
    assert make.together(2, "dump_logits", argv, tmp_path / "log") == [0, 0]
    assert (tmp_path / "log-1").read_text() == ""
    for chunk in ("chunk-0000", "val"):
        (seen, meta), (wanted, told) = (records(world / out / chunk) for out in (two, one))
        assert np.array_equal(seen["id_low"], wanted["id_low"]), chunk
        np.testing.assert_allclose(seen["gap"], wanted["gap"], rtol=2e-3, atol=1e-5)
        tails = record.tails_of(seen), record.tails_of(wanted)
        np.testing.assert_allclose(*tails, rtol=1e-5, atol=1e-5)
        assert meta["teacher_ce"] == pytest.approx(told["teacher_ce"], rel=1e-5)
        for t, figures in told["error"]["0"].items():
            assert meta["error"]["0"][t]["mean"] == pytest.approx(figures["mean"], rel=0.02)
    bases = [load_file(world / out / "basis.safetensors") for out in (one, two)]
    assert torch.equal(bases[0]["bits"], bases[1]["bits"])
    torch.testing.assert_close(bases[1]["rows"], bases[0]["rows"], rtol=1e-2, atol=1e-2)


def test_a_signal_to_rank_0_ends_all_and_one_process_goes_on(world, tmp_path):
    words = ["--tail-rank", 0, "--tokens-per-microbatch", 100, "--chunk", 0]
    argv = make.dump(world, *words, "--tp", out="stopped")
    hook = {"where": "lib.teacher.writer.teacher_records", "number": 2, "signal": signal.SIGTERM}
    codes = make.together(2, "dump_logits", argv, tmp_path / "log", {0: hook})
    assert codes == [128 + signal.SIGTERM, 0] and (tmp_path / "log-1").read_text() == ""
    folder = world / "stopped" / "chunk-0000"
    assert 0 < np.load(folder / "done.npy")["done"].sum() < 60
    make.call(dump_logits.main, *make.dump(world, *words, out="stopped"))
    assert np.load(folder / "done.npy")["done"].all() and (folder / "meta.json").exists()


def test_torchrun_without_a_teacher_in_parts_is_refused(world, monkeypatch):
    for variable, value in dict(WORLD_SIZE=2, RANK=0, LOCAL_RANK=0, LOCAL_WORLD_SIZE=2).items():
        monkeypatch.setenv(variable, str(value))
    argv = make.dump(world, "--tail-rank", 0, out="none")
    code, said = make.ends(dump_logits.main, *argv)
    assert code == 1 and "several processes" in said and "--shared" in said


@pytest.mark.parametrize(
    "several, more, said",
    [
        (1, [], "--tp is for several processes; saw one"),
        (3, [], "is no multiple of the processes; saw 4; wanted of 3"),
        (2, ["--align", "bytes"], "--tp does not go with --align"),
        (2, ["--verify"], "--tp does not go with --verify"),
    ],
)
def test_what_cannot_be_divided_is_said_in_one_line(world, several, more, said, tmp_path):
    argv = make.dump(world, "--tail-rank", 0, "--tp", *more, out="none")
    assert 0 not in make.together(several, "dump_logits", argv, tmp_path / "log")
    assert said in (tmp_path / "log-0").read_text()
