//! NVRTC: the compiler that makes a GPU's machine code of the kernels' text. It needs no GPU.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::hash::{DefaultHasher, Hash, Hasher as _};
use std::path::{Path, PathBuf};

use libloading::os::unix::Library;

use crate::error::reason;
use crate::{Error, Result};

const KERNELS: &str = concat!(
    include_str!("../cpp/device.h"),
    include_str!("../cpp/ptx.h"),
    include_str!("../cpp/kernels.h"),
    include_str!("../cpp/few_keys.h"),
    include_str!("../cpp/pixels.h")
);

/// Names a folder in which compiled kernels are kept.
const CACHE: &str = "ELLA_KERNEL_CACHE";

/// How kernels are compiled, besides the architecture. They are optimised beside each other, on as many threads as there are processors.
const OPTIONS: [&CStr; 2] = [c"--std=c++17", c"--split-compile=0"];

/// `nvrtcProgram`.
type Program = *mut c_void;

/// The functions of `nvrtc.h` 13.
#[derive(Debug)]
struct Nvrtc {
    version: unsafe extern "C" fn(*mut c_int, *mut c_int) -> c_int,
    create: unsafe extern "C" fn(*mut Program, *const c_char, *const c_char, c_int, *const *const c_char, *const *const c_char) -> c_int,
    compile: unsafe extern "C" fn(Program, c_int, *const *const c_char) -> c_int,
    log_size: unsafe extern "C" fn(Program, *mut usize) -> c_int,
    log: unsafe extern "C" fn(Program, *mut c_char) -> c_int,
    cubin_size: unsafe extern "C" fn(Program, *mut usize) -> c_int,
    cubin: unsafe extern "C" fn(Program, *mut c_char) -> c_int,
    destroy: unsafe extern "C" fn(*mut Program) -> c_int,
    error: unsafe extern "C" fn(c_int) -> *const c_char,
}

/// Where NVRTC may lie beside a libtorch: in its own wheel, or in a folder with everything.
pub(crate) fn folders(libtorch: &Path) -> [PathBuf; 2] {
    [libtorch.join("../../nvidia/cu13/lib"), libtorch.to_owned()]
}

/// Machine code of all kernels for GPUs of a compute capability, as (9, 0); from the folder that `ELLA_KERNEL_CACHE` names, if it is there.
///
/// # Errors
/// NVRTC is nowhere, or does not take the kernels.
pub(crate) fn compile(folders: &[PathBuf], (major, minor): (c_int, c_int)) -> Result<Vec<u8>> {
    let nvrtc = Nvrtc::open(folders)?;
    // Hopper's products of a group of warps are of that architecture alone, and so named.
    let architecture = format!("sm_{major}{minor}{}", if major == 9 { "a" } else { "" });
    match std::env::var_os(CACHE) {
        Some(folder) => {
            let key = hash((KERNELS, &architecture, nvrtc.version()?, OPTIONS));
            kept(&Path::new(&folder).join(format!("{architecture}-{key:016x}")), || nvrtc.kernels(&architecture))
        }
        None => nvrtc.kernels(&architecture),
    }
}

fn hash(of: impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    of.hash(&mut hasher);
    hasher.finish()
}

/// What `file` has kept, or what `make` makes, which is kept then, if the folder can be written. Its hash stands before it: what is damaged is made anew.
fn kept(file: &Path, make: impl FnOnce() -> Result<Vec<u8>>) -> Result<Vec<u8>> {
    if let Ok(bytes) = std::fs::read(file)
        && let Some((first, image)) = bytes.split_first_chunk::<8>()
        && *first == hash(image).to_le_bytes()
    {
        return Ok(image.to_vec());
    }
    let image = make()?;
    let part = file.with_extension(std::process::id().to_string());
    let bytes = [&hash(&image[..]).to_le_bytes()[..], &image].concat();
    let written = file.parent().map_or(Ok(()), std::fs::create_dir_all).and_then(|()| std::fs::write(&part, bytes));
    if written.and_then(|()| std::fs::rename(&part, file)).is_err() {
        let _ = std::fs::remove_file(&part);
    }
    Ok(image)
}

