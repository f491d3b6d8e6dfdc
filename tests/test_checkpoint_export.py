"""checkpoint_export: what each form holds is what the checkpoint holds, to the bit or to the output; what it cannot hold is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from mvwan.checkpoint import load_trained, read_optimizer
from mvwan.checkpoint_compare import verify_checkpoint
from mvwan.checkpoint_export import FORMS, LORA_FILE, REST_FILE, Form, export_checkpoint
from mvwan.errors import MvwanError
from mvwan.model.multiview_wan import MultiViewWan
from mvwan.model.surgery import adapt, load_model, to_stock
from mvwan.model.trainable import parameters_by_name
from mvwan.model.wan import WanTransformer3DModel, load_transformer
from tests.saved import BASE, GOLDEN, save_run
from tests.stock import make_stock

torch.set_num_threads(1)  # sizes are tiny: waking threads costs more than they do
RANK = {"rank": 4}
ALPHA = {"trainable": {"lora": {"rank": 4, "alpha": 10.0}}}
FROZEN_PROJECTOR = {"trainable": {"lora": RANK, "groups": {"projector": {"mode": "frozen"}}}}
STREAMS = {"model": {"views": 2, "fusion": "view"}}
HEAD = {"model": {"views": 2, "fusion": "view", "action_head": "gripper"}}


def same(left: Any, right: Any) -> bool:
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )


def inputs(views: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(1, views, 96, 3, 4, 6, generator=generator), torch.tensor([700.0]), torch.randn(1, 16, 32, generator=generator)


def stock_output(stock: WanTransformer3DModel, latents: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """Stock Wan alone on each view's RGB latents, the first latent frame given."""
    _, views, _, frames, height, width = latents.shape
    per_token = timestep[:, None].repeat(1, frames)
    per_token[:, 0] = 0
    per_token = per_token.repeat_interleave(height * width // 4, dim=1)
    with torch.no_grad():
        return torch.stack([stock(latents[:, view, :48], per_token, text, return_dict=False)[0] for view in range(views)], dim=1)


# ── mvwan ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("ema", [False, True], ids=["trained", "ema"])
def test_a_shared_checkpoint_is_the_same_model_without_optimizer_state(ema: bool, tmp_path: Path) -> None:
    save_run(tmp_path / "run", ema=True, unfreeze_modulation_and_norms=True)
    written = export_checkpoint(tmp_path / "run", tmp_path / "shared", "mvwan", ema=ema)
    assert sorted(path.name for path in written.path.iterdir()) == ["COMMITTED", "manifest.json", "trained.safetensors"]
    (before, about_before), (after, about) = load_trained(tmp_path / "run", ema=ema), load_trained(written.path)
    assert same(dict(before), dict(after))
    assert {**about, "files": None, "groups": None} == {**about_before, "files": None, "groups": None}
    assert "all digests match" in verify_checkpoint(written.path)[1]
    with pytest.raises(MvwanError, match=r"holds no optimizer state.*train\.from_checkpoint"):
        read_optimizer(written.path)


def test_an_older_file_is_not_shared_under_an_invented_base(tmp_path: Path) -> None:
    with pytest.raises(MvwanError, match="does not know its base"):
        export_checkpoint(GOLDEN / "trained_frozen.safetensors", tmp_path / "shared", "mvwan")
    assert not (tmp_path / "shared").exists()


# ── wan-native ────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["trained_frozen.safetensors", "trained_unfrozen.safetensors"])
def test_an_older_file_exported_is_itself(name: str, tmp_path: Path) -> None:
    written = export_checkpoint(GOLDEN / name, tmp_path / "again.safetensors", "wan-native")
    assert same(load_file(written.path), load_file(GOLDEN / name))
    with safe_open(written.path, "pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize(
    "sections", [{}, {"unfreeze_modulation_and_norms": True}, STREAMS, HEAD], ids=["switch off", "switch on", "fusion view", "action head"]
)
def test_our_checkpoint_exported_and_loaded_by_path_alone_is_the_same_model(sections: dict[str, Any], tmp_path: Path) -> None:
    module = save_run(tmp_path / "run", **sections)
    written = export_checkpoint(tmp_path / "run", tmp_path / "older.safetensors", "wan-native")
    settings = module.config.model
    model, _ = load_model(BASE, written.path, fusion=settings.fusion, action_head=settings.action_head)
    assert same(parameters_by_name(model), parameters_by_name(module.model))
    stored = load_file(written.path)
    assert "blocks.1.mvs_attn.o.lora_B.default.weight" in stored
    assert ("patch_embedding_heatmap.weight" in stored) == bool(sections.get("model"))
    layers = ("modulation", "proj_in.weight", "proj_in.bias", "pool.weight", "hidden.weight", "hidden.bias", "head.weight", "head.bias")
    own = {f"head_action.{layer}" for layer in layers} if sections is HEAD else set()
    assert {name for name in stored if name.startswith("head_action.")} == own


def test_frozen_tensors_that_a_checkpoint_carries_are_in_it(tmp_path: Path) -> None:
    save_run(tmp_path / "on", unfreeze_modulation_and_norms=True)
    module = save_run(tmp_path / "off", load=tmp_path / "on")
    assert load_trained(tmp_path / "off").manifest["groups"]["modulation"]["mode"] == "frozen"
    written = export_checkpoint(tmp_path / "off", tmp_path / "older.safetensors", "wan-native")
    assert torch.equal(load_file(written.path)["blocks.1.modulation"], parameters_by_name(module.model)["blocks.1.scale_shift_table"])
    assert same(load_trained(written.path).tensors, module.saved_tensors())


def test_the_moving_average_is_exported_when_asked_for(tmp_path: Path) -> None:
    module = save_run(tmp_path / "run", ema=True)
    average = export_checkpoint(tmp_path / "run", tmp_path / "ema.safetensors", "wan-native", ema=True)
    assert same(load_trained(average.path).tensors, {name: tensor * 0.9 for name, tensor in module.saved_tensors().items()})
    folder = export_checkpoint(tmp_path / "run", tmp_path / "ema", "multiview", ema=True).path
    bias = load_file(folder / "diffusion_pytorch_model.safetensors")["blocks.1.projector.bias"]
    assert torch.equal(bias, parameters_by_name(module.model)["blocks.1.projector.bias"] * 0.9)


def test_what_a_wan_native_file_cannot_say_is_refused_or_said(tmp_path: Path) -> None:
    save_run(tmp_path / "alpha", **ALPHA)
    with pytest.raises(MvwanError, match="rank 4 and alpha 10; a wan-native file cannot say alpha"):
        export_checkpoint(tmp_path / "alpha", tmp_path / "alpha.safetensors", "wan-native")
    save_run(tmp_path / "own", trainable={"lora": {"rank": 4, "ffn": False}})
    written = export_checkpoint(tmp_path / "own", tmp_path / "own.safetensors", "wan-native")
    assert "its own layers or groups" in " ".join(written.notes)
    with pytest.raises(MvwanError, match=r"ends with \.safetensors"):
        export_checkpoint(tmp_path / "own", tmp_path / "own.bin", "wan-native")


# ── diffusers-lora ────────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("older", [False, True])
def test_stock_diffusers_loads_the_lora_with_its_own_loader(older: bool, tmp_path: Path) -> None:
    if not older:
        save_run(tmp_path / "run", **ALPHA)
    source = GOLDEN / "trained_unfrozen.safetensors" if older else tmp_path / "run"
    folder = export_checkpoint(source, tmp_path / "lora", "diffusers-lora").path
    trained = load_trained(source).tensors
    stock = load_transformer(BASE)
    before = {name: parameter.clone() for name, parameter in stock.named_parameters()}
    stock.load_lora_adapter(str(folder), adapter_name="exported", use_safetensors=True)
    assert (stock.peft_config["exported"].r, stock.peft_config["exported"].lora_alpha) == (4, 4.0 if older else 10.0)
    stock.fuse_lora(adapter_names=["exported"])
    stock.unload_lora()
    after = dict(stock.named_parameters())
    scale = 1.0 if older else 10.0 / 4
    adapted = 0
    for name, weight in before.items():
        layer = name.removesuffix(".weight")
        if f"{layer}.lora_A.default.weight" in trained:
            added = trained[f"{layer}.lora_B.default.weight"] @ trained[f"{layer}.lora_A.default.weight"] * scale
            assert added.norm() > 0.1
            assert (after[name] - weight - added).abs().max() < 1e-5, name
            adapted += 1
        else:
            assert torch.equal(after[name], weight), name
    assert adapted == 2 * 10


def test_the_union_of_both_files_is_the_checkpoint(tmp_path: Path) -> None:
    module = save_run(tmp_path / "run", unfreeze_modulation_and_norms=True, **ALPHA)
    written = export_checkpoint(tmp_path / "run", tmp_path / "lora", "diffusers-lora")
    lora, rest = load_file(written.path / LORA_FILE), load_file(written.path / REST_FILE)
    ours = {name.removeprefix("transformer.").replace(".weight", ".default.weight"): tensor for name, tensor in lora.items()}
    assert same(ours | rest, module.saved_tensors())
    assert not any(part in name for name in lora for part in ("mvs_attn", "head_", "projector"))
    assert {path.name for path in written.path.iterdir()} == {LORA_FILE, REST_FILE, "README.md"}
    readme = (written.path / "README.md").read_text()
    for words in (LORA_FILE, REST_FILE, "alpha 10", "The LoRA alone is not the adapted model"):
        assert words in readme
    with safe_open(written.path / REST_FILE, "pt") as file:
        assert json.loads(file.metadata()["lora_alpha"]) == 10.0


def test_a_checkpoint_without_lora_of_stock_layers_is_refused(tmp_path: Path) -> None:
    save_run(tmp_path / "run", trainable={"lora": {"rank": 4, "self_attention": False, "cross_attention": False, "ffn": False}})
    with pytest.raises(MvwanError, match="no LoRA of a stock layer"):
        export_checkpoint(tmp_path / "run", tmp_path / "lora", "diffusers-lora")
    assert not (tmp_path / "lora").exists()


# ── multiview ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "sections", [ALPHA | {"unfreeze_modulation_and_norms": True}, ALPHA | STREAMS, HEAD], ids=["channel", "view", "action head"]
)
def test_multiview_is_the_adapted_model(sections: dict[str, Any], tmp_path: Path) -> None:
    module = save_run(tmp_path / "run", **sections)
    written = export_checkpoint(tmp_path / "run", tmp_path / "whole", "multiview")
    model = MultiViewWan.from_pretrained(written.path).eval()
    views = module.config.model.views
    assert (model.config.views, model.config.fusion) == (views, module.config.model.fusion)
    assert not [name for name, _ in model.named_parameters() if "lora" in name or "base_layer" in name]
    with torch.no_grad():
        expected, output = (part.eval()(*inputs(views)) for part in (module.model, model))
        if sections is HEAD:
            ours, theirs = (part(*inputs(views), return_action=True)[1] for part in (module.model, model))
            assert ours.std() > 0.1 and (ours - theirs).abs().max() < 1e-5 * ours.abs().max()
    assert expected.std() > 0.1
    assert (output - expected).abs().max() < 1e-5 * expected.abs().max()
    assert not load_model(BASE)[0].blocks[0].projector.weight.any(), "the comparison would hold without view attention"


