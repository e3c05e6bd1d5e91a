"""A model on paper of training on many GPUs: exchange time and images per second. docs/scaling.md says what it assumes.

    python -m benchmarks.scaling                                        # the tables of docs/scaling.md
    python -m benchmarks.scaling --fit 4:1.2 15520268:25 --step 1500    # bytes:ms of two exchanges, ms of a lone step

The second form takes a link's latency and bandwidth from two measured exchanges of two ranks and predicts the step of
two ranks, to hold the model against a measured one.
"""

import argparse
import dataclasses
import itertools
from collections.abc import Sequence

GRADIENT = 3_880_067  # numbers, EfficientDet-D0
STATISTICS = 47_136  # of BatchNorm, float32 whatever the compression
EXTRA_BYTES = 4 * (STATISTICS + 4)  # with the four losses
NODE = 8  # GPUs
CYCLE = 1e-3  # seconds, HOROVOD_CYCLE_TIME: how long a tensor may wait until Horovod looks
WAYS = {  # name -> bytes a number, collectives a step that follow each other: the number of positive anchors is one
    "float32, ring": (4, 2),
    "16 bits, ring": (2, 2),
    "16 bits, all-to-all": (2, 3),
}
COUNTS = (1, 8, 64, 512)  # GPUs


@dataclasses.dataclass(frozen=True)
class Link:
    """What connects a GPU to its node, or a node to the others."""

    bandwidth: float  # bytes a second each way, as achieved
    latency: float  # seconds a message


# Bandwidth: what the maker states times the share of it that is assumed to be achieved.
NVLINK = Link(0.8 * 300e9, 5e-6)  # NVLink 3 of an A100: 600 GB/s, both ways together
NETWORKS = {  # all that a node has
    "NVLink between nodes, too": Link(8 * NVLINK.bandwidth, NVLINK.latency),
    "InfiniBand, 8 HDR ports a node": Link(0.8 * 8 * 25e9, 5e-6),  # 200 Gbit/s each, a port a GPU
    "InfiniBand, 1 HDR port a node": Link(0.8 * 25e9, 5e-6),
    "25 GbE, 1 port a node": Link(0.8 * 3.125e9, 30e-6),  # TCP
}
RECIPES = {  # published for one A100-80G: images a GPU and step, images a second
    "AMP": (200, 397.0),
    "TF32": (104, 162.0),
    "AMP, 16 images a GPU": (16, 397.0),  # where the exchange would be seen first
}


def ring(members: int, size: float, link: Link) -> float:
    """Seconds of a ring allreduce of `size` bytes: 2(n-1) messages of size/n, one after the other."""
    return 2 * (members - 1) * (size / members / link.bandwidth + link.latency)


def exchange(gpus: int, size: float, inside: Link, between: Link) -> float:
    """Seconds to reduce `size` bytes over all GPUs, in whole nodes of NODE or in a part of one.

    Each node's GPUs reduce and scatter over `inside`, rings between the nodes reduce the parts, which share what the
    node has of `between`, and the GPUs gather: as NCCL's rings and Horovod's hierarchical allreduce do.
    """
    if gpus <= NODE:
        return ring(gpus, size, inside)
    if gpus % NODE:
        raise ValueError(f"{gpus} GPUs: expected whole nodes of {NODE}")
    return ring(NODE, size, inside) + ring(gpus // NODE, size, between)


def all_to_all(gpus: int, size: float, inside: Link, between: Link) -> float:
    """Seconds of compression bf16: each GPU sums a part that all others send it, and gives it to all.

    All that a GPU sends to those of other nodes leaves the node, while a ring's parts are reduced in it before.
    """
    gather = exchange(gpus, size, inside, between) / 2  # a ring's second half
    near = min(gpus, NODE)
    seconds = (near - 1) / gpus * size / inside.bandwidth + inside.latency  # the messages are in flight together
    if gpus > NODE:
        seconds += NODE * (gpus - NODE) / gpus * size / between.bandwidth + between.latency
    return seconds + gather


def step(gpus: int, compute: float, way: str, inside: Link, between: Link) -> tuple[float, float]:
    """Seconds of the exchange and of the step: nothing overlaps, the gradient is reduced when it is whole."""
    if gpus == 1:
        return 0.0, compute
    bytes_a_number, collectives = WAYS[way]
    size = bytes_a_number * GRADIENT
    seconds = collectives * CYCLE + exchange(gpus, 8, inside, between)
    if way == "16 bits, all-to-all":
        seconds += all_to_all(gpus, size, inside, between) + exchange(gpus, EXTRA_BYTES, inside, between)
    else:
        seconds += exchange(gpus, size + EXTRA_BYTES, inside, between)
    return seconds, compute + seconds


def fit(sizes: Sequence[float], seconds: Sequence[float]) -> tuple[float, float]:
    """What an exchange costs at any size, and bytes a second, of two measured exchanges of two ranks.

    A ring of two sends size bytes a rank: seconds = overhead + size / bandwidth.
    """
    bandwidth = (sizes[1] - sizes[0]) / (seconds[1] - seconds[0])
    return seconds[0] - sizes[0] / bandwidth, bandwidth


def main() -> None:
    """Reads the command line and prints tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fit", nargs=2, metavar="BYTES:MS", help="two measured exchanges of two ranks")
    parser.add_argument("--step", type=float, metavar="MS", help="of one rank that is alone")
    arguments = parser.parse_args()
    if arguments.fit and arguments.step:
        print_check([pair.split(":") for pair in arguments.fit], arguments.step / 1e3)
    else:
        print_exchange()
        print_throughput()


def print_check(pairs: Sequence[Sequence[str]], compute: float) -> None:
    """The step of two ranks, from exchanges and from the step of one alone."""
    overhead, bandwidth = fit([float(size) for size, _ in pairs], [float(ms) / 1e3 for _, ms in pairs])
    # The overhead holds the wait for Horovod's cycle and the messages' latency; each collective has it.
    seconds = WAYS["float32, ring"][1] * overhead + (4 * GRADIENT + EXTRA_BYTES) / bandwidth
    print(f"overhead {overhead * 1e3:.2f} ms, bandwidth {bandwidth / 1e9:.2f} GB/s")
    print(f"predicted: exchange {seconds * 1e3:.1f} ms, step of two ranks {(compute + seconds) * 1e3:,.0f} ms")


def print_exchange() -> None:
    """Milliseconds of a step's exchange."""
    print(f"| network | sent as | {' | '.join(f'{count} GPUs' for count in COUNTS[1:])} |")
    print("| --- | --- | ---: | ---: | ---: |")
    for (network, between), way in itertools.product(NETWORKS.items(), WAYS):
        times = [step(count, 0.0, way, NVLINK, between)[0] * 1e3 for count in COUNTS[1:]]
        print(f"| {network} | {way} | {' | '.join(f'{time:.1f}' for time in times)} |")


def print_throughput() -> None:
    """Images a second with a float32 exchange, and the share of as many single GPUs."""
    print(f"\n| recipe | network | 1 GPU | {' | '.join(f'{count} GPUs' for count in COUNTS[1:])} |")
    print(f"| --- | --- |{' ---: |' * len(COUNTS)}")
    for (recipe, (images, rate)), (network, between) in itertools.product(RECIPES.items(), NETWORKS.items()):
        cells = []
        for count in COUNTS:
            _, seconds = step(count, images / rate, "float32, ring", NVLINK, between)
            cells.append(f"{count * images / seconds:,.0f} ({images / rate / seconds:.3f})")
        print(f"| {recipe} | {network} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
