//! The guardian.
fn main() {}
