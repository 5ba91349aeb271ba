"""Documents of one row are apart: what stands in others, numbers or not, changes no bit of one."""

import torch

from seqtrain.testing import boundaries

LENGTHS = (20, 30, 14)
TOKENS = sum(LENGTHS)


def assert_documents_apart(operator, tensors, backend, *, copied=torch.clone, **options):
    """NaNs in the first and the last of three documents; `copied`: how tensors with tokens are laid in memory.

    tensors: float32, by name; `initial_state` has a row per document, others with 64 tokens are inputs.
    """

    def results(tensors):
        leaves = {name: x.requires_grad_() for name, x in tensors.items()}
        out, final = operator(**leaves, **options, cu_seqlens=boundaries(LENGTHS), backend=backend)
        gradients = torch.autograd.grad(out.sum() + final.sum(), list(leaves.values()))
        return {"out": out, "final_state": final} | dict(zip(leaves, gradients, strict=True))

    tensors = {name: x.float() for name, x in tensors.items() if x is not None}
    timed = [name for name, x in tensors.items() if x.dim() > 2 and x.shape[1] == TOKENS and name != "initial_state"]
    clean = results({name: x.clone() for name, x in tensors.items()})
    poisoned = {name: copied(x) if name in timed else x.clone() for name, x in tensors.items()}
    for name in timed:
        poisoned[name][:, :20] = poisoned[name][:, 50:] = float("nan")
    came = results(poisoned)
    assert came["out"][:, :20].isnan().any()
    for name in ["out", *timed]:
        assert torch.equal(came[name][:, 20:50], clean[name][:, 20:50]), name
    for name in {"final_state", "initial_state"} & set(came):
        assert torch.equal(came[name][1], clean[name][1]), name
