"""Data sets of the Hugging Face hub: which files of a repository are a split, their download, and
the way back up.

Contract: `download` returns files in huggingface_hub's own cache (cut downloads are resumed,
nothing is fetched twice), each with the commit it is of. The token is the usual one (HF_TOKEN, or
what `hf auth login` stored). With HF_HUB_OFFLINE=1 the cache is all there is. Parquet is preferred:
that of the repository, then the hub's own conversion of it, then its jsonl, json and csv files.
"""

import glob
import re
import sys
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants, errors

from lib import files
from lib.prepare import places
from lib.prepare.places import Place

ID = re.compile(
    r"(hf://(datasets/)?)?(?P<repo>[\w.-]+/[\w.-]+)(:(?P<split>[\w.-]+(/[\w.-]+)?))?(@(?P<revision>[\w./-]+))?"
)
REPO = re.compile(r"[\w.-]+/[\w.-]+")
# the branch where the hub keeps its own parquet copy of a data set
CONVERTED = "refs/convert/parquet"
SPLIT_NAMES = {"train", "training", "test", "validation", "valid", "val", "dev", "eval"}
KINDS = ((".parquet",), (".jsonl", ".json", ".csv"))
TIMEOUT_S = 10
# what a wrong id, token, network or cache ends in: HTTPError is the http client's own, of which the
# hub's errors are kinds
FAILURES = (errors.HTTPError, OSError, ValueError, errors.CachedRepoTreeNotFoundError)


def is_id(where: str) -> bool:
    """Tell org/name from a local file that is missing: hf:// in front, or nothing of a file's in it
    and no such folder here."""
    if not ID.fullmatch(where):
        return False
    path = Path(where)
    local = path.exists() or path.parent.is_dir() or places.suffix(where) in places.SUFFIXES
    return where.startswith("hf://") or not local


def named_splits(paths: list[str]) -> dict[tuple[str, str], list[str]]:
    """Sort files by (configuration, split) as their names tell: "data/train-00000-of-00002.parquet"
    is ("default", "train"), "french/test/0000.parquet" ("french", "test"); a file whose name tells
    nothing is left out.
    """
    found = {}
    for path in sorted(paths):
        *folders, name = path.split("/")
        base = re.sub(r"([._-]\d+)?([._-]of[._-]\d+)?(-[0-9a-f]{16})?$", "", name.split(".")[0])
        folders = [folder for folder in folders if folder != "data"]
        # numbered parts: the folder is the split
        if re.fullmatch(r"\d*|part|chunk|shard|data", base):
            base = folders.pop() if folders else ""
        elif folders and folders[-1] in SPLIT_NAMES:
            base = folders.pop()
        if base:
            found.setdefault(("/".join(folders) or "default", base), []).append(path)
    return found


def files_of_split(paths: list[str], split: str, config: str | None) -> list[str] | None:
    """Return the files of a split, the configuration `default` before others; None where there is
    none or several could be meant."""
    found = {}
    for (name, base), inside in named_splits(paths).items():
        if base == split and config in (None, name):
            found[name] = inside
    if len(found) == 1:
        return next(iter(found.values()))
    return found.get("default")


def said_by_hub(problem: Exception, todo: str) -> tuple[str, str | None, str | None]:
    """Return what the hub, the network or the cache said, what was wanted, and what mends it."""
    status = getattr(getattr(problem, "response", None), "status_code", None)
    said = " ".join(str(problem).split())[:200]
    if isinstance(problem, errors.GatedRepoError):
        return (
            "a gated data set",
            "a token that was granted access",
            "accept its terms on its page, then hf auth login",
        )
    if isinstance(problem, errors.RevisionNotFoundError):
        return "no such revision", "a branch, tag or commit of it after @", None
    if constants.HF_HUB_OFFLINE:
        return (
            "HF_HUB_OFFLINE is set, and it is not whole in the cache",
            "a filled cache or a network",
            "HF_HUB_OFFLINE=0",
        )
    if status in (401, 403) or isinstance(problem, errors.RepositoryNotFoundError):
        return (
            f"{status} from {constants.ENDPOINT}: there is none of that name, or the token may not"
            f" have it {todo}",
            "an id as in the address of its page",
            "another id, or a token in HF_TOKEN or by hf auth login",
        )
    if status is None:
        return (
            f"{constants.ENDPOINT} did not answer: {type(problem).__name__}: {said}",
            "a network",
            "HF_HUB_OFFLINE=1, if it is in the cache",
        )
    return said, None, None


