"""One operator alone: packed documents, a state carried on, and gradients.

python examples/operators.py
"""

import torch
import torch.nn.functional as F

from seqtrain.kernels import delta_rule

torch.manual_seed(0)
tokens, heads, width = 300, 4, 64
q, v = (torch.randn(1, tokens, heads, width) for _ in range(2))
k = F.normalize(torch.randn(1, tokens, heads, width), dim=-1)
beta = torch.rand(1, tokens, heads)
log_decay = -torch.rand(1, tokens, heads)
inputs = [x.requires_grad_() for x in (q, k, v, beta, log_decay)]

# Two documents of 100 and 200 tokens in one row: one state for each.
out, states = delta_rule(*inputs, cu_seqlens=torch.tensor([0, 100, 300]))
out.square().mean().backward()
print("out", tuple(out.shape), "states", tuple(states.shape), "gradient of q", f"{q.grad.norm():.3g}")

# The same document in two calls: the state after the first is the second's initial state.
first, state = delta_rule(*(x[:, 100:180] for x in inputs))
second, state = delta_rule(*(x[:, 180:] for x in inputs), initial_state=state)
print("in two calls, largest difference:", f"{(torch.cat([first, second], 1) - out[:, 100:]).abs().max():.1e}")
