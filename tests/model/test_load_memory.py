"""A base is in memory once while it comes: drawn, or read from shards in its own type or a narrower one."""

from pathlib import Path

import pytest
import torch

from mvwan.model.wan import WanTransformer3DModel, in_float32_island, load_transformer
from tests.load_memory import load_growth, write_base


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {dtype: write_base(folder / dtype, dtype) for dtype in ("float32", "bfloat16")}


@pytest.mark.parametrize(("stored", "held"), [("bfloat16", "bfloat16"), ("float32", "bfloat16"), ("float32", "float32")])
def test_shards_are_read_into_one_copy(bases: dict[str, Path], stored: str, held: str) -> None:
    assert len(list((bases[stored] / "transformer").glob("*.safetensors"))) > 3
    growth = load_growth(bases[stored], held)
    assert 0.9 < growth.copies < 1.25, growth


def test_drawn_weights_are_narrow_as_soon_as_they_are_drawn(bases: dict[str, Path]) -> None:
    growth = load_growth(bases["bfloat16"], "bfloat16", random_weights=True)
    assert 0.9 < growth.copies < 1.5, f"{growth}: a float32 model would be two"


def test_drawn_weights_are_those_of_a_float32_model_rounded() -> None:
    narrow, wide = (load_transformer("tiny", dtype, random_weights=True, seed=3) for dtype in (torch.bfloat16, torch.float32))
    expected = dict(wide.named_parameters())
    for name, parameter in narrow.named_parameters():
        assert parameter.dtype == (torch.float32 if in_float32_island(name) else torch.bfloat16), name
        assert torch.equal(parameter, expected[name].to(parameter.dtype)), name
    torch.manual_seed(3)
    config = {name: value for name, value in wide.config.items() if not name.startswith("_")}
    for drawn, parameter in zip(WanTransformer3DModel(**config).parameters(), wide.parameters(), strict=True):
        assert torch.equal(drawn, parameter)
