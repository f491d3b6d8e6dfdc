"""The proof of movement: what it passes, what it refuses, and checksums that see every bit."""

import json

import pytest
import torch
from rich.console import Console

from mvwan.config import TrainableConfig, TrainConfig
from mvwan.errors import MvwanError
from mvwan.model.movement import MovementProof, checksum, gradient_norms
from mvwan.model.multiview_wan import MultiViewWan
from mvwan.model.surgery import adapt
from mvwan.model.trainable import apply, optimizer_groups, parameters_by_name, resolve_groups
from mvwan.model.trainable_table import TrainableTable
from tests.stock import make_stock

GROUPS = resolve_groups(TrainableConfig(), True, TrainConfig(learning_rate=1e-3))


class Run:
    """A tiny bfloat16 model with everything that a step needs."""

    def __init__(self) -> None:
        self.model: MultiViewWan = adapt(make_stock(torch.bfloat16))[0]
        self.table: TrainableTable = apply(self.model, GROUPS, rank=4)
        self.optimizer = torch.optim.AdamW(optimizer_groups(self.model, GROUPS))
        self.proof = MovementProof(self.model, self.table)
        self.norms: dict[str, float] = {}

    def step(self, seed: int, learning_rate: float | None = None) -> None:
        generator = torch.Generator().manual_seed(seed)
        latents = torch.randn(1, 3, 96, 2, 4, 4, generator=generator)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            velocity = self.model(latents, torch.tensor([500.0]), torch.randn(1, 8, 32, generator=generator))
        (velocity - latents).square().mean().backward()
        self.norms = gradient_norms(self.model, self.table)
        for group in self.optimizer.param_groups:
            group["lr"] = group["lr"] if learning_rate is None else learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad()


def test_everything_before_the_projector_waits_a_step_and_then_all_groups_move() -> None:
    run = Run()
    run.proof.snapshot()
    run.step(1)
    assert run.norms["lora_mvs"] == run.norms["mvs_norms"] == 0
    assert run.norms["projector"] > 0
    assert run.norms["modulation"] > 0
    with pytest.raises(MvwanError, match=r"too early.*Set train\.movement_step to 2 or more"):
        run.proof.check(run.model, 1, run.norms)
    run.step(2)
    run.step(3)
    report = run.proof.check(run.model, 3, run.norms)
    rows = {row.group: row for row in report.rows}
    assert list(rows) == [row.name for row in run.table.trainable_rows]
    assert all(row.tensors_moved == row.tensors and row.gradient_norm > 0 for row in report.rows)
    assert rows["projector"].relative_change is None
    assert rows["projector"].change_from_zero is not None
    assert rows["projector"].change_from_zero > 0
    assert rows["modulation"].change_from_zero is None
    assert 0 < (rows["modulation"].relative_change or 0) < 0.5
    assert rows["lora"].relative_change is not None  # A
    assert rows["lora"].change_from_zero is not None  # B
    assert report.frozen_tensors == len(run.table.frozen_names)


def test_relative_change_is_the_norm_of_the_change_over_the_norm_at_the_start() -> None:
    run = Run()
    run.proof.snapshot()
    parameters = parameters_by_name(run.model)
    before = torch.cat([parameters[f"blocks.{n}.scale_shift_table"].detach().flatten().clone() for n in range(2)])
    run.step(1)
    run.step(2)
    after = torch.cat([parameters[f"blocks.{n}.scale_shift_table"].detach().flatten() for n in range(2)])
    row = next(row for row in run.proof.check(run.model, 2, run.norms).rows if row.group == "modulation")
    assert row.relative_change == pytest.approx(float((after - before).norm() / before.norm()), rel=1e-5)


def test_a_report_can_be_stored_and_shown() -> None:
    run = Run()
    run.proof.snapshot()
    for seed in (1, 2):
        run.step(seed)
    report = run.proof.check(run.model, 2, run.norms)
    record = json.loads(json.dumps(report.to_json()))
    assert record["steps"] == 2
    assert record["groups"][0]["group"] == "lora"
    console = Console(width=140)
    with console.capture() as capture:
        console.print(report.render())
    assert all(row.group in capture.get() for row in report.rows)
    assert "frozen tensors unchanged" in capture.get()


