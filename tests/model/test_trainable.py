"""The table of groups: exact counts at true size, rules and their errors, optimizer groups, verification, numerics."""

import json

import pytest
import torch
from rich.console import Console

from mvwan.config import GroupConfig, LoraConfig, TrainableConfig, TrainConfig
from mvwan.errors import MvwanError
from mvwan.model.multiview_wan import MultiViewWan
from mvwan.model.surgery import adapt, trainable_table
from mvwan.model.trainable import apply, optimizer_groups, parameters_by_name, resolve_groups, verify_trainable
from mvwan.model.trainable_table import TrainableTable, compare
from mvwan.model.wan import load_transformer
from tests.stock import make_stock


def make_model(fusion: str = "channel", dtype: torch.dtype = torch.float32) -> MultiViewWan:
    model, _ = adapt(make_stock(dtype), views=3, fusion=fusion)  # type: ignore[arg-type]
    return model


def run(model: MultiViewWan) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(1, 3, 96, 2, 4, 4, generator=generator)
    return model(latents, torch.tensor([500.0]), torch.randn(1, 8, 32, generator=generator))


def settings(**groups: GroupConfig) -> TrainableConfig:
    return TrainableConfig(groups=groups)


def table_5b(switch: bool) -> TrainableTable:
    model, _ = adapt(load_transformer("wan2.2-ti2v-5b", torch.bfloat16, "meta"), views=3, fusion="channel")
    return apply(model, resolve_groups(TrainableConfig(), switch), rank=32)


@pytest.fixture(scope="module")
def off() -> TrainableTable:
    return table_5b(False)


@pytest.fixture(scope="module")
def on() -> TrainableTable:
    return table_5b(True)


COUNTS_5B = {
    "lora": (80_609_280, 600),
    "lora_mvs": (23_592_960, 240),
    "patch_embedding": (1_182_720, 2),
    "heads": (1_192_320, 6),
    "projector": (283_207_680, 60),
    "modulation_mvs": (276_480, 30),
    "modulation": (552_960, 30),
    "mvs_norms": (184_320, 60),
}


def test_5b_counts_to_the_digit(off: TrainableTable, on: TrainableTable) -> None:
    for table in (off, on):
        counts = {row.name: (row.parameters, row.tensors) for row in table.rows}
        assert {name: counts[name] for name in COUNTS_5B} == COUNTS_5B
        assert {row.dtype for row in table.trainable_rows} == {"float32"}
    assert (off.trainable_parameters, off.trainable_tensors) == (390_061_440, 938)
    assert (on.trainable_parameters, on.trainable_tensors) == (390_798_720, 1_028)
    assert set(on.trainable_names) - set(off.trainable_names) == {*names(on, "modulation"), *names(on, "mvs_norms")}
    assert f"{on.total_parameters / 1e9:.2f} B" == "6.52 B"
    assert on.total_parameters == off.total_parameters


@pytest.mark.parametrize(("head", "parameters"), [("gripper", 207_300), ("gripper_rotation", 263_460)])
def test_an_action_head_is_one_more_group(off: TrainableTable, head: str, parameters: int) -> None:
    table = trainable_table("wan2.2-ti2v-5b", action_head=head)  # type: ignore[arg-type]
    row = table.row("action_head")
    assert row is not None and off.row("action_head") is None
    assert (row.mode, row.parameters, row.tensors, row.dtype) == ("full", parameters, 8, "float32")
    assert tuple(other for other in table.rows if other is not row) == off.rows
    assert (table.trainable_parameters, table.trainable_tensors) == (390_061_440 + parameters, 946)
    assert f"| action_head | full | {parameters:,} | 8 |" in table.to_markdown()


def names(table: TrainableTable, group: str) -> tuple[str, ...]:
    row = table.row(group)
    assert row is not None
    return row.names


def test_5b_shares_of_lora(on: TrainableTable) -> None:
    rows = {line.split(" | ")[0].strip("| "): line for line in on.to_markdown().splitlines()}
    shares = {"lora": "100.00 %", "lora_mvs": "29.27 %", "patch_embedding": "1.47 %", "heads": "1.48 %", "projector": "351.33 %"}
    shares |= {"modulation_mvs": "0.34 %", "modulation": "0.69 %", "mvs_norms": "0.23 %"}
    assert all(f"| {share} |" in rows[name] for name, share in shares.items())


