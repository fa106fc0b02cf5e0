"""One self-contained page about a run, or about several side by side: the verdict first, then every metric
with its healthy band, incidents, samples, config and environment.

    python -m health report outputs/tiny-sft [outputs/other …] [--out report.html]
"""

import csv
import fnmatch
import io
import itertools
import json
import math
import os
import platform
import re
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any

import jinja2
import yaml

from health.doctor import Doctor, Verdict, of_training, own_name, rules_of
from health.rules import samples
from health.timeline import draw_schedule, read_schedule
from run.config import ConfigError, read_yaml_file

# ------------------------------------------------------------------------------------------------------------
# A finished run, ours or another trainer's
# ------------------------------------------------------------------------------------------------------------


def read_history(path: Path) -> tuple[list[dict], dict]:
    """(one dict per logged step, config) of a run directory, a metrics.jsonl, a trainer_state.json (TRL,
    axolotl) or a table exported from wandb (.csv, .jsonl). Raises ConfigError for anything else."""
    if path.is_dir():
        path = next((path / n for n in ("metrics.jsonl", "trainer_state.json") if (path / n).exists()), path)
    if not path.is_file():
        raise ConfigError(str(path), None, "is neither a run's directory nor a file of metrics")
    config: dict = {}
    if (beside := path.parent / "config.yaml").exists():
        loaded = read_yaml_file(beside, "config.yaml")
        config = loaded if isinstance(loaded, dict) else {}
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".csv":
            rows: list[Any] = list(csv.DictReader(text.splitlines()))
        elif path.suffix == ".jsonl":
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
        else:
            content = json.loads(text)
            rows = content["log_history"] if isinstance(content, dict) else content
    except (ValueError, KeyError, RecursionError, csv.Error) as error:
        raise ConfigError(str(path), None, f"is not a history that can be read ({error!r})") from None
    if not isinstance(rows, list):
        raise ConfigError(str(path), None, "must hold a list of logged steps")
    history = []
    rewarded = any(isinstance(r, dict) and any(_OF_RL.search(str(k)) for k in r) for r in rows)
    if rewarded and not samples(config):  # another trainer's run: its metrics show that it is RL
        config["reward_funcs"] = []
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise ConfigError(f"{path}:{number}", None, "is not a JSON object")
        metrics: dict[str, float] = {}
        for name, value in row.items():
            try:
                figure = float(value)
            except (TypeError, ValueError):
                continue
            name = str(name).rpartition(" - ")[2]  # a wandb export puts the run's name before the metric's
            if name.startswith("train/") and (rewarded or name == "train/global_step"):
                name = name.removeprefix("train/")
            metrics[own_name(name)] = figure
        names = [name for name in ("step", "_step", "Step", "global_step") if name in metrics]
        step = metrics.pop(names[0]) if names else number
        if not abs(step) < 2**53:
            raise ConfigError(f"{path}:{number}", None, f"has the invalid step {step}")
        history.append({"step": int(step), **metrics})
    if not history:
        raise ConfigError(str(path), None, "holds no metrics")
    return history, config


_OF_RL = re.compile(r"reward|completion_length|completions/|^(train/|actor/|objective/)?kl(_|$)")


def judge(history: list[dict], config: dict) -> tuple[Doctor, list[Verdict]]:
    """The Doctor and verdicts for a run with these metrics."""
    # The planned length is unknown, and so is the schedule.
    known = {k: v for k, v in config.items() if k != "lr_scheduler"}
    steps = [row["step"] for row in of_training(history)]
    between = [b - a for a, b in itertools.pairwise(steps) if b > a]
    try:
        doctor = Doctor(known, history[-1]["step"], round(median(between)) if between else 1)
        verdicts = [] if any(k.startswith("data/") for row in history for k in row) else doctor.begin({})
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise ConfigError("config.yaml", None, f"holds an option of the wrong type ({error})") from None
    for row in history:
        verdicts += doctor.read(row)
    doctor.agree_with(history)
    shown = [v for v in verdicts if v.rule.name in doctor.ever]
    known_names = {v.rule.name for v in shown}
    shown += [v for v in doctor.ever.values() if v.rule.name not in known_names]
    return doctor, sorted(shown, key=lambda verdict: verdict.step)


