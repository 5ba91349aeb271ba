"""A small hybrid and its trainer, sound or with one fault of those that others' programs had."""

from types import SimpleNamespace

import torch
from torch import nn
from torch.nn import functional as F

from seqtrain.audit import Subject, Trainer
from seqtrain.audit.subject import IGNORED
from seqtrain.kernels import linear_attention

VOCABULARY, TOKENS, WIDTH, HEADS, KERNEL, WINDOW = 41, 53, 16, 2, 4, 12


class Convolution(nn.Module):
    """Short and causal; within a document, `same[i, j]` says of places."""

    def __init__(self, fault):
        super().__init__()
        self.weight, self.bias = nn.Parameter(0.5 * torch.randn(WIDTH, KERNEL)), nn.Parameter(torch.randn(WIDTH))
        self.fault = fault

    def forward(self, x, past, same, start):
        if self.fault == "convolution looks ahead":
            x = torch.cat([x[:, 1:], x[:, -1:]], 1)
        before = x.new_zeros(len(x), KERNEL - 1, WIDTH) if past is None else past
        x = torch.cat([before, x], 1)
        if self.fault == "convolution keeps too little" and past is not None:
            x = torch.cat([0 * x[:, :1], x[:, 1:]], 1)
        length, out = x.shape[1] - KERNEL + 1, 0
        for back in range(KERNEL):
            seen = (
                torch.ones(length)
                if back == 0
                else F.pad(same.diagonal(-back).float(), (min(back, length), 0), value=1.0)[-length:]
            )
            if self.fault == "convolution runs on":
                seen = torch.ones(length)
            if self.fault == "convolution begins anew in a document" and start is not None:
                seen = seen * (torch.arange(length) != start + 9)
            out = out + x[:, KERNEL - 1 - back : length + KERNEL - 1 - back] * self.weight[:, back] * seen[:, None].to(
                x
            )
        return F.silu(out + self.bias), x[:, 1 - KERNEL :]


class Scan(nn.Module):
    """Gated linear attention in its quadratic form, from a state to a state; or seqtrain's operator for it."""

    operator = False

    def forward(self, q, k, v, log_decay, state, same):
        if self.operator:
            return linear_attention(q, k, v, log_decay, scale=1.0, initial_state=state)
        total = log_decay.cumsum(1)
        from_start = total.exp() * same[:, 0].float()[:, None] if state is not None else None
        weights = (total[:, :, None] - total[:, None]).masked_fill(~same.tril()[None, :, :, None], -torch.inf).exp()
        out = torch.einsum("bihk,bjhk,bijh,bjhv->bihv", q, k, weights.to(q), v)
        final = torch.einsum("bjhk,bjh,bjhv->bhkv", k, weights[:, -1].to(q), v)
        if state is not None:
            out = out + torch.einsum("bihk,bih,bhkv->bihv", q, from_start.to(q), state)
            final = final + from_start[:, -1, :, None, None].to(q) * state
        return out, final


class Recurrent(nn.Module):
    def __init__(self, fault):
        super().__init__()
        self.inward, self.outward = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.gate = nn.Linear(WIDTH, HEADS)
        self.A_log, self.dt_bias = nn.Parameter(torch.randn(HEADS) - 2), nn.Parameter(torch.randn(HEADS))
        self.convolution, self.scan, self.fault = Convolution(fault), Scan(), fault

    def decay(self, x):
        if self.fault == "decay in bfloat16":
            return (-self.A_log.to(x).exp() * F.softplus(self.gate(x) + self.dt_bias.to(x))).float()
        step = F.softplus(self.gate(x).float() + self.dt_bias.float())
        # A limit that one path must not forget.
        step = step if self.fault == "decoding forgets a limit" and x.shape[1] == 1 else step.clamp(max=0.7)
        if self.fault == "statistics over the batch":
            step = step - step.mean((0, 1)) + 1
        return -self.A_log.float().exp() * step

    def forward(self, x, cache, same, mask, start):
        past, state = cache or (None, None)
        if self.fault == "the scan starts from zero" and x.shape[1] > 1:
            state = None
        if self.fault == "a last chunk is dropped" and x.shape[1] > 1:
            x = x * (torch.arange(x.shape[1]) < x.shape[1] // 16 * 16)[:, None]
        q, k, v = self.inward(x).chunk(3, -1)
        if mask is not None and self.fault != "padding enters the convolution":
            k = k * mask
        k, past = self.convolution(k, past, same, start)
        if mask is not None and self.fault != "padding enters the state":
            k = k * mask
        q, k, v = (each.unflatten(-1, (HEADS, -1)) for each in (q, k, v))
        everywhere = torch.ones_like(same)
        out, state = self.scan(q, k, v, self.decay(x), state, everywhere if self.fault == "the state runs on" else same)
        return self.outward(out.flatten(2)), (past, state)


class Attention(nn.Module):
    """Softmax over a window, without positions."""

    def __init__(self, fault):
        super().__init__()
        self.inward, self.outward, self.fault = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), fault

    def forward(self, x, cache, same, mask, start):
        q, k, v = (each.unflatten(-1, (HEADS, -1)).transpose(1, 2) for each in self.inward(x).chunk(3, -1))
        if cache:
            k, v = torch.cat([cache[0], k], 2), torch.cat([cache[1], v], 2)
        behind = torch.arange(k.shape[2])[-x.shape[1] :, None] - torch.arange(k.shape[2])
        seen = (behind >= 0) & (behind < WINDOW)
        if not cache and self.fault != "attention sees other documents":
            seen = seen & same
        if mask is not None:
            seen = seen & (mask[:, None, None, :, 0] | (behind == 0))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        return self.outward(out.transpose(1, 2).flatten(2)), (k, v)


