"""lm-evaluation-harness on a run or an exported model, with its own command line:

    python tools/evaluate.py run=runs/mine --tasks arc_easy,hellaswag
    python tools/evaluate.py --model hf --model_args pretrained=FOLDER,dtype=float32 --tasks arc_easy,hellaswag
    python tools/evaluate.py --model hf --model_args pretrained=FOLDER --include_path TASK_FOLDER --tasks MY_TASK

FOLDER is that of an exported model, a conversion or a run; a run's newest checkpoint is exported to a temporary folder,
with its adapters, if it trained some, in the weights. It needs the extra `eval` (`pip install 'seqtrain[eval]'`). The
harness's `hf` model loads folders with transformers' Auto classes, which know exported models once seqtrain is
imported. Exit status: the harness's own; 2 where it is not installed, or FOLDER holds no model.
"""

import sys
import tempfile
from pathlib import Path

from seqtrain.cli import run
from seqtrain.errors import exit_status
from seqtrain.validation import expand


def main() -> int:
    """Runs the harness on the arguments of this process."""
    try:
        from lm_eval.__main__ import cli_evaluate
    except ImportError as error:
        if {"-h", "--help"} & set(sys.argv[1:]):
            print(__doc__)
            return 0
        print(f"lm-eval can't be imported ({error}): pip install 'seqtrain[eval]'", file=sys.stderr)
        return 2
    # Registers exported models with transformers.
    import seqtrain  # noqa: F401

    with tempfile.TemporaryDirectory() as exported:
        status = exit_status(lambda: prepare(sys.argv, Path(exported) / "model"))
        if status == 0:
            cli_evaluate()
    return status


def prepare(words: list[str], exported: Path) -> int:
    """Puts in place of a run, among the words of the command line, what it is exported as; gives an exit status."""
    for place, word in enumerate(words):
        if word.startswith("run="):
            words[place : place + 1] = ["--model", "hf", "--model_args", f"pretrained={word[4:]}"]
    for place, word in enumerate(words):
        before, found, rest = word.partition("pretrained=")
        folder, comma, more = rest.partition(",")
        if found and (status := _export(Path(expand(folder)), exported)) is not None:
            if status:
                return status
            words[place] = f"{before}{found}{exported}{comma}{more}"
        elif found and (Path(expand(folder)) / "model" / "config.json").is_file():
            words[place] = f"{before}{found}{Path(expand(folder)) / 'model'}{comma}{more}"
    return 0


def _export(folder: Path, exported: Path) -> int | None:
    """The exit status of the export of the run in `folder`; None where it is none."""
    if not (folder / "config.yaml").is_file() or (folder / "config.json").is_file():
        return None
    from seqtrain.config import read_run_config

    merge = ["merge=true"] * bool(read_run_config(folder).get("lora", {}).get("rank"))
    return run("export", [f"run={folder}", f"output_dir={exported}", *merge])


if __name__ == "__main__":
    sys.exit(main())
