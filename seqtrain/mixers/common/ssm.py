"""Linear time-invariant state-space layers: one system per channel (S4D) or one for all channels (S5).

A subclass says which system it starts from, HiPPO-LegS's normal part unless it does.
"""

import math
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn

from seqtrain.initialization import Initializer, computed, cpu_normal, initialize, normal, uniform
from seqtrain.kernels import diagonal_scan, diagonal_system
from seqtrain.layers import Linear, upcast
from seqtrain.mixers.common.base import LayerShape, Mixer, MixerConfig, Past, SequenceContext, State
from seqtrain.mixers.common.hippo import Spectrum, normal_legs, perturbed_legs, report_perturbation, sized_legs


def discretize(rate: Tensor, step: Tensor, rule: str) -> tuple[Tensor, Tensor]:
    """`x' = rate x + u` in steps: `(log a, gain)` of `x_t = a x_{t-1} + gain u_t`; `rate` complex, `step` positive.

    "zoh": `a = exp(L dt)`, `gain = (a - 1) / L`.
    "bilinear": `a = (1 + L dt/2) / (1 - L dt/2)`, `gain = dt / (1 - L dt/2)` (S4D, arXiv 2206.11893, section 3.1).
    """
    if rule == "zoh":
        log_a = rate * step
        return log_a, torch.expm1(log_a) / rate
    half = rate * step / 2
    return torch.log((1 + half) / (1 - half)), step / (1 - half)