class Hybrid(nn.Module):
    def __init__(self, fault=""):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)
        first = "" if fault == "the last layer's state runs on" else fault
        last = "the state runs on" if fault == "the last layer's state runs on" else fault
        self.layers = nn.ModuleList([Recurrent(first), Attention(fault), Recurrent(last)])

    def forward(self, tokens, cache=None, lengths=None, mask=None):
        places = (
            torch.zeros(tokens.shape[1])
            if lengths is None
            else torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
        )
        same, start = places[:, None] == places, None if lengths is None else lengths[0] + lengths[1]
        x, after = self.embedding(tokens), []
        for layer, before in zip(self.layers, cache or 3 * [None], strict=True):
            out, state = layer(
                F.layer_norm(x, (WIDTH,)), before, same, None if mask is None else mask[..., None].bool(), start
            )
            x, after = x + out, [*after, state]
        return self.head(F.layer_norm(x, (WIDTH,))), after


def subject(fault="", *, operator=False):
    """The hybrid as a subject."""
    model = Hybrid(fault)
    for layer in model.layers[::2]:
        layer.scan.operator = operator

    def packed(tokens, lengths):
        if fault == "a boundary is lost":
            lengths = [*lengths[:-2], lengths[-2] + lengths[-1]]
        return model(tokens, lengths=None if fault == "position_ids are ignored" else lengths)[0]

    def cut(tokens, lengths):
        found, cache = [], None
        for part in tokens.split(lengths, 1):
            logits, cache = model(part, None if fault == "pieces know of no state" else cache)
            found.append(logits)
            if fault == "states are detached":
                cache = [tuple(each.detach() for each in layer) for layer in cache]
        return torch.cat(found, 1)

    def cast(dtype):
        narrow = Hybrid(fault).to(dtype)
        for name, each in narrow.named_parameters():
            if ("A_log" in name or "dt_bias" in name) and fault != "gates are rounded":
                each.data = each.data.float()
        return Subject(forward=lambda x: narrow(x)[0], vocabulary=VOCABULARY, tokens=TOKENS, module=narrow)

    def flops(tokens):
        pairs = (
            tokens * (tokens + 1) / 2
            if fault == "a window counts as whole"
            else sum(min(i + 1, WINDOW) for i in range(tokens))
        )
        layers = 2 * WIDTH * (4 * WIDTH) + 2 * WIDTH * HEADS + 4 * WIDTH * WIDTH // HEADS + 2 * WIDTH * KERNEL
        if fault == "recurrent layers are not counted":
            layers = 0
        return tokens * (2 * layers + 2 * WIDTH * (4 * WIDTH) + 2 * WIDTH * VOCABULARY) + 4 * WIDTH * pairs

    return Subject(
        forward=lambda tokens: model(tokens)[0],
        vocabulary=VOCABULARY,
        tokens=TOKENS,
        module=model,
        step=model,
        padded=lambda tokens, mask: model(tokens, mask=mask)[0],
        packed={"position_ids": packed},
        cut=cut,
        cast=cast,
        flops=flops,
        trainer=trainer(fault),
    )


def trainer(fault):
    """A training loop with a schedule, its own data, and checkpoints."""

    def start():
        model = Hybrid()
        return SimpleNamespace(model=model, optimizer=torch.optim.AdamW(model.parameters(), lr=1e-3), step=0, drawn=0)

    def draw(run):
        rows = torch.randint(VOCABULARY, (2, 18), generator=torch.Generator().manual_seed(run.drawn))
        run.drawn += 1
        return [(row[None, :-1], row[None, 1:]) for row in rows]

    def backward(model, batches):
        counts, total = [int((labels != IGNORED).sum()) for _, labels in batches], 0.0
        for (tokens, labels), count in zip(batches, counts, strict=True):
            sums = F.cross_entropy(
                model(tokens)[0].flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum"
            )
            if fault == "a mean of means":
                loss = sums / max(count, 1) / len(batches)
            elif fault == "a micro-batch without labels is NaN":
                loss = sums / count * (count / sum(counts))
            elif fault == "ignored labels count":
                loss = sums / sum(labels.numel() for _, labels in batches)
            else:
                loss = sums / sum(counts)
            loss.backward()
            total += loss.item()
        return total

    def step(run, batches):
        run.optimizer.zero_grad()
        run.step += 1
        run.optimizer.param_groups[0]["lr"] = 1e-3 / run.step
        loss = backward(run.model, batches)
        run.optimizer.step()
        return loss

    def gradients(batches):
        model = Hybrid()
        loss = backward(model, batches)
        return loss, {name: each.grad for name, each in model.named_parameters()}

    def save(run, folder):
        moments = run.optimizer.state_dict()
        if fault == "moments are rounded":
            for each in moments["state"].values():
                each["exp_avg_sq"] = each["exp_avg_sq"].bfloat16().float()
        torch.save((run.model.state_dict(), moments, run.step, run.drawn), folder / "run.pt")

    def load(folder):
        run = start()
        weights, moments, run.step, run.drawn = torch.load(folder / "run.pt")
        run.model.load_state_dict(weights)
        if fault != "moments are lost":
            run.optimizer.load_state_dict(moments)
        run.step = 0 if fault == "the schedule begins again" else run.step
        run.drawn = 0 if fault == "the data begin again" else run.drawn
        return run

    def weights(run):
        return {name: each.detach() for name, each in run.model.named_parameters()}

    return Trainer(start=start, step=step, weights=weights, save=save, load=load, draw=draw, gradients=gradients)
