"""On paper: what an update of the 5B moves between GPUs, by group, and when the network is what takes the time, up to 1,024 of them.

    python benchmarks/scaling.py

Bytes come from the tensors of the preset and FLOP from its step, both counted in the network itself; rates and efficiency are
assumptions, which stand in the output. Nothing here was measured.
"""

from collections.abc import Callable
from dataclasses import dataclass

from mvwan.config import Config
from mvwan.presets import config_from_preset
from mvwan.step_trace import StepTrace, trace
from mvwan.training_module import HeatmapWanTrainingModule

GPUS = (8, 64, 256, 1024)
GPUS_PER_NODE = 8
FLOP_PER_S = 989e12
"""Dense bfloat16 of an H100 SXM by NVIDIA's data sheet."""
EFFICIENCY = 0.4
LATENCY_S = 10e-6
"""Of a message between nodes."""
BUCKET_BYTES = 25 * 2**20
"""Gradients that DDP sends at once: torch's default."""
_GB = 1e9


@dataclass(frozen=True)
class Network:
    """Bytes per second that a GPU sends, and receives at the same time."""

    name: str
    within_node: float
    between_nodes: float

    def rate(self, gpus: int) -> float:
        """Of a ring over so many GPUs, whose slowest link decides."""
        return self.within_node if gpus <= GPUS_PER_NODE else min(self.within_node, self.between_nodes)


NETWORKS = (
    Network("NVLink 450 GB/s, InfiniBand 50 GB/s per GPU", 450e9, 50e9),
    Network("NVLink 450 GB/s, one 100 Gbit/s card per node", 450e9, 12.5e9 / GPUS_PER_NODE),
    Network("PCIe 25 GB/s, one 100 Gbit/s card per node", 25e9, 12.5e9 / GPUS_PER_NODE),
)


def ring_bytes(size: float, gpus: int) -> float:
    """What each GPU sends when `size` bytes are gathered from all, or reduced to each its share."""
    return size * (gpus - 1) / gpus


def ddp_bytes(step: StepTrace, micro_batches: int, gpus: int) -> float:
    """Gradients of what trains, reduced and gathered, once per update."""
    return 2 * ring_bytes(step.trained, gpus)


def zero2_bytes(step: StepTrace, micro_batches: int, gpus: int) -> float:
    """Gradients reduced to each its share after every micro-batch, updated weights gathered."""
    return ring_bytes(step.trained, gpus) * (micro_batches + 1)


def fsdp2_bytes(step: StepTrace, micro_batches: int, gpus: int) -> float:
    """All weights gathered for the forward and again for the backward pass of every micro-batch, gradients reduced to each its share."""
    return micro_batches * (2 * ring_bytes(step.frozen + step.trained, gpus) + ring_bytes(step.trained, gpus))


STRATEGIES: dict[str, Callable[[StepTrace, int, int], float]] = {"DDP": ddp_bytes, "ZeRO-2": zero2_bytes, "FSDP2": fsdp2_bytes}


def compute_s(step: StepTrace, config: Config) -> float:
    """Of an update on one GPU."""
    return step.flop * config.train.gradient_accumulation / (FLOP_PER_S * EFFICIENCY)


def network_s(sent: float, step: StepTrace, network: Network, gpus: int) -> float:
    """Of an update: bytes at the rate of the slowest link, and a message per bucket and halving of the ring."""
    messages = max(1, step.trained // BUCKET_BYTES) * 2 * (gpus - 1).bit_length()
    return sent / network.rate(gpus) + messages * LATENCY_S


def main() -> None:
    """Prints three tables as Markdown."""
    config = config_from_preset("wan2.2-ti2v-5b", {"unfreeze_modulation_and_norms": True})
    step = trace(config, "gpu")
    table = HeatmapWanTrainingModule(config=config, device="meta", print_banners=False).table
    micro_batches = config.train.gradient_accumulation
    windows = config.train.batch_size * micro_batches
    busy_s = compute_s(step, config)
    print(f"{step.flop / 1e12:.1f} TFLOP per window, {windows} windows per GPU and update; at {EFFICIENCY:.0%} of {FLOP_PER_S / 1e12:.0f}")
    print(f"TFLOP/s (both assumed) {busy_s:.2f} s of computing per update.\n")

    print("| group | trained parameters | DDP moves per GPU and update, GB, 8 GPUs | 1,024 GPUs |\n| --- | ---: | ---: | ---: |")
    for row in table.trainable_rows:
        sent = [2 * ring_bytes(4 * row.parameters, gpus) / _GB for gpus in (GPUS[0], GPUS[-1])]
        print(f"| {row.name} | {row.parameters:,} | {sent[0]:.3f} | {sent[1]:.3f} |")
    print()

    print(f"| strategy | {' | '.join(f'{gpus:,} GPUs, GB' for gpus in GPUS)} |\n| --- |{' ---: |' * len(GPUS)}")
    for name, moved in STRATEGIES.items():
        print(f"| {name} | {' | '.join(f'{moved(step, micro_batches, gpus) / _GB:.1f}' for gpus in GPUS)} |")
    print()

    heads = " | ".join(f"{gpus:,} GPUs" for gpus in GPUS)
    print(f"| strategy | network | {heads} |\n| --- | --- |{' ---: |' * len(GPUS)}")
    for name, moved in STRATEGIES.items():
        for network in NETWORKS:
            taken = [network_s(moved(step, micro_batches, gpus), step, network, gpus) for gpus in GPUS]
            cells = [f"{busy_s / max(busy_s, one):.0%} to {busy_s / (busy_s + one):.0%}" for one in taken]
            print(f"| {name} | {network.name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
