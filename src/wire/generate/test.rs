//! What is committed is what the files in `proto/` give, and every method has its row.
#![allow(clippy::unwrap_used)]

#[path = "mod.rs"]
mod generator;

use std::collections::BTreeSet;
use std::fs;

use dc_wire::access::METHODS;

#[test]
fn the_committed_code_equals_the_generated_one() {
    let folder = tempfile::tempdir().unwrap();
    let fresh = fs::read_to_string(generator::generate(folder.path()).unwrap()).unwrap();
    let committed = fs::read_to_string(generator::committed()).unwrap();
    assert!(
        fresh == committed,
        "src/wire/pb is not what proto/ gives: run cargo run -p dc-wire --example generate"
    );
}

#[test]
fn every_method_has_a_row_and_every_row_a_method() {
    let methods: BTreeSet<String> = generator::methods().unwrap().into_iter().collect();
    let rows: BTreeSet<String> = METHODS.iter().map(|row| row.path.to_owned()).collect();
    assert_eq!(rows.len(), METHODS.len(), "a method has two rows");
    let unruled: Vec<_> = methods.difference(&rows).collect();
    assert!(unruled.is_empty(), "no row in access::METHODS says who may call {unruled:?}");
    let unknown: Vec<_> = rows.difference(&methods).collect();
    assert!(unknown.is_empty(), "access::METHODS has rows for what proto/ does not: {unknown:?}");
}
