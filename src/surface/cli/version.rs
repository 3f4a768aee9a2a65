//! `version`. Those of the agents are in `status`.

use dc_core::fail::Exit;
use serde_json::json;

use super::out::{Out, envelope};

pub(crate) fn run(out: &Out) -> Exit {
    let version = env!("CARGO_PKG_VERSION");
    if out.human() {
        out.print(&format!("dc-switch {version}"));
    } else {
        out.json(&envelope(json!({"version": version})));
    }
    Exit::Done
}
