"""Many workers that dump into one folder leave what one alone leaves, byte for byte, whatever happens
to some of them. Each worker is a process of its own, with short leases and parts of one batch."""

import os
import re
import signal
import time
from pathlib import Path

import make
import numpy as np
import pytest

import dump_logits
from lib import data, files
from lib.run import Interrupt
from lib.teacher import shared, writer

LEASE_S = 1.0
STARTED = []  # processes
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


def work(argv, log, batch_s=0.0, team=1, signals=None):
    """What a worker does. batch_s: how long each of its batches takes at least; team: it makes none
    before so many workers have begun; signals: it sends itself one in its n-th batch."""
    shared.LEASE_S, shared.BEAT_S, shared.LOOK_AGAIN_S = LEASE_S, 0.1, 0.05
    shared.PART_TARGETS, shared.WAITING_S = 1, 0.5
    home, plain, count = Path(argv[argv.index("--out") + 1], ".shared"), writer.teacher_records, 0

    def slow(*args):
        nonlocal count, team
        count += 1
        while len(list(home.glob("*.json"))) < team:
            time.sleep(0.01)
        team = 0  # from now on some may leave
        if number := (signals or {}).get(count):
            for _ in range(2):  # its heartbeat tells of all that it has done
                (mine,) = home.glob(f"*-{os.getpid()}-*.json")
                before = mine.read_bytes()
                while mine.read_bytes() == before:
                    time.sleep(0.01)
            os.kill(os.getpid(), number)
        time.sleep(batch_s)
        return plain(*args)

    writer.teacher_records = slow
    make.script("dump_logits", argv, log)


@pytest.fixture(autouse=True)
def none_left():
    """Kill what a test has started and not ended, also what is stopped."""
    yield
    while STARTED:
        one = STARTED.pop()
        one.kill()
        one.join()


class Workers:
    """Workers of one folder, by their number; `log`: the words of all."""

    def __init__(self, world, tmp_path, *more, out):
        self.argv = [str(word) for word in words(world, out, "--shared", *more)]
        self.out, self.log, self.all = world / out, tmp_path / "log", []

    def start(self, **options):
        one = make.processes().Process(target=work, args=(self.argv, self.log), kwargs=options)
        one.start()
        self.all.append(one)
        STARTED.append(one)
        return one

    def end(self):
        """Wait for all: their exit codes."""
        for one in self.all:
            one.join(90)
            if one.is_alive():
                one.kill()
                raise AssertionError(f"a worker hangs: {self.log.read_text()}")
        return [one.exitcode for one in self.all]


def same(world, out, alone, names=("basis.safetensors", "chunk-0000", "chunk-0001", "val")):
    """Assert that a dump is that of one worker alone, where this has `names`, and nothing else."""
    left, wanted = (
        {str(path.relative_to(world / one)) for path in (world / one).rglob("*")}
        for one in (out, alone)
    )
    wanted = {path for path in wanted if path.split("/")[0] in names}
    assert {path for path in left ^ wanted if not path.endswith(".lock")} == set()
    for name in sorted(wanted):
        one, other = world / out / name, world / alone / name
        if name.endswith((".npy", ".safetensors")):
            assert one.read_bytes() == other.read_bytes(), name
        elif name.endswith("meta.json"):
            assert files.read_json(one) == files.read_json(other), name


@pytest.mark.parametrize(
    "several, alone, more", ((3, "alone", BASIS), (2, "plain", ("--tail-rank", 0)))
)
def test_workers_together_leave_what_one_leaves_alone(world, tmp_path, several, alone, more):
    team = Workers(world, tmp_path, *more, out=f"of-{several}")
    for _ in range(several):
        team.start(team=several)
    assert team.end() == [0] * several, team.log.read_text()
    same(world, f"of-{several}", alone)
    said = team.log.read_text()
    assert said.count("is fitted, once") == (alone == "alone")
    assert said.count("dump: worker") == several


