"""What trains: an ordered table of named groups, each frozen, trained whole or through LoRA. The only door to PEFT.

First match wins: every parameter goes to the first group whose pattern matches its whole name. In mode `lora` a group takes
only the adapters of the linear weights it matches and leaves the weights to the groups after it. Names are those before LoRA
injection (no `.base_layer`). Works on any module with these names, on the meta device too. Knows no data, loop or checkpoint.
"""

import difflib
import math
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import peft
import torch
from torch import nn

from mvwan.config import LoraConfig, TrainableConfig, TrainConfig
from mvwan.errors import MvwanError, nearest, some
from mvwan.model.adapters import exchange_layers
from mvwan.model.trainable_table import Mode, Row, TrainableTable, moment_bytes

_QKVO = r"(to_q|to_k|to_v|to_out\.0)\.weight"
_FFN = r"ffn\.net\.(0\.proj|2)\.weight"
REST = "rest"


@dataclass(frozen=True)
class Group:
    """One rule of the table: `pattern` must match a parameter's whole name."""

    name: str
    pattern: str
    mode: Mode
    description: str


GROUPS: tuple[Group, ...] = (
    Group("lora", rf"blocks\.\d+\.(attn[12]\.{_QKVO}|{_FFN})", "lora", "self-attention, cross-attention, feed-forward"),
    Group("lora_mvs", rf"blocks\.\d+\.mvs_attn\.{_QKVO}", "lora", "view attention"),
    Group("patch_embedding", r"patch_embedding(_heatmap)?\.(weight|bias)", "full", "latents to tokens"),
    Group("heads", r"head_(rgb|heatmap)\..+", "full", "tokens to velocity, each with its own modulation"),
    Group("action_head", r"head_action\..+", "full", "tokens to gripper and rotation; only where the model has this head"),
    Group("projector", r"blocks\.\d+\.projector\.(weight|bias)", "full", "output of view attention, zero at the start"),
    Group("modulation_mvs", r"blocks\.\d+\.modulation_mvs", "full", "time modulation of view attention"),
    Group("camera_code", r"blocks\.\d+\.camera_code\.weight", "full", "rays to view attention; only where views are told apart by camera"),
    Group("modulation", r"blocks\.\d+\.scale_shift_table", "frozen", "AdaLN time modulation of the block (switch)"),
    Group("mvs_norms", r"blocks\.\d+\.mvs_attn\.norm_[qk]\.weight", "frozen", "norm_q and norm_k of view attention (switch)"),
    Group("backbone_norms", r"blocks\.\d+\.(attn[12]\.norm_[qk]\.weight|norm2\.(weight|bias))", "frozen", "the other norms of the blocks"),
    Group("biases", r"blocks\.\d+\.(attn1|attn2|mvs_attn|ffn)\..+\.bias", "frozen", "biases of attention and feed-forward"),
    Group("text_embedding", r"condition_embedder\.text_embedder\..+", "frozen", "prompt to tokens"),
    Group("time_embedding", r"condition_embedder\.(time_embedder|time_proj)\..+", "frozen", "timestep to modulation"),
    Group("all", r".+", "frozen", "everything that no group before took"),
)
ACTION_GROUP, CAMERA_GROUP = "action_head", "camera_code"
SWITCH_GROUPS = ("modulation", "mvs_norms")
"""What `unfreeze_modulation_and_norms` sets to `full`."""

_ADAPTER = re.compile(r"(.+)\.lora_[AB]\.default\.weight")
_WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})


@dataclass(frozen=True, kw_only=True)
class ResolvedGroup:
    """A group with every setting decided."""

    name: str
    pattern: str
    mode: Mode
    learning_rate: float
    weight_decay: float
    """Of weight matrices and adapters."""
    vector_weight_decay: float
    """Of norms, tables and biases."""
    warmup_steps: int
    optimizer: str
    """The name in `train.optimizer`, the same for all groups."""
    described: str
    """How messages point at its rule, for example `trainable.groups.mine.pattern='...'`."""


@dataclass(frozen=True, kw_only=True)
class _Claims:
    """Which group takes which parameter."""

    weights: dict[str, str] = field(default_factory=dict)
    """Name before injection -> group that owns the tensor itself."""
    adapters: dict[str, str] = field(default_factory=dict)
    """Name of a linear weight before injection -> group whose LoRA adapts it."""


