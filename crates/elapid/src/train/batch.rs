//! Blocks of tokens as the model reads them: labels shifted, lengths made equal, documents kept apart.

use elapid_tensor::{Backend, Checkpointing, IGNORE_LABEL, State, Tape};

use crate::Error;
use crate::data::{Dataset, PAD_DOCUMENT, Place, Sample};
use crate::model::Mamba2ForCausalLM;

/// Blocks of tokens with their labels.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Batch {
    /// B.
    pub size: usize,
    /// L, that of the longest sample.
    pub length: usize,
    /// `[B, L]`.
    pub ids: Vec<i32>,
    /// `[B, L]`: the token after each position, [`IGNORE_LABEL`] where there is none or it does not count.
    pub labels: Vec<i32>,
    /// `[B, L]`: where two neighbours differ, a document begins. None: every row is one document.
    pub documents: Option<Vec<i32>>,
    /// `[B]`: the row goes on in the document that ended this row of the batch before. It counts where states are
    /// carried; [`Batch::new`] says no.
    pub continued: Vec<bool>,
}

impl Batch {
    /// A batch of samples. The label of a position is that of the next one, unless another document begins there
    /// (T4). Shorter samples are padded on the left, with a document of its own ([`PAD_DOCUMENT`]): what the model
    /// makes of a sample is the same, its state after the last token included (T5).
    pub fn new(samples: &[Sample]) -> Self {
        let length = samples.iter().map(|s| s.input_ids.len()).max().unwrap_or(0);
        let unequal = samples.iter().any(|s| s.input_ids.len() < length);
        let apart = unequal || samples.iter().any(|s| s.documents.is_some());
        let mut batch = Self {
            size: samples.len(),
            length,
            documents: apart.then(Vec::new),
            continued: vec![false; samples.len()],
            ..Self::default()
        };
        for sample in samples {
            batch.push(sample);
        }
        batch
    }

    /// The batch at `places`. A row is continued where it follows the block before and the dataset says that the
    /// document goes on.
    ///
    /// # Errors
    /// A block cannot be read.
    pub fn read(data: &Dataset, places: &[Place]) -> Result<Self, Error> {
        let samples = places.iter().map(|place| data.sample(place.index)).collect::<Result<Vec<_>, _>>()?;
        let continued = places.iter().map(|place| Ok(place.follows && data.continues(place.index)?));
        Ok(Self { continued: continued.collect::<Result<_, Error>>()?, ..Self::new(&samples) })
    }

    fn push(&mut self, sample: &Sample) {
        let padding = self.length - sample.input_ids.len();
        let boundary = |i: usize| sample.documents.as_ref().is_some_and(|ids| ids[i - 1] != ids[i]);
        let label = |i: usize| if boundary(i) { IGNORE_LABEL } else { sample.labels[i] };
        self.ids.extend(std::iter::repeat_n(0, padding));
        self.ids.extend(&sample.input_ids);
        self.labels.extend(std::iter::repeat_n(IGNORE_LABEL, padding));
        self.labels.extend((1..sample.input_ids.len()).map(label));
        self.labels.extend(sample.input_ids.last().map(|_| IGNORE_LABEL));
        if let Some(documents) = &mut self.documents {
            documents.extend(std::iter::repeat_n(PAD_DOCUMENT, padding));
            match &sample.documents {
                Some(ids) => documents.extend(ids),
                None => documents.extend(sample.input_ids.iter().map(|_| 0)),
            }
        }
    }

    /// Number of labels that count.
    pub fn valid(&self) -> usize {
        self.labels.iter().filter(|&&label| label != IGNORE_LABEL).count()
    }

    /// Number of inputs, B·L.
    pub fn tokens(&self) -> usize {
        self.ids.len()
    }

    /// Sum of token losses, fp32, shape `[]`. `states`, where given, holds each layer's state after the batch before
    /// (empty: none) and leaves with those after this one; rows that are not [continued](Self::continued) start from
    /// zeros, and so do padded ones, whose first document is padding. No gradient flows into `states`.
    pub fn loss<B: Backend>(
        &self,
        tape: &mut Tape<'_, B>,
        model: &Mamba2ForCausalLM<B>,
        mut states: Option<&mut Vec<State<B::Tensor>>>,
        checkpointing: Checkpointing,
    ) -> B::Tensor {
        let backend = tape.backend();
        let device = |values: &[i32]| backend.tensor_i32(values, &[self.size, self.length]);
        let (ids, labels) = (device(&self.ids), device(&self.labels));
        let documents = self.documents.as_deref().map(device);
        if let Some(states) = states.as_deref_mut() {
            forget(backend, states, &self.continued);
        }
        model.loss(tape, &ids, &labels, documents.as_ref(), states, checkpointing)
    }
}

/// Zeroes the states of the rows that are not `kept`. Where some are and some are not, the states pass through the
/// host: a rare copy that is small beside a step, and no op that every backend would need.
fn forget<B: Backend>(backend: &B, states: &mut Vec<State<B::Tensor>>, kept: &[bool]) {
    if !kept.contains(&true) {
        states.clear();
    }
    if !kept.contains(&false) {
        return;
    }
    let zeroed = |tensor: &B::Tensor| {
        let (mut values, shape) = (backend.values(tensor), backend.shape(tensor));
        assert_eq!(shape[0], kept.len(), "states belong to a batch of the same size");
        // The conv state holds nothing where K = 1.
        let rows = values.chunks_exact_mut(shape[1..].iter().product::<usize>().max(1));
        rows.zip(kept).filter(|(_, kept)| !**kept).for_each(|(row, _)| row.fill(0.0));
        backend.tensor(&values, &shape, backend.dtype(tensor))
    };
    for state in states {
        *state = State { conv: zeroed(&state.conv), ssm: zeroed(&state.ssm) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(ids: &[i32], documents: Option<&[i32]>) -> Sample {
        Sample { input_ids: ids.to_vec(), labels: ids.to_vec(), documents: documents.map(<[i32]>::to_vec) }
    }

    const NONE: i32 = IGNORE_LABEL;

    /// T4: the first token of a document is nobody's label.
    #[test]
    fn t4_labels_stop_at_document_boundaries() {
        let batch = Batch::new(&[sample(&[1, 2, 3, 4], Some(&[7, 7, 8, 8])), sample(&[5, 6, 7, 8], None)]);
        assert_eq!(batch.labels, [2, NONE, 4, NONE, 6, 7, 8, NONE]);
        assert_eq!(batch.documents, Some(vec![7, 7, 8, 8, 0, 0, 0, 0]));
        assert_eq!(batch.valid(), 5);
    }

    /// T5: padding has no labels and is another document than what it stands before.
    #[test]
    fn t5_shorter_samples_are_padded_on_the_left() {
        let batch = Batch::new(&[sample(&[1, 2, 3], None), sample(&[4], None)]);
        assert_eq!((batch.size, batch.length), (2, 3));
        assert_eq!(batch.ids, [1, 2, 3, 0, 0, 4]);
        assert_eq!(batch.labels, [2, 3, NONE, NONE, NONE, NONE]);
        assert_eq!(batch.documents, Some(vec![0, 0, 0, -1, -1, 0]));
    }

    #[test]
    fn one_document_needs_no_boundaries() {
        assert_eq!(Batch::new(&[sample(&[1, 2], None)]).documents, None);
    }
}