def ended_in(directory: Path) -> str | None:
    """The error at the end of a run's log; None if the run finished or was continued."""
    try:
        with (directory / "run.log").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - (1 << 16)))
            lines = file.read().decode("utf-8", errors="replace").splitlines()
    except OSError:
        return None
    for line in reversed(lines):
        if " DEBUG error: " in line:
            return line.split(" DEBUG error: ", 1)[1]
        if re.search(r" INFO (?!health  |report  )", line):
            return None
    return None


# The metrics that a reader looks for first; all others follow by name.
FIRST = (
    "train/loss", "eval/loss", "reward", "rewards/*/mean", "eval/reward", "eval/pass@1", "eval/greedy",
    "eval/exact",
    "train/grad_norm", "train/learning_rate", "entropy", "kl",
    "frac_reward_zero_std",
    "reward_std", "completions/mean_length", "completions/clipped_ratio", "clip_ratio/region_mean",
    "sampling/sampling_logp_difference/mean", "sampling/importance_sampling_ratio/min",
    "ebft/alignment_cosine",
    "ebft/cfm_unwhitened", "ebft/pairwise_cosine", "ebft/reward", "trained_token_share", "tokens_per_second",
    "step_time", "memory/max_alloc",
)
HEALTHY = {  # the reference page's ranges, which take precedence over the rules'
    "train/grad_norm": (0.1, 10.0), "entropy": (0.05, 0.5), "kl": (0.0, 0.5),
    "frac_reward_zero_std": (0.0, 0.8), "clip_ratio/region_mean": (0.0, 0.1),
    "completions/clipped_ratio": (0.0, 0.3), "sampling/sampling_logp_difference/mean": (0.0, 0.1),
    "sampling/importance_sampling_ratio/min": (0.1, 1.0), "ebft/alignment_cosine": (0.3, 1.0),
}
RANGES = {
    "outside", "hits_limit", "from_the_start", "pooled", "climbs_above", "mean_below", "still",
}  # checks of a range
ONCE = ("data/", "first_step/")  # measured once: a table, no curve
LOGARITHMIC = ("*loss", "*norm", "kl", "entropy", "weights/*")  # if they span much; others are shares, scores
COLOURS = ("#1f6f8b", "#c8553d", "#6b4e9b", "#b8860b", "#2e7d4f", "#7a7a7a")
SILENT = ("health/", "num_tokens", "epoch", "step_time/", "skipped_micro_batches", "rows/fingerprint")


@dataclass
class RunPage:
    """The contents of the report on one run."""

    name: str
    path: Path
    history: list[dict]
    config: dict
    doctor: Doctor
    verdicts: list[Verdict]
    incidents: list[dict] = field(default_factory=list)
    samples: list[dict] = field(default_factory=list)
    error: str | None = None  # the error that ended the run
    schedule: str = ""  # an SVG of the last steps, where servers sampled

    @property
    def steps(self) -> int:
        return self.history[-1]["step"]

    @property
    def ill(self) -> list[Verdict]:
        return [v for v in self.verdicts if v.ill]

    @property
    def summary(self) -> str:
        """The run's error, incidents, and the first causes of what was broken."""
        many = "s" * (len(self.incidents) > 1)
        parts = ["ended in an error"] * bool(self.error)
        parts += [f"{len(self.incidents)} incident{many}"] * bool(self.incidents)
        return ", ".join(parts + [cause.rule.name for cause, _ in self.doctor.causes()])

    @property
    def unusual(self) -> str:
        """The metrics that lie outside of their usual range throughout, though no rule is broken."""
        found = []
        for name in HEALTHY:
            values = [row[name] for row in self.history if name in row]
            low, high = band(name, self.config)
            if len(values) >= 10 and all(x < (low or -math.inf) for x in values):
                found.append(f"{name} (below {low:g})")
            elif len(values) >= 10 and high is not None and all(x > high for x in values):
                found.append(f"{name} (above {high:g})")
        return ", ".join(found)

    @property
    def worst(self) -> str:
        critical = self.error or self.incidents or any(v.rule.severity == "critical" for v in self.ill)
        return "critical" if critical else "warning"

    @property
    def ends(self) -> list[tuple[str, str, str]]:
        """(metric, first value, last value) of losses and rewards."""
        endings = []
        for name in metrics_of([self])[:8]:
            values = [row[name] for row in self.history if name in row]
            if name.startswith(("eval/", "reward")) or name == "train/loss":
                endings.append((name, f"{values[0]:.4g}", f"{values[-1]:.4g}"))
        return endings

    @property
    def yaml(self) -> str:
        return yaml.safe_dump(self.config, sort_keys=False, allow_unicode=True)

    def causes(self) -> list[tuple[str, str, list[str]]]:
        """(severity, line, lines of its consequences) of each cause, the first cause first."""

        def text(verdict: Verdict) -> str:
            return verdict.line(self.config).removeprefix("health: ")

        causes = self.doctor.causes()
        return [(cause.rule.severity, text(cause), [text(v) for v in of]) for cause, of in causes]

    def over(self) -> list[str]:
        """What was broken and recovered."""
        return [v.line(self.config).removeprefix("health: ") for v in self.verdicts if not v.ill]

    @property
    def once(self) -> list[tuple[str, str]]:
        """(name, value) of what was measured before and in the first step."""
        rows = {k: v for row in reversed(self.history) for k, v in row.items() if k.startswith(ONCE)}
        return [(name, f"{value:.4g}") for name, value in sorted(rows.items())]