def test_an_older_file_needs_its_base_by_name_and_another_base_is_refused(tmp_path: Path) -> None:
    older = GOLDEN / "trained_unfrozen.safetensors"
    with pytest.raises(MvwanError, match=r"does not know its base\. Name it with --base"):
        export_checkpoint(older, tmp_path / "whole", "multiview")
    written = export_checkpoint(older, tmp_path / "whole", "multiview", base=BASE)
    assert "how many views" in " ".join(written.notes)
    model, _ = load_model(BASE, older, unfreeze_modulation_and_norms=True)
    with torch.no_grad():
        expected, output = model(*inputs()), MultiViewWan.from_pretrained(written.path)(*inputs())
    assert (output - expected).abs().max() < 1e-5
    save_run(tmp_path / "run")
    other = tmp_path / "other"
    make_stock().save_pretrained(other)
    with pytest.raises(MvwanError, match="trained with a base of digest"):
        export_checkpoint(tmp_path / "run", tmp_path / "wrong", "multiview", base=other)
    assert not (tmp_path / "wrong").exists()


def test_bfloat16_rounds_merged_weights_and_says_how_much_is_lost(tmp_path: Path) -> None:
    module = save_run(tmp_path / "run", shake=0.003, base={"source": str(BASE), "dtype": "bfloat16"})
    exact = export_checkpoint(tmp_path / "run", tmp_path / "exact", "multiview")
    rounded = export_checkpoint(tmp_path / "run", tmp_path / "rounded", "multiview", dtype="bfloat16")
    assert "rounded" not in " ".join(exact.notes)
    assert "rounded to bfloat16" in " ".join(rounded.notes)
    weights, narrow = (load_file(tmp_path / name / "diffusion_pytorch_model.safetensors") for name in ("exact", "rounded"))
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    trained = parameters_by_name(module.model)
    for name in ("blocks.1.projector.weight", "head_rgb.proj_out.weight", "blocks.0.modulation_mvs"):
        assert torch.equal(narrow[name], trained[name]), "what trained whole stays as it is"
    lost, added = 0.0, 0.0
    base = parameters_by_name(load_model(BASE, dtype=torch.bfloat16)[0])
    for name in weights:
        stored = base.get(name.replace(".weight", ".base_layer.weight"))
        if name.endswith(".weight") and stored is not None:
            assert narrow[name].dtype == torch.bfloat16
            assert torch.equal(narrow[name], weights[name].bfloat16())
            lost += float((narrow[name].float() - weights[name]).square().sum())
            added += float((weights[name] - stored.float()).square().sum())
    assert lost > 0
    assert f"{(lost / added) ** 0.5:.1%}" in " ".join(rounded.notes)


