//! From `proto/` to the committed Rust code, without a protoc.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// The services' files; what they import is found beside them.
const FILES: [&str; 3] = ["dcswitch/v1/quorum.proto", "dcswitch/v1/agent.proto", "dcswitch/v1/control.proto"];

/// Where the generated code is committed.
pub fn committed() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("pb/dcswitch.v1.rs")
}

/// Every method as its gRPC path, as in `/dcswitch.v1.Quorum/Vote`.
///
/// Errors: as `generate`.
#[allow(dead_code)] // the test asks, the generator does not
pub fn methods() -> io::Result<Vec<String>> {
    let mut found = Vec::new();
    for file in descriptors()?.file {
        for service in &file.service {
            for method in &service.method {
                found.push(format!("/{}.{}/{}", file.package(), service.name(), method.name()));
            }
        }
    }
    Ok(found)
}

/// Writes the code for all services into `folder`, as the one file `dcswitch.v1.rs`.
///
/// Repeat: safe, the same input gives the same bytes. Errors: a proto file that does not parse.
pub fn generate(folder: &Path) -> io::Result<PathBuf> {
    fs::create_dir_all(folder)?;
    tonic_prost_build::configure().emit_rerun_if_changed(false).out_dir(folder).compile_fds(descriptors()?)?;
    Ok(folder.join("dcswitch.v1.rs"))
}

fn descriptors() -> io::Result<tonic_prost_build::FileDescriptorSet> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../proto");
    protox::compile(FILES, [root]).map_err(io::Error::other)
}
