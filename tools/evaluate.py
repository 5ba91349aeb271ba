"""lm-evaluation-harness on an exported model, with its own command line:

    python tools/evaluate.py --model hf --model_args pretrained=FOLDER --tasks arc_easy,hellaswag
    python tools/evaluate.py --model hf --model_args pretrained=FOLDER --include_path TASK_FOLDER --tasks MY_TASK

It needs the extra `eval` (`pip install 'seqtrain[eval]'`). The harness's `hf` model loads folders with transformers'
Auto classes, which know exported models once seqtrain is imported: that is all this adds. Exit status: the harness's
own; 2 where it is not installed.
"""

import sys

# Registers exported models with transformers.
import seqtrain  # noqa: F401


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
    cli_evaluate()
    return 0


if __name__ == "__main__":
    sys.exit(main())
