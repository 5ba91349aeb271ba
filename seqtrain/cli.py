"""The console command `seqtrain COMMAND [key=value ...]`; the scripts in launch/ and tools/ are doors to the same.

    eval "$(seqtrain --shell-completion install=bash)"     completes commands, groups and keys (fish, zsh as well)

A command's module is imported when it runs: help, a composed config and a wrong key cost no `import torch`.
"""

import ast
import importlib
import logging
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

from seqtrain.collector import lasting, paused
from seqtrain.errors import ConfigError, exit_status, unknown_name
from seqtrain.help import composed_before, examples, page
from seqtrain.schema import read_module


@dataclass(frozen=True)
class Command:
    """What a word after `seqtrain` starts."""

    # The module whose `main(arguments) -> status` does the work, and raises `SeqtrainError` for the user's mistakes.
    module: str
    # What it does, in a line.
    about: str
    # Its primary config in conf/, where it reads Hydra's overrides; else its class `Settings` lists its keys.
    config: str = ""
    # What is typed before the names of the fields of its class `Settings`, where other keys are those of pretraining.
    prefix: str = ""

    def __call__(self, name: str, arguments: Sequence[str]) -> int:
        if {"-h", "--help"} & set(arguments):
            print(self.help(name))
            return 0
        if self.config:
            if text := composed_before(self.config, arguments):
                print(text)
                return 0
            from seqtrain.config import asks_for_text, check_keys, show_text

            if asks_for_text(arguments):
                return show_text(self.config, arguments)
            with paused():
                check_keys(self.config, arguments)
        if sys.stderr.isatty():
            # Importing PyTorch and the rest takes seconds.
            print(f"{name}: starting ...", file=sys.stderr)
        with lasting() if self.module not in sys.modules else nullcontext():
            module = importlib.import_module(self.module)
        try:
            status: int = module.main(list(arguments))
        except ConfigError as error:
            if arguments or "is required" not in str(error):
                raise
            example = examples(name, self.docstring)[0].partition("  #")[0].rstrip()
            raise ConfigError(f"{error}, as in: {example}") from error
        return status

    @property
    def docstring(self) -> str:
        return ast.get_docstring(read_module(self.module).tree) or ""

    def help(self, name: str) -> str:
        """What the command is for, examples, and a table of its keys."""
        settings = read_module(self.module).find("Settings")
        return page(name, self.docstring, {self.prefix: settings} if settings else {}, self.config)


COMMANDS = {
    "pretrain": Command(
        "seqtrain.runtime.pretrain", "train a language model; with no override, the quickstart", "pretrain"
    ),
    "convert": Command("seqtrain.convert.run", "turn a pretrained Transformer into a recurrent model", "convert"),
    "generate": Command("seqtrain.runtime.generate", "continue a prompt with a trained model", "generate"),
    "export": Command("seqtrain.runtime.export", "write a run's newest checkpoint for transformers"),
    "profile": Command(
        "seqtrain.profiling.throughput", "tell where time and memory of a step go", "profile_throughput"
    ),
    "kernel-report": Command("seqtrain.kernels.inspect.report", "compile and count Triton kernels without a GPU"),
    "predict-kernels": Command("seqtrain.kernels.inspect.timing", "predict the time of Triton kernels without a GPU"),
    "compare": Command("seqtrain.profiling.compare_runs", "compare finished runs or profiles"),
    "sharpness": Command("seqtrain.runtime.sharpness", "measure how sharply a run's loss curves at its checkpoints"),
    "spikes": Command("seqtrain.convert.spikes", "measure perplexity and spikes of a pretrained model's activations"),
    "state-bits": Command("seqtrain.convert.state_bits", "measure perplexity with generation's states in few bits"),
    "plan": Command(
        "seqtrain.planning.plan", "find the layout of a run that fits a cluster and is fastest", prefix="plan."
    ),
    "inspect": Command(
        "seqtrain.planning.inspect_model", "count parameters, FLOPs, state and activation bytes", prefix="inspect."
    ),
    "inspect-data": Command(
        "seqtrain.planning.inspect_data",
        "show rows as the model sees them, and count what is odd",
        prefix="inspect.",
    ),
    "audit": Command("seqtrain.audit.run", "check a model of transformers for leaks, wrong caches and the like"),
    "check-order": Command(
        "seqtrain.planning.check_order", "show that a step's communication can't deadlock on GPUs", prefix="check."
    ),
    "simulate": Command("seqtrain.planning.simulate_scaling", "simulate steps with one sequence over many ranks"),
    "bench-operators": Command("seqtrain.benchmarks.operators", "time operators against others"),
    "bench-launches": Command("seqtrain.benchmarks.launches", "time the Python around launches of Triton kernels"),
    "bench-all-scan": Command("seqtrain.benchmarks.all_scan", "time ways to hand states from rank to rank"),
    "compare-optimizers": Command("seqtrain.benchmarks.optimizers", "compare optimizers on the same text and time"),
    "compare-recipes": Command("seqtrain.benchmarks.recipes", "compare recipes of conversion on one teacher"),
    "bench-training": Command("seqtrain.benchmarks.training", "time training steps against transformers' own models"),
    "bench-decode": Command("seqtrain.benchmarks.decode", "time decoding against transformers and memory's rate"),
    "compare-settings": Command("seqtrain.benchmarks.settings", "compare the throughput of runs with other settings"),
    "bench-memory": Command("seqtrain.benchmarks.memory", "measure the peak memory of one step on one long sequence"),
    "bench-regression": Command("seqtrain.benchmarks.regression", "compare CPU time with an earlier commit"),
    "compare-commits": Command("seqtrain.benchmarks.replay", "compare the numbers of runs with an earlier commit"),
}


