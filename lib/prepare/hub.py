"""Data sets of the Hugging Face hub: which files of a repository are a split, their download, and
the way back up.

Contract: `download` returns local files (in huggingface_hub's own cache: cut downloads are resumed,
nothing is fetched twice) and the commit they are of. The token is the usual one (HF_TOKEN, or what
`hf auth login` stored). With HF_HUB_OFFLINE=1 the cache is all there is. Parquet is preferred: that
of the repository, then the hub's own conversion of it, then its jsonl, json and csv files.
"""

import glob
import re
import sys
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants, errors

from lib import files

ID = re.compile(
    r"(hf://(datasets/)?)?(?P<repo>[\w.-]+/[\w.-]+)(:(?P<split>[\w.-]+(/[\w.-]+)?))?(@(?P<revision>[\w./-]+))?"
)
REPO = re.compile(r"[\w.-]+/[\w.-]+")
CONVERTED = (  # the branch where the hub keeps its own parquet copy of a data set
    "refs/convert/parquet"
)
SPLITS = {"train", "training", "test", "validation", "valid", "val", "dev", "eval"}
KINDS = ((".parquet",), (".jsonl", ".json", ".csv"))
TIMEOUT_S = 10
# what a wrong id, token, network or cache ends in: HTTPError is the http client's own, of which the
# hub's errors are kinds
FAILURES = (errors.HTTPError, OSError, ValueError, errors.CachedRepoTreeNotFoundError)


def suffix(path: str) -> str:
    """Return the suffix that says how a file is read: suffix("a.jsonl.gz") == ".jsonl"."""
    name = path.rsplit("/", 1)[-1]
    stem = re.sub(r"\.(gz|bz2|zst|xz)$", "", name)
    end = Path(stem).suffix.lower()
    return "" if end == ".parquet" != Path(name).suffix.lower() else end


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
        if re.fullmatch(
            r"\d*|part|chunk|shard|data", base
        ):  # numbered parts: the folder is the split
            base = folders.pop() if folders else ""
        elif folders and folders[-1] in SPLITS:
            base = folders.pop()
        if base:
            found.setdefault(("/".join(folders) or "default", base), []).append(path)
    return found


def choose(paths: list[str], split: str, config: str | None) -> list[str] | None:
    """Return the files of a split, the configuration `default` before others; None where there is
    none or several could be meant."""
    found = {
        place: inside
        for place, inside in named_splits(paths).items()
        if place[1] == split and config in (None, place[0])
    }
    return (
        found.get(("default", split))
        if ("default", split) in found
        else next(iter(found.values()))
        if len(found) == 1
        else None
    )


def _refuse(where: str, problem: Exception, todo: str = "read"):
    """End with one line for what the hub, the network or the cache said."""
    status = getattr(getattr(problem, "response", None), "status_code", None)
    seen, wanted, mend = " ".join(str(problem).split())[:200], None, None
    if isinstance(problem, errors.GatedRepoError):
        seen, wanted, mend = (
            "a gated data set",
            "a token that was granted access",
            "accept its terms on its page, then hf auth login",
        )
    elif isinstance(problem, errors.RevisionNotFoundError):
        seen, wanted = "no such revision", "a branch, tag or commit of it after @"
    elif constants.HF_HUB_OFFLINE:
        seen, wanted, mend = (
            "HF_HUB_OFFLINE is set, and it is not whole in the cache",
            "a filled cache or a network",
            "HF_HUB_OFFLINE=0",
        )
    elif status in (401, 403) or isinstance(problem, errors.RepositoryNotFoundError):
        seen = (
            f"{status} from {constants.ENDPOINT}: there is none of that name, or the token may not"
            f" {todo} it"
        )
        wanted, mend = (
            "an id as in the address of its page",
            "another id, or a token in HF_TOKEN or by hf auth login",
        )
    elif status is None:
        seen = f"{constants.ENDPOINT} did not answer: {type(problem).__name__}: {seen}"
        wanted, mend = "a network", "HF_HUB_OFFLINE=1, if it is in the cache"
    files.fail(f"the hub's data set {where} cannot be {todo}", seen, wanted, mend)