def test_a_group_that_stands_still_stops_the_run_with_its_name() -> None:
    run = Run()
    run.optimizer = torch.optim.AdamW([group for group in optimizer_groups(run.model, GROUPS) if group["group"] != "mvs_norms"])
    run.proof.snapshot()
    for seed in (1, 2, 3):
        run.step(seed)
    with pytest.raises(MvwanError, match="the group 'mvs_norms' trains but none of its 4 tensors moved in 3 steps; its gradient norm is"):
        run.proof.check(run.model, 3, run.norms)


def test_a_group_without_gradient_is_told_apart() -> None:
    run = Run()
    for block in run.model.blocks:  # type: ignore[union-attr]
        block.mvs_attn.norm_q.forward = torch.no_grad()(block.mvs_attn.norm_q.forward)
        block.mvs_attn.norm_k.forward = torch.no_grad()(block.mvs_attn.norm_k.forward)
    run.proof.snapshot()
    for seed in (1, 2, 3):
        run.step(seed)
    with pytest.raises(MvwanError, match=r"'mvs_norms' .* it gets no gradient"):
        run.proof.check(run.model, 3, run.norms)


def test_no_learning_rate_means_no_movement() -> None:
    run = Run()
    run.proof.snapshot()
    for seed in (1, 2):
        run.step(seed, learning_rate=0.0)
    with pytest.raises(MvwanError, match=r"the group 'lora' trains but none.*the group 'modulation' trains but none"):
        run.proof.check(run.model, 2, run.norms)


def test_a_frozen_tensor_that_moves_by_one_bit_stops_the_run_with_its_name() -> None:
    run = Run()
    run.proof.snapshot()
    for seed in (1, 2):
        run.step(seed)
    weight = parameters_by_name(run.model)["blocks.1.attn2.to_k.base_layer.weight"]
    weight.data.view(torch.int16)[3, 5] ^= 1
    with pytest.raises(MvwanError, match=r"frozen tensors moved: blocks\.1\.attn2\.to_k\.base_layer\.weight;"):
        run.proof.check(run.model, 2, run.norms)


def test_weight_decay_of_the_optimizer_on_frozen_tensors_is_seen() -> None:
    run = Run()
    run.proof.snapshot()
    frozen = parameters_by_name(run.model)["blocks.0.norm2.weight"]
    for seed in (1, 2):
        run.step(seed)
        frozen.data *= 1 - 1e-3
    with pytest.raises(MvwanError, match=r"frozen tensors moved: blocks\.0\.norm2\.weight"):
        run.proof.check(run.model, 2, run.norms)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int8])
def test_checksum_is_two_sums_of_words_in_exact_arithmetic(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    tensor = (100 * torch.randn(3, 1001, generator=generator)).to(dtype)
    whole = tensor.numel() - tensor.numel() % (8 // tensor.element_size())
    integer = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}[tensor.element_size()]
    bits = tensor.flatten().view(integer)
    words = [*bits[:whole].view(torch.int64).tolist(), *bits[whole:].tolist()]
    expected = sum(words) % 2**64, sum(word * (2 * place + 1) for place, word in enumerate(words)) % 2**64
    assert checksum(tensor) == expected


def test_checksum_works_in_chunks_and_wherever_the_tensor_lies() -> None:
    generator = torch.Generator().manual_seed(0)
    long = torch.randint(-(2**62), 2**62, (2**20 + 7,), generator=generator)  # more than one chunk
    words = long.tolist()
    assert checksum(long) == (sum(words) % 2**64, sum(word * (2 * place + 1) for place, word in enumerate(words)) % 2**64)
    row = torch.randn(1001, generator=generator)
    assert checksum(row[1:]) == checksum(row[1:].clone())  # begins inside a word
    assert checksum(row[:1000].view(20, 50).t()) == checksum(row[:1000].view(20, 50).t().contiguous())
    assert checksum(torch.zeros(0)) == (0, 0)
    assert checksum(torch.tensor(-0.0)) != checksum(torch.tensor(0.0))


def test_checksum_sees_an_exchange_of_values() -> None:
    tensor = torch.arange(64, dtype=torch.float32)
    exchanged = tensor.clone()
    exchanged[[4, 40]] = tensor[[40, 4]]
    assert checksum(exchanged) != checksum(tensor)
