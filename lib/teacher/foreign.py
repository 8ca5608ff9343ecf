"""The dumps of other tools, row by row: whose tokens, and the k likeliest at each. As read in their
own published code (docs/methods.md names the version), entry j of a row speaks of the token at
place j + lead of its tokens:

    easydistill  JSON lines, a row a line: [{token id: probability}, ...], of an answer that was
                 generated greedily and goes on behind its end; no token ids but these, no prompt:
                 the tokens are the likeliest ones. lead 0
    axolotl      input_ids, target_token_ids, target_logprobs, of the prepared data set (JSON lines,
                 parquet, or .arrow as `axolotl preprocess` leaves it). Its trainer takes entry j
                 for token j + 1, its chat template writes it for token j: lead None, to be measured
    distillkit   input_ids with token_ids and top_values; or compressed_logprobs and
                 bytepacked_indices; or packed_indices, exact_values and coeffs: as
                 compression_config.yaml beside them says. Several rows may be packed into one
                 (attention_mask 1 1 2 2 ...). lead 1, and no entry of the first token
    verl         input_ids, or prompts and responses, with teacher_ids and teacher_logprobs, as its
                 batches hold them in memory, padded or not (attention_mask); it writes none of this
                 to a disk itself. lead 1, and a last entry of nothing

Rows come one after the other, whatever the file's size; a broken one ends the program with its
file and line.
"""

import bisect
import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import parquet

from lib import files

ROWS_AT_ONCE = 16  # of a parquet file
LEAST_LOGP = -1000.0  # log-probabilities below it are padding: no mass
COMPRESSION_FILE = "compression_config.yaml"  # beside DistillKit's files
FLOAT_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}  # bytes of a number
COMPRESSION = {  # of DistillKit's configuration, its newer kind
    "d": range(2, 1 << 24),
    "k": range(1, 1 << 20),
    "exact_k": range(1 << 20),
    "exact_dtype?": {*FLOAT_BYTES},
    "polynomial_terms?": ([(int, {"sqrt", "exp"})], None),
    "term_dtype?": {*FLOAT_BYTES},
    "residual_bins": [
        {
            "scale_dtype": {*FLOAT_BYTES},
            "element_bits": range(1, 64),
            "num_elements": range(1, 1 << 20),
        }
    ],
    "delta_encoding?": bool,
    "normalize_t?": bool,
}
OLDER = {  # its older kind
    "vocab_size": range(2, 1 << 24),
    "k": range(1, 1 << 20),
    "exact_k": range(1 << 20),
    "polynomial_degree": range(64),
    "invert_polynomial?": bool,
    "with_sqrt_term?": bool,
}


@dataclass(frozen=True)
class Told:
    """What a row says. ids (L,): its tokens; top, logp (M, m): the token ids of each entry (-1:
    none) and their log-probabilities, nats (-inf: no mass)."""

    ids: np.ndarray
    top: np.ndarray
    logp: np.ndarray


@dataclass(frozen=True)
class Form:
    """A format. read: what a row of it says, given its file's configuration; lead: of its entries;
    columns: those that are read of a table; alone: whether its rows are answers without prompts."""

    read: Callable[[Any, dict | None], list[Told]]
    lead: int | None
    columns: tuple[str, ...] = ()
    alone: bool = False


def as_told(ids: np.ndarray, top: Any, logp: Any) -> Told:
    """Return what lists of ids and log-probabilities say, checked to be as many."""
    (found, counts), (values, others) = grid(top, -1, np.int64), grid(logp, -np.inf, np.float64)
    if not np.array_equal(counts, others):
        raise ValueError("token ids and log-probabilities that are not as many")
    none = ~(values >= LEAST_LOGP) | (found < 0)  # NaN too
    return Told(ids, found, np.where(none, -np.inf, values))


