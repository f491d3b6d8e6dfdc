"""Windows are encoded once, found again, healed when damaged, and read without a codec."""

import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from mvwan import latent_shards
from mvwan.config import AugmentConfig, DataConfig
from mvwan.data.dataset import WindowDataset, heat_video, read_episodes
from mvwan.data.episode import VideoFrames
from mvwan.errors import MvwanError
from mvwan.latent_cache import WINDOW, Keys, LatentCache, build_cache, heat_valid, is_complete, write_entry
from mvwan.latent_shards import Shards
from mvwan.model.latents import LatentCodec
from mvwan.tensors import digest

SIGMA_PX = 2.5
TEXT_TOKENS = 32


@pytest.fixture(scope="module")
def codec() -> LatentCodec:
    return LatentCodec.load("tiny", TEXT_TOKENS)


@pytest.fixture(scope="module")
def dataset(tiny_demonstrations: Path) -> WindowDataset:
    data = DataConfig(
        root=str(tiny_demonstrations), num_frames=5, window_stride=4, height_px=64, width_px=64, augment=AugmentConfig(variants=1)
    )
    return WindowDataset(read_episodes(tiny_demonstrations), data, 3, "train", seed=0)


@pytest.fixture(scope="module")
def built(dataset: WindowDataset, codec: LatentCodec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("latents")
    cache = build_cache(dataset, codec, folder, SIGMA_PX, progress=False)
    assert cache.encoded == len(cache) == len(dataset) * 2
    return folder


def test_a_batch_holds_what_the_codec_gives(built: Path, dataset: WindowDataset, codec: LatentCodec) -> None:
    cache = LatentCache.open(built, dataset, codec.digest, SIGMA_PX)
    batch = cache.batch([0, 3]).check()
    assert batch.sample_ids == (dataset.sample_id(0, 0), dataset.sample_id(1, 1))
    assert batch.rgb.shape == (2, 3, 48, 2, 4, 4)
    for place, (index, variant) in enumerate(((0, 0), (1, 1))):
        sample = dataset.sample(index, variant)
        assert torch.equal(batch.rgb[place], codec.encode_video(np.concatenate([sample.rgb, heat_video(sample, SIGMA_PX)]))[:3])
        assert torch.equal(batch.heat[place], codec.encode_video(np.concatenate([sample.rgb, heat_video(sample, SIGMA_PX)]))[3:])
        assert torch.equal(batch.heat_valid[place], torch.from_numpy(heat_valid(sample.visible)))
        assert torch.equal(batch.gripper_open[place], torch.from_numpy(sample.gripper_open))
    assert torch.equal(batch.text[0], codec.encode_text(["move the ball"])[0])


def test_labels_of_actions_come_from_the_episodes_and_no_entry_holds_them(
    built: Path, dataset: WindowDataset, codec: LatentCodec, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = LatentCache.open(built, dataset, codec.digest, SIGMA_PX)
    batch = plain.batch([0, 3])
    assert batch.gripper_open.shape == (2, 5) and 0 < batch.gripper_open.mean() < 1
    assert batch.rotation_deg.shape == (2, 5, 3) and bool(batch.rotation_deg.isnan().all())
    assert Shards(built, WINDOW).read(0).keys() == {"rgb", "heat", "heat_valid"}
    turned = np.arange(15, dtype=np.float32).reshape(5, 3)
    monkeypatch.setattr(dataset, "actions", lambda index: (np.full(5, 0.25, np.float32), turned))
    again = LatentCache.open(built, dataset, codec.digest, SIGMA_PX).batch([3])
    assert again.gripper_open.tolist() == [[0.25] * 5]
    assert torch.equal(again.rotation_deg[0], torch.from_numpy(turned))
    assert torch.equal(again.rgb[0], batch.rgb[1])


def test_nothing_is_encoded_twice(built: Path, dataset: WindowDataset, codec: LatentCodec) -> None:
    assert is_complete(built, dataset, codec.digest, SIGMA_PX)
    assert build_cache(dataset, codec, built, SIGMA_PX, progress=False).encoded == 0


def test_a_changed_setting_finds_nothing_old(built: Path, dataset: WindowDataset, codec: LatentCodec) -> None:
    assert not is_complete(built, dataset, codec.digest, SIGMA_PX + 0.5)
    with pytest.raises(MvwanError, match="are not encoded"):
        LatentCache.open(built, dataset, codec.digest, SIGMA_PX + 0.5)
    with pytest.raises(MvwanError, match="are not encoded"):
        LatentCache.open(built, dataset, "another codec", SIGMA_PX)


def shard_of(folder: Path) -> Path:
    (path,) = (folder / "shards").glob("*.safetensors")
    return path


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 16
    path.write_bytes(content)


@pytest.fixture
def own(built: Path, tmp_path: Path) -> Path:
    """A copy of the cache, to spoil."""
    return Path(shutil.copytree(built, tmp_path / "latents"))


def test_a_damaged_entry_is_named_and_encoded_again_in_its_place(
    own: Path, dataset: WindowDataset, codec: LatentCodec, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = LatentCache.open(own, dataset, codec.digest, SIGMA_PX)
    whole, path, before = shard_of(own).read_bytes(), shard_of(own), [cache.batch([item]) for item in range(len(cache))]
    place = whole.index(before[2].rgb.numpy().tobytes()[:64])
    flip(path, place)
    with pytest.raises(MvwanError, match=rf"entry 2 of .*{path.name}: damaged.*Start the run again"):
        cache.batch([2])
    assert torch.equal(cache.batch([1]).rgb, before[1].rgb), "its neighbours are read as before"
    assert not is_complete(own, dataset, codec.digest, SIGMA_PX)
    healed = build_cache(dataset, codec, own, SIGMA_PX, progress=False)
    assert (healed.encoded, healed.healed) == (1, 1)
    assert dataset.sample_id(1, 0) in capsys.readouterr().out
    assert path.read_bytes() == whole
    assert torch.equal(cache.batch([2]).rgb, before[2].rgb), "who had it open goes on"


def test_damage_that_changes_no_time_is_found_by_reading_and_healed_by_the_next_start(
    own: Path, dataset: WindowDataset, codec: LatentCodec
) -> None:
    assert is_complete(own, dataset, codec.digest, SIGMA_PX)
    cache, path = LatentCache.open(own, dataset, codec.digest, SIGMA_PX), shard_of(own)
    times = path.stat()
    flip(path, path.read_bytes().index(cache.batch([0]).heat.numpy().tobytes()[:64]))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert is_complete(own, dataset, codec.digest, SIGMA_PX), "shards that did not change are not read whole at every start"
    with pytest.raises(MvwanError, match="damaged"):
        cache.batch([0])
    assert not is_complete(own, dataset, codec.digest, SIGMA_PX)
    assert build_cache(dataset, codec, own, SIGMA_PX, progress=False).healed == 1


@pytest.mark.parametrize("damage", ["truncated", "emptied"])
def test_a_shard_that_cannot_be_read_is_said_and_encoded_again(
    own: Path, dataset: WindowDataset, codec: LatentCodec, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = shard_of(own)
    whole = path.read_bytes()
    path.write_bytes({"truncated": whole[:-100], "emptied": b""}[damage])
    with pytest.raises(MvwanError, match="are not encoded"):
        LatentCache.open(own, dataset, codec.digest, SIGMA_PX)
    again = build_cache(dataset, codec, own, SIGMA_PX, progress=False)
    assert again.encoded == len(again)
    assert path.name in capsys.readouterr().out
    assert path.read_bytes() == whole


def test_a_missing_entry_is_named(built: Path, dataset: WindowDataset, codec: LatentCodec, tmp_path: Path) -> None:
    shutil.copytree(built / "text", tmp_path / "text")
    with pytest.raises(MvwanError, match=r"12 of 12 windows are not encoded \(first is ball/"):
        LatentCache.open(tmp_path, dataset, codec.digest, SIGMA_PX)


def test_entries_in_files_of_their_own_are_still_read(built: Path, dataset: WindowDataset, codec: LatentCodec, tmp_path: Path) -> None:
    cache = LatentCache.open(built, dataset, codec.digest, SIGMA_PX)
    keys, shards = Keys(tmp_path, dataset, codec.digest, SIGMA_PX), Shards(built, WINDOW)
    places, _ = Keys(built, dataset, codec.digest, SIGMA_PX).find(shards)
    for item in range(len(cache)):
        write_entry(keys.file(item), shards.read(int(places[item])))
    shutil.copytree(built / "text", tmp_path / "text")
    old = LatentCache.open(tmp_path, dataset, codec.digest, SIGMA_PX)
    assert is_complete(tmp_path, dataset, codec.digest, SIGMA_PX)
    for item in range(len(cache)):
        assert torch.equal(old.batch([item]).latents, cache.batch([item]).latents)
    flip(keys.file(3), -5)
    with pytest.raises(MvwanError, match=keys.file(3).name):
        old.batch([3])
    healed = build_cache(dataset, codec, tmp_path, SIGMA_PX, progress=False)
    assert (healed.encoded, healed.healed) == (1, 1)
    assert torch.equal(healed.batch([3]).latents, cache.batch([3]).latents)


def test_shards_are_small_and_an_interrupted_build_goes_on(
    built: Path, dataset: WindowDataset, codec: LatentCodec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latent_shards, "SHARD_ENTRIES", 4)
    encode, calls = LatentCodec.encode_video, []

    def stop_at_the_seventh(self: LatentCodec, pictures: np.ndarray) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return encode(self, pictures)

    monkeypatch.setattr(LatentCodec, "encode_video", stop_at_the_seventh)
    with pytest.raises(KeyboardInterrupt):
        build_cache(dataset, codec, tmp_path, SIGMA_PX, progress=False)
    cache = build_cache(dataset, codec, tmp_path, SIGMA_PX, progress=False)
    assert cache.encoded == len(cache) - 6, "what was encoded before is used, also what had not filled a shard"
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) == 2 + 2
    other = LatentCache.open(built, dataset, codec.digest, SIGMA_PX)
    everything = range(len(cache))
    assert torch.equal(cache.batch(everything).latents, other.batch(everything).latents)


def test_worker_processes_decode_and_change_no_bit(built: Path, dataset: WindowDataset, codec: LatentCodec, tmp_path: Path) -> None:
    build_cache(dataset, codec, tmp_path, SIGMA_PX, progress=False, workers=2)
    shards = {name: Shards(folder, WINDOW) for name, folder in (("one", built), ("two", tmp_path))}
    keys = Keys(built, dataset, codec.digest, SIGMA_PX).all()
    for one, two in zip(shards["one"].find(keys).tolist(), shards["two"].find(keys).tolist(), strict=True):
        assert digest(shards["one"].read(one)) == digest(shards["two"].read(two))


def test_each_picture_is_decoded_once(dataset: WindowDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, int]] = []
    read = VideoFrames.__call__

    def noted(self: VideoFrames, frames: list[int]) -> np.ndarray:
        asked.extend((self.name, frame) for frame in frames)
        return read(self, frames)

    monkeypatch.setattr(VideoFrames, "__call__", noted)
    samples = dict(dataset.samples(range(len(dataset) * 2)))
    assert len(asked) == len(set(asked)) == 3 * 9, "three training episodes of nine frames, of which windows and variants share many"
    for item, sample in samples.items():
        assert not isinstance(sample, MvwanError)
        assert np.array_equal(sample.rgb, dataset.sample(*divmod(item, 2)).rgb)


def test_worker_processes_can_be_sent_a_cache(built: Path, dataset: WindowDataset, codec: LatentCodec) -> None:
    cache = LatentCache.open(built, dataset, codec.digest, SIGMA_PX)
    again = pickle.loads(pickle.dumps(cache))  # noqa: S301  as a DataLoader sends it
    assert torch.equal(again.batch([1]).text, cache.batch([1]).text)


def test_a_latent_frame_counts_only_when_all_its_frames_show_the_point() -> None:
    visible = np.ones((2, 9), bool)
    visible[0, 0] = False  # latent frame 0 is frame 0 alone
    visible[1, 4] = False  # the last of latent frame 1
    assert heat_valid(visible).tolist() == [[False, True, True], [True, False, True]]
