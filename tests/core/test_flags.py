"""What a run's folder asks of the flags: which may change when it is continued, and the defaults that
an older run, which lacks a flag, had."""

import pytest

import stage1_sft
import stage2_kd
from lib import flags
from lib.run import differing_settings, run_settings

# these change results by rounding at most, and where a model has dropout, by what is drawn
FREE = """out tag track device threads fresh log_every save_every tokens_per_microbatch checkpointing
    attn keep samples sample_tokens verify dry_run shard cpu_offload"""
COMMANDS = {
    "stage1": (stage1_sft, ["--data", "d", "--student", "s", "--out", "o"], FREE),
    "stage2": (
        stage2_kd,
        ["--data", "d", "--student", "s", "--out", "o", "--logits", "l"],
        FREE + " teacher_device teacher_offload device_map tp",
    ),
}


@pytest.mark.parametrize("script, argv, free", COMMANDS.values(), ids=COMMANDS)
def test_what_may_change_when_a_run_is_continued(script, argv, free):
    args = script.parse_args(argv)
    assert args.free == set(free.split())
    assert not args.free & set(run_settings(args, "stage", {}))


def test_a_setting_that_an_older_run_lacks_had_its_flags_default():
    args = stage1_sft.parse_args(COMMANDS["stage1"][1])
    settings = run_settings(args, "stage1", {})
    older = {name: value for name, value in settings.items() if name != "eval_sampling"}
    assert not differing_settings(older, settings, args)
    other = settings | {"eval_sampling": True}
    assert differing_settings(older, other, args) == ["eval_sampling False (now True)"]


def test_a_free_flag_is_no_difference_and_any_other_is():
    args = stage1_sft.parse_args([*COMMANDS["stage1"][1], "--threads", "3"])
    settings = run_settings(args, "stage1", {})
    assert "threads" not in settings and "free" not in vars(args)
    assert differing_settings(settings | {"threads": 1}, settings, args) == []
    assert differing_settings(settings | {"seed": 1}, settings, args) == ["seed 1 (now 0)"]


def test_a_flag_is_spelled_as_it_is_typed():
    assert flags.spelled("tokens_per_step") == "--tokens-per-step"
