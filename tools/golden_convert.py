"""Golden models of other programs: the same weights as each of them lays them out, with the logits of transformers.

state-spaces/mamba and neuronx-distributed cannot run here; their layouts are made by hand from transformers' model, and
the files by torch.save and safetensors themselves.
"""

import json
import math
import os

import safetensors.torch
import torch
from transformers import Mamba2Config, Mamba2ForCausalLM

from golden_models import demand, fill

INF = math.inf


def build(seed, groups, tied, *, hidden=16, head_dim=8, state=8, layers=2, vocab=48, limit=(0.0, INF), bias=False):
    """A model with random values everywhere, and its tensors as the formats store them."""
    config = Mamba2Config(
        hidden_size=hidden,
        head_dim=head_dim,
        num_heads=2 * hidden // head_dim,
        n_groups=groups,
        state_size=state,
        num_hidden_layers=layers,
        vocab_size=vocab,
        chunk_size=256,
        tie_word_embeddings=tied,
        time_step_limit=list(limit),
        use_bias=bias,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    model = Mamba2ForCausalLM(config)
    fill(model, torch.Generator().manual_seed(seed))
    return model.eval()


@torch.no_grad()
def logits(model, dtype, seed):
    """Rounds the parameters to dtype and computes in float32."""
    for p in model.parameters():
        p.copy_(p.to(dtype).float())
    ids = torch.randint(model.config.vocab_size, (2, 33), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids.int(), "logits": model(ids, use_cache=False).logits.contiguous()}


def tensors(model, dtype):
    """Parameters by transformers' names; a tied head is left out."""
    return {name: p.detach().to(dtype) for name, p in model.named_parameters()}


def write(folder, files, golden):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        path = folder / name
        if callable(content):
            content(path)
        else:
            path.write_text(content if isinstance(content, str) else json.dumps(content, indent=2) + "\n")
    if golden:
        safetensors.torch.save_file(golden, folder / "golden.safetensors")


def save_torch(value, **options):
    """The archive's folder is called like the file, so the file gets its name first."""

    def save(path):
        here = os.getcwd()
        os.chdir(path.parent)
        torch.save(value, path.name, **options)
        os.chdir(here)

    return save


def ssm_config(model, vocab, multiple, **layer):
    c = model.config
    return {
        "d_model": c.hidden_size,
        "d_intermediate": 0,
        "n_layer": c.num_hidden_layers,
        "vocab_size": vocab,
        "ssm_cfg": {"layer": "Mamba2", "headdim": c.head_dim, "d_state": c.state_size, "ngroups": c.n_groups} | layer,
        "attn_layer_idx": [],
        "attn_cfg": {},
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": multiple,
        "tie_embeddings": c.tie_word_embeddings,
    }


def ssm_state(model, dtype):
    """State of MambaLMHeadModel: the embedding by its other name, a tied head twice under one storage."""
    state = {n.replace("embeddings", "embedding"): t for n, t in tensors(model, dtype).items()}
    if model.config.tie_word_embeddings:
        state["lm_head.weight"] = state["backbone.embedding.weight"]
    return state


def write_mamba_ssm(root):
    for seed, groups, tied, dtype, name in [
        (1, 1, True, torch.float32, "ssm_g1_tied_fp32"),
        (2, 4, False, torch.float16, "ssm_g4_fp16"),
        (3, 4, True, torch.bfloat16, "ssm_g4_tied_bf16"),
    ]:
        model = build(seed, groups, tied)
        golden = logits(model, dtype, seed)
        state = ssm_state(model, dtype)
        config = ssm_config(model, 41, 16, A_init_range=[1, 16], dt_min=0.001)
        files = {"config.json": config, "pytorch_model.bin": save_torch(state)}
        if name == "ssm_g4_tied_bf16":
            files = {"config.json": config, "model.safetensors": None}
            del state["lm_head.weight"]
            files["model.safetensors"] = lambda path, state=state: safetensors.torch.save_file(state, path)
        write(root / name, files, golden)

    # Everything that torch.save can make of tensors: an OrderedDict with metadata, parameters, views into one storage,
    # a transposed matrix, protocol 4; and limits of dt, one of them infinite.
    model = build(4, 2, False, limit=(0.01, INF), bias=True)
    golden = logits(model, torch.float32, 4)
    state = model.state_dict()
    for name in [n for n in state if n.endswith(("A_log", "D", "dt_bias"))]:
        joined = torch.cat([torch.zeros(3), state[name]])
        state[name] = joined[3:]
    for name in [n for n in state if n.endswith("out_proj.weight")]:
        state[name] = state[name].t().contiguous().t()
    state["lm_head.weight"] = torch.nn.Parameter(state["lm_head.weight"].clone())
    wide = torch.zeros(48, 20)
    wide[:, 2:18] = state.pop("backbone.embeddings.weight")
    state["backbone.embedding.weight"] = wide[:, 2:18]
    config = json.dumps(ssm_config(model, 48, 8, bias=True, dt_limit=[0.01, INF]), indent=2)
    demand("Infinity" in config, "json has no bare Infinity")
    write(root / "ssm_views", {"config.json": config, "pytorch_model.bin": save_torch(state, pickle_protocol=4)}, golden)


def write_codestral(root):
    model = build(5, 2, False, hidden=64, head_dim=64, state=128, layers=1, vocab=32)
    golden = logits(model, torch.bfloat16, 5)
    state = {"model." + n.replace("embeddings", "embedding"): t for n, t in tensors(model, torch.bfloat16).items()}
    params = {
        "dim": 64,
        "n_layers": 1,
        "vocab_size": 32,
        "n_groups": 2,
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 1,
        "tie_embeddings": False,
        "model_type": "mamba",
    }
    files = {
        "params.json": params,
        "consolidated.safetensors": lambda path: safetensors.torch.save_file(state, path),
        "tokenizer.model.v3": "stands for a SentencePiece file\n",
    }
    write(root / "codestral", files, golden)


def parts(model, name, tensor):
    """in_proj [z|x|B|C|dt] as [z], [x|B|C], [dt]; the segments of x, B and C with it."""
    c = model.config
    inner, states, heads = c.expand * c.hidden_size, c.n_groups * c.state_size, c.num_heads
    z, x, b, conv_c, dt = tensor.split([inner, inner, states, states, heads])
    return {
        name.replace("in_proj", "in_proj_z"): [z],
        name.replace("in_proj", "in_proj_xBC"): [x, b, conv_c],
        name.replace("in_proj", "in_proj_dt"): [dt],
    }


def write_split(root):
    model = build(6, 2, True, bias=True)
    golden = logits(model, torch.float32, 6)
    state = {}
    for name, tensor in tensors(model, torch.float32).items():
        if "in_proj" in name:
            state |= {n: torch.cat(p) for n, p in parts(model, name, tensor).items()}
        else:
            state[name] = tensor
    files = {
        "config.json": model.config.to_json_string(),
        "model.safetensors": lambda path: safetensors.torch.save_file(state, path, metadata={"format": "pt"}),
    }
    write(root / "hf_split", files, golden)
    # The same, whole, as transformers saves it: what a conversion must give to the byte.
    whole = root / "hf_split_whole"
    model.save_pretrained(whole)
    for extra in ["config.json", "generation_config.json"]:
        (whole / extra).unlink(missing_ok=True)


def shard(model, tp, rank, split):
    """What tensor-parallel rank `rank` of `tp` holds: its share of each segment."""
    c = model.config
    inner, states = c.expand * c.hidden_size, c.n_groups * c.state_size

    def share(pieces, dim=0):
        return torch.cat([piece.chunk(tp, dim)[rank] for piece in pieces], dim).clone()

    state = {}
    for name, tensor in tensors(model, torch.bfloat16).items():
        if "in_proj" in name:
            of_parts = parts(model, name, tensor)
            if split:
                state |= {n: share(p) for n, p in of_parts.items()}
            else:
                state[name] = share(sum(of_parts.values(), []))
        elif "conv1d" in name:
            state[name] = share(tensor.split([inner, states, states]))
        elif name.endswith("out_proj.weight"):
            state[name] = share([tensor], 1)
        elif name.endswith("out_proj.bias") or ("norm" in name and "mixer" not in name):
            state[name] = tensor
        else:
            state[name] = share([tensor])
    if c.tie_word_embeddings:
        state["lm_head.weight"] = state["backbone.embeddings.weight"]
    return state


def write_ranks(root):
    for seed, tp, split, bias in [(7, 2, True, False), (8, 4, False, True)]:
        model = build(seed, 4, True, bias=bias)
        golden = logits(model, torch.bfloat16, seed)
        # The flag that the fused kernel of that system did not look at.
        config = model.config.to_dict() | {"rmsnorm_within_groups": False}
        config["time_step_limit"] = [0.0, INF]
        files = {"config.json": json.dumps(config, indent=2) + "\n"}
        folder = root / f"tp{tp}"
        write(folder, files, golden)
        for rank in range(tp):
            name = f"dp_rank_00_tp_rank_{rank:02}_pp_rank_00.pt"
            write(folder / "model", {name: save_torch(shard(model, tp, rank, split))}, None)


def write_refused(root):
    """Files that must not be read."""

    class Evil:
        def __reduce__(self):
            return os.system, ("touch /tmp/elapid-was-here",)

    weight = {"weight": torch.ones(2)}
    files = {
        "evil.bin": save_torch(weight | {"evil": Evil()}),
        "legacy.bin": save_torch({}, _use_new_zipfile_serialization=False),
        "module.bin": save_torch(torch.nn.Linear(2, 2)),
        "double.bin": save_torch({"weight": torch.ones(2, dtype=torch.float64)}),
        "expanded.bin": save_torch({"weight": torch.ones(1).expand(1 << 40)}),
    }
    write(root / "refused", files, None)


def write_convert(root):
    torch.manual_seed(0)
    write_mamba_ssm(root)
    write_codestral(root)
    write_split(root)
    write_ranks(root)
    write_refused(root)
