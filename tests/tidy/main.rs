//! What cargo cannot check of the house: its arrows, its proportions, its words, its pages.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on must say so")]

mod code;
mod files;
mod rooms;

/// A fault, told with its place; a test fails with all of its kind.
fn none(faults: &[String], rule: &str) {
    assert!(faults.is_empty(), "{rule}\n  {}\n", faults.join("\n  "));
}