def _reaching(where: str, todo: str):
    return places.one_line_error(f"the hub's data set {where}", todo, FAILURES, said_by_hub)


def _listing(repo: str, revision: str | None) -> list[str] | None:
    """Return the paths of a repository at a revision, or None where the revision is not there (or
    not in the cache, when offline)."""
    try:
        if constants.HF_HUB_OFFLINE:
            tree = huggingface_hub.get_cached_repo_tree(
                repo, repo_type="dataset", revision=revision
            )
            return [file.path for file in tree]
        info = huggingface_hub.HfApi().dataset_info(repo, revision=revision, timeout=TIMEOUT_S)
        return [file.rfilename for file in info.siblings or []]
    except (errors.RevisionNotFoundError, errors.CachedRepoTreeNotFoundError):
        if revision == CONVERTED or constants.HF_HUB_OFFLINE:
            return None
        raise


def _choose(
    repo: str, revision: str | None, config: str | None, split: str, listed: dict
) -> tuple[str | None, list[str]]:
    """Return the revision to take a split from, and its files there; one line where there is no
    such split. listed: the paths of the repository by revision."""

    def of_kind(at, kinds):
        return [path for path in listed.get(at) or [] if places.suffix(path) in kinds]

    tries = [
        (at, of_kind(at, kinds))
        for at, kinds in ((revision, KINDS[0]), (CONVERTED, KINDS[0]), (revision, KINDS[1]))
    ]
    for at, paths in tries:
        if chosen := files_of_split(paths, split, config):
            return at, chosen
    known = {place for _, paths in tries for place in named_splits(paths)}
    told = any({*re.split(r"[._-]", name)} & SPLIT_NAMES for _, name in known)
    if (config, split) == (None, "train") and not told:
        # nothing there is called after a split: then all of it is train
        for at, paths in tries:
            if paths:
                return at, paths
    names = sorted(name if config == "default" else f"{config}/{name}" for config, name in known)
    files.fail(
        f"the hub's data set {repo} has no one split {f'{config}/' if config else ''}{split}",
        seen=", ".join(names) or "no data file",
        wanted=f"one of these: {repo}:SPLIT",
    )


def download(where: str) -> list[Place]:
    """Bring the files of org/name[:[config/]split][@revision] into the cache, and return them."""
    found = ID.fullmatch(where)
    repo, revision = found["repo"], found["revision"]
    config, _, split = (found["split"] or "train").rpartition("/")
    if not sys.stderr.isatty():
        huggingface_hub.utils.disable_progress_bars()
    with _reaching(where, "read"):
        listed = {at: _listing(repo, at) for at in ([revision] if revision else [None, CONVERTED])}
        if all(paths is None for paths in listed.values()):
            raise errors.CachedRepoTreeNotFoundError(repo)
        at, chosen = _choose(repo, revision, config or None, split, listed)
        folder = huggingface_hub.snapshot_download(
            repo,
            repo_type="dataset",
            revision=at,
            allow_patterns=[glob.escape(path) for path in chosen],
            etag_timeout=TIMEOUT_S,
        )
    commit = Path(folder).name
    return [
        Place(f"{repo}/{path}@{commit[:12]}", places.LOCAL, str(Path(folder) / path), commit)
        for path in chosen
    ]


def create(repo: str, public: bool) -> None:
    """Make the data set repository, private unless `public`, if it is not there; refuse before any
    work what could not be pushed later."""
    with _reaching(repo, "written"):
        huggingface_hub.HfApi().create_repo(
            repo, repo_type="dataset", private=not public, exist_ok=True
        )


def push(folder: Path, repo: str) -> str:
    """Upload the parquet files of a folder as the repository's data/, in one commit; return its
    address."""
    with _reaching(repo, "written"):
        return huggingface_hub.HfApi().upload_folder(
            repo_id=repo,
            repo_type="dataset",
            folder_path=folder,
            path_in_repo="data",
            allow_patterns="*.parquet",
            commit_message="prepare_data.py",
            delete_patterns=["train.parquet", "validation.parquet"],
        )