def test_json_is_the_agreed_record(on: TrainableTable) -> None:
    record = json.loads(json.dumps(on.to_json("wan2.2-ti2v-5b", 3, "channel")))
    assert list(record) == ["base", "views", "fusion", "groups", "trainable_parameters", "total_parameters"]
    assert record["groups"][0] == {
        "name": "lora",
        "mode": "lora",
        "trainable": True,
        "parameters": 80_609_280,
        "tensors": 600,
        "dtype": "float32",
        "optimizer_bytes": 644_874_240,
    }
    assert record["groups"][-1]["name"] == "all"
    assert record["groups"][-1]["optimizer_bytes"] == 0
    assert sum(group["parameters"] for group in record["groups"]) == record["total_parameters"]


def test_comparison_shows_what_the_switch_adds(off: TrainableTable, on: TrainableTable) -> None:
    difference = compare(off, on).to_json("wan2.2-ti2v-5b", 3, "channel")["difference"]
    assert (difference["trainable_parameters"], difference["trainable_tensors"]) == (737_280, 90)
    assert {name: count for name, count in difference["groups"].items() if count} == {"modulation": 552_960, "mvs_norms": 184_320}
    assert difference["optimizer_bytes"] == 737_280 * 8
    markdown = compare(off, on).to_markdown()
    assert "| modulation | 0 | 552,960 | +552,960 | +30 | 0.69 % | +4.22 MiB |" in markdown
    assert "| **trainable** | **390,061,440** | **390,798,720** | **+737,280** | **+90** | **0.91 %** | **+5.62 MiB** |" in markdown
    assert "| modulation | 552,960 | 0 | -552,960 | -30 |" in compare(on, off).to_markdown()


def test_terminal_tables_show_every_group_and_the_totals(off: TrainableTable, on: TrainableTable) -> None:
    console = Console(width=140)
    with console.capture() as capture:
        console.print(on.render())
        console.print(compare(off, on).render())
    text = capture.get()
    assert all(row.name in text for row in on.rows)
    assert "390,798,720" in text
    assert "+737,280" in text


@pytest.mark.parametrize("fusion", ["channel", "view"])
def test_every_parameter_is_in_one_row_and_trains_as_the_row_says(fusion: str) -> None:
    model = make_model(fusion)
    table = apply(model, resolve_groups(TrainableConfig(), True), rank=4)
    listed = [name for row in table.rows for name in row.names]
    parameters = parameters_by_name(model)
    assert sorted(listed) == sorted(parameters)
    assert all(parameters[name].requires_grad == row.trainable for row in table.rows for name in row.names)
    assert {row.name for row in table.rows if not row.trainable} == {"backbone_norms", "biases", "text_embedding", "time_embedding", "all"}
    assert len(names(table, "patch_embedding")) == (2 if fusion == "channel" else 4)


def test_lora_flags_choose_the_adapted_layers() -> None:
    def adapted(**flags: bool) -> set[str]:
        model = make_model()
        apply(model, resolve_groups(TrainableConfig(lora=LoraConfig(**flags))), rank=4)
        return {name.split(".")[2] for name in parameters_by_name(model) if "lora_A" in name}

    assert adapted() == {"attn1", "attn2", "ffn", "mvs_attn"}
    assert adapted(self_attention=False) == {"attn2", "ffn", "mvs_attn"}
    assert adapted(cross_attention=False, ffn=False) == {"attn1", "mvs_attn"}
    assert adapted(view_attention=False) == {"attn1", "attn2", "ffn"}
    assert adapted(self_attention=False, cross_attention=False, ffn=False, view_attention=False) == set()


def test_first_match_wins_for_a_group_of_the_user() -> None:
    model = make_model()
    frozen_first = settings(first_block=GroupConfig(pattern=r"blocks\.0\..*", mode="frozen"))
    table = apply(model, resolve_groups(frozen_first, True), rank=4)
    assert table.rows[0].name == "first_block"
    assert not any(name.startswith("blocks.0.") for name in table.trainable_names)
    assert any("blocks.1.attn1.to_q.lora_A" in name for name in table.trainable_names)