impl Nvrtc {
    fn open(folders: &[PathBuf]) -> Result<Self> {
        let here = folders.iter().find(|folder| folder.join("libnvrtc.so.13").exists());
        if let Some(builtins) = here.and_then(|folder| builtins(folder)) {
            // NVRTC asks the loader for this by name alone, which finds it if it is there already.
            std::mem::forget(load(&builtins)?);
        }
        let library =
            std::mem::ManuallyDrop::new(load(&here.map_or_else(|| "libnvrtc.so.13".into(), |folder| folder.join("libnvrtc.so.13")))?);
        macro_rules! find {
            ($name:literal) => {{
                // SAFETY: the type is that of `nvrtc.h`; the library is never unloaded.
                let found = unsafe { library.get($name) };
                *found.map_err(|error| Error(format!("NVRTC lacks a function: {error}")))?
            }};
        }
        Ok(Self {
            version: find!(b"nvrtcVersion"),
            create: find!(b"nvrtcCreateProgram"),
            compile: find!(b"nvrtcCompileProgram"),
            log_size: find!(b"nvrtcGetProgramLogSize"),
            log: find!(b"nvrtcGetProgramLog"),
            cubin_size: find!(b"nvrtcGetCUBINSize"),
            cubin: find!(b"nvrtcGetCUBIN"),
            destroy: find!(b"nvrtcDestroyProgram"),
            error: find!(b"nvrtcGetErrorString"),
        })
    }

    /// As (13, 0).
    fn version(&self) -> Result<(c_int, c_int)> {
        let (mut major, mut minor) = (0, 0);
        // SAFETY: the pointers are to live integers, which the call fills.
        self.check("the kernels' compiler", unsafe { (self.version)(&raw mut major, &raw mut minor) })?;
        Ok((major, minor))
    }

    fn kernels(&self, architecture: &str) -> Result<Vec<u8>> {
        let text = CString::new(KERNELS).map_err(|_| Error("the kernels' text has a zero in it".into()))?;
        let mut program: Program = std::ptr::null_mut();
        // SAFETY: the text ends in a zero and is copied; there are no headers; the pointer is to a live pointer, which the call fills.
        let code = unsafe { (self.create)(&raw mut program, text.as_ptr(), c"kernels.h".as_ptr(), 0, std::ptr::null(), std::ptr::null()) };
        self.check("the kernels", code)?;
        let image = self.image(program, architecture);
        // SAFETY: the program is alive, and this is its last use.
        unsafe { (self.destroy)(&raw mut program) };
        image
    }

    fn image(&self, program: Program, architecture: &str) -> Result<Vec<u8>> {
        let target = CString::new(format!("--gpu-architecture={architecture}")).map_err(|error| Error(error.to_string()))?;
        let options: Vec<_> = std::iter::once(&*target).chain(OPTIONS).map(CStr::as_ptr).collect();
        // SAFETY: the program is alive, and the options are strings that end in a zero, as many as are said.
        let code = unsafe { (self.compile)(program, options.len() as c_int, options.as_ptr()) };
        if code != 0 {
            let log = self.bytes(program, self.log_size, self.log)?;
            let log = String::from_utf8_lossy(&log);
            self.check(&format!("the kernels for {architecture}: {}", log.trim_end_matches(['\0', '\n'])), code)?;
        }
        self.bytes(program, self.cubin_size, self.cubin)
    }

    fn bytes(
        &self,
        program: Program,
        size: unsafe extern "C" fn(Program, *mut usize) -> c_int,
        fill: unsafe extern "C" fn(Program, *mut c_char) -> c_int,
    ) -> Result<Vec<u8>> {
        let mut length = 0;
        // SAFETY: the program is alive; the pointer is to a live number, which the call fills.
        self.check("the kernels", unsafe { size(program, &raw mut length) })?;
        let mut bytes = vec![0_u8; length];
        // SAFETY: the program is alive; the call fills as many bytes as it said.
        self.check("the kernels", unsafe { fill(program, bytes.as_mut_ptr().cast()) })?;
        Ok(bytes)
    }

