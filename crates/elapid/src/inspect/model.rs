//! Configurations and Hugging Face model folders.

use std::path::Path;

use elapid_tensor::{Checkpointing, NormGroup};
use serde_json::json;

use super::{Fields, fields};
use crate::Error;
use crate::config::ModelConfig;
use crate::config::run::Dtype;
use crate::model::{Layout, Role, pretrained};
use crate::train::memory::{Demand, Memory};

/// Sequence length for which the memory of training is predicted, at one sequence a micro-step.
const LENGTH: usize = 2048;

/// Dimensions, parameters, arithmetic, and memory for training.
pub(super) fn describe(config: &ModelConfig) -> Fields {
    let layout = Layout::new(config);
    let flops = config.flops_per_token();
    let count = |roles: &[Role]| -> usize {
        let of_role = layout.iter().filter(|(_, _, info)| roles.contains(&info.role));
        of_role.map(|(_, slot, _)| slot.len()).sum()
    };
    let (embedding, head) = (count(&[Role::Embedding]), count(&[Role::Head]));
    let projections = count(&[Role::InProj, Role::OutProj]);
    let parameters = layout.parameter_count();
    let memory = [
        (Dtype::Float32, Checkpointing::None, "none"),
        (Dtype::Float32, Checkpointing::Block, "block"),
        (Dtype::Bfloat16, Checkpointing::None, "none"),
        (Dtype::Bfloat16, Checkpointing::Block, "block"),
    ]
    .map(|(dtype, checkpointing, name)| {
        let memory = Memory::predict(&Demand::alone(
            config,
            (1, LENGTH),
            dtype.compute(),
            checkpointing,
            std::thread::available_parallelism().map_or(1, usize::from),
        ));
        json!({
            "dtype": dtype,
            "activation_checkpointing": name,
            "batch": 1,
            "seq_len": LENGTH,
            "total_bytes": memory.total(),
            "activations_bytes": memory.activations,
        })
    });
    fields(json!({
        "parameters": parameters,
        "dimensions": {
            "num_hidden_layers": config.num_hidden_layers,
            "hidden_size": config.hidden_size,
            "inner": config.spec().inner(),
            "num_heads": config.num_heads,
            "head_dim": config.head_dim,
            "n_groups": config.n_groups,
            "state_size": config.state_size,
            "conv_kernel": config.conv_kernel,
            "chunk_size": config.chunk_size,
            "vocab_size": config.vocab_size,
        },
        "tie_word_embeddings": config.tie_word_embeddings,
        "use_bias": config.use_bias,
        "use_conv_bias": config.use_conv_bias,
        "norm_group": match config.norm_group { NormGroup::PerGroup => "per_group", NormGroup::Across => "across" },
        "parameters_in": {
            "embedding": embedding,
            "head": head,
            "projections": projections,
            "rest": parameters - embedding - head - projections,
        },
        "flops_per_token": { "forward": flops.forward, "backward": flops.backward },
        "training_memory": memory,
    }))
}

/// A model folder: its configuration, and the weights beside it where there are any.
pub(super) fn describe_folder(dir: &Path) -> Result<Fields, Error> {
    let config = ModelConfig::load(dir)?;
    let files = if pretrained::has_weights(dir)? {
        pretrained::inspect(dir, &Layout::new(&config))?
    } else {
        Vec::new()
    };
    let names = files.iter().map(|file| {
        json!({
            "name": file.path.file_name().map(|name| name.to_string_lossy()),
            "bytes": file.bytes,
            "tensors": file.tensors,
            "dtype": file.dtypes,
        })
    });
    let mut all = fields(json!({
        "files": names.collect::<Vec<_>>(),
        "tokenizer": dir.join("tokenizer.json").exists(),
    }));
    all.extend(describe(&config));
    Ok(all)
}