def test_a_worker_killed_and_one_stopped_past_its_lease_cost_nothing_but_their_parts(
    world, tmp_path
):
    team = Workers(world, tmp_path, "--chunk", 0, *BASIS, out="disturbed")
    stopped = team.start(team=4, signals={1: signal.SIGSTOP})
    team.start(team=4, signals={1: signal.SIGKILL})
    others = [team.start(team=4) for _ in range(2)]
    for one in others:  # they do not wait for it for ever
        one.join(90)
    assert Path(f"/proc/{stopped.pid}/stat").read_text().split()[2] == "T"
    assert (world / "disturbed/chunk-0000/meta.json").exists()
    os.kill(stopped.pid, signal.SIGCONT)
    assert team.end() == [0, -signal.SIGKILL, 0, 0], team.log.read_text()
    same(world, "disturbed", "alone", ("basis.safetensors", "chunk-0000"))


def two(world, monkeypatch, out):
    """Return two workers of this process, and of each the same chunk of parts of one batch."""
    monkeypatch.setattr(shared, "PART_TARGETS", 1)
    monkeypatch.setattr(shared, "BEAT_S", 60.0)  # stopped, as far as others see
    dataset = data.Dataset(world / "data")
    settings = files.read_json(world / "plain/chunk-0000/meta.json")
    names = "k temperatures values vocab tail_rank tokens_per_microbatch".split()
    settings = {name: settings[name] for name in names}
    plan = (0, dataset.train, writer.rows_of(dataset, 0), settings)
    (world / out).mkdir()
    both = [shared.Worker(world / out, Interrupt()) for _ in range(2)]
    return both, [shared.SharedChunk(one, plan, None) for one in both]


def part_of(chunk, number, filled):
    """Return what a worker makes of a part: records whose bytes are all `filled`."""
    made = []
    for rows in chunk.parts[number]:
        count = int(chunk.plan.counts[rows].sum())
        records = np.full(count * chunk.plan.dtype.itemsize, filled, np.uint8)
        made.append((records.view(chunk.plan.dtype), np.zeros(count), np.zeros(count, bool)))
    return made


def test_of_two_that_made_a_part_the_first_wins_and_the_other_changes_no_byte(world, monkeypatch):
    both, (one, other) = two(world, monkeypatch, "first")
    with both[0], both[1]:
        assert one.take() == 0 and other.take() == 1
        monkeypatch.setattr(shared, "LEASE_S", 0.0)  # `one` is stopped past its lease
        assert not other.worker.take(other.lease(0))  # seen for the first time
        assert other.worker.take(other.lease(0))
        other.put(0, part_of(other, 0, 7))
        before = one.part(0).read_bytes()
        one.put(0, part_of(one, 0, 9))
        assert one.part(0).read_bytes() == before and bytes([7] * 30) in before
        assert {path.suffix for path in one.folder.iterdir()} == {".npy", ".json", ".lease"}


def test_a_lease_is_kept_while_its_owner_beats_and_lost_when_it_does_not(world, monkeypatch):
    both, (one, other) = two(world, monkeypatch, "lease")
    with both[0], both[1]:
        lease = one.lease(one.take())
        monkeypatch.setattr(shared, "LEASE_S", 0.0)  # whatever does not change is dead
        for _ in range(3):
            assert other.worker.alive(lease)
            one.worker._beat()
        assert other.worker.alive(lease)
        monkeypatch.setattr(shared, "LEASE_S", 60.0)
        assert not other.worker.take(lease)
        monkeypatch.setattr(shared, "LEASE_S", 0.0)
        assert other.worker.take(lease)
        assert shared.told_by(lease)["worker"] == other.worker.name
        one.worker.give(lease)  # woken up, it takes nothing away
        assert shared.told_by(lease)["worker"] == other.worker.name


