//! Rectangular blocks of row-major tensors.

use std::ops::Range;

/// A rectangle: first element and extents, by axis.
pub(super) type Rectangle = (Vec<usize>, Vec<usize>);

/// The elements `range` of a row-major tensor as rectangles: at most 2·axes − 1.
pub(super) fn rectangles(shape: &[usize], range: Range<usize>) -> Vec<Rectangle> {
    let Some((&extent, inner)) = shape.split_first() else { return vec![(vec![], vec![])] };
    let stride: usize = inner.iter().product();
    if range.is_empty() {
        return Vec::new();
    }
    let within = |row: usize, range: Range<usize>| {
        let rows = rectangles(inner, range).into_iter();
        rows.map(move |(offset, shape)| ([vec![row], offset].concat(), [vec![1], shape].concat()))
    };
    let (first, last) = (range.start.div_ceil(stride), range.end / stride);
    debug_assert!(last <= extent);
    if first > last {
        return within(last, range.start - last * stride..range.end - last * stride).collect();
    }
    let whole = (last > first).then(|| {
        let mut offset = vec![0; shape.len()];
        offset[0] = first;
        (offset, [&[last - first], inner].concat())
    });
    let head = (first * stride > range.start)
        .then(|| within(first - 1, stride - (first * stride - range.start)..stride));
    let tail = (range.end > last * stride).then(|| within(last, 0..range.end - last * stride));
    head.into_iter().flatten().chain(whole).chain(tail.into_iter().flatten()).collect()
}

/// Where two rectangles meet.
pub(super) fn meet(a: &Rectangle, b: &Rectangle) -> Option<Rectangle> {
    let axes = a.0.iter().zip(&a.1).zip(b.0.iter().zip(&b.1));
    let ranges = axes.map(|((a, a_len), (b, b_len))| (*a.max(b), (a + a_len).min(b + b_len)));
    ranges
        .map(|(from, to)| (from < to).then(|| (from, to - from)))
        .collect::<Option<Vec<_>>>()
        .map(|x| x.into_iter().unzip())
}

/// A rectangle of a row-major tensor as runs of elements that lie together.
pub(super) fn runs(shape: &[usize], (offset, extents): &Rectangle) -> Vec<Range<usize>> {
    let mut runs = Vec::<Range<usize>>::new();
    let (Some(width), rows) = (extents.last(), extents.iter().rev().skip(1).product::<usize>()) else {
        return std::iter::once(0..1).collect();
    };
    for row in 0..rows {
        let (mut rest, mut start, mut stride) = (row * width, 0, 1);
        for axis in (0..shape.len()).rev() {
            start += (offset[axis] + rest % extents[axis]) * stride;
            rest /= extents[axis];
            stride *= shape[axis];
        }
        match runs.last_mut() {
            Some(last) if last.end == start => last.end += width,
            _ => runs.push(start..start + width),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rectangles of a range are that range, in order, and few.
    #[test]
    fn a_range_is_a_few_rectangles() {
        let shape = [3, 4, 5];
        for start in 0..60 {
            for end in start..=60 {
                let found = rectangles(&shape, start..end);
                assert!(found.len() <= 5);
                let elements: Vec<_> = found.iter().flat_map(|block| runs(&shape, block)).flatten().collect();
                assert!(elements.into_iter().eq(start..end), "{start}..{end}: {found:?}");
            }
        }
    }

    #[test]
    fn runs_follow_the_rows() {
        assert_eq!(runs(&[3, 4, 5], &(vec![0, 1, 0], vec![2, 2, 5])), [5..15, 25..35]);
        assert_eq!(runs(&[3, 4], &(vec![1, 1], vec![2, 2])), [5..7, 9..11]);
        assert_eq!(runs(&[7], &(vec![2], vec![3]))[0], 2..5);
    }
}