def test_lora_on_another_group_leaves_the_weights_frozen() -> None:
    model = make_model()
    table = apply(model, resolve_groups(settings(text_embedding=GroupConfig(mode="lora"))), rank=4)
    adapters = names(table, "text_embedding")
    assert len(adapters) == 4
    assert all(".lora_" in name for name in adapters)
    parameters = parameters_by_name(model)
    assert parameters["condition_embedder.text_embedder.linear_1.lora_A.default.weight"].shape[0] == 4
    assert not parameters["condition_embedder.text_embedder.linear_1.base_layer.weight"].requires_grad
    assert "condition_embedder.text_embedder.linear_1.base_layer.weight" in names(table, "all")


def test_full_fine_tuning_and_lora_on_all_leave_no_parameter_out() -> None:
    whole = settings(
        **{name: GroupConfig(mode="full") for name in ("lora", "lora_mvs", "biases", "backbone_norms", "text_embedding", "time_embedding")}
    )
    model = make_model()
    table = apply(model, resolve_groups(whole, True), rank=4)
    assert table.trainable_parameters == table.total_parameters == sum(parameter.numel() for parameter in model.parameters())
    model = make_model()
    adapt_the_rest = TrainableConfig(
        lora=LoraConfig(ffn=False), groups={"all": GroupConfig(mode="lora"), "projector": GroupConfig(mode="lora")}
    )
    table = apply(model, resolve_groups(adapt_the_rest), rank=4)
    assert all(".ffn." in name and ".lora_" in name for name in names(table, "all"))
    assert "blocks.0.projector.base_layer.weight" in names(table, "rest")
    assert table.total_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert not table.trains("rest")


