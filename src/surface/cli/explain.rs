//! `explain`: the page of an error code. Talks to no agent.

use clap::Args;
use dc_core::codes::Code;
use dc_core::fail::{Exit, Fail};
use serde_json::json;

use super::fails::usage;
use super::out::{Out, envelope};

/// Of `explain`.
#[derive(Debug, Args)]
pub(crate) struct Explain {
    /// As in DC-0207; without one, all are listed
    code: Option<String>,
}

impl Explain {
    pub(crate) fn run(self, out: &Out) -> Result<Exit, Fail> {
        let Some(given) = self.code else {
            list(out);
            return Ok(Exit::Done);
        };
        let digits = given.to_ascii_uppercase();
        let code = Code::from_text(&format!("DC-{}", digits.strip_prefix("DC-").unwrap_or(&digits)));
        let page = code.page().ok_or_else(|| {
            usage("DC-0011", format!("there is no code {given:?}"), "codes look like DC-0207")
                .next("dc-switch explain")
        })?;
        if out.human() {
            out.print(page.trim_end());
        } else {
            out.json(&envelope(json!({"code": code, "page": page})));
        }
        Ok(Exit::Done)
    }
}

fn list(out: &Out) {
    let pages = || {
        Code::all().filter_map(|code| {
            let page = Code::from_text(code).page()?;
            let title = page.lines().next().unwrap_or(code).trim_start_matches("# ");
            Some((code, title))
        })
    };
    if out.human() {
        pages().for_each(|(_, title)| out.print(title));
    } else {
        let all = pages().map(|(code, title)| json!({"code": code, "title": title})).collect();
        out.json(&envelope(serde_json::Value::Array(all)));
    }
}
