"""A plan says what the real network takes: its counts against real runs, its arithmetic by hand, and its words as users meet them."""

import dataclasses
import json
import shlex
from pathlib import Path

import pytest
import torch
from click.testing import Result
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from mvwan import cli, cli_plan, step_trace
from mvwan.config import Config, config_from_dict, parse_overrides
from mvwan.devices import COMMON, DEVICES, read_machine
from mvwan.errors import MvwanError
from mvwan.model.surgery import share_copies
from mvwan.plan import GB, Memory, Strategy, Trial, make_plan, memory_of
from mvwan.presets import config_from_preset
from mvwan.step_trace import Measurement, StepTrace, Unit, trace
from mvwan.training_module import HeatmapWanTrainingModule

torch.set_num_threads(1)  # sizes are tiny: waking threads costs more than they do

BASE = str(Path(__file__).parent / "golden" / "base.safetensors")
SMALL = ["base.source=" + BASE, "trainable.lora.rank=4", "data.num_frames=5", "data.height_px=64", "data.width_px=64"]
SMALL += ["data.text_tokens=8", "train.steps=100", "train.gradient_accumulation=2"]
STEP = StepTrace(
    frozen=1020, shared=20, trained=100, optimizer=200, batches=10, kept=50, peak_gradients=100, peak_others=80, update=30, flop=10**12,
    block=Unit(frozen=90, trained=9), rest=Unit(frozen=100, trained=10), window_bytes=1, instruction_bytes=1,
)  # fmt: skip


def small(*settings: str) -> Config:
    return config_from_dict(parse_overrides([*SMALL, *settings]))


def run(*arguments: str) -> Result:
    words = [word for setting in SMALL for word in ("--set", setting)]
    return CliRunner().invoke(cli.app, ["plan", "--preset", "debug", *words, *arguments])


# ── devices ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_devices_are_read_from_words() -> None:
    assert read_machine("8 x h100-80gb") == read_machine("8x H100-80GB")
    assert read_machine("8 x h100-80gb").name == "8 x h100-80gb"
    own = read_machine("2 x mygpu:48GB:200.5TFLOPS")
    assert (own.count, own.device.name, own.device.memory_gb, own.device.tflops) == (2, "mygpu", 48, 200.5)
    assert all(read_machine(words).device.name in DEVICES for words in COMMON)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("h100", "Did you mean 'h100-80gb'?"),
        ("0 x l40s", "at least 1"),
        ("mygpu:48GB", "NAME:48GB:200TFLOPS"),
        ("mygpu:0GB:200TFLOPS", "more than 0"),
    ],
)
def test_other_words_are_one_sentence(words: str, said: str) -> None:
    with pytest.raises(MvwanError) as caught:
        read_machine(words)
    assert repr(words) in str(caught.value)
    assert said in str(caught.value)


# ── what a step takes ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("checkpointing", ["false", "true"])
def test_operations_are_those_that_torch_counts_in_a_real_step(checkpointing: str) -> None:
    config = step_trace.settled_for(small(f"model.gradient_checkpointing={checkpointing}"), "cpu")
    counted = trace(config, "cpu")
    module = HeatmapWanTrainingModule(config=config, print_banners=False)
    with FlopCounterMode(display=False) as counter:
        step_trace._loss(module, step_trace._batch(module), "cpu").backward()
    assert counted.flop == counter.get_total_flops()
    assert counted.trained == 4 * module.table.trainable_parameters
    assert counted.optimizer == 2 * counted.trained
    assert counted.frozen + counted.trained == sum(parameter.nbytes for parameter in module.parameters())
    assert counted.shared == share_copies(module.model)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_bytes_are_those_of_a_real_step(accumulation: int) -> None:
    """The same counter in a step with numbers: what tensors without numbers leave out would show."""
    config = step_trace.settled_for(small(f"train.gradient_accumulation={accumulation}"), "cpu")
    counted = trace(config, "cpu")
    module = HeatmapWanTrainingModule(config=config, print_banners=False)
    batch = step_trace._batch(module)
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if accumulation > 1:
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
    held = [value for value in vars(batch).values() if isinstance(value, torch.Tensor)]
    held += [parameter.grad for parameter in trained if parameter.grad is not None]
    with step_trace._LiveBytes([*module.parameters(), *module.buffers(), *held]) as live:
        loss = step_trace._loss(module, batch, "cpu")
        kept = live.now
        loss.backward()
    before = counted.trained if accumulation > 1 else 0
    assert counted.kept == pytest.approx(kept, rel=0.01)
    assert counted.peak_gradients + counted.peak_others - before == pytest.approx(live.peak, rel=0.01)


