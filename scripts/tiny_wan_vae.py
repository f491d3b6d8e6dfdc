"""Trains the tiny VAE on recorded RGB clips and JET heatmap clips, resumable.

Single frames first: clips are made of them, and a step on them costs little. Then clips of five and of nine frames, of which all are
encoded and a few are decoded: neighbours resemble one another, so the time is better spent on more clips. Products run in bfloat16
through two-dimensional convolutions where these are sound on this machine, weights stay float32. The decoder's output is not clamped
here: the clamp has no gradient where heatmap backgrounds sit.
"""

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tiny_wan_clips as clips
import torch
from diffusers import AutoencoderKLWan
from tiny_wan_muon import Muon
from tiny_wan_parts import new_vae, posterior
from tiny_wan_planes import PlaneVae, flatten
from tiny_wan_principal import Principal, principal

from mvwan.files import whole_file, write_json

BLOB_WEIGHT = 8.0
HEAT_WEIGHT = 0.5
ABSOLUTE_WEIGHT = 0.1
KL_WEIGHT = 3e-5
SINGLE_UNTIL = 0.2
"""Share of the schedule on single frames."""
TAUGHT_UNTIL = 0.05
"""Share of the schedule in which latents are principal components, and encoder and decoder learn apart."""
TAUGHT_NOISE = 0.05
TEACHER_WEIGHT = 0.1
TEACHER_BATCHES = 60
EMA = 0.995
WARMUP = 100
DECAY_FROM = 0.7
"""Share of the schedule after which the learning rate falls to zero in a straight line."""
LARGEST_NORM = 1.0
SOUND_COSINE = 0.98
"""Gradients in bfloat16 that agree less than this with those in float32 are not used."""
REPORT_STEPS = 25
SAVE_STEPS = 100
_DARK_BLUE = (-1.0, -1.0, 0.0)


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Of the clips of one step."""

    num_rgb: int
    num_heat: int
    num_frames: int
    decoded: int
    """The first frame and so many others less one: the first has latents of its own, the others share theirs."""


SINGLE = Shape(num_rgb=18, num_heat=6, num_frames=1, decoded=1)
CLIPS = (Shape(num_rgb=6, num_heat=2, num_frames=5, decoded=2), Shape(num_rgb=4, num_heat=2, num_frames=9, decoded=3))
"""Taken in turn."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What one step learns from."""

    pictures: torch.Tensor
    """[B 3 F H W] in -1..1, RGB clips first."""
    num_heat: int
    """How many of the last clips are heatmaps."""
    kept: torch.Tensor
    """[B k], the frames to decode."""
    noise: torch.Generator
    """Of the latents."""

    def targets(self) -> torch.Tensor:
        """[B 3 k H W]."""
        return self.pictures.transpose(1, 2)[torch.arange(len(self.kept))[:, None], self.kept].transpose(1, 2)


def draw(videos: list[clips.Video], step: int, seed: int, shape: Shape) -> Batch:
    """The batch of one step, a pure function of its arguments. Negative steps are batches that no step sees."""
    rng = np.random.default_rng([seed, abs(step), int(step < 0)])
    pictures = clips.vae_batch(videos, shape.num_rgb, shape.num_heat, shape.num_frames, rng)
    others = [1 + np.sort(rng.permutation(shape.num_frames - 1)[: shape.decoded - 1]) for _ in pictures]
    kept = torch.from_numpy(np.pad(np.stack(others), ((0, 0), (1, 0))))
    return Batch(pictures=pictures, num_heat=shape.num_heat, kept=kept, noise=torch.Generator().manual_seed(seed * 1_000_003 + abs(step)))


