"""Rate of sharding against copying the same bytes out of the zip and into files, in one run, taken in turn.

    python -m benchmarks.sharding ../shared/coco-mini

Takes the JPEGs and boxes of train2017.zip and annotations_trainval2017.zip (or train.zip and instances_train.json) in
that folder, as often as it needs them. Copies are plain `zipfile` reads by as many processes, into a file an image, and
into a file a shard, which costs the file system less. Prints medians over the rounds and the highest peak memory of a
process that writes shards, for two sizes of the data set. Only the share is comparable between machines and hours; all
find their archive in the machine's cache.
"""

import argparse
import datetime
import itertools
import json
import os
import shutil
import statistics
import tempfile
import time
import zipfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

from pipeline.archive_workers import over_archive
from pipeline.coco import COCO2017_CLASSES, CocoTables, ImageArchive, add_member, class_table, parse_annotations
from pipeline.shard import Shard, byte_counts, deal, plan, write_shard

IMAGES_PER_SHARD = 250


def main() -> None:
    """Reads the command line, measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="of the data set")
    parser.add_argument("--images", type=int, default=3000, help="of the larger data set (default 3000)")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="processes (default 1 2)")
    parser.add_argument("--rounds", type=int, default=7, help="measurements of each (default 7)")
    parser.add_argument("--scratch", type=Path, help="folder for some GB of files (default: the system's)")
    arguments = parser.parse_args()

    rows = []
    for images in (arguments.images // 4, arguments.images):
        with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
            with ProcessPoolExecutor(1) as pool:  # what this takes is not of the sharding
                archive, tables = pool.submit(replicated, arguments.folder, images, Path(scratch)).result()
            rows += [measure(archive, tables, workers, arguments.rounds) for workers in arguments.workers]

    from pipeline.provenance import hardware  # here: it brings TensorFlow, whose memory is not to be measured

    machine = hardware()
    print(
        f"{datetime.date.today()}, {machine['cpu']}, {machine['cpus']} cores, {arguments.rounds} rounds\n\n"
        "| images | MB | workers | sharded, images/s | a file an image | share | a file a shard | share | peak MiB |\n"
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        *rows,
        sep="\n",
    )


def replicated(folder: Path, images: int, scratch: Path) -> tuple[Path, CocoTables]:
    """A stored zip of `images` files, those of the folder over and over under new names, and its annotations."""
    source = folder / "train2017.zip"
    if source.exists():
        with zipfile.ZipFile(folder / "annotations_trainval2017.zip") as annotations:
            content = annotations.read("annotations/instances_train2017.json")
    else:
        source, content = folder / "train.zip", (folder / "instances_train.json").read_bytes()
    tables = parse_annotations(content, str(folder))
    by_image = dict(list(tables.annotations.groupby("image_id")))
    found: dict[str, list[dict[str, object]]] = {"images": [], "annotations": []}
    target = scratch / "train.zip"
    with ImageArchive(source) as opened, zipfile.ZipFile(target, "w") as archive:
        rows = itertools.cycle(tables.images.to_dict("records"))
        for number, row in enumerate(itertools.islice(rows, images), start=1):
            add_member(archive, f"train/{number:012d}.jpg", opened.read(row["file_name"]))
            found["images"].append({**row, "id": number, "file_name": f"{number:012d}.jpg"})
            for record in by_image[row["id"]].to_dict("records") if row["id"] in by_image else []:
                box = [record[side] for side in "xywh"]
                annotation = {"id": len(found["annotations"]) + 1, "image_id": number, "bbox": box}
                found["annotations"].append({**record, **annotation})
    whole = {**found, "categories": tables.categories.to_dict("records")}
    return target, parse_annotations(json.dumps(whole).encode(), str(target))


def measure(archive: Path, tables: CocoTables, workers: int, rounds: int) -> str:
    """Shards and copies in turn; a row of the table."""
    order = deal(byte_counts(archive, tables.images), IMAGES_PER_SHARD, seed=1)
    names = [[f"train/{name}" for name in tables.images["file_name"].iloc[members]] for members in order]
    classes = class_table(tables.categories, COCO2017_CLASSES)
    folder = archive.with_name("out")

    def sharded() -> int:
        shards = plan(folder, "train", tables, classes, order)
        return max(over_archive(archive, workers, write_and_weigh, shards))

    def copied(copy: Callable[[list[str], Path], int]) -> int:
        with ProcessPoolExecutor(workers, initializer=open_zip, initargs=(archive,)) as pool:
            return max(pool.map(copy, names, itertools.repeat(folder)))

    ways = {"sharded": sharded, "each": lambda: copied(copy_each), "together": lambda: copied(copy_together)}
    rates: dict[str, list[float]] = {name: [] for name in ways}
    peaks: dict[str, int] = dict.fromkeys(ways, 0)
    for turn in range(rounds + 1):
        for name in np.roll(list(ways), turn).tolist():
            folder.mkdir()
            os.sync()  # so that nobody waits for what another wrote
            start = time.perf_counter()
            peaks[name] = max(peaks[name], ways[name]())
            rates[name].append(len(tables.images) / (time.perf_counter() - start))
            shutil.rmtree(folder)
    ours, each, together = (statistics.median(values[1:]) for values in rates.values())  # the first round warms up
    size, peak = archive.stat().st_size / 1e6, peaks["sharded"] / 2**10
    return (
        f"| {len(tables.images):,} | {size:,.0f} | {workers} | {ours:,.0f} "
        f"| {each:,.0f} | {ours / each:.2f} | {together:,.0f} | {ours / together:.2f} | {peak:.0f} |"
    )


_zip: zipfile.ZipFile  # of a copying process


def open_zip(archive: Path) -> None:
    """Before a process copies."""
    global _zip
    _zip = zipfile.ZipFile(archive)


def copy_each(names: list[str], folder: Path) -> int:
    """Writes each member to a file of its own; returns the process's peak memory in KiB."""
    for name in names:
        (folder / Path(name).name).write_bytes(_zip.read(name))
    return peak_kibibytes()


def copy_together(names: list[str], folder: Path) -> int:
    """Writes all members to one file; returns the process's peak memory in KiB."""
    with (folder / Path(names[0]).name).open("wb") as file:
        for name in names:
            file.write(_zip.read(name))
    return peak_kibibytes()


def write_and_weigh(archive: ImageArchive, shard: Shard) -> int:
    """write_shard; returns the process's peak memory in KiB."""
    write_shard(archive, shard, apply_exif=False, reencode=None)
    return peak_kibibytes()


def peak_kibibytes() -> int:
    """Of this process; what it shares with the process that it was forked from counts too."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0])


if __name__ == "__main__":
    main()
