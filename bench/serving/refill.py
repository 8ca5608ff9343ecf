"""What refilling is worth: lib/generate.py against transformers' model.generate in sorted batches,
on prompts whose answers differ in length.

    python bench/serving/refill.py --model real/smollm2 --source real/stdlib.parquet

Both answer greedily with the same number of rows in work, and both must write the same answers; CPU
seconds of one thread, so that other work beside it does not count. model.generate waits for the
longest answer of its batch.
"""

import argparse
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import torch
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parents[2]))
from lib import generate, template  # noqa: E402


def prompts(source, count):
    """Return questions with a column `instruction`, a fourth of them for a number, half of them for
    five words."""
    asked = pq.read_table(source)["instruction"].to_pylist()[:count]
    for i, text in enumerate(asked):
        if i % 4 == 1:
            asked[i] = f"What is {i} plus {i + 3}? Answer with the number only."
        elif i % 4:
            asked[i] = f"{text} Answer in five words."
    return asked


@torch.inference_mode()
def batches(module, requests, how, rows):
    """Yield an Answer to each request by model.generate, the longest prompts first."""
    requests = sorted(requests, key=lambda request: -len(request.ids))
    for start in range(0, len(requests), rows):
        part = requests[start : start + rows]
        ids, mask = generate.left_padded([request.ids for request in part], module.device)
        written = module.generate(
            input_ids=ids,
            attention_mask=mask.long(),
            max_new_tokens=part[0].max_new_tokens,
            do_sample=False,
            eos_token_id=list(how.stops),
            pad_token_id=how.stops[0],
        )[:, ids.shape[1] :].tolist()
        for request, line in zip(part, written):
            stop = next((at for at, token in enumerate(line) if token in how.stops), len(line))
            yield generate.Answer(request, line[:stop], "stop")


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--source", required=True)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument(
        "--rows", type=int, default=16, help="in work at once (default: %(default)s)"
    )
    parser.add_argument("--max-new-tokens", type=int, default=256)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    tokenizer, module = (
        template.load_tokenizer(args.model),
        AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval(),
    )
    how = generate.sampling_of(module.generation_config, tokenizer, 0.0)
    asked = [
        template.prompt_ids(tokenizer, [{"role": "user", "content": text}])
        for text in prompts(args.source, args.prompts)
    ]
    requests = [generate.Request(i, ids, args.max_new_tokens) for i, ids in enumerate(asked)]
    rates, answers = {}, {}
    written = {
        "refill": generate.generate(module, generate.by_length(requests), how, args.rows),
        "sorted batches": batches(module, requests, how, args.rows),
    }
    for name, made in written.items():  # each begins with its first answer
        begun = time.process_time()
        answers[name] = {answer.request.key: answer.ids for answer in made}
        seconds, tokens = time.process_time() - begun, sum(map(len, answers[name].values()))
        rates[name] = tokens / seconds
        print(f"{name}: {tokens} tokens, {seconds:.1f} s, {rates[name]:.1f} tokens/s", flush=True)
    lengths = sorted(map(len, answers["refill"].values()))
    same = sum(
        answers["refill"][key] == answers["sorted batches"][key] for key in answers["refill"]
    )
    print(
        f"{rates['refill'] / rates['sorted batches']:.2f} x; answers of {lengths[0]} to"
        f" {lengths[-1]} tokens, half of them at most {lengths[len(lengths) // 2]}; {same} of"
        f" {len(lengths)} the same"
    )


if __name__ == "__main__":
    main()