def _listing(repo: str, revision: str | None) -> list[str] | None:
    """Return the paths of a repository at a revision, or None where the revision is not there (or
    not in the cache, when offline)."""
    try:
        if constants.HF_HUB_OFFLINE:
            return [
                file.path
                for file in huggingface_hub.get_cached_repo_tree(
                    repo, repo_type="dataset", revision=revision
                )
            ]
        info = huggingface_hub.HfApi().dataset_info(repo, revision=revision, timeout=TIMEOUT_S)
        return [file.rfilename for file in info.siblings or []]
    except (errors.RevisionNotFoundError, errors.CachedRepoTreeNotFoundError):
        if revision == CONVERTED or constants.HF_HUB_OFFLINE:
            return None
        raise


def download(where: str) -> tuple[str, str, list[tuple[str, Path]]]:
    """Bring the files of org/name[:[config/]split][@revision] into the cache. Return (repository,
    commit, [(path in it, local path)])."""
    found = ID.fullmatch(where)
    repo, revision, split = found["repo"], found["revision"], found["split"] or "train"
    config, split = split.split("/") if "/" in split else (None, split)
    if not sys.stderr.isatty():
        huggingface_hub.utils.disable_progress_bars()
    try:
        listed = {at: _listing(repo, at) for at in ([revision] if revision else [None, CONVERTED])}
        if all(paths is None for paths in listed.values()):
            raise errors.CachedRepoTreeNotFoundError(repo)

        def of_kind(at, kinds):
            return [path for path in listed.get(at) or [] if suffix(path) in kinds]

        tries = [(revision, KINDS[0]), (CONVERTED, KINDS[0]), (revision, KINDS[1])]
        at, chosen = next(
            (
                (at, paths)
                for at, kinds in tries
                if (paths := choose(of_kind(at, kinds), split, config))
            ),
            (None, None),
        )
        known = {
            place: at for at, kinds in reversed(tries) for place in named_splits(of_kind(at, kinds))
        }
        if (
            chosen is None
            and split == "train"
            and config is None
            and not any({*re.split(r"[._-]", name)} & SPLITS for _, name in known)
        ):
            # nothing there is called after a split: then all of it is train
            at, chosen = next(
                ((at, paths) for at, kinds in tries if (paths := of_kind(at, kinds))), (None, None)
            )
        if not chosen:
            seen = (
                ", ".join(
                    sorted(
                        name if config == "default" else f"{config}/{name}"
                        for config, name in known
                    )
                )
                or "no data file"
            )
            files.fail(
                f"the hub's data set {repo} has no one split {found['split'] or 'train'}",
                seen=seen,
                wanted=f"one of these: {repo}:SPLIT",
            )
        folder = huggingface_hub.snapshot_download(
            repo,
            repo_type="dataset",
            revision=at,
            allow_patterns=[glob.escape(path) for path in chosen],
            etag_timeout=TIMEOUT_S,
        )
    except FAILURES as problem:
        _refuse(where, problem)
    return repo, Path(folder).name, [(path, Path(folder) / path) for path in chosen]


def create(repo: str, public: bool) -> None:
    """Make the data set repository, private unless `public`, if it is not there; refuse before any
    work what could not be pushed later."""
    try:
        huggingface_hub.HfApi().create_repo(
            repo, repo_type="dataset", private=not public, exist_ok=True
        )
    except FAILURES as problem:
        _refuse(repo, problem, "written")


def push(folder: Path, repo: str) -> str:
    """Upload the parquet files of a folder as the repository's data/, in one commit; return its
    address."""
    try:
        return huggingface_hub.HfApi().upload_folder(
            repo_id=repo,
            repo_type="dataset",
            folder_path=folder,
            path_in_repo="data",
            allow_patterns="*.parquet",
            commit_message="prepare_data.py",
            delete_patterns=["train.parquet", "validation.parquet"],
        )
    except FAILURES as problem:
        _refuse(repo, problem, "written")
