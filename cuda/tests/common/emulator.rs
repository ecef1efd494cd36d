//! The emulator of a GPU's threads (`cpp/emulated.h`): compiled when it is first asked for, and loaded.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use libloading::os::unix::Library;

type Thread = unsafe extern "C" fn(*mut c_void);
type Run = unsafe extern "C" fn(c_int, c_int, c_int, c_int, Thread, *mut c_void);

/// `EllaEmulator` of `cpp/ops.h`.
#[repr(C)]
struct Emulator {
    find: unsafe extern "C" fn(*const c_char) -> *mut c_void,
    run: Run,
}

unsafe extern "C" {
    fn ella_use_emulator(emulator: *const Emulator);
}

static LIBRARY: OnceLock<Library> = OnceLock::new();

/// From here on, this process's operators on the processor take the GPU's half of the kernels, but for those that a GPU has not.
pub(crate) fn install() {
    static EMULATOR: OnceLock<Emulator> = OnceLock::new();
    EMULATOR.get_or_init(|| {
        let library = LIBRARY.get_or_init(|| open(&compiled()));
        // SAFETY: the type is that of `ella_emulate` in cpp/emulated.cpp; the library is never unloaded.
        let run = unsafe { *library.get::<Run>(b"ella_emulate").unwrap() };
        Emulator { find, run }
    });
    // SAFETY: the table is of this process for good.
    unsafe { ella_use_emulator(EMULATOR.get().unwrap()) };
}

unsafe extern "C" fn find(name: *const c_char) -> *mut c_void {
    // SAFETY: `launch` in cpp/ops.cpp passes a string that ends in a zero.
    let name = unsafe { CStr::from_ptr(name) };
    // SAFETY: the function is only taken as an address here; who calls it has it from the same text.
    let found = unsafe { LIBRARY.get().unwrap().get::<unsafe extern "C" fn()>(name.to_bytes_with_nul()) };
    let text = name.to_string_lossy();
    let for_processors_only = text.starts_with("attention_") && text.ends_with("_f32");
    assert_eq!(found.is_err(), for_processors_only, "kernel {text}");
    found.map_or(std::ptr::null_mut(), |kernel| *kernel as *mut c_void)
}

fn compiled() -> PathBuf {
    let out = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("libella_emulated-{}.so", std::process::id()));
    let compiler = std::env::var_os("CXX").unwrap_or_else(|| "c++".into());
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("cpp/emulated.cpp");
    let mut command = Command::new(compiler);
    command.args(["-std=c++20", "-O2", "-fno-strict-aliasing", "-fPIC", "-shared", "-w"]);
    // A GPU faults where a processor goes on: at a pack that lies askew, and beyond the end of what a thread has.
    command.args(["-fsanitize=alignment,bounds,signed-integer-overflow", "-fsanitize-undefined-trap-on-error"]);
    command.arg("-o").args([&out, &source]);
    assert!(command.status().unwrap().success(), "the emulator does not compile: {command:?}");
    out
}

fn open(path: &Path) -> Library {
    // SAFETY: the library is of this text; its initialisers ask nothing of the program.
    let library = unsafe { Library::open(Some(path), libc::RTLD_NOW | libc::RTLD_LOCAL) }.unwrap();
    std::fs::remove_file(path).unwrap();
    library
}
