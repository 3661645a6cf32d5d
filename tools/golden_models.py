"""Golden models: tiny Mamba-2 models as transformers saves them, with logits, loss, gradients and a loss curve."""

import copy
import json
import math
from dataclasses import asdict, dataclass

import numpy
import safetensors
import safetensors.torch
import tokenizers
import torch
import torch.nn.functional as F
import transformers
from transformers import Mamba2Config, Mamba2ForCausalLM

from reference import float64, recurrence_logits

CURVE = {
    "steps": 20,
    "lr": 2e-3,
    "betas": [0.9, 0.95],
    "eps": 1e-8,
    "weight_decay": 0.1,
    "max_grad_norm": 1.0,
}
NEW_TOKENS = 24
INF = math.inf


@dataclass
class Case:
    """One model and one batch. The grid covers pairs of values rather than their product.

    A seed is chosen so that the case is well conditioned: float32, float64 and bfloat16 agree as well as they can.
    """

    name: str
    hidden: int = 32
    expand: int = 2
    head_dim: int = 16
    groups: int = 1
    state: int = 16
    layers: int = 2
    kernel: int = 4
    chunk: int = 256
    vocab: int = 67
    eps: float = 1e-5
    limit: tuple = (0.0, INF)
    tied: bool = False
    bias: bool = False
    conv_bias: bool = True
    residual_in_fp32: bool = True
    batch: int = 1
    length: int = 63
    decode: bool = False
    after: bool = False
    seed: int = 1


CASES = [
    Case("base", seed=2, tied=True, batch=2, chunk=64, decode=True, after=True),
    Case("groups", seed=1, groups=2, state=64, bias=True, length=257, chunk=256, vocab=71, residual_in_fp32=False, after=True),
    Case("limit", seed=5, groups=2, limit=(0.01, 0.05), conv_bias=False, length=255, chunk=128, vocab=73, decode=True),
    Case("wide", seed=5, hidden=64, head_dim=64, state=128, tied=True, batch=2, chunk=256, vocab=101),
    Case("kernel2", seed=2, head_dim=32, groups=2, kernel=2, tied=True, bias=True, batch=2, length=257, chunk=64, vocab=97),
    Case("kernel3", seed=5, hidden=64, groups=4, kernel=3, limit=(0.0, 0.05), length=255, chunk=64, vocab=89, residual_in_fp32=False),
    Case("onehead", seed=2, head_dim=64, state=64, tied=True, conv_bias=False, length=257, chunk=128, vocab=79),
    Case("expand", seed=1, hidden=64, expand=1, groups=4, state=64, eps=1e-3, conv_bias=False, bias=True, length=63, chunk=64, vocab=83),
    Case("deep", seed=4, head_dim=32, state=128, layers=3, limit=(0.01, INF), bias=True, tied=True, batch=2, length=65, chunk=64, vocab=69),
    Case("token", seed=2, head_dim=32, groups=2, state=64, bias=True, tied=True, batch=2, length=1, chunk=256, vocab=77),
]


def config_of(case):
    return Mamba2Config(
        hidden_size=case.hidden,
        expand=case.expand,
        head_dim=case.head_dim,
        num_heads=case.hidden * case.expand // case.head_dim,
        n_groups=case.groups,
        state_size=case.state,
        num_hidden_layers=case.layers,
        conv_kernel=case.kernel,
        chunk_size=case.chunk,
        vocab_size=case.vocab,
        layer_norm_epsilon=case.eps,
        time_step_limit=list(case.limit),
        tie_word_embeddings=case.tied,
        use_bias=case.bias,
        use_conv_bias=case.conv_bias,
        residual_in_fp32=case.residual_in_fp32,
    )


@torch.no_grad()
def fill(model, rng):
    """Gives every parameter a random value, so that no term of the model is at a neutral point.

    The library starts with norms and D at one, biases at zero and A = 1..H, where a missing factor or a swapped
    head would not show.
    """
    for name, p in model.named_parameters():
        normal = torch.randn(p.shape, generator=rng)
        uniform = torch.rand(p.shape, generator=rng)
        if name.endswith("A_log"):
            value = torch.log(1 + 15 * uniform)
        elif name.endswith("dt_bias"):
            # Stratified over the heads, so that even two heads span the range: dt log-uniform in [1e-3, 0.2].
            place = (torch.arange(len(p)) + uniform) / len(p)
            dt = torch.exp(math.log(1e-3) + place * math.log(200))
            value = torch.log(torch.expm1(dt))
        elif name.endswith(".D"):
            value = 0.5 + uniform
        elif "norm" in name:
            value = 1 + 0.2 * normal
        elif name.endswith("bias"):
            value = 0.2 * normal
        elif "conv1d" in name:
            value = normal / math.sqrt(p.shape[-1])
        elif "embeddings" in name:
            value = 0.3 * normal
        else:
            value = normal / math.sqrt(p.shape[-1])
        p.copy_(value)


