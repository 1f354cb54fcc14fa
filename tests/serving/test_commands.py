"""The subcommands of the command line: what they print, and their exit status."""

from __future__ import annotations

import csv
import io
import json

import pytest

from recbole_llm.cli import main
from recbole_llm.serving.commands import COMMANDS


def test_recommend_prints_a_table_csv_and_json_lines(finished, tmp_cwd, capsys):
    run = str(finished("DIN"))
    (tmp_cwd / "users.txt").write_text("4\n2\n")
    assert main(["recommend", run, "@users.txt", "--top", "3", "--device", "cpu"]) == 0
    table = capsys.readouterr().out
    assert table.splitlines()[0].split() == ["user", "rank", "item", "title", "score", "stage"]
    assert len(table.splitlines()) == 7
    assert main(["recommend", run, "4", "2", "--top=3", "--format=csv", "--device=cpu"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["user"] for row in rows] == ["4"] * 3 + ["2"] * 3
    assert (
        main(["recommend", run, "4", "--top=3", "--format=json", "--output=out.jsonl", "--device=cpu"]) == 0
    )
    lines = [json.loads(line) for line in (tmp_cwd / "out.jsonl").read_text().splitlines()]
    assert [line["item"] for line in lines] == [row["item"] for row in rows[:3]]
    assert [line["rank"] for line in lines] == [1, 2, 3]


def test_unknown_ids_are_named_and_the_others_answered(finished, tmp_cwd, capsys):
    assert main(["recommend", str(finished("DIN")), "4", "nobody", "--top=2", "--device=cpu"]) == 1
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 3 and "left out: users nobody" in err


def test_score_reads_pairs_and_later_interactions_and_explains(finished, tmp_cwd, capsys):
    (tmp_cwd / "pairs.csv").write_text("user_id,item_id\n4,1\nnew,2\n")
    header = "user_id:token\titem_id:token\trating:float\ttimestamp:float"
    (tmp_cwd / "new.inter").write_text(f"{header}\nnew\t7\t5\t990000000\n")
    arguments = ["score", str(finished("RecLoRA")), "pairs.csv", "--interactions=new.inter", "--device=cpu"]
    assert main([*arguments, "--format=json", "--explain"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["user"] for line in lines] == ["4", "new"]
    assert all(0 < line["score"] < 1 and line["scale"] == "probability" for line in lines)
    assert all(
        0 < line["lens_score"] < 1 and sum(line["gate"]) == pytest.approx(1, abs=1e-3) for line in lines
    )
    assert main([*arguments, "--explain"]) == 0
    assert "--- prompt of user new, item 2 ---" in capsys.readouterr().out


def test_export_and_merge_print_where_and_how_to_start_an_engine(finished, tmp_cwd, capsys):
    assert (
        main(["export", str(finished("RecLoRA user")), "--users", "4", "--output=adapters", "--device=cpu"])
        == 0
    )
    out = capsys.readouterr().out
    assert "user-4: " in out and "vllm serve" in out and "sglang.launch_server" in out
    runs = [str(finished("TALLRec")), str(finished("TALLRec again"))]
    assert main(["merge", *runs, "--method=svd", "--output=merged"]) == 0
    assert "method svd, rank 8" in capsys.readouterr().out
    assert (tmp_cwd / "merged" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["recommend", "no/such/run", "4"], "no/such/run"),
        (["recommend", "RUN", "@none.txt"], "there is no file none.txt"),
        (["score", "RUN", "none.csv"], "there is no file none.csv"),
        (["recommend", "RUN", "4", "--interactions=none.inter"], "none.inter"),
        (["export", "RUN", "--mean", "--output=x"], "no adapter to export"),
        (["merge", "RUN", "RUN"], "no LoRA to merge"),
    ],
)
def test_errors_are_one_line(arguments, message, finished, tmp_cwd, capsys):
    run = str(finished("DIN"))
    assert main([run if argument == "RUN" else argument for argument in arguments]) == 2
    err = capsys.readouterr().err
    assert err.splitlines()[-1].startswith("error: ") and message in err


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_has_help(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([name, "--help"])
    assert stopped.value.code == 0 and f"recbole-llm {name}" in capsys.readouterr().out