def read_run(path: Path) -> RunPage:
    """Metrics, config, incidents and the newest samples of a run's directory (or a file of metrics)."""
    history, config = read_history(path)
    doctor, verdicts = judge(history, config)
    page = RunPage(path.resolve().name, path, history, config, doctor, verdicts)
    if not path.is_dir():
        return page
    page.error = ended_in(path)
    page.schedule = picture_of(read_schedule(path))
    for report in sorted(path.glob("incidents/step-*/report.json"), key=lambda p: int(p.parent.name[5:])):
        page.incidents.append(json.loads(report.read_text(encoding="utf-8")))
    files = sorted(path.glob("rollouts/*.jsonl"), key=lambda p: p.stat().st_mtime)
    for file in files[-1:]:
        with file.open(encoding="utf-8") as lines:
            for line in list(lines)[:8]:
                row = json.loads(line)
                page.samples.append(
                    {k: row[k] for k in ("prompt", "completion", "rewards", "advantage") if k in row}
                )
    return page


def canvas(width: float, height: float) -> tuple[Any, Any]:
    """An empty figure and its axis."""
    import matplotlib  # slow to import, and needed only here
    from matplotlib import pyplot

    matplotlib.use("Agg")
    return pyplot.subplots(figsize=(width, height))


def as_svg(figure: Any) -> str:
    from matplotlib import pyplot  # slow to import, and needed only here

    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    pyplot.close(figure)
    return out.getvalue()[out.getvalue().index("<svg") :]


def picture_of(rows: list[dict]) -> str:
    """The schedule of the last steps as one SVG; nothing without one."""
    if not rows:
        return ""
    figure, axis = canvas(9.4, 2.0)
    figure.subplots_adjust(left=0.08, right=0.98, top=0.8, bottom=0.22)
    draw_schedule(axis, rows)
    axis.set_xlabel("seconds", fontsize=7)
    axis.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=6, fontsize=7, frameon=False)
    return as_svg(figure)


def draw(metric: str, pages: list[RunPage]) -> str:
    """The metric of every run as one SVG, with its healthy band."""
    figure, axis = canvas(4.6, 2.5)
    figure.subplots_adjust(left=0.14, right=0.98, top=0.88, bottom=0.18)
    values: list[float] = []
    for page, colour in zip(pages, COLOURS * len(pages), strict=False):
        points = [
            (row["step"], row[metric]) for row in page.history if math.isfinite(row.get(metric, math.nan))
        ]
        if not points:
            continue
        steps, found = zip(*points, strict=True)
        values += found
        axis.plot(steps, found, color=colour, lw=1.2, marker="o" if len(points) < 20 else None, markersize=3)
        broken = [verdict for verdict in page.ill if verdict.metric == metric]
        for place, verdict in enumerate(broken):
            axis.axvline(verdict.step, color="#b3261e", lw=1.6, ls="--")
            late = verdict.step > (steps[0] + steps[-1]) / 2
            axis.annotate(
                verdict.rule.name, (verdict.step, 0.96 - 0.12 * (place % 6)), va="top",
                ha="right" if late else "left", xytext=(-4 if late else 4, 0), textcoords="offset points",
                xycoords=("data", "axes fraction"), fontsize=7, color="#b3261e", zorder=5,
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
            )
    bottom, top = axis.get_ylim()
    positive = min(values) > 0 and max(values) > 50 * min(values) and any(
        fnmatch.fnmatchcase(metric, name) for name in LOGARITHMIC)
    if positive:
        axis.set_yscale("log")
    # Pale where no rule speaks, with a line where one would; darker where the reference page's runs lie.
    allowed, usual = limits(metric, pages[0]), band(metric, pages[0].config)
    for (low, high), colour, strength in ((allowed, "#cfe8d5", 1.0), (usual, "#8fb996", 0.55)):
        if low is not None or high is not None:
            axis.axhspan(low if low is not None else bottom,
                         high if high is not None else max(top, max(values)),
                         color=colour, alpha=strength, lw=0, zorder=0)
    for edge in allowed:
        if edge is not None:
            axis.axhline(edge, color="#2e7d4f", lw=1.0, zorder=1)
    axis.set_ylim((min(values) * 0.8 if positive else bottom), (max(values) * 1.25 if positive else top))
    middle, most = (max(values) + min(values)) / 2, max(abs(v) for v in values)
    if most and max(values) - min(values) < 1e-3 * most:  # do not magnify the last digits of a constant
        axis.set_ylim(middle - 1e-2 * most, middle + 1e-2 * most)
    axis.set_title(metric, fontsize=9, loc="left")
    axis.set_xlabel("step", fontsize=7)
    axis.tick_params(labelsize=7)
    if not positive:
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:.4g}")  # no offset that overlaps the title
    axis.spines[["top", "right"]].set_visible(False)
    return as_svg(figure)