def test_an_owner_without_a_process_is_dead_at_once_and_one_of_another_machine_is_watched(
    world, monkeypatch
):
    both, (one, other) = two(world, monkeypatch, "gone")
    with both[0], both[1]:
        lease = one.lease(one.take())
        here = shared.told_by(lease)
        assert not shared.is_gone(here)
        boot, container, began = here["process"].split()
        assert shared.is_gone(here | {"process": f"{boot} {container} {int(began) + 1}"})
        assert not shared.is_gone(here | {"process": f"other {container} {int(began) + 1}"})
        assert not shared.is_gone({})
        files.write_json(lease, here | {"process": f"{boot} {container} 1"})
        assert other.worker.take(lease)


def test_a_worker_of_other_settings_is_refused_in_one_line(world, monkeypatch):
    both, (one, _) = two(world, monkeypatch, "other")
    with both[0], both[1]:
        one.put(one.take(), part_of(one, 0, 7))
    argv = words(world, "other", "--chunk", 0, "--tail-rank", 0)
    code, said = make.ends(dump_logits.main, *argv, "--shared", "--k", 7)
    assert code == 1 and "k 8 (now 7)" in said and "\n" not in said
    code, said = make.ends(dump_logits.main, *argv)
    assert code == 1 and "was begun with --shared" in said and "\n" not in said


def test_a_chunk_begun_without_others_is_not_shared(world, mine):
    plan = mine / "alone/chunk-0000"
    (plan / "meta.json").unlink()
    before = {path.name for path in plan.iterdir()}
    code, said = make.ends(dump_logits.main, *words(mine, "alone", "--shared", *BASIS))
    assert code == 1 and "was begun alone" in said and "without --shared" in said
    assert {path.name for path in plan.iterdir()} == before


@pytest.mark.parametrize(
    "more", (["--fresh"], ["--verify"], ["--teacher-url", "http://h/v1", "--teacher-model", "m"])
)
def test_what_does_not_go_with_shared_is_refused(world, more, capsys):
    assert make.ends(dump_logits.main, *words(world, "none", "--shared", *more))[0] == 2
    assert "--shared does not go with --" + more[0].strip("-") in capsys.readouterr().err


def test_a_signal_ends_a_worker_which_gives_its_lease_back(world, tmp_path, monkeypatch):
    monkeypatch.setattr(shared, "PART_TARGETS", 1)
    team = Workers(world, tmp_path, "--chunk", 0, "--tail-rank", 0, out="left")
    team.start(signals={3: signal.SIGTERM})
    assert team.end() == [143], team.log.read_text()
    left = [path.name for path in (world / "left/.shared").rglob("*") if path.is_file()]
    assert len(left) == 3 and "plan.json" in left, left  # and two parts
    make.call(dump_logits.main, *team.argv)
    same(world, "left", "plain", ("chunk-0000",))


def test_status_says_what_is_left_and_who_is_at_work(world, tmp_path, capsys):
    def status(out):
        make.call(dump_logits.main, "--data", world / "data", "--out", world / out, "--status")
        return capsys.readouterr().out

    assert "status: 334 targets left: nobody tells how fast" in status("nothing")
    assert "status: 0 targets left: nothing to do" in status("plain")
    assert "3 of 3 finished" in status("plain")
    team = Workers(world, tmp_path, "--tail-rank", 0, out="status")
    one = team.start(batch_s=0.1, signals={4: signal.SIGSTOP})
    while not (one.pid and "T" in Path(f"/proc/{one.pid}/stat").read_text().split()[2]):
        time.sleep(0.02)
    said = status("status")
    done = re.search(r"status/chunk-0000: ([1-9]\d*) of 162 targets, 3 of 17 parts\n", said)
    assert done and f"{334 - int(done[1])} targets left" in said and "2 not begun" in said
    assert re.search(r"worker .*: [1-9]\d* targets/s, chunk-0000 3\n", said), said
    assert re.search(r"status: [1-9]\d* targets left: [\d.]+ minutes at ", said), said
    os.kill(one.pid, signal.SIGKILL)
    team.end()
    assert "no sign of life" in status("status") and "nobody tells how fast" in status("status")
