//! Failures that arise at this end, and how every failure is told.

use dc_core::codes::Code;
use dc_core::fail::{Exit, Fail};
use serde_json::{Value, json};

use super::out::{Out, clean, envelope};

pub(crate) fn of(code: &str, exit: Exit, what: impl Into<String>, why: impl Into<String>) -> Fail {
    Fail::new(Code::from_text(code), exit, what, why)
}

pub(crate) fn usage(code: &str, what: impl Into<String>, why: impl Into<String>) -> Fail {
    of(code, Exit::Usage, what, why)
}

pub(crate) fn unexpected(what: &str, why: &str) -> Fail {
    of("DC-0018", Exit::Unexpected, what, why).next("dc-switch explain DC-0018")
}

/// A name that was typed and cannot be one.
pub(crate) fn bad_name(cause: &dc_core::ids::BadName) -> Fail {
    let what = "the command names something that cannot be";
    Fail::new(Code::BAD_NAME, Exit::Usage, what, cause.to_string()).next("dc-switch status")
}

/// Tells a failure: in lines to people on stderr; for scripts as one object on stdout besides.
pub(crate) fn print(out: &Out, fail: &Fail) {
    let head = format!("error[{}]", fail.code);
    out.say(&format!("{}: {}", out.red_err(&head), clean(&fail.what)));
    if !fail.why.is_empty() {
        out.say(&format!("  why:  {}", clean(&fail.why)));
    }
    for finding in &fail.findings {
        out.say(&format!("  {}", super::plan::finding_line(out, finding)));
    }
    if !fail.next.is_empty() {
        out.say(&format!("  next: {}", clean(&fail.next)));
    }
    if !out.human() {
        out.json(&envelope(json!({
            "result": word(fail.exit), "exit": fail.exit as i32, "error": body(fail),
        })));
    }
}

/// A failure as scripts read it.
pub(crate) fn body(fail: &Fail) -> Value {
    json!({"code": fail.code, "what": fail.what, "why": fail.why, "next": fail.next, "findings": fail.findings})
}

/// The word for an end, as in `rolled_back`.
pub(crate) fn word(exit: Exit) -> Value {
    // a unit variant is a plain word in JSON
    serde_json::to_value(exit).unwrap_or(Value::Null)
}
