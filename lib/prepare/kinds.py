"""What a data file is, by its first bytes: packed or not, a table or text, in which encoding; and
what it is not, though its name says so.

Contract: `recognised` returns the place as it is to be read, and says where that is not what the
name tells; what holds no rows that are read here ends the program with one line.
"""

import codecs
import dataclasses
import json
import lzma
import re
from pathlib import Path

from lib import files
from lib.prepare import formats, places
from lib.prepare.places import Place

TRIED = 4 << 20  # bytes by which an encoding is told
PACKS = {b"\x1f\x8b": ".gz", b"BZh": ".bz2", b"\x28\xb5\x2f\xfd": ".zst", b"\xfd7zXZ\0": ".xz"}
TABLE_MARKS = {b"PAR1": ".parquet", b"ARROW1": ".arrow", b"\xff\xff\xff\xff": ".arrow"}
FOREIGN = {
    files.POINTER: ("a Git LFS pointer, not the file itself", "git lfs pull"),
    b"PK\x03\x04": ("a zip archive, or a spreadsheet (.xlsx)", "unzip it, or save it as .csv"),
    b"\xd0\xcf\x11\xe0": ("an old office file (.xls)", "save it as .csv"),
    b"SQLite format 3": ("an SQLite database", "a table of it as .csv or .jsonl"),
    b"\x93NUMPY": ("a numpy array", None),
    b"\x80\x04": ("a pickle, which may hold any program", "rows as .jsonl or .parquet"),
    b"\x89PNG": ("a picture", None),
    b"\xff\xd8\xff": ("a picture", None),
    b"7z\xbc\xaf": ("a 7z archive", "unpack it"),
    b"%PDF": ("a PDF document", "its text, as .txt or .jsonl"),
    b"GGUF": ("a model (GGUF)", "--tokenizer or --teacher for it"),
    b"<!doctype html": ("a web page: a download that failed, perhaps", "the file itself"),
    b"<html": ("a web page: a download that failed, perhaps", "the file itself"),
}
BYTE_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
# by these many a text is known as Chinese, and by those as western
COMMON_CHINESE = frozenset(
    "的一是了不在有人我他这个们中来上大为和国地到以说时要就出会可也你对生能而子那得于着下自之年过发"
    "后作里用道行所然家种事成方多经么去法学如都同现当没动面起看定天分还进好小部其些主样理心她本前开"
    "但因只从想实日軍者意無力它与長把機十民第公此已工使情明性知全三又關點正業外將兩高間由問很最重"
)
WESTERN = frozenset(
    "àâäáãåæçéèêëíìîïñóòôöõøœúùûüÿßÀÂÄÁÃÅÆÇÉÈÊËÍÌÎÏÑÓÒÔÖÕØŒÚÙÛÜ’‘“”–—…•€£°«»·¿¡´§©®™ºª½¼\xa0"
)
# a line that is a conversation itself: a list of messages, of pairs, of texts
BARE = re.compile(r'\[\s*(\[|"|\{[^{}]*"(role|from|speaker)"\s*:)')


def recognised(place: Place, encoding: str | None = None) -> Place:
    """Return a file as it is to be read. encoding: as the user says, else it is found."""
    try:
        raw = _head(dataclasses.replace(place, packed=""), 64)
        if not raw:
            formats.no_row(place, "is empty", "0 bytes")
        packed = next((end for magic, end in PACKS.items() if raw.startswith(magic)), "")
        place = dataclasses.replace(place, packed=packed)
        head = _head(place, TRIED)
    except places.UNREADABLE as broken:
        formats.cannot_be_read(place, "", broken)
    _refuse_foreign(place, head)
    found = next((kind for magic, kind in TABLE_MARKS.items() if head.startswith(magic)), None)
    if found and packed:
        seen, mend = f"{found[1:]}, packed ({packed})", "unpack it: such files are packed inside"
        files.fail(f"{place} cannot be read where it is", seen, places.READ, mend)
    if found is None and place.suffix in places.STREAMS:
        place = dataclasses.replace(place, encoding=encoding or _encoding(place, head))
        text = head.decode(place.encoding, "ignore").lstrip()
        line = text.partition("\n")[0]
        bare = line[:1] == "[" and BARE.match(line)
        if place.suffix == ".jsonl" and not bare and not _of_lines(text):
            found = ".json"
        elif place.suffix not in formats.JSON and formats.is_object(line):
            found = ".jsonl"
    if not (found or place.suffix):
        seen = "".join(Path(place.path).suffixes[-2:]) or "no suffix"
        files.fail(f"{place} is of a kind that is not read", seen, places.READ)
    if found not in (None, place.suffix):
        print(f"prepare reads {place} as {found}, which it is", flush=True)
        place = dataclasses.replace(place, kind=found)
    return place


