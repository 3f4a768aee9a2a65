//! Embeds the pages of the error catalogue, so that a page is a file and nothing else.

#![allow(clippy::disallowed_methods, reason = "the bans are for the room, not for its building")]

use std::fmt::Write;
use std::path::Path;
use std::{env, fs, io};

fn main() -> io::Result<()> {
    let folder = Path::new(&env::var("CARGO_MANIFEST_DIR").map_err(io::Error::other)?).join("codes");
    println!("cargo:rerun-if-changed={}", folder.display());
    let mut pages: Vec<_> = fs::read_dir(&folder)?.collect::<Result<Vec<_>, _>>()?;
    pages.sort_by_key(fs::DirEntry::file_name);
    let mut table = String::from("&[\n");
    for page in pages {
        let path = page.path();
        if let (Some("md"), Some(code)) =
            (path.extension().and_then(|e| e.to_str()), path.file_stem().and_then(|s| s.to_str()))
        {
            let path = path.display().to_string();
            writeln!(table, "    ({code:?}, include_str!({path:?})),").map_err(io::Error::other)?;
        }
    }
    table.push(']');
    let out = env::var("OUT_DIR").map_err(io::Error::other)?;
    fs::write(Path::new(&out).join("pages.rs"), table)
}