# ── merged ────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "sections",
    [
        ALPHA | STREAMS | {"unfreeze_modulation_and_norms": True},
        FROZEN_PROJECTOR | STREAMS,
        {"trainable": {"lora": RANK, "groups": {"patch_embedding": {"mode": "frozen"}, "backbone_norms": {"mode": "full"}}}},
    ],
    ids=["streams", "projector frozen", "channel, norms trained"],
)
def test_merged_equals_the_rgb_half_where_view_attention_is_silent(sections: dict[str, Any], tmp_path: Path) -> None:
    module = save_run(tmp_path / "run", still=("projector",), **sections)
    with pytest.raises(MvwanError, match=r"would lose the heatmap head and all of view attention .*heads 3.*Say --rgb-only"):
        export_checkpoint(tmp_path / "run", tmp_path / "stock", "merged")
    written = export_checkpoint(tmp_path / "run", tmp_path / "stock", "merged", rgb_only=True)
    assert "LEFT OUT, as --rgb-only asked: the heatmap head" in " ".join(written.notes)
    stock = WanTransformer3DModel.from_pretrained(written.path).eval()
    assert json.loads((written.path / "config.json").read_text())["_class_name"] == "WanTransformer3DModel"
    latents, timestep, text = inputs(module.config.model.views)
    with torch.no_grad():
        expected = module.model.eval()(latents, timestep, text)[:, :, :48]
    output = stock_output(stock, latents, timestep, text)
    assert (output - expected).abs().max() < 1e-5 * max(1.0, float(expected.abs().max()))
    assert (stock_output(load_transformer(BASE), latents, timestep, text) - expected).abs().max() > 0.1


