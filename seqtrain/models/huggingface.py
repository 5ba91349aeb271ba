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
from seqtrain.models.huggingface_cache import StateCache
from seqtrain.models.huggingface_config import SeqtrainConfig
from seqtrain.models.huggingface_packing import Packing, packing_of
from seqtrain.parallel.sequence import SequenceContext


class SeqtrainForCausalLM(PreTrainedModel, GenerationMixin):
    """A causal language model with recurrent layers; `past_key_values` is a `StateCache`."""

    config_class = SeqtrainConfig
    config: SeqtrainConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = False
    # The Trainer gives `num_items_in_batch` then, and does not divide the loss by accumulation steps itself.
    accepts_loss_kwargs = True
    # A state can't be taken back: assisted decoding is refused.
    _is_stateful = True
    _supports_sdpa = True

    def __init__(self, config: SeqtrainConfig):
        super().__init__(config)
        config.check()
        self.model = config.build()
        names: dict[nn.Parameter, str] = {}
        shared = self.model.named_parameters(prefix="model", remove_duplicate=False)
        self._tied_weights_keys = {
            name: first for name, weight in shared if (first := names.setdefault(weight, name)) != name
        }
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

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """As transformers does it; the config then is that of the new size."""
        old = self.config.vocab_size
        embedding = super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        if not mean_resizing:
            # Where rows are new they are as those of a new model, and not as `nn.Embedding` makes them.
            for weight in dict.fromkeys((self.model.embedding.weight, self.model.head.weight)):
                nn.init.normal_(weight.data[old:], std=self.model.config.initializer_range)
        self.model.vocab_size = self.config.vocab_size
        self.config.architecture_sha256 = self.config.fingerprint()
        return embedding

    def _get_resized_lm_head(self, old_lm_head: Any, *args: Any, **kwargs: Any) -> nn.Linear:
        # transformers resizes an nn.Linear alone.
        rows, width = old_lm_head.weight.shape
        linear = nn.Linear(width, rows, bias=False, device="meta")
        linear.weight = old_lm_head.weight
        return super()._get_resized_lm_head(linear, *args, **kwargs)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def _prepare_cache_for_generation(self: Any, generation_config: Any, model_kwargs: Any, *args: Any) -> None:  # type: ignore[override]
        if generation_config.is_assistant:
            raise ValueError("assistant_model: a recurrent state can't be taken back, which an assistant's must")
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args)  # type: ignore[misc]
        # A prompt in chunks needs one before the first of them.
        if generation_config.use_cache is not False and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = StateCache(self.config.num_hidden_layers)

    def _init_weights(self, module: nn.Module) -> None:
        """Weights are set where `LanguageModel` is built."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: StateCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        position_ids: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        max_length_q: int | None = None,
        max_length_k: int | None = None,
        seq_idx: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> CausalLMOutputWithPast | tuple:
        """`input_ids: int64 [B,T]`, the tokens after those of `past_key_values` -> logits, float32 `[B,T,vocab]`.

        `inputs_embeds: [B,T,D]` in their place. `attention_mask: [B,T]` or `[B,past + T]`: 0 for padding, on any side;
        its logits are zero. Samples packed into a row begin with an empty past where `seq_idx: [B,T]` changes,
        `position_ids: [B,T]` do not rise, or at `cu_seq_lens_q: [N+1]`, counted over all B rows; `max_length_q` and
        `max_length_k` follow from these.
        `labels: [B,T]`: as `input_ids`; the loss is the sum over tokens that are not -100, not padding and no sample's
        first, over `num_items_in_batch`, their number where None. `logits_to_keep`: so many last positions, or these;
        0: all. `output_hidden_states`: what enters each block, and what the head is given. Raises `ValueError`.
        """
        if output_attentions or (output_attentions is None and self.config.output_attentions):
            raise ValueError("output_attentions: these layers hold no attention weights; leave it out")
        if past_key_values is not None and not isinstance(past_key_values, StateCache):
            raise ValueError(f"past_key_values is a {type(past_key_values).__name__}, expected a StateCache, or none")
        if cu_seq_lens_k is not None and (cu_seq_lens_q is None or not torch.equal(cu_seq_lens_k, cu_seq_lens_q)):
            raise ValueError("cu_seq_lens_k: keys are of the very tokens; give the same as cu_seq_lens_q")
        x = _one_of(input_ids, inputs_embeds)
        seen = 0 if past_key_values is None else past_key_values.get_seq_length()
        packing = packing_of(
            x,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cu_seq_lens=cu_seq_lens_q,
            seq_idx=seq_idx,
            seen=seen,
        )
        watched = bool(self.config.output_hidden_states if output_hidden_states is None else output_hidden_states)
        kept = slice(-logits_to_keep or None, None) if isinstance(logits_to_keep, int) else logits_to_keep
        past = None if past_key_values is None else past_key_values.states
        loss, entered = None, list[Tensor]()
        if (
            past is not None
            and input_ids is not None
            and x.shape[1] == 1
            and packing is None
            and not watched
            and labels is None
        ):
            one, states = self.model.step(x[:, 0], past)
            logits = one[:, None][:, kept]
        else:
            hidden, states, entered = self._hidden(x, packing, past_key_values, watched)
            loss = None if labels is None else self._loss(hidden, labels, packing, num_items_in_batch)
            logits = self.model.head(hidden[:, kept])
        cache = None
        if self.config.use_cache and not self.training if use_cache is None else use_cache:
            cache = StateCache(len(states)) if past_key_values is None else past_key_values
            cache.replace(states, x.shape[1])
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=cache,
            hidden_states=(*entered, hidden) if watched else None,
        )
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    def _hidden(
        self, x: Tensor, packing: Packing | None, cache: StateCache | None, watched: bool
    ) -> tuple[Tensor, list[State], list[Tensor]]:
        """What the head is given, `[B,T,D]`, zeros for padding, the states, and where `watched` what enters blocks."""
        entered: list[Tensor] = []
        states = None if cache is None else cache.states
        watch = entered.append if watched else lambda x: None
        if packing is None:
            return *self.model.hidden(x, states, watch=watch), entered
        past = None if states is None else [packing.past(state) for state in states]
        sequence = SequenceContext(packing.boundaries)
        packed, after = self.model.hidden(packing.pack(x), past, sequence=sequence, watch=watch)
        rows = [packing.unpack(each) for each in entered]
        return packing.unpack(packed), [packing.after(state) for state in after], rows

    def _loss(self, hidden: Tensor, labels: Tensor, packing: Packing | None, items: Tensor | int | None) -> Tensor:
        """Cross-entropy of each token given those before it: a sum over `items`, or the mean."""
        wanted = (labels if packing is None else labels.masked_fill(~packing.predicted(), -100))[:, 1:]
        if items is None:
            items = (wanted != -100).sum().clamp(min=1)
        return self.model.head(hidden[:, :-1], wanted) / items


def _one_of(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
    if inputs_embeds is None and input_ids is not None:
        return input_ids
    if input_ids is None and inputs_embeds is not None:
        return inputs_embeds
    raise ValueError("input_ids, inputs_embeds: give exactly one of them")
