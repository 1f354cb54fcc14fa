"""The report of a comparison: its files say what the comparison holds, whatever the names in it are."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recbole_llm.comparison import report
from recbole_llm.comparison.controls import label_of
from recbole_llm.comparison.report import (
    terminal_table,
    to_csv,
    to_html,
    to_latex,
    to_markdown,
    write_report,
)
from recbole_llm.comparison.tables import COSTS, clean

needs_matplotlib = pytest.mark.skipif(report.find_spec("matplotlib") is None, reason="needs the extra report")
VOID = {"meta", "wbr", "br", "link", "img", "input", "hr"}
EVIL = (
    "</title></script><script>alert(1)</script> & 100%_|x\n\"q\" 'r' `c` \\ $x$ {y} #1 ~ ^ *b* [z](http://u)"
)


def estimate(mean: float | None, **more: Any) -> dict[str, Any]:
    bounds = (
        {"low": mean - 0.0213, "high": mean + 0.0187} if mean is not None else {"low": None, "high": None}
    )
    bca = {f"{key}_bca": None if value is None else value + 0.0011 for key, value in bounds.items()}
    values = [None, None] if mean is None else [mean - 0.003, mean + 0.003]
    sd = None if mean is None else 0.0042426
    return {"mean": mean, "sd": sd, **bounds, **bca, "values": values, "reason": None, **more}


def model(name: str, auc: float | None, kind: str = "llm", **more: Any) -> dict[str, Any]:
    groups = [
        {"name": "5-12", "rows": 1200, "value": 0.71, "reason": None},
        {"name": "13-40", "rows": 1, "value": None, "reason": "one label only"},
    ]
    found = {
        "name": name,
        "label": label_of(name),
        "kind": kind,
        "seeds": [2020, 2021],
        "metrics": {
            "auc": estimate(auc),
            "logloss": estimate(None if auc is None else 1.2345678901234 - auc),
        },
        "cost": dict.fromkeys(COSTS) | {"train_seconds": 1234.5, "test_seconds": 6.25, "tokens": 1000000},
        "calibration": {"predicted": [0.1, 0.9], "observed": [0.2, 0.8], "counts": [30, 50], "ece": 0.1},
        "groups": {"history length": groups, "user activity": [], "item popularity": groups},
        "paths": ["saved/run"],
        **more,
    }
    for of_metric in found["metrics"].values():
        of_metric["values"] = of_metric["values"][: len(found["seeds"])]
    return found


def comparison(models: list[dict[str, Any]] | None = None, **more: Any) -> dict[str, Any]:
    models = (
        [model("RecLoRA", 0.7351234567890123), model("DIN", 0.77, "classical")] if models is None else models
    )
    differences = [
        {
            "a": models[0]["name"], "b": other["name"], "metric": "auc", "value": -0.04071234567, "low": -0.0551,
            "high": -0.0273, "low_bca": None, "high_bca": None, "p": 3e-7, "p_holm": 0.0124,
            "test": "DeLong, clustered by user (AUC)",
            "reason": None,
        }
        for other in models[1:]
    ]  # fmt: skip
    return {
        "format": 1,
        "task": "ctr",
        "dataset": "ml-1m",
        "created": "2026-01-01T12:00:00+00:00",
        "versions": {"torch": "2.13.0", "peft": None},
        "machine": "two cores",
        "device": "cpu",
        "command": "python run.py --models=\"['RecLoRA']\"",
        "metrics": ["auc", "logloss"],
        "leading": "auc",
        "smaller_is_better": ["logloss"],
        "rows": {"train": 776007, "few_shot": 1024, "valid": 2000, "test": 2000, "test_available": 97000, "users": 657},
        "seeds": [2020, 2021],
        "models": models,
        "differences": differences,
        "failed": [{"name": "iLoRA", "seed": 2021, "error": "out of memory"}],
        "sentences": ["DIN is better than RecLoRA."],
        "notes": ["Taken beside other work."],
        "gates": {
            "model": "RecLoRA",
            "experts": 3,
            "users": ["7", "8"],
            "values": [[0.2, 0.5, 0.3], [0.9, 0.05, 0.05]],
            "coordinates": [[0.0, 1.0], [2.0, -1.0]],
            "profile_field": "gender",
            "profile": ["F", "M"],
        },
        "prompts": [
            {
                "model": "RecLoRA", "user": "7", "item": "Heat", "text": "Will they\nlike it?", "label": 1,
                "scores": {"RecLoRA": 0.61, "DIN": None},
            }
        ],
        **more,
    }  # fmt: skip


class Page(HTMLParser):
    """Balance of tags, texts, attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.cells: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        assert len(dict(attributes)) == len(attributes), f"an attribute twice in {tag}: {attributes}"
        self.tags.append((tag, dict(attributes)))
        if tag in ("td", "th"):
            self.cells.append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.texts.append(data)
        if any(tag in ("td", "th") for tag in self.open):
            self.cells[-1] += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def text(self) -> str:
        return "".join(self.texts)


