"""One prediction by several processes: each computes its share of every picture's tokens, and attention exchanges them.

The exchange is diffusers' (Ulysses: before attention tokens are traded for heads, after it heads for tokens). For predictions alone.
Knows no file and no launcher: the process group is there already.
"""

from dataclasses import dataclass

import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh

from mvwan.errors import MvwanError
from mvwan.model.wan import ContextParallelConfig, ParallelConfig


@dataclass(frozen=True, kw_only=True)
class TokenSplit:
    """Which share of the tokens of each latent frame this process has."""

    rank: int
    count: int
    """Processes, this one among them."""
    parallel: ParallelConfig
    """For diffusers' attention."""

    @classmethod
    def over_all_processes(cls, device: torch.device) -> "TokenSplit":
        """The share of this process among those that were started together, its tensors on `device`."""
        rank, count = distributed.get_rank(), distributed.get_world_size()
        mesh = init_device_mesh(device.type, (1, count), mesh_dim_names=("ring", "ulysses"))
        parallel = ParallelConfig(context_parallel_config=ContextParallelConfig(ulysses_degree=count))
        parallel.setup(rank, count, device, mesh=mesh)
        return cls(rank=rank, count=count, parallel=parallel)

    def check(self, heads: int, tokens: int) -> None:
        """Nothing, or `MvwanError` for a model with so many `heads`, or pictures of so many `tokens`, that cannot be shared out evenly."""
        for number, what in ((heads, "attention heads of the model"), (tokens, "tokens of a picture")):
            if number % self.count:
                raise MvwanError(
                    f"--context-parallel over {self.count} processes: the {number} {what} cannot be shared out evenly. Start a number of "
                    f"processes that divides {heads} and {tokens}."
                )

    def part(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """This process's share of `x` along `dim`."""
        return x.chunk(self.count, dim)[self.rank].contiguous()

    def whole(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """`x` of all processes along `dim`, in every one of them."""
        parts = [torch.empty_like(x) for _ in range(self.count)]
        distributed.all_gather(parts, x.contiguous())
        return torch.cat(parts, dim)
