"""Write a parquet file like DistilQwen_100k: columns `instruction` and `output`, Chinese and
English, of realistic lengths; the same for a seed.

    python bench/data/rows.py out/rows.parquet 100000

Lengths are log-normal: median 30 words asked and 120 answered (a word: one of English, or one or
two Chinese characters), cut at 2000. One row in a hundred is a duplicate, one in two hundred has an
empty answer.
"""

import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

GROUP = 10_000  # rows of a row group
ENGLISH = """
the of and to in is that it for as with was on be by at this from or an are which not have one
we can all will when use how first more than about into data model number example each step time
work value people answer question following between system problem result because should write
function return list string change different important process information order point given
form large small question water energy language world history market company user text explain
table reason method health light cell rate function test sentence image code learn price law
country school city sound
""".split()
CHINESE = (
    "的一是在不了有和人这中大为上个国我以要他时来用们生到作地于出就分对成会可主发年动"
    "同工也能下过子说产种面而方后多定行学法所民得经十三之进着等部度家电力里如水化高自"
    "二理起小物现实加量都两体制机当使点从业本去把性好应开它合还因由其些然前外天政四日"
    "那社义事平形"
)


def words(rng, chinese):
    """Return 5,000 words: one or two common characters; or common words first, then compounds of
    two of them."""
    if chinese:
        return ["".join(rng.choice(list(CHINESE), count)) for count in rng.integers(1, 3, 5000)]
    return ENGLISH + ["".join(rng.choice(ENGLISH, 2)) for _ in range(5000 - len(ENGLISH))]


def text(rng, vocabulary, count, chinese):
    """Return `count` words, the first ones of the vocabulary being the frequent ones (Zipf), with a
    stop about every twelve words."""
    chosen = [vocabulary[i] for i in rng.zipf(1.2, count) % len(vocabulary)]
    space, stop = ("", "。") if chinese else (" ", ". ")
    return stop.join(space.join(chosen[i : i + 12]) for i in range(0, count, 12))


def main(path, rows, seed=0):
    rng, earlier = np.random.default_rng(seed), ("", "")
    vocabularies = {chinese: words(rng, chinese) for chinese in (False, True)}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with pq.ParquetWriter(
        path, pa.schema([("instruction", pa.string()), ("output", pa.string())])
    ) as file:
        for start in range(0, rows, GROUP):
            size = min(GROUP, rows - start)
            asked, answered = (
                np.clip(rng.lognormal(np.log(median), 0.65, size), 3, 2000).astype(int)
                for median in (30, 120)
            )
            kinds, made = rng.random(size), []
            for i in range(size):
                chinese = kinds[i] < 0.5
                row = (
                    text(rng, vocabularies[chinese], asked[i], chinese),
                    text(rng, vocabularies[chinese], answered[i], chinese),
                )
                made.append(
                    earlier if kinds[i] > 0.99 else (row[0], "") if kinds[i] > 0.985 else row
                )
                earlier = made[i]
            file.write_table(pa.table(dict(zip(("instruction", "output"), zip(*made)))))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
