//! Weight files: safetensors, single or sharded, read through a memory map and written whole.
//!
//! Owns names, shapes, number formats and fingerprints of stored tensors; which tensors a network wants is `params`' matter.

mod mapped;
mod save;
mod view;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use safetensors::{Dtype, SafeTensors};
use tch::{Device, Kind, Tensor};

use self::mapped::Mapped;
pub use self::save::{encode, encode_telling, save};
use crate::error::{ModelError, Result};

/// File names under which diffusers and transformers keep a model's weights and the indices of its shards, in the order of
/// preference. Variants' names are those of `_add_variant` in diffusers' `utils/hub_utils.py`, which writes the variant before the
/// last dot; earlier releases wrote indices' names the other way.
const NAMES: [&str; 10] = [
    "diffusion_pytorch_model.safetensors",
    "model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    "model.safetensors.index.json",
    "diffusion_pytorch_model.fp16.safetensors",
    "model.fp16.safetensors",
    "diffusion_pytorch_model.safetensors.index.fp16.json",
    "model.safetensors.index.fp16.json",
    "diffusion_pytorch_model.fp16.safetensors.index.json",
    "model.fp16.safetensors.index.json",
];

/// The tensors of one model, memory-mapped: a page of a file is in memory only while it is copied or hashed. Clones share the maps.
#[derive(Clone, Debug)]
pub struct Weights {
    path: PathBuf,
    files: Vec<Arc<Mapped>>,
    entries: BTreeMap<String, Entry>,
    metadata: HashMap<String, String>,
    /// Give zeros that take no memory instead of values.
    blank: bool,
}

/// Where a tensor lies, and as what it is seen.
#[derive(Clone, Debug)]
struct Entry {
    file: usize,
    /// The name that the file knows it by.
    key: String,
    dtype: Dtype,
    shape: Vec<i64>,
    bytes: Range<usize>,
    /// Stored with its two axes in the other order.
    transposed: bool,
}

/// What a file's header says of a tensor.
#[derive(Clone, Copy, Debug)]
pub struct Listed<'a> {
    /// Its name.
    pub name: &'a str,
    /// Its shape.
    pub shape: &'a [i64],
    /// Its number format, as safetensors calls it.
    pub dtype: Dtype,
    /// Its size on disk.
    pub bytes: u64,
}

impl Weights {
    /// Opens a `.safetensors` file, a sharded `.safetensors.index.json`, or the model folder that holds either.
    ///
    /// # Errors
    /// A missing, truncated or garbled file, a pickle, or an index that names tensors its shards do not hold.
    pub fn open(path: &Path) -> Result<Self> {
        let file = if path.is_dir() { find_in_folder(path)? } else { path.to_owned() };
        let name = file.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        if name.contains(".index.") && name.ends_with(".json") {
            return Self::open_index(path, &file);
        }
        refuse_pickle_name(&file)?;
        let mut weights = Self::empty(path);
        weights.add(&file)?;
        Ok(weights)
    }

    fn open_index(path: &Path, index: &Path) -> Result<Self> {
        let bad = |reason: &str| ModelError::NotConfig { file: index.into(), reason: reason.into() };
        let text = std::fs::read_to_string(index).map_err(|source| ModelError::Unreadable { file: index.into(), source })?;
        let json: serde_json::Value = serde_json::from_str(&text).map_err(|error| bad(&format!("is not JSON ({error})")))?;
        let map = json["weight_map"].as_object().ok_or_else(|| bad("has no object weight_map"))?;
        let mut shards = BTreeMap::<&str, Vec<&String>>::new();
        for (key, shard) in map {
            let shard = shard.as_str().filter(|name| !name.contains(['/', '\\']));
            shards.entry(shard.ok_or_else(|| bad("names a shard that is not a plain file name"))?).or_default().push(key);
        }
        let mut weights = Self::empty(path);
        for (shard, keys) in shards {
            let file = index.with_file_name(shard);
            refuse_pickle_name(&file)?;
            weights.add(&file)?;
            if let Some(key) = keys.into_iter().find(|key| !weights.entries.contains_key(*key)) {
                return Err(ModelError::MissingTensor { file, key: key.clone() });
            }
        }
        Ok(weights)
    }

    fn empty(path: &Path) -> Self {
        Weights { path: path.into(), files: Vec::new(), entries: BTreeMap::new(), metadata: HashMap::new(), blank: false }
    }

