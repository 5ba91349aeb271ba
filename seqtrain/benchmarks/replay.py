"""Proof that a change of structure changes no number: short runs and all composed configs, at a commit and here.

    python tools/compare_commits.py OLD_COMMIT
    python tools/compare_commits.py OLD_COMMIT 'runs=[delta_rule,zero3]'
    python tools/compare_commits.py HEAD~1 output_dir=outputs/before_and_after

The runs have five steps each and cover every family of mixers, sequence parallelism, segments, ZeRO 0 to 3, bfloat16
products and a conversion of two stages. The commit's are kept in `output_dir` and made once, this tree's are made each
time. Printed are a verdict for each run, as `tools/compare_runs.py` gives it, and every key of every choice under conf/
whose composed value has changed. Exit status: 0 where all losses are the same, bit for bit, else 1. Configs that differ
are only listed: a default may change on purpose.
"""

import json
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seqtrain.benchmarks.commits import ROOT, checkout, read_commit_settings, resolve, run_python
from seqtrain.profiling.compare_runs import changes, difference, read_run, verdict

# One process, a model of one layer of each mixer named, 256 tokens a sequence.
ONE = """
runtime=inline parallel.data=1 parallel.zero_stage=1 data=stdlib data.held_out=0.01 model=hybrid_tiny model.width=64
train.steps=5 train.sequence_length=256 train.batch_size=4 train.micro_batch_size=2 train.dtype=float32
optimizer.lr=3e-3 schedule.warmup_fraction=0.1 evaluation.every=0 evaluation.max_tokens=1024 checkpoint.every=3
checkpoint.resume=never sample.tokens=1 tracking.mode=disabled seed=1
"""
TWO = "runtime=ray runtime.cpus_per_worker=1"
MIXED = "gla,gated_delta_net,s5,tensor_attention,sliding_attention,attention"
# Name -> the layers, and overrides of launch/pretrain.py behind `ONE`.
RUNS = {
    "linear_attention": ("linear_attention,trans_normer,mala,nalaformer,dydila,based", ""),
    "decay": ("retnet,gla,mamba2,hgrn2,rwkv6,mlstm,gsa", ""),
    "delta_rule": ("delta_net,gated_delta_net,kda,delta_product,rwkv7", ""),
    "gated_rnn": ("hgrn,rg_lru,min_gru", ""),
    "state_space": ("s4d,s4_ptd,s5,s5_ptd", ""),
    "third_order": ("ttt_linear,tensor_attention", ""),
    "softmax": ("attention,sliding_attention,streaming_attention,tcnca", ""),
    "combined": ("intra_hybrid,linearized_attention,liger_gla,liger_gsa,liger_hgrn2", ""),
    "sequence": (MIXED, f"{TWO} parallel.sequence=2"),
    "segments": (MIXED, "train.segment_tokens=128"),
    "bfloat16": (MIXED, "train.dtype=bfloat16"),
    "zero0": (MIXED, f"{TWO} parallel.data=2 parallel.zero_stage=0"),
    "zero2": (MIXED, f"{TWO} parallel.data=2 parallel.zero_stage=2"),
    "zero3": (MIXED, f"{TWO} parallel.data=2 parallel.zero_stage=3"),
}
CONVERSION = """
target=gla recipe=transfer_then_kl recipe.stages.transfer.steps=5 recipe.stages.kl.steps=5
recipe.stages.transfer.sequence_length=128 recipe.stages.kl.sequence_length=128 data.tokenizer=bytes layer.window=16
verify.tokens=64 verify.sequences=1 verify.generate=4 runtime=inline seed=1
"""
# Writes a small Llama with random weights and a tokenizer of bytes, in Hugging Face's form.
TEACHER = """
import sys, torch, transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
tokens = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(["<s>", "</s>", *alphabet])}, merges=[]))
tokens.pre_tokenizer, tokens.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
torch.manual_seed(0)
sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
config = transformers.LlamaConfig(vocab_size=len(alphabet) + 2, max_position_embeddings=512, bos_token_id=0,
                                  eos_token_id=1, tie_word_embeddings=True, **sizes)
transformers.LlamaForCausalLM(config).save_pretrained(sys.argv[1])
tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokens, bos_token="<s>", eos_token="</s>")
tokenizer.save_pretrained(sys.argv[1])
"""
# Prints every composed config as JSON: {"PROGRAM GROUP=CHOICE": values or an error's text}.
CONFIGS = """
import json, sys
from pathlib import Path
from omegaconf import OmegaConf
from seqtrain.config import compose_config, conf_dir
found = {}
for program in ("pretrain", "convert", "profile_throughput", "generate"):
    choices = [()]
    for group in sorted(p for p in conf_dir().iterdir() if p.is_dir() and p.name != "mixer"):
        choices += [(f"{group.name}={f.stem}",) for f in sorted(group.glob("*.yaml")) if f.stem[0] != "_"]
    for overrides in choices:
        try:
            values = OmegaConf.to_container(compose_config(program, ["output_dir=X", *overrides]), resolve=True)
        except Exception as error:
            values = {"error": str(error)[:60]}
        found[" ".join((program, *overrides))] = values
json.dump(found, open(sys.argv[1], "w"))
"""