def columns(markdown: str) -> list[list[int]]:
    """Of each table the number of cells in each line."""
    tables: list[list[int]] = [[]]
    for line in markdown.splitlines():
        if line.startswith("| "):
            tables[-1].append(len(re.split(r"(?<!\\)\|", line)) - 2)
        elif tables[-1]:
            tables.append([])
    return [table for table in tables if table]


def records(text: str, record: str) -> list[dict[str, str]]:
    return [line for line in csv.DictReader(io.StringIO(text)) if line["record"] == record]


# The files


def test_all_files_are_written_and_json_is_the_comparison(tmp_path):
    found = comparison()
    paths = write_report(tmp_path / "new", found)
    assert [path.name for path in paths] == [f"compare.{end}" for end in ("json", "csv", "md", "tex", "html")]
    assert sorted((tmp_path / "new").iterdir()) == sorted(paths)
    assert json.loads(paths[0].read_text(encoding="utf-8")) == found
    texts = [to_csv(found), to_markdown(found), to_latex(found), to_html(found)]
    assert [path.read_text(encoding="utf-8") for path in paths[1:]] == texts


# csv


def test_csv_numbers_are_those_of_the_comparison():
    found = comparison()
    text = to_csv(found)
    lines = records(text, "metric")
    assert [(line["model"], line["metric"]) for line in lines] == [
        (m["name"], metric) for m in found["models"] for metric in found["metrics"]
    ]
    for line in lines:
        known = next(m for m in found["models"] if m["name"] == line["model"])["metrics"][line["metric"]]
        assert float(line["value"]) == known["mean"]
        for key in ("sd", "low", "high", "low_bca", "high_bca"):
            assert float(line[key]) == known[key]
    of_seeds = {(s["model"], s["metric"], int(s["seed"])): float(s["value"]) for s in records(text, "seed")}
    assert of_seeds["RecLoRA", "auc", 2021] == found["models"][0]["metrics"]["auc"]["values"][1]
    assert len(of_seeds) == 8
    (difference,) = records(text, "difference")
    assert (difference["model"], difference["against"]) == ("RecLoRA", "DIN")
    assert float(difference["value"]) == -0.04071234567 and float(difference["p"]) == 3e-7
    assert difference["low_bca"] == ""
    costs = {line["metric"]: float(line["value"]) for line in records(text, "cost") if line["model"] == "DIN"}
    assert costs == {"train_seconds": 1234.5, "test_seconds": 6.25, "tokens": 1000000}
    groups = records(text, "group")
    assert [(g["group"], g["value"], g["reason"]) for g in groups[:2]] == [
        ("history length: 5-12", "0.71", ""),
        ("history length: 13-40", "", "one label only"),
    ]
    assert [(f["model"], f["seed"], f["reason"]) for f in records(text, "failed")] == [
        ("iLoRA", "2021", "out of memory")
    ]


# Plain text


