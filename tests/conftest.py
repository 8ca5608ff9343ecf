"""Tests run from anywhere, with one thread (two fight where others use the cores), without network,
and each in a folder of its own. TEST_THREADS=4: with four; TEST_ORDER=reverse: the last test first
(tests/machines.py tries both)."""

import os
import shutil
import signal
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

# files that take longest begin first, so that no core waits for the last one
LONGEST = (
    "test_ranks",
    "test_pipeline",
    "test_resume",
    "test_shared",
    "test_answers",
    "test_live",
    "test_lora",
    "test_bench",
    "test_beside",
    "test_beside_run",
    "test_sources",
    "test_train",
    "test_chat",
)


def pytest_collection_modifyitems(items):
    gone = set(LONGEST) - {path.stem for path in (ROOT / "tests").glob("*/test_*.py")}
    assert not gone, f"LONGEST in tests/conftest.py names files that are not there: {gone}"
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONGEST)))
    if os.environ.get("TEST_ORDER") == "reverse":
        items.reverse()


@pytest.fixture(autouse=True)
def one_thread_and_no_signal_handlers_left():
    import torch

    torch.set_num_threads(int(os.environ.get("TEST_THREADS", 1)))
    torch.manual_seed(0)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def mine(world, tmp_path):
    """Return a copy of the module's `world` that a test may damage."""
    return shutil.copytree(world, tmp_path / "world")


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory):
    """Return the folder of a tiny ChatML tokenizer."""
    import tiny_tokenizers

    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizers.tiny().save_pretrained(folder)
    return folder


@pytest.fixture
def no_picture(monkeypatch):
    """Prepare data without report.png, which takes half a second; test_plots.py draws it."""
    from lib.measure import plots

    monkeypatch.setattr(plots, "prepared", lambda folder: None)
