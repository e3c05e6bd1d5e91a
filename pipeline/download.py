"""The download stage: the data set that params.yaml names, as data/raw/.

data/raw/{split}.zip are the image archives, byte for byte, data/raw/source/ the annotations as they came, and
data/raw/instances_{split}.json what the other stages read: the same, or its first `data.max_images` images.
TFRecords stay in data/raw/source/ too, and {split}.zip and instances_{split}.json are made from them.
Of files whose checksum is null in params.yaml, data/raw/source/checksums.json says what came.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from pipeline import local, params, params_check, published_records, synthetic, transfer
from pipeline.coco import CocoTables, ImageArchive, parse_annotations
from pipeline.errors import PipelineError
from pipeline.files import read_json, write_json, written_whole
from pipeline.params import Coco2017Data, CocoFormatData, Data, SyntheticData, TfrecordsData
from pipeline.raw_data import RAW
from pipeline.timings import run_stage
from pipeline.transfer import SourceFile

COCO2017_ANNOTATIONS = "annotations_trainval2017.zip"
FOUND = "source/checksums.json"  # below data/raw: {"base_url", "checksums": {file name: of what came}}


@dataclass(frozen=True)
class Split:
    """Where a split's parts come from."""

    name: str
    annotations: SourceFile  # a COCO json, or an archive that holds it
    member: str | None  # the json's name in that archive
    images: SourceFile


def main() -> None:
    settings = params.load()
    params_check.check(settings)  # here, in the first stage: a wrong name must not show after 20 GB
    download(settings.data, local.load().mirrors, RAW)


def download(data: Data, mirrors: Sequence[str], raw: Path) -> None:
    """Brings `raw` to what `data` says. What is there and right stays, what does not belong there goes."""
    kept: set[Path] = set()
    if isinstance(data, SyntheticData):
        for split, count in (("train", data.train_images), ("val", data.val_images)):
            archive, annotations = raw / f"{split}.zip", raw / "source" / f"instances_{split}.json"
            with written_whole(archive) as zip_part, written_whole(annotations) as json_part:
                synthetic.write_split(split, count, data.seed, zip_part, json_part)
            kept |= {archive, annotations, _accept(split, annotations, None, data.max_images, raw)}
    elif isinstance(data, TfrecordsData):
        check_checksums(data)
        kept |= _from_records(data, mirrors, raw)
    else:
        check_checksums(data)
        for part in splits(data):  # all annotations first: they are small, and tell what is wrong with them early
            annotations = raw / "source" / (part.annotations.name if part.member else f"instances_{part.name}.json")
            _obtain(data, mirrors, part.annotations, annotations, raw)
            kept |= {annotations, _accept(part.name, annotations, part.member, data.max_images, raw)}
        for part in splits(data):
            archive = raw / f"{part.name}.zip"
            _obtain(data, mirrors, part.images, archive, raw)
            ImageArchive(archive).close()  # an archive at all, and safe; what is in it, validate looks at
            kept.add(archive)
    if not isinstance(data, SyntheticData) and None in data.checksums.values():
        kept.add(raw / FOUND)
    _remove_others(raw, kept)


def _from_records(data: TfrecordsData, mirrors: Sequence[str], raw: Path) -> set[Path]:
    """Fetches the TFRecords, no more of them than data.max_images needs, and lays them down as archive and json."""
    fetched = set()

    def arriving(pattern: str) -> Iterator[Path]:
        for name in published_records.file_names(pattern):
            target = raw / "source" / name
            _obtain(data, mirrors, SourceFile(name, (name,)), target, raw)
            fetched.add(target)
            yield target

    files = {"train": arriving(data.train), "val": arriving(data.val)}
    return published_records.convert(files, data.num_classes, data.max_images, raw) | fetched


def splits(data: Coco2017Data | CocoFormatData) -> list[Split]:
    """What the data set consists of."""
    if isinstance(data, Coco2017Data):
        return [
            Split(
                name,
                annotations=_coco2017_file("annotations", COCO2017_ANNOTATIONS),
                member=f"annotations/instances_{name}2017.json",
                images=_coco2017_file("zips", f"{name}2017.zip"),
            )
            for name in ("train", "val")
        ]
    named = {"train": data.train, "val": data.val, "test": data.test}
    return [
        Split(
            name,
            annotations=SourceFile(files.annotations, (files.annotations,)),
            member=None,
            images=SourceFile(files.images, (files.images,), is_folder=not files.images.endswith(".zip")),
        )
        for name, files in named.items()
        if files is not None
    ]


def _coco2017_file(folder: str, name: str) -> SourceFile:
    return SourceFile(name, (f"{folder}/{name}", name))  # as the official site has it; or a mirror with all in one