def test_the_terminal_table_says_all():
    lines = terminal_table(comparison()).splitlines()
    assert re.split(r"\s{2,}", lines[0]) == ["model", "seeds", "AUC [95% CI]", "LogLoss ↓"]
    assert re.split(r"\s{2,}", lines[2]) == [
        "RecLoRA",
        "2",
        "0.7351 ± 0.0042 [0.7138, 0.7538]",
        "0.4994 ± 0.0042",
    ]
    assert "DIN is better than RecLoRA." in lines and "iLoRA, seed 2021: out of memory" in lines
    starts = {line.index("2") for line in (lines[2].replace("0.", "x."), lines[3].replace("0.", "x."))}
    assert len(starts) == 1, "the columns stand below one another"


def test_the_terminal_table_shows_names_as_they_are_and_numbers_in_ascii():
    text = terminal_table(comparison([model("A – 1", -0.7), model("B", 0.6)]))
    assert "A – 1" in text and "-0.7000" in text and "−" not in text


def test_one_seed_has_no_spread():
    assert "±" in terminal_table(comparison())
    one = [model("A", 0.7, seeds=[1]), model("B", 0.6, seeds=[1])]
    for write in (terminal_table, to_markdown):
        assert "±" not in write(comparison(one, seeds=[1]))


def test_a_terminal_is_not_steered():
    text = terminal_table(comparison([model("a\x1b[31mred\u202e", 0.7)]))
    assert "\x1b" not in text and "\u202e" not in text and "red" in text


@pytest.mark.parametrize(
    ("leading", "best"),
    [(["logloss"], {"AUC": "DIN", "LogLoss": "DIN"}), ([], {"AUC": "DIN", "LogLoss": "RecLoRA"})],
)
def test_the_best_of_a_column_is_marked(leading, best):
    lines = [line.split(" | ") for line in to_markdown(comparison(smaller_is_better=leading)).splitlines()]
    table = [line for line in lines if line[0] in ("| RecLoRA", "| DIN")][:2]
    for column, name in zip((2, 3), best.values(), strict=True):
        assert [line[0][2:] for line in table if "**" in line[column]] == [name]


def test_equal_as_printed_is_equally_best():
    text = to_markdown(
        comparison([model("A", 0.70001), model("B", 0.70002), model("C", 0.69)], metrics=["auc"])
    )
    assert text.count("**0.7000") == 2
    assert "**" not in to_markdown(comparison([model("A", 0.7)]))


def test_a_reason_stands_beside_its_dash():
    why = "no row has <both> labels"
    found = comparison([model("A", 0.7), model("B", 0.6)])
    found["models"][1]["metrics"]["auc"] = estimate(None, reason=why)
    assert "- (1)" in terminal_table(found) and f"(1) {why}" in terminal_table(found)
    assert "–[^1]" in to_markdown(found) and "[^1]: no row has &lt;both&gt; labels" in to_markdown(found)
    assert r"\textendash{}$^{1}$" in to_latex(found)
    page = Page(to_html(found))
    assert {"title": why} in page.all("span") and why in page.texts
    assert [line["reason"] for line in records(to_csv(found), "metric") if line["model"] == "B"] == [why, ""]


# Markdown, LaTeX


def test_markdown_tables_have_equal_columns():
    tables = columns(to_markdown(comparison([model(EVIL, 0.7), model("x||y\\|z\\", 0.6)])))
    assert len(tables) == 3
    assert all(len(set(table)) == 1 for table in tables)


def test_markdown_is_inert():
    text = to_markdown(
        comparison([model(EVIL, 0.7)], dataset=EVIL, notes=[EVIL], sentences=[EVIL], command="a\n````\n# b")
    )
    assert "<script>" not in text and "&lt;script&gt;" in text
    assert "[z](" not in text.replace(r"\[z\](", "")
    assert "`````\na\n````\n# b\n`````" in text, "the fence is longer than any in the command"