def test_a_gpu_keeps_no_attention_weights_and_checkpointing_trades_bytes_for_operations() -> None:
    whole = {"base.dtype": "float32", "train.precision": "no"}  # so that only the attention differs
    config = small(*(f"{name}={value}" for name, value in whole.items()), "train.gradient_accumulation=1")
    processor, gpu = trace(config, "cpu"), trace(config, "gpu")
    assert gpu.kept < processor.kept
    assert (gpu.frozen, gpu.trained) == (processor.frozen, processor.trained)
    again = trace(dataclasses.replace(config, model=dataclasses.replace(config.model, gradient_checkpointing=True)), "gpu")
    assert again.kept < gpu.kept / 2
    assert 1.1 * gpu.flop < again.flop < 1.6 * gpu.flop


def test_a_step_is_predicted_within_15_percent_of_what_it_takes() -> None:
    trial = make_plan(config_from_preset("tiny", {"train": {"batch_size": 4}}), (), measured=True).trial
    assert trial is not None
    assert trial.memory.total == pytest.approx(trial.measured.peak_bytes, rel=0.15)
    assert trial.measured.step_s > 0
    assert 0 < trial.efficiency < 2


def test_steps_that_do_not_fit_this_machine_are_not_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mvwan.plan.available_bytes", lambda: 1e3)
    with pytest.raises(MvwanError, match="--measure"):
        make_plan(small(), (), measured=True)


# ── how strategies spread it ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_one_process_holds_everything() -> None:
    memory = memory_of(STEP, "one process", 1, has_average=False)
    assert memory == Memory(frozen=1000, trained=100, gradients=100, optimizer=200, activations=60, transient=30)
    assert memory.total == 1490
    assert memory_of(STEP, "one process", 1, has_average=True).total == 1590
    last = memory_of(dataclasses.replace(STEP, update=500), "one process", 1, has_average=False)
    assert (last.activations, last.transient) == (10, 500), "the update is the peak then"


def test_strategies_spread_what_docs_say() -> None:
    names: tuple[Strategy, ...] = ("DDP", "DeepSpeed ZeRO-1", "DeepSpeed ZeRO-2", "FSDP2")
    ddp, zero1, zero2, fsdp2 = (memory_of(STEP, name, 10, has_average=False) for name in names)
    assert ddp.gradients == 200, "DDP's buckets are a second copy"
    assert (zero1.frozen, zero1.trained, zero1.optimizer) == pytest.approx((1000, 110, 20))
    assert (zero1.gradients, zero2.gradients) == pytest.approx((100, 10))
    assert (fsdp2.frozen, fsdp2.trained, fsdp2.gradients, fsdp2.optimizer) == pytest.approx((102, 10, 10, 20))
    assert fsdp2.activations == ddp.activations
    assert fsdp2.transient == 30 + 3 * 99 + 110 + 18


