//! Compiles the C++ of this crate against libtorch: what every machine needs into a static library, and the GPU's part into a shared one
//! (`OUT_DIR/libella_gpu.so`), which the crate carries and loads where there is a GPU. Both are compiled on every machine, GPU or not.

use std::path::{Path, PathBuf};
use std::process::Command;

fn main() {
    println!("cargo:rerun-if-changed=cpp");
    println!("cargo:rerun-if-env-changed=LIBTORCH");
    println!("cargo:rerun-if-env-changed=CUDA_HOME");
    let torch = libtorch();
    // For this crate's own tests, as ../model/build.rs does it for other crates' executables.
    println!("cargo:rustc-link-arg=-Wl,-rpath,{}", torch.join("lib").display());
    println!("cargo:rustc-env=LIBTORCH_LIB={}", torch.join("lib").display());
    cc::Build::new()
        .cpp(true)
        .std("c++20")
        .files(["cpp/ops.cpp", "cpp/context.cpp"])
        .includes([torch.join("include"), torch.join("include/torch/csrc/api/include")])
        // Packs of numbers move as words.
        .flags(["-Wno-unknown-pragmas", "-fno-strict-aliasing"])
        .warnings(false)
        .compile("ella_ops");
    let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets it")).join("libella_gpu.so");
    match cuda_headers(&torch) {
        Some(headers) => compile_gpu(&torch, &headers, &out),
        // A libtorch of one's own may have been built without CUDA: then so is this.
        None => {
            println!("cargo:warning=no CUDA headers beside libtorch ({}) or in CUDA_HOME: built without GPU support", torch.display());
            std::fs::write(&out, []).expect("OUT_DIR can be written");
        }
    }
}

fn libtorch() -> PathBuf {
    let torch = std::env::var_os("LIBTORCH").map(PathBuf::from).unwrap_or_default();
    assert!(torch.join("include/ATen/ATen.h").exists(), "LIBTORCH={} has no include/ATen/ATen.h: run `make libtorch`", torch.display());
    torch.canonicalize().unwrap_or(torch)
}

/// Where cuda_runtime_api.h lies: in the wheel beside torch's, or in a toolkit.
fn cuda_headers(torch: &Path) -> Option<PathBuf> {
    let beside = torch.join("../nvidia/cu13/include");
    let toolkit = std::env::var_os("CUDA_HOME").map(|home| PathBuf::from(home).join("include"));
    let here = |folder: &PathBuf| folder.join("cuda_runtime_api.h").exists() && folder.join("crt/host_defines.h").exists();
    let has_cuda = torch.join("lib/libtorch_cuda.so").exists();
    [Some(beside), toolkit].into_iter().flatten().find(|folder| has_cuda && here(folder))
}

/// libtorch's CUDA libraries are named, but what they need in turn is not looked for: it may be on GPU machines only.
fn compile_gpu(torch: &Path, headers: &Path, out: &Path) {
    let compiler = cc::Build::new().cpp(true).get_compiler();
    let mut command = Command::new(compiler.path());
    command
        .args(["-std=c++20", "-O2", "-fPIC", "-shared", "-s", "-fvisibility=hidden", "-Wl,--allow-shlib-undefined"])
        .arg(format!("-I{}", torch.join("include").display()))
        .arg(format!("-I{}", headers.display()))
        .arg("cpp/gpu.cpp")
        .arg(format!("-L{}", torch.join("lib").display()))
        .arg(format!("-L{}", headers.join("../lib").display()))
        .args(["-lc10", "-lc10_cuda", "-ltorch_cpu", "-ltorch_cuda", "-l:libcudart.so.13", "-o"])
        .arg(out);
    let done = command.status().unwrap_or_else(|error| panic!("{}: {error}", compiler.path().display()));
    assert!(done.success(), "the GPU's part does not compile: {command:?}");
}