def test_latex_is_inert_and_has_booktabs():
    text = to_latex(
        comparison([model(r"a_b & 50% #1 {x} \input{y} $z$ ~ ^ --lens [q]", 0.7), model("[DIN]", 0.6)])
    )
    assert r"a\_b \& 50\% \#1 \{x\} \textbackslash{}input\{y\} \$z\$" in text
    assert r"\textasciitilde{} \textasciicircum{} -{}-lens {[}q{]} &" in text
    assert "\n  {[}DIN{]} & " in text, r"a row that begins with [ would be an argument of \\"
    for rule in (r"\toprule", r"\midrule", r"\bottomrule", r"\begin{tabular}", r"\end{tabular}"):
        assert text.count(rule) == 3
    assert "$-$0.0407" in text and r"$\pm$" in text


def test_latex_rows_have_the_columns_of_their_head():
    for table in to_latex(comparison([model(EVIL, 0.7), model("a&b", 0.6)])).split(r"\begin{tabular}{")[1:]:
        width = table.index("}")
        rows = [line for line in table.splitlines() if line.endswith(r" \\")]
        assert len(rows) > 1
        assert {len(re.findall(r"(?<!\\)&", row)) + 1 for row in rows} == {width}


# HTML


def test_html_is_whole_and_needs_no_network():
    text = to_html(
        comparison([model(EVIL, 0.7), model("DIN", 0.6)], dataset=EVIL, notes=[EVIL], command=EVIL)
    )
    page = Page(text)
    assert not re.search(r"(?:src|href|srcset|action|data)\s*=\s*[\"']?(?:https?:)?//", text)
    assert "@import" not in text and not re.search(r"url\((?!#)", text)
    assert not {"link", "img", "iframe", "object", "form", "base"} & {tag for tag, _ in page.tags}
    assert len(page.all("script")) == 1, "no script but the page's own"
    for attributes in (a for _, a in page.tags):
        assert not [key for key in attributes if key.startswith("on")]


