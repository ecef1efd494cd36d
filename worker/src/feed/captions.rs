//! Which of a sample's captions is trained on: columns of the data set, its own or added ones, and the choice among them (NOISE).

use super::FeedError;
use crate::noise::SampleNoise;
use ella_dataset::order::SampleRef;
use ella_dataset::{AddedCaptions, DataSet, RowRef};
use ella_proto::config::CaptionChoice;
use ella_store::Hasher;

/// One column of captions.
#[derive(Debug)]
struct Column {
    name: String,
    weight: f64,
    /// Its place among the data set's own; none: an added one.
    place: Option<usize>,
    added: Option<AddedCaptions>,
}

/// The columns that are trained on.
#[derive(Debug)]
pub struct Captions {
    columns: Vec<Column>,
}

impl Captions {
    /// Opens the columns that a config names, or else the data set's own with its weights.
    pub async fn open(data: &DataSet, choices: &[CaptionChoice]) -> Result<Self, FeedError> {
        let own = data.manifest().captions.iter().map(|column| (column.name.as_str(), column.weight));
        let named = choices.iter().map(|choice| (choice.column.as_str(), choice.weight));
        let wanted: Vec<(&str, f64)> = if choices.is_empty() { own.collect() } else { named.collect() };
        let mut columns = Vec::new();
        for (name, weight) in wanted {
            let place = data.manifest().caption_column(name);
            let added = if place.is_none() { Some(data.added_captions(name).await?) } else { None };
            columns.push(Column { name: name.to_owned(), weight, place, added });
        }
        Ok(Self { columns })
    }

    /// Their names.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.columns.iter().map(|column| column.name.as_str())
    }

    /// What identifies the data set with the columns that were added to it: its manifest's digest, and theirs where any is used.
    pub fn identity(&self, data: &DataSet) -> String {
        let own = data.manifest().digest();
        let added: Vec<_> = self.columns.iter().filter_map(|column| column.added.as_ref()).collect();
        if added.is_empty() {
            return own.to_string();
        }
        let mut hasher = Hasher::new();
        hasher.update(own.as_bytes());
        for captions in added {
            hasher.update(&serde_json::to_vec(captions.manifest()).unwrap_or_default());
        }
        hasher.finish().to_string()
    }

    /// A row's captions, one for each column; empty where it has none. Those of added columns are filled in by [`Captions::fill`].
    pub(super) fn of_row(&self, row: &RowRef<'_>) -> Vec<String> {
        self.columns.iter().map(|column| column.place.and_then(|place| row.caption_in(place)).unwrap_or_default().to_owned()).collect()
    }

    /// Fills in a sample's captions of added columns.
    pub(super) async fn fill(&self, at: SampleRef, captions: &mut [String]) -> Result<(), FeedError> {
        for (column, caption) in self.columns.iter().zip(captions) {
            if let Some(added) = &column.added {
                *caption = added.shard(at.shard as usize).await?.get(at.row as usize).cloned().unwrap_or_default();
            }
        }
        Ok(())
    }

    /// All captions of a shard in one column, in the order of the rows; empty where a sample has none.
    pub(super) async fn of_shard(&self, data: &DataSet, column: usize, shard: usize) -> Result<Vec<String>, FeedError> {
        let column = self.columns.get(column).ok_or(FeedError::NoColumn)?;
        match &column.added {
            Some(added) => Ok(added.shard(shard).await?.to_vec()),
            None => Ok(data.captions(&column.name, shard).await?),
        }
    }

    /// The column whose caption is taken: one that the sample has, by the weights. None: it has none of them.
    pub(super) fn choose(&self, captions: &[String], noise: &SampleNoise) -> Option<usize> {
        let weight = |(column, caption): (&Column, &String)| if caption.is_empty() { 0.0 } else { column.weight };
        let weights: Vec<f64> = self.columns.iter().zip(captions).map(weight).collect();
        (weights.iter().sum::<f64>() > 0.0).then(|| noise.choice(&weights))
    }
}
