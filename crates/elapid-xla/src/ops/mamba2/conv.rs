//! Causal depthwise convolution: shifted multiply-adds over the inputs with the carried ones before them.

use super::{Dims, Params};
use crate::hlo::Type;
use crate::hlo::graph::Value;

pub(super) struct Conv<'g> {
    /// `[B, K−1 + L, C]`: the inputs with those carried before them.
    inputs: Value<'g>,
    /// By how far a tap looks back: `[B, L]`, 1 where what it sees belongs to the position's document.
    sees: Vec<Option<Value<'g>>>,
    /// `[B, L, C]`, before SiLU.
    pub(super) pre: Value<'g>,
}

impl<'g> Conv<'g> {
    pub(super) fn new(
        dims: &Dims<'g>,
        x: Value<'g>,
        initial: Option<Value<'g>>,
        breaks: Option<Value<'g>>,
        params: &Params<'g>,
    ) -> Self {
        let k = dims.spec.conv_kernel;
        let inputs = match initial {
            Some(initial) => dims.graph.concatenate(&[initial, x], 1),
            None => x.pad(1, k - 1, 0),
        };
        let mut conv = Self { inputs, sees: sees(dims, breaks), pre: x };
        let shape = x.dims();
        let taps = (0..k).map(|back| conv.tap(dims, back) * conv.weight(dims, params, back));
        let mut pre = taps.reduce(|a, b| a + b).expect("a convolution has taps");
        if let Some(bias) = params.conv_bias {
            pre = pre + bias.expand(&shape, &[2]);
        }
        conv.pre = pre;
        conv
    }

    /// `[B, L, C]`: what each position sees `back` positions back.
    fn tap(&self, dims: &Dims<'g>, back: usize) -> Value<'g> {
        let first = dims.spec.conv_kernel - 1 - back;
        let seen = self.inputs.slice(1, first, first + dims.len);
        self.masked(seen, back)
    }

    fn masked(&self, x: Value<'g>, back: usize) -> Value<'g> {
        match self.sees[back] {
            Some(sees) => x * sees.expand(&x.dims(), &[0, 1]),
            None => x,
        }
    }

    /// `[B, L, C]`: the weight of the tap that looks `back` positions back.
    fn weight(&self, dims: &Dims<'g>, params: &Params<'g>, back: usize) -> Value<'g> {
        let (k, c) = (dims.spec.conv_kernel, dims.spec.conv_channels());
        let tap = params.conv_weight.slice(1, k - 1 - back, k - back).reshape(&[c]);
        tap.expand(&[dims.batch, dims.len, c], &[2])
    }

    /// `[B, K−1, C]`: what a next position of the last document would see; zeros before its beginning.
    pub(super) fn last_inputs(&self, dims: &Dims<'g>) -> Value<'g> {
        let (k, len) = (dims.spec.conv_kernel, dims.len);
        let rows: Vec<Value<'g>> = (0..k - 1)
            .map(|row| {
                let last = self.inputs.slice(1, len + row, len + row + 1);
                self.last_mask(dims, row).map_or(last, |mask| last * mask)
            })
            .collect();
        match rows[..] {
            [] => dims.graph.full(Type::F32, &[dims.batch, 0, dims.spec.conv_channels()], 0.0),
            _ => dims.graph.concatenate(&rows, 1),
        }
    }

    /// `[B, 1, C]`: 1 where the row of the carried inputs belongs to the document of the last position.
    fn last_mask(&self, dims: &Dims<'g>, row: usize) -> Option<Value<'g>> {
        let back = dims.spec.conv_kernel - 2 - row;
        let sees = self.sees[back]?.slice(1, dims.len - 1, dims.len);
        Some(sees.expand(&[dims.batch, 1, dims.spec.conv_channels()], &[0, 1]))
    }

    /// From the cotangents of [`Self::pre`] and of [`Self::last_inputs`]: those of the inputs with the carried ones
    /// before them `[B, K−1 + L, C]` and of the weight `[C, K]`.
    pub(super) fn pull(
        &self,
        dims: &Dims<'g>,
        params: &Params<'g>,
        d_pre: Value<'g>,
        d_last: Option<Value<'g>>,
    ) -> (Value<'g>, Value<'g>) {
        let (k, c) = (dims.spec.conv_kernel, dims.spec.conv_channels());
        let mut d_inputs = None::<Value<'g>>;
        let mut add = |d: Value<'g>| d_inputs = Some(d_inputs.map_or(d, |sum| sum + d));
        let mut d_weight = Vec::new();
        for back in (0..k).rev() {
            d_weight.push((d_pre * self.tap(dims, back)).sum(&[0, 1]).reshape(&[c, 1]));
            let d = self.masked(d_pre * self.weight(dims, params, back), back);
            add(d.pad(1, k - 1 - back, back));
        }
        if let Some(d_last) = d_last {
            for row in 0..k - 1 {
                let d = d_last.slice(1, row, row + 1);
                let d = self.last_mask(dims, row).map_or(d, |mask| d * mask);
                add(d.pad(1, dims.len + row, k - 2 - row));
            }
        }
        (d_inputs.expect("a convolution has taps"), dims.graph.concatenate(&d_weight, 1))
    }
}

/// Where no document begins between a position and the one `back` before it: the product of "none begins here" over
/// the positions on the way. Before position 0 there is the document of position 0.
fn sees<'g>(dims: &Dims<'g>, breaks: Option<Value<'g>>) -> Vec<Option<Value<'g>>> {
    let Some(breaks) = breaks else { return vec![None; dims.spec.conv_kernel] };
    let mut all = vec![None];
    let mut product = None::<Value<'g>>;
    for back in 1..dims.spec.conv_kernel {
        // The position reached last on the way back.
        let step = (back - 1).min(dims.len);
        let shifted = breaks.slice(1, 0, dims.len - step).pad(1, step, 0);
        let none = shifted * -1.0 + 1.0;
        product = Some(product.map_or(none, |p| p * none));
        all.push(product);
    }
    all
}