def test_the_policy_allows_the_script_of_the_page():
    text = to_html(comparison())
    script = re.search(r"<script>(.*?)</script>", text, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policies = [
        a["content"] for a in Page(text).all("meta") if a.get("http-equiv") == "Content-Security-Policy"
    ]
    assert len(policies) == 1 and "default-src 'none'" in policies[0] and f"'sha256-{digest}'" in policies[0]


@needs_matplotlib
def test_html_names_every_model_and_is_accessible():
    names = ["RecLoRA lens_residual=True lora_r=4", "<b>&amp;", "DIN"]
    page = Page(to_html(comparison([model(name, 0.7 - i / 50) for i, name in enumerate(names)])))
    for name in names:
        assert any(cell.startswith(name) for cell in page.cells)
    assert all(a.get("scope") in ("row", "col") for a in page.all("th")) and page.all("th")
    pictures = [a for a in page.all("svg") if a.get("role") == "img"]
    assert len(pictures) == 1 + 1 + 3 + 2 + 2  # intervals, cost, reliability, groups that exist, gates
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    assert all(set(a["aria-labelledby"].split()) <= set(ids) for _, a in page.tags if "aria-labelledby" in a)
    assert page.all("html")[0]["lang"] == "en"


def test_html_shows_the_numbers():
    page = Page(to_html(comparison()))
    numbers = [float(a["data-v"]) for a in page.all("td") if "data-v" in a]
    assert 0.7351234567890123 in numbers and -0.04071234567 in numbers and 1234.5 in numbers
    for text in ("0.7351 ± 0.0042[0.7138, 0.7538]", "−0.0407", "[−0.0551, −0.0273]", "<0.0001", "0.0124"):
        assert text in page.cells, text
    for text in (
        "DIN is better than RecLoRA.",
        "Taken beside other work.",
        "iLoRA, seed 2021: out of memory",
    ):
        assert text in page.texts
    assert (
        "Will they\nlike it?" in page.texts and "776,007; 1,024 of them for the language models" in page.texts
    )


@needs_matplotlib
def test_a_whisker_ends_where_the_interval_ends():
    """Positions are a linear map of the numbers: read back from the axis' labels."""
    from recbole_llm.comparison import charts

    found = comparison([model("A", 0.7), model("B", 0.6)])
    chart = ElementTree.fromstring(charts.intervals("auc", "AUC", found["models"]).replace("xlink:", ""))
    ticks = [
        (float(t.get("x")), float(t.text))
        for t in chart.iter("text")
        if re.fullmatch(r"0\.\d+", t.text or "")
    ]
    (x0, v0), (x1, v1) = ticks[0], ticks[-1]
    lines = [p.get("d") for p in chart.iter("path") if "stroke: var(--ink)" in p.get("style", "")]
    lines = [re.findall(r"([\d.]+) ([\d.]+)", line) for line in lines]
    whiskers = [[float(x) for x, _ in line] for line in lines if len(line) == 2 and line[0][1] == line[1][1]]
    ends = [[v0 + (x - x0) / (x1 - x0) * (v1 - v0) for x in line] for line in whiskers]
    wanted = [[m["metrics"]["auc"]["low"], m["metrics"]["auc"]["high"]] for m in found["models"]]
    np.testing.assert_allclose(ends, wanted, atol=5e-4)


@needs_matplotlib
def test_marks_have_tips_and_the_colours_of_the_page():
    text = to_html(comparison([model("A", 0.7), model("B", 0.6, "classical")]))
    chart = re.search(r"<svg[^>]*><title>AUC, best first.*?</svg>", text, re.DOTALL)[0]
    assert "<title>B: 0.6000 ± 0.0042 [0.5787, 0.6187]</title>" in chart
    assert "var(--c1)" in chart and "var(--c2)" in chart
    assert not re.search(r"(fill|stroke): #", "".join(re.findall(r"<svg.*?</svg>", text, re.DOTALL)))


def test_without_matplotlib_there_are_tables_and_one_line_that_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(report, "find_spec", lambda name: None)
    page = Page(to_html(comparison()))
    assert not page.all("svg")
    assert page.texts.count("Plots need matplotlib: pip install recbole_llm[report]") == 1
    assert "Observed share of positives" in page.text and "dots" not in page.text
    for cell in ("0.100 / 0.200 (30); 0.900 / 0.800 (50)", "5-12 (1,200 samples)", "expert 3", "0.900"):
        assert cell in page.cells, cell


def test_labels_are_shown_with_the_full_name_as_footnote_and_files_keep_the_name():
    name = "RecLoRA mixer=identity gate=~ lora_r=8 lora_alpha=16 score_valid=True"
    found = comparison([model("RecLoRA", 0.7), model(name, 0.6)])
    note = f"plain LoRA, rank 8: {name}"
    page = Page(to_html(found))
    assert {"title": note} in page.all("span") and note in page.texts
    assert "RecLoRA − plain LoRA, rank 8" in page.cells
    assert "plain LoRA, rank 8[^1]" in to_markdown(found) and r"lora\_alpha=16" in to_markdown(found)
    assert "plain LoRA, rank 8$^{1}$" in to_latex(found)
    assert f"(1) {note}" in terminal_table(found)
    assert name in [line["model"] for line in records(to_csv(found), "metric")]


@pytest.mark.parametrize(
    ("name", "cell"),
    [
        ("=HYPERLINK(1)", "'=HYPERLINK(1)"),
        ("+1+cmd|' /C calc'!A0", "'+1+cmd|' /C calc'!A0"),
        (" -x", "' -x"),
        ("@SUM(A1)", "'@SUM(A1)"),
        ("-5", "-5"),
        ("a=b", "a=b"),
    ],
)
def test_csv_cells_are_no_formulas(name, cell):
    assert records(to_csv(comparison([model(name, 0.7)])), "metric")[0]["model"] == cell


def test_a_chart_without_data_says_why():
    nothing = {key: estimate(None, reason="broke off") for key in ("auc", "logloss")}
    empty = {"cost": dict.fromkeys(COSTS), "calibration": None, "groups": {}}
    page = Page(to_html(comparison([model("A", None, metrics=nothing, **empty)], gates=None, prompts=[])))
    assert not [a for a in page.all("svg") if a.get("role") == "img"]
    assert len([a for a in page.all("p") if a.get("class") == "absent"]) == 7
    assert "No plot: no model has a value of AUC." in page.texts
    none = Page(to_html(comparison([], differences=[])))
    assert "No model finished." in none.texts
    assert "no model finished" in terminal_table(comparison([], differences=[]))


def test_next_item_has_no_reliability():
    assert "Reliability" not in Page(to_html(comparison(task="next_item"))).text


def test_many_models_and_users():
    many = [
        model(f"model {i} with a long name gate=uniform lens_residual=True", 0.5 + i / 99) for i in range(15)
    ]
    gates = {
        "model": "m",
        "experts": 2,
        "users": [str(i) for i in range(200)],
        "values": [[i / 200, 1 - i / 200] for i in range(200)],
        "coordinates": [[i, -i] for i in range(200)],
        "profile_field": None,
        "profile": None,
    }
    page = Page(to_html(comparison(many, gates=gates)))
    assert "The best 6 of 15 models are drawn." in page.text and "Each mark is a user" in page.text


# Whatever the names and numbers


NAMES = st.text(max_size=60) | st.text(alphabet="<>&|\\`_*[]{}$%#^~\"'-\n\r\t= a\x00\x1b\u202e", max_size=40)
NUMBERS = st.none() | st.floats(-1e6, 1e6, allow_nan=False)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(names=st.lists(NAMES, min_size=1, max_size=4), numbers=st.lists(NUMBERS, min_size=8, max_size=8))
def test_any_names_and_numbers(names, numbers):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "find_spec", lambda name: None)
        check_files(names, numbers)