    fn check(&self, what: &str, code: c_int) -> Result<()> {
        if code == 0 {
            return Ok(());
        }
        // SAFETY: takes any code and returns a constant string.
        let error = unsafe { CStr::from_ptr((self.error)(code)) };
        Err(Error(format!("{what}: {}", error.to_string_lossy())))
    }
}

/// The file that NVRTC has its own headers in.
fn builtins(folder: &Path) -> Option<PathBuf> {
    let files = std::fs::read_dir(folder).ok()?.filter_map(|entry| Some(entry.ok()?.path()));
    files.into_iter().find(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("libnvrtc-builtins.so")))
}

fn load(path: &Path) -> Result<Library> {
    // SAFETY: NVRTC is made to be opened this way, and its initialisers ask nothing of the program.
    let library = unsafe { Library::open(Some(path), libc::RTLD_NOW | libc::RTLD_GLOBAL) };
    library.map_err(|error| Error(format!("the kernels' compiler: {}", reason(&error))))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The GPU's half of the kernels, compiled as on a GPU machine: for the oldest and the newest GPUs that libtorch 2.11's wheel serves, and for the first of
    /// each kind that the text tells apart.
    #[test]
    fn the_kernels_compile_for_every_kind_of_gpu() {
        let folders = folders(Path::new(env!("LIBTORCH_LIB")));
        if Nvrtc::open(&folders).is_err() {
            println!("skipped: there is no NVRTC beside libtorch");
            return;
        }
        for capability in [(7, 5), (8, 0), (9, 0), (12, 0)] {
            let image = compile(&folders, capability).unwrap();
            assert!(image.starts_with(b"\x7fELF"));
            let has = |name: &str| image.windows(name.len()).any(|window| window == name.as_bytes());
            for name in ["norm_sums_f32", "norm_back_apply_bf16", "geglu_back_f16", "add_biased_bf16", "adamw_f32", "norm_back_means_f32"] {
                assert!(has(name), "{capability:?} lacks {name}");
            }
            for name in ["attention_few_keys_40_bf16", "attention_few_keys_back_160_f16"] {
                assert_eq!(has(name), capability >= (8, 0), "{capability:?}: {name}");
            }
            for name in ["attention_pixels_40_bf16", "attention_pixels_back_keys_80_f16"] {
                assert_eq!(has(name), capability == (9, 0), "{capability:?}: {name}");
            }
        }
        let error = compile(&folders, (1, 0)).unwrap_err().to_string();
        assert!(error.contains("sm_10"), "{error}");
    }

    #[test]
    fn what_was_compiled_is_kept_and_what_is_damaged_is_made_anew() {
        let folder = std::env::temp_dir().join(format!("ella-kernels-{}", std::process::id()));
        let file = folder.join("below/sm_90a-0");
        let made = |code: &'static [u8]| kept(&file, || Ok(code.to_vec())).unwrap();
        assert_eq!((made(b"first"), made(b"second")), (b"first".to_vec(), b"first".to_vec()));
        let whole = std::fs::read(&file).unwrap();
        for damaged in [whole[1..].to_vec(), whole[..3].to_vec(), [&whole[..], &b"x"[..]].concat(), Vec::new()] {
            std::fs::write(&file, damaged).unwrap();
            assert_eq!((made(b"second"), made(b"third")), (b"second".to_vec(), b"second".to_vec()));
        }
        assert_eq!(std::fs::read_dir(file.parent().unwrap()).unwrap().count(), 1);
        // Nothing is kept of what fails, and a folder that cannot be made stops nobody.
        let below = file.join("file/sm_90a-0");
        assert!(kept(&below, || Err(Error("no".into()))).is_err());
        assert_eq!(kept(&below, || Ok(b"x".to_vec())).unwrap(), b"x");
        std::fs::remove_dir_all(folder).unwrap();
        assert_ne!(hash((KERNELS, "sm_90a", (13, 0), OPTIONS)), hash((KERNELS, "sm_90a", (13, 1), OPTIONS)));
    }

    #[test]
    fn a_compiler_that_is_not_there_is_named() {
        let error = load(Path::new("/nowhere/libnvrtc.so.13")).unwrap_err().to_string();
        assert!(error.starts_with("the kernels' compiler: /nowhere/libnvrtc.so.13"), "{error}");
    }
}
