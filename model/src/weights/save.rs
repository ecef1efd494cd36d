//! Writing weight files: whole, or not at all.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::Path;

use safetensors::{Dtype, SafeTensorError, View};
use tch::{Device, Tensor};

use super::DTYPES;
use crate::error::{ModelError, Result};

/// Writes tensors as a safetensors file that diffusers and transformers read. The file appears whole, or not at all.
///
/// # Errors
/// The file cannot be written, a tensor's kind has no safetensors form, or a name occurs twice.
pub fn save(path: &Path, tensors: &[(String, Tensor)]) -> Result<()> {
    let stored = stored(path, tensors)?;
    let views = tensors.iter().map(|(name, _)| name.as_str()).zip(&stored);
    safetensors::serialize_to_file(views, format_metadata(), path).map_err(|error| match error {
        SafeTensorError::IoError(source) => ModelError::Unwritable { file: path.into(), source },
        other => ModelError::NotSafetensors { file: path.into(), reason: other.to_string() },
    })?;
    readable_by_all(path)
}

/// The bytes that [`save`] would write, for stores that are not files; `label` is what errors name.
///
/// # Errors
/// A tensor's kind has no safetensors form, or a name occurs twice.
pub fn encode(label: &Path, tensors: &[(String, Tensor)]) -> Result<Vec<u8>> {
    let stored = stored(label, tensors)?;
    let views = tensors.iter().map(|(name, _)| name.as_str()).zip(&stored);
    safetensors::serialize(views, format_metadata())
        .map_err(|error| ModelError::NotSafetensors { file: label.into(), reason: error.to_string() })
}

/// The same with further fields of metadata. The bytes depend on nothing else: safetensors itself writes several fields in an order of chance.
///
/// # Errors
/// Those of [`encode`].
pub fn encode_telling(label: &Path, tensors: &[(String, Tensor)], fields: &BTreeMap<String, String>) -> Result<Vec<u8>> {
    let mut bytes = encode(label, tensors)?;
    let wrong = |reason: &str| ModelError::NotSafetensors { file: label.into(), reason: reason.into() };
    let (length, rest) = bytes.split_first_chunk::<8>().ok_or_else(|| wrong("has no header"))?;
    let length = u64::from_le_bytes(*length) as usize;
    let tensors = rest.get(..length).and_then(|header| header.strip_prefix(br#"{"__metadata__":{"format":"pt"}"#));
    let tensors = tensors.ok_or_else(|| wrong("has a header that begins otherwise than with its format"))?;
    let fields: BTreeMap<&str, &str> =
        fields.iter().map(|(name, value)| (name.as_str(), value.as_str())).chain([("format", "pt")]).collect();
    let mut header = [format!("{{\"__metadata__\":{}", serde_json::json!(fields)).as_bytes(), tensors.trim_ascii_end()].concat();
    header.resize(header.len().next_multiple_of(8), b' ');
    bytes.splice(..8 + length, (header.len() as u64).to_le_bytes().into_iter().chain(header));
    Ok(bytes)
}

/// A tensor in CPU memory, as safetensors sees it.
struct Stored {
    dtype: Dtype,
    shape: Vec<usize>,
    tensor: Tensor,
}

impl View for &Stored {
    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        // SAFETY: `stored` made the tensor contiguous, in CPU memory and of a plain kind, so its numel * element size
        // bytes lie from its data pointer on; it is borrowed for as long as the slice lives and nobody writes to it.
        let bytes = unsafe { std::slice::from_raw_parts(pointer(&self.tensor), self.data_len()) };
        Cow::Borrowed(bytes)
    }

    fn data_len(&self) -> usize {
        self.tensor.numel() * self.tensor.kind().elt_size_in_bytes()
    }
}

/// The tensor's first byte; dangling but aligned where it has none, as slices want it.
fn pointer(tensor: &Tensor) -> *const u8 {
    match tensor.data_ptr() as *const u8 {
        pointer if pointer.is_null() => std::ptr::NonNull::dangling().as_ptr(),
        pointer => pointer,
    }
}

fn stored(path: &Path, tensors: &[(String, Tensor)]) -> Result<Vec<Stored>> {
    let mut seen = BTreeSet::new();
    let one = |(name, tensor): &(String, Tensor)| {
        let refuse = |reason: String| ModelError::NotSafetensors { file: path.into(), reason };
        if !seen.insert(name.clone()) {
            return Err(refuse(format!("would hold tensor {name} twice")));
        }
        let kind = tensor.f_kind()?;
        let dtype = DTYPES.iter().find(|(_, known)| *known == kind).map(|(dtype, _)| *dtype);
        Ok(Stored {
            dtype: dtype.ok_or_else(|| refuse(format!("cannot hold {name} of kind {kind:?}")))?,
            shape: tensor.size().iter().map(|&dim| dim as usize).collect(),
            tensor: tensor.f_detach()?.f_to_device(Device::Cpu)?.f_contiguous()?,
        })
    };
    tensors.iter().map(one).collect()
}

/// transformers refuses files that do not say which framework's tensors they hold.
fn format_metadata() -> Option<HashMap<String, String>> {
    Some(HashMap::from([("format".to_owned(), "pt".to_owned())]))
}

/// The writer's temporary file is private to its owner; a model is for everyone who may enter the folder.
fn readable_by_all(path: &Path) -> Result<()> {
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o644))
            .map_err(|source| ModelError::Unwritable { file: path.into(), source })?;
    }
    Ok(())
}
