"""Two independent float64 computations of a Mamba-2 model, to judge golden data before it is written.

`float64()` lets the code of transformers run in double precision; `recurrence_logits` is the definition of the
model, one token after the other, with nothing taken from transformers but the parameters. Where the two agree to
rounding, a golden value is neither an artefact of single precision nor of the chunked algorithm.
"""

import contextlib

import torch
import torch.nn.functional as F
from transformers.models.mamba2 import modeling_mamba2


class _TorchWithDouble:
    """The torch module, except that float32 means float64."""

    float32 = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


@contextlib.contextmanager
def float64():
    """Inside, transformers' Mamba-2 keeps double precision.

    Its code narrows to float32 in the norms, the scan, the logits and the loss, through `.float()` and through
    `torch.float32`; both are redirected. The model itself must be `.double()`.
    """
    narrow = torch.Tensor.float
    torch.Tensor.float = torch.Tensor.double
    modeling_mamba2.torch = _TorchWithDouble()
    try:
        yield
    finally:
        torch.Tensor.float = narrow
        modeling_mamba2.torch = torch


def rms_norm(x, weight, eps, groups=1):
    """x [.., C] over C/groups wide groups of neighbouring channels."""
    parts = x.unflatten(-1, (groups, -1))
    parts = parts / torch.sqrt(parts.pow(2).mean(-1, keepdim=True) + eps)
    return parts.flatten(-2) * weight


def mixer(x, p, c):
    """x [B, L, D] -> ([B, L, D], dt before its clamp [B, L, H]); p: parameters by their name inside the mixer."""
    inner, bc, length = c.num_heads * c.head_dim, c.n_groups * c.state_size, x.shape[1]
    projected = F.linear(x, p["in_proj.weight"], p.get("in_proj.bias"))
    z, xbc, dt = projected.split([inner, inner + 2 * bc, c.num_heads], dim=-1)

    # conv[t] = bias + sum over taps k of w[k] * xbc[t - (K - 1) + k]; nothing before position 0.
    padded = F.pad(xbc, (0, 0, c.conv_kernel - 1, 0))
    conv = sum(
        p["conv1d.weight"][:, 0, k] * padded[:, k : k + length] for k in range(c.conv_kernel)
    )
    xbc = F.silu(conv + p["conv1d.bias"]) if c.use_conv_bias else F.silu(conv)

    x, b, c_ = xbc.split([inner, bc, bc], dim=-1)
    x = x.unflatten(-1, (c.num_heads, c.head_dim))
    # The group of head h is h // (H/G).
    group = torch.arange(c.num_heads) // (c.num_heads // c.n_groups)
    b = b.unflatten(-1, (c.n_groups, c.state_size))[:, :, group]
    c_ = c_.unflatten(-1, (c.n_groups, c.state_size))[:, :, group]
    free_dt = F.softplus(dt + p["dt_bias"])
    dt = free_dt.clamp(*c.time_step_limit)
    decay = torch.exp(-dt * torch.exp(p["A_log"]))

    state = x.new_zeros(x.shape[0], c.num_heads, c.head_dim, c.state_size)
    ys = []
    for t in range(length):
        step = dt[:, t, :, None] * x[:, t]
        state = decay[:, t, :, None, None] * state + step[..., None] * b[:, t, :, None, :]
        ys.append((state * c_[:, t, :, None, :]).sum(-1) + p["D"][:, None] * x[:, t])
    y = torch.stack(ys, 1).flatten(-2)
    y = rms_norm(y * F.silu(z), p["norm.weight"], c.layer_norm_epsilon, c.n_groups)
    return F.linear(y, p["out_proj.weight"], p.get("out_proj.bias")), free_dt


def recurrence_logits(params, config, ids):
    """ids [B, L] -> (logits [B, L, V], dt before its clamp of every layer [n, B, L, H]); params by their full name."""
    c = config
    hidden = params["backbone.embeddings.weight"][ids]
    dts = []
    for layer in range(c.num_hidden_layers):
        prefix = f"backbone.layers.{layer}."
        own = {k.removeprefix(prefix): v for k, v in params.items() if k.startswith(prefix)}
        normed = rms_norm(hidden, own["norm.weight"], c.layer_norm_epsilon)
        mixer_params = {k.removeprefix("mixer."): v for k, v in own.items() if k.startswith("mixer.")}
        out, dt = mixer(normed, mixer_params, c)
        hidden = hidden + out
        dts.append(dt)
    hidden = rms_norm(hidden, params["backbone.norm_f.weight"], c.layer_norm_epsilon)
    head = params.get("lm_head.weight", params["backbone.embeddings.weight"])
    return F.linear(hidden, head), torch.stack(dts)
