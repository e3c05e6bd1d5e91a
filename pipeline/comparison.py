"""What a branch changed, as the blocks of a report: parameters, code, environment, data, figures, gate, stages.

Functions of two sides, `before` and `after`; a side that lacks what is asked for is said, and no error.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.drift import stability_index
from pipeline.errors import PipelineError
from pipeline.locked_data import MissingError
from pipeline.report_document import DOWN, UP, Block, Cell, Chart, Code, Paragraph, Table
from pipeline.verify import Entry, Verification, changed_inputs, hashes

MANIFEST = "data/shards/manifest.json"
VALIDATION = "data/reports/validation/report.json"
METRICS = "data/eval/metrics.json"
DECISION = "data/release/decision.json"
DIGITS = 4  # of a figure
NAMED = 8  # files in a cell, at most
WINNERS = 5  # and as many losers, where there are more classes than both
MAX_PSI = 0.2  # above which a drift is pointed at; params.yaml's validate.max_psi decides in the stage itself
PIN = re.compile(r"^([A-Za-z0-9][A-Za-z0-9._-]*(?:\[[^\]]*\])?)\s*==\s*([^\s;\\]+)", re.MULTILINE)
PR_CURVES = {"IoU50": "#1f6feb", "IoU75": "#d1570b"}  # column -> colour
NOTHING = "none"

Interval = tuple[float, float]  # low, high


@dataclass(frozen=True)
class Intervals:
    """Of the differences on the gate's split."""

    metrics: Mapping[str, Interval]  # name -> its interval
    per_class: Mapping[str, Interval]  # class -> that of its AP
    words: str  # what they are


@dataclass(frozen=True)
class Side:
    """One of the two revisions. What is None it does not have."""

    name: str
    params: Mapping[str, Any] | None
    lock: Mapping[str, Entry]
    json: Callable[[str], Any]  # of a path below data/; MissingError where it cannot be had
    text: Callable[[str], str | None]  # of a path in git

    def found(self, path: str) -> tuple[Any, str]:
        """A JSON file's content, or None and why."""
        try:
            return self.json(path), ""
        except MissingError as error:
            return None, f"{self.name}: {error}."


def found_in_both(path: str, before: Side, after: Side) -> tuple[Any, Any, list[Block]]:
    """A JSON file on both sides, and what is to be said where it is missing."""
    old, why_old = before.found(path)
    new, why_new = after.found(path)
    return old, new, [Paragraph(why) for why in (why_old, why_new) if why]


