"""Random scans and their one-process truth, for tests that run on ranks."""

from dataclasses import dataclass

import torch
from torch import Tensor

from seqtrain.parallel import open_all_scan

UPDATE = (2, 3, 4, 5)  # B H K V
FORMS = {
    "none": (None, UPDATE),
    "head": ((2, 3), UPDATE),
    "channel": ((2, 3, 4), UPDATE),
    "dense": ((2, 3, 4, 4), UPDATE),
    "square": ((1, 2, 4, 4), (1, 2, 4, 4)),  # K == V: still dense, not elementwise
    "diagonal": ((2, 7), (2, 7)),
}


@dataclass
class Case:
    """One map a rank, an initial state, and the weights of every result in the loss."""

    transitions: list[Tensor | None]
    updates: list[Tensor]
    initial: Tensor | None
    weights: list[tuple[Tensor, Tensor]]

    def tensors(self) -> list[Tensor]:
        return [t for t in (*self.transitions, *self.updates, self.initial) if t is not None]


def random_case(form: str, ranks: int, *, dtype=torch.float64, seed=0, initial=True, identity=()) -> Case:
    """`identity`: ranks without tokens, whose map is the identity in the form of the others."""
    generator = torch.Generator().manual_seed(seed)

    def random(shape):
        return torch.randn(shape, dtype=dtype, generator=generator)

    transition_shape, update_shape = FORMS[form]
    transitions, updates = [], []
    for rank in range(ranks):
        transition, update = None, random(update_shape)
        if transition_shape is not None:
            transition = random(transition_shape) * 0.7
            if rank in identity and len(transition_shape) == 4:
                transition = torch.eye(transition_shape[-1], dtype=dtype).expand(transition_shape).contiguous()
            elif rank in identity:
                transition = torch.ones(transition_shape, dtype=dtype)
        transitions.append(transition)
        updates.append(torch.zeros_like(update) if rank in identity else update)
    weights = [(random(update_shape), random(update_shape)) for _ in range(ranks)]
    return Case(transitions, updates, random(update_shape) if initial else None, weights)


def apply(transition: Tensor | None, state: Tensor) -> Tensor:
    if transition is None:
        return state
    if transition.dim() == 4:
        return torch.einsum("bhij,bhjv->bhiv", transition, state)
    return transition.reshape(*transition.shape, *[1] * (state.dim() - transition.dim())) * state


def truth(case: Case) -> tuple[list[tuple[Tensor, Tensor]], list[dict[str, Tensor]]]:
    """(state_in, final_state) and the gradients of every rank, from one process and a plain loop."""
    for tensor in case.tensors():
        tensor.requires_grad_()
        tensor.grad = None
    state = case.initial if case.initial is not None else torch.zeros_like(case.updates[0])
    states, losses = [], []
    for transition, update, weights in zip(case.transitions, case.updates, case.weights, strict=True):
        after = apply(transition, state) + update
        states.append((state.detach(), after.detach()))
        losses.append(loss(weights, state, after))
        state = after
    sum(losses).backward()
    gradients = []
    for rank, (transition, update) in enumerate(zip(case.transitions, case.updates, strict=True)):
        own = {"update": update.grad}
        if transition is not None:
            own["transition"] = transition.grad
        if case.initial is not None:
            own["initial"] = case.initial.grad if rank == 0 else torch.zeros_like(update)
        gradients.append(own)
    return states, gradients


def loss(weights: tuple[Tensor, Tensor], state_in: Tensor, final: Tensor) -> Tensor:
    return (weights[0] * state_in).sum().real + (weights[1] * final).sum().real


def own_leaves(case: Case, rank: int, dtype=None) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """This rank's transition, update and initial state as fresh leaves, of another dtype if given."""

    def leaf(tensor):
        return None if tensor is None else tensor.detach().clone().to(dtype or tensor.dtype).requires_grad_()

    return leaf(case.transitions[rank]), leaf(case.updates[rank]), leaf(case.initial)


def gradients_of(transition: Tensor | None, update: Tensor, initial: Tensor | None) -> dict[str, Tensor]:
    named = {"update": update, "transition": transition, "initial": initial}
    return {name: tensor.grad for name, tensor in named.items() if tensor is not None}


def check(case: Case, rank: int, states, gradients: dict[str, Tensor], tolerance: float, what: str) -> None:
    """Compares one rank's results with the truth by relative Frobenius error."""
    true_states, true_gradients = truth(case)
    named = {"state_in": (states[0], true_states[rank][0]), "final_state": (states[1], true_states[rank][1])}
    named |= {name: (gradients[name], true) for name, true in true_gradients[rank].items()}
    for name, (came, true) in named.items():
        error = (came.detach().to(true.dtype) - true).norm() / true.norm().clamp(min=1e-6)
        assert error < tolerance, f"{what}, rank {rank}: {name} is off by {error:.2e}"


def start_all_scan(transition, update, *, initial_state=None, **options):
    """`all_scan` that returns before it is waited for."""
    form = None if transition is None else transition.shape
    scan = open_all_scan(form, update.shape, dtype=update.dtype, device=update.device, **options)
    return scan.start(transition, update, initial_state=initial_state)
