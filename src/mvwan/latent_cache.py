"""Encode each window once, store it, read it back as a `Batch`. After that, training needs neither VAE nor text encoder.

    <folder>/
        shards/                     see `latent_shards`: rgb, heat [V C f h w] float32 and heat_valid [V f] of a variant of a window
        text/abcdef….safetensors    text [L D] float32 of one instruction
        skipped/abcdef….json        why a window has no entry: one of its pictures is damaged; written with data.on_corrupt=skip alone
        ab/abcdef….safetensors      a window's entry as older versions wrote it, still read

A key is the hash of everything its content depends on: pixels and labels of the sample, VAE, heatmap size, format. So a changed
setting finds nothing rather than something old, and runs may share a folder. Entries appear whole, carry a digest of their bits and
are encoded again when these do not agree. A window is encoded in a call of its own: with others beside it its last bits may differ,
and an entry must not depend on what was encoded together with it. What the gripper and the hand did is not stored: a batch has it
from the episodes, so an action head needs no other entries. Knows no loop, no loss and no noise.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from tqdm import tqdm

from mvwan.batch import Batch, Sample, camera_rays
from mvwan.data.dataset import WindowDataset, heat_video
from mvwan.data.fields import get
from mvwan.data.left_out import LeftOut
from mvwan.errors import MvwanError
from mvwan.files import read_json, sha256_json, whole_file, write_json
from mvwan.latent_shards import AGAIN, Kinds, Shards, ShardWriter
from mvwan.model.latents import LatentCodec
from mvwan.shapes import frames_of_latent, num_latent_frames
from mvwan.tensors import TensorFile, digest, write_tensors

_FORMAT = 1
"""Raised whenever the code changes what an entry holds."""
_TEXTS_IN_MEMORY = 256
WINDOW: Kinds = {"rgb": ("float32", 5), "heat": ("float32", 5), "heat_valid": ("bool", 2)}
TEXT: Kinds = {"text": ("float32", 2)}
_IN_A_FILE = -1
"""Place of an entry that has a file of its own."""


@dataclass(frozen=True)
class Keys:
    """Where the entries of a dataset lie. Item = window * variants + variant."""

    folder: Path
    dataset: WindowDataset
    codec_digest: str
    sigma_px: float

    def __len__(self) -> int:
        return len(self.dataset) * self.dataset.num_variants

    def key(self, item: int) -> bytes:
        """32 bytes."""
        fingerprint = self.dataset.sample_fingerprints[item].tobytes().hex()
        return bytes.fromhex(sha256_json([_FORMAT, fingerprint, self.codec_digest, self.sigma_px]))

    def all(self) -> np.ndarray:
        """[N 32] uint8: the keys of all items."""
        return np.frombuffer(b"".join(self.key(item) for item in range(len(self))), np.uint8).reshape(-1, 32)

    def file(self, item: int) -> Path:
        """The file that an older version would have made of the item's entry."""
        name = self.key(item).hex()
        return self.folder / name[:2] / f"{name}.safetensors"

    def text(self, instruction: str) -> Path:
        """The file of an instruction."""
        return self.folder / "text" / f"{sha256_json([_FORMAT, instruction, self.codec_digest])}.safetensors"

    def texts(self) -> dict[str, Path]:
        """Instruction -> its file, of the whole dataset."""
        return {text: self.text(text) for text in dict.fromkeys(episode.instruction for episode in self.dataset.windows.used_episodes())}

    def sample_id(self, item: int) -> str:
        """As `Sample` has it."""
        return self.dataset.sample_id(*divmod(item, self.dataset.num_variants))

    def find(self, shards: Shards) -> tuple[np.ndarray, np.ndarray]:
        """([N] int64 places of all items in the shards, or `_IN_A_FILE`; numbers of the items that have no entry at all)."""
        places = shards.find(self.all())
        files = self.folder.is_dir() and any(len(path.name) == 2 for path in self.folder.iterdir())
        absent = [item for item in np.flatnonzero(places < 0).tolist() if not (files and self.file(item).is_file())]
        return places, np.array(absent, np.int64)

    @cached_property
    def skipped(self) -> dict[int, LeftOut]:
        """Window -> why it is left out, as the cache says; nothing unless `data.on_corrupt` is skip."""
        marks = {path.stem: path for path in (self.folder / "skipped").glob("[!.]*.json")} if self.dataset.data.on_corrupt == "skip" else {}
        if not marks:
            return {}
        found: dict[int, LeftOut] = {}
        for item, key in enumerate(self.all()):
            if (name := key.tobytes().hex()) in marks:
                reason = get(read_json(marks[name]), "reason", "text", marks[name])
                found.setdefault(item // self.dataset.num_variants, LeftOut(name=self.sample_id(item), reason=reason))
        return found

    def skip(self, item: int, error: MvwanError) -> None:
        """Nothing; every process, and whoever resumes, leaves the window of this item out, whether it can be read by then or not."""
        mark = {"sample_id": self.sample_id(item), "reason": str(error)}
        write_json(self.folder / "skipped" / f"{self.key(item).hex()}.json", mark)

    def kept(self) -> "Keys":
        """The keys of the windows that are not left out. `MvwanError` when all are."""
        if self.skipped and len(self.skipped) == len(self.dataset):
            first = next(iter(self.skipped.values()))
            raise MvwanError(f"data.on_corrupt=skip: all {len(self.skipped)} windows of a split are damaged. The first: {first.reason}")
        return replace(self, dataset=self.dataset.without(self.skipped))


class LatentCache:
    """The encoded windows of a dataset. Items are numbered window * variants + variant, of the windows that are not left out."""

    def __init__(self, folder: str | Path, dataset: WindowDataset, codec_digest: str, sigma_px: float) -> None:
        every = Keys(Path(folder), dataset, codec_digest, sigma_px)
        self.skipped = tuple(every.skipped.values())
        """Windows that are left out because a picture of theirs is damaged; see `data.on_corrupt`."""
        self._keys = every.kept()
        self.dataset = self._keys.dataset
        """The windows that are there."""
        self.encoded = 0
        """Entries that `build_cache` encoded now; the others were there."""
        self.healed = 0
        """Entries among them that were there but damaged."""
        self._shards = Shards(self._keys.folder, WINDOW)
        self._places, absent = self._keys.find(self._shards)
        if len(absent):
            raise MvwanError(
                f"latent cache {folder}: {len(absent)} of {len(self)} windows are not encoded (first is "
                f"{self._keys.sample_id(int(absent[0]))}). Run `mvwan cache` with the same settings, or train without a cache of your own."
            )
        self._shards.forget_keys()
        self._read_text = self._text_reader()

    @classmethod
    def open(cls, folder: str | Path, dataset: WindowDataset, codec_digest: str, sigma_px: float) -> "LatentCache":
        """The cache that `build_cache` filled. Raises `MvwanError` when an entry is not there."""
        return cls(folder, dataset, codec_digest, sigma_px)

    def __len__(self) -> int:
        return len(self._keys)

    def __getstate__(self) -> dict[str, Any]:
        # The memo of texts is a closure, which worker processes cannot be sent; each makes its own.
        return {name: value for name, value in self.__dict__.items() if name != "_read_text"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._read_text = self._text_reader()

    def _text_reader(self) -> Any:
        return lru_cache(maxsize=_TEXTS_IN_MEMORY)(lambda instruction: read_entry(self._keys.text(instruction), TEXT)["text"])

    def _read(self, item: int) -> dict[str, torch.Tensor]:
        place = int(self._places[item])
        return read_entry(self._keys.file(item), WINDOW) if place == _IN_A_FILE else self._shards.read(place)

    def heat(self, item: int) -> torch.Tensor:
        """[V C f h w] float32 latents of the heatmaps of one item. `MvwanError` when its entry is damaged."""
        return self._read(item)["heat"]

    def batch(self, items: Sequence[int], with_rays: bool = False) -> Batch:
        """The items as one batch on the CPU, with the rays of their cameras on request. `MvwanError` for an entry that is damaged."""
        entries, dataset = [self._read(item) for item in items], self.dataset
        windows = [divmod(item, dataset.num_variants) for item in items]
        actions = [dataset.actions(index) for index, _ in windows]
        texts = [self._read_text(dataset.windows[index].episode.instruction) for index, _ in windows]
        cells = entries[0]["rgb"].shape[-2:]
        return Batch(
            sample_ids=tuple(dataset.sample_id(*window) for window in windows),
            rgb=torch.stack([entry["rgb"] for entry in entries]),
            heat=torch.stack([entry["heat"] for entry in entries]),
            heat_valid=torch.stack([entry["heat_valid"] for entry in entries]),
            text=torch.stack(texts),
            gripper_open=torch.stack([torch.from_numpy(gripper_open) for gripper_open, _ in actions]),
            rotation_deg=torch.stack([torch.from_numpy(rotation_deg) for _, rotation_deg in actions]),
            rays=torch.stack([camera_rays(dataset.cameras(*window), *cells) for window in windows]) if with_rays else None,
        )


def is_complete(folder: str | Path, dataset: WindowDataset, codec_digest: str, sigma_px: float) -> bool:
    """Whether every entry is there and whole: then `build_cache`, and the codec it needs, can be left out."""
    keys = Keys(Path(folder), dataset, codec_digest, sigma_px).kept()
    shards = Shards(keys.folder, WINDOW)
    places, absent = keys.find(shards)
    if len(absent) or shards.damaged(places[places >= 0]):
        return False
    files = (keys.file(item) for item in np.flatnonzero(places == _IN_A_FILE).tolist())
    return all(_state(path, WINDOW) == "whole" for path in files) and all(_state(path, TEXT) == "whole" for path in keys.texts().values())


def build_cache(
    dataset: WindowDataset, codec: LatentCodec, folder: str | Path, sigma_px: float, progress: bool = True, workers: int = 0
) -> LatentCache:
    """The complete cache, after encoding what was not there. An entry that is damaged is encoded again, and that is said.

    An interrupted build goes on where it stopped. `workers` processes decode pictures ahead; what they give is the same. A window with
    a damaged picture is left out, or raises its `MvwanError`, as `data.on_corrupt` says. Raises `MvwanError` when the disk does not
    take an entry.
    """
    keys = Keys(Path(folder), dataset, codec.digest, sigma_px).kept()
    shards = Shards(keys.folder, WINDOW)
    for path, reason in shards.unreadable.items():
        tqdm.write(f"latent cache: {path} was damaged and is removed, its windows are encoded again ({reason})")
    shards.remove_unreadable()
    places, absent = keys.find(shards)
    damaged = shards.damaged(places[places >= 0])
    rotten = {item for item, place in enumerate(places.tolist()) if place in damaged} if damaged else set()
    files = set(np.flatnonzero(places == _IN_A_FILE).tolist()) - set(absent.tolist())
    rotten |= {item for item in files if _state(keys.file(item), WINDOW) == "damaged"}
    missing = sorted({*absent.tolist(), *rotten})
    encoded = healed = 0
    with (
        tqdm(total=len(keys), initial=len(keys) - len(missing), desc="encode windows", unit="window", disable=not progress) as bar,
        ShardWriter(keys.folder) as writer,
    ):
        for item, found in _read_pixels(keys.dataset, missing, sigma_px, workers):
            bar.update()
            if isinstance(found, MvwanError):
                if dataset.data.on_corrupt == "stop":
                    raise found
                keys.skip(item, found)
                continue
            entry, place, encoded = _encode(*found, codec), int(places[item]), encoded + 1
            if item in rotten:
                healed += 1
                tqdm.write(f"latent cache: {keys.sample_id(item)} was damaged and is encoded again")
            if place == _IN_A_FILE:
                writer.add(keys.key(item), entry)
            else:
                shards.replace(place, entry)
    for instruction, path in keys.texts().items():
        if _state(path, TEXT) != "whole":
            write_entry(path, {"text": codec.encode_text([instruction])[0]})
    cache = LatentCache(folder, dataset, codec.digest, sigma_px)
    cache.encoded, cache.healed = encoded, healed
    return cache


# ── pixels ────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────

_Pixels = tuple[np.ndarray, np.ndarray]
"""(pictures and coloured heatmaps [2V F H W 3] uint8, heat_valid [V f] bool) of a window."""


class _PixelReader(IterableDataset[Any]):
    """Items with their pixels, episode by episode; of several worker processes each reads its share of the episodes."""

    def __init__(self, dataset: WindowDataset, items: Sequence[int], sigma_px: float) -> None:
        self._dataset, self._items, self._sigma_px = dataset, items, sigma_px

    def __iter__(self) -> Iterator[tuple[int, _Pixels | MvwanError]]:
        items, worker = self._items, get_worker_info()
        if worker is not None:
            episode_of, variants = self._dataset.windows.episode_of, self._dataset.num_variants
            items = [item for item in items if episode_of[item // variants] % worker.num_workers == worker.id]
        for item, sample in self._dataset.samples(items):
            yield item, sample if isinstance(sample, MvwanError) else _pixels(sample, self._sigma_px)


def _read_pixels(dataset: WindowDataset, items: Sequence[int], sigma_px: float, workers: int) -> Iterator[tuple[int, _Pixels | MvwanError]]:
    reader = _PixelReader(dataset, items, sigma_px)
    yield from DataLoader(reader, batch_size=None, num_workers=workers, collate_fn=_as_they_are) if workers and items else reader


def _as_they_are(found: Any) -> Any:
    return found


def _pixels(sample: Sample, sigma_px: float) -> _Pixels:
    return np.concatenate([sample.rgb, heat_video(sample, sigma_px)]), heat_valid(sample.visible)


def _encode(pictures: np.ndarray, valid: np.ndarray, codec: LatentCodec) -> dict[str, torch.Tensor]:
    rgb, heat = codec.encode_video(pictures).chunk(2)
    return {"rgb": rgb.contiguous(), "heat": heat.contiguous(), "heat_valid": torch.from_numpy(valid)}


def heat_valid(visible: np.ndarray) -> np.ndarray:
    """[V f] bool of visible [V F]: a latent frame counts when every frame in it shows the point."""
    latent_frames = num_latent_frames(visible.shape[1])
    return np.stack([visible[:, list(frames_of_latent(frame))].all(axis=1) for frame in range(latent_frames)], axis=1)


# ── entries in files of their own ─────────────────────────────────────────────────────────────────────────────────────────────────


def write_entry(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    with whole_file(path) as partial:
        write_tensors(partial, tensors, {"digest": digest(tensors)})


def _state(path: Path, kinds: Kinds) -> str:
    """`whole`, `damaged` or `absent`."""
    if not path.is_file():
        return "absent"
    try:
        read_entry(path, kinds)
    except MvwanError:
        return "damaged"
    return "whole"


def read_entry(path: Path, kinds: Kinds) -> dict[str, torch.Tensor]:
    try:
        file = TensorFile(path)
        tensors = dict(file)
    except MvwanError as error:
        raise MvwanError(f"latent cache entry {error}. {AGAIN}") from None
    if file.metadata.get("digest") != digest(tensors):
        raise MvwanError(f"latent cache entry {path}: damaged, its bits are not those that were written. {AGAIN}")
    held = {name: (file.dtypes[name], len(shape)) for name, shape in file.shapes.items()}
    if held != kinds:
        raise MvwanError(f"latent cache entry {path}: holds {held}, needs {dict(kinds)}. {AGAIN}")
    return tensors