class StateSpaceMixer(Mixer):
    """`x' = L x + B u`, `y = 2 Re(C x) + D u` with diagonal L, one of each conjugate pair; then GELU and a GLU.

    `L = -exp(decay_log) + i frequency` and `dt = exp(step_log)`, so that systems stay stable.
    """

    class Config(MixerConfig):
        # How x' = L x + B u becomes steps: zoh (exact for inputs held between tokens) or bilinear (trapezoidal rule).
        discretization: Literal["zoh", "bilinear"] = "zoh"
        # True: every token sees those after it too, by a second readout; not for language models, carries no state.
        bidirectional: bool = False
        # Steps dt are drawn log-uniformly from [step_low, step_high]; 1 / dt is about the memory in tokens.
        step_low: PositiveFloat = 1e-3
        step_high: PositiveFloat = 1e-1

    def __init__(self, config: Config, shape: LayerShape, states: int, steps: int):
        """`states`: complex states, one of each pair, of the layer. `steps`: numbers dt."""
        super().__init__(config, shape)
        if config.step_low > config.step_high:
            raise self.config_error("step_low", config.step_low, f"must be at most step_high={config.step_high}")
        self.states = states
        self.causal = not config.bidirectional
        self.directions = 2 if config.bidirectional else 1
        self.decay_log = nn.Parameter(torch.empty(states))
        self.frequency = nn.Parameter(torch.empty(states))
        self.step_log = nn.Parameter(torch.empty(steps))
        self.skip = nn.Parameter(torch.empty(shape.channels))
        self.gate = self.output(shape.channels)
        self.out = self.output(shape.channels)

    def mix(self, x: Tensor, past: Past, sequence: SequenceContext) -> tuple[Tensor, State]:
        if past and not self.causal:
            raise ValueError("a bidirectional state-space layer has seen no past: it takes no state and no steps")
        # Of both directions' readouts, that of each.
        sequence = sequence if self.causal else sequence.one_way
        y, memory = self.respond(x, past.get("memory"), sequence, 0)
        if not self.causal:
            backwards, _ = self.respond(sequence.reverse(x), None, sequence, 1)
            y = y + sequence.reverse(backwards)
        after = {"memory": memory} if self.causal else {}
        y = F.gelu(y + self.skip * self.shape.tensor.own(x)).to(x.dtype)
        return self.out(y) * torch.sigmoid(self.gate(y)), after

    def respond(
        self, x: Tensor, memory: Tensor | None, sequence: SequenceContext, direction: int
    ) -> tuple[Tensor, Tensor]:
        """`2 Re(C x)` and the state for the input `x: [B,T,D]`; `direction`: 0 for the past's C, 1 for the future's.

        Where ranks divide channels, all enter and this rank's leave.
        """
        raise NotImplementedError

    def spectrum(self, size: int) -> Spectrum:
        """The diagonalised matrix of `size` states that the layer starts from."""
        return normal_legs(size)

    def discrete(self) -> tuple[Tensor, Tensor]:
        """`(log a, gain)` of every state, complex `[states]`."""
        rate = torch.complex(-upcast(self.decay_log).exp(), upcast(self.frequency))
        step = upcast(self.step_log).exp().repeat_interleave(self.states // self.step_log.numel())
        return discretize(rate, step, self.config.discretization)

    def eigenvalues(self) -> Tensor:
        """Those that the layer starts from, complex `[n]`: it has as many copies of them as fit."""
        raise NotImplementedError

    def initializers(self) -> dict[Tensor, Initializer]:
        def copies(values: Tensor) -> Tensor:
            return values.repeat(self.states // len(values))

        return {
            self.decay_log: computed(lambda: copies((-self.eigenvalues().real).log())),
            self.frequency: computed(lambda: copies(self.eigenvalues().imag)),
            self.step_log: uniform(math.log(self.config.step_low), math.log(self.config.step_high)),
            self.skip: normal(),
        }


class ChannelwiseMixer(StateSpaceMixer):
    """A system with one input and one output for every channel. B is 1: only its products with C count."""

    class Config(StateSpaceMixer.Config):
        # States per channel, before conjugate pairs are halved; even.
        state: Annotated[int, Field(gt=1, multiple_of=2)] = 64
        # How the same outputs are found: scan (a chunk after the other) or fft (one convolution; never for documents).
        form: Literal["scan", "fft"] = "scan"

    def __init__(self, config: Config, shape: LayerShape):
        self.pairs = config.state // 2
        super().__init__(config, shape, shape.channels * self.pairs, shape.channels)
        # Real and imaginary parts of C, interleaved, one direction after the other: one-dimensional, so not decayed.
        self.readout = nn.Parameter(torch.empty(self.directions * self.states * 2))
        self.tensor_parts = {"readout": (0, self.directions * (self.states * 2,))}
        initialize(self)

    def eigenvalues(self) -> Tensor:
        return self.spectrum(self.config.state).values

    def initial_readout(self, count: int, generator: torch.Generator | None) -> Tensor:
        """`count` readouts `C * B`, complex `[count, N/2]`; C is normal numbers."""
        spectrum = self.spectrum(self.config.state)
        c = cpu_normal(generator, count, self.config.state)
        return (c.to(spectrum.vectors.dtype) @ spectrum.vectors) * spectrum.input

    def initializers(self) -> dict[Tensor, Initializer]:
        def fill(readout: Tensor, generator: torch.Generator | None) -> None:
            values = self.initial_readout(self.directions * self.shape.width, generator)
            readout.copy_(torch.view_as_real(values).flatten())

        return super().initializers() | {self.readout: fill}

    def respond(
        self, x: Tensor, memory: Tensor | None, sequence: SequenceContext, direction: int
    ) -> tuple[Tensor, Tensor]:
        log_a, gain = (part.unflatten(0, (-1, self.pairs)) for part in self.discrete())  # D N/2
        readout = self.readout.unflatten(0, (self.directions, self.shape.channels, self.pairs, 2))[direction]
        tensors = upcast(self.shape.tensor.own(x)), log_a, gain, 2 * torch.view_as_complex(upcast(readout))
        return sequence.run(diagonal_system, *tensors, form=self.config.form, initial_state=memory)


class PerturbedStart(StateSpaceMixer):
    """Starts from `HiPPO-LegS + E` (Yu et al. 2023, arXiv 2310.01698)."""

    class Config(StateSpaceMixer.Config):
        # Size of E over that of HiPPO-LegS, spectral norms: smaller is nearer to HiPPO, worse conditioned.
        perturbation: Annotated[float, Field(gt=0, lt=1)] = 0.1
        # Positive: E of least condition number of the eigenvectors + tradeoff * |E| instead.
        tradeoff: NonNegativeFloat = 0.0

    def spectrum(self, size: int) -> Spectrum:
        config = self.config
        try:
            found = perturbed_legs(size, config.tradeoff) if config.tradeoff else sized_legs(size, config.perturbation)
        except ValueError as error:
            raise self.config_error("perturbation", config.perturbation, str(error)) from None
        # A model on no device is a check: what a run starts from is reported when it is built.
        if self.decay_log.device.type != "meta":
            report_perturbation(size, found)
        return found


class SharedMixer(StateSpaceMixer):
    """One system with many inputs and outputs: B and C are real matrices on interleaved real and imaginary parts."""

    class Config(StateSpaceMixer.Config):
        # States before conjugate pairs are halved, over model.width.
        expand_state: PositiveFloat = 1.0
        # HiPPO matrices the state starts from, each of states / blocks.
        blocks: PositiveInt = 4

    def __init__(self, config: Config, shape: LayerShape):
        states = shape.width * config.expand_state
        if states != int(states) or int(states) % (2 * config.blocks):
            rule = f"times model.width={shape.width} must be divisible by 2 * blocks={2 * config.blocks}"
            raise self.config_error("expand_state", config.expand_state, rule)
        self.pairs = shape.share(int(states) // 2, f"{int(states) // 2} states")
        super().__init__(config, shape, self.pairs, self.pairs)
        self.write = Linear(shape.width, 2 * self.pairs, bias=False)
        self.read = self.output(2 * self.pairs)
        self.read_back = self.output(2 * self.pairs) if config.bidirectional else None
        initialize(self)

    def eigenvalues(self) -> Tensor:
        return self.spectrum(2 * self.pairs // self.config.blocks).values

    def initializers(self) -> dict[Tensor, Initializer]:
        """Eigenvalues of HiPPO; B and C are normal matrices seen in its eigenvectors (S5's appendix B.1)."""
        width, blocks, pairs = self.shape.width, self.config.blocks, self.pairs
        block = 2 * pairs // blocks

        def write(weight: Tensor, generator: torch.Generator | None) -> None:
            inverse = self.spectrum(block).inverse
            values = inverse @ cpu_normal(generator, blocks, block, width).to(inverse.dtype) / math.sqrt(width)
            weight.copy_(torch.view_as_real(values.flatten(0, 1)).mT.flatten(0, 1))

        def read(weight: Tensor, generator: torch.Generator | None) -> None:
            vectors = self.spectrum(block).vectors
            c = cpu_normal(generator, width, blocks, block).to(vectors.dtype) @ vectors / math.sqrt(2 * pairs)
            # 2 Re(C h) = sum of 2 Re(C) Re(h) - 2 Im(C) Im(h): the conjugate has the same factors.
            weight.copy_(torch.view_as_real(2 * c.flatten(1).conj()).flatten(1))

        reads = [each.weight for each in (self.read, self.read_back) if each is not None]
        return super().initializers() | {self.write.weight: write} | dict.fromkeys(reads, read)

    def respond(
        self, x: Tensor, memory: Tensor | None, sequence: SequenceContext, direction: int
    ) -> tuple[Tensor, Tensor]:
        log_a, gain = self.discrete()
        inputs = torch.view_as_complex(upcast(self.write(x)).unflatten(2, (-1, 2)))  # B T P/2
        hidden, memory = sequence.run(diagonal_scan, inputs * gain, log_a, initial_state=memory)
        read = self.read if direction == 0 or self.read_back is None else self.read_back
        tensor, y = self.shape.tensor, read(torch.view_as_real(hidden).flatten(2).to(x.dtype))
        return tensor.own(tensor.enter(y)), memory
