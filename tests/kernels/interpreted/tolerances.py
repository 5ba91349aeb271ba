"""What interpreted kernels are held to: tighter than backends, for the interpreter's products are exact."""

import torch

# Largest relative Frobenius error against the float64 definition, and where it is wider for a reason.
TOLERANCES = {
    torch.float64: 1e-12,  # the algebra itself
    torch.float32: 2e-6,
    torch.float16: 1.5e-3,  # outputs and gradients are rounded to 11 bits
    torch.bfloat16: 6e-3,  # outputs and gradients are rounded to 8 bits
}
# Gradients of decays and of step sizes: sums of products that nearly cancel.
GATES = {torch.float32: 5e-6, torch.bfloat16: 8e-3}
GATE_NAMES = ("grad log_decay", "grad log_a", "grad beta")


def assert_within(
    errors: dict[str, float], dtype: torch.dtype, *, gates: float | None = None, wider: dict[str, float] | None = None
) -> None:
    """Raises `AssertionError` naming what errs by more than allowed; gates, wider: limits that have their reason."""
    limits = dict.fromkeys(errors, TOLERANCES[dtype])
    for name in GATE_NAMES:
        if name in limits:
            limits[name] = gates or GATES.get(dtype, TOLERANCES[dtype])
    limits |= wider or {}
    beyond = {name: f"{error:.1e} > {limits[name]:.0e}" for name, error in errors.items() if not error <= limits[name]}
    assert not beyond, f"{beyond}; all: { {name: f'{error:.1e}' for name, error in errors.items()} }"
