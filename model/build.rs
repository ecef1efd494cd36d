//! Gives every executable that links libtorch an rpath to it, so that binaries and tests run without environment variables.
//! Shared by the crates with such executables (`build = "../model/build.rs"`).

fn main() {
    println!("cargo:rerun-if-env-changed=LIBTORCH");
    if let Ok(root) = std::env::var("LIBTORCH") {
        let lib = std::path::Path::new(&root).join("lib");
        let lib = lib.canonicalize().unwrap_or(lib);
        println!("cargo:rustc-link-arg=-Wl,-rpath,{}", lib.display());
    }
}
