"""The jobs of an ablation on a cluster: Slurm through submitit, or submitit's own processes to try that out. The only door to submitit.

A job does what it does on one machine and leaves the same files, so a grid may be begun here and ended there; the folder must be one
that all nodes see. Knows no grid.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from mvwan.ablation.jobs import Job
from mvwan.errors import MvwanError
from mvwan.processes import Failure, stop_by_sigterm
from mvwan.signals import on_sigterm

Cluster = Literal["slurm", "local"]
_POLL_S = 2


def check_cluster(cluster: Cluster) -> Any:
    """The module submitit. Raises `MvwanError` with what to install where it is absent."""
    try:
        import submitit  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise MvwanError(f"--cluster {cluster}: submitit is not installed. Run `pip install 'mvwan[cluster]'`.") from None
    return submitit


def run_on_cluster(
    jobs: Sequence[Job],
    processes: int,
    said: Callable[[Job, str, Failure | None], None],
    *,
    cluster: Cluster,
    options: Mapping[str, Any],
    folder: Path,
) -> list[Failure]:
    """As `run_jobs`, with `processes` jobs at most at a time; submitit's own files go to `folder`.

    `options` are those of submitit's executors, such as `timeout_min`, `slurm_partition`, `gpus_per_node`. Jobs are cancelled when this
    process is stopped; what they saved is kept. Raises `MvwanError` for options that the cluster does not have.
    """
    submitit = check_cluster(cluster)
    try:
        executor = submitit.AutoExecutor(folder=folder, cluster=cluster)
        array = {"slurm_array_parallelism": processes} if cluster == "slurm" else {}
        executor.update_parameters(name="mvwan-ablate", **array, **options)
    except (NameError, RuntimeError, TypeError, ValueError) as error:
        raise MvwanError(f"--cluster {cluster}: submitit takes neither it nor its options ({error}). See --cluster-option.") from None
    failures, running, waiting = list[Failure](), dict[Job, Any](), list(jobs)
    with on_sigterm(stop_by_sigterm):
        try:
            while waiting or running:
                # Slurm itself sees to how many of an array run at a time.
                free = len(waiting) if cluster == "slurm" else processes - len(running)
                if next_jobs := waiting[: max(free, 0)]:
                    del waiting[: len(next_jobs)]
                    with executor.batch():
                        submitted = [executor.submit(_there, job) for job in next_jobs]
                    running |= dict(zip(next_jobs, submitted, strict=True))
                    for job in next_jobs:
                        said(job, "started", None)
                for job in [job for job, there in running.items() if there.done()]:
                    failure = _failure_of(job, running.pop(job))
                    failures += [failure] if failure else []
                    said(job, "failed" if failure else "done", failure)
                time.sleep(_POLL_S)
        except BaseException:
            for there in running.values():
                there.cancel(check=False)
            raise
    return failures


def _there(job: Job) -> str:
    """What was wrong, empty when the job is done: in a process of the cluster."""
    try:
        job.do()
    except MvwanError as error:
        return str(error)
    return ""


def _failure_of(job: Job, there: Any) -> Failure | None:
    error = there.exception()
    lines = [line.strip() for line in str(error or "").splitlines() if "Error" in line]
    reason = (lines or [f"{error}"])[-1] if error is not None else there.result()
    if not reason and not job.is_done:
        reason = f"it left no {job.product.name}; is the folder one that all nodes see?"
    return Failure(name=job.name, reason=reason, log=Path(there.paths.stderr)) if reason else None
