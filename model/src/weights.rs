//! Weight files: safetensors, single or sharded, read through a memory map and written whole.
//!
//! Owns names, shapes, number formats and fingerprints of stored tensors; which tensors a network wants is `params`' matter.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use memmap2::Mmap;
use safetensors::{Dtype, SafeTensorError, SafeTensors, View};
use tch::{Device, Kind, Tensor};

use crate::error::{ModelError, Result};

/// File names under which diffusers and transformers keep a model's weights, in the order of preference.
const NAMES: [&str; 4] =
    ["diffusion_pytorch_model.safetensors", "model.safetensors", "diffusion_pytorch_model.fp16.safetensors", "model.fp16.safetensors"];

/// The tensors of one model, memory-mapped. Clones share the maps.
#[derive(Clone, Debug)]
pub struct Weights {
    path: PathBuf,
    files: Vec<Arc<Mapped>>,
    entries: BTreeMap<String, Entry>,
    metadata: HashMap<String, String>,
}

#[derive(Debug)]
struct Mapped {
    file: PathBuf,
    map: Mmap,
}

#[derive(Clone, Debug)]
struct Entry {
    file: usize,
    dtype: Dtype,
    shape: Vec<i64>,
    bytes: Range<usize>,
}

impl Weights {
    /// Opens a `.safetensors` file, a sharded `.safetensors.index.json`, or the model folder that holds either.
    ///
    /// # Errors
    /// A missing, truncated or garbled file, a pickle, or an index that names tensors its shards do not hold.
    pub fn open(path: &Path) -> Result<Self> {
        let file = if path.is_dir() { find_in_folder(path)? } else { path.to_owned() };
        let name = file.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        if name.ends_with(".index.json") {
            return Self::open_index(path, &file);
        }
        refuse_pickle_name(&file)?;
        let mut weights = Weights { path: path.into(), files: Vec::new(), entries: BTreeMap::new(), metadata: HashMap::new() };
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
        let mut weights = Weights { path: path.into(), files: Vec::new(), entries: BTreeMap::new(), metadata: HashMap::new() };
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

    /// Maps one file and takes over its entries.
    fn add(&mut self, file: &Path) -> Result<()> {
        let map = map_file(file)?;
        let (header, metadata) = SafeTensors::read_metadata(&map).map_err(|error| broken(file, &map, error))?;
        let start = header + 8; // the header's own length is an u64 in front of it
        for (key, info) in metadata.tensors() {
            let entry = Entry {
                file: self.files.len(),
                dtype: info.dtype,
                shape: info.shape.iter().map(|&dim| dim as i64).collect(),
                bytes: start + info.data_offsets.0..start + info.data_offsets.1,
            };
            if self.entries.insert(key.clone(), entry).is_some() {
                let reason = format!("holds tensor {key}, which another shard holds too");
                return Err(ModelError::NotSafetensors { file: file.into(), reason });
            }
        }
        self.metadata.extend(metadata.metadata().clone().unwrap_or_default());
        self.files.push(Arc::new(Mapped { file: file.into(), map }));
        Ok(())
    }

    /// The path that was opened; what errors about the whole model name.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What a writer said about the file, in its header.
    pub fn metadata(&self, name: &str) -> Option<&str> {
        self.metadata.get(name).map(String::as_str)
    }

    /// All tensor names, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    /// A tensor's shape, if the tensor is there.
    pub fn shape(&self, name: &str) -> Option<&[i64]> {
        self.entries.get(name).map(|entry| entry.shape.as_slice())
    }

    /// A tensor's shape and stored kind.
    ///
    /// # Errors
    /// The tensor is missing, or stored in a format that libtorch has no plain kind for.
    pub fn describe(&self, name: &str) -> Result<(&[i64], Kind)> {
        let entry = self.entry(name)?;
        let kind = kind_of(entry.dtype).ok_or_else(|| self.wrong_dtype(name, entry, "a plain float or integer type"))?;
        Ok((&entry.shape, kind))
    }

    /// A copy of a tensor as `kind` on `device`. Floats convert to floats of any width, integers to integers.
    ///
    /// # Errors
    /// The tensor is missing, or has another shape, or cannot stand for `kind`.
    pub fn load(&self, name: &str, shape: &[i64], kind: Kind, device: Device) -> Result<Tensor> {
        let entry = self.entry(name)?;
        if entry.shape != shape {
            return Err(ModelError::WrongShape {
                file: self.file_of(entry),
                key: name.into(),
                expected: shape.into(),
                found: entry.shape.clone(),
            });
        }
        let stored = match kind_of(entry.dtype) {
            Some(stored) if family(stored) == family(kind) => stored,
            _ => return Err(self.wrong_dtype(name, entry, family(kind))),
        };
        let bytes = &self.files[entry.file].map[entry.bytes.clone()];
        let tensor = Tensor::f_from_data_size(bytes, shape, stored)?;
        Ok(tensor.f_to_device(device)?.f_to_kind(kind)?)
    }

    /// BLAKE3 over the bytes of all files, in the order of their names, as lower-case hex; for one file the file's own digest.
    pub fn digest(&self) -> String {
        let mut hasher = blake3::Hasher::new();
        for mapped in &self.files {
            hasher.update(&mapped.map);
        }
        hasher.finalize().to_hex().to_string()
    }

    /// Refuses tensors that are neither in `used` nor match one of `harmless`, where one `*` stands for any text.
    pub fn expect_only(&self, used: &BTreeSet<String>, harmless: &[&str]) -> Result<()> {
        let surplus = |name: &&String| !used.contains(*name) && !harmless.iter().any(|pattern| matches(pattern, name));
        let keys: Vec<String> = self.entries.keys().filter(surplus).cloned().collect();
        if keys.is_empty() { Ok(()) } else { Err(ModelError::SurplusTensors { file: self.path.clone(), keys }) }
    }

    fn entry(&self, name: &str) -> Result<&Entry> {
        self.entries.get(name).ok_or_else(|| ModelError::MissingTensor { file: self.path.clone(), key: name.into() })
    }

    fn file_of(&self, entry: &Entry) -> PathBuf {
        self.files[entry.file].file.clone()
    }

    fn wrong_dtype(&self, name: &str, entry: &Entry, expected: &str) -> ModelError {
        ModelError::WrongDtype {
            file: self.file_of(entry),
            key: name.into(),
            expected: expected.into(),
            found: format!("{:?}", entry.dtype),
        }
    }
}

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

fn find_in_folder(folder: &Path) -> Result<PathBuf> {
    let indices = NAMES.map(|name| format!("{name}.index.json"));
    let mut names = NAMES.iter().copied().chain(indices.iter().map(String::as_str));
    if let Some(name) = names.find(|name| folder.join(name).is_file()) {
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

fn map_file(path: &Path) -> Result<Mmap> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return Err(ModelError::MissingFile { file: path.into(), expected: "a safetensors file".into() });
        }
        Err(source) => return Err(ModelError::Unreadable { file: path.into(), source }),
    };
    // SAFETY: the map is read-only and private to this process. Model files are written whole and renamed into
    // place, never changed under a reader; ella itself keeps to that in `save`.
    let map = unsafe { Mmap::map(&file) }.map_err(|source| ModelError::Unreadable { file: path.into(), source })?;
    // A zip archive or a bare pickle under a wrong name: torch.save's two formats.
    if map.starts_with(b"PK\x03\x04") || map.starts_with(b"\x80\x02") {
        return Err(ModelError::Pickle { file: path.into() });
    }
    Ok(map)
}

fn broken(file: &Path, map: &Mmap, error: SafeTensorError) -> ModelError {
    let cut = |rule| ModelError::Truncated { file: file.into(), rule, found: map.len() as u64 };
    match error {
        SafeTensorError::HeaderTooSmall => cut("expected at least the 8 bytes of the header's length"),
        SafeTensorError::InvalidHeaderLength => cut("expected the length that its first 8 bytes give for the header"),
        SafeTensorError::MetadataIncompleteBuffer => cut("expected the length that its header gives for the tensors"),
        other => ModelError::NotSafetensors { file: file.into(), reason: other.to_string() },
    }
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
fn matches(pattern: &str, name: &str) -> bool {
    match pattern.split_once('*') {
        None => pattern == name,
        Some((head, tail)) => name.len() >= head.len() + tail.len() && name.starts_with(head) && name.ends_with(tail),
    }
}
