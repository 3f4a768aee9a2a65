//! Rewrites the committed code after a change in `proto/`:
//! `cargo run -p dc-wire --example generate`.

#[path = "mod.rs"]
mod generator;

fn main() -> std::io::Result<()> {
    let committed = generator::committed();
    let folder = committed.parent().ok_or_else(|| std::io::Error::other("no folder"))?;
    let written = generator::generate(folder)?;
    println!("wrote {}", written.display());
    Ok(())
}
