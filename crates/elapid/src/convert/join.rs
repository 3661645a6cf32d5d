//! The parameters of a model, put together from the tensors of tensor-parallel ranks and from split projections.
//!
//! The layout table says everything: along which axis a parameter is cut, and which segments a fused axis has. A rank
//! holds its share of every segment, one after the other.

use std::collections::BTreeMap;
use std::path::Path;

use crate::Error;
use crate::error::say;
use crate::model::weights::{HEAD, Joined, PIECE, Stored, View, Weights, for_each_stretch};
use crate::model::{Layout, ParamInfo, Role, Segment, Shard};

/// The three parts of a split in_proj: ending of their names and number of segments of `[z|x|B|C|dt]`.
const SPLIT: [(&str, usize); 3] = [("in_proj_z", 1), ("in_proj_xBC", 3), ("in_proj_dt", 1)];

/// The names of the parts of a parameter whose name holds `in_proj`, with the segments that lie in each.
pub(super) fn split<'a>(name: &str, segments: &'a [Segment]) -> Vec<(String, &'a [Segment])> {
    let mut rest = segments;
    let parts = SPLIT.iter().map(|(part, count)| {
        let (taken, left) = rest.split_at(*count);
        rest = left;
        (name.replace("in_proj", part), taken)
    });
    parts.collect()
}

/// The tensors of all ranks by name (one map a rank, at least one) as parameters of the model. Tensors that are no part of
/// any parameter keep their names, and parameters that are missing stay so: [`Weights::fit`] tells.
///
/// # Errors
/// A tensor that one rank has and another has not, or that is not the share of a rank; segments that so many ranks cannot
/// share.
pub(super) fn join(layout: &Layout, mut ranks: Vec<BTreeMap<String, View>>) -> Result<Weights, Error> {
    let mut weights = Weights::default();
    // Such a layout cannot fit, and may be endless.
    if layout.flat.layers > ranks[0].len() {
        return Ok(ranks.swap_remove(0).into());
    }
    let embedding = layout.iter().find(|(_, _, info)| info.role == Role::Embedding);
    // A tied head is no parameter, but may be there.
    let head = embedding.map(|(_, _, info)| (HEAD.to_owned(), info));
    for (name, info) in layout.iter().map(|(name, _, info)| (name, info)).chain(head) {
        let segments = segments(info);
        let whole = vec![(name.clone(), &segments[..])];
        let holders = match (ranks[0].contains_key(&name), info.role) {
            (true, _) => whole,
            (false, Role::InProj) => split(&name, &segments),
            (false, Role::LinearBias) if name.ends_with("in_proj.bias") => split(&name, &segments),
            _ => continue,
        };
        if !holders.iter().all(|(holder, _)| ranks[0].contains_key(holder)) {
            continue;
        }
        let tensor = join_one(&name, info, &holders, &mut ranks)?;
        weights.0.insert(name, tensor);
    }
    // The unexpected ones; of several ranks one is enough to be told.
    let rest: BTreeMap<_, _> = ranks.into_iter().rev().flatten().collect();
    weights.0.extend(Weights::from(rest).0);
    Ok(weights)
}

/// What is dealt out along the axis of the cut.
fn segments(info: &ParamInfo) -> Vec<Segment> {
    match &info.shard {
        Shard::Column(segments) | Shard::Row(segments) => segments.clone(),
        Shard::Vocabulary => vec![Segment { name: "vocabulary", units: info.shape[0], width: 1 }],
        Shard::Replicated => Vec::new(),
    }
}

fn join_one(
    name: &str,
    info: &ParamInfo,
    holders: &[(String, &[Segment])],
    ranks: &mut [BTreeMap<String, View>],
) -> Result<Box<dyn Stored>, Error> {
    let tp = ranks.len();
    let mut views = Vec::new();
    for (holder, _) in holders {
        let path = ranks[0][holder].path().to_owned();
        let of_ranks = ranks.iter_mut().enumerate().map(|(rank, tensors)| {
            tensors.remove(holder).ok_or_else(|| {
                Error::new(format!("{holder} is in {}, but not in the file of rank {rank}", path.display()))
                    .with_hint("the files belong to different models; copy all of them from the same place")
            })
        });
        views.push(of_ranks.collect::<Result<Vec<View>, _>>()?);
    }
    if info.shard == Shard::Replicated {
        let mut copies = views.remove(0);
        let first = copies.remove(0);
        copies.iter().try_for_each(|copy| compare(name, &first, copy))?;
        return Ok(Box::new(first));
    }
    if tp == 1 && holders.len() == 1 {
        return Ok(Box::new(views.remove(0).remove(0)));
    }
    let axis = usize::from(matches!(info.shard, Shard::Row(_)));
    let mut parts = Vec::new();
    for ((holder, segments), views) in holders.iter().zip(&views) {
        if let Some(segment) = segments.iter().find(|segment| !segment.units.is_multiple_of(tp)) {
            return Err(Error::new(format!(
                "{name}: {} has {} units, which {tp} ranks cannot share",
                segment.name, segment.units
            ))
            .with_hint(
                "the number of groups is a multiple of the number of ranks; give it with --n-groups",
            ));
        }
        let mut expected = info.shape.clone();
        expected[axis] = segments.iter().map(|segment| segment.len() / tp).sum();
        for view in views {
            if view.shape() != expected {
                return Err(Error::new(format!(
                    "{holder} is {:?} in {}, but the configuration makes it {expected:?} on each of {tp} ranks",
                    view.shape(),
                    view.path().display()
                ))
                .with_hint("check the model's sizes (--model, --vocab-size, --n-groups) and that all ranks' files are there"));
            }
        }
        let mut at = 0;
        for segment in *segments {
            let len = segment.len() / tp;
            parts.extend(views.iter().map(|view| view.slice(axis, at, len)));
            at += len;
        }
    }
    Ok(Box::new(Joined::new(axis, parts)))
}

/// Says so where the copies of a replicated parameter have drifted apart.
fn compare(name: &str, first: &View, copy: &View) -> Result<(), Error> {
    let place = |view: &View| Path::file_name(view.path()).unwrap_or_default().display().to_string();
    if first.shape() != copy.shape() {
        return Err(Error::new(format!(
            "{name} is {:?} in {}, but {:?} in {}",
            first.shape(),
            place(first),
            copy.shape(),
            place(copy)
        ))
        .with_hint("the files belong to different models; copy all of them from the same place"));
    }
    let (mut other, mut largest) = (vec![0.0; PIECE.min(copy.len())], 0.0_f32);
    for_each_stretch(first, |at, values| {
        let other = &mut other[..values.len()];
        copy.read(at, other)?;
        largest = values.iter().zip(&*other).map(|(a, b)| (a - b).abs()).fold(largest, f32::max);
        Ok(())
    })?;
    if largest > 0.0 {
        say(format_args!(
            "warning: {name} should be the same on all ranks, but {} and {} differ by up to {largest:e}; the first is taken",
            place(first),
            place(copy)
        ));
    }
    Ok(())
}
