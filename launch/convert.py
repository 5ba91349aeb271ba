"""Converts a pretrained Transformer: `python launch/convert.py source=FOLDER_OR_GGUF target=MIXER [key=value ...]`.

`--cfg job` lists every key with its value. Exit status: 0, 1 where a check of the new model failed, 2 for a mistake,
128 + the signal's number where one stopped the training; the same command with that output_dir then goes on.
"""

import sys

from rich.console import Console

from seqtrain.config import launch
from seqtrain.convert import ConvertConfig, Stopped, convert, read_convert_config


def start(config: ConvertConfig) -> int:
    """Converts, and prints the outcome."""
    with Console(stderr=True).status("") as status:

        def told(stage: str, what: str) -> None:
            if stage == "train":
                # The runtime shows how far it is.
                status.stop()
                print(f"training: {what}", file=sys.stderr)
            else:
                status.start()
                status.update(f"{stage}: {what}")

        try:
            report = convert(config, told)
        except Stopped as stopped:
            print(f"stopped; the same command with output_dir={config.output_dir} goes on from there", file=sys.stderr)
            return 128 + stopped.number
    for text, found in report["end"]["texts"].items():
        print(f"perplexity on {text}:", ", ".join(f"{name} {value:.2f}" for name, value in found["perplexity"].items()))
    for check in report["checks"]:
        if not check["passed"]:
            print(f"FAILED: {check['name']}: {check['error']:.1e}, at most {check['limit']:.0e}")
    print(f"model: {config.output_dir}/model, report: {config.output_dir}/report.md")
    return 0 if report["passed"] else 1


if __name__ == "__main__":
    sys.exit(launch("convert", read_convert_config, start))
