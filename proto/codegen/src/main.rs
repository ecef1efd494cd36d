//! Makes `proto/src/ella.v1.rs` from `ella/v1/ella.proto`, without protoc. With `--check` it writes nothing, and fails if the file
//! is not what the proto file says.

use std::error::Error;
use std::path::Path;
use std::process::ExitCode;

fn main() -> Result<ExitCode, Box<dyn Error>> {
    let check = std::env::args().nth(1).as_deref() == Some("--check");
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().ok_or("this package has no parent folder")?;
    let out = std::env::temp_dir().join(format!("ella-proto-{}", std::process::id()));
    std::fs::create_dir_all(&out)?;
    let files = protox::compile([root.join("ella/v1/ella.proto")], [root])?;
    tonic_prost_build::configure().codec_path("crate::codec::SmallCodec").out_dir(&out).compile_fds(files)?;
    let fresh = std::fs::read_to_string(out.join("ella.v1.rs"))?;
    std::fs::remove_dir_all(&out)?;
    let kept = root.join("src/ella.v1.rs");
    if !check {
        std::fs::write(&kept, fresh)?;
        return Ok(ExitCode::SUCCESS);
    }
    if std::fs::read_to_string(&kept)? == fresh {
        return Ok(ExitCode::SUCCESS);
    }
    eprintln!("{} is not what ella.proto says: run `make proto`", kept.display());
    Ok(ExitCode::FAILURE)
}