def _refuse_foreign(place: Place, head: bytes) -> None:
    """End the program where a file is of a kind that is not read; say what to do with it."""
    wrong = "is not what its name says" if place.suffix else "is of a kind that is not read"
    if head[257:262] == b"ustar":
        seen, mend = "a tar archive (webdataset, perhaps)", "tar -xf, and the folder that it makes"
        files.fail(f"{place} {wrong}", seen, places.READ, mend)
    for magic, (seen, mend) in FOREIGN.items():
        begin = head.lstrip()[: len(magic)]
        if magic in (begin, begin.lower()):
            files.fail(f"{place} {wrong}", seen, places.READ, mend)


def _of_lines(text: str) -> bool:
    """Return whether a text begins with an object of JSON alone on its line; not so lists, objects
    over several lines or with commas between. What is broken, or longer than the text, may be."""
    if text[:1] == "[":
        return False
    try:
        end = json.JSONDecoder().raw_decode(text)[1]
    except (ValueError, RecursionError):
        return True
    return "\n" not in text[:end] and re.match(r"[ \t]*(\r?\n|\r?$)", text[end:]) is not None


def _head(place: Place, size: int) -> bytes:
    """Return the first bytes of a file, unpacked if it is packed."""
    with places.open_stream(place) as stream:
        parts = []
        while size > 0 and (part := stream.read(size)):
            parts.append(part)
            size -= len(part)
    return b"".join(parts)


def _valid(data: bytes, encoding: str) -> bool:
    """Return whether the bytes are text of an encoding (the last character may be cut)."""
    try:
        codecs.getincrementaldecoder(encoding)().decode(data)
    except UnicodeDecodeError:
        return False
    return True


def _encoding(place: Place, head: bytes) -> str:
    """Tell how a text file is written, and say so if it is not UTF-8."""
    name = next((name for mark, name in BYTE_MARKS.items() if head.startswith(mark)), None)
    even, odd = head[:1000:2].count(0), head[1:1000:2].count(0)
    valid = _valid(head, "utf-8")
    if name is None and (not even) != (not odd):  # a few are no UTF-16, but dirt in UTF-8
        if not valid or even + odd > 0.3 * len(head[:1000]):
            name = "utf-16-le" if odd else "utf-16-be"
    if name is None and valid:
        return _to_the_end(place, head)
    name = name or _legacy(place, head)
    if name is None:
        files.fail(
            f"{place} is not UTF-8 text, and nothing that is told from it alone",
            seen=repr(re.sub(rb"^[ -~\s]*", b"", head)[:20]),
            mend="--encoding NAME (gb18030, big5, shift_jis, euc_kr, cp1251, cp1252, ...)",
        )
    if name != "utf-8-sig":
        print(f"prepare reads {place} as {name}; --encoding NAME for another", flush=True)
    return name


def _legacy(place: Place, head: bytes) -> str | None:
    """Return gb18030 or cp1252 where that is plain, else None; UTF-8 with a few broken bytes, which
    could pass for the second, ends the program."""
    text = head.decode("utf-8", "surrogateescape")
    broken = re.findall("[\udc80-\udcff]+", text)
    if len(re.findall("[^\0-\x7f\udc80-\udcff]", text)) > 4 * len(broken):
        files.fail(
            f"{place} is UTF-8 but for some bytes",
            seen=f"{broken[0].encode('utf-8', 'surrogateescape')!r}",
            wanted="UTF-8",
            mend="iconv -c -f UTF-8 -t UTF-8 FILE > NEW, which leaves them out",
        )
    if _valid(head, "gb18030"):
        text = head.decode("gb18030", "ignore")
        signs = [sign for sign in text if "\u4e00" <= sign <= "\u9fff"]
        if sum(sign in COMMON_CHINESE for sign in signs) >= max(1, 0.1 * len(signs)):
            return "gb18030"
    alone = len(re.findall(rb"(?<![\x80-\xff])[\x80-\xff]{1,2}(?![\x80-\xff])", head))
    high = re.sub(rb"[\x00-\x7f]+", b"", head)
    if _valid(head, "cp1252") and alone >= 0.5 * len(high):
        text = high.decode("cp1252", "ignore")
        if sum(sign in WESTERN for sign in text) >= 0.95 * len(text):
            return "cp1252"
    return None


def _to_the_end(place: Place, head: bytes) -> str:
    """Return utf-8 where all of a file is, else what it is: its first other letter may stand far
    down. A remote file is not read twice for that."""
    if not place.is_local or len(head) < TRIED:
        return "utf-8-sig"
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        with places.open_stream(place) as stream:
            while block := stream.read(places.BUFFER):
                decoder.decode(block)
    except UnicodeDecodeError as other:
        if name := _legacy(place, other.object):
            print(f"prepare reads {place} as {name}; --encoding NAME for another", flush=True)
            return name
    except (OSError, EOFError, lzma.LZMAError):
        pass  # it is said where the rows are read
    return "utf-8-sig"
