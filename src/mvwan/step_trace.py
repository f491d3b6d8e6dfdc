"""What a training step takes, counted in the real network: bytes alive at its peak and floating-point operations; and the same, measured.

`trace` runs forward pass, backward pass and update of `HeatmapWanTrainingModule` on tensors with shapes and no numbers; `measure` runs
them for real in a process of its own. Knows no device but this one, no strategy and no price.
"""

import ctypes
import json
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count, shape_wrapper

from mvwan import flow
from mvwan.batch import Batch
from mvwan.config import Config, config_from_dict
from mvwan.errors import MvwanError
from mvwan.memory import peak_bytes, resident_bytes
from mvwan.model.quantized import is_quantizable, stored_bytes
from mvwan.model.surgery import share_copies
from mvwan.model.trainable import parameters_by_name, stock_name
from mvwan.optimizer import make_optimizer
from mvwan.precision import settle
from mvwan.shapes import LATENT_CHANNELS, latent_size, num_latent_frames
from mvwan.training_module import HeatmapWanTrainingModule

Target = Literal["gpu", "cpu"]
_FLOP: dict[Any, Any] = {
    **flop_registry,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: shape_wrapper(
        lambda query, key, value, *_, **__: sdpa_flop_count(query, key, value)
    ),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: shape_wrapper(
        lambda gradient, query, key, value, *_, **__: sdpa_backward_flop_count(gradient, query, key, value)
    ),
}
"""Operations of the fused attention that stands for a GPU's: by the same formulas by which torch counts those of its GPU kernels."""
_PRODUCT_SIDE = 2048
_TIMED_STEPS = 2
_MMAP_THRESHOLD = -3
"""Of `mallopt`, in glibc's malloc.h."""
_SMALL_BYTES, _LARGE_BYTES = 2**16, 2**25
"""The latter is what glibc itself comes to."""


@dataclass(frozen=True, kw_only=True)
class Unit:
    """Bytes of a part of the model that FSDP2 gathers as one: a block, or all that is in none."""

    frozen: int
    trained: int


@dataclass(frozen=True, kw_only=True)
class StepTrace:
    """What one process takes for one step, in bytes and FLOP."""

    frozen: int
    shared: int
    """Frozen weights that lie in memory once where nothing spreads them, as `share_copies` makes it, and are in `frozen` twice."""
    trained: int
    """Weights that train; gradients are as many."""
    optimizer: int
    """What the optimizer keeps of them."""
    batches: int
    """All micro-batches of a step."""
    kept: int
    """Activations that are alive between forward and backward pass."""
    peak_gradients: int
    """Gradients that are there when a micro-batch needs most memory."""
    peak_others: int
    """What else it made that is alive at that moment: activations, gradients of activations, casts."""
    update: int
    """What the update needs for itself, beyond weights, gradients and moments."""
    flop: int
    """Of a micro-batch, forward and backward pass: 2 for a multiplication with its addition, products alone."""
    block: Unit
    rest: Unit
    window_bytes: int
    """Of a window in the latent cache."""
    instruction_bytes: int
    """Of an instruction in the latent cache."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What steps took on this machine."""

    peak_bytes: int
    """Largest resident memory until two steps were over, less what was resident before: after imports and after the module was built
    without weights. With memory given back to the system when it is dropped."""
    step_s: float
    """Mean of two more steps, with memory kept as usual."""
    product_flop_per_s: float
    """Of a product of two large float32 matrices, or bfloat16 ones where the run computes in bfloat16."""
    threads: int


