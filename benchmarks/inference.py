"""Time and memory of inference in every format that a model goes out in, in one run, taken in turn.

    pip install --require-hashes --no-deps -r requirements/benchmarks.txt   # OpenVINO, which nothing else needs
    python -m benchmarks.inference

Two tables. The network alone: normalized float32 pictures to logits and deltas, the baseline being the same network
with keras.layers.BatchNormalization in a tf.function. Whole: uint8 pictures of 480 x 640 to detections, as each export
does it. Each runtime works in a process of its own, which loads nothing but that runtime, while the others wait;
outputs are compared with the baseline's first, on weights whose outputs vary. Prints medians and peak memory; only the
share is comparable between machines and hours.
"""

import argparse
import datetime
import math
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Run = Callable[[Array], Array]

BASELINE = "Keras, stock BatchNormalization"
WARM_UP = 3
PICTURE = (480, 640)  # height, width of the whole table's
CORES = len(os.sched_getaffinity(0))


def main() -> None:
    """Reads the command line, measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="efficientdet-d0", help="default efficientdet-d0")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8], help="pictures (default 1 8)")
    parser.add_argument("--rounds", type=int, default=11, help="measurements of each (default 11)")
    arguments = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        maker = spawn.Process(target=make_files, args=(folder, arguments.model))
        maker.start()
        maker.join()
        if maker.exitcode:
            raise SystemExit(maker.exitcode)
        for table, kinds in TABLES.items():
            print(f"\n{heading(table, arguments)}", flush=True)
            for batch_size in arguments.batch_sizes:
                lite = "lite" in arguments.model
                chosen = {kind: load for kind, load in kinds.items() if lite or "int8" not in kind}
                measure(table, chosen, folder, arguments.model, batch_size, arguments.rounds)


def heading(table: str, arguments: argparse.Namespace) -> str:
    """What stands over a table."""
    from pipeline.provenance import hardware

    what = "network alone" if table == "network" else "uint8 pictures to detections"
    machine = f"{datetime.date.today()}, {hardware()['cpu']}, {CORES} cores"
    columns = ("runtime", "batch", "ms", "images/s", "share", "peak GiB")
    return f"{arguments.model}, {what}; {machine}\n\n| {' | '.join(columns)} |\n|{' --- |' * len(columns)}"


def measure(
    table: str, kinds: dict[str, Callable[..., Run]], folder: Path, model: str, batch_size: int, rounds: int
) -> None:
    """Times every kind in turn and prints its row."""
    spawn = multiprocessing.get_context("spawn")
    workers: dict[str, Connection] = {}
    outputs: dict[str, Array] = {}
    for kind in kinds:
        ours, theirs = spawn.Pipe()
        spawn.Process(target=work, args=(theirs, table, kind, folder, model, batch_size), daemon=True).start()
        theirs.close()  # so that a worker's end is seen here
        outputs[kind] = ours.recv()  # it is warm
        workers[kind] = ours
    reference = next(iter(outputs.values()))
    for kind, output in outputs.items():
        check_same(kind, output, reference)
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(rounds):
        for kind, worker in workers.items():
            worker.send("run")
            times[kind].append(worker.recv())
    baseline = statistics.median(next(iter(times.values())))
    for kind, worker in workers.items():
        worker.send("end")
        seconds = statistics.median(times[kind])
        figures = f"{seconds * 1e3:.0f} | {batch_size / seconds:.1f} | {seconds / baseline:.2f} | {worker.recv():.2f}"
        print(f"| {kind} | {batch_size} | {figures} |", flush=True)


def check_same(kind: str, output: Array, reference: Array) -> None:
    """Ends the run where a kind gives something else, or what all give does not vary and so proves nothing."""
    # what int8 costs is judged by AP, on trained weights
    allowed = {"LiteRT float16": 0.1, "LiteRT int8": math.inf}.get(kind, 0.01)
    worst = abs(output - reference).max() / reference.std()
    if output.shape != reference.shape or reference.std() < 1e-3 or worst > allowed:
        raise SystemExit(f"{kind}: off by {worst:.2g} standard deviations of {reference.std():.2g}")


def work(pipe: Connection, table: str, kind: str, folder: Path, model: str, batch_size: int) -> None:
    """Runs a kind whenever it is asked to; seconds each time, peak memory in GiB at the end."""
    run = TABLES[table][kind](folder, model, batch_size)
    images = np.load(folder / f"{table}.npy")[:batch_size]
    for _ in range(WARM_UP):
        output = run(images)
    pipe.send(output)
    while pipe.recv() == "run":
        start = time.perf_counter()
        run(images)
        pipe.send(time.perf_counter() - start)
    status = Path("/proc/self/status").read_text()  # getrusage counts what the parent held, too
    pipe.send(int(status.partition("VmHWM:")[2].split()[0]) / 2**20)


# Models ---------------------------------------------------------------------------------------------------------------


def built(name: str) -> tuple[Any, Any]:
    """A model whose weights give outputs that vary, and few boxes of high scores; and its configuration."""
    from effdet.config import MODELS
    from effdet.model import build
    from effdet.weights import assign, published_variables
    from tests.effdet.published import formula_array

    model = build(MODELS[name])
    arrays = {key: formula_array(key, tuple(variable.shape)) for key, variable in published_variables(model).items()}
    arrays["class_net/class-predict/pointwise_kernel"] *= 0.3
    arrays["class_net/class-predict/bias"] -= 3
    arrays["box_net/box-predict/pointwise_kernel"] *= 0.08
    assign(model, arrays)
    return model, MODELS[name]


def make_files(folder: Path, name: str) -> None:
    """The inputs, the network alone as a function of normalized pictures, and the whole exports."""
    import tensorflow as tf
    import tf2onnx
    from PIL import Image

    from effdet.export import Classes, export_saved_model
    from effdet.export_litert import export_litert
    from effdet.export_onnx import OPSET, export_onnx
    from effdet.postprocess import PostprocessConfig

    model, config = built(name)
    random = np.random.default_rng(1)
    np.save(folder / "network.npy", random.standard_normal((8, *config.image_size, 3), np.float32))
    rough = random.integers(0, 256, (8, 8, 8, 3), np.uint8)
    pictures = [Image.fromarray(picture).resize(PICTURE[::-1]) for picture in rough]
    np.save(folder / "whole.npy", np.stack([np.asarray(picture) for picture in pictures]))

    weights = [[v.numpy() for v in part] for part in (model.trainable_variables, model.non_trainable_variables)]

    def network(batch: int | None) -> Any:
        @tf.function(input_signature=[tf.TensorSpec([batch, *config.image_size, 3], name="images")], autograph=False)
        def function(images: Any) -> Any:
            outputs, _ = model.stateless_call(*[[tf.constant(a) for a in part] for part in weights], images)
            return {"class_logits": outputs["class_logits"], "box_deltas": outputs["box_deltas"]}

        return function

    free = network(None)
    tf.saved_model.save(tf.Module(), str(folder / "network"), signatures={"serving_default": free})
    tf2onnx.convert.from_function(free, free.input_signature, opset=OPSET, output_path=str(folder / "network.onnx"))
    for batch in (1, 8):
        concrete = network(batch).get_concrete_function()
        converter = tf.lite.TFLiteConverter.from_concrete_functions([concrete], tf.Module())
        (folder / f"network{batch}.tflite").write_bytes(converter.convert())

    classes, nms = Classes(list(range(1, 91)), [str(i) for i in range(90)]), PostprocessConfig()
    export_saved_model(folder / "whole", model, config, nms, classes)
    export_onnx(folder / "whole.onnx", model, config, nms, classes)
    for precision in ("float32", "float16", *(["int8"] if "lite" in name else [])):
        path = folder / f"whole_{precision}.tflite"
        export_litert(path, model, config, nms, classes, precision, calibration=np.load(folder / "whole.npy"))


# Runtimes, each loaded by the process that uses it --------------------------------------------------------------------


def keras_stock(folder: Path, name: str, batch_size: int) -> Run:
    import keras

    from effdet import layers

    def stock(config: Any, name: str) -> Any:
        return keras.layers.BatchNormalization(
            momentum=config.batch_norm_momentum, epsilon=config.batch_norm_epsilon, name=name
        )

    with mock.patch.object(layers, "batch_normalization", stock):
        return keras_network(folder, name, batch_size)


def keras_network(folder: Path, name: str, batch_size: int) -> Run:
    import tensorflow as tf

    model, _ = built(name)
    function = tf.function(lambda images: model(images, training=False), autograph=False)
    return lambda images: function(tf.constant(images))["class_logits"].numpy()


def keras_whole(folder: Path, name: str, batch_size: int) -> Run:
    import tensorflow as tf

    from effdet.anchors import anchors
    from effdet.postprocess import PostprocessConfig, detect
    from effdet.preprocess import fit, normalize

    model, config = built(name)

    @tf.function(autograph=False)
    def function(pixels: Any) -> Any:
        images, content_size, scale = fit(pixels, config.image_size)
        outputs = model(normalize(images, content_size, config), training=False)
        return detect(outputs["class_logits"], outputs["box_deltas"], anchors(config), scale, PostprocessConfig())

    return lambda pixels: function(tf.constant(pixels))["scores"].numpy()


def saved_network(folder: Path, name: str, batch_size: int) -> Run:
    import tensorflow as tf

    loaded = tf.saved_model.load(str(folder / "network"))
    return lambda images: loaded.signatures["serving_default"](images=tf.constant(images))["class_logits"].numpy()


def saved_whole(folder: Path, name: str, batch_size: int) -> Run:
    import tensorflow as tf

    loaded = tf.saved_model.load(str(folder / "whole"))
    return lambda pixels: loaded.signatures["pixels"](pixels=tf.constant(pixels))["scores"].numpy()


def onnx(stem: str, output: str) -> Callable[..., Run]:
    def load(folder: Path, name: str, batch_size: int) -> Run:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = CORES
        session = onnxruntime.InferenceSession(folder / f"{stem}.onnx", options, providers=["CPUExecutionProvider"])
        (images,) = (value.name for value in session.get_inputs())
        return lambda array: session.run([output], {images: array})[0]

    return load


def openvino(folder: Path, name: str, batch_size: int) -> Run:
    import openvino

    core = openvino.Core()
    model = core.read_model(folder / "network.onnx")
    model.reshape([batch_size, *model.inputs[0].partial_shape[1:]])
    # bfloat16, which it takes by itself where the CPU has it, gives other numbers
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": CORES, "PERFORMANCE_HINT": "LATENCY"}
    compiled = core.compile_model(model, "CPU", settings)
    return lambda images: compiled(images)["class_logits"]


def litert(pattern: str, output: str) -> Callable[..., Run]:
    def load(folder: Path, name: str, batch_size: int) -> Run:
        from ai_edge_litert.interpreter import Interpreter

        interpreter = Interpreter(str(folder / pattern.format(batch=batch_size)), num_threads=CORES)
        runner = interpreter.get_signature_runner()
        (key,) = runner.get_input_details()
        if "{batch}" in pattern:
            return lambda images: runner(**{key: images})[output]
        return lambda pixels: np.concatenate([runner(**{key: picture[None]})[output] for picture in pixels])

    return load


NETWORK: dict[str, Callable[..., Run]] = {
    BASELINE: keras_stock,
    "Keras": keras_network,
    "SavedModel": saved_network,
    "ONNX Runtime": onnx("network", "class_logits"),
    "OpenVINO on the ONNX file": openvino,
    "LiteRT": litert("network{batch}.tflite", "class_logits"),
}
WHOLE: dict[str, Callable[..., Run]] = {
    "Keras": keras_whole,
    "SavedModel": saved_whole,
    "ONNX Runtime": onnx("whole", "scores"),
    "LiteRT float32": litert("whole_float32.tflite", "scores"),
    "LiteRT float16": litert("whole_float16.tflite", "scores"),
    "LiteRT int8": litert("whole_int8.tflite", "scores"),
}
TABLES = {"network": NETWORK, "whole": WHOLE}


if __name__ == "__main__":
    main()