@pytest.mark.parametrize(
    ("trainable", "switch", "said"),
    [
        (settings(modulatoin=GroupConfig(mode="full")), False, "trainable.groups.modulatoin: no such group. Did you mean 'modulation'?"),
        (settings(projector=GroupConfig(pattern=".*", mode="full")), False, "'projector' is a built-in group with its own pattern"),
        (settings(mine=GroupConfig(pattern=".*")), False, "Set trainable.groups.mine.mode"),
        (settings(mine=GroupConfig(pattern="blocks.(", mode="full")), False, "not a regular expression"),
        (settings(rest=GroupConfig(pattern=".*", mode="full")), False, "Choose another name"),
        (settings(modulation=GroupConfig(mode="frozen")), True, "trainable.groups.modulation.mode=frozen says otherwise"),
        (settings(mvs_norms=GroupConfig(mode="lora")), True, "trains the group 'mvs_norms' whole"),
        (settings(projector=GroupConfig(learning_rate=0.0)), False, "trainable.groups.projector.learning_rate=0.0: must be more than 0"),
        (settings(projector=GroupConfig(warmup_steps=-1)), False, "trainable.groups.projector.warmup_steps=-1: must be at least 0"),
        (settings(biases=GroupConfig(learning_rate=1e-3)), False, "the group is frozen, so nothing reads it"),
        (settings(action_head=GroupConfig(learning_rate=1e-3)), False, "action_head: model.action_head=none has no such layers"),
        (
            TrainableConfig(lora=LoraConfig(view_attention=False), groups={"lora_mvs": GroupConfig(learning_rate=1e-3)}),
            False,
            "trainable.groups.lora_mvs: trainable.lora leaves this group no layer",
        ),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(trainable: TrainableConfig, switch: bool, said: str) -> None:
    with pytest.raises(MvwanError) as caught:
        resolve_groups(trainable, switch)
    assert said in str(caught.value)


FROZEN = {name: GroupConfig(mode="frozen") for name in ("lora", "lora_mvs", "patch_embedding", "heads", "projector", "modulation_mvs")}


@pytest.mark.parametrize(
    ("trainable", "said"),
    [
        (
            settings(mine=GroupConfig(pattern=r"block\.\d+\.projektor\.weight", mode="full")),
            r"matches no parameter of the model. Nearest is 'blocks.0.projector.weight' of the group 'projector'",
        ),
        (settings(mine=GroupConfig(pattern="projector", mode="full")), "It must match the whole name: '.*(projector).*' would match"),
        (
            settings(mine=GroupConfig(pattern=r".*\.norm_[qk]\.weight", mode="full")),
            "group 'mvs_norms' (mode frozen) is left with nothing: all 4 parameters that it matches are taken by 'mine' before it",
        ),
        (
            settings(mine=GroupConfig(pattern=r".*\.norm_[qk]\.weight", mode="full")),
            "Narrow the pattern of 'mine', or remove it and set trainable.groups.mvs_norms.",
        ),
        (
            settings(
                mine=GroupConfig(pattern=r".*\.to_[qkv]\.weight", mode="lora"), more=GroupConfig(pattern=r".*attn1\.to_q.*", mode="lora")
            ),
            "trainable.groups.more.pattern='.*attn1\\\\.to_q.*' is left with nothing: all 2 parameters that it matches are taken by 'mine'",
        ),
        (
            settings(modulation=GroupConfig(mode="lora")),
            "group 'modulation' (mode lora) holds no weight of a linear layer, which LoRA needs",
        ),
        (settings(all=GroupConfig(mode="lora")), "Set the mode of 'time_embedding' and 'text_embedding' and 'lora'"),
        (settings(**FROZEN), "every group is frozen"),
    ],
)
def test_groups_that_take_nothing_are_refused_and_the_model_is_left_alone(trainable: TrainableConfig, said: str) -> None:
    model = make_model()
    before = {name: (parameter.requires_grad, parameter.data_ptr()) for name, parameter in model.named_parameters()}
    with pytest.raises(MvwanError) as caught:
        apply(model, resolve_groups(trainable), rank=4)
    assert said in str(caught.value)
    assert {name: (parameter.requires_grad, parameter.data_ptr()) for name, parameter in model.named_parameters()} == before


def test_group_overrides_can_replace_the_switch() -> None:
    by_groups = settings(modulation=GroupConfig(mode="full"), mvs_norms=GroupConfig(mode="full"))
    table = apply(make_model(), resolve_groups(by_groups), rank=4)
    assert table.trainable_names == apply(make_model(), resolve_groups(TrainableConfig(), True), rank=4).trainable_names
    assert resolve_groups(by_groups, True) == resolve_groups(by_groups, False)


def test_optimizer_groups_carry_rates_and_spare_norms_tables_and_biases() -> None:
    model = make_model()
    own = settings(modulation=GroupConfig(learning_rate=1e-3, warmup_steps=7), projector=GroupConfig(weight_decay=0.5))
    groups = resolve_groups(own, True, TrainConfig(weight_decay=0.01, learning_rate=2e-4, warmup_steps=50))
    table = apply(model, groups, rank=4)
    made = optimizer_groups(model, groups)
    assert sorted(name for group in made for name in group["names"]) == sorted(table.trainable_names)
    settings_of = {name: group for group in made for name in group["names"]}
    assert len(settings_of) == table.trainable_tensors
    decayed = {name for name, group in settings_of.items() if group["weight_decay"] == 0.01}
    assert {name for name in decayed if ".lora_" not in name} == {
        "patch_embedding.weight",
        "head_rgb.proj_out.weight",
        "head_heatmap.proj_out.weight",
    }
    assert {group["weight_decay"] for group in made if group["group"] == "projector"} == {0.5}
    assert settings_of["head_rgb.proj_out.bias"]["weight_decay"] == 0
    assert settings_of["head_rgb.scale_shift_table"]["weight_decay"] == 0
    table_settings = settings_of["blocks.0.scale_shift_table"]
    assert (table_settings["lr"], table_settings["warmup_steps"], table_settings["weight_decay"]) == (1e-3, 7, 0)
    assert (settings_of["blocks.0.modulation_mvs"]["lr"], settings_of["blocks.0.modulation_mvs"]["warmup_steps"]) == (2e-4, 50)
    optimizer = torch.optim.AdamW(made)
    verify_trainable(model, table, optimizer)
    assert {group["warmup_steps"] for group in optimizer.param_groups} == {7, 50}


def test_verification_names_what_differs() -> None:
    model = make_model()
    groups = resolve_groups(TrainableConfig(), True)
    table = apply(model, groups, rank=4)
    made = optimizer_groups(model, groups)
    parameters = parameters_by_name(model)

    parameters["blocks.1.scale_shift_table"].requires_grad_(False)
    with pytest.raises(MvwanError, match=r"the table trains them, the model has them frozen: blocks\.1\.scale_shift_table"):
        verify_trainable(model, table)
    parameters["blocks.1.scale_shift_table"].requires_grad_(True)

    parameters["blocks.0.norm2.weight"].requires_grad_(True)
    with pytest.raises(MvwanError, match=r"they train, the table has them frozen: blocks\.0\.norm2\.weight"):
        verify_trainable(model, table)
    parameters["blocks.0.norm2.weight"].requires_grad_(False)

    without_norms = [group for group in made if group["group"] != "mvs_norms"]
    with pytest.raises(MvwanError, match=r"the optimizer does not hold them: blocks\.0\.mvs_attn\.norm_q\.weight, .* and 1 more"):
        verify_trainable(model, table, torch.optim.AdamW(without_norms))
    with pytest.raises(MvwanError, match="the optimizer holds 1 tensors that are not in the model"):
        verify_trainable(model, table, torch.optim.AdamW([*made, {"params": [torch.nn.Parameter(torch.ones(1))]}]))
    with_frozen = [*made, {"params": [parameters["blocks.0.norm2.bias"]]}]
    with pytest.raises(MvwanError, match=r"they are frozen, the optimizer holds them: blocks\.0\.norm2\.bias"):
        verify_trainable(model, table, torch.optim.AdamW(with_frozen))

    parameters["head_rgb.proj_out.bias"].data = parameters["head_rgb.proj_out.bias"].data.bfloat16()
    with pytest.raises(MvwanError, match=r"they train but are not float32, .*: head_rgb\.proj_out\.bias"):
        verify_trainable(model, table)


def test_wrappers_do_not_change_names() -> None:
    model = make_model()
    groups = resolve_groups(TrainableConfig(), True)
    table = apply(model, groups, rank=4)
    model.blocks[0] = torch.compile(model.blocks[0])  # type: ignore[index]
    assert "blocks.0._orig_mod.scale_shift_table" in dict(model.named_parameters())
    verify_trainable(model, table, torch.optim.AdamW(optimizer_groups(model, groups)))
    verify_trainable(torch.nn.ModuleDict({"module": model}), table)


def test_adapters_start_without_effect_and_follow_the_seed() -> None:
    before = run(make_model())
    adapters = []
    for _ in range(2):
        model = make_model()
        torch.manual_seed(5)
        apply(model, resolve_groups(TrainableConfig()), rank=4, alpha=8)
        assert torch.equal(run(model), before)
        adapters.append({name: parameter for name, parameter in parameters_by_name(model).items() if ".lora_" in name})
    assert all(torch.equal(parameter, adapters[1][name]) for name, parameter in adapters[0].items())
    assert all(bool(parameter.any()) == (".lora_A." in name) for name, parameter in adapters[0].items())
    assert model.blocks[0].attn1.to_q.scaling == {"default": 2.0}  # type: ignore[union-attr]


@pytest.mark.parametrize("autocast", [True, False])
def test_float32_masters_on_a_bfloat16_base(autocast: bool) -> None:
    model = make_model(dtype=torch.bfloat16)
    table = apply(model, resolve_groups(TrainableConfig(), True), rank=4)
    parameters = parameters_by_name(model)
    assert parameters["blocks.0.attn1.to_q.base_layer.weight"].dtype == torch.bfloat16
    assert {parameters[name].dtype for name in table.trainable_names} == {torch.float32}
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        output = run(model)
    output.square().mean().backward()
    modulation, norms = parameters["blocks.0.scale_shift_table"], parameters["blocks.0.mvs_attn.norm_q.weight"]
    assert modulation.grad is not None
    assert modulation.grad.dtype == torch.float32
    assert modulation.grad.abs().max() > 0
    assert norms.grad is not None
    assert norms.grad.dtype == torch.float32
    assert parameters["blocks.0.norm2.weight"].grad is None