def test_a_merged_export_says_that_the_action_head_is_left_out(tmp_path: Path) -> None:
    save_run(tmp_path / "run", still=("projector",), **HEAD)
    with pytest.raises(MvwanError, match=r"would lose the heatmap head, the action head and all of view attention .*action_head 8"):
        export_checkpoint(tmp_path / "run", tmp_path / "stock", "merged")
    written = export_checkpoint(tmp_path / "run", tmp_path / "stock", "merged", rgb_only=True)
    assert not [name for name, _ in WanTransformer3DModel.from_pretrained(written.path).named_parameters() if "action" in name]


@pytest.mark.parametrize(
    ("sections", "still", "says"),
    [
        (STREAMS, (), r"group projector: not zero in 2 of 2 blocks \(0, 1\), so view attention acts"),
        ({}, ("projector",), r"group patch_embedding: 9,216 of 9,216 values in its heat columns not zero, so RGB reads heat"),
        ({}, (), "group projector.*; group patch_embedding"),
        (
            STREAMS | {"trainable": {"lora": RANK, "groups": {"mine": {"pattern": r"blocks\.1\.projector\.weight", "mode": "lora"}}}},
            ("projector",),
            r"group projector: not zero in 1 of 2 blocks \(1\)",
        ),
    ],
    ids=["projector", "heat columns", "both", "LoRA on a projector"],
)
def test_merged_names_what_stands_in_the_way(sections: dict[str, Any], still: tuple[str, ...], says: str, tmp_path: Path) -> None:
    save_run(tmp_path / "run", still=still, **sections)
    with pytest.raises(MvwanError, match=says) as refusal:
        export_checkpoint(tmp_path / "run", tmp_path / "stock", "merged", rgb_only=True)
    assert "Export it as multiview" in str(refusal.value)
    assert not (tmp_path / "stock").exists()