def resolve_groups(
    trainable: TrainableConfig,
    unfreeze_modulation_and_norms: bool = False,
    train: TrainConfig | None = None,
    action_head: str = "none",
    view_code: str = "slot",
) -> tuple[ResolvedGroup, ...]:
    """The groups in the order of the rules, those of the user first; `train` None takes its default values.

    `action_head` and `view_code` are the model's; groups of parts that it does not have are not there. Raises
    `MvwanError` for an unknown group, a bad pattern or value, and a switch that a group contradicts.
    """
    train = train or TrainConfig()
    absent = {ACTION_GROUP} if action_head == "none" else set[str]()
    absent |= {CAMERA_GROUP} if view_code == "slot" else set()
    built_in = [group for group in _with_lora_flags(trainable.lora) if group.name not in absent]
    for name in trainable.groups:
        _check_override(trainable, name, [group.name for group in built_in])
    own = [Group(name, given.pattern, given.mode or "frozen", "") for name, given in trainable.groups.items() if given.pattern is not None]
    resolved = []
    for group in [*own, *built_in]:
        mode = _mode(trainable, group, unfreeze_modulation_and_norms)
        resolved.append(_resolve(trainable, group, mode, train))
    return tuple(resolved)


def _check_override(trainable: TrainableConfig, name: str, built_in: Sequence[str]) -> None:
    given, where = trainable.groups[name], f"trainable.groups.{name}"
    if name == REST:
        raise MvwanError(f"{where}: this name is kept for what no group takes. Choose another name.")
    if name == ACTION_GROUP and name not in built_in:
        raise MvwanError(f"{where}: model.action_head=none has no such layers. Remove {where}, or set model.action_head.")
    if name == CAMERA_GROUP and name not in built_in:
        raise MvwanError(f"{where}: model.view_code=slot has no such layers. Remove {where}, or set model.view_code.")
    if name not in built_in and name in (group.name for group in GROUPS):
        raise MvwanError(f"{where}: trainable.lora leaves this group no layer. Remove {where}, or set a flag of trainable.lora to true.")
    if name in built_in and given.pattern is not None:
        raise MvwanError(f"{where}.pattern: {name!r} is a built-in group with its own pattern. Remove the pattern, or choose another name.")
    if name not in built_in and given.pattern is None:
        raise MvwanError(
            f"{where}: no such group.{nearest(name, built_in)} Built-in groups are {', '.join(built_in)}; "
            "a group of your own needs a `pattern`."
        )
    if name not in built_in and given.mode is None:
        raise MvwanError(f"{where}: a group of your own needs a mode: frozen, full or lora. Set {where}.mode.")
    if given.pattern is not None:
        try:
            re.compile(given.pattern)
        except re.error as error:
            raise MvwanError(f"{where}.pattern={given.pattern!r}: not a regular expression ({error}). Set {where}.pattern.") from None
    for setting, minimum in (("learning_rate", "more than 0"), ("weight_decay", "at least 0"), ("warmup_steps", "at least 0")):
        value = getattr(given, setting)
        if value is not None and (value < 0 or (value == 0 and minimum == "more than 0")):
            raise MvwanError(f"{where}.{setting}={value}: must be {minimum}. Set {where}.{setting}.")


def _with_lora_flags(lora: LoraConfig) -> list[Group]:
    """`GROUPS` with the patterns of `lora` and `lora_mvs` cut to the layers that the flags name; without those left empty."""
    parts = []
    if lora.self_attention:
        parts.append(rf"attn1\.{_QKVO}")
    if lora.cross_attention:
        parts.append(rf"attn2\.{_QKVO}")
    if lora.ffn:
        parts.append(_FFN)
    groups = []
    for group in GROUPS:
        if group.name == "lora":
            if parts:
                groups.append(Group(group.name, rf"blocks\.\d+\.({'|'.join(parts)})", group.mode, group.description))
        elif group.name != "lora_mvs" or lora.view_attention:
            groups.append(group)
    return groups


def _mode(trainable: TrainableConfig, group: Group, unfreeze: bool) -> Mode:
    given = trainable.groups.get(group.name)
    mode = given.mode if given is not None else None
    if unfreeze and group.name in SWITCH_GROUPS:
        if mode not in (None, "full"):
            raise MvwanError(
                f"unfreeze_modulation_and_norms=true trains the group {group.name!r} whole, trainable.groups.{group.name}.mode={mode} "
                f"says otherwise. Turn the switch off, or remove trainable.groups.{group.name}.mode."
            )
        return "full"
    return mode or group.mode


