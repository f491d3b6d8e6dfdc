"""The network against stock Wan: equal at step 0, per-frame time, checkpointing, compile, numerics."""

import pytest
import torch
from einops import rearrange

from mvwan.actions import ACTION_HEADS
from mvwan.errors import MvwanError
from mvwan.model.multiview_wan import ActionHead, MultiViewWan
from mvwan.model.surgery import adapt
from mvwan.model.wan import WanTransformer3DModel, in_float32_island
from tests.stock import make_stock


def make_inputs(batch: int = 2, views: int = 3, frames: int = 3, height: int = 4, width: int = 6) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(batch, views, 96, frames, height, width, generator=generator)
    timestep = torch.tensor([700.0, 250.0][:batch])
    text = torch.randn(batch, 16, 32, generator=generator)
    return latents, timestep, text


def stock_on_each_view(stock: WanTransformer3DModel, latents: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """[B V 48 f h w]: stock Wan, run alone on each view's RGB latents with its own per-token timesteps."""
    _batch, views, _, frames, height, width = latents.shape
    per_token = timestep[:, None].repeat(1, frames)
    per_token[:, 0] = 0
    per_token = per_token.repeat_interleave((height // 2) * (width // 2), dim=1)
    outputs = [stock(latents[:, view, :48], per_token, text, return_dict=False)[0] for view in range(views)]
    return torch.stack(outputs, dim=1)


@pytest.mark.parametrize("fusion", ["channel", "view"])
@pytest.mark.parametrize(("batch", "views", "height", "width"), [(2, 3, 4, 6), (1, 1, 6, 4), (1, 4, 4, 4)])
def test_at_step_0_every_view_equals_stock_wan(fusion: str, batch: int, views: int, height: int, width: int) -> None:
    latents, timestep, text = make_inputs(batch, views, height=height, width=width)
    expected = stock_on_each_view(make_stock(), latents, timestep, text)
    model, _ = adapt(make_stock(), views=views, fusion=fusion)  # type: ignore[arg-type]
    with torch.no_grad():
        output = model(latents, timestep, text)
    assert output.shape == latents.shape
    assert (output[:, :, :48] - expected).abs().max() < 5e-6
    if fusion == "view":  # the heat stream is stock Wan on the heat latents, too
        heat = stock_on_each_view(make_stock(), latents[:, :, 48:], timestep, text)
        assert (output[:, :, 48:] - heat).abs().max() < 5e-6


@pytest.mark.parametrize("fusion", ["channel", "view"])
def test_at_step_0_equality_holds_in_bfloat16(fusion: str) -> None:
    latents, timestep, text = (x.bfloat16() for x in make_inputs())
    expected = stock_on_each_view(make_stock(torch.bfloat16), latents, timestep.float(), text)
    model, _ = adapt(make_stock(torch.bfloat16), fusion=fusion)  # type: ignore[arg-type]
    with torch.no_grad():
        output = model(latents, timestep.float(), text)
    assert output.dtype == torch.bfloat16
    assert (output[:, :, :48].float() - expected.float()).abs().max() < 0.06  # outputs of size 1, 8 bits of mantissa


@pytest.mark.parametrize("head", ["gripper", "gripper_rotation"])
@pytest.mark.parametrize("fusion", ["channel", "view"])
def test_at_step_0_an_action_head_changes_no_velocity_and_says_the_same_of_every_frame(fusion: str, head: str) -> None:
    latents, timestep, text = make_inputs()
    plain, _ = adapt(make_stock(), fusion=fusion)  # type: ignore[arg-type]
    model, _ = adapt(make_stock(), fusion=fusion, action_head=head)  # type: ignore[arg-type]
    expected = stock_on_each_view(make_stock(), latents, timestep, text)
    with torch.no_grad():
        velocity, logits = model(latents, timestep, text, return_action=True)
        assert torch.equal(velocity, model(latents, timestep, text))
        assert torch.equal(velocity, plain(latents, timestep, text))
    assert (velocity[:, :, :48] - expected).abs().max() < 5e-6
    assert logits.shape == (2, 9, ACTION_HEADS[head]) and logits.dtype == torch.float32
    assert not logits.any()
    with pytest.raises(MvwanError, match=r'has no action head\. Load it with action_head="gripper"'):
        plain(latents, timestep, text, return_action=True)


def test_the_action_head_answers_for_the_frames_of_each_latent_frame_from_all_views() -> None:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    head = ActionHead(dim=48, logits=2, eps=1e-6)
    torch.nn.init.normal_(head.pool.weight, generator=generator)
    x, time = torch.randn(1, 3, 4, 6, 48, generator=generator), torch.zeros(1, 4, 48)
    changed = x.clone()
    changed[0, 2, 2, 5] += torch.randn(48, generator=generator)
    with torch.no_grad():
        before, after = head(x, time), head(changed, time)
        shuffled = head(x[:, [2, 0, 1]].flip(3), time)
    assert before.shape == (1, 13, 2)
    assert (before != after).any(dim=-1)[0].tolist() == [False] * 5 + [True] * 4 + [False] * 4
    torch.testing.assert_close(shuffled, before)
    with torch.no_grad():
        alone = head(x[:, :, :1], time[:, :1])
    torch.testing.assert_close(alone, before[:, :1])  # the first latent frame holds one frame


def test_heat_latents_do_not_reach_rgb_at_step_0() -> None:
    latents, timestep, text = make_inputs()
    model, _ = adapt(make_stock())
    other = latents.clone()
    other[:, :, 48:] = torch.randn_like(other[:, :, 48:])
    with torch.no_grad():
        assert torch.equal(model(latents, timestep, text), model(other, timestep, text))


def test_view_attention_joins_the_views_of_one_latent_frame_only() -> None:
    latents, timestep, text = make_inputs(batch=1)
    model, _ = adapt(make_stock())
    for block in model.blocks:
        torch.nn.init.normal_(block.projector.weight, std=0.3)
    model.blocks = model.blocks[:1]  # one block: self-attention has not mixed the frames of the other view yet
    moved = latents.clone()
    moved[:, 1, :48, 2] += 1
    with torch.no_grad():
        change = (model(latents, timestep, text) - model(moved, timestep, text)).abs().amax(dim=(0, 2, 4, 5))
    assert (change[0, 2] > 0) and (change[2, 2] > 0), "the other views must see it"
    assert change[1, 0] > 0, "self-attention carries it to the other frames of its own view"
    # View 0 sees view 1 after self-attention, which spread the change over view 1's frames: all frames change a little.
    assert change[0, 2] > 5 * change[0, 0]


def test_a_timestep_per_latent_frame_is_taken_as_it_is() -> None:
    latents, timestep, text = make_inputs()
    model, _ = adapt(make_stock())
    per_frame = timestep[:, None].repeat(1, 3)
    per_frame[:, 0] = 0
    with torch.no_grad():
        assert torch.equal(model(latents, timestep, text), model(latents, per_frame, text))
        assert not torch.equal(model(latents, timestep, text), model(latents, timestep[:, None].repeat(1, 3), text))
        assert torch.equal(model(latents, timestep, text, condition_frames=0), model(latents, timestep[:, None].repeat(1, 3), text))


def test_time_is_embedded_once_per_latent_frame() -> None:
    latents, timestep, text = make_inputs(batch=2, frames=3)
    model, _ = adapt(make_stock())
    rows: list[int] = []
    model.condition_embedder.time_proj.register_forward_hook(lambda _module, inputs, _output: rows.append(inputs[0].shape[0]))
    with torch.no_grad():
        model(latents, timestep, text)
    assert rows == [2 * 3]


def test_one_text_serves_every_sample() -> None:
    latents, timestep, text = make_inputs()
    model, _ = adapt(make_stock())
    with torch.no_grad():
        one, repeated = model(latents, timestep, text[:1]), model(latents, timestep, text[:1].repeat(2, 1, 1))
    assert torch.equal(one, repeated)


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    latents, timestep, text = make_inputs()
    gradients = []
    for checkpointing in (False, True):
        model, _ = adapt(make_stock())
        if checkpointing:
            model.enable_gradient_checkpointing()
        for block in model.blocks:
            torch.nn.init.constant_(block.projector.weight, 0.01)
        model.blocks[0].mvs_attn.to_q.weight.requires_grad_(True)
        model.train()
        model(latents, timestep, text).square().mean().backward()
        gradients.append(model.blocks[0].mvs_attn.to_q.weight.grad)
    assert gradients[0].abs().max() > 0
    assert torch.equal(gradients[0], gradients[1])


def test_a_compiled_block_gives_the_same_output() -> None:
    latents, timestep, text = make_inputs(batch=1)
    model, _ = adapt(make_stock())
    with torch.no_grad():
        expected = model(latents, timestep, text)
        model.compile_repeated_blocks(fullgraph=True)
        output = model(latents, timestep, text)
    assert (output - expected).abs().max() < 1e-5


def test_numerics_of_every_tensor_are_decided_on_the_class() -> None:
    model, _ = adapt(make_stock(torch.bfloat16), action_head="gripper")
    for name, parameter in model.named_parameters():
        island = in_float32_island(name, MultiViewWan)
        assert parameter.dtype == (torch.float32 if island else torch.bfloat16), name
    for name in (
        "blocks.0.modulation_mvs",
        "head_heatmap.scale_shift_table",
        "head_action.scale_shift_table",
        "blocks.0.scale_shift_table",
        "blocks.0.norm2.weight",
    ):
        assert in_float32_island(name, MultiViewWan), name


def test_thousand_timesteps_stay_apart_in_bfloat16_compute() -> None:
    timesteps = torch.arange(1000.0)
    sigma = torch.arange(1, 1001) / 1000
    warped = 1000 * 5 * sigma / (1 + 4 * sigma)
    assert len(torch.unique(warped.bfloat16())) == 294, "what is left when the shifted timesteps are cast"
    model, _ = adapt(make_stock(torch.bfloat16))
    seen: list[torch.Tensor] = []
    model.condition_embedder.time_embedder.register_forward_hook(lambda _module, inputs, output: seen.extend((inputs[0], output)))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        model._embed_time(timesteps[None])
    for tensor in seen:
        assert tensor.dtype == torch.float32
        assert len(torch.unique(tensor, dim=0)) == 1000


def test_save_and_load_as_a_diffusers_model(tmp_path) -> None:  # type: ignore[no-untyped-def]
    latents, timestep, text = make_inputs()
    model, _ = adapt(make_stock(), views=3, fusion="view", action_head="gripper")
    torch.nn.init.ones_(model.head_action.proj_out.weight)
    model.save_pretrained(tmp_path)
    again = MultiViewWan.from_pretrained(tmp_path).eval()
    assert (again.config.fusion, again.config.views, again.config.action_head) == ("view", 3, "gripper")
    with torch.no_grad():
        (velocity, logits), expected = (one(latents, timestep, text, return_action=True) for one in (again, model))
    assert torch.equal(velocity, expected[0]) and torch.equal(logits, expected[1])
    assert logits.any()


@pytest.mark.parametrize(
    ("latents", "timestep", "text", "says"),
    [
        ((1, 3, 48, 2, 4, 4), (1,), (1, 4, 32), "latents are"),
        ((1, 3, 96, 2, 5, 4), (1,), (1, 4, 32), "multiple of the patch"),
        ((2, 3, 96, 2, 4, 4), (3,), (1, 4, 32), "timestep is"),
        ((2, 3, 96, 2, 4, 4), (2,), (3, 4, 32), "text is"),
        ((2, 3, 96, 2, 4, 4), (2,), (2, 4, 31), "text is"),
        ((2, 3, 96, 1, 4, 4), (2,), (2, 4, 32), "condition_frames"),
    ],
)
def test_wrong_shapes_are_named(latents, timestep, text, says) -> None:  # type: ignore[no-untyped-def]
    model, _ = adapt(make_stock())
    with pytest.raises(MvwanError, match=says):
        model(torch.zeros(latents), torch.zeros(timestep), torch.zeros(text))


def test_token_order_of_a_head_is_patch_position_then_channel() -> None:
    """A head whose weights are zero and whose bias counts its rows shows where each row lands."""
    latents, timestep, text = make_inputs(batch=1, views=1)
    model, _ = adapt(make_stock(), views=1)
    torch.nn.init.zeros_(model.head_rgb.proj_out.weight)
    model.head_rgb.proj_out.bias.data = torch.arange(4 * 48).float()
    with torch.no_grad():
        output = model(latents, timestep, text)[0, 0, :48, 0]
    patch = rearrange(output, "C (h p) (w q) -> h w (p q C)", p=2, q=2)
    assert torch.equal(patch[0, 0], torch.arange(4 * 48).float())