def loss_of(vae: PlaneVae, batch: Batch, teacher: Principal | None) -> dict[str, torch.Tensor]:
    """Losses of one batch: `rgb`, `heat`, `teacher` or `kl`, and their `total`.

    With a teacher, encoder and decoder learn apart: one to give the teacher's latents, the other to decode them.
    """
    mean, log_variance = vae.encode(batch.pictures)
    noise = torch.randn(mean.shape, generator=batch.noise)
    if teacher is None:
        latents = mean + (0.5 * log_variance).exp() * noise
        beside = KL_WEIGHT * 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    else:
        taught = teacher.encode(batch.pictures)
        latents = taught + TAUGHT_NOISE * noise
        beside = TEACHER_WEIGHT * (mean - taught).square().mean()
    rgb, heat = _costs(vae.decode(latents, batch.kept), batch.targets(), batch.num_heat)
    parts = {"rgb": rgb, "heat": heat, "kl" if teacher is None else "teacher": beside}
    return {"total": rgb + HEAT_WEIGHT * heat + beside, **{name: part.detach() for name, part in parts.items()}}


def _costs(pictures: torch.Tensor, targets: torch.Tensor, num_heat: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(RGB clips, heatmap clips): mean of squares and some absolute value, spots of heatmaps weighted."""
    error = pictures - targets
    cost = error.square() + ABSOLUTE_WEIGHT * error.abs()
    spot = (targets[-num_heat:] - torch.tensor(_DARK_BLUE)[:, None, None, None]).abs().amax(1, keepdim=True) > 0.15
    return cost[:-num_heat].mean(), (cost[-num_heat:] * (1 + (BLOB_WEIGHT - 1) * spot)).mean()


def sound_dtype(vae: AutoencoderKLWan, batch: Callable[[], Batch]) -> torch.dtype:
    """bfloat16 where its gradients of one batch agree with those of float32, else float32."""
    gradients = []
    for dtype in (torch.float32, torch.bfloat16):
        vae.zero_grad(set_to_none=True)
        loss_of(PlaneVae(vae, dtype, flat=True), batch(), None)["total"].backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in vae.parameters() if parameter.grad is not None]))
    vae.zero_grad(set_to_none=True)
    cosine = float(torch.nn.functional.cosine_similarity(*gradients, dim=0))
    return torch.bfloat16 if cosine > SOUND_COSINE else torch.float32


@dataclass
class Training:
    """All that a resumed training continues with."""

    vae: AutoencoderKLWan
    optimizer: Muon
    average: dict[str, torch.Tensor]
    step: int = 0
    seconds: float = 0.0
    """Processor time of the steps so far."""

    @classmethod
    def begin(cls, learning_rate: float, seed: int) -> "Training":
        """Untrained."""
        vae = new_vae(seed).train()
        flatten(vae)
        average = {name: value.detach().clone() for name, value in vae.state_dict().items()}
        return cls(vae, Muon(vae.parameters(), learning_rate), average)

    def load(self, path: Path) -> None:
        """Nothing; continues what `save` wrote."""
        stored = torch.load(path, weights_only=True)
        self.vae.load_state_dict(stored["model"])
        self.optimizer.load_state_dict(stored["optimizer"])
        self.average, self.step, self.seconds = stored["average"], stored["step"], stored["seconds"]

    def save(self, path: Path) -> None:
        """Nothing; the file is whole or not there."""
        state = {"model": self.vae.state_dict(), "optimizer": self.optimizer.state_dict()}
        with whole_file(path) as temporary:
            torch.save({**state, "average": self.average, "step": self.step, "seconds": self.seconds}, temporary)

    def advance(self, planes: PlaneVae, batch: Batch, learning_rate: float, teacher: Principal | None) -> dict[str, float]:
        """The losses of one step; an update that is not finite is left out, and `norm` says so."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        losses = loss_of(planes, batch, teacher)
        self.optimizer.zero_grad(set_to_none=True)
        losses["total"].backward()
        norm = torch.nn.utils.clip_grad_norm_(self.vae.parameters(), LARGEST_NORM)
        if torch.isfinite(norm):
            self.optimizer.step()
        self.step += 1
        decay = min(EMA, (1 + self.step) / (10 + self.step))
        values = self.vae.state_dict()
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.values()), [values[name] for name in self.average], 1 - decay)
        return {name: float(value.detach()) for name, value in {**losses, "norm": norm}.items()}