class _LiveBytes(TorchDispatchMode):
    """Within it, `now` counts the bytes of storages that operations made and nobody has dropped, `gradients` those of them in `.grad`."""

    def __init__(self, existing: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.flop = self.now = self.gradients = self.peak = self.peak_gradients = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet(tensor.untyped_storage() for tensor in existing)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1.0  # AdamW reads its count of steps, and tensors without numbers cannot say it
        result = func(*args, **(kwargs or {}))
        if (count := _FLOP.get(func.overloadpacket)) is not None:
            self.flop += count(*args, **(kwargs or {}), out_val=result)
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and (storage := leaf.untyped_storage()) not in self._known:
                self._known.add(storage)
                self._change("now", storage.nbytes())
                weakref.finalize(storage, self._change, "now", -storage.nbytes())
        return result

    def count_gradient(self, parameter: torch.Tensor) -> None:
        """Nothing; what lies in the parameter's `.grad` counts as gradient until it is dropped. For a hook after its accumulation."""
        assert parameter.grad is not None
        storage = parameter.grad.untyped_storage()
        self._change("gradients", storage.nbytes())
        weakref.finalize(storage, self._change, "gradients", -storage.nbytes())

    def _change(self, name: str, count: int) -> None:
        setattr(self, name, getattr(self, name) + count)
        if self.now > self.peak:
            self.peak, self.peak_gradients = self.now, self.gradients


def settled_for(config: Config, target: Target) -> Config:
    """`config` with `auto` settled: for this machine's processor, or for a GPU, of which all in question are fast with bfloat16."""
    if target == "cpu":
        return settle(config, "cpu")
    fast = {"base": {"dtype": "bfloat16"}, "train": {"precision": "bf16"}}
    return settle(config, saved=fast)


def trace(config: Config, target: Target) -> StepTrace:
    """What a step of `config` takes on `target`: on a GPU with fused attention, on this machine's processor as it computes there.

    Needs neither weights nor memory for them. Raises `MvwanError` for settings that do not fit the base.
    """
    module = HeatmapWanTrainingModule(config=settled_for(config, target), device="meta", print_banners=False)
    if target == "gpu":
        module.model.attend_with("native")  # a GPU's fused kernel keeps no matrix of weights
    with FakeTensorMode():
        _without_numbers(module)
        batch = _batch(module)
        optimizer = _optimizer(module, target)
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        existing = [*module.parameters(), *module.buffers(), *(value for value in vars(batch).values() if isinstance(value, torch.Tensor))]
        gradients = [torch.empty_like(parameter) for parameter in trained]
        for parameter, gradient in zip(trained, gradients, strict=True):
            parameter.grad = gradient
        with _LiveBytes([*existing, *gradients]) as update:
            _update(module, optimizer)
        if config.train.gradient_accumulation == 1:
            optimizer.zero_grad()
        with _LiveBytes(existing) as step:
            for parameter in trained:
                if parameter.grad is not None:
                    parameter.grad = torch.empty_like(parameter)
                    step.count_gradient(parameter)
                parameter.register_post_accumulate_grad_hook(_counting(step))
            before = step.now
            loss = _loss(module, batch, target)
            kept = step.now - before
            loss.backward()
        # Counters and the like are single numbers.
        moments = sum(_bytes(value) for state in optimizer.state.values() for value in state.values() if getattr(value, "ndim", 0))
        held = _held_bytes(module)
        blocks = [_unit(block, held) for block in module.model.blocks]
        whole = _unit(module, held)
        return StepTrace(
            frozen=whole.frozen,
            shared=_shared_bytes(module, held),
            trained=whole.trained,
            optimizer=moments,
            batches=config.train.gradient_accumulation * sum(_bytes(value) for value in vars(batch).values()),
            kept=kept,
            peak_gradients=step.peak_gradients,
            peak_others=step.peak - step.peak_gradients + _largest_widened(module),
            update=update.peak - moments,
            flop=step.flop,
            block=max(blocks, key=lambda unit: unit.frozen + unit.trained),
            rest=Unit(
                frozen=whole.frozen - sum(unit.frozen for unit in blocks), trained=whole.trained - sum(unit.trained for unit in blocks)
            ),
            window_bytes=sum(_bytes(value[0]) for value in (batch.rgb, batch.heat, batch.heat_valid)),
            instruction_bytes=_bytes(batch.text[0]),
        )


def _counting(step: _LiveBytes) -> Callable[[torch.Tensor], None]:
    counted: weakref.WeakSet[Any] = weakref.WeakSet()

    def hook(parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        if (storage := parameter.grad.untyped_storage()) not in counted:
            counted.add(storage)
            step.count_gradient(parameter)

    return hook


def _without_numbers(module: nn.Module) -> None:
    """Nothing; the module's tensors then lie, as far as operations know, on the processor. Called within a `FakeTensorMode`."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype), parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _batch(module: HeatmapWanTrainingModule) -> Batch:
    """A micro-batch of zeros in the shapes of the settings, every frame labelled."""
    config = module.config
    batch, views, frames = config.train.batch_size, config.model.views, config.data.num_frames
    height, width = latent_size(config.data.height_px, config.data.width_px)
    shape = (batch, views, LATENT_CHANNELS, num_latent_frames(frames), height, width)
    knows_cameras = config.model.view_code != "slot"
    return Batch(
        sample_ids=tuple(f"window {index}" for index in range(batch)),
        rgb=torch.zeros(shape),
        heat=torch.zeros(shape),
        text=torch.zeros(batch, config.data.text_tokens, module.model.config["text_dim"]),
        heat_valid=torch.ones(batch, views, shape[3], dtype=torch.bool),
        gripper_open=torch.zeros(batch, frames),
        rotation_deg=torch.zeros(batch, frames, 3),
        rays=torch.zeros(batch, views, 6, height, width) if knows_cameras else None,
    ).check()


def _optimizer(module: HeatmapWanTrainingModule, target: Target) -> torch.optim.Optimizer:
    optimizer = make_optimizer(module, module.config.train)
    for group in optimizer.param_groups:
        group["foreach"] = target == "gpu"  # torch's own choice, which it makes by the device of the tensors
    return optimizer


def _loss(module: HeatmapWanTrainingModule, batch: Batch, target: Target) -> torch.Tensor:
    train = module.config.train
    # A model in bfloat16 turns autocast on by itself where products in it are fast, as on a GPU.
    autocast = train.precision == "bf16" or (target == "gpu" and module.config.base.dtype == "bfloat16")
    with torch.autocast("cpu", torch.bfloat16, autocast):
        errors = module(batch, module.config.seed, 0)
    rgb, heat, gripper, rotation = (count.sum() for count in errors.counts)
    return flow.total_loss(errors, rgb, heat, train.rgb_weight, gripper, rotation, train.action_weight)


def _update(module: HeatmapWanTrainingModule, optimizer: torch.optim.Optimizer) -> None:
    if module.config.train.max_gradient_norm:
        nn.utils.clip_grad_norm_(module.parameters(), module.config.train.max_gradient_norm)
    optimizer.step()


def _bytes(value: Any) -> int:
    return value.numel() * value.element_size() if isinstance(value, torch.Tensor) else 0


def _held_bytes(module: HeatmapWanTrainingModule) -> dict[nn.Parameter, int]:
    """What each parameter takes, frozen ones as `base.quantize` stores them."""
    kind = module.config.base.quantize
    layers = module.model.named_modules()
    narrow = {layer.weight: stored_bytes(layer.weight, kind) for name, layer in layers if is_quantizable(name, layer, kind)}
    return {parameter: narrow.get(parameter, _bytes(parameter)) for parameter in module.parameters()}


def _largest_widened(module: HeatmapWanTrainingModule) -> int:
    """Of the frozen weights that are widened for their product, the largest; 0 where none is."""
    kind = module.config.base.quantize
    return max((_bytes(layer.weight) for name, layer in module.model.named_modules() if is_quantizable(name, layer, kind)), default=0)


def _shared_bytes(module: HeatmapWanTrainingModule, held: Mapping[nn.Parameter, int]) -> int:
    """Of what `share_copies` finds twice in a model whose view attention still has the weights it starts from."""
    named = parameters_by_name(module.model).items()
    frozen = {stock_name(name): parameter for name, parameter in named if not parameter.requires_grad}
    copies = {name: frozen.get(name.replace(".mvs_attn.", ".attn1.")) for name in frozen if ".mvs_attn." in name}
    return sum(held[frozen[name]] for name, original in copies.items() if original is not None and original.dtype == frozen[name].dtype)


def _unit(part: nn.Module, held: Mapping[nn.Parameter, int]) -> Unit:
    sizes = [(parameter.requires_grad, held[parameter]) for parameter in part.parameters()]
    return Unit(frozen=sum(size for trains, size in sizes if not trains), trained=sum(size for trains, size in sizes if trains))


def measure(config: Config) -> Measurement:
    """What real steps took, on weights that are drawn, in a process that did nothing before. Raises `MvwanError` when it failed."""
    settled = settled_for(config, "cpu")
    drawn = replace(settled, base=replace(settled.base, random_weights=True))
    command = [sys.executable, "-m", "mvwan.step_trace"]
    done = subprocess.run(command, input=json.dumps(drawn.to_dict()), capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or [f"it ended with code {done.returncode}"])[-1]
        raise MvwanError(f"--measure: the process that ran the steps failed ({said}). Leave --measure out, or choose smaller settings.")
    return Measurement(**json.loads(done.stdout.splitlines()[-1]))


def _run(config: Config) -> Measurement:
    _give_back_from(_SMALL_BYTES)
    # What torch and Python take for themselves at a first product and for a module's objects counts as the start.
    torch.mm(torch.ones(64, 64), torch.ones(64, 64))
    HeatmapWanTrainingModule(config=config, device="meta", print_banners=False)
    start = resident_bytes()
    module = HeatmapWanTrainingModule(config=config, print_banners=False)
    module.quantize_frozen()
    share_copies(module.model)
    optimizer = _optimizer(module, "cpu")

    def step() -> float:
        began = time.perf_counter()
        for _ in range(config.train.gradient_accumulation):
            _loss(module, _batch(module), "cpu").backward()
        _update(module, optimizer)
        optimizer.zero_grad()
        return time.perf_counter() - began

    step()
    step()  # the first has no moments yet
    peak = peak_bytes()
    _give_back_from(_LARGE_BYTES)
    seconds = [step() for _ in range(_TIMED_STEPS)]
    return Measurement(
        peak_bytes=peak - start,
        step_s=sum(seconds) / _TIMED_STEPS,
        product_flop_per_s=_product_rate(torch.bfloat16 if config.train.precision == "bf16" else torch.float32),
        threads=torch.get_num_threads(),
    )


def _give_back_from(size: int) -> None:
    """Nothing; from now on the C library gives memory of pieces of `size` bytes or more back to the system as soon as they are dropped.

    It keeps smaller ones for itself, and of dropped aligned ones it can fill few again: a process then holds far more than it uses.
    """
    ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, size)


def _product_rate(dtype: torch.dtype) -> float:
    """FLOP per second of the quickest of three products."""
    multiply, operations = large_product(dtype)
    seconds: list[float] = []
    for _ in range(3):
        began = time.perf_counter()
        multiply()
        seconds.append(time.perf_counter() - began)
    return operations / min(seconds)


def large_product(dtype: torch.dtype) -> tuple[Callable[[], Any], int]:
    """(a product of two large matrices, its FLOPs)."""
    left, right = torch.randn(2, _PRODUCT_SIDE, _PRODUCT_SIDE).to(dtype)
    return lambda: torch.mm(left, right), 2 * _PRODUCT_SIDE**3


if __name__ == "__main__":
    print(json.dumps(asdict(_run(config_from_dict(json.load(sys.stdin))))))