@dataclass(frozen=True)
class Settings:
    # The commit whose numbers this tree must give.
    commit: str
    # Runs to compare, by name; all and the conversion where empty.
    runs: tuple[str, ...] = ()
    # Folder for the runs of both, by commit.
    output_dir: str = "outputs/compare_commits"


def record(tree: Path, folder: Path, names: tuple[str, ...]) -> None:
    """Makes the runs of `names` in `folder` that are not there yet, with the code in `tree`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        out, done = folder / name, folder / f"{name}.done"
        if done.exists():
            continue
        # What an interrupted call has left.
        shutil.rmtree(out, ignore_errors=True)
        print(f"{folder.name}: {name}", file=sys.stderr)
        if name == "conversion":
            teacher = str(folder / "teacher")
            run_python(tree, ["-c", TEACHER, teacher])
            words = ["launch/convert.py", f"source={teacher}", *CONVERSION.split()]
        else:
            layers, more = RUNS[name]
            model = f"model.layers=[{layers}] model.depth={layers.count(',') + 1}"
            words = ["launch/pretrain.py", *f"{ONE} {model} {more}".split()]
        run_python(tree, [*words, f"output_dir={out}"])
        done.touch()
    configs = folder / "configs.json"
    if not configs.exists():
        run_python(tree, ["-c", CONFIGS, str(configs)])


def changed_keys(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, list[str]]:
    """`key: old -> new` of the composed values that differ, with the choices under which they do."""
    found: dict[str, list[str]] = {}
    for choice in old.keys() | new.keys():
        for key, pair in changes([config.get(choice, {"choice": "absent"}) for config in (old, new)]).items():
            found.setdefault(f"{key}: {' -> '.join(pair)}", []).append(choice)
    return found


def main(arguments: list[str]) -> int:
    settings = read_commit_settings(Settings, arguments)
    names = settings.runs or (*RUNS, "conversion")
    root = Path(settings.output_dir).resolve()
    old, new = root / resolve(settings.commit)[:12], root / "here"
    with checkout(settings.commit) as tree:
        record(tree, old, names)
    # Runs of an earlier state of this tree would prove nothing.
    shutil.rmtree(new, ignore_errors=True)
    record(ROOT, new, names)
    same = True
    for name in names:
        # One folder for a run, one per stage for a conversion.
        for stage in sorted(str(file.parent.relative_to(old / name)) for file in (old / name).rglob("metrics.jsonl")):
            found = difference(read_run(str(old / name / stage)), read_run(str(new / name / stage)), 0.0)
            same &= found.same
            said = verdict(found, 0.0).partition(": ")[2]
            print(f"{name} {'' if stage == '.' else stage}: {said}")
    configs = [json.loads((folder / "configs.json").read_text()) for folder in (old, new)]
    for change, choices in sorted(changed_keys(*configs).items()):
        shown = ", ".join(sorted(choices)[:3]) + (f" and {len(choices) - 3} more" if len(choices) > 3 else "")
        print(f"config {change}  ({shown})")
    return 0 if same else 1
