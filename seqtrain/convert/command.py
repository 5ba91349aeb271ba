"""Turns a pretrained Transformer into a recurrent model, trained towards its teacher.

    python launch/convert.py source=path/to/SmolLM2-135M target=gla recipe=transfer_then_kl output_dir=converted
    python launch/convert.py source=path/to/model.gguf target=gated_delta_net keep=every:4 recipe=lolcats
    python launch/convert.py source=path/to/Qwen3-0.6B target=liger_gla recipe=liger layer.window=128

Reads Llama, Mistral, Qwen2, Qwen3 or SmolLM2 checkpoints (safetensors or GGUF). Softmax attention becomes a window and
a recurrent state in all layers but those that `keep` names; a model that keeps none generates in constant memory.
`output_dir` gets the model in Hugging Face's form, report.md and report.json; the same command resumes what stopped.
"""

import sys
from collections.abc import Sequence

from rich.console import Console

from seqtrain.config import launch
from seqtrain.convert.run import convert
from seqtrain.convert.settings import ConvertConfig, read_convert_config
from seqtrain.convert.stages import Stopped


def main(arguments: Sequence[str]) -> int:
    """Converts as `arguments` say; gives the exit status.

    0, 1 where a check of the new model failed, 2 for a mistake, 128 + the signal's number where one stopped the
    training, which the same command with that output_dir resumes.
    """
    return launch("convert", arguments, read_convert_config, start)


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
            print(f"stopped; rerun with output_dir={config.output_dir} to resume", file=sys.stderr)
            return 128 + stopped.number
    for text, found in report["end"]["texts"].items():
        print(f"perplexity on {text}:", ", ".join(f"{name} {value:.2f}" for name, value in found["perplexity"].items()))
    for check in report["checks"]:
        if not check["passed"]:
            print(f"FAILED: {check['name']}: {check['error']:.1e}, at most {check['limit']:.0e}")
    print(f"model: {config.output_dir}/model, report: {config.output_dir}/report.md")
    return 0 if report["passed"] else 1
