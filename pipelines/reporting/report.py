"""``report.html``: one self-contained page made from what lies in a run folder.

python -m pipelines.reporting.report DIR
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import jinja2
from markupsafe import Markup

from pipelines.errors import UserError
from pipelines.reporting import plots
from pipelines.reporting.metrics import estimate, format_interval, measure_of, write_text
from pipelines.reporting.notes import notes
from pipelines.reporting.page import Section, figure, figures, folded, heading, join
from pipelines.reporting.plots import Panel, Series
from pipelines.reporting.run import Run, Stage, anchor, is_number, opened
from pipelines.reporting.sections import SECTIONS
from pipelines.reporting.sections.problems import failed_checks
from pipelines.reporting.tables import html_table, mapping_table, metrics_table, system_label, systems_in

TEMPLATES = Path(__file__).parent / "templates"
PLAIN_CURVES = 6


def write_report(run_dir: Path | str) -> Path:
    """Writes ``report.html`` into a run folder, whole or not at all, and returns its path.

    Stages that are missing or unfinished are shown as such; a part whose files are not there is left out.

    Args:
        run_dir: folder with ``run.json``, ``metrics.json`` and a folder for each stage; or that of a stage alone.

    Raises:
        UserError: if the folder holds no run or one of its files is damaged.
    """
    run = opened(run_dir)
    path = run.folder / "report.html"
    write_text(path, render(run))
    return path


def render(run: Run) -> str:
    """The page."""
    sections = list(_sections(run))
    shown = {name for section in sections for name in section.stages}
    sections += [plain_section(stage) for stage in run.stages if stage.name not in shown and _has_content(stage)]
    sections.append(_configurations(run))
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template("report.html.j2").render(
        run=run,
        style=Markup((TEMPLATES / "report.css").read_text(encoding="utf-8")),
        finished=sum(stage.finished for stage in run.stages),
        total=duration(sum(stage.duration or 0.0 for stage in run.stages)),
        stages=[(stage, duration(stage.duration), _state_class(stage)) for stage in run.stages],
        headline=_headline(run),
        notes=notes(run),
        sections=sections,
    )


def duration(seconds: float | None) -> str:
    """``9 s``, ``3 min 12 s`` or ``2 h 05 min``; empty for None."""
    if seconds is None:
        return ""
    if round(seconds) < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def plain_section(stage: Stage) -> Section:
    """The section of a stage that no other section shows: its metrics, and a curve for each number that it logged."""
    parts = []
    if stage.metrics:
        parts.append(html_table(metrics_table(stage.metrics), stage.name))
    keys = sorted({k for entry in stage.history for k, v in entry.items() if is_number(v)} - {"step", "epoch"})
    drawn = []
    for number, key in enumerate(k for k in keys if len(stage.curve(k)[1]) > 1):
        if number == PLAIN_CURVES:
            break
        x, y = stage.curve(key)
        panel = Panel([Series("", x, y, smooth=True)], key)
        svg = plots.lines(f"plain-{anchor(stage.name)}-{number}", [panel], "step", f"{key} by step")
        drawn.append(figure(svg, "Faint: each entry; strong: running mean.", key))
    parts.append(figures(drawn))
    return Section(f"stage-{anchor(stage.name)}", stage.name, join(parts), stages=frozenset([stage.name]))


def _sections(run: Run) -> Iterator[Section]:
    for writer in SECTIONS:
        found = writer(run)
        yield from (found,) if isinstance(found, Section) else found or ()


def _has_content(stage: Stage) -> bool:
    return bool(stage.metrics or stage.history)


def _state_class(stage: Stage) -> str:
    return {"finished": "good", "running": "open", "interrupted": "open", "failed": "bad"}.get(stage.state, "none")


def _headline(run: Run) -> list[tuple[str, str, str, str]]:
    """The few numbers that answer what the run was for: (name, value, unit, interval)."""
    base = system_label(run.reference)
    wanted = [("reward/accuracy", "Reward model ranks pairs right")]
    for system in systems_in(run.metrics, run.order):
        if system == run.reference:
            wanted.insert(0, (f"{system}/rouge1", f"{base}, ROUGE-1"))
        else:
            wanted.append((f"{system}/gold_win_rate", f"{system_label(system)} beats {base} (gold)"))
            wanted.append((f"{system}/kl", f"{system_label(system)}, KL to {base}"))
    for key in run.metrics:
        system, _, measure = key.rpartition("/")
        if measure == "frechet_distance" and system in run.order:
            wanted.append((key, f"{system_label(system)}, Fréchet distance"))
    found = _verdict(run)
    for key, name in wanted:
        value = estimate(run.metrics, key)
        if value is not None:
            measure = measure_of(key)
            found.append((name, measure.number(value.value), measure.unit, format_interval(run.metrics, key)))
    return found


def _verdict(run: Run) -> list[tuple[str, str, str, str]]:
    counts = [failed_checks(stage) for stage in run.stages]
    failed, checks = (sum(column) for column in zip(*counts, strict=True))
    return [("Statements that hold", str(checks - failed), f"of {checks}", "")] if checks else []


def _configurations(run: Run) -> Section:
    parts = []
    for stage in run.stages:
        if not stage.record:
            continue
        # The folder a stage was written into says nothing about its result.
        config = {k: v for k, v in stage.config.items() if k != "output_dir"}
        body = [html_table(mapping_table(config, "Field", "Value"), f"Configuration of {stage.name}")]
        if stage.record.get("inputs"):
            inputs = {k: str(v)[:16] for k, v in stage.record["inputs"].items()}
            body.append(html_table(mapping_table(inputs, "Input", "Fingerprint"), f"Inputs of {stage.name}"))
        note = f"{stage.record.get('recipe') or ''} · seed {stage.record.get('seed', '–')}"
        if stage.record.get("fingerprint"):
            note += f" · {str(stage.record['fingerprint'])[:12]}"
        parts.append(folded(stage.name, join(body), note.removeprefix(" · ")))
    versions: dict[str, str] = {}
    for stage in run.stages:
        for package, version in stage.versions.items():
            known = versions.setdefault(package, str(version))
            if str(version) not in known.split(", "):
                versions[package] = f"{known}, {version}"
    if versions:
        parts += [heading("Versions"), _chips(versions)]
    return Section("configuration", "Configuration", join(parts), "Everything that is needed to run it again.")


def _chips(mapping: dict[str, str]) -> Markup:
    items = (Markup("<li><b>{}</b> {}</li>").format(k, v) for k, v in sorted(mapping.items()))
    return Markup('<ul class="chips">{}</ul>').format(Markup("").join(items))


def main(arguments: list[str] | None = None) -> int:
    """The command line; 0 when the report was written, 2 for a mistake."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if len(arguments) != 1 or arguments[0] in ("-h", "--help"):
        print("usage: python -m pipelines.reporting.report DIR", file=sys.stderr)
        return 0 if arguments and arguments[0] in ("-h", "--help") else 2
    try:
        print(write_report(arguments[0]))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