def decayed(name):
    """Matrices of the projections, the embedding and the head; every other parameter is left alone."""
    return name.endswith(("in_proj.weight", "out_proj.weight", "embeddings.weight", "lm_head.weight"))


def gradients(model):
    return {name: p.grad.detach().clone() for name, p in model.named_parameters()}


def loss_and_gradients(model, ids):
    model.zero_grad(set_to_none=True)
    out = model(ids, labels=ids, use_cache=False)
    out.loss.backward()
    return out.logits.detach(), out.loss.detach(), gradients(model)


def train_curve(model, batches):
    """Losses before each update, gradient norms before clipping, and the trained parameters."""
    named = dict(model.named_parameters())
    groups = [
        {"params": [p for n, p in named.items() if decayed(n)], "weight_decay": CURVE["weight_decay"]},
        {"params": [p for n, p in named.items() if not decayed(n)], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=CURVE["lr"], betas=CURVE["betas"], eps=CURVE["eps"])
    losses, norms = [], []
    for step in range(CURVE["steps"]):
        _, loss, grads = loss_and_gradients(model, batches[step % len(batches)])
        norm = math.sqrt(sum(g.double().pow(2).sum().item() for g in grads.values()))
        factor = min(1.0, CURVE["max_grad_norm"] / (norm + 1e-6))
        for p in named.values():
            p.grad.mul_(factor)
        adamw.step()
        losses.append(loss.item())
        norms.append(norm)
    return losses, norms, {n: p.detach().clone() for n, p in named.items()}


@torch.no_grad()
def greedy(model, prompt):
    """Continuation by repeated full forwards, and the smallest lead of a chosen token over the next best.

    Not `generate()`: with a cache transformers 5.23 forgets `time_step_limit`.
    """
    ids, lead = list(prompt), INF
    for _ in range(NEW_TOKENS):
        logits = model(torch.tensor([ids]), use_cache=False).logits[0, -1]
        best, second = logits.topk(2).values.tolist()
        lead = min(lead, best - second)
        ids.append(int(logits.argmax()))
    return ids[len(prompt) :], lead


def relative(a, b):
    """Largest difference, in units of the largest entry of b."""
    return ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()


def demand(ok, what):
    if not ok:
        raise SystemExit(f"golden data is not trustworthy: {what}")


def check_against_recurrence(case, config, model64, ids, logits, grads):
    """Demands that the float64 run of transformers is the recurrence, gradients included."""
    params = {n: p.detach().clone().requires_grad_() for n, p in model64.named_parameters()}
    ours, dt = recurrence_logits(params, config, ids)
    errors = {"logits": relative(logits, ours.detach())}
    if grads is not None:
        F.cross_entropy(ours[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        errors |= {name: relative(grads[name], p.grad) for name, p in params.items()}
    worst = max(errors, key=errors.get)
    demand(errors[worst] < 1e-9, f"{case.name}: {worst} is {errors[worst]:.1e} from the recurrence")
    below, above = ((dt < case.limit[0]).double().mean().item(), (dt > case.limit[1]).double().mean().item())
    demand(case.limit[0] == 0 or below > 0.05, f"{case.name}: the lower limit of dt acts on {below:.1%}")
    demand(case.limit[1] == INF or above > 0.05, f"{case.name}: the upper limit of dt acts on {above:.1%}")
    low, high = dt.quantile(0.02).item(), dt.quantile(0.98).item()
    demand(low < 5e-3 and high > 0.1, f"{case.name}: dt spans only {low:.1e} to {high:.1e}")
    return {"recurrence": errors[worst], "dt_below_limit": below, "dt_above_limit": above}


def write_case(case, folder):
    folder.mkdir(parents=True)
    rng = torch.Generator().manual_seed(case.seed)
    config = config_of(case)
    made = Mamba2ForCausalLM(config)
    fill(made, rng)
    made.save_pretrained(folder)

    # From here on the folder is the truth: everything is computed from what was saved.
    model, info = Mamba2ForCausalLM.from_pretrained(folder, output_loading_info=True)
    demand(not any(info.values()), f"{case.name}: loading reports {info}")
    for (name, a), (_, b) in zip(made.named_parameters(), model.named_parameters(), strict=True):
        demand(torch.equal(a, b), f"{case.name}: {name} changed on its way to disk")
    model.eval()
    model64 = copy.deepcopy(model).double()

    batches = torch.randint(case.vocab, (2, case.batch, case.length), generator=rng)
    ids = batches[0]
    tensors = {"input_ids": ids.int()}
    checks = {}

    if case.length == 1:  # One token has no successor: no loss, no gradients.
        logits32 = model(ids, use_cache=False).logits.detach()
        with float64():
            logits = model64(ids, use_cache=False).logits.detach()
        grads = None
    else:
        logits32, loss32, grads32 = loss_and_gradients(model, ids)
        with float64():
            logits, loss, grads = loss_and_gradients(model64, ids)
        errors = {n: relative(grads32[n], g) for n, g in grads.items()}
        worst = max(errors, key=errors.get)
        demand(errors[worst] < 1e-5, f"{case.name}: fp32 gradient of {worst} is off by {errors[worst]:.1e}")
        demand(min(g.abs().max().item() for g in grads.values()) > 1e-5, f"{case.name}: a gradient vanishes")
        checks |= {"fp32_loss": abs((loss32 - loss).item()), "fp32_gradients": errors[worst]}
        tensors |= {"loss": loss} | {f"grad.{n}": g for n, g in grads.items()}

        half = Mamba2ForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
        out = half(ids, labels=ids, use_cache=False)
        tensors["bf16_loss"] = out.loss.detach()
        checks |= {
            "bf16_loss": abs((out.loss - loss).item()),
            "bf16_logits": relative(out.logits.detach(), logits),
        }

        with float64():
            losses, norms, trained = train_curve(copy.deepcopy(model64), batches)
        losses32, norms32, trained32 = train_curve(copy.deepcopy(model), batches)
        demand(losses[-1] < losses[0] and losses[-2] < losses[0], f"{case.name}: the curve does not fall")
        checks |= {
            "fp32_curve": max(abs(a - b) for a, b in zip(losses, losses32)),
            "fp32_curve_grad_norms": max(abs(a - b) / b for a, b in zip(norms, norms32)),
            "clipped_steps": sum(n > CURVE["max_grad_norm"] for n in norms),
        }
        tensors |= {
            "curve_ids": batches.int(),
            "curve": torch.tensor(losses, dtype=torch.float64),
            "curve_grad_norms": torch.tensor(norms, dtype=torch.float64),
        }
        demand(checks["bf16_logits"] < 0.05, f"{case.name}: bf16 logits are off by {checks['bf16_logits']:.1e}")
        demand(checks["fp32_curve"] < 2e-6, f"{case.name}: the fp32 curve is off by {checks['fp32_curve']:.1e}")
        if case.after:
            tensors |= {f"after.{n}": p for n, p in trained.items()}
            checks["fp32_after"] = max((trained32[n] - p).abs().max().item() for n, p in trained.items())

    demand(logits.dtype == torch.float64, "transformers narrowed the logits")
    checks["fp32_logits"] = relative(logits32, logits)
    checks |= check_against_recurrence(case, config, model64, ids, logits, grads)
    tensors["logits"] = logits

    if case.decode:
        prompt = ids[0, :9].tolist()
        with float64():
            chosen, lead = greedy(model64, prompt)
        demand(chosen == greedy(model, prompt)[0], f"{case.name}: fp32 decodes otherwise")
        demand(lead > 1e-3, f"{case.name}: two tokens are within {lead:.1e} while decoding")
        demand(len(set(chosen)) > 5, f"{case.name}: decoding gives {chosen}")
        checks["decode_lead"] = lead
        tensors |= {"decode_prompt": torch.tensor(prompt).int(), "decode_ids": torch.tensor(chosen).int()}

    narrow = {n: t.float() if t.is_floating_point() else t for n, t in tensors.items()}
    safetensors.torch.save_file({n: t.contiguous() for n, t in sorted(narrow.items())}, folder / "golden.safetensors")
    about = {
        "case": {k: str(v) if k == "limit" else v for k, v in asdict(case).items()},
        "curve": CURVE | {
            "schedule": "constant, no warm-up",
            "batches": "step s, counted from 1, trains on curve_ids[(s - 1) % 2]",
            "clip_factor": "min(1, max_grad_norm / (norm + 1e-6))",
            "decayed": [n for n, _ in model.named_parameters() if decayed(n)],
        },
        "checks": {k: float(f"{v:.3g}") if isinstance(v, float) else v for k, v in checks.items()},
        "versions": versions(),
    }
    (folder / "golden.json").write_text(json.dumps(about, indent=2) + "\n")
    print(f"{case.name:8} " + "  ".join(f"{k} {v:.1e}" for k, v in checks.items()))


def versions():
    modules = (torch, transformers, safetensors, tokenizers, numpy)
    return {m.__name__: m.__version__.split("+")[0] for m in modules}


def write_models(folder):
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for case in CASES:
        write_case(case, folder / case.name)