    /// Maps one file and takes over its entries.
    fn add(&mut self, file: &Path) -> Result<()> {
        let mapped = Mapped::open(file)?;
        let (header, metadata) = SafeTensors::read_metadata(&mapped).map_err(|error| mapped.broken(error))?;
        for (field, value) in metadata.metadata().iter().flatten() {
            self.metadata.entry(field.clone()).or_insert_with(|| value.clone());
        }
        let start = header + 8; // the header's own length is an u64 in front of it
        for (key, info) in metadata.tensors() {
            let entry = Entry {
                file: self.files.len(),
                key: key.clone(),
                transposed: false,
                dtype: info.dtype,
                shape: info.shape.iter().map(|&dim| dim as i64).collect(),
                bytes: start + info.data_offsets.0..start + info.data_offsets.1,
            };
            if self.entries.insert(key.clone(), entry).is_some() {
                let reason = format!("holds tensor {key}, which another shard holds too");
                return Err(ModelError::NotSafetensors { file: file.into(), reason });
            }
        }
        self.files.push(Arc::new(mapped));
        Ok(())
    }

    /// The path that was opened; what errors about the whole model name.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// All tensor names, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    /// A tensor's shape, if the tensor is there.
    pub fn shape(&self, name: &str) -> Option<&[i64]> {
        self.entries.get(name).map(|entry| entry.shape.as_slice())
    }

    /// All tensors as the files' headers list them, sorted by name.
    pub fn listing(&self) -> impl Iterator<Item = Listed<'_>> {
        self.entries.iter().map(|(name, entry)| Listed { name, shape: &entry.shape, dtype: entry.dtype, bytes: entry.bytes.len() as u64 })
    }

    /// What the files say of themselves under `field`; of a field that several shards have, what the first says.
    pub fn metadata(&self, field: &str) -> Option<&str> {
        self.metadata.get(field).map(String::as_str)
    }

    /// The same, read by `parse`; none if they do not say it.
    ///
    /// # Errors
    /// It cannot be read as what is `expected`.
    pub fn told<T>(&self, field: &str, expected: &str, parse: impl FnOnce(&str) -> Option<T>) -> Result<Option<T>> {
        let Some(found) = self.metadata(field) else { return Ok(None) };
        let wrong = || ModelError::FileInput {
            file: self.path.clone(),
            what: format!("`{field}` of its metadata"),
            expected: expected.into(),
            found: found.into(),
        };
        parse(found).map(Some).ok_or_else(wrong)
    }

    /// A tensor's shape and stored kind.
    ///
    /// # Errors
    /// The tensor is missing, or stored in a format that libtorch has no plain kind for.
    pub fn describe(&self, name: &str) -> Result<(&[i64], Kind)> {
        let entry = self.entry(name)?;
        let kind = kind_of(entry.dtype).ok_or_else(|| self.wrong_dtype(entry, "a plain float or integer type"))?;
        Ok((&entry.shape, kind))
    }

    /// A copy of a tensor as `kind` on `device`. Floats convert to floats of any width, integers to integers.
    ///
    /// # Errors
    /// The tensor is missing, or has another shape, or cannot stand for `kind`.
    pub fn load(&self, name: &str, shape: &[i64], kind: Kind, device: Device) -> Result<Tensor> {
        let entry = self.entry(name)?;
        if entry.shape != shape {
            return Err(self.wrong_shape(entry, shape.into()));
        }
        let stored = match kind_of(entry.dtype) {
            Some(stored) if family(stored) == family(kind) => stored,
            _ => return Err(self.wrong_dtype(entry, family(kind))),
        };
        if self.blank {
            // Stride 0 in every dimension: the shape costs no memory.
            return Ok(Tensor::f_zeros([1; 0], (kind, device))?.f_expand(shape, false)?);
        }
        let mapped = &self.files[entry.file];
        let tensor = match (entry.transposed, shape) {
            (true, &[rows, columns]) => copy_of(&mapped[entry.bytes.clone()], (&[columns, rows], stored), (kind, device))?.f_tr()?,
            _ => copy_of(&mapped[entry.bytes.clone()], (shape, stored), (kind, device))?,
        };
        mapped.release(entry.bytes.clone());
        Ok(tensor.f_contiguous()?)
    }

    /// BLAKE3 over the bytes of all files, in the order of their names, as lower-case hex; for one file the file's own digest.
    pub fn digest(&self) -> String {
        let mut hasher = blake3::Hasher::new();
        for mapped in &self.files {
            mapped.each_chunk(|bytes| {
                hasher.update(bytes);
            });
        }
        hasher.finalize().to_hex().to_string()
    }

    /// Refuses tensors that are neither in `used` nor match one of `harmless`, where one `*` stands for any text.
    pub fn expect_only(&self, used: &BTreeSet<String>, harmless: &[&str]) -> Result<()> {
        let surplus = |name: &&String| !used.contains(*name) && !harmless.iter().any(|pattern| matches(pattern, name));
        let keys: Vec<String> = self.entries.keys().filter(surplus).filter_map(|name| Some(self.entries.get(name)?.key.clone())).collect();
        if keys.is_empty() { Ok(()) } else { Err(ModelError::SurplusTensors { file: self.path.clone(), keys }) }
    }

    fn entry(&self, name: &str) -> Result<&Entry> {
        self.entries.get(name).ok_or_else(|| ModelError::MissingTensor { file: self.path.clone(), key: name.into() })
    }

    fn file_of(&self, entry: &Entry) -> PathBuf {
        self.files[entry.file].path().to_owned()
    }

    fn wrong_shape(&self, entry: &Entry, expected: Vec<i64>) -> ModelError {
        ModelError::WrongShape { file: self.file_of(entry), key: entry.key.clone(), expected, found: entry.shape.clone() }
    }

    fn wrong_dtype(&self, entry: &Entry, expected: &str) -> ModelError {
        ModelError::WrongDtype {
            file: self.file_of(entry),
            key: entry.key.clone(),
            expected: expected.into(),
            found: format!("{:?}", entry.dtype),
        }
    }
}