def _resolve(trainable: TrainableConfig, group: Group, mode: Mode, train: TrainConfig) -> ResolvedGroup:
    given, where = trainable.groups.get(group.name), f"trainable.groups.{group.name}"
    is_own = given is not None and given.pattern is not None
    rate = given.learning_rate if given is not None else None
    decay = given.weight_decay if given is not None else None
    warmup = given.warmup_steps if given is not None else None
    unread = [name for name, value in (("learning_rate", rate), ("weight_decay", decay), ("warmup_steps", warmup)) if value is not None]
    if mode == "frozen" and unread and group.name not in SWITCH_GROUPS:
        raise MvwanError(f"{where}.{unread[0]}: the group is frozen, so nothing reads it. Set {where}.mode=full, or remove this setting.")
    return ResolvedGroup(
        name=group.name,
        pattern=group.pattern,
        mode=mode,
        learning_rate=train.learning_rate if rate is None else rate,
        weight_decay=train.weight_decay if decay is None else decay,
        vector_weight_decay=0.0 if decay is None else decay,
        warmup_steps=train.warmup_steps if warmup is None else warmup,
        optimizer=train.optimizer,
        described=f"{where}.pattern={group.pattern!r}" if is_own else f"group {group.name!r} (mode {mode})",
    )


def apply(model: nn.Module, groups: Sequence[ResolvedGroup], *, rank: int, alpha: float | None = None) -> TrainableTable:
    """The table of what trains, after making it so: adapters injected, then every parameter frozen or not, trained ones float32.

    `alpha` None means `rank`. Adapters start with A random (seed torch before the call) and B zero, so outputs do not change.
    Raises `MvwanError`, with the model untouched, when a group takes nothing or nothing trains.
    """
    assert not any(_ADAPTER.fullmatch(name) for name in parameters_by_name(model)), "the model has adapters already"
    claims = _claim(model, groups)
    _check_claims(model, groups, claims)
    if claims.adapters:
        _inject(model, [name.removesuffix(".weight") for name in claims.adapters], rank, rank if alpha is None else alpha)
    modes = _modes(groups)
    for name, parameter in parameters_by_name(model).items():
        trains = _ADAPTER.fullmatch(name) is not None or modes[claims.weights[stock_name(name)]] == "full"
        parameter.requires_grad_(trains)
        if trains and parameter.dtype != torch.float32:
            parameter.data = parameter.data.to(torch.float32)
    table = build_table(model, groups)
    verify_trainable(model, table)
    return table


def _inject(model: nn.Module, targets: Sequence[str], rank: int, alpha: float) -> None:
    is_meta = any(parameter.is_meta for parameter in model.parameters())
    # PEFT takes alpha / rank as it is; its annotation alone asks for an integer.
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets), lora_dropout=0.0, bias="none")  # pyright: ignore[reportArgumentType]
    peft.inject_adapter_in_model(config, model, low_cpu_mem_usage=is_meta)
    exchange_layers(model)
    adapted = {match[1] for name in parameters_by_name(model) if (match := _ADAPTER.fullmatch(name))}
    assert adapted == set(targets), f"PEFT adapted other layers than asked: {sorted(adapted ^ set(targets))[:5]}"


@dataclass(frozen=True, kw_only=True)
class MergeReport:
    """What `merge_adapters` did."""

    layers: int
    """Weights that took an adapter in."""
    lost: float
    """Norm of what rounding took away over the norm of what the adapters add; 0 in float32."""


@torch.no_grad()
def merge_adapters(model: nn.Module, dtype: torch.dtype) -> MergeReport:
    """What it took to fold each adapter into its weight, computed in float32 and stored in `dtype`; `model` then holds no adapter.

    Layer by layer and in place, so that no second copy of the model is ever in memory.
    """
    adapted = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, peft.tuners.lora.Linear)]
    lost_squares, added_squares = 0.0, 0.0
    for name, layer in adapted:
        stock_layer: Any = layer.get_base_layer()
        added = layer.get_delta_weight("default").float()
        exact = stock_layer.weight.float() + added
        stock_layer.weight.data = exact.to(dtype)
        lost_squares += float(torch.linalg.vector_norm(stock_layer.weight.float() - exact, dtype=torch.float64)) ** 2
        added_squares += float(torch.linalg.vector_norm(added, dtype=torch.float64)) ** 2
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, stock_layer)
    if adapted:
        del model.peft_config
    assert not any(_ADAPTER.fullmatch(name) for name in parameters_by_name(model)), "an adapter is left"
    return MergeReport(layers=len(adapted), lost=math.sqrt(lost_squares / added_squares) if added_squares else 0.0)