def train(
    videos: list[clips.Video],
    folder: Path,
    steps: int,
    minutes: float,
    peak_learning_rate: float,
    seed: int,
    say: Callable[[str], None],
    taught_until: float = TAUGHT_UNTIL,
    single_until: float = SINGLE_UNTIL,
) -> dict[str, Any]:
    """What was done; writes `vae.pt` (resumed from when there) and `vae.jsonl` in `folder`.

    For the share `taught_until` of the schedule the encoder is taught principal components; for the share `single_until` clips have
    one frame. Ends after `steps` steps or `minutes`
    minutes of processor time, whichever is first; the schedule follows the nearer of both ends.
    """
    path = folder / "vae.pt"
    training = Training.begin(peak_learning_rate, seed)
    if path.exists():
        training.load(path)
        say(f"vae: continue at step {training.step}, {training.seconds / 60:.1f} min")
    kept = [video for video in videos if not video.held_out]
    dtype = sound_dtype(training.vae, lambda: draw(kept, 0, seed, CLIPS[0]))
    say(f"vae: products in {dtype}")
    planes = PlaneVae(training.vae, dtype, flat=True)
    teacher = teacher_of(folder, kept, seed)
    reported: list[dict[str, float]] = []
    last = time.process_time()
    while (progress := max(training.step / steps, training.seconds / 60 / minutes)) < 1:
        rate = _learning_rate(training.step, progress, peak_learning_rate)
        batch = draw(kept, training.step, seed, SINGLE if progress < single_until else CLIPS[training.step % len(CLIPS)])
        reported.append(training.advance(planes, batch, rate, teacher if progress < taught_until else None))
        now = time.process_time()
        training.seconds, last = training.seconds + now - last, now
        if training.step % REPORT_STEPS == 0:
            _report(folder / "vae.jsonl", training, reported, say)
            reported = []
        if training.step % SAVE_STEPS == 0:
            training.save(path)
    training.save(path)
    done = {"steps": training.step, "processor_minutes": round(training.seconds / 60, 1), "learning_rate": peak_learning_rate}
    shares = {"taught_until": taught_until, "single_until": single_until}
    write_json(folder / "done.json", {**done, **shares, "products_in": str(dtype).removeprefix("torch.")})
    return done


def teacher_of(folder: Path, videos: list[clips.Video], seed: int) -> Principal:
    """The principal components of training clips, computed once per folder."""
    return principal(
        folder / "principal.pt", lambda: (draw(videos, -1 - number, seed, CLIPS[0]).pictures for number in range(TEACHER_BATCHES))
    )


def _learning_rate(step: int, progress: float, peak: float) -> float:
    return peak * min(1.0, (step + 1) / WARMUP) * min(1.0, (1 - progress) / (1 - DECAY_FROM))


def _report(path: Path, training: Training, reported: Iterable[dict[str, float]], say: Callable[[str], None]) -> None:
    rows = list(reported)
    means = {name: round(sum(row[name] for row in rows if name in row) / sum(name in row for row in rows), 5) for name in rows[-1]}
    line = json.dumps({"step": training.step, "seconds": round(training.seconds), **means})
    say(f"vae: {line}")
    with path.open("a") as log:
        log.write(line + "\n")


def trained(folder: Path, seed: int) -> tuple[AutoencoderKLWan, int]:
    """(the averaged VAE in eval mode, its step); the untrained one and 0 when there is no checkpoint."""
    vae, step = new_vae(seed), 0
    if (folder / "vae.pt").exists():
        stored = torch.load(folder / "vae.pt", weights_only=True)
        vae.load_state_dict(stored["average"])
        step = stored["step"]
    return vae.eval().requires_grad_(False), step


@torch.no_grad()
def latent_statistics(vae: AutoencoderKLWan, videos: list[clips.Video], seed: int, batches: int = 16) -> tuple[list[float], list[float]]:
    """(mean [48], std [48]) of posterior means over training clips, RGB and heatmaps in equal parts."""
    latents = []
    for number in range(batches):
        pictures = clips.vae_batch(videos, 2, 2, 9, np.random.default_rng([seed, 77, number]))
        latents.append(posterior(vae, pictures).mean)
    flat = torch.cat(latents).transpose(0, 1).flatten(1)
    return flat.mean(1).tolist(), flat.std(1).tolist()