def band(metric: str, config: dict) -> tuple[float | None, float | None]:
    """The healthy range of a metric: the reference page's, else the one its rules allow."""
    if metric == "train/grad_norm" and samples(config):
        return 0.001, 1.0
    if metric in HEALTHY:
        return HEALTHY[metric]
    low = [
        r.low for r in rules_of(config) if metric in r.metrics and r.check == "outside" and r.low is not None
    ]
    high = [
        r.high
        for r in rules_of(config)
        if metric in r.metrics and r.check == "outside" and r.high is not None
    ]
    return max(low, default=None), min(high, default=None)


def limits(metric: str, page: RunPage) -> tuple[float | None, float | None]:
    """The range in which no rule speaks of a metric in this run."""
    low, high = [], []
    for rule in page.doctor.rules:
        if not any(fnmatch.fnmatchcase(metric, name) for name in rule.metrics) or rule.check not in RANGES:
            continue
        start = page.doctor.series[metric].first if metric in page.doctor.series else []
        begun = 0.9 * median(start) if rule.check == "climbs_above" and start else -math.inf
        low += [rule.low] if rule.low is not None else []
        high += [max(rule.high, begun)] if rule.high is not None else []
    return max(low, default=None), min(high, default=None)


def constant(metric: str, pages: list[RunPage]) -> bool:
    """Whether a metric is the same, but for rounding, in every row of every run."""
    values = [row[metric] for page in pages for row in page.history if metric in row]
    return max(values) - min(values) <= 1e-5 * max(1e-12, *(abs(x) for x in values))


def metrics_of(pages: list[RunPage]) -> list[str]:
    names = {name for page in pages for row in page.history for name in row if name != "step"}
    names = {n for n in names if not n.startswith((*SILENT, *ONCE))}
    first = [n for pattern in FIRST for n in sorted(names) if fnmatch.fnmatchcase(n, pattern)]
    return list(dict.fromkeys(first)) + sorted(names - set(first))


PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>{{ pages|map(attribute="name")|join(", ") }}</title><style>
body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:1180px;padding:0 1rem;color:#222}
h1{font-size:1.5rem}h2{font-size:1.1rem;margin-top:2rem;border-bottom:1px solid #ddd}
.well{color:#2e7d4f}.critical{color:#b3261e}.warning{color:#9a6700}.over{color:#666}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(350px,1fr));gap:.6rem}
.grid svg{width:100%;height:auto}
table{border-collapse:collapse;font-size:13px}
td,th{padding:.2rem .7rem .2rem 0;text-align:left;vertical-align:top}
pre{background:#f6f6f4;padding:.7rem;overflow-x:auto;font-size:12px;white-space:pre-wrap}
.key{display:inline-block;width:1.6em;height:.5em;margin-right:.4em}summary{cursor:pointer;color:#1f6f8b}
</style></head><body>
{% for p in pages %}
<h1><span class="key" style="background:{{ colours[loop.index0 % colours|length] }}"></span>
{{ p.name }}:
{% if p.summary %}<span class="{{ 'critical' if p.worst == 'critical' else 'warning' }}">
{{ p.summary }}</span>{% elif p.unusual %}<span class="warning">no rule broken, but outside of its usual
range throughout: {{ p.unusual }}</span>{% else %}<span class="well">well from beginning to end</span>
{% endif %}</h1>
<p>{{ p.steps }} steps, {{ p.history|length }} logged.
{% for name, first, last in p.ends %}{{ name }} {{ first }} → {{ last }}{{ "." if loop.last else ", " }}
{% endfor %}</p>
<p class="over">Evidence: {{ p.doctor.evidence() }}.</p>
{% for severity, line, consequences in p.causes() %}
{% if loop.index == 2 %}<details><summary>{{ loop.length - 1 }} more, which may follow from it</summary>
{% endif %}<p class="{{ severity }}">{{ "First: " if loop.first and loop.length > 1 }}{{ line }}</p>
{% if consequences %}<details><summary>{{ consequences|length }} that it explains</summary>
{% for c in consequences %}<p class="over">{{ c }}</p>{% endfor %}</details>{% endif %}
{% if loop.last and loop.length > 1 %}</details>{% endif %}{% endfor %}
{% if p.over() %}<details><summary>what recovered</summary>{% for line in p.over() %}
<p class="over">{{ line }}</p>{% endfor %}</details>{% endif %}
{% if p.error %}<p class="critical">error: {{ p.error }}</p>{% endif %}
{% for i in p.incidents %}<p class="critical">incident, step {{ i.step }}: {{ i.says }}. {{ i.advice }}.
<code>python -m health replay {{ p.path }}/incidents/step-{{ i.step }}</code></p>
{% for row in i.rows %}<pre>{{ row.name }} tokens {{ row.first }}–{{ row.last }}
{{ row.text }}</pre>{% endfor %}{% endfor %}
{% endfor %}
<h2>Metrics</h2><p>Pale green, to the line: where no rule speaks. Darker green: where the reference page's
runs lie. Dashed red: where a rule was broken first.</p>
<div class="grid">{% for svg in drawings %}<div>{{ svg|safe }}</div>{% endfor %}</div>
{% if flat %}<details><summary>{{ flat|length }} that never changed</summary>
<div class="grid">{% for svg in flat %}<div>{{ svg|safe }}</div>{% endfor %}</div></details>{% endif %}
{% for p in pages %}{% if p.schedule %}<h2>{{ p.name }}: schedule of the last steps</h2>
<div>{{ p.schedule|safe }}</div>{% endif %}{% endfor %}
{% for p in pages %}{% if p.once %}<details>
<summary>{{ p.name }}: measured before and in the first step</summary>
<table>{% for name, value in p.once %}<tr><td>{{ name }}</td><td>{{ value }}</td></tr>
{% endfor %}</table>
</details>{% endif %}{% endfor %}
{% for p in pages %}{% if p.samples %}<h2>{{ p.name }}: samples of the last batch</h2><table>
<tr><th>prompt</th><th>completion</th><th>rewards</th><th>advantage</th></tr>
{% for s in p.samples %}<tr><td>{{ s.prompt }}</td><td>{{ s.completion }}</td><td>{{ s.rewards }}</td>
<td>{{ "%+.2f"|format(s.advantage) if s.advantage is number }}</td></tr>{% endfor %}</table>
{% endif %}{% endfor %}
<h2>Config</h2>
{% for p in pages %}<details><summary>{{ p.name }}</summary><pre>{{ p.yaml }}</pre></details>{% endfor %}
<h2>Environment</h2><pre>{{ environment }}</pre>
</body></html>
"""


def environment() -> str:
    import torch  # slow to import, and needed only here

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return (
        f"report of {datetime.now().isoformat(timespec='seconds')}\ntorch {torch.__version__}, Python "
        f"{platform.python_version()}, {platform.system()} {platform.machine()}, GPU {gpu}"
    )


def render(paths: list[Path]) -> str:
    """The page for these runs. Text from runs is escaped: a completion with <script> stays text."""
    pages = [read_run(path) for path in paths]
    flat, drawings = [], []
    for metric in metrics_of(pages):
        (flat if constant(metric, pages) else drawings).append(draw(metric, pages))
    template = jinja2.Environment(autoescape=True).from_string(PAGE)
    return template.render(
        pages=pages, drawings=drawings, flat=flat, colours=COLOURS, environment=environment()
    )


def write(paths: list[Path], out: Path) -> Path:
    """Write the page to a file. Raises ConfigError if a path is not a run."""
    text = render(paths)
    try:
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError("--out", str(out), f"cannot be written ({error.strerror})") from None
    return out