# What libraries say on every start that nothing follows from, by the name of their logger: of an accelerator that is
# not there, of enumerations, of what is for GPUs.
ASIDES = {"DeepSpeed": "accelerator", "torch.utils._pytree": "register_constant", "torchao": "Failed to load"}


def _is_more_than(said: str, record: logging.LogRecord) -> bool:
    return said not in str(record.msg)


def run(name: str, arguments: Sequence[str] | None = None) -> int:
    """Runs the command `name`, by default on what stands on the command line; gives its exit status, 2 with one line
    for a mistake of the user.

    A name with a dot is that of a module outside the package, such as `experiments.fidelity.run`.
    """

    # Whether there is a GPU is then asked without preparing this process for one, which may fork.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    # Of other libraries, neither bars for what takes a moment nor a warning that nothing follows from.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for library, said in ASIDES.items():
        logging.getLogger(library).addFilter(partial(_is_more_than, said))

    def work() -> int:
        if "." not in name and name not in COMMANDS:
            raise ConfigError(unknown_name("command", name, COMMANDS))
        words = sys.argv[1:] if arguments is None else arguments
        return (COMMANDS.get(name) or Command(name, ""))(name, words)

    return exit_status(work)


def main(arguments: Sequence[str] | None = None) -> int:
    """`seqtrain` itself."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] in (["-sc"], ["--shell-completion"]):
        return _complete(words)
    if not words or words[0] in ("-h", "--help"):
        width = max(map(len, COMMANDS))
        lines = [f"  {name:<{width}}  {command.about}" for name, command in COMMANDS.items()]
        print(
            "\n".join(["seqtrain COMMAND [key=value ...]", "", *lines, "", "seqtrain COMMAND --help lists its keys."])
        )
        return 0
    return run(words[0], words[1:])


def _complete(words: list[str]) -> int:
    """Hydra's shell completion, with the command's own config; the command itself is completed here."""
    from seqtrain.config import show_text

    program, *typed = os.environ.get("COMP_LINE", "seqtrain").split(" ")
    command = COMMANDS.get(typed[0]) if len(typed) > 1 else None
    if "query" not in words[-1]:
        return show_text("pretrain", words)
    if len(typed) < 2:
        print(" ".join(name for name in COMMANDS if name.startswith("".join(typed))))
    elif command and command.config:
        os.environ["COMP_LINE"] = " ".join([program, *typed[1:]])
        return show_text(command.config, words)
    return 0


if __name__ == "__main__":
    sys.exit(main())
