"""Windows are encoded once, found again, healed when damaged, and read without a codec."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from mvwan import latent_cache
from mvwan.config import AugmentConfig, DataConfig
from mvwan.data.dataset import WindowDataset, heat_video, read_episodes
from mvwan.errors import MvwanError
from mvwan.latent_cache import LatentCache, build_cache, heat_valid, is_complete
from mvwan.model.latents import LatentCodec

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
    assert not {"gripper_open", "rotation_deg"} & latent_cache._read(plain._keys.samples[0]).keys()
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


@pytest.mark.parametrize("damage", ["truncated", "flipped", "emptied"])
def test_a_damaged_entry_is_named_and_encoded_again(
    built: Path, dataset: WindowDataset, codec: LatentCodec, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = LatentCache.open(built, dataset, codec.digest, SIGMA_PX)
    before = cache.batch([2]).rgb
    path = cache._keys.samples[2]
    content = bytearray(path.read_bytes())
    if damage == "flipped":
        content[-5] ^= 16
    path.write_bytes({"truncated": content[:-100], "emptied": b"", "flipped": content}[damage])
    with pytest.raises(MvwanError, match=path.name):
        cache.batch([2])
    healed = build_cache(dataset, codec, built, SIGMA_PX, progress=False)
    assert (healed.encoded, healed.healed) == (1, 1)
    assert dataset.sample_id(1, 0) in capsys.readouterr().out
    assert torch.equal(healed.batch([2]).rgb, before)


def test_a_missing_entry_is_named(built: Path, dataset: WindowDataset, codec: LatentCodec) -> None:
    cache = LatentCache.open(built, dataset, codec.digest, SIGMA_PX)
    cache._keys.samples[0].unlink()
    with pytest.raises(MvwanError, match=r"1 of \d+ windows are not encoded \(first is ball/"):
        LatentCache.open(built, dataset, codec.digest, SIGMA_PX)
    build_cache(dataset, codec, built, SIGMA_PX, progress=False)


def test_worker_processes_can_be_sent_a_cache(built: Path, dataset: WindowDataset, codec: LatentCodec) -> None:
    cache = LatentCache.open(built, dataset, codec.digest, SIGMA_PX)
    again = pickle.loads(pickle.dumps(cache))  # noqa: S301  as a DataLoader sends it
    assert torch.equal(again.batch([1]).text, cache.batch([1]).text)


def test_a_latent_frame_counts_only_when_all_its_frames_show_the_point() -> None:
    visible = np.ones((2, 9), bool)
    visible[0, 0] = False  # latent frame 0 is frame 0 alone
    visible[1, 4] = False  # the last of latent frame 1
    assert heat_valid(visible).tolist() == [[False, True, True], [True, False, True]]
