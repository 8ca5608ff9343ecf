"""Many workers that dump into one folder leave what one alone leaves, byte for byte, whatever happens
to some of them. Each worker is a process of its own, with short leases and parts of one batch."""

import os
import signal
import time

import make
import pytest

import dump_logits
from lib import files
from lib.teacher import shared, writer

LEASE_S = 1.0
BASIS = ("--tail-rank", 8, "--tail-bytes", 8)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Return a folder with two chunks of about 20 parts each, and a val of one; alone/ (with a
    basis) and plain/ (without) are what one worker leaves."""
    folder = make.world(tmp_path_factory.mktemp("shared"), rows=80, rows_per_chunk=40)
    for out, more in (("alone", BASIS), ("plain", ("--tail-rank", 0))):
        make.call(dump_logits.main, *words(folder, out, *more))
    return folder


def words(world, out, *more):
    return make.dump(world, "--tokens-per-microbatch", 40, *more, out=out)


def work(argv, log, batch_s=0.0, kill_at=0, after=0.0):
    """What a worker does; batch_s: how long each of its batches takes at least; kill_at: it kills
    itself in that one."""
    time.sleep(after)
    shared.LEASE_S, shared.BEAT_S, shared.LOOK_AGAIN_S = LEASE_S, 0.1, 0.05
    shared.PART_TARGETS, shared.WAITING_S = 1, 0.5
    plain, count = writer.teacher_records, 0

    def slow(*args):
        nonlocal count
        count += 1
        if count == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(batch_s)
        return plain(*args)

    writer.teacher_records = slow
    make.script("dump_logits", argv, log)


class Workers:
    """Workers of one folder, by their number; `log`: the words of all."""

    def __init__(self, world, tmp_path, *more, out):
        self.argv = [str(word) for word in words(world, out, "--shared", *more)]
        self.out, self.log, self.all = world / out, tmp_path / "log", []

    def start(self, **options):
        one = make.processes().Process(target=work, args=(self.argv, self.log), kwargs=options)
        one.start()
        self.all.append(one)
        return one

    def holds(self, one, what="*"):
        """Wait until a worker holds a lease: return its path."""
        until = time.monotonic() + 60
        while time.monotonic() < until:
            for lease in self.out.glob(f".shared/**/{what}.lease"):
                if shared.told_by(lease).get("pid") == one.pid:
                    return lease
            assert one.is_alive(), self.log.read_text()
            time.sleep(0.005)
        raise AssertionError("no lease")

    def end(self):
        """Wait for all: their exit codes."""
        for one in self.all:
            one.join(90)
            if one.is_alive():
                one.kill()
                raise AssertionError(f"a worker hangs: {self.log.read_text()}")
        return [one.exitcode for one in self.all]


def same(world, out, alone):
    """Assert that a dump is that of one worker alone, and that nothing else is left."""
    left = {str(path.relative_to(world / out)) for path in (world / out).rglob("*")}
    wanted = {str(path.relative_to(world / alone)) for path in (world / alone).rglob("*")}
    assert {path for path in left ^ wanted if not path.endswith(".lock")} == set()
    for name in sorted(wanted):
        one, other = world / out / name, world / alone / name
        if name.endswith((".npy", ".safetensors")):
            assert one.read_bytes() == other.read_bytes(), name
        elif name.endswith("meta.json"):
            assert files.read_json(one) == files.read_json(other), name


@pytest.mark.parametrize(
    "several, alone, more", ((4, "alone", BASIS), (2, "plain", ("--tail-rank", 0)))
)
def test_workers_together_leave_what_one_leaves_alone(world, tmp_path, several, alone, more):
    team = Workers(world, tmp_path, *more, out=f"of-{several}")
    for _ in range(several):
        team.start(batch_s=0.02)
    assert team.end() == [0] * several, team.log.read_text()
    same(world, f"of-{several}", alone)
    said = team.log.read_text()
    assert said.count("is fitted, once") == (alone == "alone")
    assert said.count("dump: worker") == several


def test_a_worker_killed_and_one_stopped_past_its_lease_cost_nothing_but_their_parts(
    world, tmp_path
):
    team = Workers(world, tmp_path, "--chunk", 0, *BASIS, out="disturbed")
    four = [team.start(batch_s=0.1) for _ in range(4)]
    os.kill(four[0].pid, signal.SIGSTOP) if team.holds(four[0], "0*") else None
    team.holds(four[1], "0*")
    os.kill(four[1].pid, signal.SIGKILL)
    four[2].join(60)  # they do not wait for it for ever
    four[3].join(60)
    assert (world / "disturbed/chunk-0000/meta.json").exists()
    os.kill(four[0].pid, signal.SIGCONT)
    assert team.end() == [0, -signal.SIGKILL, 0, 0], team.log.read_text()
    for name in ("topk.npy", "done.npy"):
        one, other = (world / out / "chunk-0000" / name for out in ("disturbed", "alone"))
        assert one.read_bytes() == other.read_bytes()
    assert {path.name for path in (world / "disturbed").iterdir()} <= {
        "basis.safetensors",
        "chunk-0000",
        ".lock",
    }
