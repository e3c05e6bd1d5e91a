"""Writes data.checksums and train.init_checksum into params.yaml: `python -m pipeline.checksums`.

They are of the files at data.base_url, and of the weights at the path train.init_from.

Everything else in the file stays as it is, byte for byte.
"""

import argparse
import re
from pathlib import Path

from ruamel.yaml import YAML

from pipeline import params, transfer
from pipeline.download import source_files
from pipeline.errors import PipelineError, run
from pipeline.files import written_whole
from pipeline.params import Coco2017Data, CocoFormatData, SyntheticData, TfrecordsData


def main() -> None:
    settings = params.load()
    weights = settings.train.init_from
    own_weights = weights is not None and weights != params.IMAGENET
    if isinstance(settings.data, SyntheticData) and not own_weights:
        raise PipelineError(
            "params.yaml: data.source: synthetic data is made, not fetched: it has no checksums, and train.init_from "
            "names no file"
        )
    if not isinstance(settings.data, SyntheticData):
        found = compute(settings.data)
        write(params.PARAMS_FILE, found)
        for name, checksum in found.items():
            print(f"{name}: {checksum}")
        changed = found != settings.data.checksums
        print(f"{params.PARAMS_FILE}: data.checksums {'now holds' if changed else 'holds'} these")
    if own_weights:
        from pipeline.initial_weights import content_checksum  # here: it brings TensorFlow, which data needs not

        found_weights = content_checksum(str(weights))
        write_init(params.PARAMS_FILE, found_weights)
        print(f"{params.PARAMS_FILE}: train.init_checksum is {found_weights}, of {weights}")


def write_init(path: Path, checksum: str) -> None:
    """Puts it in place of train.init_checksum; a comment behind stays. PipelineError, and the file untouched, else."""
    lines = path.read_text().splitlines(keepends=True)
    (number, _) = YAML().load("".join(lines))["train"].lc.key("init_checksum")
    # the value, which may be empty; a comment stands behind a blank
    pattern = r"^( *init_checksum:)(?: +[^\s#]\S*)?(?=\s*$| +#)"
    lines[number], count = re.subn(pattern, rf"\1 {checksum}", lines[number])
    text = "".join(lines)
    if count != 1 or YAML(typ="safe", pure=True).load(text)["train"]["init_checksum"] != checksum:
        raise PipelineError(
            f"{path}: line {number + 1}: write `init_checksum: null` on a line of its own and run it again"
        )
    with written_whole(path) as part:
        part.write_text(text)


def compute(data: Coco2017Data | CocoFormatData | TfrecordsData) -> dict[str, str]:
    """File name -> checksum of every file of the source, as data.base_url has them now; no mirror is asked.

    Of the kind that is pinned: the same bytes are the same words.
    """
    usual = "md5" if isinstance(data, Coco2017Data) else "sha256"  # COCO's own are MD5
    kinds = {name: pinned.partition(":")[0] for name, pinned in data.checksums.items() if pinned}
    files = source_files(data)
    return {file.name: transfer.checksum([data.base_url], file, kinds.get(file.name, usual)) for file in files}


def write(path: Path, checksums: dict[str, str]) -> None:
    """Puts them in place of data.checksums. PipelineError, and the file untouched, where that cannot be found."""
    lines = path.read_text().splitlines(keepends=True)
    data = YAML().load("".join(lines))["data"]  # knows on which lines keys stand
    first, column = data.lc.key("checksums")
    last = max((data["checksums"].lc.key(name)[0] for name in data["checksums"]), default=first)
    head = re.fullmatch(r"( *checksums:)( *\{.*\})?( *(?:#.*)?)\n?", lines[first])
    if head is None:
        raise PipelineError(f"{path}: line {first + 1}: write `checksums: {{}}` on a line of its own and run it again")
    blank = " " * len(head[2] or "") if head[3] else ""  # a comment stays in its column
    entries = [f"{' ' * (column + 2)}{_key(name)}: {checksum}\n" for name, checksum in checksums.items()]
    with written_whole(path) as part:
        part.write_text("".join([*lines[:first], f"{head[1]}{blank}{head[3]}\n", *entries, *lines[last + 1 :]]))


def _key(name: str) -> str:
    """A file name as YAML takes it: quoted where it would otherwise read a number, null or a comment."""
    plain = re.fullmatch(r"[A-Za-z][\w./-]*", name) and isinstance(YAML(typ="safe", pure=True).load(name), str)
    return name if plain else "'" + name.replace("'", "''") + "'"


if __name__ == "__main__":
    argparse.ArgumentParser(prog="python -m pipeline.checksums", description=__doc__).parse_args()
    run(main)
