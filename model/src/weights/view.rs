//! Stored tensors seen otherwise than they are stored: under other names, in parts, in other shapes. Nothing is copied, and errors go
//! on naming the file's own keys.

use super::{Entry, Weights};
use crate::error::{ModelError, Result};

impl Weights {
    /// The tensors to which `rename` gives a name, under that name.
    ///
    /// # Errors
    /// Two tensors get the same name.
    pub fn renamed(&self, rename: impl Fn(&str) -> Option<String>) -> Result<Self> {
        let mut view = Weights { entries: Default::default(), ..self.clone() };
        for (old, entry) in &self.entries {
            let Some(name) = rename(old) else { continue };
            if let Some(other) = view.entries.insert(name, entry.clone()) {
                let reason = format!("holds one tensor under two names, {} and {}", other.key, entry.key);
                return Err(ModelError::NotSafetensors { file: self.path.clone(), reason });
            }
        }
        Ok(view)
    }

    /// The same tensors without values: networks are built from the headers alone, and hold zeros that take no memory.
    pub fn without_values(self) -> Self {
        Weights { blank: true, ..self }
    }

    /// Puts as many equal parts of a tensor, cut along its first axis, in its place as there are `names`.
    ///
    /// # Errors
    /// The tensor is missing, or cannot be cut so.
    pub(crate) fn split(&mut self, name: &str, names: &[String]) -> Result<()> {
        let whole = self.entry(name)?.clone();
        let parts = names.len().max(1);
        let rows = whole.shape.first().copied().unwrap_or(0);
        if rows == 0 || rows % parts as i64 != 0 || whole.transposed {
            let even = (rows - rows % parts as i64).max(parts as i64);
            let expected = std::iter::once(even).chain(whole.shape.iter().skip(1).copied()).collect();
            return Err(self.wrong_shape(&whole, expected));
        }
        let rows = rows / parts as i64;
        self.entries.remove(name);
        let bytes = whole.bytes.len() / parts;
        for (part, name) in names.iter().enumerate() {
            let start = whole.bytes.start + part * bytes;
            let mut entry = Entry { bytes: start..start + bytes, ..whole.clone() };
            entry.shape.iter_mut().take(1).for_each(|first| *first = rows);
            self.entries.insert(name.clone(), entry);
        }
        Ok(())
    }

    /// Swaps a matrix's axes.
    ///
    /// # Errors
    /// The tensor is missing, or no matrix.
    pub(crate) fn transpose(&mut self, name: &str) -> Result<()> {
        let entry = self.entry(name)?;
        if entry.shape.len() != 2 {
            return Err(self.wrong_shape(entry, vec![-1, -1]));
        }
        if let Some(entry) = self.entries.get_mut(name) {
            entry.shape.reverse();
            entry.transposed = !entry.transposed;
        }
        Ok(())
    }

    /// Drops trailing axes of length 1 after the second, if the tensor is there: a 1×1 convolution is seen as a matrix.
    pub(crate) fn flatten(&mut self, name: &str) {
        if let Some(entry) = self.entries.get_mut(name) {
            while entry.shape.len() > 2 && entry.shape.last() == Some(&1) {
                entry.shape.pop();
            }
        }
    }
}
