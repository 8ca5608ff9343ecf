"""What a quantised teacher costs (dump_logits.py --teacher-quant): KL from the whole one."""

import make
import torch

from lib import data, models
from lib.teacher import quantised


@torch.inference_mode()
def test_what_it_costs_is_kl_from_the_whole_model(tmp_path):
    world = make.world(tmp_path)
    split = data.Dataset(world / "data").train
    one, other = (
        models.load(str(world / who), torch.device("cpu")) for who in ("teacher", "student")
    )
    whole, ours = (quantised.states_at_rows(model, split, 64) for model in (one, other))
    cost = quantised.nats_lost("4bit", whole, ours, [1.0, 2.0])
    assert cost["rows"] == 40 and cost["targets"] == split.targets == len(whole.hidden)
    for t, figures in cost["kl"].items():
        p, q = (
            (seen.hidden @ seen.head.weight.t() / float(t)).softmax(1) for seen in (whole, ours)
        )
        kl = (p * (p.log() - q.log())).sum(1)
        torch.testing.assert_close(figures["mean"], kl.mean().item(), rtol=1e-4, atol=1e-5)
    same = quantised.nats_lost("4bit", whole, whole, [1.0])["kl"]["1"]
    assert same == {"mean": 0.0, "p99": 0.0}
