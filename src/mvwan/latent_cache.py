"""Encode each window once, store it, read it back as a `Batch`. After that, training needs neither VAE nor text encoder.

    <folder>/
        ab/abcdef….safetensors      rgb, heat [V C f h w] float32 and heat_valid [V f] of one variant of one window
        text/abcdef….safetensors    text [L D] float32 of one instruction

A name is the hash of everything its content depends on: pixels and labels of the sample, VAE, heatmap size, format. So a changed
setting finds nothing rather than something old, and runs may share a folder. Entries appear whole, carry a digest of their bits and
are encoded again when these do not agree. What the gripper and the hand did is not stored: a batch has it from the episodes, so an
action head needs no other entries. Knows no loop, no loss and no noise.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from mvwan.batch import Batch, Sample
from mvwan.data.dataset import WindowDataset, heat_video
from mvwan.errors import MvwanError
from mvwan.files import sha256_json, whole_file
from mvwan.model.latents import LatentCodec
from mvwan.shapes import frames_of_latent, num_latent_frames
from mvwan.tensors import TensorFile, digest, write_tensors

_FORMAT = 1
"""Raised whenever the code changes what an entry holds."""
_TEXTS_IN_MEMORY = 256
_HELD = {"samples": {"rgb": ("float32", 5), "heat": ("float32", 5), "heat_valid": ("bool", 2)}, "text": {"text": ("float32", 2)}}
"""Type and number of axes of each tensor of an entry."""


@dataclass(frozen=True)
class _Keys:
    """Where the entries of a dataset lie. Item = window * variants + variant."""

    samples: tuple[Path, ...]
    texts: tuple[Path, ...]
    sample_ids: tuple[str, ...]
    instructions: tuple[str, ...]
    actions: tuple[tuple[np.ndarray, np.ndarray], ...]
    """`WindowDataset.actions` of each item."""


def _keys(folder: Path, dataset: WindowDataset, codec_digest: str, sigma_px: float) -> _Keys:
    items = [divmod(item, dataset.num_variants) for item in range(len(dataset) * dataset.num_variants)]
    names = [sha256_json([_FORMAT, dataset.sample_fingerprint(*item), codec_digest, sigma_px]) for item in items]
    instructions = [dataset.windows[index].episode.instruction for index, _ in items]
    text_of = {text: sha256_json([_FORMAT, text, codec_digest]) for text in set(instructions)}
    return _Keys(
        samples=tuple(folder / name[:2] / f"{name}.safetensors" for name in names),
        texts=tuple(folder / "text" / f"{text_of[text]}.safetensors" for text in instructions),
        sample_ids=tuple(dataset.sample_id(*item) for item in items),
        instructions=tuple(instructions),
        actions=tuple(dataset.actions(index) for index, _ in items),
    )


class LatentCache:
    """The encoded windows of a dataset. Items are numbered window * variants + variant."""

    def __init__(self, keys: _Keys, encoded: int = 0, healed: int = 0) -> None:
        self._keys = keys
        self.encoded = encoded
        """Entries that were encoded now; the others were there."""
        self.healed = healed
        """Entries among them that were there but damaged."""
        self._read_text = lru_cache(maxsize=_TEXTS_IN_MEMORY)(lambda path: _read(path)["text"])

    @classmethod
    def open(cls, folder: str | Path, dataset: WindowDataset, codec_digest: str, sigma_px: float) -> "LatentCache":
        """The cache that `build_cache` filled. Raises `MvwanError` when an entry is not there."""
        keys = _keys(Path(folder), dataset, codec_digest, sigma_px)
        missing = [name for path, name in zip(keys.samples, keys.sample_ids, strict=True) if not path.is_file()]
        if missing:
            raise MvwanError(
                f"latent cache {folder}: {len(missing)} of {len(keys.samples)} windows are not encoded (first is {missing[0]}). "
                "Run `mvwan cache` with the same settings, or train without a cache of your own."
            )
        return cls(keys)

    def __len__(self) -> int:
        return len(self._keys.samples)

    def __getstate__(self) -> dict[str, object]:
        # The memo of texts is a closure, which worker processes cannot be sent; each makes its own.
        return {"_keys": self._keys, "encoded": self.encoded, "healed": self.healed}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__init__(state["_keys"], state["encoded"], state["healed"])  # type: ignore[misc, arg-type]

    def batch(self, items: Sequence[int]) -> Batch:
        """The items as one batch on the CPU. Raises `MvwanError` for an entry that is damaged."""
        entries = [_read(self._keys.samples[item]) for item in items]
        return Batch(
            sample_ids=tuple(self._keys.sample_ids[item] for item in items),
            rgb=torch.stack([entry["rgb"] for entry in entries]),
            heat=torch.stack([entry["heat"] for entry in entries]),
            heat_valid=torch.stack([entry["heat_valid"] for entry in entries]),
            text=torch.stack([self._read_text(self._keys.texts[item]) for item in items]),
            gripper_open=torch.stack([torch.from_numpy(self._keys.actions[item][0]) for item in items]),
            rotation_deg=torch.stack([torch.from_numpy(self._keys.actions[item][1]) for item in items]),
        )


def is_complete(folder: str | Path, dataset: WindowDataset, codec_digest: str, sigma_px: float) -> bool:
    """Whether every entry is there and whole: then `build_cache`, and the codec it needs, can be left out."""
    keys = _keys(Path(folder), dataset, codec_digest, sigma_px)
    return all(_state(path) == "whole" for path in {*keys.samples, *keys.texts})


def build_cache(dataset: WindowDataset, codec: LatentCodec, folder: str | Path, sigma_px: float, progress: bool = True) -> LatentCache:
    """The complete cache, after encoding what was not there. An entry that is damaged is encoded again, and that is said.

    An interrupted build goes on where it stopped. Raises `MvwanError` when the disk does not take an entry.
    """
    keys = _keys(Path(folder), dataset, codec.digest, sigma_px)
    healed = encoded = 0
    bar = tqdm(total=len(keys.samples), desc="encode windows", unit="window", disable=not progress)
    with bar:
        for item, path in enumerate(keys.samples):
            state = _state(path)
            if state == "damaged":
                healed += 1
                tqdm.write(f"latent cache: {keys.sample_ids[item]} was damaged and is encoded again")
            if state != "whole":
                encoded += 1
                sample = dataset.sample(*divmod(item, dataset.num_variants))
                _write(path, _encode(sample, codec, sigma_px))
            bar.update()
    for path, instruction in dict(zip(keys.texts, keys.instructions, strict=True)).items():
        if _state(path) != "whole":
            _write(path, {"text": codec.encode_text([instruction])[0]})
    return LatentCache(keys, encoded, healed)


def _encode(sample: Sample, codec: LatentCodec, sigma_px: float) -> dict[str, torch.Tensor]:
    both = codec.encode_video(np.concatenate([sample.rgb, heat_video(sample, sigma_px)]))
    rgb, heat = both.chunk(2)
    return {"rgb": rgb.contiguous(), "heat": heat.contiguous(), "heat_valid": torch.from_numpy(heat_valid(sample.visible))}


def heat_valid(visible: np.ndarray) -> np.ndarray:
    """[V f] bool of visible [V F]: a latent frame counts when every frame in it shows the point."""
    latent_frames = num_latent_frames(visible.shape[1])
    return np.stack([visible[:, list(frames_of_latent(frame))].all(axis=1) for frame in range(latent_frames)], axis=1)


def _write(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    with whole_file(path) as partial:
        write_tensors(partial, tensors, {"digest": digest(tensors)})


def _state(path: Path) -> str:
    """`whole`, `damaged` or `absent`."""
    if not path.is_file():
        return "absent"
    try:
        _read(path)
    except MvwanError:
        return "damaged"
    return "whole"


def _read(path: Path) -> dict[str, torch.Tensor]:
    again = "Start the run again: it encodes the entry anew."
    try:
        file = TensorFile(path)
        tensors = dict(file)
    except MvwanError as error:
        raise MvwanError(f"latent cache entry {error}. {again}") from None
    if file.metadata.get("digest") != digest(tensors):
        raise MvwanError(f"latent cache entry {path}: damaged, its bits are not those that were written. {again}")
    needed = _HELD.get(path.parent.name, _HELD["samples"])
    held = {name: (file.dtypes[name], len(shape)) for name, shape in file.shapes.items()}
    if held != needed:
        raise MvwanError(f"latent cache entry {path}: holds {held}, needs {needed}. {again}")
    return tensors
