"""Kills training 200 times with SIGKILL, resumes it each time, and proves that every finished run equals one that nobody disturbed.

    python scripts/soak.py                                             half of the kills while checkpoints are written in the background
    python scripts/soak.py --kills 500 --seed 1 --set train.save_every=1
    python scripts/soak.py --memory                                    peak memory of a fresh and of a resumed run, larger than in the tests

Prints a line per kill and a table, writes `soak.json` (or `memory.json`) into --output, and exits with code 1 on any difference.
"""

import argparse
import os
import shutil
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: sizes are tiny, waking threads costs more than they do
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich.console import Console
from rich.table import Table

from mvwan.config import config_from_dict, merge, parse_overrides
from mvwan.errors import MvwanError
from mvwan.files import write_json
from tests.kill_and_resume import Report, kill_and_resume
from tests.resume_memory import resume_memory

_MARK = "soak.json"
_BACKGROUND: dict[str, Any] = {"train": {"async_save": True}}


def main(arguments: list[str]) -> int:
    """Exit code: 1 when a run differed, a promise about its files was broken, or a resumed run needed more memory; 2 for bad options."""
    options = _parse(arguments)
    try:
        config_from_dict(parse_overrides(options.set))
        if options.output.exists() and not (options.output / _MARK).exists():
            raise MvwanError(f"{options.output}: exists and holds no {_MARK}. Remove it or give another --output.")
    except MvwanError as error:
        print(error, file=sys.stderr)
        return 2
    shutil.rmtree(options.output, ignore_errors=True)
    write_json(options.output / _MARK, {})
    return _memory(options) if options.memory else _soak(options)


def _soak(options: argparse.Namespace) -> int:
    overrides = parse_overrides(options.set)
    arms = {"at once": (options.kills, overrides)}
    if "async_save" not in overrides.get("train", {}):
        half = options.kills // 2
        arms = {"at once": (options.kills - half, overrides), "in the background": (half, merge(overrides, _BACKGROUND))}
    reports = {}
    for number, (name, (kills, settings)) in enumerate(arms.items()):
        print(f"checkpoints are written {name}: {kills} kills", flush=True)
        reports[name] = kill_and_resume(
            options.output / name.replace(" ", "-"), kills, options.seed + number, settings, lambda line: print(line, flush=True)
        )
        write_json(options.output / _MARK, {name: report.to_json() for name, report in reports.items()})
    Console(width=None if sys.stdout.isatty() else 120).print(_table(reports))
    failures = [failure for report in reports.values() for failure in report.failures]
    print(f"{len(failures)} failures", *failures, sep="\n  ")
    return 1 if failures else 0


def _table(reports: dict[str, Report]) -> Table:
    table = Table("checkpoints written", *reports, title="Killed and resumed")
    rows: dict[str, list[Any]] = {name: [getattr(report, name.replace(" ", "_")) for report in reports.values()] for name in _COUNTS}
    for counter in ("by_mode", "struck"):
        for name in sorted({name for report in reports.values() for name in getattr(report, counter)}):
            rows[f"{_TITLES[counter]} {name}"] = [getattr(report, counter)[name] for report in reports.values()]
    rows["failures"] = [len(report.failures) for report in reports.values()]
    rows["minutes"] = [f"{report.seconds / 60:.1f}" for report in reports.values()]
    for name, values in rows.items():
        table.add_row(name, *(str(value) for value in values))
    return table


_COUNTS = ("kills", "during a save", "resumes", "finished runs")
_TITLES = {"by_mode": "aimed at:", "struck": "found:"}


def _memory(options: argparse.Namespace) -> int:
    peaks = resume_memory(options.output / "runs", width=2048, rank=768, overrides=parse_overrides(options.set))
    print(peaks)
    write_json(options.output / "memory.json", {**vars(peaks), "ratio": peaks.ratio})
    return 1 if peaks.ratio > 1.05 else 0


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("runs/soak"), help="emptied first if an earlier soak made it")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="overrides a setting of the run; repeatable")
    parser.add_argument("--memory", action="store_true", help="measure memory instead")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
