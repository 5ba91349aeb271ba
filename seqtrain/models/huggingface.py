"""`LanguageModel` as a Hugging Face model: `from_pretrained`, `save_pretrained`, `generate`.

Padding never enters a layer: a padded batch is run as packed documents, so that pads neither decay nor write anything.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel

from seqtrain.errors import CheckpointError
from seqtrain.mixers import State
from seqtrain.models.huggingface_cache import StateCache, as_documents, as_rows
from seqtrain.models.huggingface_config import SeqtrainConfig
from seqtrain.parallel.sequence import SequenceContext


class SeqtrainForCausalLM(PreTrainedModel, GenerationMixin):
    """A causal language model with recurrent layers; `past_key_values` is a `StateCache`."""

    config_class = SeqtrainConfig
    config: SeqtrainConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = False
    _supports_sdpa = True
    _tied_weights_keys = {"model.head.weight": "model.embedding.weight"}  # noqa: RUF012 (transformers' own form)

    def __init__(self, config: SeqtrainConfig):
        super().__init__(config)
        config.check()
        self.model = config.build()
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As transformers does it, but raises `CheckpointError` for weights that are missing or belong elsewhere."""
        wanted = kwargs.pop("output_loading_info", False)
        loaded: Any = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        model, info = loaded
        for key in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if names := sorted(str(name) for name in info[key]):
                what = key.replace("_", " ")
                raise CheckpointError(f"{pretrained_model_name_or_path}: {what}: {', '.join(names[:3])}")
        return (model, info) if wanted else model

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        assert isinstance(value, nn.Embedding), value
        self.model.embedding = value

    def get_output_embeddings(self) -> nn.Module:
        return self.model.head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.model.head.weight = new_embeddings.weight

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        # `forward` makes its own cache.
        return False

    def _init_weights(self, module: nn.Module) -> None:
        """Weights are set where `LanguageModel` is built."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: StateCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        return_dict: bool | None = None,
        **ignored: Any,
    ) -> CausalLMOutputWithPast | tuple:
        """`input_ids: int64 [B,T]`, the tokens after those of `past_key_values` -> logits, float32 `[B,T,vocab]`.

        `attention_mask: [B,T]` or `[B,past + T]`: 0 for padding, on any side; its logits are zero. `labels: [B,T]`: as
        `input_ids`; the loss is the mean over tokens that are not -100 and not padding. `logits_to_keep`: only so many
        last positions; 0: all. Positions follow from the tokens seen, so `position_ids` is ignored.
        """
        tokens = input_ids.shape[1]
        use_cache = self.config.use_cache and not self.training if use_cache is None else use_cache
        real = None if attention_mask is None else attention_mask[:, -tokens:].bool()
        real = None if real is None or bool(real.all()) else real
        states = None if past_key_values is None else past_key_values.states
        hidden, states = self._hidden(input_ids, real, states)
        cache = None
        if use_cache:
            cache = StateCache(len(states)) if past_key_values is None else past_key_values
            cache.replace(states, tokens)
        logits = self.model.head(hidden[:, -logits_to_keep:])
        loss = None if labels is None else self._loss(hidden, labels, real)
        output = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)
        return output.to_tuple() if return_dict is False else output

    def _hidden(self, input_ids: Tensor, real: Tensor | None, states: list[State] | None) -> tuple[Tensor, list[State]]:
        """What the head is given, `[B,T,D]`, zeros for padding (`real: bool [B,T]` is False), and the states."""
        if real is None:
            return self.model.hidden(input_ids, states)
        boundaries = nn.functional.pad(real.sum(1).cumsum(0), (1, 0))
        past = None if states is None else [as_documents(state) for state in states]
        packed, after = self.model.hidden(input_ids[real][None], past, sequence=SequenceContext(boundaries))
        hidden = packed.new_zeros(*input_ids.shape, packed.shape[-1])
        hidden[real] = packed[0]
        return hidden, [as_rows(state) for state in after]

    def _loss(self, hidden: Tensor, labels: Tensor, real: Tensor | None) -> Tensor:
        """Mean cross-entropy of each token given those before it."""
        wanted = labels if real is None else labels.masked_fill(~real, -100)
        if real is not None:
            # What follows padding was not predicted by it.
            wanted = torch.cat([wanted[:, :1], wanted[:, 1:].masked_fill(~real[:, :-1], -100)], 1)
        wanted = wanted[:, 1:]
        return self.model.head(hidden[:, :-1], wanted) / (wanted != -100).sum().clamp(min=1)
