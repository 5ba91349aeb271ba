"""The benchmark of training runs: variants take turns, and their speeds are those of the steps after the first few."""

import json

from seqtrain.runtime.report import WARM_UP_STEPS
from tests.command_cases import run_command

# Stands in for launch/pretrain.py: writes metrics as a run does, and a line for each start.
PROGRAM = """
import json, sys
from pathlib import Path
given = dict(argument.split("=", 1) for argument in sys.argv[1:])
folder = Path(given["output_dir"])
folder.mkdir(parents=True)
with open(Path(__file__).parent / "starts", "a") as starts:
    starts.write(given["speed"] + "\\n")
if given["speed"] == "none":
    sys.exit("error: speed: no such thing")
with open(folder / "metrics.jsonl", "w") as file:
    for step in range(int(given["steps"])):
        speed = 1.0 if step < {warm_up} else float(given["speed"])
        file.write(json.dumps({{"step": step + 1, "tokens_per_second": speed}}) + "\\n")
"""


def run(folder, *arguments):
    program = folder / "program.py"
    program.write_text(PROGRAM.format(warm_up=WARM_UP_STEPS))
    return run_command("compare-settings", f"program={program}", f"output_dir={folder / 'out'}", *arguments)


def test_variants_in_turns(tmp_path):
    steps = WARM_UP_STEPS + 2
    done = run(tmp_path, "variants=[speed=300 a=b,speed=200]", f"common=[steps={steps}]", "rounds=2")
    assert done.status == 0, done.err
    assert (tmp_path / "starts").read_text().split() == ["300", "200"] * 2
    rows = json.loads((tmp_path / "out" / "compare_settings.json").read_text())["rows"]
    assert [(row["variant"], row["tokens_per_second"], row["ratio"], row["steps"]) for row in rows] == [
        ("speed=300 a=b", 300.0, 1.5, 4),
        ("speed=200", 200.0, 1.0, 4),
    ]


def test_a_run_that_fails_ends_it_with_its_reason(tmp_path):
    done = run(tmp_path, "variants=[speed=none]", "common=[steps=9]")
    assert done.status == 2
    assert done.err.strip() == "error: speed=none: error: speed: no such thing"
