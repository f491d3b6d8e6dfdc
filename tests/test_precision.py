"""bfloat16 where the machine multiplies it fast, float32 elsewhere: decided once per run, remembered, and never by chance."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mvwan.config import config_from_dict, parse_overrides
from mvwan.errors import MvwanError
from mvwan.precision import has_fast_bfloat16, in_words, settle
from mvwan.presets import config_from_preset
from mvwan.sample import load_run
from tests.saved import BASE, save_run


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor without AVX-512."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")


@pytest.mark.parametrize(("capability", "fast"), [("AVX512", True), ("AVX2", False), ("DEFAULT", False)])
def test_a_processor_is_known_by_its_instructions(monkeypatch: pytest.MonkeyPatch, capability: str, fast: bool) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert has_fast_bfloat16("cpu") is fast
    config = settle(config_from_preset("tiny"), "cpu")
    assert (config.base.dtype, config.train.precision) == (("bfloat16", "bf16") if fast else ("float32", "no"))


def test_torch_says_what_the_processor_has() -> None:
    code = "from mvwan.precision import has_fast_bfloat16; print(has_fast_bfloat16('cpu'))"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "ATEN_CPU_CAPABILITY": "avx2"}, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"


def test_what_was_asked_for_stays_and_is_called_slow_where_it_is(slow: None) -> None:
    asked = config_from_dict({"base": {"dtype": "bfloat16"}, "train": {"precision": "bf16"}})
    assert settle(asked, "cpu") == asked
    assert "no instructions" in in_words(asked)
    assert in_words(settle(config_from_dict({}), "cpu")) == "products in float32"


def test_a_run_goes_on_as_it_was_on_another_machine(slow: None) -> None:
    saved = config_from_dict({"base": {"dtype": "bfloat16"}, "train": {"precision": "bf16"}})
    assert settle(config_from_dict({}), "cpu", saved.to_dict()) == saved


def test_no_is_what_yaml_reads_as_false() -> None:
    assert config_from_dict(parse_overrides(["train.precision=no"])).train.precision == "no"
    with pytest.raises(MvwanError, match=r"train\.precision=True: input should be 'auto', 'bf16' or 'no'\. Set train\.precision\."):
        config_from_dict(parse_overrides(["train.precision=yes"]))


def test_a_run_of_a_fast_machine_is_read_in_float32_on_a_slow_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    sections = {"base": {"source": str(BASE), "dtype": "bfloat16", "codec": "tiny"}, "train": {"precision": "bf16"}}
    save_run(tmp_path, **sections)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    as_trained = load_run(tmp_path)
    request.getfixturevalue("slow")
    here = load_run(tmp_path)
    assert as_trained.model.compute_dtype == torch.bfloat16
    assert as_trained.config.train.precision == "bf16"
    assert here.model.compute_dtype == torch.float32
    assert (here.config.base.dtype, here.config.train.precision) == ("float32", "no")
    for (name, trained), same in zip(as_trained.model.named_parameters(), here.model.parameters(), strict=True):
        assert same.dtype == torch.float32, name
        assert torch.equal(trained.float(), same), name