def grid(lists: Any, fill: float, dtype: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return lists of numbers, JSON's or Arrow's, as an array (n, longest), short ones filled up,
    and their lengths (n,)."""
    if isinstance(lists, np.ndarray):
        return lists.astype(dtype), np.full(len(lists), lists.shape[1])
    if isinstance(lists, pa.Array):
        counts = pc.list_value_length(lists).fill_null(0).to_numpy(zero_copy_only=False)
        flat = lists.flatten().to_numpy(zero_copy_only=False)
    else:
        counts = np.array([len(one or ()) for one in lists], np.int64)
        flat = np.array([*itertools.chain.from_iterable(one or () for one in lists)])
    if len(flat) and np.issubdtype(dtype, np.integer) and flat.dtype.kind not in "iu":
        raise ValueError(f"{flat.dtype} where token ids were expected")
    made = np.full((len(counts), int(counts.max(initial=0))), fill, dtype)
    made[np.arange(made.shape[1]) < counts[:, None]] = flat.astype(dtype)
    return made, counts


def numbers(row: Any, *names: str) -> np.ndarray:
    """Return the token ids (L,) of the first of the columns `names` that a row has."""
    name = next((name for name in names if row.get(name) is not None), names[0])
    value = row[name]
    flat = value.to_numpy(zero_copy_only=False) if isinstance(value, pa.Array) else np.array(value)
    if flat.ndim != 1 or len(flat) and flat.dtype.kind not in "iub":
        raise ValueError(f"{name} that are no token ids")
    return flat.astype(np.int64)


def easydistill(row: Any, _: dict | None) -> list[Told]:
    if not isinstance(row, list) or not row or not all(row):
        raise ValueError("no list of {token id: probability}")
    top, _counts = grid([[int(id) for id in entry] for entry in row], -1, np.int64)
    values, _counts = grid([[*entry.values()] for entry in row], 0.0, np.float64)
    # what its code writes are probabilities; others took over its form with their logarithms
    logs = (values < 0).any(1, keepdims=True) | (values.max(1, keepdims=True) <= 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        logp = np.where(logs, values, np.log(values))
    said = as_told(np.zeros(0, np.int64), top, np.where(top < 0, -np.inf, logp))
    ids = said.top[np.arange(len(row)), said.logp.argmax(1)]
    return [Told(ids, said.top, said.logp)]


def axolotl(row: Any, _: dict | None) -> list[Told]:
    ids = numbers(row, "input_ids")
    said = as_told(ids, row["target_token_ids"], row["target_logprobs"])
    if (before := len(ids) - len(said.top)) < 0:
        raise ValueError(f"{len(said.top)} targets of {len(ids)} input_ids")
    # as its chat template does: what is there belongs to the end
    top = np.pad(said.top, ((before, 0), (0, 0)), constant_values=-1)
    return [Told(ids, top, np.pad(said.logp, ((before, 0), (0, 0)), constant_values=-np.inf))]


def distillkit(row: Any, config: dict | None) -> list[Told]:
    ids = numbers(row, "input_ids")
    if row.get("token_ids") is not None:
        said = as_told(ids, row["token_ids"], row["top_values"])
    else:
        said = as_told(
            ids, *(older if row.get("packed_indices") is not None else newer)(row, config)
        )
    if row.get("attention_mask") is None:
        return [said]
    mask = numbers(row, "attention_mask")
    if mask.max(initial=0) < 2:
        return [said]
    bounds = [0, *(np.flatnonzero(np.diff(mask)) + 1).tolist(), len(mask)]
    pieces = [slice(a, b) for a, b in itertools.pairwise(bounds) if mask[a]]
    return [Told(ids[one], said.top[one], said.logp[one]) for one in pieces]


def verl(row: Any, _: dict | None) -> list[Told]:
    if row.get("input_ids") is not None:
        ids = numbers(row, "input_ids")
    else:
        parts = numbers(row, "prompts", "prompt_ids"), numbers(row, "responses", "response_ids")
        ids = np.concatenate(parts)
    said = as_told(ids, row["teacher_ids"], row["teacher_logprobs"])
    if said.top.shape[1] < 2:
        raise ValueError("the log-probability of the token itself alone, no top k")
    if row.get("attention_mask") is not None:
        real = numbers(row, "attention_mask") > 0
        whole = len(said.top) == len(ids)  # padded as the tokens are
        top, logp = (each[real] if whole else each for each in (said.top, said.logp))
        said = Told(ids[real], top, logp)
    if len(said.top) != len(said.ids):
        raise ValueError(f"{len(said.top)} entries of {len(said.ids)} tokens")
    return [Told(said.ids, said.top[:-1], said.logp[:-1])]


FORMS = {
    "easydistill": Form(easydistill, 0, alone=True),
    "axolotl": Form(axolotl, None, ("input_ids", "target_token_ids", "target_logprobs")),
    "distillkit": Form(
        distillkit,
        1,
        (
            *("input_ids", "attention_mask", "token_ids", "top_values", "compressed_logprobs"),
            *("bytepacked_indices", "packed_indices", "exact_values", "coeffs"),
        ),
    ),
    "verl": Form(
        verl,
        1,
        (
            *("input_ids", "prompts", "prompt_ids", "responses", "response_ids"),
            *("attention_mask", "teacher_ids", "teacher_logprobs"),
        ),
    ),
}


# --- DistillKit's compression, from its layout


def index_bits(tokens: int) -> int:
    """Return the bits of a token id among so many tokens."""
    return math.ceil(np.log2(np.float32(tokens)))


def bits_of(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Return `count` numbers of `bits` bits (n, count) from bytes (n, B), highest bit first."""
    if packed.shape[1] * 8 < bits * count:
        raise ValueError(f"{packed.shape[1]} bytes where {count} numbers of {bits} bits should be")
    single = np.unpackbits(packed, axis=1)[:, : bits * count].reshape(len(packed), count, bits)
    return single @ (1 << np.arange(bits - 1, -1, -1, dtype=np.int64))


def floats_of(packed: np.ndarray, kind: str) -> np.ndarray:
    """Return the numbers that bytes (n, B) are, little end first."""
    raw = np.ascontiguousarray(packed)
    if kind == "bfloat16":  # the upper half of a float32
        return (raw.view("<u2").astype("<u4") << 16).view("<f4").astype(np.float64)
    return raw.view(f"<f{FLOAT_BYTES[kind]}").astype(np.float64)


def newer(row: Any, config: dict | None) -> tuple[np.ndarray, np.ndarray]:
    """Return token ids and log-probabilities (M, k): exact ones, then a polynomial of their rank
    with quantized residuals, as the differences from one to the next if delta_encoding."""
    packed, _ = grid(row["compressed_logprobs"], 0, np.int64)
    indices, _ = grid(row["bytepacked_indices"], 0, np.int64)
    if config is None or "d" not in config:
        raise ValueError(f"no {COMPRESSION_FILE} beside it that says how it was compressed")
    rest, k, exact = packed.astype(np.uint8), config["k"], config["exact_k"]

    def take(size: int) -> np.ndarray:
        nonlocal rest
        if rest.shape[1] < size:
            raise ValueError(f"{packed.shape[1]} bytes a token, fewer than {COMPRESSION_FILE} says")
        taken, rest = rest[:, :size], rest[:, size:]
        return taken

    kind = config.get("exact_dtype", "float32")
    values, fit = (
        floats_of(take(exact * FLOAT_BYTES[kind]), kind),
        np.zeros((len(packed), k - exact)),
    )
    if terms := config.get("polynomial_terms"):
        kind = config.get("term_dtype", "float32")
        factors = floats_of(take(len(terms) * FLOAT_BYTES[kind]), kind)
        at = np.arange(k - exact, dtype=np.float64)
        if config.get("normalize_t"):
            at = np.linspace(0, 1, k - exact)
        basis = [at**term if isinstance(term, int) else getattr(np, term)(at) for term in terms]
        fit += factors @ np.array(basis)
    place = 0
    for part in config["residual_bins"]:
        bits, count = part["element_bits"], part["num_elements"]
        scale = floats_of(take(FLOAT_BYTES[part["scale_dtype"]]), part["scale_dtype"])
        steps = bits_of(take(-(-bits * count // 8)), bits, count)
        steps = 2 * steps - 1 if bits == 1 else steps - (1 << bits - 1)
        fit[:, place : place + count] += steps * scale
        place += count
    if rest.shape[1]:
        raise ValueError(f"{packed.shape[1]} bytes a token, more than {COMPRESSION_FILE} says")
    logp = np.concatenate([values, fit], axis=1)
    logp = np.cumsum(logp, axis=1) if config.get("delta_encoding", True) else logp
    return bits_of(indices.astype(np.uint8), index_bits(config["d"]), k), logp


def older(row: Any, config: dict | None) -> tuple[np.ndarray, np.ndarray]:
    """Return the same of the older kind: ids in words of 64 bits, lowest first."""
    words, _ = grid(row["packed_indices"], 0, np.int64)
    exact, _ = grid(row["exact_values"], 0, np.float64)
    factors, _ = grid(row["coeffs"], 0, np.float64)
    if config is None or "vocab_size" not in config:
        raise ValueError(f"no {COMPRESSION_FILE} beside it that says how it was compressed")
    bits, k = index_bits(config["vocab_size"]), config["k"]
    ids = np.zeros((len(words), words.shape[1] * (64 // bits)), np.int64)
    for i in range(64 // bits):
        ids[:, i :: 64 // bits] = words >> bits * i & (1 << bits) - 1
    if ids.shape[1] < k or exact.shape[1] != config["exact_k"]:
        raise ValueError(f"other numbers of ids and values than {COMPRESSION_FILE} says")
    if config["exact_k"] == k:
        return ids[:, :k], exact
    at = np.arange(1, k - config["exact_k"] + 1, dtype=np.float64)
    sign = -1 if config.get("invert_polynomial", True) else 1
    basis = [at ** (sign * power) for power in range(config["polynomial_degree"] + 1)]
    basis += [np.sqrt(at)] if config.get("with_sqrt_term") else []
    return ids[:, :k], np.concatenate([exact, factors @ np.array(basis)], axis=1)


def compression_of(path: Path) -> dict | None:
    """Return how DistillKit compressed a file: what its COMPRESSION_FILE says (its sampler's, or
    the `teacher` of a training configuration); None where there is none."""
    import yaml

    place = path.parent / COMPRESSION_FILE
    if not place.is_file():
        return None
    try:
        value = yaml.safe_load(place.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as broken:
        files.fail(f"{place} is not YAML", broken)
    value = value.get("teacher", value) if isinstance(value, dict) else {}
    for name in ("logprob_compressor", "legacy_logit_compression"):
        value = value.get(name) or value
    files.expect(place, value, OLDER if "vocab_size" in value else COMPRESSION)
    if value["exact_k"] > value["k"]:
        files.fail(f"{place} says exact_k {value['exact_k']}", wanted=f"at most k {value['k']}")
    return value


# --- files


def paths_of(places: list[str]) -> list[Path]:
    """Return the files that are named, in order; of a folder, those of its rows."""
    found = []
    for place in map(Path, places):
        inside = sorted(place.iterdir()) if place.is_dir() else [place]
        kinds = (".jsonl", ".json", ".parquet", ".arrow")
        inside = [path for path in inside if path == place or path.suffix in kinds]
        # what datasets.save_to_disk puts beside its rows
        inside = [path for path in inside if path.name not in ("state.json", "dataset_info.json")]
        if not inside or not inside[0].is_file():
            files.fail(f"{place} holds nothing to import", wanted=f"a file {', '.join(kinds)}")
        found += inside
    files.refuse_pointers(*found)
    return found


def rows_told(
    path: Path, form: Form, wanted: list[int] | None = None
) -> Iterator[tuple[int, str, list[Told]]]:
    """Yield (place, place in words, what it says) of the rows of a file, or of those at the places
    `wanted` (ascending)."""
    config = compression_of(path) if form.read is distillkit else None
    table = path.suffix in (".parquet", ".arrow")
    raw = table_rows(path, form.columns, wanted) if table else lines(path, wanted)
    for place, where, value in raw:
        try:
            if isinstance(value, bytes):
                value = json.loads(value)
            if form.columns and not isinstance(value, dict):
                raise ValueError("no object with columns")
            said = form.read(value, config)
        except KeyError as missing:
            files.fail(f"{path} {where} has no column {missing}", wanted=", ".join(form.columns))
        except (ValueError, TypeError, AttributeError, IndexError, RecursionError) as broken:
            seen: object = broken
            if isinstance(broken, json.JSONDecodeError):
                seen = f"{broken.msg} at its character {broken.pos + 1}"
            columns = ", ".join(form.columns) or "[{TOKEN ID: PROBABILITY, ...}, ...]"
            mend = "the whole file from its tool again, or the file without this row"
            files.fail(f"{path} {where} is no row of {form.read.__name__}'s", seen, columns, mend)
        yield place, where, said


def lines(path: Path, wanted: list[int] | None) -> Iterator[tuple[int, str, bytes]]:
    """Yield the lines of a file: the byte at which each begins, its number in words, itself."""
    with open(path, "rb") as file:
        if wanted is not None:
            for place in wanted:
                file.seek(place)
                yield place, f"at byte {place}", file.readline()
            return
        place = 0
        for number, line in enumerate(file, 1):
            if line.strip():
                yield place, f"line {number}", line
            place += len(line)


def table_rows(
    path: Path, columns: tuple[str, ...], wanted: list[int] | None
) -> Iterator[tuple[int, str, dict]]:
    """Yield the rows of a parquet or arrow file: its number from 0, from 1 in words, its cells."""
    if not columns:
        files.fail(f"{path} is a table", wanted="JSON lines")
    try:
        for first, batch in record_batches(path, columns, wanted):
            inside: Sequence[int] = range(batch.num_rows)
            if wanted is not None:
                begin, end = (bisect.bisect_left(wanted, first + n) for n in (0, len(inside)))
                inside = [place - first for place in wanted[begin:end]]
            for n in inside:
                cells = {name: batch.column(name)[n] for name in batch.schema.names}
                yield first + n, f"row {first + n + 1}", {name: of(c) for name, c in cells.items()}
    except pa.ArrowException as broken:
        files.fail(f"{path} cannot be read", broken, "a whole parquet or arrow file")


def of(cell: Any) -> Any:
    """Return a cell of a table: a list as an array, None where nothing is there."""
    return (cell.values if hasattr(cell, "values") else cell.as_py()) if cell.is_valid else None


def record_batches(
    path: Path, columns: tuple[str, ...], wanted: list[int] | None
) -> Iterator[tuple[int, Any]]:
    """Yield (number of its first row, record batch) of a table; groups of rows of which none is
    wanted are passed over."""
    first = 0
    if path.suffix == ".parquet":
        with parquet.ParquetFile(path) as file:
            names = [name for name in file.schema_arrow.names if name in columns]
            for group in range(file.num_row_groups):
                count = file.metadata.row_group(group).num_rows
                if wanted is None or bisect.bisect_left(wanted, first) < bisect.bisect_left(
                    wanted, first + count
                ):
                    at = first
                    for batch in file.iter_batches(ROWS_AT_ONCE, [group], names):
                        yield at, batch
                        at += batch.num_rows
                first += count
        return
    with pa.memory_map(str(path)) as file:
        try:
            stream = pa.ipc.open_stream(file)
        except pa.ArrowInvalid:
            whole = pa.ipc.open_file(file)
            stream = (whole.get_batch(n) for n in range(whole.num_record_batches))
        for batch in stream:
            yield first, batch.select([n for n in batch.schema.names if n in columns])
            first += batch.num_rows