def parameters_by_name(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters by their own full names: parts that DDP, FSDP and torch.compile put into names are left out."""
    return {_unwrapped(name): parameter for name, parameter in model.named_parameters()}


def stock_name(name: str) -> str:
    """The name that a weight had before LoRA injection."""
    return name.replace(".base_layer.", ".")


def adapted_weight(name: str) -> str | None:
    """The name of the weight that an adapter's tensor adapts, as it was before LoRA injection; None for any other tensor."""
    adapter = _ADAPTER.fullmatch(name)
    return f"{adapter[1]}.weight" if adapter else None


def names_by_group(names: Iterable[str]) -> dict[str, list[str]]:
    """{group: names} by the built-in rules, in their order: for a checkpoint that does not name its groups."""
    grouped: dict[str, list[str]] = {group.name: [] for group in GROUPS} | {REST: []}
    for name in names:
        weight = adapted_weight(name)
        rules = [group for group in GROUPS if (group.mode == "lora") == (weight is not None)]
        fitting = (group.name for group in rules if re.fullmatch(group.pattern, weight or stock_name(name)))
        grouped[next(fitting, REST)].append(name)
    return {group: held for group, held in grouped.items() if held}


def _unwrapped(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _stock_names(model: nn.Module) -> list[str]:
    return [stock_name(name) for name in parameters_by_name(model) if not _ADAPTER.fullmatch(name)]


def _linear_weights(model: nn.Module) -> set[str]:
    linear = (name for name, module in model.named_modules() if isinstance(module, nn.Linear) and ".lora_" not in name)
    return {stock_name(f"{_unwrapped(name)}.weight") for name in linear}


def _claim(model: nn.Module, groups: Sequence[ResolvedGroup]) -> _Claims:
    """First match wins; the same before and after injection."""
    rules = [(group, re.compile(group.pattern)) for group in groups]
    linear_weights = _linear_weights(model)
    claims = _Claims()
    for name in _stock_names(model):
        for group, pattern in rules:
            if not pattern.fullmatch(name):
                continue
            if group.mode != "lora":
                claims.weights[name] = group.name
                break
            if name in linear_weights:
                claims.adapters.setdefault(name, group.name)
        claims.weights.setdefault(name, REST)
    return claims


def _check_claims(model: nn.Module, groups: Sequence[ResolvedGroup], claims: _Claims) -> None:
    names, linear_weights = _stock_names(model), _linear_weights(model)
    filled = {*claims.weights.values(), *claims.adapters.values()}
    for group in groups:
        if group.name not in filled and (group.name, group.mode) != ("all", "frozen"):
            raise MvwanError(_why_empty(group, names, linear_weights, claims))
    if not any(group.mode != "frozen" for group in groups):
        raise MvwanError("every group is frozen, so nothing would train. Set trainable.groups.<name>.mode=full or lora for one of them.")


def _why_empty(group: ResolvedGroup, names: Sequence[str], linear_weights: Collection[str], claims: _Claims) -> str:
    matched = [name for name in names if re.fullmatch(group.pattern, name)]
    if not matched:
        return f"{group.described} matches no parameter of the model.{_closest(group.pattern, names, claims)}"
    takers = claims.weights
    if group.mode == "lora":
        linear = [name for name in matched if name in linear_weights]
        if not linear:
            return (
                f"{group.described} holds no weight of a linear layer, which LoRA needs (it matches {some(matched)}). "
                f"Set trainable.groups.{group.name}.mode to full or frozen."
            )
        matched, takers = linear, claims.weights | claims.adapters
    before = list(dict.fromkeys(takers[name] for name in matched))
    own = [name for name in before if name not in {built_in.name for built_in in GROUPS}]
    remedy = f"Narrow the pattern of {_and(own)}, or remove it and set" if own else f"Set the mode of {_and(before)} rather than of"
    return (
        f"{group.described} is left with nothing: all {len(matched)} parameters that it matches are taken by {_and(before)} before it. "
        f"{remedy} trainable.groups.{group.name}."
    )


def _and(names: Iterable[str]) -> str:
    return " and ".join(repr(name) for name in names)


def _closest(pattern: str, names: Sequence[str], claims: _Claims) -> str:
    """A hint for a pattern that matches nothing: names that it finds in part, or the parameter and group that look most like it."""
    partial = [name for name in names if re.search(pattern, name)]
    if partial:
        return f" It must match the whole name: {f'.*({pattern}).*'!r} would match {some(partial)}."
    plain = re.sub(r"\\d[+*]?|\[0-9\][+*]?", "0", pattern).replace("\\", "")
    shapes = {re.sub(r"\d+", "0", name): name for name in reversed(names)}
    name = shapes[difflib.get_close_matches(plain, list(shapes), n=1, cutoff=0.0)[0]]
    return f" Nearest is {name!r} of the group {claims.adapters.get(name, claims.weights[name])!r}."


def build_table(model: nn.Module, groups: Sequence[ResolvedGroup]) -> TrainableTable:
    """The table of a model that `apply` has prepared with these groups."""
    claims = _claim(model, groups)
    members: dict[str, dict[str, nn.Parameter]] = {group.name: {} for group in groups} | {REST: {}}
    for name, parameter in parameters_by_name(model).items():
        members[_owner(name, claims)][name] = parameter
    modes = _modes(groups)
    optimizers = {group.name: group.optimizer for group in groups}
    rows = tuple(_row(name, modes[name], held, optimizers.get(name, "")) for name, held in members.items() if held)
    return TrainableTable(rows=rows)


def _modes(groups: Sequence[ResolvedGroup]) -> dict[str, Mode]:
    modes: dict[str, Mode] = {group.name: group.mode for group in groups}
    modes[REST] = "frozen"
    return modes


def _owner(name: str, claims: _Claims) -> str:
    adapter = _ADAPTER.fullmatch(name)
    return claims.adapters[f"{adapter[1]}.weight"] if adapter else claims.weights[stock_name(name)]


def _row(name: str, mode: Mode, held: dict[str, nn.Parameter], optimizer: str) -> Row:
    dtypes = {str(parameter.dtype).removeprefix("torch.") for parameter in held.values()}
    return Row(
        name=name,
        mode=mode,
        parameters=sum(parameter.numel() for parameter in held.values()),
        dtype="+".join(sorted(dtypes)),
        names=tuple(held),
        optimizer_bytes=0 if mode == "frozen" else sum(moment_bytes(optimizer, parameter.shape) for parameter in held.values()),
    )


def optimizer_groups(model: nn.Module, groups: Sequence[ResolvedGroup]) -> list[dict[str, Any]]:
    """Parameter groups for a torch optimizer: `params`, `names`, `lr`, `weight_decay`, `warmup_steps`, `group`.

    A group whose matrices decay at another rate than its norms, tables and biases becomes two.
    """
    claims = _claim(model, groups)
    parameters = {name: parameter for name, parameter in parameters_by_name(model).items() if parameter.requires_grad}
    result = []
    for group in groups:
        by_decay: dict[float, dict[str, nn.Parameter]] = {}
        for name, parameter in parameters.items():
            if _owner(name, claims) == group.name:
                decay = group.weight_decay if _is_matrix(name, parameter) else group.vector_weight_decay
                by_decay.setdefault(decay, {})[name] = parameter
        for decay, held in by_decay.items():
            settings = {"lr": group.learning_rate, "weight_decay": decay, "warmup_steps": group.warmup_steps, "group": group.name}
            result.append({"params": list(held.values()), "names": list(held), **settings})
    return result


def _is_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Weights of linear and convolution layers and adapters; not norms (vectors), biases, or tables (named otherwise)."""
    return name.endswith(".weight") and parameter.ndim > 1


def verify_trainable(model: nn.Module, table: TrainableTable, optimizer: Any = None) -> None:
    """Nothing, or `MvwanError` with names when what trains in `model`, in `table` and in `optimizer` is not the same set.

    Also when a trained tensor is not float32: steps of a usual learning rate vanish in bfloat16. Call it once more after
    wrapping and after the optimizer is made.
    """
    parameters = parameters_by_name(model)
    expected = set(table.trainable_names)
    actual = {name for name, parameter in parameters.items() if parameter.requires_grad}
    problems = [_differences("the table trains them, the model has them frozen", expected - actual, parameters)]
    problems.append(_differences("they train, the table has them frozen", actual - expected, parameters))
    narrow = {name for name in expected & actual if parameters[name].dtype != torch.float32}
    problems.append(_differences("they train but are not float32, so small steps would be lost", narrow, parameters))
    if optimizer is not None:
        stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        held = {name for name, parameter in parameters.items() if id(parameter) in stepped}
        problems.append(_differences("they train, the optimizer does not hold them", expected - held, parameters))
        problems.append(_differences("they are frozen, the optimizer holds them", held - expected, parameters))
        if strangers := len(stepped) - len(held):
            problems.append(f"the optimizer holds {strangers} tensors that are not in the model")
    found = [problem for problem in problems if problem]
    if found:
        raise MvwanError(f"what trains is not what the table says: {'; '.join(found)}. Apply the groups after anything that freezes.")


def _differences(problem: str, names: Collection[str], parameters: dict[str, nn.Parameter]) -> str:
    """`problem` with the names in the order of the model, or an empty string when there are none."""
    ordered = [name for name in parameters if name in names] + sorted(set(names) - parameters.keys())
    return f"{problem}: {some(ordered)}" if ordered else ""