@needs_matplotlib
@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(names=st.lists(NAMES, min_size=1, max_size=2), numbers=st.lists(NUMBERS, min_size=8, max_size=8))
def test_any_names_and_numbers_can_be_drawn(names, numbers):
    check_files(names, numbers)


def check_files(names, numbers):
    models = [model(name, 0.5 + i / 10) for i, name in enumerate(names)]
    models[0]["metrics"]["auc"] |= dict(zip(("mean", "sd", "low", "high"), numbers, strict=False))
    models[0]["cost"] |= {"train_seconds": numbers[4], "test_seconds": numbers[5]}
    models[0]["groups"] = {names[-1]: [{"name": names[0], "rows": 3, "value": numbers[6], "reason": None}]}
    found = comparison(models, dataset=names[0], command=names[-1], notes=names, sentences=names)
    found["gates"]["values"] = [[number or 0.0 for number in numbers[:3]]] * 2
    found["gates"]["profile"] = [names[0], names[-1]]
    found["prompts"][0].update(text=names[0], item=names[-1], scores={names[0]: numbers[7]})

    page = Page(to_html(found))
    assert len(page.all("script")) == 1
    for name in names:
        assert any(cell.startswith(clean(name)) for cell in page.cells)
    assert all(len(set(table)) == 1 for table in columns(to_markdown(found)))
    head, _, *lines = terminal_table(found).splitlines()
    assert len([line for line in lines[: len(names)] if line]) == len(names), "one line for each model"
    kept = [line["model"] for line in records(to_csv(found), "metric")][::2]
    names = [clean(name.encode("utf-8", "replace").decode(), lines=True) for name in names]
    assert [cell.removeprefix("'") for cell in kept] == [name.removeprefix("'") for name in names]
    assert not [cell for cell in kept if re.match(r"\s*[=@]", cell)]
    body = to_latex(found)
    assert re.sub(r"\\[{}]", "", body).count("{") == re.sub(r"\\[{}]", "", body).count("}")