def flat(content: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value; a list is a value."""
    if not isinstance(content, Mapping):
        return {prefix: content}
    pairs: dict[str, Any] = {}
    for key, value in content.items():
        pairs |= flat(value, f"{prefix}.{key}" if prefix else str(key))
    return pairs


# Parameters, code, environment ----------------------------------------------------------------------------------------


def parameters(before: Side, after: Side) -> list[Block]:
    """Every value of params.yaml that is another."""
    missing: list[Block] = [
        Paragraph(f"{side.name} has no params.yaml that can be read.")
        for side in (before, after)
        if side.params is None
    ]
    old, new = flat(before.params or {}), flat(after.params or {})
    rows = [
        (Code(key), _value(old, key), _value(new, key))
        for key in sorted(old.keys() | new.keys())
        if (key and (key in old) != (key in new)) or old.get(key) != new.get(key)
    ]
    if not rows:
        return missing or [Paragraph("No parameter changed.")]
    return [*missing, Table(["parameter", "before", "after"], rows, texts=3)]


def _value(values: Mapping[str, Any], key: str) -> Cell:
    if key not in values:
        return "-"
    value = values[key]
    return Code("null" if value is None else str(value).lower() if isinstance(value, bool) else str(value))


def code(before: Side, after: Side, changed: Sequence[str]) -> list[Block]:
    """The files that changed, by the stages that depend on them."""
    if not changed:
        return [Paragraph("No file changed.")]
    rows: list[Sequence[Cell]] = []
    left = set(changed)
    for stage in dict.fromkeys((*before.lock, *after.lock)):
        deps = {path for side in (before, after) for path in hashes(side.lock.get(stage, {}).get("deps"))}
        concerned = [path for path in changed if path in deps]
        left -= set(concerned)
        if concerned:
            rows.append((Code(stage), *_files(concerned)))
    rows += [("no stage", *_files(sorted(left)))] if left else []
    return [Table(["stage", "files", "which"], rows, texts=3)]


def _files(names: Sequence[str]) -> tuple[Cell, Cell]:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return str(len(names)), Code(", ".join(names[:NAMED]) + more)


def environment(before: Side, after: Side, files: Sequence[str]) -> list[Block]:
    """Pins of requirements/*.txt that changed. `files`: those that did."""
    rows: list[Sequence[Cell]] = []
    for file in files:
        old, new = (dict(PIN.findall(side.text(file) or "")) for side in (before, after))
        rows += [
            (Code(file), Code(name), _value(old, name), _value(new, name))
            for name in sorted(old.keys() | new.keys())
            if old.get(name) != new.get(name)
        ]
    if not rows:
        return [Paragraph("No pinned package changed.")]
    return [Table(["file", "package", "before", "after"], rows, texts=4)]


# Data -----------------------------------------------------------------------------------------------------------------


def data(before: Side, after: Side) -> list[Block]:
    """Counts, classes, validation and drift."""
    return [*_counts(before, after), *_validation(before, after)]


def _counts(before: Side, after: Side) -> list[Block]:
    old, new, blocks = found_in_both(MANIFEST, before, after)
    sides = [manifest or {"splits": {}, "classes": [], "source": {}} for manifest in (old, new)]
    rows: list[Sequence[Cell]] = []
    for split in dict.fromkeys(name for manifest in sides for name in manifest["splits"]):
        both = [flat(_plain_counts(manifest["splits"].get(split, {}))) for manifest in sides]
        for name in dict.fromkeys((*both[0], *both[1])):
            values = [counts.get(name) for counts in both]
            if any(values) and (values[0] != values[1] or name in ("images", "boxes")):
                rows.append((f"{split}: {name.replace('_', ' ')}", *map(_count, values), _count_difference(*values)))
    if rows:
        blocks.append(Table(["", "before", "after", "difference"], rows))
    if old and new:
        blocks.append(Paragraph(_data_words(old, new)))
    return blocks


def _plain_counts(split: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in split.items() if name != "shards"}


def _data_words(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    same = old == new
    names = [[row["name"] for row in manifest["classes"]] for manifest in (old, new)]
    words = ["The shards are the same." if same else "The shards changed."]
    sources = [split for split in new["source"] if new["source"][split] != old["source"].get(split)]
    words += [f"Other annotations: {', '.join(sources)}."] if sources else []
    for what, ours, theirs in (("New", names[1], names[0]), ("Gone", names[0], names[1])):
        others = [name for name in ours if name not in theirs]
        words += [f"{what} classes: {', '.join(others[:NAMED])}{', ...' * (len(others) > NAMED)}."] if others else []
    return " ".join(words)


def _count(value: Any) -> str:
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def _count_difference(old: Any, new: Any) -> str:
    if not (isinstance(old, int) and isinstance(new, int)):
        return ""
    return "0" if old == new else f"{new - old:+,}"


def _validation(before: Side, after: Side) -> list[Block]:
    old, new, blocks = found_in_both(VALIDATION, before, after)
    for side, report in ((before, old), (after, new)):
        if report is not None:
            outcome = "passed" if report["success"] else "FAILED"
            blocks.append(Paragraph(f"Validation, {side.name}: {outcome}, {len(report['failed'])} checks not met."))
    rows: list[Sequence[Cell]] = [
        (str(row["split"]), Code(f"{row['table']}: {row['expectation']}"), str(row["severity"]), _count(row["count"]))
        for row in (new or {}).get("failed", [])
    ]
    if rows:
        blocks.append(Table(["split", "expected, and not so", "severity", "records"], rows, texts=3))
    if old and new:
        blocks += _drift(old["distributions"], new["distributions"])
    return blocks


def _drift(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Block]:
    """Population stability index of each quantity's shares between the two sides."""
    rows: list[Sequence[Cell]] = []
    for split in (name for name in new if name in old):
        for quantity, counts in new[split].items():
            index, most = stability_index(counts, old[split].get(quantity, {}))
            if index > 0:
                sign = " (above 0.2)" if index > MAX_PSI else ""
                rows.append((f"{split}: {quantity}", Code(most), f"{index:.4f}{sign}"))
    if not rows:
        return [Paragraph("No share of classes, box sizes, boxes an image or image sizes moved.")]
    return [Table(["drift of", "moved most", "stability index"], rows, texts=2)]


# Figures --------------------------------------------------------------------------------------------------------------


def metrics(before: Side, after: Side, intervals: Intervals | None) -> list[Block]:
    """The twelve numbers of each split."""
    old, new, blocks = found_in_both(METRICS, before, after)
    for split in dict.fromkeys((*_splits(old), *_splits(new))):
        sides = [_splits(found).get(split) for found in (old, new)]
        if all(sides) and not same_truth(*sides):
            words = f"{split}: judged on other ground truth than before; the figures do not compare one to one."
            blocks.append(Paragraph(words, warning=True))
        gate = bool(new) and split == new.get("gate_split")
        known = intervals.metrics if intervals and gate else {}
        values = [(side or {}).get("metrics", {}) for side in sides]
        names = dict.fromkeys((*values[0], *values[1]))
        rows = [(name, *figures(values[0].get(name), values[1].get(name), known.get(name))) for name in _ordered(names)]
        head = [split, "before", "after", "difference"] + (["interval"] if known else [])
        blocks.append(Table(head, [row if known else row[:4] for row in rows]))
        if intervals and gate:
            blocks.append(Paragraph(intervals.words))
    return blocks


def _splits(judged: Any) -> Mapping[str, Any]:
    return judged.get("splits", {}) if judged else {}


def _ordered(names: Mapping[str, None]) -> list[str]:
    """COCO's order, AP first, and what else there is behind it."""
    order = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
    return [*(name for name in order if name in names), *(name for name in names if name not in order)]


def same_truth(before: Mapping[str, Any] | None, after: Mapping[str, Any] | None) -> bool:
    """Whether a split was judged against the same ground truth on both sides."""
    return bool(before and after and before.get("ground_truth") == after.get("ground_truth"))


def figures(before: float | None, after: float | None, interval: Interval | None = None) -> tuple[str, ...]:
    """Before, after, the difference with an arrow, and its interval."""
    told = "" if interval is None else f"{interval[0]:+.{DIGITS}f} to {interval[1]:+.{DIGITS}f}"
    return figure(before), figure(after), difference(before, after), told


def figure(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.{DIGITS}f}"


def difference(before: float | None, after: float | None) -> str:
    """With an arrow; empty where there is none to be formed."""
    if before is None or after is None:
        return ""
    change = round(after - before, DIGITS)
    return "0" if change == 0 else f"{UP if change > 0 else DOWN} {change:+.{DIGITS}f}"


def classes(before: Side, after: Side, intervals: Intervals | None) -> list[Block]:
    """AP by class on the gate's split: those that won most, and those that lost most."""
    old, new, blocks = found_in_both(METRICS, before, after)
    if not (old and new):
        return blocks
    split = new["gate_split"]
    sides = [(_splits(found).get(split) or {}).get("per_class", {}) for found in (old, new)]
    both = [name for name in sides[1] if sides[0].get(name) is not None and sides[1][name] is not None]
    both.sort(key=lambda name: (sides[0][name] - sides[1][name], name))
    if len(both) > 2 * WINNERS:
        cut = f"The {WINNERS} that won most and the {WINNERS} that lost most of {len(both)} classes."
        blocks.append(Paragraph(cut))
        both = both[:WINNERS] + both[-WINNERS:]
    apart = [name for name in dict.fromkeys((*sides[0], *sides[1])) if (name in sides[0]) != (name in sides[1])]
    known = intervals.per_class if intervals else {}
    head = [f"AP on {split}", "before", "after", "difference"] + (["interval"] if known else [])
    rows: list[Sequence[Cell]] = [
        (Code(name), *figures(sides[0].get(name), sides[1].get(name), known.get(name))[: len(head) - 1])
        for name in [*both, *apart]
    ]
    if not rows:
        return [*blocks, Paragraph("No class was measured on both sides.")]
    return [*blocks, Table(head, rows)]


def curves(split: str, before: Mapping[str, list[float]], after: Mapping[str, list[float]]) -> list[Block]:
    """Precision over recall, mean over the classes. A side: column ("recall", "IoU50", "IoU75") -> values."""
    names = [name for name in PR_CURVES if name in before and name in after]
    old, new = ({r: place for place, r in enumerate(side["recall"])} for side in (before, after))
    ticks = [recall for recall in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0) if recall in old and recall in new]
    head = [f"recall, {split}", *(f"{name} {when}" for name in names for when in ("before", "after"))]
    rows = [
        (
            f"{recall:.1f}",
            *(f"{side[name][at[recall]]:.3f}" for name in names for side, at in ((before, old), (after, new))),
        )
        for recall in ticks
    ]
    lines = [
        (side["recall"], side[name], PR_CURVES[name], f"{name} {when}", when == "before")
        for name in names
        for side, when in ((before, "before"), (after, "after"))
    ]
    return [Chart(_chart(lines), Table(head, rows))]


def _chart(lines: Sequence[tuple[list[float], list[float], str, str, bool]]) -> str:
    """An SVG: figures, and words of our own alone. Of a line: x, y (0..1), colour, name, dashed."""
    width, height, margin = 520, 320, 40

    def at(x: float, y: float) -> tuple[float, float]:
        return margin + x * (width - 2 * margin), height - margin - y * (height - 2 * margin)

    parts = [f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" font-size="12"']
    parts.append(' font-family="system-ui, sans-serif" fill="#59636e" aria-label="precision over recall">')
    for tick in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0):
        x, y = at(tick, tick)
        parts.append(f'<path d="M{x} {margin}V{height - margin}M{margin} {y}H{width - margin}" stroke="#d1d9e0"/>')
        parts.append(f'<text x="{x}" y="{height - margin + 16}" text-anchor="middle">{tick}</text>')
        parts.append(f'<text x="{margin - 6}" y="{y + 4}" text-anchor="end">{tick}</text>')
    for place, (xs, ys, colour, name, dashed) in enumerate(lines):
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*pair) for pair in zip(xs, ys, strict=True)))
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>')
        y = height - margin - 10 - 16 * (len(lines) - 1 - place)
        parts.append(f'<path d="M{margin + 10} {y - 4}h24" stroke="{colour}" stroke-width="2"{dash}/>')
        parts.append(f'<text x="{margin + 40}" y="{y}">{name}</text>')
    parts.append(f'<text x="{width / 2}" y="{height - 6}" text-anchor="middle">recall</text>')
    parts.append(f'<text x="6" y="{margin - 12}">precision, mean over classes</text></svg>')
    return "".join(parts)


# Gate and stages ------------------------------------------------------------------------------------------------------


def gate(before: Side, after: Side) -> list[Block]:
    """The decision on this side's model, rule by rule, and the one before."""
    old, new, blocks = found_in_both(DECISION, before, after)
    if old is not None:
        blocks.append(Paragraph(f"Before: {old['decision']}."))
    if new is None:
        return blocks
    blocks.append(Paragraph(f"After: {new['decision']}.", warning=new["decision"] != "accepted"))
    rows = [
        (str(rule["rule"]), _rule_figure(rule["candidate"]), _rule_figure(rule["required"]), _passed(rule))
        for rule in new["rules"]
    ]
    return [*blocks, Table(["rule", "candidate", "required", ""], rows)]


def _rule_figure(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    text = NOTHING if value is None else str(value)
    return f"{text[:19]}..." if re.fullmatch(r"sha256:[0-9a-f]{64}", text) else text


def _passed(rule: Mapping[str, Any]) -> str:
    return "pass" if rule["passed"] else f"{DOWN} FAIL"


def stages(before: Side, after: Side, verified: Verification, seconds: Mapping[str, float]) -> list[Block]:
    """Which results are those before, and where each entry is from. `seconds`: stage -> time, where there is one."""
    known = {verdict.stage: verdict for verdict in verified.verdicts}
    rows: list[Sequence[Cell]] = []
    for stage in dict.fromkeys((*known, *after.lock, *before.lock)):
        verdict = known.get(stage)
        origin = verdict.words if verdict else "dvc.yaml has no such stage"
        time = f"{seconds[stage]:,.0f} s" if stage in seconds else "unknown"
        rows.append((Code(stage), *_did(before.lock.get(stage), after.lock.get(stage)), time, origin))
    if not rows:
        return [Paragraph("There is no stage.")]
    return [Table(["stage", "result", "other inputs", "time, here last", "dvc.lock's entry"], rows, texts=5)]


def _did(before: Entry | None, after: Entry | None) -> tuple[Cell, Cell]:
    """Whether a stage's entry is that before, and the inputs that are others.

    Where it is, nothing had to be run for this side. Whether a new one was run, or came out of a cache, no lock tells.
    """
    if after is None:
        return "no entry", ""
    if before is None:
        return "new, first entry", ""
    changed = changed_inputs(after, before)
    if hashes(before.get("outs")) != hashes(after.get("outs")):
        words = "new: changed" if changed else "new: changed, with the same inputs"
    else:
        words = "new, the same bytes: accepted by dvc commit, or run again" if changed else "same as before"
    return words, Code(", ".join(changed[:NAMED]) + (", ..." if len(changed) > NAMED else ""))


def lead(before: Side, after: Side, verified: Verification) -> Iterator[Block]:
    """What a reviewer has to know first."""
    judged = [side.found(METRICS)[0] for side in (before, after)]
    decision = after.found(DECISION)[0]
    words = []
    if judged[1]:
        split = judged[1]["gate_split"]
        old, new = ((_splits(found).get(split) or {}).get("metrics", {}).get("AP") for found in judged)
        change = difference(old, new)
        words.append(f"AP on {split} {figure(old)} to {figure(new)}{f' ({change})' if change else ''}.")
    if decision:
        words.append(f"The gate: {decision['decision']}.")
    if before.lock and before.lock == after.lock and before.params == after.params:
        words.append("Nothing that a stage depends on changed.")
    if not before.lock:
        words.append(f"There is no baseline: {before.name} has no dvc.lock that can be read.")
    if not after.lock:
        words.append("There is no dvc.lock here that can be read; run dvc repro.")
    yield Paragraph(" ".join(words))
    if verified.cannot:
        yield Paragraph(f"dvc.lock cannot be verified: {verified.cannot}.", warning=True)
    for warning in verified.warnings:
        yield Paragraph(f"verify: {warning}.", warning=True)


def table_of(text: str) -> dict[str, list[float]]:
    """A CSV of figures, as columns. PipelineError where it is none."""
    lines = [line.split(",") for line in text.splitlines() if line]
    try:
        return {name: [float(line[place]) for line in lines[1:]] for place, name in enumerate(lines[0])}
    except (ValueError, IndexError) as error:
        raise PipelineError(f"not a table of figures: {error}") from None
