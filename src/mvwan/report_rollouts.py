"""The page's section on closed-loop trials: success rates beside their controls, and the filmed trials. Knows no simulator."""

import html
from collections.abc import Sequence

from mvwan import pictures
from mvwan.files import read_bytes
from mvwan.metrics import rate_in_words
from mvwan.report_frames import source_name
from mvwan.run_record import RunRecord

_CONTROLS = {
    "expert_waypoints": "expert waypoints",
    "replay": "replay of a demonstration",
    "hold": "hold still",
}


def rollouts(records: Sequence[RunRecord]) -> str:
    """The section's HTML; a sentence when no trials were run."""
    run = [record for record in records if record.closed_loop is not None]
    if not run:
        return "<p>No trials were run. <code>mvwan evaluate RUN --trials 25</code> runs some.</p>"
    first = run[0].closed_loop
    assert first is not None
    kind = f"{'widened' if first['settings']['widened'] else 'stock'} layouts{' kept for final evaluation' if first['final'] else ''}"
    intro = (
        f"<p>{first['trials']} {kind} per task that no demonstration shows, success by Meta-World's own criterion, 95 % intervals. The run "
        f"predicts, follows {first['settings']['execute']} waypoints and looks again. <em>Expert waypoints</em> follows the scripted "
        "expert's path on the very layout through the same waypoints: the upper bound. <em>Replay</em> follows a training demonstration "
        "blindly: where it succeeds, success says little.</p>"
    )
    return intro + _rates(run) + f'<div class="figures">{_films(run)}</div>'


def _rates(records: Sequence[RunRecord]) -> str:
    """A table: tasks in rows, runs and controls in columns."""
    first = records[0].closed_loop
    assert first is not None
    controls = [policy for policy in first["policies"] if policy in _CONTROLS]
    heads = "".join(f"<th>{name}</th>" for name in ["", *(source_name(record.label) for record in records), *map(_CONTROLS.get, controls)])
    rows = []
    for task, measured in first["tasks"].items():
        tried = [record.closed_loop["tasks"].get(task) for record in records if record.closed_loop]
        cells = [rate_in_words(rates["predicted"]) if rates else "–" for rates in tried]
        cells += [rate_in_words(measured[policy]) for policy in controls]
        rows.append(f"<tr><td>{html.escape(task)}</td>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _films(records: Sequence[RunRecord]) -> str:
    """The filmed trials: each run's, then the controls of the first."""
    figures = []
    for place, record in enumerate(records):
        assert record.closed_loop is not None
        for film in record.closed_loop["films"]:
            if place and film["policy"] in _CONTROLS:
                continue
            name = _CONTROLS.get(film["policy"], f"predicted, switch {record.label}")
            outcome = "succeeded" if film["success"] else "did not succeed"
            said = f"{film['task']}, layout {film['layout_seed']}: {name}; {outcome} in {film['control_steps']} control steps"
            video = pictures.data_uri(read_bytes(record.folder / film["file"]), "video/mp4")
            shown = f'<video controls loop muted playsinline src="{video}"></video><figcaption>{html.escape(said)}</figcaption>'
            figures.append(f"<figure>{shown}</figure>")
    return "".join(figures)
