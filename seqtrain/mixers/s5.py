"""S5 (Smith et al. 2022, arXiv 2208.04933): one diagonal complex system with many inputs and outputs."""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from seqtrain.kernels import diagonal_scan
from seqtrain.mixers._base import EMPTY, WHOLE, LayerShape, Mixer, State
from seqtrain.mixers._costs import diagonal_scan_flops
from seqtrain.mixers._parts import precise
from seqtrain.parallel.sequence import Sequence


def hippo_normal(size: int) -> tuple[Tensor, Tensor]:
    """Eigenvalues (complex128 `[size/2]`) and eigenvectors `[size, size/2]` of HiPPO-LegS's normal part.

    One of each conjugate pair. HiPPO-LegS is a normal matrix minus one of rank 1 (S4D, arXiv 2206.11893, section 4);
    `size` is even.
    """
    n = torch.arange(size, dtype=torch.float64, device="cpu")
    rank_one = torch.sqrt(n + 0.5)
    outer = 2 * rank_one[:, None] * rank_one  # sqrt((2n+1)(2k+1))
    matrix = -torch.tril(outer) + torch.diag(n) + outer / 2
    # Normal with real part -1/2: minus i times what is skew in it is Hermitian.
    skew = (matrix - matrix.T) / 2
    frequency, vectors = torch.linalg.eigh(skew * -1j)
    return torch.complex(torch.full_like(frequency, -0.5), frequency)[size // 2 :], vectors[:, size // 2 :]


class S5(Mixer):
    """`h_t = exp(L dt) h_{t-1} + L^-1 (exp(L dt) - 1) B u_t`, `y_t = 2 Re(C h_t) + D u_t`, then GELU and a GLU.

    Only one of each conjugate pair of states is kept. B and C are real matrices on interleaved real and imaginary
    parts.
    """

    state_dtypes: ClassVar = {"memory": torch.complex64}

    @dataclass(frozen=True)
    class Config:
        # States before conjugate pairs are halved, over model.width.
        expand_state: Annotated[float, Field(gt=0)] = 1.0
        # HiPPO matrices the state starts from, each of states / blocks.
        blocks: Annotated[int, Field(gt=0)] = 4
        # Steps dt are drawn log-uniformly from [step_low, step_high]; 1 / dt is about the memory in tokens.
        step_low: Annotated[float, Field(gt=0)] = 1e-3
        step_high: Annotated[float, Field(gt=0)] = 1e-1

    config: Config

    def __init__(self, config: Config, shape: LayerShape):
        super().__init__(config, shape)
        states = shape.width * config.expand_state
        if states != int(states) or int(states) % (2 * config.blocks):
            rule = f"times model.width={shape.width} must be divisible by 2 * blocks={2 * config.blocks}"
            raise self.config_error("expand_state", config.expand_state, rule)
        if config.step_low > config.step_high:
            raise self.config_error("step_low", config.step_low, f"must be at most step_high={config.step_high}")
        self.pairs = int(states) // 2
        self.decay_log = nn.Parameter(torch.empty(self.pairs))
        self.frequency = nn.Parameter(torch.empty(self.pairs))
        self.step_log = nn.Parameter(torch.empty(self.pairs))
        self.write = nn.Linear(shape.width, 2 * self.pairs, bias=False)
        self.read = nn.Linear(2 * self.pairs, shape.width, bias=False)
        self.skip = nn.Parameter(torch.empty(shape.width))
        self.gate = nn.Linear(shape.width, shape.width, bias=False)
        self.out = nn.Linear(shape.width, shape.width, bias=False)
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Eigenvalues of HiPPO; B and C are normal matrices seen in its eigenvectors (the paper's appendix B.1)."""
        width, block = self.shape.width, 2 * self.pairs // self.config.blocks
        eigenvalues, vectors = hippo_normal(block)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, dtype=torch.float64, device="cpu", generator=generator)

        write = vectors.mH @ normal(self.config.blocks, block, width).to(vectors.dtype) / math.sqrt(width)
        read = normal(width, self.config.blocks, block).to(vectors.dtype) @ vectors / math.sqrt(2 * self.pairs)
        with torch.no_grad():
            self.decay_log.copy_((-eigenvalues.real).log().repeat(self.config.blocks))
            self.frequency.copy_(eigenvalues.imag.repeat(self.config.blocks))
            low, high = math.log(self.config.step_low), math.log(self.config.step_high)
            nn.init.uniform_(self.step_log, low, high, generator=generator)
            self.write.weight.copy_(torch.view_as_real(write.flatten(0, 1)).mT.flatten(0, 1))
            # 2 Re(C h) = sum of 2 Re(C) Re(h) - 2 Im(C) Im(h): the conjugate has the same factors.
            self.read.weight.copy_(torch.view_as_real(2 * read.flatten(1).conj()).flatten(1))
            nn.init.normal_(self.skip, generator=generator)

    def forward(self, x: Tensor, state: State | None = None, *, sequence: Sequence = WHOLE) -> tuple[Tensor, State]:
        rate = torch.complex(-self.decay_log.exp(), self.frequency)
        log_a = rate * self.step_log.exp()  # P/2
        inputs = torch.view_as_complex(precise(self.write(x)).unflatten(2, (-1, 2)))  # B T P/2
        memory = (state or EMPTY).get("memory")
        hidden, memory = sequence.run(diagonal_scan, inputs * (torch.expm1(log_a) / rate), log_a, initial_state=memory)
        y = self.read(torch.view_as_real(hidden).flatten(2)) + self.skip * x
        y = F.gelu(y)
        return self.out(y) * torch.sigmoid(self.gate(y)), {"memory": memory}

    def state_shapes(self, batch: int, tokens: int = 1) -> dict[str, tuple[int, ...]]:
        return {"memory": (batch, self.pairs)}

    def weights(self) -> tuple[int, int]:
        width = self.shape.width
        return 4 * width * self.pairs + 2 * width * width, 3 * self.pairs + width

    def operator_flops(self, tokens: int) -> int:
        return diagonal_scan_flops(tokens, self.pairs)
