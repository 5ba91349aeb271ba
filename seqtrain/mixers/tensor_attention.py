"""Tensor (Kronecker) attention: outputs weigh pairs of past tokens at a cost linear in T (docs/math.md, 1.4).

With `order=4` they weigh triples. As an encoder's, all tokens of a document are read, by sums over it.
"""

from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from seqtrain.initialization import Initializer, constant, initialize
from seqtrain.kernels import kronecker_attention, tensor_attention
from seqtrain.layers import HeadNorm, HeadProjections, l2norm, upcast
from seqtrain.mixers import LayerShape, Mixer, MixerConfig, Past, SequenceContext, State


class TensorAttention(Mixer):
    """`o_t = sum_{i,j<=t} p_t(i,j) v1_i * v2_j`, `p ~ exp(tau sum_r q_r k1_r k2_r)` by its Taylor polynomial.

    q, k1 and k2 have unit length, so the exponent lies in `[-tau, tau]`; each head learns its `tau` below a bound,
    which keeps the polynomial close to exp (the bounded-entries regime). A short convolution tells neighbours apart.
    With `order=4` there are k3 and v3 as well.
    """

    class Config(MixerConfig):
        # Tokens that a weight is of, with the one that reads: 3 for pairs, 4 for triples of the tokens before.
        order: Literal[3, 4] = 3
        # Key channels per head, K: there are (K+1)(K+2)/2 features at degree 2, so it is small.
        key: Annotated[int, Field(gt=0, le=32)] = 4
        # Degree of the polynomial that stands for exp.
        degree: Literal[2, 4, 6] = 2
        # Bound of the learned temperature, so of the exponent: degree 2 is within a factor 1.4 of exp at 1, 7.4 at 2;
        # degree 6 within 1.001 and 1.15.
        largest_temperature: Annotated[float, Field(gt=0, le=16)] = 2.0
        # Tokens under the short convolution of queries, keys and values; 0: none.
        conv_width: Annotated[int, Field(ge=0, le=16)] = 4

    def __init__(self, config: Config, shape: LayerShape):
        super().__init__(config, shape)
        self.value = self.part_of_width()
        widths = config.order * (config.key,) + (config.order - 1) * (self.value,)
        self.parts = HeadProjections(shape.width, shape.heads, widths, conv_width=config.conv_width)
        self.temperature = nn.Parameter(torch.empty(shape.heads))
        self.norm = HeadNorm(self.value)
        self.out = self.output(shape.heads * self.value)
        initialize(self)

    def initializers(self) -> dict[Tensor, Initializer]:
        return {self.temperature: constant(0.0)}

    def mix(self, x: Tensor, past: Past, sequence: SequenceContext) -> tuple[Tensor, State]:
        (q, *others), after = self.parts(x, past.get("conv"), sequence)
        tau = self.config.largest_temperature * torch.sigmoid(self.temperature)  # H
        q = (l2norm(upcast(q)) * tau[:, None]).to(q.dtype)
        keys, values = [l2norm(k) for k in others[: self.config.order - 1]], others[self.config.order - 1 :]
        operator: Any = tensor_attention
        parts = [*keys, *values]
        if self.config.order > 3:
            operator, parts = kronecker_attention, [torch.stack(keys, 3), torch.stack(values, 3)]
        options = {"degree": self.config.degree, "scale": 1.0, "initial_state": past.get("memory")}
        out, after["memory"] = sequence.run(operator, q, *parts, **options)
        return self.out(self.norm(out)), after
