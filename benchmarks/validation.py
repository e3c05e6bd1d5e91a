"""Time and memory of the validate stage on a data set of COCO 2017's size, made for it.

    python -m benchmarks.validation FOLDER      # 1.2 GB below it, removed afterwards

118,287 + 5,000 pictures with COCO's sizes in their headers and little behind them, stored in zips; 860,001 + 36,781
annotations with polygons, sparse category ids, the json of train about 450 MB. The stage runs in a process of its own
with the parameters of COCO's recipes. Prints wall and processor seconds, and the peak of the memory of all its
processes together, pages that they share counted once.
"""

import argparse
import datetime
import io
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

REPOSITORY = Path(__file__).parents[1]
RECIPE = REPOSITORY / "recipes" / "d0-coco-8xa100-tf32.yaml"
SPLITS = {"train": (118_287, 860_001, 1), "val": (5_000, 36_781, 200_001)}  # images, annotations, the first image's id
SIZES = [
    (640, 480),
    (480, 640),
    (640, 427),
    (427, 640),
    (500, 375),
    (640, 640),
    (375, 500),
    (612, 612),
]  # width, height
CATEGORIES = [number for number in range(1, 91) if number not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)]
CORNERS = (8, 40)  # of a polygon, so that an annotation has COCO's 520 bytes on average
COMMENT = b"\xff\xfe\x00\x0a"  # a JPEG segment of 8 bytes, so that no two files are the same


def main() -> None:
    """Reads the command line, makes the data set, measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the data set is made, in a folder of its own")
    parser.add_argument("--rounds", type=int, default=1, help="measurements (default 1)")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        make(Path(name))
        rows = [measure(Path(name)) for _ in range(arguments.rounds)]
    print_table(rows)


def make(folder: Path) -> None:
    """The folder as the download stage leaves it, params.yaml included."""
    raw = folder / "data" / "raw"
    raw.mkdir(parents=True)
    shutil.copy(RECIPE, folder / "params.yaml")
    for split, (images, annotations, first) in SPLITS.items():
        write_images(raw / f"{split}.zip", images, first)
        write_annotations(raw / f"instances_{split}.json", images, annotations, first)


def write_images(path: Path, count: int, first: int) -> None:
    """Pictures of one colour, COCO's file names, one top folder."""
    bodies = []
    for size in SIZES:
        buffer = io.BytesIO()
        Image.new("RGB", size, (120, 110, 100)).save(buffer, "JPEG")
        bodies.append(buffer.getvalue())
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(first, first + count):
            body = bodies[number % len(SIZES)]
            content = body[:2] + COMMENT + number.to_bytes(8, "big") + body[2:]
            archive.writestr(zipfile.ZipInfo(f"{path.stem}2017/{number:012}.jpg"), content)


def write_annotations(path: Path, images: int, annotations: int, first: int) -> None:
    """Boxes inside their images, in no order of images, polygons of two decimals."""
    random = np.random.default_rng(first)
    image = random.integers(0, images, annotations)
    sides = np.array(SIZES, float)[(image + first) % len(SIZES)]  # [annotations, 2]
    wh = np.maximum(sides * random.beta(1, 4, (annotations, 2)), 2).round(2)
    xy = np.floor((sides - wh) * random.random((annotations, 2)) * 100) / 100
    corners = random.integers(*CORNERS, annotations)
    share = np.char.mod("%.2f", random.random(20_000) * 640).tolist()  # coordinates to draw from
    categories = random.choice(CATEGORIES, annotations, p=np.arange(80, 0, -1) / 3240)
    with path.open("w") as file:
        file.write('{"info": {"description": "made for a benchmark"}, "licenses": [], "images": [')
        for number in range(images):
            width, height = SIZES[(number + first) % len(SIZES)]
            name = f"{number + first:012}.jpg"
            record = {"license": 1, "file_name": name, "coco_url": f"http://images.example/{name}"}
            record |= {"height": height, "width": width, "date_captured": "2013-11-14 17:02:52", "id": number + first}
            file.write(", " * (number > 0) + json.dumps(record))
        file.write('], "annotations": [')
        columns = zip(image.tolist(), xy.tolist(), wh.tolist(), corners.tolist(), categories.tolist(), strict=True)
        for number, (place, (x, y), (w, h), points, category) in enumerate(columns):
            start = number * 37 % (len(share) - 2 * CORNERS[1])
            polygon = ", ".join(share[start : start + 2 * points])
            file.write(
                f'{", " * (number > 0)}{{"segmentation": [[{polygon}]], "area": {0.6 * w * h:.4f}, "iscrowd": 0, '
                f'"image_id": {place + first}, "bbox": [{x:g}, {y:g}, {w:g}, {h:g}], "category_id": {category}, '
                f'"id": {10 * first + number}}}'
            )
        names = [{"supercategory": "thing", "id": number, "name": f"thing {number}"} for number in CATEGORIES]
        file.write(f'], "categories": {json.dumps(names)}}}')


def measure(folder: Path) -> tuple[float, float, float]:
    """Wall seconds, processor seconds, peak GiB of the stage."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    stage = subprocess.Popen(
        [sys.executable, "-m", "pipeline.validate"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.DEVNULL,
        start_new_session=True,  # its processes are told by their session
    )
    peak = 0
    while stage.poll() is None:
        peak = max(peak, memory(stage.pid))
        time.sleep(0.1)
    seconds = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if stage.returncode:
        raise SystemExit(f"the stage ended with exit {stage.returncode}")
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return seconds, used, peak / 2**30


def memory(session: int) -> int:
    """Bytes of a session's processes, each shared page as the part of it that falls to a process."""
    total = 0
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if os.getsid(int(folder.name)) == session:
                text = (folder / "smaps_rollup").read_text()
                total += 1024 * int(text.partition("\nPss:")[2].split()[0])
        except (OSError, IndexError):  # it has ended
            continue
    return total


def print_table(rows: list[tuple[float, float, float]]) -> None:
    """A row for each measurement."""
    from pipeline.provenance import hardware

    machine = hardware()
    print(
        f"validate, {SPLITS['train'][0]:,} + {SPLITS['val'][0]:,} images\n"
        f"{datetime.date.today()}, {machine['cpu']}, {machine['cpus']} cores\n\n"
        "| seconds | processor seconds | peak GiB |\n| --- | --- | --- |"
    )
    for seconds, used, peak in rows:
        print(f"| {seconds:.1f} | {used:.1f} | {peak:.2f} |")


if __name__ == "__main__":
    main()
