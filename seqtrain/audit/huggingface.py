"""A transformers model as a subject: what its Trainer, generation and collator do with it."""

import inspect
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from seqtrain.audit.subject import MicroBatch, Subject, Trainer
from seqtrain.testing import boundaries

# Tokens of a row, and of a chunk where no config says it: there is to be more than one.
TOKENS, CHUNK = 101, 64


def of_huggingface(model: nn.Module) -> Subject:
    """`model`, a transformers model for causal language modeling, as its own library calls it.

    Packed rows are `DataCollatorWithFlattening`'s, padding and cache are generation's, the loss is the Trainer's, and
    bfloat16 is `from_pretrained(folder, dtype=...)`.
    """
    subject = _plain(model)
    trainer = _HuggingFaceTrainer(model)
    return Subject(
        **subject,
        step=_stepper(model),
        padded=lambda tokens, mask: (
            model(tokens, attention_mask=mask, use_cache=False, **_positions(model, mask)).logits
        ),
        packed={name: _packer(model, keys) for name, keys in PACKED.items()},
        cast=lambda dtype: Subject(**_plain(_saved(model, dtype=dtype, experts_implementation="eager"))),
        trainer=Trainer(
            start=trainer.start,
            step=trainer.step,
            weights=lambda run: dict(run.model.named_parameters()),
            save=trainer.save,
            load=trainer.load,
            gradients=trainer.gradients,
        ),
    )


def _plain(model: Any) -> dict[str, Any]:
    chunks = [
        value for key, value in vars(model.config).items() if key.endswith("chunk_size") and isinstance(value, int)
    ]
    return {
        "forward": lambda tokens: model(tokens, use_cache=False).logits,
        "vocabulary": model.get_input_embeddings().weight.shape[0],
        "tokens": max([CHUNK, *chunks]) + TOKENS - CHUNK,
        "module": model,
    }


# By the collator's options, what it says beside tokens.
PACKED = {
    "position_ids": ("position_ids",),
    "seq_idx": ("position_ids", "seq_idx"),
    "cu_seq_lens": ("position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"),
}


def _packer(model: Any, keys: Sequence[str]) -> Callable[[Tensor, Sequence[int]], Tensor]:
    def call(tokens: Tensor, lengths: Sequence[int]) -> Tensor:
        packed, longest = boundaries(lengths), max(lengths)
        known = {
            "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
            "seq_idx": torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None].int(),
            "cu_seq_lens_q": packed,
            "cu_seq_lens_k": packed,
            "max_length_q": longest,
            "max_length_k": longest,
        }
        return model(tokens, use_cache=False, **{key: known[key] for key in keys}).logits

    return call


def _positions(model: nn.Module, mask: Tensor) -> dict[str, Tensor]:
    """As generation counts them."""
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return {}
    return {"position_ids": (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0)}


def _stepper(model: Any) -> Callable[[Tensor, Any], tuple[Tensor, Any]]:
    from transformers import DynamicCache

    taken = inspect.signature(model.forward).parameters
    name, positions = "past_key_values" if "past_key_values" in taken else "cache_params", "position_ids" in taken

    def step(tokens: Tensor, cache: Any) -> tuple[Tensor, Any]:
        seen, before = cache or (0, None)
        places = {"position_ids": torch.arange(seen, seen + tokens.shape[1])[None]} if positions else {}
        out = model(tokens, use_cache=True, **{name: before}, **places)
        if before is None and out.get(name) is None:
            # It keeps what it is given alone.
            before = DynamicCache(config=model.config)
            out = model(tokens, use_cache=True, **{name: before}, **places)
        return out.logits, (seen + tokens.shape[1], out.get(name, before))

    return step


def _saved(model: Any, **options: Any) -> Any:
    """`model` as it comes back from disk."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return _loaded(model, folder, **options).eval()


def _loaded(like: Any, folder: Any, **options: Any) -> Any:
    """A model of a folder that runs as `like` does."""
    return type(like).from_pretrained(folder, attn_implementation=like.config._attn_implementation, **options)


@dataclass
class _Run:
    model: Any
    optimizer: torch.optim.Optimizer


class _HuggingFaceTrainer:
    """transformers' Trainer in small: its loss, AdamW, and what it saves of both."""

    def __init__(self, model: Any):
        self._model = model

    def start(self) -> _Run:
        """A copy. What modules keep beside weights, as states of a call, is not copied."""
        model = type(self._model)(self._model.config)
        model.load_state_dict(self._model.state_dict())
        return self._run(model)

    def _run(self, model: Any) -> _Run:
        return _Run(model.train(), torch.optim.AdamW(model.parameters(), lr=1e-3))

    def gradients(self, batches: Sequence[MicroBatch]) -> tuple[float, Mapping[str, Tensor]]:
        run = self.start()
        loss = self._backward(run, batches)
        return loss, {name: each.grad for name, each in run.model.named_parameters() if each.grad is not None}

    def step(self, run: _Run, batches: Sequence[MicroBatch]) -> float:
        run.optimizer.zero_grad()
        loss = self._backward(run, batches)
        run.optimizer.step()
        return loss

    def _backward(self, run: _Run, batches: Sequence[MicroBatch]) -> float:
        total, count = 0.0, torch.tensor(sum(int((labels >= 0).sum()) for _, labels in batches))
        # As the Trainer decides it.
        takes = any(each.kind == each.VAR_KEYWORD for each in inspect.signature(run.model.forward).parameters.values())
        for tokens, labels in batches:
            # The model shifts labels itself: token by token, they are those of the one before.
            row, targets = torch.cat([tokens, tokens[:, -1:]], 1), torch.cat([tokens[:, :1] * 0 - 100, labels], 1)
            options = {"num_items_in_batch": count} if takes else {}
            loss = run.model(row, labels=targets, use_cache=False, **options).loss
            loss = loss if takes else loss / len(batches)
            loss.backward()
            total += float(loss.detach())
        return total

    @staticmethod
    def save(run: _Run, folder: Path) -> None:
        run.model.save_pretrained(folder)
        torch.save(run.optimizer.state_dict(), folder / "optimizer.pt")

    def load(self, folder: Path) -> _Run:
        model = _loaded(self._model, folder)
        for weight in model.parameters():
            # In memory of its own: products round by how a mapped file happens to be aligned.
            weight.data = weight.data.clone()
        run = self._run(model)
        run.optimizer.load_state_dict(torch.load(folder / "optimizer.pt", weights_only=True))
        return run
