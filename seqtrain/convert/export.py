"""Writing the student as a folder that `AutoModelForCausalLM.from_pretrained` loads after `import seqtrain`."""

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seqtrain.convert.architecture import Architecture
from seqtrain.convert.sources import Source
from seqtrain.convert.verify import check
from seqtrain.errors import ConfigError
from seqtrain.files import replacing
from seqtrain.models import LanguageModel
from seqtrain.testing import relative_error

# Files of the tokenizer and of generation, copied as they are.
CARRIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
RELOADED = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-3}


def refuse_existing(folder: Path) -> None:
    """Raises `ConfigError` where `folder` exists: no model is overwritten."""
    if folder.exists():
        raise ConfigError(f"output_dir={folder.parent}: holds a model already ({folder.name}); use another output_dir")


def export(student: LanguageModel, architecture: Architecture, source: Source, folder: Path) -> None:
    """Writes weights (safetensors), config, tokenizer, chat template and generation config; whole or not at all."""
    refuse_existing(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with replacing(folder) as unfinished:
        unfinished.mkdir()
        _as_huggingface(student, architecture, source).save_pretrained(unfinished)
        for name in CARRIED:
            if source.path.is_dir() and (source.path / name).is_file():
                shutil.copyfile(source.path / name, unfinished / name)
        if not source.path.is_dir() and (tokenizer := source.tokenizer()) is not None:
            tokenizer.save_pretrained(unfinished)


def _as_huggingface(student: LanguageModel, architecture: Architecture, source: Source) -> Any:
    from seqtrain.models.huggingface import SeqtrainForCausalLM
    from seqtrain.models.huggingface_config import SeqtrainConfig

    theirs = source.config
    config = SeqtrainConfig.of(
        architecture.model,
        architecture.mixers,
        architecture.vocab_size,
        max_position_embeddings=theirs.max_position_embeddings,
        pad_token_id=theirs.pad_token_id,
        bos_token_id=theirs.bos_token_id,
        eos_token_id=theirs.eos_token_id,
        dtype=student.embedding.weight.dtype,
    )
    with torch.device("meta"):
        model = SeqtrainForCausalLM(config)
    model.model = student
    return model


@torch.no_grad()
def check_reloaded(folder: Path, tokens: Tensor, expected: Tensor) -> list[dict[str, Any]]:
    """Checks the exported model, loaded again: logits on `tokens: [B,T]`, and generation with and without cache.

    `expected: [B,T,vocab]`: the student's logits before it was exported.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    error = relative_error(model(tokens).logits, expected)
    reloaded = check("exported and loaded again", error, RELOADED[next(model.parameters()).dtype])
    prompt = tokens[:1, : min(tokens.shape[1], 100)]
    options = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    new = [model.generate(prompt, use_cache=cached, **options)[0] for cached in (True, False)]
    differing = float(sum(a != b for a, b in zip(*(row.tolist() for row in new), strict=False)))
    return [reloaded, check("tokens that differ when generated with and without the cache", differing, 0.0)]


@torch.no_grad()
def long_generation(folder: Path, prompt: Tensor, new_tokens: int) -> list[dict[str, int]]:
    """Bytes of the cache while Hugging Face's `generate` continues `prompt: int64 [1,T]` greedily for `new_tokens`.

    A row `{"tokens": ..., "bytes": ...}` for the prompt, one whenever the tokens seen
    have doubled, and one at the end.
    """
    from transformers import AutoModelForCausalLM, StoppingCriteriaList

    from seqtrain.models.huggingface_cache import StateCache

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    cache = StateCache(model.config.num_hidden_layers)
    rows: list[dict[str, int]] = []

    def watch(tokens: Tensor, scores: Tensor, **unused: Any) -> Tensor:
        # The token that was just chosen has not entered the cache yet.
        seen = cache.get_seq_length()
        if not rows or seen >= 2 * rows[-1]["tokens"] or seen == prompt.shape[1] + new_tokens - 1:
            rows.append({"tokens": seen, "bytes": cache.nbytes})
        return torch.zeros(len(tokens), dtype=torch.bool)

    model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        past_key_values=cache,
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0,
        stopping_criteria=StoppingCriteriaList([watch]),
    )
    return rows