@pytest.mark.parametrize("fusion", ["channel", "view"])
def test_to_stock_is_the_way_back_from_adapt(fusion: Any) -> None:
    before = {name: parameter.clone() for name, parameter in make_stock(torch.bfloat16).named_parameters()}
    again = to_stock(adapt(make_stock(torch.bfloat16), fusion=fusion, action_head="gripper")[0], torch.bfloat16)
    assert same(dict(again.named_parameters()), before)


# ── every form ────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("form", FORMS)
def test_what_is_there_stays_and_a_damaged_checkpoint_leaves_nothing(form: Form, tmp_path: Path) -> None:
    save_run(tmp_path / "run", still=("projector",), **STREAMS)
    taken, free = tmp_path / "taken.safetensors", tmp_path / "free.safetensors"
    taken.write_text("mine")
    with pytest.raises(MvwanError, match="exists already"):
        export_checkpoint(tmp_path / "run", taken, form, rgb_only=form == "merged")
    assert taken.read_text() == "mine"
    trained = tmp_path / "run" / "checkpoints" / "step-000004" / "trained.safetensors"
    data = bytearray(trained.read_bytes())
    data[-20] ^= 1
    trained.write_bytes(data)
    with pytest.raises(MvwanError, match="damaged"):
        export_checkpoint(tmp_path / "run", free, form, rgb_only=form == "merged")
    assert {path.name for path in tmp_path.iterdir()} == {"run", "taken.safetensors"}


def test_options_without_a_meaning_are_refused(tmp_path: Path) -> None:
    older, output = GOLDEN / "trained_frozen.safetensors", tmp_path / "out.safetensors"
    for form, options in (("wan-native", {"base": BASE}), ("diffusers-lora", {"dtype": "bfloat16"}), ("multiview", {"rgb_only": True})):
        flag = f"--{next(iter(options)).replace('_', '-')}"
        with pytest.raises(MvwanError, match=f"{flag}: nothing of a {form} export depends on it"):
            export_checkpoint(older, output, form, **options)  # type: ignore[arg-type]
    with pytest.raises(MvwanError, match=r"no such form. Did you mean 'merged'\?"):
        export_checkpoint(older, output, "merge")  # type: ignore[arg-type]
    assert not output.exists()