def source_files(data: Coco2017Data | CocoFormatData | TfrecordsData) -> list[SourceFile]:
    """All files of the source, each once."""
    if isinstance(data, TfrecordsData):
        names = [name for pattern in (data.train, data.val) for name in published_records.file_names(pattern)]
        return [SourceFile(name, (name,)) for name in dict.fromkeys(names)]
    both = [file for split in splits(data) for file in (split.annotations, split.images)]
    return list({file.name: file for file in both}.values())


def check_checksums(data: Coco2017Data | CocoFormatData | TfrecordsData) -> None:
    """PipelineError unless data.checksums names exactly the source's files."""
    needed = [file.name for file in source_files(data)]
    missing = [name for name in needed if name not in data.checksums]
    unknown = [name for name in data.checksums if name not in needed]
    faults = [f"no checksum of {', '.join(missing)}"] * bool(missing)
    faults += [f"{', '.join(unknown)} is no file of this source"] * bool(unknown)
    if faults:
        raise PipelineError(
            f"params.yaml: data.checksums: {'; '.join(faults)}; `python -m pipeline.checksums` writes them "
            "from the files at data.base_url; null takes whatever comes"
        )


def _obtain(
    data: Coco2017Data | CocoFormatData | TfrecordsData,
    mirrors: Sequence[str],
    file: SourceFile,
    target: Path,
    raw: Path,
) -> None:
    """Brings the file to `target`, unless it is there.

    Where its checksum is null, what once came from data.base_url stays, and no server is asked whether it has changed;
    deleting data/raw fetches it anew.
    """
    expected = data.checksums[file.name]
    found = _found(raw, data) if expected is None else {}
    known = expected or found.get(file.name)
    if known is None or not transfer.is_present(target, file, known):
        got = transfer.fetch([*mirrors, data.base_url], file, target, expected)
        if expected is None:
            write_json(raw / FOUND, {"base_url": data.base_url, "checksums": {**found, file.name: got}})


def _found(raw: Path, data: Coco2017Data | CocoFormatData | TfrecordsData) -> dict[str, str]:
    """The checksums of what came of the files that have none in params.yaml."""
    if not (raw / FOUND).exists():
        return {}
    content = read_json(raw / FOUND, "checksums")
    if content["base_url"] != data.base_url:
        return {}
    return {name: got for name, got in content["checksums"].items() if data.checksums.get(name, "") is None}


def _accept(split: str, annotations: Path, member: str | None, max_images: int | None, raw: Path) -> Path:
    """Writes instances_{split}.json from the annotations as they came, once they are known to be readable."""
    if member is None:
        where, content = str(annotations), annotations.read_bytes()
    else:
        with ImageArchive(annotations) as archive:
            where, content = f"{annotations}: {member}", archive.read(member)
    tables = parse_annotations(content, where)
    if tables.images.empty:
        raise PipelineError(f"{where}: images: empty; split {split!r} needs at least one image")
    if max_images is not None and max_images < len(tables.images):
        content = _cut(content, tables, max_images, split)
    target = raw / f"instances_{split}.json"
    with written_whole(target) as part:
        part.write_bytes(content)
    return target


def _cut(content: bytes, tables: CocoTables, max_images: int, split: str) -> bytes:
    """The annotations file with the first images by id alone. Its records stay as they are written, byte for byte."""
    ids = tables.images["id"]
    kept_images = ids.isin(ids.sort_values().head(max_images))
    kept_annotations = tables.annotations["image_id"].isin(ids[kept_images])
    print(
        f"data.max_images: {split}: the first {max_images:,} of {len(ids):,} images, "
        f"{kept_annotations.sum():,} of {len(kept_annotations):,} annotations"
    )
    whole = msgspec.json.decode(content, type=dict[str, msgspec.Raw])
    return msgspec.json.encode(
        {
            **whole,
            "images": _chosen(whole["images"], kept_images),
            "annotations": _chosen(whole["annotations"], kept_annotations),
        }
    )


def _chosen(records: msgspec.Raw, kept: Iterable[bool]) -> list[msgspec.Raw]:
    return list(itertools.compress(msgspec.json.decode(records, type=list[msgspec.Raw]), kept))


def _remove_others(raw: Path, kept: set[Path]) -> None:
    """Files of another source, and what an interrupted run left."""
    for path in sorted(raw.rglob("*"), reverse=True):  # a folder comes after what is in it
        if path.is_dir() and not path.is_symlink():
            if not any(path.iterdir()):
                path.rmdir()
        elif path not in kept:
            path.unlink()


if __name__ == "__main__":
    run_stage("download", main)