fn find_in_folder(folder: &Path) -> Result<PathBuf> {
    if let Some(name) = NAMES.iter().find(|name| folder.join(name).is_file()) {
        return Ok(folder.join(name));
    }
    let listing = std::fs::read_dir(folder).map_err(|source| ModelError::Unreadable { file: folder.into(), source })?;
    let mut files: Vec<PathBuf> = listing.flatten().map(|entry| entry.path()).collect();
    files.sort();
    for file in &files {
        refuse_pickle_name(file)?;
    }
    Err(ModelError::MissingFile { file: folder.into(), expected: format!("{}, {}, or an index of shards", NAMES[0], NAMES[1]) })
}

fn refuse_pickle_name(file: &Path) -> Result<()> {
    let extension = file.extension().and_then(|extension| extension.to_str()).unwrap_or_default();
    match extension {
        "bin" | "ckpt" | "pt" | "pth" | "pkl" => Err(ModelError::Pickle { file: file.into() }),
        _ => Ok(()),
    }
}

/// The tensor of a shape and kind that lies in `bytes`, as another kind elsewhere. Nothing lies in memory between the two: what is
/// allocated only to be freed would leave holes between the tensors that stay, in all as large as a second copy.
fn copy_of(bytes: &[u8], (shape, stored): (&[i64], Kind), (kind, device): (Kind, Device)) -> Result<Tensor> {
    let aligned = (bytes.as_ptr() as usize).is_multiple_of(stored.elt_size_in_bytes());
    let numel: i64 = shape.iter().product();
    if !aligned || numel as usize * stored.elt_size_in_bytes() != bytes.len() {
        return Ok(Tensor::f_from_data_size(bytes, shape, stored)?.f_to_device(device)?.f_to_kind(kind)?);
    }
    let strides: Vec<i64> = (0..shape.len()).map(|axis| shape[axis + 1..].iter().product()).collect();
    // SAFETY: `bytes` hold all elements, aligned, and outlive the view, which is only read and is dropped in this function; what is
    // given back shares no memory with it.
    let view = unsafe { Tensor::f_from_blob(bytes.as_ptr(), shape, &strides, stored, Device::Cpu)? };
    let mut copy = Tensor::f_empty(shape, (kind, device))?;
    tch::no_grad(|| copy.f_copy_(&view))?;
    Ok(copy)
}

/// The formats in which a stored tensor and libtorch's kinds agree byte for byte.
const DTYPES: [(Dtype, Kind); 10] = [
    (Dtype::F32, Kind::Float),
    (Dtype::F16, Kind::Half),
    (Dtype::BF16, Kind::BFloat16),
    (Dtype::F64, Kind::Double),
    (Dtype::I64, Kind::Int64),
    (Dtype::I32, Kind::Int),
    (Dtype::I16, Kind::Int16),
    (Dtype::I8, Kind::Int8),
    (Dtype::U8, Kind::Uint8),
    (Dtype::BOOL, Kind::Bool),
];

fn kind_of(dtype: Dtype) -> Option<Kind> {
    DTYPES.iter().find(|(stored, _)| *stored == dtype).map(|(_, kind)| *kind)
}

/// Kinds of one family convert into one another without changing their meaning.
fn family(kind: Kind) -> &'static str {
    match kind {
        Kind::Float | Kind::Half | Kind::BFloat16 | Kind::Double => "a float type",
        Kind::Bool => "bool",
        _ => "an integer type",
    }
}

/// Whether `name` matches `pattern`, in which one `*` stands for any text.
pub(crate) fn matches(pattern: &str, name: &str) -> bool {
    match pattern.split_once('*') {
        None => pattern == name,
        Some((head, tail)) => name.len() >= head.len() + tail.len() && name.starts_with(head) && name.ends_with(tail),
    }
}