@pytest.fixture
def step_of_one_terabyte(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every trace is `STEP` in GB; with checkpointing 40 GB less is kept and a third more is computed."""

    def counted(config: Config, target: str) -> StepTrace:
        names = ("frozen", "shared", "trained", "optimizer", "batches", "kept", "peak_gradients", "peak_others", "update")
        sizes = {name: int(getattr(STEP, name) * GB) for name in names}
        if config.model.gradient_checkpointing:
            sizes |= {"kept": int(10 * GB), "peak_others": int(40 * GB)}
        block, rest = (Unit(frozen=int(unit.frozen * GB), trained=int(unit.trained * GB)) for unit in (STEP.block, STEP.rest))
        flop = STEP.flop * 4 // 3 if config.model.gradient_checkpointing else STEP.flop
        return dataclasses.replace(STEP, **sizes, block=block, rest=rest, flop=flop)

    monkeypatch.setattr("mvwan.plan.trace", counted)


@pytest.mark.usefixtures("step_of_one_terabyte")
def test_the_first_option_that_fits_is_advised() -> None:
    names = ("big:1500GB:100TFLOPS", "less:1470GB:100TFLOPS", "10 x less:1470GB:100TFLOPS", "10 x little:700GB:100TFLOPS")
    plans = make_plan(small(), [read_machine(words) for words in names], ["--preset", "debug"]).machines
    advised = [plan.advised for plan in plans]
    assert [(option.strategy, option.gradient_checkpointing) for option in advised if option is not None] == [
        ("one process", False),
        ("one process", True),
        ("DeepSpeed ZeRO-1", False),
        ("FSDP2", False),
    ]
    assert all(
        option.fits == (option.memory.total / GB + 0.6 <= plan.machine.device.memory_gb) for plan in plans for option in plan.options
    )
    assert [len(plan.options) for plan in plans] == [3, 3, 9, 9]
    once, again, narrow = plans[0].options
    assert (narrow.quantize, once.quantize) == ("nf4", "none"), "what rounds the base is tried last"
    assert "--set base.quantize=nf4" in narrow.command
    assert once.step_s == pytest.approx(2 * 1e12 / (100e12 * 0.4))
    assert again.step_s == pytest.approx(4 / 3 * once.step_s)
    assert "--set model.gradient_checkpointing=true" in again.command
    assert "gradient_checkpointing" not in once.command, "it is off already"
    words = shlex.split(plans[3].options[-2].command)
    assert words[:5] == ["accelerate", "launch", "--use_fsdp", "--fsdp_version", "2"]
    assert words[words.index("-m") :][:5] == ["-m", "mvwan", "train", "--preset", "debug"]


@pytest.mark.usefixtures("step_of_one_terabyte")
def test_what_fits_nowhere_gets_a_remedy() -> None:
    small_group, hopeless = make_plan(small(), [read_machine(words) for words in ("a:700GB:1TFLOPS", "b:60GB:1TFLOPS")]).machines
    assert small_group.advised is None
    assert "x a with FSDP2" in small_group.remedy
    assert hopeless.advised is None
    assert "data.num_frames" in hopeless.remedy


@pytest.mark.usefixtures("step_of_one_terabyte")
def test_what_cannot_be_cut_apart_is_offered_to_no_strategy_that_cuts() -> None:
    machine = read_machine("10 x big:2000GB:100TFLOPS")
    for setting in ("base.quantize=int8", "train.optimizer=adafactor"):
        (plan,) = make_plan(small(setting), [machine]).machines
        assert {option.strategy for option in plan.options} == {"DDP"}
    (compiled,) = make_plan(small("train.compile=true"), [machine]).machines
    assert compiled.options[-1].quantize == "int8", "torch.compile cannot read 4-bit weights"
    (hopeless,) = make_plan(small("base.quantize=int8"), [read_machine("b:60GB:1TFLOPS")]).machines
    assert "Set base.quantize=none" in hopeless.remedy


# ── the verb ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_json_is_all_there_is_on_stdout() -> None:
    done = run("--device", "2 x mygpu:4GB:10TFLOPS", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    (machine,) = found["machines"]
    assert (machine["name"], machine["count"], len(machine["options"])) == ("mygpu", 2, 9)
    for option in machine["options"]:
        assert option["peak"] == pytest.approx(sum(option["memory"].values()))
    assert machine["advised"].startswith("accelerate launch --multi_gpu --num_processes 2 ")
    assert found["trial"] is None
    config = config_from_preset("debug", parse_overrides(SMALL))
    module = HeatmapWanTrainingModule(config=config, device="meta", print_banners=False)
    assert found["checkpoint_bytes"] == 3 * 4 * module.table.trainable_parameters


def test_tables_say_what_is_assumed() -> None:
    done = run("--device", "mygpu:4GB:10TFLOPS", "--device", "none:0.1GB:10TFLOPS")
    assert done.exit_code == 0, done.output
    assert "mvwan train --preset debug" in done.stdout
    assert "Nothing fits" in done.stdout
    assert "Efficiency 0.4 of the rate that the maker states is given, not measured." in done.stdout


def test_a_trial_says_what_is_predicted_measured_and_assumed(capsys: pytest.CaptureFixture[str]) -> None:
    memory = Memory(frozen=40e6, trained=10e6, gradients=10e6, optimizer=20e6, activations=15e6, transient=5e6)
    measured = Measurement(peak_bytes=125_000_000, step_s=4.0, product_flop_per_s=20e9, threads=1)
    cli_plan._show_trial(Trial(memory=memory, step_s=5.0, measured=measured, efficiency=0.5), 0.4)
    printed = " ".join(capsys.readouterr().out.split())
    for said in ("100 │ 125 │ 0.80", "5.00 │ 4.00 │ 1.25", "20.0 GFLOP/s here (measured)", "0.4 is assumed", "came to 0.50"):
        assert said in printed


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(("--device", "h1000"), "h1000"), (("--efficiency", "40"), "--efficiency 40"), (("--set", "train.stepz=1"), "stepz")],
)
def test_mistakes_are_one_sentence(arguments: tuple[str, ...], said: str) -> None:
    done = run(*arguments)
    assert done.exit_code == 2
    assert said in done.stderr.splitlines()[-1]
    assert done.stderr.splitlines()[-1].startswith("error: ")
